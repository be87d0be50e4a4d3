"""Adapters as rows of a stack in the host's memory: checked, padded and cast in NumPy.

As :mod:`lora_jax.many._fit` does it on the device, but nothing runs or compiles there meanwhile.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lora_jax._adapter.checks import check_same_base, check_single
from lora_jax._adapter.factors import Factors, is_concrete
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._adapter.shardings import shardings
from lora_jax._weights.axes import is_array
from lora_jax._weights.paths import PyTree, flatten
from lora_jax._weights.ranges import rows_of
from lora_jax.many._fit import Slot, Slots, fitted

_CAST = ("a", "b")  # what dtype= is of; the rest is small, and of leaves trained whole not ours


def empty_row(like: LoraParams, rank: int | None, dtype: Any) -> Adapter:
    """The row that changes nothing: zeros, the norms of the base's columns, the base's leaves."""
    single = check_single(like, "AdapterBank: like")
    if not single.factors and not single.full:
        raise ValueError("AdapterBank: like changes nothing: there is nothing to have slots of")
    slots = Slots(
        {
            key: Slot("like", f, f.rank if rank is None or rows_of(key) is not None else rank)
            for key, f in single.factors.items()
        },
        {path: ("like", x) for path, x in single.full.items()},
        like.base,
        flatten(like.base)[0],
    )
    row = jax.tree.map(_fetched, fitted(Adapter({}), "AdapterBank: an empty slot", slots))
    dtype = None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)

    def own(key: str, field: str, x: np.ndarray) -> np.ndarray:
        to = jax.ShapeDtypeStruct(x.shape, dtype if dtype and field in _CAST else x.dtype)
        return _host(x, to, f"AdapterBank: of the base, {field} of {key!r}", is_cast=True)

    return _mapped(own, row)


def host_row(adapter: Any, what: str, base: PyTree, empty: Adapter, *, is_cast: bool) -> Adapter:
    """A row as ``empty`` has it, in arrays that are nobody else's.

    Args:
        adapter: a LoraParams or an Adapter, on any devices.
        what: begins the messages.
        base: of the bank.
        empty: what the row has where the adapter has nothing.
        is_cast: whether other dtypes are cast.

    Raises:
        TypeError: it is no adapter.
        ValueError: it does not fit into such a row, has no values, or not finite ones.
    """
    if isinstance(adapter, Adapter):
        adapter = LoraParams(base, adapter)
    single = check_single(adapter, what)
    check_same_base(f"{what} and the bank", adapter, LoraParams(base, Adapter({})))
    if not all(map(is_concrete, jax.tree.leaves(single))):
        raise ValueError(f"{what} is traced, or shapes alone: expected values. Add it outside jit")
    for kind in ("factors", "full"):
        more = sorted(getattr(single, kind).keys() - getattr(empty, kind).keys())
        if more:
            raise ValueError(
                f"{what} has {len(more)} {kind} for which the bank has no room: "
                f"{', '.join(more[:5])}. Make a bank of a like= that has them all"
            )
    if not all(map(_is_here, jax.tree.leaves(single))):
        raise ValueError(
            f"{what} is spread over several processes: give each all of it, "
            "multihost_utils.process_allgather(adapter, tiled=True)"
        )
    for key, f in single.factors.items():
        _check_agree(key, f, empty.factors[key], what)
    single = jax.device_get(single)

    def own(key: str, field: str, x: np.ndarray) -> np.ndarray:
        f = single.factors.get(key)
        mine = single.full.get(key) if field == "full" else getattr(f, field, None)
        # What is filled in is one read-only array for all.
        return x if mine is None else _host(mine, x, f"{what}: {field} of {key!r}", is_cast=is_cast)

    return _mapped(own, empty)


def places_of(base: PyTree, row: Adapter, replicate: Collection[str]) -> tuple[Any, Any]:
    """Shardings of a stack and of a row, as the base's; None: where JAX puts what is new.

    Raises:
        ValueError: the base's mesh has no axis that ``replicate`` says.
    """
    leaves = [x for x in jax.tree.leaves(base) if isinstance(x, jax.Array)]
    if any(isinstance(x.sharding, NamedSharding) for x in leaves):
        places = shardings(LoraParams(base, row), replicate=replicate).adapter

        def of_stack(s: NamedSharding) -> NamedSharding:
            return NamedSharding(s.mesh, PartitionSpec(None, *s.spec), memory_kind=s.memory_kind)

        return jax.tree.map(of_stack, places), places
    if replicate:
        raise ValueError(f"AdapterBank: replicate={replicate!r}, and the base is on no mesh")
    devices = {d for x in leaves if getattr(x, "committed", False) for d in x.devices()}
    place = SingleDeviceSharding(devices.pop()) if len(devices) == 1 else None
    return place, place


def placed(row: Adapter, places: Any) -> Adapter:
    """A row on its devices, every process its part; as it is where there is no mesh."""
    if not isinstance(places, Adapter):
        return row
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), row, places
    )


def _mapped(f: Callable[[str, str, Any], Any], row: Adapter) -> Adapter:
    """``f(key, field, array)`` of all that a row has."""
    return Adapter(
        {
            key: factors.mapped(lambda field, x, key=key: f(key, field, x))
            for key, factors in row.factors.items()
        },
        {path: f(path, "full", x) for path, x in row.full.items()},
    )


def _check_agree(key: str, f: Factors, like: Factors, what: str) -> None:
    """Raise if what is no array, or too large, differs; what is frozen in training may."""
    remedies = {
        "layout": "make them with the same layout=",
        "residual": "factors such as PiSSA's mean nothing beside what they were not taken out of. "
        "lora_jax.algebra.to_plain makes plain ones of them",
    }
    for field, remedy in remedies.items():
        mine, theirs = getattr(f, field), getattr(like, field)
        if mine != theirs:
            raise ValueError(
                f"{what} and the bank differ at {key!r}: {field} is {mine!r} here and {theirs!r} "
                f"there; {remedy}"
            )
    if (f.magnitude is None) != (like.magnitude is None):
        here, there = ("without" if x.magnitude is None else "with" for x in (f, like))
        raise ValueError(
            f"{what} and the bank differ at {key!r}: {here} DoRA here and {there} there; make a "
            "bank for each"
        )
    if f.rank > like.rank:
        raise ValueError(
            f"{what} has rank {f.rank} at {key!r}, and the bank {like.rank}: shrink it, "
            f"lora_jax.algebra.resize(adapter, {like.rank}), or make a bank of rank={f.rank}"
        )


def _is_here(x: Any) -> bool:
    """Whether this process has all of an array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def _fetched(x: Any) -> np.ndarray:
    """In NumPy; all processes together, where it is spread over them."""
    return jax.device_get(x) if _is_here(x) else process_allgather(x, tiled=True)


def _host(x: Any, like: Any, at: str, *, is_cast: bool) -> np.ndarray:
    """A read-only copy in the dtype of ``like``, padded with zeros to its shape.

    Raises:
        ValueError: it is of another dtype and not to be cast, or not finite, before or after.
    """
    x = np.asarray(x) if is_array(x) else np.asarray(x, like.dtype)
    if x.dtype != like.dtype and not is_cast:
        raise ValueError(
            f"{at} is {x.dtype}, and the bank's {like.dtype}: make the bank with dtype=, to which "
            "all are cast"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{at} has NaNs or infinities: it is broken. Nothing has changed")
    with np.errstate(over="ignore"):
        cast = x.astype(like.dtype)
    if cast.dtype != x.dtype and not np.isfinite(cast).all():
        raise ValueError(
            f"{at} goes up to {float(np.abs(x).max()):.3g}, too large for {like.dtype}: make the "
            "bank of another dtype=, such as bfloat16"
        )
    row = np.zeros(like.shape, like.dtype)
    row[tuple(map(slice, cast.shape))] = cast
    row.setflags(write=False)
    return row
