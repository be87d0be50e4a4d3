"""Store what a model has besides parameters: running statistics, PRNG keys, counters, caches.

A state is a tree of arrays. Its leaves are known by their paths; typed PRNG keys are stored as
their data, beside the name of their generator.
"""

import warnings
from collections.abc import Container, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.params import without_adapters
from lora_jax._weights.axes import is_array
from lora_jax._weights.paths import (
    PyTree,
    arrays_in,
    flatten,
    nearest,
    not_parameters,
    parameters_in,
)

_HOW = "nnx.state(model, nnx.Not(nnx.Param)), or Linen's variables without 'params'"


def leaves_of(state: PyTree, base: PyTree | None, verb: str) -> dict[str, Any]:
    """Return the leaves of a state by path; without a state, warn of what the base has of one.

    Raises:
        TypeError: a leaf is no array.
        ValueError: the state has parameters of the base.
    """
    if state is None:
        if found := left_out(base):
            warnings.warn(
                f"{verb}: {found}. To save them, pass state={_HOW}; state={{}} leaves them out",
                stacklevel=3,
            )
        return {}
    leaves = arrays_of(state, verb)
    if both := sorted(leaves.keys() & parameters_in(without_adapters(base)).keys()):
        raise ValueError(
            f"{verb}: state has parameters of the base, {both[:5]}, which are never saved. Pass "
            f"the rest alone: {_HOW}"
        )
    return leaves


def arrays_of(state: PyTree, verb: str) -> dict[str, Any]:
    """Return the leaves of a state by path, as arrays of JAX if it has their dtypes."""
    leaves = flatten(state)[0]
    for path, x in leaves.items():
        if not is_array(x):
            raise TypeError(
                f"{verb}: state has {type(x).__name__} {x!r} at {path!r}, expected an array: leave "
                "it out, or make it one by jnp.asarray"
            )
    return {path: _of_jax(x) for path, x in leaves.items()}


def _of_jax(x: Any) -> Any:
    is_known = isinstance(x, np.ndarray) and jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype
    return jnp.asarray(x) if is_known else x


def left_out(base: PyTree | None, saved: Container[str] = ()) -> str:
    """Name the leaves of a base that are no parameters, for a warning; empty if there is none."""
    base = without_adapters(base)
    kept = [path for path in arrays_in(base) if path not in saved]
    others = {path: what for path, what in not_parameters(base).items() if path in kept}
    if not others:
        return ""
    more = f" and {len(others) - 8} more" if len(others) > 8 else ""
    shown = ", ".join(f"{path} ({what})" for path, what in list(others.items())[:8])
    return f"the base has leaves that are no parameters, and they are not saved: {shown}{more}"


def notes_of(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the leaves of a state, for the record."""
    found = {}
    for path, x in leaves.items():
        found[path] = {"dtype": str(x.dtype), "shape": list(map(int, x.shape))}
        if is_key(x):
            found[path]["impl"] = str(jax.random.key_impl(x))
    return found


def is_note(note: Any) -> bool:
    """Return whether this describes a leaf, as :func:`notes_of` does."""
    kinds = {"dtype": str, "shape": list, "impl": str}
    if not isinstance(note, dict) or not {"dtype", "shape"} <= note.keys() <= kinds.keys():
        return False
    is_right = all(isinstance(x, kinds[name]) for name, x in note.items())
    return is_right and all(type(n) is int for n in note["shape"])


def is_key(x: Any) -> bool:
    """Return whether an array is one of typed PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def data_of(x: Any) -> Any:
    """Convert a leaf to the array that is written."""
    return jax.random.key_data(x) if is_key(x) else x


def check_asked(record: Any, where: str) -> None:
    """Warn of a state that is in a file, and that nobody asked for."""
    if paths := list(record.get("state", ())):
        more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
        warnings.warn(
            f"{where} contains the state of its model as well, which is not loaded: "
            f"{', '.join(paths[:8])}{more}. To load it, pass a tree like it as state=, such as "
            f"{_HOW}",
            stacklevel=3,
        )


def check_agrees(leaves: Mapping[str, Any], record: Any, where: str) -> None:
    """Raise unless a file has leaves of these paths, shapes and dtypes.

    Raises:
        ValueError: it has others, or none.
    """
    if "state" not in record:
        raise ValueError(
            f"{where} contains no state. Load it without state=, or save it again with the state "
            "of the model that was trained"
        )
    notes = record["state"]
    for path in [*notes, *leaves]:
        if path not in leaves or path not in notes:
            has, other = (where, leaves) if path not in leaves else ("state=", notes)
            raise ValueError(
                f"{where}: only {has} has a leaf {path!r}: pass a tree like the one that was "
                f"saved. Nearest in the other: {nearest(path, other)}"
            )
        x, note = leaves[path], notes[path]
        saved, here = (
            f"{d}{list(n)}" for d, n in ((note["dtype"], note["shape"]), (x.dtype, x.shape))
        )
        if saved != here:
            raise ValueError(
                f"{where}: {path!r} was saved as {saved}, and is {here} in state=: pass a tree "
                "like the one that was saved"
            )


def typed(x: np.ndarray, note: Any) -> Any:
    """Turn a stored array into the leaf that it was."""
    if "impl" in note:
        return jax.random.wrap_key_data(jnp.asarray(x), impl=note["impl"])
    return _of_jax(x)


def rebuilt(state: PyTree, record: Any, found: Mapping[str, Any], where: str) -> PyTree:
    """Fill a tree with the leaves in a file, each where the tree has its leaf.

    Raises:
        ValueError: they do not agree.
    """
    leaves = arrays_of(state, where)
    check_agrees(leaves, record, where)
    return jax.tree.unflatten(flatten(state)[1], [_put(found[p], x) for p, x in leaves.items()])


def _put(x: Any, like: Any) -> Any:
    """Put an array where another one was put, if it was."""
    sharding = getattr(like, "sharding", None)
    return jax.device_put(x, sharding) if sharding and getattr(like, "committed", True) else x
