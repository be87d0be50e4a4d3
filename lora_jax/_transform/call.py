"""``Call``: the arguments of one call, flattened; ``enter``: the weights as they enter it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import _jax
from lora_jax._adapter.factors import Rows
from lora_jax._adapter.params import LoraParams, check, is_lora, without_adapters
from lora_jax._transform.delta import Delta
from lora_jax._transform.dora import delta_of
from lora_jax._transform.labelled import Axis, Labelled
from lora_jax._transform.lazy import Lazy
from lora_jax._transform.lora_array import LoraArray, frozen
from lora_jax._transform.one_hot import OneHot
from lora_jax._transform.origin import Leaf
from lora_jax._transform.pick import Router, Slot
from lora_jax._transform.whole import watched
from lora_jax._weights.paths import flatten
from lora_jax._weights.quantized import is_quantized
from lora_jax._weights.target import fold_in_path


def is_traced(x: Any) -> bool:
    """Return whether an argument's leaf is traced, rather than handed on as it is."""
    kinds = jax.Array | np.ndarray | np.generic | LoraArray | jax.ShapeDtypeStruct
    return isinstance(x, kinds)


def enter(
    lora_params: LoraParams,
    owner: int,
    leaves: dict[str, Any],
    key: Any = None,
    pick: Slot | Mapping[str, Router] | None = None,
) -> dict[str, Any]:
    """Return the base's leaves as they enter the function: frozen, adapted or full.

    Args:
        lora_params: the base and an adapter, or a stack of adapters.
        owner: the position of ``lora_params`` among the arguments.
        leaves: the leaves of the base, by path.
        key: a PRNG key for dropout, if there is any.
        pick: which members of a stack count: one slot, or routers by the keys of the factors.
    """
    parts = check(lora_params if pick is None else _one_of(lora_params), leaves).parts
    factors, full = lora_params.adapter.factors, lora_params.adapter.full
    entered, freeze = {}, watched  # one scale tells of all
    if isinstance(lora_params.base, LoraParams):
        under, frozen_adapter = lora_params.base
        frozen_adapter = jax.tree.map(_frozen, frozen_adapter)
        leaves = enter(LoraParams(under, frozen_adapter), owner, leaves)
    for path, leaf in leaves.items():
        if path in full:
            new = _picked(full[path], leaf, pick) if isinstance(pick, Slot) else full[path]
            leaf = _cast(new, leaf.dtype)
        elif isinstance(leaf, jax.Array):
            if not factors and freeze is watched and jnp.issubdtype(leaf.dtype, jnp.inexact):
                freeze = lax.stop_gradient
                watched(leaf[(slice(0, 0),) * leaf.ndim])  # there is no scale that would tell
            leaf = lax.stop_gradient(leaf)
        elif is_quantized(leaf):
            leaf = Lazy.of(jax.tree.map(lax.stop_gradient, leaf))
        entered[path] = leaf
    for name, f in factors.items():
        path, ranges = parts[name]
        leaf = entered[path]
        deltas = leaf.deltas if isinstance(leaf, LoraArray) else ()
        w = leaf.w if isinstance(leaf, LoraArray) else leaf
        if f.frozen:
            f = f.map(lambda n, x, f=f: lax.stop_gradient(x) if n in f.frozen else x)
        make = functools.partial(
            delta_of, leaf=Leaf(owner, path), ranges=ranges, w=w, freeze=freeze
        )
        freeze = lax.stop_gradient
        if pick is None:
            delta = make(f)
        else:
            own = pick if isinstance(pick, Slot) else pick[name]
            delta = _in_stack(jax.vmap(make)(_arrays(f)), own)
        if key is not None and not isinstance(f, Rows):  # table rows are never dropped
            delta = replace(delta, key=fold_in_path(key, f"{owner}/{name}"))
        entered[path] = LoraArray(w, (*deltas, delta))
    return entered


def _frozen(x: Any) -> Any:
    return lax.stop_gradient(x) if isinstance(x, jax.Array) else x


def _in_stack(delta: Delta, pick: Slot | Router) -> Delta:
    """Label the first axis of a delta's arrays as that of a stack's members."""

    def label(x: Labelled) -> Labelled:
        if not isinstance(x, OneHot):  # all members have the same rows
            return Labelled(x.array, (Axis.MEMBER, *x.labels))
        if isinstance(pick, Slot):
            return x
        return x.broadcast({Axis.MEMBER: delta.scale.shape[0]})

    delta = delta.map(label)
    scale = pick.scale(delta.scale) if isinstance(pick, Slot) else delta.scale
    return replace(delta, pick=pick, scale=scale)


def _one_of(stacked: LoraParams) -> LoraParams:
    """Return the shapes of one member of a stack."""

    def one(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if jnp.ndim(x) else x

    return LoraParams(stacked.base, jax.tree.map(one, stacked.adapter))


def _arrays(tree: Any) -> Any:
    """Convert NumPy's arrays to JAX's, which traced numbers can index."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)


def _picked(full: Any, leaf: Any, slot: Slot) -> Any:
    """Pick a member's full leaf from a stack's, ``[member, *leaf]``; the base's own at -1."""
    # in the leaf's dtype, so that the base's own is exact; other dtypes have no NaN
    dtype = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.inexact) else full.dtype
    k = jnp.clip(slot.index, 0, full.shape[0] - 1)
    one = _arrays(full).at[k].get(mode="promise_in_bounds", wrap_negative_indices=False)
    base = lax.stop_gradient(leaf).astype(dtype)
    other = jnp.where(slot.index == -1, base, jnp.full_like(base, jnp.nan))
    return jnp.where(slot.index == k, one.astype(dtype), other)


def _put_off(x: Any) -> Any:
    """Let a quantized leaf, adapted or not, be built where it is used."""
    if isinstance(x, LoraArray):
        return replace(x, w=Lazy.of(x.w)) if is_quantized(x.w) else x
    x = Lazy.of(x) if is_quantized(x) else x
    return LoraArray(x, ()) if isinstance(x, Lazy) else x


def _cast(x: Any, dtype: Any) -> Any:
    is_shape = isinstance(x, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(x.shape, dtype) if is_shape else x.astype(dtype)


@dataclass
class Call:
    """The arguments of one call, flattened.

    Attributes:
        structure: the structure of the arguments, with every LoraParams as a leaf.
        places: for each such leaf its own structure, and for each of its leaves None if it is
            traced, else a tuple of it.
        values: one for each traced leaf: an array or a :class:`LoraArray`.
        lora_params: the LoraParams, by position among the leaves.
        leaves: the leaves of their bases, by path.
    """

    structure: Any
    places: list[tuple[Any, list[Any]]]
    values: list[Any]
    lora_params: dict[int, LoraParams]
    leaves: dict[int, dict[str, Any]]

    @classmethod
    def of(
        cls,
        args: Any,
        kwargs: Any,
        enter: Callable[[LoraParams, int, dict[str, Any]], Mapping[str, Any]] = enter,
    ) -> "Call":
        """Flatten the arguments.

        ``enter(lora_params, position, leaves)`` returns the leaves of a LoraParams' base, by path,
        as they enter the function.
        """
        nodes, structure = jax.tree.flatten((args, kwargs), is_leaf=is_lora)
        lora_params = {i: node for i, node in enumerate(nodes) if is_lora(node)}
        found = {i: flatten(without_adapters(node))[0] for i, node in lora_params.items()}
        call = cls(structure, [], [], lora_params, found)
        if not call.lora_params:
            raise ValueError(
                "lora(fn) was called without a LoraParams among its arguments. Pass what "
                "lora_jax.lorafy returned; for the base model, call the function itself"
            )
        for i, node in enumerate(nodes):
            leaves, tree = [node], jax.tree.structure(0)
            if i in lora_params:
                leaves, tree = enter(node, i, found[i]).values(), flatten(without_adapters(node))[1]
            leaves = list(map(_put_off, leaves))
            call.places.append((tree, [None if is_traced(x) else (x,) for x in leaves]))
            call.values += [x for x in leaves if is_traced(x)]
        return call

    def trace(self, fn: Callable[..., Any]) -> Any:
        """Trace ``fn`` on the frozen arrays: see ``_jax.trace``."""

        def flat_fn(*arrays):
            rest = iter(arrays)
            rebuilt = [
                jax.tree.unflatten(tree, [next(rest) if s is None else s[0] for s in static])
                for tree, static in self.places
            ]
            args, kwargs = jax.tree.unflatten(self.structure, rebuilt)
            return fn(*args, **kwargs)

        arrays = [x.aval if isinstance(x, Lazy) else x for x in frozen(self.values)]
        with jax.disable_jit(False):
            return _jax.trace(flat_fn, arrays)

    def paths_read(self, owner: int, read: Sequence[bool]) -> set[str]:
        """Return the paths of a LoraParams that are read; ``read`` has a flag per traced leaf."""
        flags = iter(read)
        by_node = [[s is None and next(flags) for s in static] for _, static in self.places]
        return {path for path, r in zip(self.leaves[owner], by_node[owner], strict=True) if r}
