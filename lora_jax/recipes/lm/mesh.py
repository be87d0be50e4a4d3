"""Shard a Llama over a mesh by rules, and make a mesh from ``data=2,fsdp=2,tensor=2``."""

import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that a batch is spread over

# The first rule that matches the path of a leaf counts. Its axes are the leaf's last ones: an axis
# of stacked layers in front is replicated.
RULES = {
    r".*/(q|k|v|gate|up)_proj/kernel": P("fsdp", "tensor"),
    r".*/(q|k|v|gate|up)_proj/bias": P("tensor"),
    r".*/(o|down)_proj/kernel": P("tensor", "fsdp"),
    r"embed_tokens/embedding": P("tensor", "fsdp"),
    r"lm_head/kernel": P("fsdp", "tensor"),
    r".*": P(),  # norms, and biases of outputs that are replicated after a sum over tensor
}


def mesh_of(text: str, explicit: bool = False, count: int | None = None) -> Mesh:
    """Make a mesh of all devices of all processes, or of the first ``count``.

    Args:
        text: axes and sizes, such as ``data=2,tensor=4``; one may be -1, for the remaining devices.
            Axes that are not named have size 1.
        explicit: whether shardings are in array types, instead of the compiler's choice.
        count: the number of devices; None: all.

    Raises:
        ValueError: ``text`` is malformed, or the product of sizes is not the number of devices.
    """
    sizes, devices = {}, count or jax.device_count()
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in sizes:
            raise ValueError(f"--mesh {text}: {name!r} is not one of {', '.join(AXES)}, once each")
        if not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ValueError(f"--mesh {text}: {name}={size}, expected a number >= 1, or -1")
        sizes[name] = int(size)
    known = math.prod(size for size in sizes.values() if size > 0)
    rests = [name for name, size in sizes.items() if size < 0]
    if len(rests) > 1:
        raise ValueError(f"--mesh {text}: both {rests[0]} and {rests[1]} are -1: set one of them")
    if rests and devices % known == 0:
        sizes[rests[0]] = devices // known
    elif rests or known != devices:
        raise ValueError(
            f"--mesh {text}: the product of the sizes is {known}, and there are {devices} devices: "
            f"expected sizes with product {devices}, or -1 for one of them"
        )
    shape = tuple(sizes.get(name, 1) for name in AXES)
    kind = AxisType.Explicit if explicit else AxisType.Auto
    kinds = (kind,) * len(AXES)
    return jax.make_mesh(shape, AXES, kinds, devices=jax.devices()[:devices])


def placed(shapes: Any, mesh: Mesh, dtype: Any) -> Any:
    """Give shapes a dtype and, by the rules, shardings, as ``hf.load`` takes them.

    Raises:
        ValueError: the mesh does not divide an axis.
    """

    def place(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next(spec for pattern, spec in RULES.items() if re.fullmatch(pattern, name))
        spec = P(*[None] * (len(x.shape) - len(spec)), *spec)
        for size, axis in zip(x.shape, spec, strict=len(spec) > 0):
            if axis and size % mesh.shape[axis]:
                raise ValueError(
                    f"--mesh: {axis}={mesh.shape[axis]} does not divide {size}, an axis of "
                    f"{name!r} of shape {x.shape}: expected a divisor of it"
                )
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, shapes)
