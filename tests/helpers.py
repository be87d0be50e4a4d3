"""Share models, random adapters, tolerances, and the oracle: adapted against merged functions."""

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
    """Bound the rounding error of a result, relative to its largest entry.

    The bound is ``4 u sqrt(depth * length)``. ``u`` is half the epsilon of the dtype, the error of
    one rounding. A sum of ``length`` terms has ``length`` roundings of random sign, and ``depth``
    sums follow each other. The factor 4 covers the largest of many entries, and norms and
    softmaxes, which magnify errors. Two programs, two machines and two orders of a sum stay within
    the bound; a wrong scale, a missing factor or a lost update does not.

    Args:
        dtype: the dtype of the result. XLA sums 16 bits or fewer in float32, so ``length`` does not
            count there. The bound for float64 is always 1e-9: far above rounding, far below errors.
        length: the length of the longest sum; at most 256 in the models below, with gradients.
        depth: the number of successive sums; a gradient passes through those of the function twice.
    """
    info = jnp.finfo(dtype)
    if info.bits == 64:
        return 1e-9
    return 2 * float(info.eps) * math.sqrt(depth * (length if info.bits == 32 else 1))


def randomize_b(lora_params, seed=1, std=0.1):
    """Draw B ~ N(0, std²): with B = 0 nearly every bug passes."""
    rng = np.random.default_rng(seed)  # a draw with NumPy compiles nothing
    factors = {
        path: dataclasses.replace(f, b=array(std * rng.standard_normal(f.b.shape), f.b.dtype))
        for path, f in lora_params.adapter.factors.items()
    }
    adapter = dataclasses.replace(lora_params.adapter, factors=factors)
    return dataclasses.replace(lora_params, adapter=adapter)


def drawn(key, target):
    """Draw ``a ~ N(0, 1/in)`` with NumPy, and ``b = 0``: an initializer that compiles nothing.

    The seed is the key, or the path if the key is traced.
    """
    traced = isinstance(key, jax.core.Tracer)
    path = zlib.crc32(target.path.encode())
    seed = path if traced else np.asarray(jax.random.key_data(key)).tolist()
    a_shape = (*target.batch, target.inputs, target.rank)
    a = normal(seed, a_shape, std=1 / math.sqrt(target.fan_in))
    return a, array(np.zeros((*target.batch, target.rank, target.outputs)))


def array(x, dtype=jnp.float32):
    """Put an array on the device; ``jnp.asarray`` to another dtype compiles a cast per shape."""
    return jax.device_put(np.asarray(x).astype(dtype))


def normal(seed, shape, dtype=jnp.float32, std=1.0):
    """Draw from N(0, std²) with NumPy: a draw with JAX compiles a program per shape."""
    return array(std * np.random.default_rng(seed).standard_normal(shape), dtype)


def from_torch(tensor):
    """Convert a PyTorch tensor."""
    return jnp.asarray(tensor.detach().numpy())


def ones(*shape):
    """Make an array of ones."""
    return array(np.ones(shape))


def stack_by_numpy(adapters):
    """Stack adapters of the same targets; ``stack`` would compile programs for each shape."""

    def pad(*xs):
        stacked = np.zeros((len(xs), *np.max([np.shape(x) for x in xs], axis=0)), xs[0].dtype)
        for n, x in enumerate(xs):
            stacked[(n, *map(slice, np.shape(x)))] = x
        return jax.device_put(stacked)

    return lora_jax.LoraParams(adapters[0].base, jax.tree.map(pad, *(p.adapter for p in adapters)))


def error(actual, expected) -> float:
    """Return the largest error over all leaves, relative to each expected leaf's largest entry.

    An expected NumPy leaf in float64 is an oracle for a result of any dtype.
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
    """Return whether an expected value is from NumPy in float64."""
    return isinstance(x, np.ndarray | np.float64) and x.dtype == np.float64


def assert_close(actual, expected, **sums):
    """Check equality to rounding: ``sums`` are ``length`` and ``depth`` of :func:`tolerance`.

    The dtype is the coarsest of the actual leaves, unless ``dtype=`` gives that of a coarser step.
    """
    dtypes = [x.dtype for x in jax.tree.leaves(actual) if jnp.issubdtype(x.dtype, jnp.inexact)]
    if dtypes:
        sums = {"dtype": max(dtypes, key=lambda dtype: jnp.finfo(dtype).eps)} | sums
    allowed = tolerance(**sums) if dtypes else 0.0
    assert (worst := error(actual, expected)) <= allowed, f"{worst:.3g} > {allowed:.3g}"


def loss_of(fn: Callable[..., Any]):
    """Make a scalar loss that depends on every output, with fixed random weights."""
    return lambda params, *args: _loss(fn(params, *args))


def _loss(outputs):
    total = jnp.float32(0)
    for i, y in enumerate(jax.tree.leaves(outputs)):
        if jnp.issubdtype(y.dtype, jnp.floating):
            total += (normal(i, y.shape) * y.astype(jnp.float32)).sum()
    return total


def assert_oracle(fn, lora_params, *args, sums=None, **options):
    """Check ``lora(fn)(p) == fn(merge(p))`` to rounding, values and gradients.

    Args:
        fn: a function of parameters and ``args``.
        lora_params: LoraParams with random B.
        *args: further arguments of ``fn``.
        sums: ``length``, ``depth`` and ``dtype`` of :func:`tolerance`.
        **options: options of :func:`lora_jax.lora`.
    """

    def value_and_grad(f, p, *args):
        def loss(p, *args):
            outputs = f(p, *args)
            return _loss(outputs), outputs

        (_, outputs), grads = lora_jax.value_and_grad(loss, has_aux=True)(p, *args)
        return outputs, grads

    adapted = functools.partial(value_and_grad, lora_jax.lora(fn, **options))
    merged = functools.partial(value_and_grad, lambda p, *args: fn(lora_jax.merge(p), *args))
    # One program for both compiles in half the time.
    actual, expected = jax.jit(lambda *args: (adapted(*args), merged(*args)))(lora_params, *args)
    assert_close(actual, expected, **(sums or {}))


def use_as(layout, w):
    """Use ``w`` by its layout in a product: for checks whose own use does not show the layout."""
    axes = [i for i, letter in enumerate(layout) if letter == "i"]
    ones = jnp.ones([w.shape[i] for i in axes], w.dtype)
    return jnp.tensordot(ones, w, (list(range(len(axes))), axes))


def all_eqns(jaxpr):
    """Yield every equation of a jaxpr and of the jaxprs inside it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                if hasattr(sub, "eqns") or hasattr(getattr(sub, "jaxpr", None), "eqns"):
                    yield from all_eqns(sub)


def products_of_shape(fn, shape, *args):
    """Return the contractions of ``fn`` whose result has ``shape``, axes in any order."""
    wanted = sorted(shape)
    return [
        eqn
        for eqn in all_eqns(jax.make_jaxpr(fn)(*args))
        if eqn.primitive.name == "dot_general"
        and eqn.params["dimension_numbers"][0][0]
        and sorted(eqn.outvars[0].aval.shape) == wanted
    ]


class Block(nn.Module):
    """A pre-norm block of Linen layers."""

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
    """A Linen model: scan over remat over blocks."""

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
    """A kernel of any shape in one einsum."""

    def __init__(self, equation, shape, rngs, dtype):
        self.equation = equation
        self.kernel = nnx.Param(0.2 * jax.random.normal(rngs.params(), shape, dtype))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.kernel[...])


class EinsumTransformer(nnx.Module):
    """An NNX model: einsum kernels [d, n, h], RMS norms, a gated MLP, unrolled layers."""

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
    """An NNX model with dropout and batch norm, whose state changes in every call."""

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
    """A model as a pure function, its parameters, an input, and its targets."""

    fn: Callable[..., Any]
    params: Any
    x: jax.Array
    targets: Any = "all-linear"

    def lorafy(self, rank=4, **options):
        """Make LoraParams with random A and B."""
        options = {"targets": self.targets, "init": drawn, **options}
        return randomize_b(lora_jax.lorafy(self.params, rank, **options))


def nnx_case(make, dtype, only, call):
    """Make a case of an NNX model, initialized in one program."""
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
    """Collect the names of the programs that XLA compiles inside the block, on any thread."""
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
    """Return the bytes of every leaf."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def assert_same(actual, expected):
    """Check equality of containers, static fields, dtypes, shapes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    forms = [
        [(x.dtype, x.shape) for x in map(np.asarray, jax.tree.leaves(t))]
        for t in (actual, expected)
    ]
    assert forms[0] == forms[1]
    assert bits(actual) == bits(expected)
