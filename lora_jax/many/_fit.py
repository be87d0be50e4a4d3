"""One adapter as a row of a stack: what it lacks there is filled in, what differs is refused."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax._adapter.checks import check_finite
from lora_jax._adapter.factors import Factors, master, weight_shape
from lora_jax._adapter.lowrank import padded
from lora_jax._adapter.norms import with_norms
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.axes import is_array
from lora_jax._weights.paths import PyTree
from lora_jax._weights.ranges import rows_of

_REMEDIES = {
    "layout": "make them with the same layout=",
    "frozen": "make them with the same freeze=, or set it: dataclasses.replace(factors, frozen=())",
    "residual": "the base of a residual adapter, such as PiSSA's, is its own. Make a plain one of "
    "it, lora_jax.algebra.to_plain",
    "dtype": "a cast might lose digits. Cast one of them, by dataclasses.replace",
    "magnitude": "stack DoRA with DoRA",
}


class Slot(NamedTuple):
    """What every row has at one key of the factors.

    Attributes:
        name: of the adapter that ``f`` is of, for messages.
        f: factors as the row's are to be, but for the rank.
        rank: of the row's.
    """

    name: str
    f: Factors
    rank: int


class Slots(NamedTuple):
    """What every row has.

    Attributes:
        factors: by key.
        full: of leaves trained whole, by path, who trains it and its like.
        base: the parameters; None if they are not known.
        leaves: of the base, by path; None if they are not known.
    """

    factors: Mapping[str, Slot]
    full: Mapping[str, tuple[str, Any]]
    base: PyTree
    leaves: Mapping[str, Any] | None


def fitted(adapter: Adapter, name: str, slots: Slots) -> Adapter:
    """The adapter as a row: all that the slots have, zero where it lacks it.

    Raises:
        ValueError: it has something otherwise, is not finite, or cannot be filled in.
    """
    remedy = "in a product over all adapters 0 * NaN would be NaN for the others. Leave it out"
    is_finite = check_finite(adapter, name, remedy)
    factors = {}
    for key, slot in slots.factors.items():
        f = adapter.factors.get(key)
        if f is None:
            f = _absent(key, slot, name, slots)
        else:
            _check_agree(key, slot, f, name)
            f = replace(padded(f, slot.rank), norm=_norm(key, f, slot, name, slots))
        like = slot.f.scale if is_array(slot.f.scale) else jnp.float32(0)
        is_float = jnp.issubdtype(like.dtype, jnp.floating)
        scale = jnp.asarray(f.scale, like.dtype if is_float else jnp.float32)
        if is_finite is not None:
            a, b = (jnp.where(is_finite, x, jnp.zeros_like(x)) for x in (f.a, f.b))
            f = replace(f, a=a, b=b)
            scale = jnp.where(is_finite, scale, jnp.full_like(scale, jnp.nan))
        factors[key] = replace(f, scale=scale)
    full = {
        path: _whole(path, adapter.full.get(path), name, owner, like, slots)
        for path, (owner, like) in slots.full.items()
    }
    return Adapter(factors, full)


def _check_agree(key: str, slot: Slot, f: Factors, name: str) -> None:
    """Raise if two adapters have different things at one key."""

    def differ(field, mine, theirs, remedy):
        return ValueError(
            f"{name} and {slot.name} differ at {key!r}: {field} is {mine!r} here and {theirs!r} "
            f"there; {_REMEDIES.get(remedy, remedy)}"
        )

    for field in ("layout", "frozen", "residual"):
        mine, theirs = getattr(f, field), getattr(slot.f, field)
        if mine != theirs:
            raise differ(field, mine, theirs, field)
    if (mine := weight_shape(f)) != (theirs := weight_shape(slot.f)):
        raise differ("the weight's shape", mine, theirs, "they are of different models")
    if (mine := f.magnitude is not None) != (theirs := slot.f.magnitude is not None):
        raise differ("whether there is a magnitude", mine, theirs, "magnitude")
    for field in ("a", "b", "scale", "magnitude"):
        x, y = getattr(f, field), getattr(slot.f, field)
        if is_array(x) and is_array(y) and x.dtype != y.dtype:
            raise differ(f"the dtype of {field}", str(x.dtype), str(y.dtype), "dtype")
    if f.rank > slot.rank:
        raise ValueError(
            f"{name} has rank {f.rank} at {key!r}, and {slot.name} {slot.rank}: shrink it, "
            f"lora_jax.algebra.resize(adapter, {slot.rank}), or leave room, "
            f"lora_jax.many.stack(..., rank={f.rank})"
        )


def _absent(key: str, slot: Slot, name: str, slots: Slots) -> Factors:
    """Factors that are not there: zero, with the norms of the base's columns."""
    like, n = slot.f, slot.f.layout.count("b")
    if like.residual and slots.leaves is None:
        raise ValueError(
            f"{name} has no factors of {key!r}, and those of {slot.name} are residual, as PiSSA's: "
            "whether both are over one base is not known. Pass LoraParams, which hold the base"
        )
    if rows_of(key) is None:
        a = jnp.zeros((*like.a.shape[:-1], slot.rank), like.a.dtype)
        b = jnp.zeros((*like.b.shape[:n], slot.rank, *like.b.shape[n + 1 :]), like.b.dtype)
    else:
        a, b = jnp.zeros(like.a.shape, like.a.dtype), jnp.zeros(like.b.shape, like.b.dtype)
    f = replace(like, a=a, b=b, scale=0.0)
    if like.magnitude is None:
        return f
    if slots.leaves is None:
        raise ValueError(
            f"{name} has no factors of {key!r}, and {slot.name} has DoRA there: the norms of the "
            "base's columns, which fill in its magnitude, are not known. Pass LoraParams, which "
            "hold the base"
        )
    norm = _norm_of_base(key, f, slots)
    magnitude = jnp.sqrt(norm).astype(like.magnitude.dtype)
    return replace(f, magnitude=magnitude, norm=None if like.norm is None else norm)


def _norm(key: str, f: Factors, slot: Slot, name: str, slots: Slots) -> Any:
    """The norm of a row, where the slot has one: never another row's, which may be NaN."""
    if slot.f.norm is None or f.norm is not None:
        return None if slot.f.norm is None else f.norm
    if slots.leaves is None:
        raise ValueError(
            f"{name} has no norms of the base's columns at {key!r}, as {slot.name} has. Pass "
            "LoraParams, which hold the base"
        )
    return _norm_of_base(key, f, slots)


def _norm_of_base(key: str, f: Factors, slots: Slots) -> Any:
    return with_norms(LoraParams(slots.base, Adapter({key: f}))).adapter.factors[key].norm


def _whole(path: str, x: Any, name: str, owner: str, like: Any, slots: Slots) -> Any:
    """A leaf trained whole; if it is not there, the base's."""
    if x is not None:
        if tuple(x.shape) != tuple(like.shape):
            raise ValueError(
                f"{name} and {owner} differ at {path!r}: its shape is {tuple(x.shape)} here and "
                f"{tuple(like.shape)} there; they are of different models"
            )
        if x.dtype != like.dtype:
            raise ValueError(
                f"{name} and {owner} differ at {path!r}: its dtype is {x.dtype} here and "
                f"{like.dtype} there; {_REMEDIES['dtype']}"
            )
        return x
    if slots.leaves is None:
        raise ValueError(
            f"{name} does not train {path!r} whole, as {owner} does, and what the base has there "
            "is not known. Pass LoraParams, which hold the base"
        )
    leaf = slots.leaves[path]
    with jax.numpy_dtype_promotion("standard"):
        is_exact = jnp.promote_types(leaf.dtype, like.dtype) == like.dtype
    if not is_exact:
        raise ValueError(
            f"{name} does not train {path!r} whole, as {owner} does in {like.dtype}, and the base "
            f"has {leaf.dtype} there; {_REMEDIES['dtype']}"
        )
    return master(leaf).astype(like.dtype)
