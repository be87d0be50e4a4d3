"""Check adapters that come together as members of a stack or as terms of a sum."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import Entry, Rows, is_concrete
from lora_jax._adapter.params import (
    Adapter,
    LoraParams,
    adapter_of,
    adapters_under,
    check,
    is_lora,
    without_adapters,
)
from lora_jax._weights.axes import is_array
from lora_jax._weights.paths import flatten
from lora_jax._weights.ranges import Part, overlap, part_of


def check_single(x: Any, name: str) -> Adapter:
    """Return the adapter of a LoraParams, or an Adapter; ``name`` begins the messages.

    Raises:
        TypeError: it is neither of the two.
        ValueError: it is a stack, or does not fit.
    """
    adapter = adapter_of(x)
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"{name} is {type(adapter).__name__}, expected a LoraParams as lora_jax.lorafy "
            "returns, or its .adapter"
        )
    for key, f in adapter.factors.items():
        if is_array(f.scale) and len(f.scale.shape) == 1:
            raise ValueError(
                f"{name} is a stack: scale of {key!r} has shape {tuple(f.scale.shape)}, expected a "
                "0-d array. lora_jax.many.unstack makes single adapters of it"
            )
    if is_lora(x):
        check(x)
    else:  # every key as a leaf of its own
        weights = {k: jax.ShapeDtypeStruct(f.weight_shape, "b") for k, f in x.factors.items()}
        check(LoraParams(None, x), {**x.full, **weights})
    return adapter


def with_adapter(x: Any, adapter: Adapter) -> Any:
    """Return the adapter as ``x`` has it: with the base of ``x`` if it has one, or alone."""
    return replace(x, adapter=adapter) if is_lora(x) else adapter


def check_finite(adapter: Adapter, name: str, remedy: str) -> jax.Array | None:
    """Return whether all traced arrays are finite; None if none is traced.

    Raises:
        ValueError: an array with a value is not finite.
    """
    fields = adapter.arrays()
    with jax.ensure_compile_time_eval():  # inside of a trace, too
        known = {at: jnp.isfinite(x).all() for at, x in fields.items() if is_concrete(x)}
        known = jax.device_get(known)
    for (key, field), is_finite in known.items():
        if not is_finite:
            raise ValueError(f"{name} has NaNs or infinities in {field} of {key!r}: {remedy}")
    traced = [jnp.isfinite(x).all() for at, x in fields.items() if at not in known]
    return jnp.stack(traced).all() if traced else None


def check_same_base(names: str, one: LoraParams, other: LoraParams) -> None:
    """Raise unless two bases are the same arrays; ``names`` begins the messages."""
    (leaves, tree), (others, other_tree) = (flatten(without_adapters(x)) for x in (one, other))
    if tree != other_tree:
        where = sorted(leaves.keys() ^ others.keys())[:5] or "their containers"
        raise ValueError(f"{names} are over different bases: they differ in {where}")
    under = [jax.tree.leaves(adapters_under(p)) for p in (one, other)]
    if list(map(id, under[0])) != list(map(id, under[1])):
        raise ValueError(
            f"{names} are over different frozen adapters. Equal values are not enough: give both "
            "one base, LoraParams(x.base, y.adapter) in place of y"
        )
    for path, x in leaves.items():
        pairs = zip(jax.tree.leaves(x), jax.tree.leaves(others[path]), strict=False)
        if all(x is y or (not is_array(x) and x == y) for x, y in pairs):
            continue
        is_residual = any(f.residual for p in (one, other) for f in p.adapter.factors.values())
        hint = (
            "One is residual, as PiSSA's: its factors are taken out of its own base. "
            "lora_jax.algebra.to_plain makes a plain one of it, on the base as it was"
            if is_residual
            else "Equal values are not enough: give both one base, LoraParams(x.base, y.adapter) "
            "in place of y, and under jit let the base be one argument; or pass the Adapters alone"
        )
        raise ValueError(f"{names} are over different bases: {path!r} is not one array. {hint}")


def check_parts(
    verb: str, adapters: Mapping[str, Adapter], leaves: Mapping[str, Any] | None, remedy: str
) -> None:
    """Raise if adapters, by their names, update overlapping parts that are not the same part."""
    seen: dict[str, dict[str, tuple[str, Part]]] = {}
    for name, adapter in adapters.items():
        parts = [(described(k, f), part_of(k, leaves)) for k, f in adapter.factors.items()]
        parts += [(f"all of {path!r}", Part(path)) for path in adapter.full]
        for what, part in parts:
            there = seen.setdefault(part.path, {})
            for other, (owner, theirs) in there.items():
                if other != what and overlap(part.ranges, theirs.ranges):
                    is_rows = what.startswith("rows ") and other.startswith("rows ")
                    why = (
                        "adapters of one table must train the same rows"
                        if is_rows
                        else "these overlap: an entry of a weight has one update"
                    )
                    raise ValueError(
                        f"{verb}: {owner} trains {other} and {name} {what}, and {why}. {remedy}"
                    )
            there.setdefault(what, (name, part))


def described(key: str, f: Entry) -> str:
    """Describe an entry for a message: its key, and which rows of a table it is of."""
    return f"rows {list(f.ids)} of {key!r}" if isinstance(f, Rows) else repr(key)
