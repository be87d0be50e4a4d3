"""Fit one adapter into a bank, in the host's memory: check, pad and cast in NumPy.

This is :mod:`lora_jax.many._fit` without a device: nothing runs or compiles on one.
"""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lora_jax._adapter.checks import check_same_base, check_single
from lora_jax._adapter.factors import Rows, is_concrete
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._adapter.shardings import shardings
from lora_jax._weights.axes import is_array
from lora_jax._weights.paths import PyTree
from lora_jax.many._fit import Schema, Wanted, blank, check_agree, overlay

_CAST = ("a", "b")  # the fields that dtype= applies to; full leaves keep their own


def empty_member(like: LoraParams, rank: int | None, dtype: Any) -> Adapter:
    """Return the member that changes nothing: zeros, the base's norms, the base's leaves."""
    single = check_single(like, "AdapterBank: like")
    if not single.factors and not single.full:
        raise ValueError("AdapterBank: like changes nothing: expected factors or full leaves")
    schema = Schema(
        {
            key: Wanted("like", f, f.rank if rank is None or isinstance(f, Rows) else rank)
            for key, f in single.factors.items()
        },
        {path: ("like", x) for path, x in single.full.items()},
        like.base,
    )
    what = "AdapterBank: an empty slot"
    empty = blank(schema).map(lambda key, field, x: x.make(what))
    member = jax.tree.map(_fetched, empty)
    dtype = None if dtype is None else jax.dtypes.canonicalize_dtype(dtype)

    def cast(key: str, field: str, x: np.ndarray) -> np.ndarray:
        like = jax.ShapeDtypeStruct(x.shape, dtype if dtype and field in _CAST else x.dtype)
        return _host(x, like, f"AdapterBank: the base's {field} of {key!r}", is_cast=True)

    return member.map(cast)


def host_member(adapter: Any, what: str, base: PyTree, empty: Adapter, *, is_cast: bool) -> Adapter:
    """Return an adapter as a member like ``empty``, in NumPy arrays of its own.

    Args:
        adapter: a LoraParams or an Adapter, on any devices.
        what: the beginning of the messages.
        base: the base of the bank.
        empty: the member that fills in what the adapter lacks.
        is_cast: whether other dtypes are cast.

    Raises:
        TypeError: ``adapter`` is not an adapter.
        ValueError: it does not fit into the bank, has no values, or values that are not finite.
    """
    if isinstance(adapter, Adapter):
        adapter = LoraParams(base, adapter)
    single = check_single(adapter, what)
    check_same_base(f"{what} and the bank", adapter, LoraParams(base, Adapter({})))
    if not all(map(is_concrete, jax.tree.leaves(single))):
        raise ValueError(f"{what} is traced, or shapes only: expected values. Add it outside jit")
    for kind in ("factors", "full"):
        more = sorted(getattr(single, kind).keys() - getattr(empty, kind).keys())
        if more:
            raise ValueError(
                f"{what} has {len(more)} {kind} for which the bank has no room: "
                f"{', '.join(more[:5])}. Make a bank with a like= that has them all"
            )
    if not all(map(_is_here, jax.tree.leaves(single))):
        raise ValueError(
            f"{what} is spread over several processes: pass complete arrays on each, "
            "multihost_utils.process_allgather(adapter, tiled=True)"
        )
    for key, f in single.factors.items():
        wanted = Wanted("the bank", empty.factors[key], empty.factors[key].rank)
        check_agree(key, f, wanted, what, "lora_jax.many.AdapterBank(...,", is_cast=True)
    single = jax.device_get(single)

    def pad(mine: Any, like: np.ndarray, key: str, field: str) -> np.ndarray:
        return _host(mine, like, f"{what}: {field} of {key!r}", is_cast=is_cast)

    return overlay(single, empty, pad, what)  # all members share the read-only arrays of ``empty``


def places_of(base: PyTree, member: Adapter, replicate: Collection[str]) -> tuple[Any, Any]:
    """Return the shardings of a stack and of a member, from the base's; None: JAX's default.

    Raises:
        ValueError: ``replicate`` names an axis that the base's mesh does not have.
    """
    leaves = [x for x in jax.tree.leaves(base) if isinstance(x, jax.Array)]
    if any(isinstance(x.sharding, NamedSharding) for x in leaves):
        places = shardings(LoraParams(base, member), replicate=replicate).adapter

        def add_axis(s: NamedSharding) -> NamedSharding:
            return NamedSharding(s.mesh, PartitionSpec(None, *s.spec), memory_kind=s.memory_kind)

        return jax.tree.map(add_axis, places), places
    if replicate:
        raise ValueError(f"AdapterBank: replicate={replicate!r}, and the base is on no mesh")
    devices = {d for x in leaves if getattr(x, "committed", False) for d in x.devices()}
    place = SingleDeviceSharding(devices.pop()) if len(devices) == 1 else None
    return place, place


def placed(member: Adapter, places: Any) -> Adapter:
    """Put a member on its devices, each process its part; without a mesh, return it unchanged."""
    if not isinstance(places, Adapter):
        return member
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), member, places
    )


def _is_here(x: Any) -> bool:
    """Return whether this process has all of an array."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def _fetched(x: Any) -> np.ndarray:
    """Fetch an array to NumPy, by all processes together if it is spread over them."""
    return jax.device_get(x) if _is_here(x) else process_allgather(x, tiled=True)


def _host(x: Any, like: Any, at: str, *, is_cast: bool) -> np.ndarray:
    """Return a read-only copy in the dtype of ``like``, padded with zeros to its shape.

    Raises:
        ValueError: the dtype differs and is not cast, or values are not finite, before or after.
    """
    x = np.asarray(x) if is_array(x) else np.asarray(x, like.dtype)
    if x.dtype != like.dtype and not is_cast:
        raise ValueError(
            f"{at} is {x.dtype}, and the bank's {like.dtype}: make the bank with dtype=, which "
            "casts all adapters"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{at} has NaNs or infinities: it is broken. Nothing has changed")
    with np.errstate(over="ignore"):
        cast = x.astype(like.dtype)
    if cast.dtype != x.dtype and not np.isfinite(cast).all():
        raise ValueError(
            f"{at} goes up to {float(np.abs(x).max()):.3g}, too large for {like.dtype}: make the "
            "bank with another dtype=, such as bfloat16"
        )
    padded = np.zeros(like.shape, like.dtype)
    padded[tuple(map(slice, cast.shape))] = cast
    padded.setflags(write=False)
    return padded
