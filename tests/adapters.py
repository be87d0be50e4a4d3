"""Make adapters of every layout, and compute their updates in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import array, drawn, normal, randomize_b

import lora_jax
from lora_jax import Adapter, LoraParams

SHAPES = {
    "dense": ((6, 8), "io"),
    "transposed": ((5, 7), "oi"),
    "query": ((6, 2, 4), "ioo"),
    "conv": ((3, 4, 6), "iio"),
    "stack": ((3, 6, 5), "bio"),
    "experts": ((5, 2, 4, 2), "obib"),
    "one": ((4, 4), "io"),
}
LAYOUT = {name: letters for name, (_, letters) in SHAPES.items()}
BASE = {
    name: jax.device_put(np.random.default_rng(i).normal(size=shape).astype(np.float32))
    for i, (name, (shape, _)) in enumerate(SHAPES.items())
} | {"bias": array(np.arange(4)), "norm": array(np.ones(3), jnp.bfloat16)}


def lorafy(params, rank=2, **options):
    """Make LoraParams with ``b = 0`` by an initializer that compiles nothing."""
    return lora_jax.lorafy(params, rank, **{"init": drawn, **options})


def adapted(params, rank=2, **options):
    """Make LoraParams with random ``a`` and ``b``."""
    return randomize_b(lorafy(params, rank, **options))


def adapted_weight(shape, layout, dtype=jnp.float32, rank=2, **options):
    """Make LoraParams with random ``a`` and ``b`` of one random weight ``w``."""
    options = {"targets": "w", "layout": {"w": layout}, **options}
    return adapted({"w": normal(0, shape, dtype)}, rank, **options)


def split(seed, rank=2, base=BASE, targets=tuple(SHAPES), **options):
    """Make LoraParams whose trained arrays are all random."""
    options = {"targets": list(targets), "layout": LAYOUT, "init": drawn, **options}
    lora_params = lora_jax.lorafy(base, rank, key=jax.random.key(seed), **options)
    rng = np.random.default_rng(seed)

    def with_b(name, x):
        return jax.device_put(rng.normal(size=x.shape).astype(x.dtype)) if name == "b" else x

    factors = {key: f.map(with_b) for key, f in lora_params.adapter.factors.items()}
    full = {
        path: jax.device_put(np.asarray(x) + rng.normal(size=x.shape).astype(x.dtype))
        for path, x in lora_params.adapter.full.items()
    }
    return LoraParams(base, Adapter(factors, full))


@functools.cache
def jit_rows(fn):
    """Compile ``lora_rows(fn)`` once for all tests of a file."""
    return jax.jit(lora_jax.many.lora_rows(fn))


def rows_like(x, count=5):
    """Make a random input of ``count`` batch rows."""
    return normal(9, (count, *x.shape[1:]), x.dtype)


def dense(x):
    """Compute the updates from the definition, in float64 and in the axes of the weights."""
    adapter = x.adapter if isinstance(x, LoraParams) else x
    found = {}
    for key, f in adapter.factors.items():
        axes = {
            role: "".join("abcd"[i] for i, c in enumerate(f.layout) if c == role) for role in "bio"
        }
        equation = f"{axes['b']}{axes['i']}z,{axes['b']}z{axes['o']}->{'abcd'[: len(f.layout)]}"
        a, b = (np.asarray(y, np.float64) for y in (f.a, f.b))
        found[key] = float(f.scale) * np.einsum(equation, a, b)
    for path, leaf in adapter.full.items():
        found[path] = np.asarray(leaf, np.float64) - np.asarray(x.base[path], np.float64)
    return found
