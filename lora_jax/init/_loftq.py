"""``loftq``: start from what quantizing the base loses."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.lowrank import svd
from lora_jax._weights.quantized import dequantize_array, quantize_array
from lora_jax._weights.target import Initializer, Target
from lora_jax.init._svd import take_out
from lora_jax.quant import tiles_of


def loftq(qtype: str = "nf4", steps: int = 1, block: int | None = None) -> Initializer:
    """Quantize the weight, and start from the best low-rank correction of the error.

    Alternate ``steps`` times::

        base = quantize(W - scale * a b),   scale * a b = the ``rank`` largest parts of W - base

    The base that ``lorafy`` returns is quantized. The model starts nearer to the original one than
    with ``quantize`` alone.

    Args:
        qtype: as in :func:`lora_jax.quant.quantize`.
        steps: the number of rounds; the first one gains most.
        block: as in :func:`lora_jax.quant.quantize`.

    Raises:
        ImportError: qwix is not installed.
        ValueError: ``steps`` is less than 1, or the target is a part of a weight.

    References:
        Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models,
        arXiv:2310.08659.
    """
    if steps < 1:
        raise ValueError(f"loftq: steps={steps!r}: expected at least 1")

    def init(key: jax.Array, target: Target) -> tuple[jax.Array, ...]:
        del key
        if target.part.ranges:
            raise ValueError(f"loftq: {target.path!r} is a part, and only entire weights quantize")
        name, tiles = tiles_of(target.leaf.shape, target.layout, qtype, block, target.path)
        w, r = target.matrix(), target.rank
        a = jnp.zeros((*target.batch, target.inputs, r), jnp.float32)
        b = jnp.zeros((*target.batch, r, target.outputs), jnp.float32)
        base: Any = None
        for _ in range(steps):
            *_, rest = take_out(w, target.scale, a, b)
            base = quantize_array(target.leaf_with(rest), name, tiles)
            lost = w - target.as_matrix(dequantize_array(base))
            a, b = svd(lost, r).balanced(target.scale)
        return a, b, base

    init.__name__ = "loftq"
    return init
