"""Attend by splash attention, JAX's kernel for TPUs."""

import functools
import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

LANES = 128  # the blocks of the kernel are multiples of this
BLOCK = 512  # and as long as this if it divides the row


def by_splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None = None,
    *,
    window: int | None = None,
    spread: NamedSharding | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return :func:`attend` by splash attention, a kernel for TPUs.

    On a mesh each device has the rows of its batch, and its heads if the axes that the batch is not
    spread over divide the heads of the keys; else each has all heads.

    Args:
        query: as in :func:`attend`.
        key: as in :func:`attend`.
        value: as in :func:`attend`.
        segments: as in :func:`attend`.
        window: as in :func:`attend`.
        spread: as in :func:`attend`.
        interpret: whether to run the kernel step by step, on any platform.
    """
    kernel = functools.partial(_splash, window=window, interpret=interpret)
    if spread is None or spread.mesh.size == 1:
        return kernel(query, key, value, segments)
    sizes, rows = spread.mesh.shape, _rows_of(spread)
    heads = tuple(axis for axis in sizes if axis not in rows)
    if key.shape[2] % math.prod(sizes[axis] for axis in heads):
        heads = ()
    of_rows, of_heads = P(rows), P(rows, None, heads)
    return jax.shard_map(
        kernel,
        mesh=spread.mesh,
        in_specs=(of_heads, of_heads, of_heads, of_rows),
        out_specs=of_heads,
        check_vma=False,  # the types of a kernel's outputs do not say how they vary
    )(query, key, value, segments)


def _rows_of(spread: NamedSharding) -> tuple[str, ...]:
    """Return the axes that the batch is spread over."""
    (first, *_) = (*spread.spec, None)
    return (first,) if isinstance(first, str) else tuple(first or ())


def _splash(
    query: Any, key: Any, value: Any, segments: Any, *, window: int | None, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as of_jax

    length, heads, head_dim = query.shape[1:]
    short = -length % LANES  # later tokens, which no token sees
    padded, block = length + short, math.gcd(length + short, BLOCK)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: Any = {f"block_{name}": block for name in names}
    if window is None:
        mask = of_jax.CausalMask((padded, padded))
    else:
        mask = of_jax.LocalMask((padded, padded), (window - 1, 0), 0)
    kernel: Any = of_jax.make_splash_mha(
        of_jax.MultiHeadMask([mask] * heads),
        block_sizes=of_jax.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",  # as the output is marked
        interpret=interpret,
    )

    def prepared(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, short), (0, 0), (0, 0)))
        return x.swapaxes(1, 2)  # [batch, heads, padded, head_dim]

    scaled = (query.astype(jnp.float32) / math.sqrt(head_dim)).astype(query.dtype)
    args: list[Any] = [prepared(x) for x in (scaled, key, value)]
    if segments is not None:
        numbers = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, short)))
        args.append(of_jax.SegmentIds(numbers, numbers))
    return jax.vmap(kernel)(*args).swapaxes(1, 2)[:, :length]


def why_not_splash(
    query: tuple[int, ...], dtype: Any, spread: NamedSharding | None = None
) -> str | None:
    """Return why there is no splash attention for these shapes on this mesh; None if there is.

    Without a mesh, a program may be for TPUs if this process has one or can compile for them.
    """
    device, devices = device_of(spread), 1
    if spread is not None:
        devices = math.prod(spread.mesh.shape[axis] for axis in _rows_of(spread))
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, and these are {jnp.dtype(dtype)}."
    if query[3] > 256:
        return f"it takes a head_dim up to 256, and this is {query[3]}."
    if query[0] % devices:
        return f"the {devices} devices of the batch do not divide its {query[0]} rows."
    if device is None and jax.default_backend() != "tpu" and not _can_compile():
        return "this process has no TPU, and libtpu, the compiler for TPUs, is not installed."
    if device is not None and device.platform != "tpu":
        return f"it is a kernel for TPUs, and the program is for {device.platform}."
    if device is not None and device.device_kind in ("TPU v2", "TPU v3"):
        return f"it is for later TPUs than {device.device_kind}."
    return None


def device_of(spread: NamedSharding | None) -> Any:
    """Return the device that the program is for; None if that cannot be known."""
    mesh = spread.mesh.abstract_mesh if spread else jax.sharding.get_abstract_mesh()
    if spread or (not mesh.empty and mesh.are_all_axes_manual):
        return mesh.abstract_device
    devices = jax.devices()
    return devices[0] if len(devices) == 1 and devices[0].platform == "tpu" else None


def _can_compile() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def why_not_here(query: jax.Array) -> str | None:
    """Return why a kernel for TPUs cannot be where ``query`` is traced; None if it can."""
    if jax.typeof(query).manual_axis_type.varying:
        return "jax.shard_map has no types for it: there, pass check_vma=False."
    return None
