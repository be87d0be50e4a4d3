"""What moves a weight without reading it: the deltas follow by their labels."""

import dataclasses
from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp

from lora_jax import _jax
from lora_jax._transform._rules import Context, rule
from lora_jax._transform._value import Labels, LoraArray


@rule("transpose")
def transpose(ctx: Context, eqn, values):
    """Axes change places: labels are renamed, and factors stay where they are."""
    (v,) = values
    permutation = eqn.params["permutation"]
    (w,) = _jax.bind(eqn, [v.w])
    new = {old: i for i, old in enumerate(permutation)}
    deltas = tuple(d.relabel(new) for d in v.deltas)
    origins = tuple(v.origins[old] for old in permutation)
    return [dataclasses.replace(v, w=w, deltas=deltas, origins=origins)]


@rule("convert_element_type", "copy", "copy_p", "pvary")
def convert(ctx: Context, eqn, values):
    """A cast or a copy: the factors stay float32 masters, cast where they are used."""
    (v,) = values
    if not jnp.issubdtype(eqn.params.get("new_dtype", v.w.dtype), jnp.floating):
        return NotImplemented
    (w,) = _jax.bind(eqn, [v.w])
    return [dataclasses.replace(v, w=w)]


@rule("sharding_constraint", "device_put", "optimization_barrier", "name")
def pass_on(ctx: Context, eqn, values):
    """What is asked of the weight's place, order or name is asked of the frozen part."""
    plain = [v.w if isinstance(v, LoraArray) else v for v in values]
    return [
        dataclasses.replace(v, w=out) if isinstance(v, LoraArray) else out
        for v, out in zip(values, _jax.bind(eqn, plain), strict=True)
    ]


@rule("stop_gradient")
def stop_gradient(ctx: Context, eqn, values):
    """No gradient flows to the factors through this use."""
    (v,) = values
    return [jax.tree.map(jax.lax.stop_gradient, v)]


@rule("reshape", "squeeze")
def reshape(ctx: Context, eqn, values):
    """Axes of one role may be split and merged; axes of size 1 come and go."""
    v = values[0]
    (shape,) = (var.aval.shape for var in eqn.outvars)
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        return NotImplemented
    (w,) = _jax.bind(eqn, [v.w])
    return _regroup(v, w, shape)


@rule("broadcast_in_dim")
def broadcast_in_dim(ctx: Context, eqn, values):
    """New axes belong to no factor: every entry along them has the same update."""
    v = values[0]
    dims, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    (w,) = _jax.bind(eqn, [v.w, *values[1:]])
    ones = [1] * len(shape)
    for size, dim in zip(v.shape, dims, strict=True):
        ones[dim] = size
    return _regroup(v, w, ones)


def _regroup(v: LoraArray, w: jax.Array, shape: Sequence[int]):
    groups = axis_groups(v.shape, shape)
    deltas = []
    for delta in v.deltas:
        for old, _ in groups:
            owners = {(i in delta.a_labels, i in delta.b_labels) for i in old}
            if len(owners) > 1:
                return NotImplemented  # the axes of different roles do not merge exactly
        deltas.append(delta.map(lambda x, labels: _regroup_factor(x, labels, groups, shape)))
    origins: list[tuple[int, ...]] = [()] * len(shape)
    for old, new in groups:
        for j in new:
            origins[j] = tuple(k for i in old for k in v.origins[i])
    return [dataclasses.replace(v, w=w, deltas=tuple(deltas), origins=tuple(origins))]


def axis_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The finest pairing of axes of two shapes under a row-major reshape, without axes of size 1.

    >>> axis_groups((6, 4, 1), (2, 3, 1, 4))
    [((0,), (0, 1)), ((1,), (3,))]
    """
    olds = [i for i, size in enumerate(old) if size != 1]
    news = [j for j, size in enumerate(new) if size != 1]
    groups = []
    while olds or news:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (a := prod(old[i] for i in left)) != (b := prod(new[j] for j in right)):
            (left.append(olds.pop(0)) if a < b else right.append(news.pop(0)))
        groups.append((tuple(left), tuple(right)))
    return groups


def _regroup_factor(x: jax.Array, labels: Labels, groups, shape) -> tuple[jax.Array, Labels]:
    """Reshape one factor: groups it owns in ``W``'s order, then the rank axis."""
    owned = [(old, new) for old, new in groups if old[0] in labels]
    grouped = [i for old, _ in owned for i in old]
    ones = [i for i in labels if i not in grouped and i >= 0]  # size 1: dropped by the reshape
    (rank,) = (lab for lab in labels if lab not in grouped and lab not in ones)
    order = [labels.index(lab) for lab in (*grouped, *ones, rank)]
    if order != sorted(order):
        x = x.transpose(order)
    new_labels = tuple(j for _, new in owned for j in new)
    return x.reshape(*(shape[j] for j in new_labels), x.shape[-1]), (*new_labels, rank)
