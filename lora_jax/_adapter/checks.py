"""Adapters that come together, as rows of a stack or as terms of a sum: what has to agree."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import is_concrete, weight_shape
from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._weights.axes import is_array
from lora_jax._weights.paths import flatten
from lora_jax._weights.ranges import Range, entry, overlap, resolve, rows_of, split_range

_ANY = 2**62  # the size of an axis that nobody says


def check_single(x: Any, name: str) -> Adapter:
    """The adapter of a LoraParams, or an Adapter; ``name`` begins the messages.

    Raises:
        TypeError: it is neither of the two.
        ValueError: it is a stack, or does not fit.
    """
    adapter = x.adapter if isinstance(x, LoraParams) else x
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
    if isinstance(x, LoraParams):
        check(x)
    else:  # every key as a leaf of its own
        weights = {key: jax.ShapeDtypeStruct(weight_shape(f), "b") for key, f in x.factors.items()}
        check(LoraParams(None, x), {**x.full, **weights})
    return adapter


def with_adapter(x: Any, adapter: Adapter) -> Any:
    """An adapter as ``x`` has it: with a base, or alone."""
    return replace(x, adapter=adapter) if isinstance(x, LoraParams) else adapter


def check_finite(adapter: Adapter, name: str, remedy: str) -> jax.Array | None:
    """Whether all that is traced is finite; None if nothing is traced.

    Raises:
        ValueError: something that has values is not.
    """
    fields = {
        (key, field): getattr(f, field)
        for key, f in adapter.factors.items()
        for field in ("a", "b", "scale", "magnitude", "norm")
        if getattr(f, field) is not None
    } | {(path, "full"): x for path, x in adapter.full.items()}
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
    (leaves, tree), (others, other_tree) = flatten(one.base), flatten(other.base)
    if tree != other_tree:
        where = sorted(leaves.keys() ^ others.keys())[:5] or "their containers"
        raise ValueError(f"{names} are over different bases: they differ in {where}")
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
    """Raise if parts of a weight overlap that are not one and the same; adapters by their names."""
    seen: dict[str, dict[tuple[str, str], tuple[str, tuple[Range, ...]]]] = {}
    for name, adapter in adapters.items():
        parts = [(key, "", *part_of(key, leaves)) for key in adapter.factors]
        parts += [(path, ", whole,", path, ()) for path in adapter.full]
        for key, whole, path, ranges in parts:
            there = seen.setdefault(path, {})
            for (other, other_whole), (owner, other_ranges) in there.items():
                if (other, other_whole) != (key, whole) and overlap(ranges, other_ranges):
                    is_rows = rows_of(key) is not None and rows_of(other) is not None
                    why = (
                        "of one table all have to train the same rows"
                        if is_rows
                        else "these overlap: an entry of a weight has one update"
                    )
                    raise ValueError(
                        f"{verb}: {owner} trains {other!r}{other_whole} and {name} {key!r}{whole} "
                        f"and {why}. {remedy}"
                    )
            there.setdefault((key, whole), (name, ranges))


def part_of(key: str, leaves: Mapping[str, Any] | None) -> tuple[str, tuple[Range, ...]]:
    """The path and ranges of a key; without a base, by its spelling alone."""
    if leaves is not None:
        return entry(key, leaves)
    if rows_of(key):
        return key[: key.rindex("[[")], ()
    path, ranges = split_range(key)
    if ranges is None:
        return key, ()
    return path, resolve(ranges, path, [_ANY] * (1 + ranges.count(",")))
