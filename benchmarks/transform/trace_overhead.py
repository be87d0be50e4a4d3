"""Measure the time to trace ``lora(fn)`` compared with ``fn``: 32 layers, not scanned.

    python -m benchmarks.transform.trace_overhead

It prints for each model the median of several ratios, each of two successive traces with cold
caches. Nothing is compiled or run, so the ratio depends little on the machine.
"""

import argparse
import gc
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import lora_jax

LAYERS, DIM, HEADS, FF = 32, 64, 4, 128


class LinenBlock(nn.Module):
    """A pre-norm block of Linen layers."""

    @nn.compact
    def __call__(self, x):
        """Map ``[batch, time, DIM]`` to the same shape."""
        x = x + nn.MultiHeadDotProductAttention(HEADS)(nn.LayerNorm()(x))
        return x + nn.Dense(DIM)(nn.gelu(nn.Dense(FF)(nn.LayerNorm()(x))))


class Linen(nn.Module):
    """A sequence of blocks."""

    @nn.compact
    def __call__(self, x):
        """Map ``[batch, time, DIM]`` to the same shape."""
        for _ in range(LAYERS):
            x = LinenBlock()(x)
        return x


class NnxBlock(nnx.Module):
    """The same block in NNX."""

    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(DIM, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(DIM, FF, rngs=rngs), nnx.Linear(FF, DIM, rngs=rngs)

    def __call__(self, x):
        """Map ``[batch, time, DIM]`` to the same shape."""
        x = x + self.attention(self.norms[0](x))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Nnx(nnx.Module):
    """A sequence of blocks."""

    def __init__(self, rngs):
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        """Map ``[batch, time, DIM]`` to the same shape."""
        for block in self.blocks:
            x = block(x)
        return x


def plain_block(p, x):
    """Compute the same block without a library."""

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)

    q, k, v = (jnp.einsum("btd,dnh->btnh", norm(x), p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
    x = x + jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", weights, v), p["o"])
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]


def plain(block):
    """Make a function that applies a list of such blocks."""

    def fn(params, x):
        for p in params:
            x = block(p, x)
        return x

    return fn


def models():
    """Yield name, function, parameter shapes and input shape of each model."""
    x = jax.ShapeDtypeStruct((2, 8, DIM), jnp.float32)
    linen = Linen()
    variables = jax.eval_shape(linen.init, jax.random.key(0), x)
    yield "Linen", linen.apply, variables, x
    graph, state = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))), nnx.Param)
    yield "NNX", lambda state, x: nnx.merge(graph, state, copy=True)(x), state, x
    head = DIM // HEADS
    shapes = dict.fromkeys("qkv", (DIM, HEADS, head))
    shapes |= {"o": (HEADS, head, DIM), "up": (DIM, FF), "down": (FF, DIM)}
    blocks = [{n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}] * LAYERS
    yield "plain JAX", plain(plain_block), blocks, x
    yield "plain JAX, one jitted block", plain(jax.jit(plain_block)), blocks, x
    yield "plain JAX, checkpointed blocks", plain(jax.checkpoint(plain_block)), blocks, x


def trace_seconds(fn, *args):
    """Return the time of one trace."""
    jax.clear_caches()
    gc.collect()
    start = time.perf_counter()
    jax.make_jaxpr(fn)(*args)
    return time.perf_counter() - start


def main():
    """Measure all models, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    print(f"jax {jax.__version__}, {LAYERS} layers, medians of {repeats}")
    print(f"{'model':32}{'fn':>9}{'lora(fn)':>10}{'ratio':>7}  weights")
    for name, fn, params, x in models():
        layout = lora_jax.layout_of(fn, params, x)
        lora_params = jax.eval_shape(
            lambda p, layout=layout: lora_jax.lorafy(p, 4, targets="all-linear", layout=layout),
            params,
        )
        adapted = lora_jax.lora(fn)
        pairs = [
            (trace_seconds(fn, params, x), trace_seconds(adapted, lora_params, x))
            for _ in range(repeats)
        ]
        ratio = statistics.median(b / a for a, b in pairs)
        base, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
        count = len(lora_params.adapter.factors)
        print(f"{name:32}{base:8.3f}s{ours:9.3f}s{ratio:7.2f}  {count}")


if __name__ == "__main__":
    main()
