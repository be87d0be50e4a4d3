"""Shard factors like the axes of the base that they read and write."""

import math
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lora_jax._adapter.factors import Entry, Factors
from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._weights.axes import factor_shapes, is_array, role_axes
from lora_jax._weights.layouts import Layouts
from lora_jax._weights.paths import PyTree, flatten, nearest
from lora_jax._weights.quantized import is_quantized
from lora_jax._weights.ranges import Part


def shardings(
    lora_params: LoraParams | Layouts,
    base_shardings: PyTree = None,
    *,
    replicate: Collection[str] = (),
) -> LoraParams:
    """Derive the shardings of a LoraParams from those of its base.

    For a weight of layout ``"io"`` that is sharded ``P(x, y)``::

        a [in, rank]   P(x, None)        scale   P()
        b [rank, out]  P(None, y)        magnitude, norm [out]   P(y)

    and so on for any layout: an axis of a factor is sharded as the weight's axis that it belongs
    to, and the rank is not sharded. So the low-rank path is sharded like the weight's, and a factor
    moves only if the weight does. Use the result for ``jax.device_put``, for ``in_shardings`` and
    ``out_shardings`` of ``jax.jit``, and with :func:`state_shardings` for an optimizer's state.

    Args:
        lora_params: from ``lorafy``, or its shapes: ``jax.eval_shape(lorafy, params)``; or the
            layouts that :func:`layout_of` returns, for an adapter of all their weights.
        base_shardings: a tree of the base's structure of ``NamedSharding``s on one mesh, such as
            ``nn.get_sharding(boxed, mesh)``, ``nn.logical_to_mesh_sharding(...)`` or
            ``nnx.get_named_sharding(state, mesh)`` return. None: those of the base's arrays; an
            array on one device counts as replicated.
        replicate: axes of the mesh along which factors and full leaves are replicated: pass the
            axes of the batch if the base is sharded along them as well (FSDP). The adapter is
            small; then no step gathers it, and its gradient is reduced once.

    Returns:
        A LoraParams of ``NamedSharding``s.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: there is no mesh, or more than one; a leaf has no sharding; or ``replicate``
            names an axis that the mesh does not have.
        UserWarning: the mesh does not divide an axis of a part of a weight, and the factors are
            replicated along it.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        >>> mesh = Mesh(jax.devices()[:1], ("x",))
        >>> params = {"query": {"kernel": jnp.ones((8, 4))}}
        >>> base = {"query": {"kernel": NamedSharding(mesh, P("x", None))}}
        >>> found = lora_jax.shardings(lora_jax.lorafy(params, rank=2), base)
        >>> tuple(found.adapter.factors["query/kernel"].a.spec)
        ('x', None)
    """
    if isinstance(lora_params, Layouts):
        lora_params = _of_layouts(lora_params, base_shardings)
    leaves, parts = check(lora_params)
    of_base = _of_arrays(leaves) if base_shardings is None else _of_tree(base_shardings, leaves)
    meshes = dict.fromkeys(s.mesh for s in of_base.values())
    if len(meshes) != 1:
        raise ValueError(
            "shardings: expected one mesh, and the base has "
            f"{' and '.join(str(dict(m.shape)) for m in meshes) or 'none'}: "
            "put it on a mesh by jax.device_put(params, ...), or pass base_shardings"
        )
    (mesh,) = meshes
    if isinstance(replicate, str) or not set(replicate) <= set(mesh.axis_names):
        raise ValueError(
            f"shardings: replicate={replicate!r}: expected a collection of axes of the mesh, "
            f"{mesh.axis_names}"
        )
    replicated = NamedSharding(mesh, PartitionSpec())
    of_adapter = {path: _without(replicate, s) for path, s in of_base.items()}
    factors = {
        key: _of_entry(key, f, parts[key], leaves, of_adapter, replicated)
        for key, f in lora_params.adapter.factors.items()
    }
    if isinstance(lora_params.base, LoraParams):
        base = shardings(lora_params.base, base_shardings, replicate=replicate)
    else:
        every, tree = flatten(lora_params.base)
        base = jax.tree.unflatten(
            tree, [_of_parts(x, of_base.get(path, replicated)) for path, x in every.items()]
        )
    return LoraParams(base, Adapter(factors, {p: of_adapter[p] for p in lora_params.adapter.full}))


def _of_layouts(layouts: Layouts, base_shardings: PyTree) -> LoraParams:
    """Return the shapes of an adapter of rank 1 of all weights that can take one."""
    if base_shardings is None:
        raise ValueError(
            "shardings: layouts have no arrays to take shardings from: pass base_shardings"
        )
    paths, tree = flatten(base_shardings)
    if missing := [path for path in layouts.weights if path not in paths]:
        raise ValueError(
            f"base_shardings has no leaf {missing[0]!r}. Nearest: {nearest(missing[0], paths)}. "
            "It is to be a tree of the base's structure"
        )
    known = {p: jax.ShapeDtypeStruct(w.shape, w.dtype) for p, w in layouts.weights.items()}
    base = jax.tree.unflatten(tree, [known.get(path) for path in paths])
    number = jax.ShapeDtypeStruct((), jnp.float32)
    factors = {}
    for path, letters in layouts.items():
        shapes = factor_shapes(letters, layouts.weights[path].shape, 1)
        a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        factors[path] = Factors(a, b, number, letters)
    return LoraParams(base, Adapter(factors))


def _of_parts(leaf: Any, s: NamedSharding) -> Any:
    """Shard a leaf, or each array of a quantized leaf along the axes that divide."""
    if not is_quantized(leaf):
        return s

    def fitting(x: Any) -> NamedSharding:
        axes = zip(s.spec, x.shape, strict=False) if x.ndim == len(leaf.shape) else ()
        spec = [names if size % _parts(s.mesh, names) == 0 else None for names, size in axes]
        return NamedSharding(s.mesh, PartitionSpec(*spec), memory_kind=s.memory_kind)

    return jax.tree.map(fitting, leaf)


def _without(axes: Collection[str], s: NamedSharding) -> NamedSharding:
    """Remove axes of the mesh from a sharding."""
    if not axes:
        return s
    kept = [tuple(name for name in _names(spec) if name not in axes) for spec in s.spec]
    spec = [names[0] if len(names) == 1 else names or None for names in kept]
    return NamedSharding(s.mesh, PartitionSpec(*spec), memory_kind=s.memory_kind)


def _of_arrays(leaves: dict[str, Any]) -> dict[str, NamedSharding]:
    """Return the shardings of arrays; an array without one is replicated on the others' mesh."""
    own = {path: named(array_of(x)) for path, x in leaves.items() if is_array(x)}
    spread = {path: s for path, s in own.items() if s is not None}
    meshes = {s.mesh for s in spread.values()}
    rest = [NamedSharding(mesh, PartitionSpec()) for mesh in meshes]
    return {path: spread.get(path, rest[0]) for path in own if rest}


def array_of(leaf: Any) -> Any:
    """Return an array with the leaf's sharding: the entries of a quantized leaf."""
    return jax.tree.leaves(leaf)[0] if is_quantized(leaf) else leaf


def _of_tree(base_shardings: PyTree, leaves: dict[str, Any]) -> dict[str, NamedSharding]:
    found = flatten(base_shardings)[0]
    for path, s in found.items():
        if not isinstance(s, NamedSharding):
            raise TypeError(
                f"base_shardings: {path!r} is {type(s).__name__} {s!r}, expected a NamedSharding. "
                "Of Linen's metadata nn.get_sharding(params, mesh) makes them, of NNX's "
                "nnx.get_named_sharding(state, mesh)"
            )
    if missing := [path for path, x in leaves.items() if is_array(x) and path not in found]:
        raise ValueError(
            f"base_shardings has no leaf {missing[0]!r}. Nearest: {nearest(missing[0], found)}. "
            "It is to be a tree of the base's structure"
        )
    for path, s in found.items():
        if path in leaves and len(s.spec) > len(leaves[path].shape):
            raise ValueError(
                f"base_shardings: {path!r} has {s.spec} for shape {tuple(leaves[path].shape)}"
            )
    return {path: s for path, s in found.items() if path in leaves}


def _of_entry(
    key: str,
    f: Entry,
    part: Part,
    leaves: dict[str, Any],
    of_base: dict[str, NamedSharding],
    replicated: NamedSharding,
) -> Entry:
    """Derive the shardings of an entry from that of its weight."""
    path, ranges = part
    own = of_base[path]
    spec = [*own.spec, *[None] * (len(leaves[path].shape) - len(own.spec))]
    for r in ranges:
        if (r.stop - r.start) % (parts := _parts(own.mesh, spec[r.axis])):
            warnings.warn(
                f"{key!r}: its axis {r.axis} of {r.stop - r.start} entries is not divided by the "
                f"{parts} parts of {spec[r.axis]!r}: its factors are replicated along it",
                stacklevel=3,
            )
            spec[r.axis] = None
    batch, inputs, outputs = ([spec[k] for k in role_axes(f.layout, role)] for role in "bio")

    def placed(*axes: Any) -> NamedSharding:
        return NamedSharding(own.mesh, PartitionSpec(*axes), memory_kind=own.memory_kind)

    specs = {
        "a": placed(*batch, *inputs, None),
        "b": placed(*batch, None, *outputs),
        "scale": replicated,
        "magnitude": placed(*batch, *outputs),
        "norm": placed(*batch, *outputs),
    }
    return f.map(lambda name, _: specs[name])


def _parts(mesh: Mesh | AbstractMesh, axes: str | Sequence[str] | None) -> int:
    """Count the parts that an axis is split into."""
    return math.prod(mesh.shape[name] for name in _names(axes))


def _names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def state_shardings(state: PyTree, params: PyTree, params_shardings: PyTree) -> PyTree:
    """Derive the shardings of a tree that mirrors parameters, such as an optimizer's state.

    An array of the state is sharded like the parameter with its shape whose path ends its own
    path. All others (counts, factored moments) are replicated.

    Args:
        state: the state, or its shapes: ``jax.eval_shape(tx.init, params)``.
        params: the parameters that the optimizer was initialized with: a LoraParams, or the
            ``trainable`` of ``lora_jax.split``.
        params_shardings: the shardings of ``params``, a tree of the same structure.

    Returns:
        A tree of the structure of ``state``.

    Raises:
        ValueError: ``params`` and ``params_shardings`` have different structures.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax, optax
        >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        >>> mesh = Mesh(jax.devices()[:1], ("x",))
        >>> params = {"query": {"kernel": jnp.ones((8, 4))}}
        >>> params = jax.device_put(params, NamedSharding(mesh, P("x")))
        >>> lora_params = lora_jax.lorafy(params, rank=2)
        >>> tx = lora_jax.optimizer(optax.adamw(1e-3))
        >>> places = lora_jax.shardings(lora_params)
        >>> state = jax.eval_shape(tx.init, lora_params)
        >>> places = lora_jax.state_shardings(state, lora_params, places)
        >>> opt_state = jax.jit(tx.init, out_shardings=places)(lora_params)
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    places, other = jax.tree.flatten(params_shardings)
    if tree != other or not places:
        raise ValueError(
            "state_shardings: params and params_shardings have different structures, "
            f"{len(leaves)} and {len(places)} leaves: pass lora_jax.shardings(params)"
        )
    known = {
        tuple(map(str, path)): (x.shape, place)
        for (path, x), place in zip(leaves, places, strict=True)
    }
    replicated = NamedSharding(places[0].mesh, PartitionSpec())

    def place_of(path: tuple[Any, ...], x: Any) -> NamedSharding:
        names = tuple(map(str, path))
        for start in range(len(names)):
            shape, place = known.get(names[start:], (None, replicated))
            if shape == x.shape:
                return place
        return replicated

    return jax.tree_util.tree_map_with_path(place_of, state)


def named(x: Any) -> NamedSharding | None:
    """Return the sharding of an array if it is a NamedSharding, else None."""
    s = getattr(x, "sharding", None)
    return s if isinstance(s, NamedSharding) else None
