"""Models, random adapters, and the oracle: the adapted function against the merged one."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_jax

# Largest error, relative to the largest entry.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float64": 1e-9}


def randomize_b(lora_params, seed=1, std=0.1):
    """B ~ N(0, std²): with B = 0 nearly every bug passes."""
    key = jax.random.key(seed)
    factors = {}
    for i, (path, f) in enumerate(lora_params.adapter.factors.items()):
        b = std * jax.random.normal(jax.random.fold_in(key, i), f.b.shape, jnp.float32)
        factors[path] = dataclasses.replace(f, b=b.astype(f.b.dtype))
    adapter = dataclasses.replace(lora_params.adapter, factors=factors)
    return dataclasses.replace(lora_params, adapter=adapter)


def error(actual, expected) -> float:
    """The largest error over all leaves, relative to each expected leaf's largest entry."""
    worst = 0.0
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        if not np.isfinite(a).all():  # max(0.0, nan) is 0.0
            return np.inf
        worst = max(worst, float(np.abs(a - e).max() / (np.abs(e).max() + 1e-30)))
    return worst


def assert_close(actual, expected, tolerance=None):
    """Equal to the tolerance of the dtype."""
    if tolerance is None:
        tolerance = max(TOLERANCE.get(str(x.dtype), 0.0) for x in jax.tree.leaves(expected))
    assert (worst := error(actual, expected)) <= tolerance, worst


def loss_of(fn: Callable[..., Any]):
    """A scalar that depends on every output, by fixed random weights."""
    return lambda params, *args: _loss(fn(params, *args))


def _loss(outputs):
    total = jnp.float32(0)
    for i, y in enumerate(jax.tree.leaves(outputs)):
        if jnp.issubdtype(y.dtype, jnp.floating):
            weights = jax.random.normal(jax.random.key(i), y.shape, jnp.float32)
            total += (weights * y.astype(jnp.float32)).sum()
    return total


def assert_oracle(fn, lora_params, *args, tolerance=None, **options):
    """``lora(fn)(p) == fn(merge(p))``, values and gradients."""

    def both(f):
        def loss(p, *args):
            outputs = f(p, *args)
            return _loss(outputs), outputs

        (_, outputs), grads = jax.jit(lora_jax.value_and_grad(loss, has_aux=True))(
            lora_params, *args
        )
        return outputs, grads

    actual = both(lora_jax.lora(fn, **options))
    expected = both(lambda p, *args: fn(lora_jax.merge(p), *args))
    assert_close(actual[0], expected[0], tolerance)
    assert_close(actual[1], expected[1], tolerance)


def used_as(layout, w):
    """A dense use of ``w`` by its layout: for the check where the use under test tells nothing."""
    axes = [i for i, letter in enumerate(layout) if letter == "i"]
    ones = jnp.ones([w.shape[i] for i in axes], w.dtype)
    return jnp.tensordot(ones, w, (list(range(len(axes))), axes))


def all_eqns(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                if hasattr(sub, "eqns") or hasattr(getattr(sub, "jaxpr", None), "eqns"):
                    yield from all_eqns(sub)


def products_of_shape(fn, shape, *args):
    """The contractions of ``fn`` whose result has ``shape``, axes in any order."""
    wanted = sorted(shape)
    return [
        eqn
        for eqn in all_eqns(jax.make_jaxpr(fn)(*args))
        if eqn.primitive.name == "dot_general"
        and eqn.params["dimension_numbers"][0][0]
        and sorted(eqn.outvars[0].aval.shape) == wanted
    ]


class Block(nn.Module):
    """A pre-norm block of Linen's own layers."""

    heads: int = 4
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        kind = {"dtype": self.dtype, "param_dtype": self.dtype or jnp.float32}
        y = nn.LayerNorm(**kind)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, **kind)(y)
        y = nn.Dense(48, **kind)(nn.LayerNorm(**kind)(x))
        return x + nn.Dense(x.shape[-1], **kind)(nn.gelu(y)), None


class ScanTransformer(nn.Module):
    """Linen: scan over remat over blocks."""

    layers: int = 3
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = stack(dtype=self.dtype, name="layers")(x)
        x = nn.LayerNorm(dtype=self.dtype, param_dtype=self.dtype or jnp.float32)(x)
        return nn.Dense(5, dtype=self.dtype, param_dtype=self.dtype or jnp.float32)(x)


class Einsum(nnx.Module):
    """A kernel of any axes under one einsum."""

    def __init__(self, equation, shape, rngs, dtype):
        self.equation = equation
        self.kernel = nnx.Param(0.2 * jax.random.normal(rngs.params(), shape, dtype))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.kernel[...])


class EinsumTransformer(nnx.Module):
    """NNX: einsum kernels [d, n, h], RMS norms, a gated MLP, layers unrolled."""

    def __init__(self, rngs, dim=24, heads=3, layers=2, dtype=jnp.float32):
        self.blocks = nnx.List([EinsumBlock(rngs, dim, heads, dtype) for _ in range(layers)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class EinsumBlock(nnx.Module):
    def __init__(self, rngs, dim, heads, dtype):
        head = dim // heads
        self.norm = nnx.RMSNorm(dim, rngs=rngs, dtype=dtype, param_dtype=dtype)
        for name in ("q_proj", "k_proj", "v_proj"):
            equation, shape = "btd,dnh->btnh", (dim, heads, head)
            setattr(self, name, Einsum(equation, shape, rngs, dtype))
        self.o_proj = Einsum("btnh,nhd->btd", (heads, head, dim), rngs, dtype)
        self.gate = nnx.Linear(dim, 40, use_bias=False, rngs=rngs, dtype=dtype, param_dtype=dtype)
        self.down = nnx.Linear(40, dim, use_bias=False, rngs=rngs, dtype=dtype, param_dtype=dtype)

    def __call__(self, x):
        y = self.norm(x)
        q, k, v = self.q_proj(y), self.k_proj(y), self.v_proj(y)
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1]))
        x = x + self.o_proj(jnp.einsum("bnts,bsnh->btnh", weights, v))
        return x + self.down(jax.nn.silu(self.gate(x)))


class NormedNet(nnx.Module):
    """NNX: dropout and batch norm, whose state changes at every call."""

    def __init__(self, rngs, dtype=jnp.float32):
        kind = {"rngs": rngs, "dtype": dtype, "param_dtype": dtype}
        self.query = nnx.Linear(24, 32, **kind)
        self.norm = nnx.BatchNorm(32, **kind)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.value = nnx.Linear(32, 8, **kind)

    def __call__(self, x):
        return self.value(self.dropout(nnx.relu(self.norm(self.query(x)))))


@dataclasses.dataclass
class Case:
    """A model as a pure function, with parameters, an input, and its targets."""

    fn: Callable[..., Any]
    params: Any
    x: jax.Array
    targets: Any = "all-linear"

    def lorafy(self, rank=4, **options):
        """An adapter for it, with B randomized."""
        options = {"targets": self.targets, **options}
        return randomize_b(lora_jax.lorafy(self.params, rank, **options))


@functools.cache
def scan_case(dtype=jnp.float32):
    model = ScanTransformer(dtype=None if dtype == jnp.float32 else dtype)
    x = jax.random.normal(jax.random.key(1), (2, 6, 32), dtype)
    params = model.init(jax.random.key(0), x)["params"]
    return Case(lambda p, x: model.apply({"params": p}, x), params, x)


@functools.cache
def einsum_case(dtype=jnp.float32):
    graph, state = nnx.split(EinsumTransformer(nnx.Rngs(0), dtype=dtype), nnx.Param)
    x = jax.random.normal(jax.random.key(1), (2, 5, 24), dtype)
    return Case(lambda p, x: nnx.merge(graph, p, copy=True)(x), state, x)


@functools.cache
def normed_case(dtype=jnp.float32):
    graph, state = nnx.split(NormedNet(nnx.Rngs(0), dtype=dtype))

    def fn(state, x):
        model = nnx.merge(graph, state, copy=True)
        y = model(x)
        return y, nnx.state(model, (nnx.BatchStat, nnx.RngCount))

    return Case(fn, state, jax.random.normal(jax.random.key(1), (6, 24), dtype))


@functools.cache
def dict_case(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w1": 0.3 * jax.random.normal(keys[0], (24, 40), dtype),
        "b1": jnp.zeros(40, dtype),
        "layers": [{"w2": 0.3 * jax.random.normal(keys[1], (40, 16), dtype)}],
    }

    def fn(p, x):
        return jnp.tanh(x @ p["w1"] + p["b1"][None]) @ p["layers"][0]["w2"]

    return Case(fn, params, jax.random.normal(keys[2], (6, 24), dtype))


CASES = {
    "linen scan+remat": scan_case,
    "nnx einsum": einsum_case,
    "nnx dropout+batchnorm": normed_case,
    "plain dict": dict_case,
}
