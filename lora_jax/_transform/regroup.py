"""Axes that a reshape splits and joins, in a weight and in its factors."""

from collections.abc import Sequence
from math import prod
from typing import Any

from lora_jax._transform.labelled import Axis, Labelled
from lora_jax._transform.origin import Groups


def axis_groups(old: Sequence[int], new: Sequence[int]) -> Groups:
    """Pair the axes of two shapes under a row-major reshape, as finely as can be.

    Axes of size 1 are left out.

    >>> axis_groups((6, 4, 1), (2, 3, 1, 4))
    [((0,), (0, 1)), ((1,), (3,))]
    """
    olds = [i for i, size in enumerate(old) if size != 1]
    news = [j for j, size in enumerate(new) if size != 1]
    groups = []
    while olds or news:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (a := prod(old[i] for i in left)) != (b := prod(new[j] for j in right)):
            is_left = olds and (not news or _is_smaller(a, b))
            (left.append(olds.pop(0)) if is_left else right.append(news.pop(0)))
        groups.append((tuple(left), tuple(right)))
    return groups


def _is_smaller(a: Any, b: Any) -> bool:
    """Return whether ``a < b``; of symbolic sizes, which may have no order, whether it divides."""
    return a < b if isinstance(a, int) and isinstance(b, int) else b % a == 0


def joined(x: Labelled, axis: int, group: Sequence[int], size: int) -> Labelled:
    """Give ``x`` an axis, constant along it, if it has another axis of the group."""
    if axis in x.labels or not set(group).intersection(x.labels):
        return x
    return x.broadcast({axis: size})


def regroup(x: Labelled, groups: Groups, shape: Sequence[int]) -> Labelled:
    """Reshape ``x``: the groups that it has, in the order of ``W``'s axes; the others stay last.

    Args:
        x: a factor, with all axes of a group or none.
        groups: pairs of axes before and after.
        shape: the shape of ``W`` afterwards.
    """
    owned = [(old, new) for old, new in groups if old[0] in x.labels]
    grouped = [i for old, _ in owned for i in old]
    rest = [lab for lab in x.labels if lab not in grouped]
    ones = [i for i in rest if not isinstance(i, Axis)]  # of size 1: the reshape drops them
    kept = [lab for lab in rest if isinstance(lab, Axis)]  # none in a gain
    order = [x.axis(lab) for lab in (*grouped, *ones, *kept)]
    sizes = []
    for old, new in owned:
        if len(old) == len(new) == 1:  # x may cover a range of it
            sizes.append(x.array.shape[x.axis(old[0])])
        else:
            sizes += [shape[j] for j in new]
    y = x.array.transpose(order) if order != sorted(order) else x.array
    y = y.reshape(*sizes, *y.shape[y.ndim - len(kept) :])  # [*groups, *kept]
    return Labelled(y, (*(j for _, new in owned for j in new), *kept))
