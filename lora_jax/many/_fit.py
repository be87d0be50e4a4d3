"""Fit one adapter into a stack: pad ranks, fill missing entries, reject mismatches.

A stack has one shape for all of its members. :class:`Schema` is that shape, :func:`blank` is the
member that changes nothing, and a member is an adapter laid over it.
"""

import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._adapter.checks import check_finite
from lora_jax._adapter.factors import Entry, Rows, master
from lora_jax._adapter.norms import with_norms
from lora_jax._adapter.params import Adapter, LoraParams, without_adapters
from lora_jax._weights.axes import is_array
from lora_jax._weights.paths import PyTree, flatten

_BASE = "Pass LoraParams, which hold the base"


class Wanted(NamedTuple):
    """Describe what every member has at one key.

    Attributes:
        owner: the name of the adapter that ``f`` belongs to, for messages.
        f: an entry like those of the members, but for the rank.
        rank: the rank of the members.
    """

    owner: str
    f: Entry
    rank: int


class Schema(NamedTuple):
    """Describe what every member has.

    Attributes:
        entries: by key.
        full: fully trained leaves by path: the name of an adapter that has one, and one like it.
        base: the parameters; None if they are not known.
    """

    entries: Mapping[str, Wanted]
    full: Mapping[str, tuple[str, Any]]
    base: PyTree


class Blank(NamedTuple):
    """An array of the member that changes nothing.

    Attributes:
        shape: the shape of the array.
        dtype: the dtype of the array.
        make: makes it. The argument is the name of the member that lacks it, for messages.
    """

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[str], Any]


def blank(schema: Schema) -> Adapter:
    """Return the member that changes nothing: zeros, the base's norms, the base's leaves.

    Its arrays are :class:`Blank`: only those that are needed are made. One that needs the base
    raises if the base is not known.
    """
    entries = {key: _blank_entry(key, wanted, schema) for key, wanted in schema.entries.items()}
    leaves = None if schema.base is None else flatten(without_adapters(schema.base))[0]
    full = {
        path: Blank(tuple(like.shape), like.dtype, partial(_leaf, path, owner, like, leaves))
        for path, (owner, like) in schema.full.items()
    }
    return Adapter(entries, full)


def overlay(adapter: Adapter, below: Adapter, put: Callable[..., Any], name: str) -> Adapter:
    """Lay an adapter over a blank member.

    Args:
        adapter: what the member has of its own.
        below: a member, of arrays or of :class:`Blank`.
        put: ``put(mine, like, key, field)`` returns the adapter's array as one like ``like``.
        name: the name of the adapter, for messages.
    """

    def own(key: str, field: str, like: Any) -> Any:
        if field == "full":
            mine = adapter.full.get(key)
        else:
            mine = getattr(adapter.factors.get(key), field, None)
        if mine is not None:
            return put(mine, like, key, field)
        return like.make(name) if isinstance(like, Blank) else like

    return below.map(own)


def fit(adapter: Adapter, name: str, schema: Schema, below: Adapter) -> Adapter:
    """Return the adapter as a member, in JAX arrays; ``below`` is ``blank(schema)``.

    Raises:
        ValueError: it does not agree with the schema, is not finite, or cannot be filled in.
    """
    remedy = "in a product over all adapters 0 * NaN would be NaN for the others. Leave it out"
    is_finite = check_finite(adapter, name, remedy)
    for key, wanted in schema.entries.items():
        if key in adapter.factors:
            check_agree(key, adapter.factors[key], wanted, name, "lora_jax.many.stack(...,")

    def put(mine: Any, like: Blank, key: str, field: str) -> Any:
        if field == "full":
            _check_full(mine, key, name, schema)
            return mine
        return jnp.asarray(mine, like.dtype) if field == "scale" else _pad_to(mine, like.shape)

    member = overlay(adapter, below, put, name)
    if is_finite is None:
        return member

    def guarded(key: str, field: str, x: Any) -> Any:  # a traced member cannot be refused
        fill = {"a": 0, "b": 0, "scale": jnp.nan}.get(field)
        return x if fill is None else jnp.where(is_finite, x, jnp.full_like(x, fill))

    return member.map(guarded)


def check_agree(
    key: str, f: Entry, wanted: Wanted, name: str, room: str, *, is_cast: bool = False
) -> None:
    """Raise if an adapter and a stack have different things at one key.

    Args:
        key: the key.
        f: the adapter's entry.
        wanted: the stack's.
        name: the name of the adapter.
        room: the beginning of the call that makes a stack of a larger rank.
        is_cast: whether dtypes, and what is frozen in training, may differ.
    """
    like = wanted.f

    def compare(what: str, mine: Any, theirs: Any, remedy: str) -> None:
        if mine != theirs:
            raise ValueError(
                f"{name} and {wanted.owner} differ at {key!r}: {what} is {mine!r} here and "
                f"{theirs!r} there; {remedy}"
            )

    mine, theirs = (list(x.ids) if isinstance(x, Rows) else "all" for x in (f, like))
    compare(
        "what trains of the rows", mine, theirs, "adapters of one table must train the same rows"
    )
    compare("layout", f.layout, like.layout, "make them with the same layout=")
    if not is_cast:
        remedy = "make them with the same freeze=, or set it: dataclasses.replace(factors, "
        compare("frozen", f.frozen, like.frozen, remedy + "frozen=())")
    remedy = "the factors of a residual adapter, such as PiSSA's, mean nothing on another base. "
    remedy += "Make a plain one of it, lora_jax.algebra.to_plain"
    compare("residual", f.residual, like.residual, remedy)
    compare("the weight's shape", f.weight_shape, like.weight_shape, "they are of different models")
    mine, theirs = (x.magnitude is not None for x in (f, like))
    compare("whether there is a magnitude", mine, theirs, "stack DoRA with DoRA")
    for field, x in f.arrays().items():
        y = getattr(like, field)
        if not is_cast and field != "norm" and is_array(x) and is_array(y):
            remedy = "a cast might lose digits. Cast one of them, by dataclasses.replace"
            compare(f"the dtype of {field}", str(x.dtype), str(y.dtype), remedy)
    if f.rank > wanted.rank:
        raise ValueError(
            f"{name} has rank {f.rank} at {key!r}, and {wanted.owner} {wanted.rank}: shrink it, "
            f"lora_jax.algebra.resize(adapter, {wanted.rank}), or leave room, {room} "
            f"rank={f.rank})"
        )


def _blank_entry(key: str, wanted: Wanted, schema: Schema) -> Any:
    """Return a blank entry, whose arrays are :class:`Blank`."""
    like = wanted.f

    @functools.cache
    def norm() -> Any:
        found = with_norms(LoraParams(schema.base, Adapter({key: like})))
        return found.adapter.factors[key].norm

    def zeros(shape: tuple[int, ...], dtype: Any, name: str) -> Any:
        if like.residual and schema.base is None:
            raise ValueError(
                f"{name} has no factors of {key!r}, and those of {wanted.owner} are residual, as "
                f"PiSSA's: whether both are over one base is not known. {_BASE}"
            )
        return jnp.zeros(shape, dtype)

    def magnitude(dtype: Any, name: str) -> Any:
        if schema.base is None:
            raise ValueError(
                f"{name} has no factors of {key!r}, and {wanted.owner} has DoRA there: the norms "
                f"of the base's columns, which fill in its magnitude, are not known. {_BASE}"
            )
        return jnp.sqrt(norm()).astype(dtype)

    def norms(name: str) -> Any:
        if schema.base is None:
            raise ValueError(
                f"{name} has no norms of the base's columns at {key!r}, as {wanted.owner} has. "
                f"{_BASE}"
            )
        return norm()

    def made(field: str, x: Any) -> Blank:
        if field == "scale":
            is_float = is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
            dtype = x.dtype if is_float else jnp.dtype(jnp.float32)
            return Blank((), dtype, partial(zeros, (), dtype))
        shape = list(x.shape)
        if field in ("a", "b"):
            shape[-1 if field == "a" else like.layout.count("b")] = wanted.rank
        if field == "norm":
            return Blank(tuple(shape), x.dtype, norms)
        if field == "magnitude":
            return Blank(tuple(shape), x.dtype, partial(magnitude, x.dtype))
        return Blank(tuple(shape), x.dtype, partial(zeros, tuple(shape), x.dtype))

    return like.map(made)


def _leaf(path: str, owner: str, like: Any, leaves: Mapping[str, Any] | None, name: str) -> Any:
    """Return the base's leaf for a member that does not train it."""
    if leaves is None:
        raise ValueError(
            f"{name} does not train {path!r} fully, as {owner} does, and what the base has there "
            f"is not known. {_BASE}"
        )
    leaf = leaves[path]
    with jax.numpy_dtype_promotion("standard"):
        is_exact = jnp.promote_types(leaf.dtype, like.dtype) == like.dtype
    if not is_exact:
        raise ValueError(
            f"{name} does not train {path!r} fully, as {owner} does in {like.dtype}, and the base "
            f"has {leaf.dtype} there; a cast might lose digits. Cast one of them"
        )
    return master(leaf).astype(like.dtype)


def _check_full(x: Any, path: str, name: str, schema: Schema) -> None:
    """Raise unless a fully trained leaf has the shape and dtype of the others'."""
    owner, like = schema.full[path]
    if tuple(x.shape) != tuple(like.shape):
        raise ValueError(
            f"{name} and {owner} differ at {path!r}: its shape is {tuple(x.shape)} here and "
            f"{tuple(like.shape)} there; they are of different models"
        )
    if x.dtype != like.dtype:
        raise ValueError(
            f"{name} and {owner} differ at {path!r}: its dtype is {x.dtype} here and {like.dtype} "
            "there; a cast might lose digits. Cast one of them, by dataclasses.replace"
        )


def _pad_to(x: Any, shape: tuple[int, ...]) -> jax.Array:
    """Pad with zeros at the end of each axis."""
    if tuple(x.shape) == shape:
        return x
    x = jnp.asarray(x)
    config = [(0, size - own, 0) for size, own in zip(shape, x.shape, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)
