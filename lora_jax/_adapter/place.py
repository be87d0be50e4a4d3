"""Make factors on the devices of the base; every process makes its part."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax._adapter.factors import is_concrete
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._adapter.shardings import array_of, named, shardings


def make_sharded(
    make: Callable[[dict[str, Any], jax.Array], tuple[dict[str, Any], Adapter]],
    leaves: dict[str, Any],
    key: jax.Array,
) -> tuple[dict[str, Any], Adapter]:
    """Call ``make(leaves, key)`` so that its results are on the devices of the leaves.

    If leaves are spread over devices, the call is compiled for those devices, and every process
    makes its part.

    Args:
        make: returns the leaves that it changes, and an adapter.
        leaves: by path.
        key: a PRNG key.
    """
    arrays = (x for x in map(array_of, leaves.values()) if is_concrete(x) and named(x))
    spread = [x for x in arrays if x.sharding.mesh.size > 1]
    if not spread:
        return make(leaves, key)
    # Decompositions have no sharding rules for Explicit axes: use Auto axes inside.
    replicated = next(NamedSharding(x.sharding.mesh, PartitionSpec()) for x in spread)
    inside = jax.tree.map(lambda x: jax.device_put(x, _auto(named(x) or replicated)), leaves)
    new, adapter = jax.eval_shape(make, inside, key)
    places = shardings(LoraParams(leaves, adapter))
    places = {path: places.base[path] for path in new}, places.adapter
    found = jax.jit(make, out_shardings=jax.tree.map(_auto, places))(inside, key)
    return jax.device_put(found, places)


def _auto(s: NamedSharding) -> NamedSharding:
    """Return the same sharding on a mesh of Auto axes."""
    mesh: Any = s.mesh
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), s.spec, memory_kind=s.memory_kind)
