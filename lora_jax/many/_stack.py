"""Stack adapters over one base: every array of the adapter gets a leading axis, of members.

A stack goes through ``jax.vmap`` with ``in_axes=LoraParams(base=None, adapter=0)``. An entry that
an adapter lacks is zero in both ``a`` *and* ``b``: a saddle, where the gradient is zero.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lora_jax._adapter.checks import check_parts, check_same_base, check_single, with_adapter
from lora_jax._adapter.factors import Rows
from lora_jax._adapter.params import Adapter, LoraParams, without_adapters
from lora_jax._weights.axes import is_array
from lora_jax._weights.numbers import is_int
from lora_jax._weights.paths import flatten
from lora_jax.many._fit import Schema, Wanted, blank, fit

Stack = TypeVar("Stack", LoraParams, Adapter)


def stack(adapters: Sequence[Stack], rank: int | None = None) -> Stack:
    """Stack adapters of one base, of any ranks, alphas and targets.

    Every array of the adapter gets a leading axis, one member per adapter, in the order given::

        a [N, *batch, *in, r]    b [N, *batch, r, *out]    scale [N]

    ``jax.vmap(lora_jax.lora(fn), in_axes=(LoraParams(base=None, adapter=0), ...))`` runs all
    members in one program, which multiplies each base weight once, by the inputs of all.

    Ranks are padded with zeros in both factors, and a target that an adapter lacks has zero factors
    and scale 0. The gradient of such an entry is always zero, so whatever updates entries by their
    gradients (SGD, Adam, AdamW, Lion, clipping by the global norm) leaves it zero, and training the
    stack equals training each member on its own; a mean over entries, such as Adafactor's, counts
    the zeros. Full leaves and DoRA magnitudes cannot be zero: a member that lacks one gets the
    base's value, which trains too.

    Args:
        adapters: LoraParams over the same arrays, or Adapters of one base.
        rank: the rank of all factors, so that :func:`replace_at` can put in adapters up to it; None
            is the largest rank at each weight. Table rows that train on their own keep theirs.

    Returns:
        A LoraParams of that base, or an Adapter. A traced adapter with NaNs or infinities cannot be
        refused: its factors become zero and its scales NaN. So its own results are NaN, and no
        product over all members carries that to another. Its other arrays stay.

    Raises:
        TypeError: ``adapters`` are not adapters, or are of both kinds.
        ValueError: there are none; they differ in base, layout, dtype or static fields; parts of a
            weight overlap; ``rank`` is too small; values are not finite; or an entry that an
            adapter lacks cannot be filled in without the base.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((3, 2))}, "value": {"kernel": jnp.ones((3, 2))}}
        >>> first = lora_jax.lorafy(params, rank=2)
        >>> second = lora_jax.lorafy(params, rank=1, targets="value/kernel")
        >>> both = lora_jax.many.stack([first, second])
        >>> both.adapter.factors["query/kernel"].a.shape
        (2, 3, 2)
        >>> apply = lora_jax.lora(lambda p, x: (x @ p["query"]["kernel"], x @ p["value"]["kernel"]))
        >>> axes = lora_jax.LoraParams(base=None, adapter=0)
        >>> queries, values = jax.vmap(apply, in_axes=(axes, None))(both, jnp.ones((1, 3)))
        >>> values.shape
        (2, 1, 2)
    """
    if isinstance(adapters, LoraParams | Adapter | str) or not isinstance(adapters, Iterable):
        raise TypeError(
            f"stack: adapters is {type(adapters).__name__}, expected a sequence: stack([one, two])"
        )
    adapters = list(adapters)
    if not adapters:
        raise ValueError("stack: there are no adapters: expected at least one")
    if rank is not None and not is_int(rank):
        raise TypeError(f"stack: rank={rank!r}: expected an int, or None")
    first = adapters[0]
    singles: dict[str, Adapter] = {}
    for n, x in enumerate(adapters):
        singles[f"adapters[{n}]"] = check_single(x, f"stack: adapters[{n}]")
        if type(x) is not type(first):
            raise TypeError(
                f"stack: adapters[0] is {type(first).__name__} and adapters[{n}] "
                f"{type(x).__name__}: pass LoraParams only, or Adapters only"
            )
    base, leaves = None, None
    if isinstance(first, LoraParams):
        base, leaves = first.base, flatten(without_adapters(first))[0]
        others: list[Any] = adapters[1:]
        for n, x in enumerate(others, 1):
            check_same_base(f"stack: adapters[0] and adapters[{n}]", first, x)
    remedy = "Train the same parts in all of them, or make two stacks"
    check_parts("stack", singles, leaves, remedy)
    full: dict[str, tuple[str, Any]] = {}
    for name, x in singles.items():
        for path, leaf in x.full.items():
            full.setdefault(path, (name, leaf))
    schema = Schema(_union(singles, rank, leaves is not None), full, base)
    below = blank(schema)
    members = [fit(x, f"stack: {name}", schema, below) for name, x in singles.items()]
    return with_adapter(first, jax.tree.map(lambda *xs: jnp.stack(xs), *members))


def _union(singles: dict[str, Adapter], rank: int | None, has_base: bool) -> dict[str, Wanted]:
    """Return the union of all keys: fields of the first adapter with the key, the largest rank."""
    suffice = any if has_base else all  # without the base, missing norms cannot be filled in
    found: dict[str, Wanted] = {}
    for key in dict.fromkeys(key for x in singles.values() for key in x.factors):
        has = {name: x.factors[key] for name, x in singles.items() if key in x.factors}
        (owner, f), *_ = has.items()
        largest = max(has, key=lambda name: has[name].rank)
        r = has[largest].rank
        if rank is not None and not isinstance(f, Rows):
            if rank < r:
                raise ValueError(
                    f"stack: rank={rank}, and {largest} has rank {r} at {key!r}: expected at least "
                    f"the largest; or shrink it, lora_jax.algebra.resize(adapter, {rank})"
                )
            r = int(rank)
        norms = [f.norm for f in has.values()]
        norm = next(filter(is_array, norms)) if suffice(map(is_array, norms)) else None
        wanted = f if f.norm is norm else replace(f, norm=norm)
        found[key] = Wanted(owner, wanted, r)
    return found
