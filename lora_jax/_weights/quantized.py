"""Recognize, read and make quantized arrays, which are those of qwix."""

import sys
from typing import Any

import jax
import jax.numpy as jnp


def is_quantized(x: Any) -> bool:
    """Return whether ``x`` is a quantized array; before qwix is imported nothing can be."""
    qwix = sys.modules.get("qwix")
    return qwix is not None and isinstance(x, qwix.QArray)


def is_coarse(x: Any) -> bool:
    """Return whether sums of small numbers do not fit the steps of ``x``: quantized, float8."""
    if is_quantized(x):
        return True
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8


def import_qwix() -> Any:
    """Import the library of quantized types.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            "quantized weights are arrays of qwix, which is not installed: pip install "
            "'lora-jax[quant]'"
        ) from error
    return qwix


def dequantize_array(x: Any) -> jax.Array:
    """Return the plain array that a coarse one represents: bfloat16; in the dtype of its scales."""
    if not is_quantized(x):
        return x.astype(jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return import_qwix().dequantize(x)


def plain_array(x: Any) -> Any:
    """Return a quantized array dequantized, and any other array as it is."""
    return dequantize_array(x) if is_quantized(x) else x


def quantize_array(x: jax.Array, qtype: Any, tiles: dict[int, int]) -> Any:
    """Quantize ``x`` with one scale per tile; axes that are in no tile are channels."""
    qwix = import_qwix()
    channels = [axis for axis in range(x.ndim) if axis not in tiles]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return qwix.quantize(x, qtype, channelwise_axes=channels, tiled_axes=tiles)


def requantize(x: jax.Array, like: Any) -> Any:
    """Round ``x`` as ``like`` is: quantize it if that is quantized."""
    if not is_quantized(like):
        return x.astype(like.dtype)
    sizes = zip(like.qvalue.shape, like.scale.shape, strict=True)
    tiles = {axis: n // scales for axis, (n, scales) in enumerate(sizes) if n != scales}
    return quantize_array(x.astype(like.scale.dtype), like.qtype, tiles)


def relative_error(x: Any, exact: Any) -> float:
    """Return ``|x - exact| / |exact|`` over all entries."""
    x, exact = (jnp.asarray(plain_array(y), jnp.float32) for y in (x, exact))
    return float(jnp.linalg.norm((x - exact).ravel()) / jnp.linalg.norm(exact.ravel()))
