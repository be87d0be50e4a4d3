"""Make factors on the devices of the base; every process makes its part."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax._adapter.factors import Entry, is_concrete
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._adapter.shardings import array_of, named, shardings


class Made(NamedTuple):
    """Hold what is made of one leaf.

    Attributes:
        leaf: the leaf as an initializer changed it; None if it stays.
        entries: its entries.
        full: its copy that trains; None if it does not.
    """

    leaf: Any
    entries: list[Entry]
    full: Any


class Recipe(NamedTuple):
    """Tell how to make the entries of one leaf.

    Attributes:
        make: ``(settings, leaf, keys) -> Made``.
        settings: what is to be made.
        shared: the same without names, if leaves of one kind can share a program.
        names: the keys of the entries.
    """

    make: Callable[[Any, Any, Any], Made]
    settings: Any
    shared: Any
    names: tuple[str, ...]

    def shapes(self, leaf: Any, keys: Any) -> Made:
        """Return the shapes of what is made."""
        kind = _kind((leaf, keys))
        if self.shared is not None:
            with contextlib.suppress(Exception):  # which would name no leaf
                return _shapes(self.make, self.shared, *kind)
        return _shapes.__wrapped__(self.make, self.settings, *kind)

    def program(self, places: Made) -> Callable[[Any, Any], Made]:
        """Return a compiled ``(leaf, keys) -> Made``, for these places."""
        kind = _hashable(places)
        if self.shared is not None:
            return _program(self.make, self.shared, *kind)
        return _program.__wrapped__(self.make, self.settings, *kind)


def make_sharded(
    recipes: Mapping[str, Recipe], leaves: Mapping[str, Any], keys: Mapping[str, Any]
) -> tuple[dict[str, Any], Adapter]:
    """Make the entries of all leaves, so that they are on the devices of the leaves.

    If leaves are spread over devices, each kind of leaf has a program for those devices, which is
    compiled once, and every process makes its part.

    Args:
        recipes: by the path of the leaf.
        leaves: by path.
        keys: for each path a list of PRNG keys, one for each entry.

    Returns:
        The leaves that changed, and an adapter.
    """
    leaves = {path: leaves[path] for path in recipes}
    arrays = (x for x in map(array_of, leaves.values()) if is_concrete(x) and named(x))
    spread = [x for x in arrays if x.sharding.mesh.size > 1]
    if not spread:
        return _joined(
            recipes, {p: r.make(r.settings, leaves[p], keys[p]) for p, r in recipes.items()}
        )
    # Decompositions have no sharding rules for Explicit axes: use Auto axes inside.
    replicated = next(NamedSharding(x.sharding.mesh, PartitionSpec()) for x in spread)
    inside = jax.tree.map(lambda x: jax.device_put(x, _auto(named(x) or replicated)), leaves)
    shapes = {path: recipe.shapes(inside[path], keys[path]) for path, recipe in recipes.items()}
    new, adapter = _joined(recipes, shapes)
    places = shardings(LoraParams(leaves, adapter))
    found = {}
    for path, recipe in recipes.items():
        place = Made(
            places.base[path] if path in new else None,
            [places.adapter.factors[name] for name in recipe.names],
            places.adapter.full.get(path),
        )
        run = recipe.program(jax.tree.map(_auto, place))
        found[path] = run(inside[path], keys[path])
    new, adapter = _joined(recipes, found)
    return jax.device_put(
        (new, adapter), ({path: places.base[path] for path in new}, places.adapter)
    )


def _joined(
    recipes: Mapping[str, Recipe], made: Mapping[str, Made]
) -> tuple[dict[str, Any], Adapter]:
    """Join what was made of the leaves: those that changed, and the adapter."""
    entries: dict[str, Any] = {}
    for path, recipe in recipes.items():
        entries.update(zip(recipe.names, made[path].entries, strict=True))
    return (
        {path: x.leaf for path, x in made.items() if x.leaf is not None},
        Adapter(entries, {path: x.full for path, x in made.items() if x.full is not None}),
    )


def _hashable(tree: Any) -> tuple[Any, tuple[Any, ...]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(leaves)


def _kind(tree: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a tree's structure, and the shape and dtype of each leaf."""
    return _hashable(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree))


@functools.lru_cache(maxsize=1024)
def _shapes(make: Callable[..., Made], settings: Any, structure: Any, kinds: Any) -> Made:
    leaf, keys = jax.tree.unflatten(structure, kinds)
    return jax.eval_shape(functools.partial(make, settings), leaf, keys)


@functools.lru_cache(maxsize=1024)
def _program(make: Callable[..., Made], settings: Any, structure: Any, places: Any) -> Any:
    run = functools.partial(make, settings)
    return jax.jit(run, out_shardings=jax.tree.unflatten(structure, places))


def _auto(s: NamedSharding) -> NamedSharding:
    """Return the same sharding on a mesh of Auto axes."""
    mesh: Any = s.mesh
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), s.spec, memory_kind=s.memory_kind)
