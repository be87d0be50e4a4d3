"""Models, random adapters, and the oracle: the adapted function against the merged one."""

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_jax


def tolerance(dtype: Any = jnp.float32, *, length: int = 256, depth: int = 8) -> float:
    """Bound what rounding may change, relative to the largest entry of a result.

    ``4 u sqrt(depth * length)``: ``u`` is half the epsilon of the dtype, what one rounding is off
    by. A sum of ``length`` terms is ``length`` roundings, at random up and down, and ``depth``
    such sums follow each other. The factor is for the largest of many entries, and for norms and
    softmaxes, which magnify. Two programs, two machines and two orders of one sum stay within
    it; a wrong scale, a missing factor or a lost update does not.

    Args:
        dtype: of the result. Sums of 16 bits or fewer are summed in float32, so that ``length``
            does not count there. In float64 it is 1e-9 for all: far above rounding, far below
            anything else.
        length: of the longest sum; the models below have none above 256, gradients included.
        depth: how many sums the result passes through, one after another; a gradient passes
            through those of the function and back.
    """
    info = jnp.finfo(dtype)
    if info.bits == 64:
        return 1e-9
    return 2 * float(info.eps) * math.sqrt(depth * (length if info.bits == 32 else 1))


def randomize_b(lora_params, seed=1, std=0.1):
    """B ~ N(0, std²): with B = 0 nearly every bug passes."""
    rng = np.random.default_rng(seed)  # a draw of NumPy compiles nothing
    factors = {
        path: dataclasses.replace(f, b=array(std * rng.standard_normal(f.b.shape), f.b.dtype))
        for path, f in lora_params.adapter.factors.items()
    }
    adapter = dataclasses.replace(lora_params.adapter, factors=factors)
    return dataclasses.replace(lora_params, adapter=adapter)


def drawn(key, target):
    """Draw ``a ~ N(0, 1/in)`` by NumPy, with ``b = 0``: an initializer that compiles nothing.

    The seed is the key, or the path where the key is traced.
    """
    traced = isinstance(key, jax.core.Tracer)
    path = zlib.crc32(target.path.encode())
    seed = path if traced else np.asarray(jax.random.key_data(key)).tolist()
    a_shape = (*target.batch, target.inputs, target.rank)
    a = normal(seed, a_shape, std=1 / math.sqrt(target.fan_in))
    return a, array(np.zeros((*target.batch, target.rank, target.outputs)))


def array(x, dtype=jnp.float32):
    """An array on the device; ``jnp.asarray`` of another dtype compiles a cast for every shape."""
    return jax.device_put(np.asarray(x).astype(dtype))


def normal(seed, shape, dtype=jnp.float32, std=1.0):
    """Draw from N(0, std²) by NumPy: a draw of JAX compiles a program for every new shape."""
    return array(std * np.random.default_rng(seed).standard_normal(shape), dtype)


def by_numpy(adapters):
    """A stack of adapters of the same targets; ``stack`` would compile programs for each shape."""

    def padded(*xs):
        rows = np.zeros((len(xs), *np.max([np.shape(x) for x in xs], axis=0)), xs[0].dtype)
        for row, x in enumerate(xs):
            rows[(row, *map(slice, np.shape(x)))] = x
        return jax.device_put(rows)

    return lora_jax.LoraParams(
        adapters[0].base, jax.tree.map(padded, *(p.adapter for p in adapters))
    )


def error(actual, expected) -> float:
    """The largest error over all leaves, relative to each expected leaf's largest entry.

    A leaf of NumPy in float64 is an oracle for a result of any dtype.
    """
    worst = 0.0
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(a) == np.shape(e)
        assert a.dtype == e.dtype or is_oracle(e)
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        if not np.isfinite(a).all():  # max(0.0, nan) is 0.0
            return np.inf
        if a.size:
            worst = max(worst, float(np.abs(a - e).max() / (np.abs(e).max() + 1e-30)))
    return worst


def is_oracle(x) -> bool:
    """Whether an expected value was computed by NumPy in float64."""
    return isinstance(x, np.ndarray | np.float64) and x.dtype == np.float64


def assert_close(actual, expected, **sums):
    """Equal to rounding: ``sums`` are the ``length`` and ``depth`` of :func:`tolerance`.

    The dtype is the coarsest of the actual leaves, unless ``dtype=`` says what was rounded on the
    way.
    """
    dtypes = [x.dtype for x in jax.tree.leaves(actual) if jnp.issubdtype(x.dtype, jnp.inexact)]
    if dtypes:
        sums = {"dtype": max(dtypes, key=lambda dtype: jnp.finfo(dtype).eps)} | sums
    allowed = tolerance(**sums) if dtypes else 0.0
    assert (worst := error(actual, expected)) <= allowed, f"{worst:.3g} > {allowed:.3g}"


def loss_of(fn: Callable[..., Any]):
    """A scalar that depends on every output, by fixed random weights."""
    return lambda params, *args: _loss(fn(params, *args))


def _loss(outputs):
    total = jnp.float32(0)
    for i, y in enumerate(jax.tree.leaves(outputs)):
        if jnp.issubdtype(y.dtype, jnp.floating):
            total += (normal(i, y.shape) * y.astype(jnp.float32)).sum()
    return total


def assert_oracle(fn, lora_params, *args, sums=None, **options):
    """``lora(fn)(p) == fn(merge(p))``, values and gradients, to rounding.

    Args:
        fn: a function of parameters and ``args``.
        lora_params: with B random.
        *args: further arguments of ``fn``.
        sums: ``length``, ``depth`` and ``dtype`` of :func:`tolerance`.
        **options: of :func:`lora_jax.lora`.
    """

    def both(f, p, *args):
        def loss(p, *args):
            outputs = f(p, *args)
            return _loss(outputs), outputs

        (_, outputs), grads = lora_jax.value_and_grad(loss, has_aux=True)(p, *args)
        return outputs, grads

    adapted = functools.partial(both, lora_jax.lora(fn, **options))
    merged = functools.partial(both, lambda p, *args: fn(lora_jax.merge(p), *args))
    # One program of both: what compiles once costs half.
    actual, expected = jax.jit(lambda *args: (adapted(*args), merged(*args)))(lora_params, *args)
    assert_close(actual, expected, **(sums or {}))


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
        """An adapter for it, with A and B random."""
        options = {"targets": self.targets, "init": drawn, **options}
        return randomize_b(lora_jax.lorafy(self.params, rank, **options))


def nnx_case(make, dtype, only, call):
    """A case of an NNX model, initialized in one program."""
    graph, *_ = nnx.split(nnx.eval_shape(make), only, ...)
    state = jax.jit(lambda: nnx.state(make(), only))()
    return Case(functools.partial(call, graph), state, normal(1, (6, 24), dtype))


@functools.cache
def scan_case(dtype=jnp.float32):
    model = ScanTransformer(dtype=None if dtype == jnp.float32 else dtype)
    x = normal(1, (2, 6, 32), dtype)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    return Case(lambda p, x: model.apply({"params": p}, x), params, x)


@functools.cache
def einsum_case(dtype=jnp.float32):
    def call(graph, state, x):
        return nnx.merge(graph, state, copy=True)(x)

    case = nnx_case(lambda: EinsumTransformer(nnx.Rngs(0), dtype=dtype), dtype, nnx.Param, call)
    return dataclasses.replace(case, x=normal(1, (2, 5, 24), dtype))


@functools.cache
def normed_case(dtype=jnp.float32):
    def call(graph, state, x):
        model = nnx.merge(graph, state, copy=True)
        y = model(x)
        return y, nnx.state(model, (nnx.BatchStat, nnx.RngCount))

    return nnx_case(lambda: NormedNet(nnx.Rngs(0), dtype=dtype), dtype, ..., call)


@functools.cache
def dict_case(dtype=jnp.float32):
    params = {
        "w1": normal(0, (24, 40), dtype, 0.3),
        "b1": normal(0, (40,), dtype, 0.0),
        "layers": [{"w2": normal(1, (40, 16), dtype, 0.3)}],
    }

    def fn(p, x):
        return jnp.tanh(x @ p["w1"] + p["b1"][None]) @ p["layers"][0]["w2"]

    return Case(fn, params, normal(2, (6, 24), dtype))


CASES = {
    "linen scan+remat": scan_case,
    "nnx einsum": einsum_case,
    "nnx dropout+batchnorm": normed_case,
    "plain dict": dict_case,
}


@contextlib.contextmanager
def compilations():
    """What XLA compiles meanwhile, on any thread."""
    seen = []

    def listen(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(kwargs.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def bits(tree):
    """The bytes of every leaf."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def assert_same(actual, expected):
    """The same containers, statics, dtypes, shapes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    forms = [
        [(x.dtype, x.shape) for x in map(np.asarray, jax.tree.leaves(t))]
        for t in (actual, expected)
    ]
    assert forms[0] == forms[1]
    assert bits(actual) == bits(expected)
