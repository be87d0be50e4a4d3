"""Axes that are split and joined, as by ``reshape``, in weights and in their factors."""

import dataclasses
from collections.abc import Sequence
from math import prod
from typing import Any

import jax
from jax import lax

from lora_jax._transform.delta import Delta, Labels
from lora_jax._transform.lora_array import LoraArray


def regroup(delta: Delta, old: Sequence[int], new: Sequence[int], groups: Any) -> Any:
    """The delta after a reshape; None where it would merge axes of different roles."""
    past = delta.past.regrouped(groups, len(new))
    if delta.is_probe:
        if any(len(olds) > 1 for olds, _ in groups):
            return None
        ranges = {olds[0]: news[0] for olds, news in groups if len(news) == 1}
        kept = [r._replace(axis=ranges[r.axis]) for r in delta.ranges if r.axis in ranges]
        return dataclasses.replace(delta, past=past, ranges=tuple(kept))
    for olds, news in groups:
        if len(olds) == len(news) == 1:
            continue
        for r in delta.ranges:  # a part along an axis of no factor is one of the others' factor
            if r.axis in olds and not delta.has(r.axis):
                for name in ("a", "b"):
                    delta = _broadcast_into(delta, name, r.axis, olds, r.stop - r.start)
        delta = delta.whole(olds, old)
        owners = {(i in delta.a_labels, i in delta.b_labels) for i in olds} - {(False, False)}
        if len(owners) > 1:
            return None
        for i in olds:  # an axis of no factor, merged with one of this one's
            for name in delta.parts:
                delta = _broadcast_into(delta, name, i, olds, old[i])
    delta = delta.map(lambda x, labels: _regroup_factor(x, labels, groups, new))
    position = {olds[0]: news[0] for olds, news in groups if len(olds) == len(news) == 1}
    ranges = tuple(r._replace(axis=position[r.axis]) for r in delta.ranges)
    return dataclasses.replace(delta, past=past, ranges=ranges)


def _broadcast_into(delta: Delta, name: str, axis: int, group: Sequence[int], size: int) -> Delta:
    """The delta with the axis in this part, if the part has another axis of the group."""
    x, labels = delta.part(name)
    if axis in labels or not set(group).intersection(labels):
        return delta
    return dataclasses.replace(
        delta, **{name: lax.broadcast(x, (size,)), f"{name}_labels": (axis, *labels)}
    )


def _regroup_factor(x: jax.Array, labels: Labels, groups, shape) -> tuple[jax.Array, Labels]:
    """Reshape one factor: groups it owns in ``W``'s order, then the rank axis."""
    owned = [(old, new) for old, new in groups if old[0] in labels]
    grouped = [i for old, _ in owned for i in old]
    ones = [i for i in labels if i not in grouped and i >= 0]  # size 1: dropped by the reshape
    rank = [lab for lab in labels if lab not in grouped and lab not in ones]  # a gain has none
    order = [labels.index(lab) for lab in (*grouped, *ones, *rank)]
    sizes = []
    for old, new in owned:
        if len(old) == len(new) == 1:  # it may cover a range of the axis only
            sizes.append(x.shape[labels.index(old[0])])
        else:
            sizes += [shape[j] for j in new]
    if order != sorted(order):
        x = x.transpose(order)
    new_labels = tuple(j for _, new in owned for j in new)
    return x.reshape(*sizes, *x.shape[x.ndim - len(rank) :]), (*new_labels, *rank)


def settle(v: Any) -> Any:
    """A probed weight whose axes stay merged; any other value as it is."""
    if not isinstance(v, LoraArray) or v.unfolded is None:
        return v
    if not all(delta.is_probe for delta in v.deltas):
        return v
    groups = axis_groups(v.unfolded, v.shape)

    def merged(delta: Delta) -> Delta:
        past = delta.past.regrouped(groups, len(v.shape))
        return dataclasses.replace(delta, past=past, ranges=())

    return LoraArray(v.w, tuple(map(merged, v.deltas)))


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
