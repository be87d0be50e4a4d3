"""Factors made where the base is, every process its part."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax._adapter.factors import is_concrete
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._adapter.shardings import array_of, named, shardings


def make_sharded(
    made: Callable[[dict[str, Any], jax.Array], tuple[dict[str, Any], Adapter]],
    leaves: dict[str, Any],
    key: jax.Array,
) -> tuple[dict[str, Any], Adapter]:
    """``made(leaves, key)``, the leaves that it changes and an adapter, where the leaves are.

    Of leaves spread over devices all is compiled at once and made on those devices, every process
    its part.
    """
    arrays = (x for x in map(array_of, leaves.values()) if is_concrete(x) and named(x))
    spread = [x for x in arrays if x.sharding.mesh.size > 1]
    if not spread:
        return made(leaves, key)
    # On Explicit axes decompositions would ask for shardings of their own: Auto ones meanwhile.
    whole = next(NamedSharding(x.sharding.mesh, PartitionSpec()) for x in spread)
    inside = jax.tree.map(lambda x: jax.device_put(x, _auto(named(x) or whole)), leaves)
    new, adapter = jax.eval_shape(made, inside, key)
    places = shardings(LoraParams(leaves, adapter))
    places = {path: places.base[path] for path in new}, places.adapter
    found = jax.jit(made, out_shardings=jax.tree.map(_auto, places))(inside, key)
    return jax.device_put(found, places)


def _auto(s: NamedSharding) -> NamedSharding:
    """The same on a mesh of Auto axes."""
    mesh: Any = s.mesh
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), s.spec, memory_kind=s.memory_kind)
