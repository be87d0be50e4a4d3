"""Quantized bases: exact about the dequantized weight, which is nowhere kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from helpers import (
    all_eqns,
    assert_close,
    drawn,
    error,
    normal,
    products_of_shape,
    randomize_b,
    tolerance,
)
from jax import lax

import lora_jax

QTYPES = ["nf4", "int4", "int8", "fp8"]
X = normal(9, (5, 128))


def weights(*shape, seed=0):
    return normal(seed, shape, std=1 / 8)


def quantized_of(params, *args, **options):
    """Quantized weights by one program: eagerly, every shape is one of several."""
    return jax.jit(lambda params: lora_jax.quant.quantize(params, *args, **options))(params)


def lorafy(quantized, rank=4, **options):
    """An adapter of quantized weights, and the same one of the dequantized ones."""

    @jax.jit
    def made(quantized):
        lora_params = lora_jax.lorafy(quantized, rank, **{"init": drawn, **options})
        return lora_params, lora_jax.quant.dequantize(quantized)

    lora_params, base = made(quantized)
    lora_params = randomize_b(lora_params)
    return lora_params, lora_jax.LoraParams(base, lora_params.adapter)


def adapted(params, qtype="nf4", layout=None, **options):
    """The same of weights that are quantized first."""
    quantized = quantized_of(params, qtype, targets=".*", layout=layout)
    return lorafy(quantized, targets=".*", layout=layout, **options)


def both(fn, lora_params, plain, *args):
    """Outputs and gradients on two bases, by one program."""

    def values_and_grads(lora_params):
        def loss(lora_params):
            outputs = lora_jax.lora(fn)(lora_params, *args)
            return sum(jnp.sin(y).sum() for y in jax.tree.leaves(outputs)), outputs

        return lora_jax.value_and_grad(loss, has_aux=True)(lora_params)

    return jax.jit(lambda *sides: tuple(map(values_and_grads, sides)))(lora_params, plain)


CASES = {
    "dense": ((128, 64), "io", lambda w, x: x @ w),
    "stored transposed": ((64, 128), "oi", lambda w, x: x @ w.T),
    "read from behind": ((128, 64), "io", lambda w, x: jnp.tanh(x @ w) @ w.T),
    "heads": ((128, 2, 8), "ioo", lambda w, x: jnp.einsum("bi,inh->bnh", x, w)),
    "several inputs": ((2, 64, 8), "iio", lambda w, x: x @ w.reshape(128, 8)),
    "scanned layers": (
        (3, 128, 128),
        "bio",
        lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
    ),
    "scanned with a checkpoint": (
        (3, 128, 128),
        "bio",
        lambda w, x: lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, w)[0],
    ),
    "one layer of a stack": ((3, 128, 64), "bio", lambda w, x: x @ w[1]),
    "moved before a scan": (
        (3, 128, 128),
        "bio",
        lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, -w[::-1])[0],
    ),
    "in a loop": (
        (128, 128),
        "io",
        lambda w, x: lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ w), x),
    ),
    "in a cond": (
        (128, 64),
        "io",
        lambda w, x: lax.cond(x[0, 0] > 9, lambda: x @ w, lambda: -x @ w),
    ),
    "experts in groups": (
        (2, 128, 64),
        "bio",
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 3])),
    ),
    "a convolution": (
        (3, 64, 8),
        "iio",
        lambda w, x: lax.conv_general_dilated(
            x.reshape(5, 2, 64), w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
    ),
    "a lookup": ((128, 64), "io", lambda w, x: w[jnp.array([3, 1, 3])]),
    "scaled, joined, split": (
        (128, 64),
        "io",
        lambda w, x: x @ jnp.split(jnp.concatenate([2 * w, w], 1), 2, 1)[0],
    ),
    "shared blocks": ((128, 128), "io", lambda w, x: jax.jit(jnp.matmul)(jnp.tanh(x @ w), w)),
    "not linear, as an activation": ((128, 64), "io", lambda w, x: jnp.tanh(w[jnp.arange(3)])),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_function_of_the_dequantized_weights(name):
    shape, layout, fn = CASES[name]
    lora_params, plain = adapted({"w": weights(*shape)}, layout={"w": layout})
    assert_close(*both(lambda p, x: fn(p["w"], x), lora_params, plain, X))


@pytest.mark.parametrize("qtype", QTYPES)
def test_every_type_and_what_it_loses(qtype):
    params = {
        "w": weights(128, 64),
        "v": normal(0, (64, 128), jnp.bfloat16, 1 / 8),
        "bias": jnp.asarray(np.ones(4, np.float32)),
    }
    quantized = quantized_of(params, qtype)
    lost = lora_jax.quant.quantization_error(quantized, params)
    assert lost.keys() == {"w", "v"}
    most = {"nf4": 0.1, "int4": 0.12, "int8": 0.01, "fp8": 0.03}[qtype]
    assert most / 4 < max(lost.values()) < most
    assert np.array_equal(quantized["bias"], params["bias"])
    assert quantized["v"].dtype == jnp.bfloat16
    fn = lambda p, x: (x @ p["w"]).astype(jnp.bfloat16) @ p["v"]  # noqa: E731
    sides = lorafy(quantized, targets=".*")
    assert_close(*both(fn, *sides, X), dtype=jnp.bfloat16, depth=2)


def test_weights_without_factors_are_made_where_they_are_used_too():
    params = {"w": weights(128, 64), "v": weights(64, 128)}
    lora_params, plain = lorafy(quantized_of(params, targets=".*"), targets="w")
    fn = lambda p, x: x @ p["w"] @ p["v"]  # noqa: E731
    assert_close(*both(fn, lora_params, plain, X))
    assert _kept(fn, lora_params, (64, 128)) == 0


def _kept(fn, lora_params, shape):
    """How many float32 arrays of this shape the forward pass leaves for the backward pass."""
    trainable, frozen = lora_jax.split(lora_params)

    def residuals(trainable, x):
        run = lambda trainable, x: lora_jax.lora(fn)(lora_jax.combine(trainable, frozen), x)  # noqa: E731
        return jax.vjp(run, trainable, x)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, trainable, X))
    return sum(x.shape == shape and x.dtype == jnp.float32 for x in kept)


def test_the_backward_pass_makes_the_weight_again():
    lora_params, plain = adapted({"w": weights(128, 64), "v": weights(64, 96)})
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    for shape in ((128, 64), (64, 96)):
        assert _kept(fn, lora_params, shape) == 0
        assert _kept(fn, plain, shape) == 1
    step = lora_jax.value_and_grad(lambda p, x: (lora_jax.lora(fn)(p, x) ** 2).sum())
    eqns = all_eqns(jax.make_jaxpr(step)(lora_params, X))
    made = [e for e in eqns if e.primitive.name == "mul" and e.outvars[0].aval.shape == (64, 96)]
    assert len(made) == 2  # forward and backward
    assert not products_of_shape(step, (128, 64), lora_params, X)
    assert not products_of_shape(step, (64, 128), lora_params, X)


@pytest.mark.long
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the memory of CPU programs")
@pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="this jaxlib's CPU compiler drops the barriers that keep any recomputation apart",
)
def test_training_takes_the_memory_of_the_bits():
    """Base and temporary memory, over 4.5 bits a weight and what LoRA itself needs beside."""
    layers, size, tokens = 48, 256, 64
    params = [{"w": jax.ShapeDtypeStruct((size, size), jnp.float32)}] * layers
    x = jax.ShapeDtypeStruct((tokens, size), jnp.float32)

    def fn(params, x):
        for p in params:
            x = jnp.tanh(x @ p["w"])
        return x

    def memory(params):  # of shapes alone
        lora_params = jax.eval_shape(lambda p: lora_jax.lorafy(p, 4, targets=".*"), params)
        trainable, frozen = lora_jax.split(lora_params)

        def step(trainable, frozen, x):
            return lora_jax.value_and_grad(lambda p: (lora_jax.lora(fn)(p, x) ** 2).mean())(
                lora_jax.combine(trainable, frozen)
            )

        found = jax.jit(step).lower(trainable, frozen, x).compile().memory_analysis()
        others = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((trainable, x)))
        return found.argument_size_in_bytes - others, found.temp_size_in_bytes

    count = layers * size * size
    base, temp = memory(params)
    quantized_base, quantized_temp = memory(jax.eval_shape(lora_jax.quant.quantize, params))
    assert base > 4 * count
    assert quantized_base < 1.001 * 4.5 / 8 * count
    assert quantized_base + quantized_temp < 1.1 * (4.5 / 8 * count + temp)


def test_layouts_are_found_and_dora_and_dropout_go_along():
    params = {"first": weights(128, 64), "second": weights(32, 64)}
    fn = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"].T  # noqa: E731
    layout = lora_jax.layout_of(fn, params, X)
    quantized = quantized_of(params, layout=layout)
    found = lora_jax.layout_of(fn, quantized, X)
    assert dict(found) == dict(layout) == {"first": "io", "second": "oi"}
    assert quantized["second"].scale.shape == (32, 1)  # blocks along the inputs
    lora_params, plain = lorafy(quantized, layout=layout, targets=".*", dora=True)
    assert_close(*both(fn, lora_params, plain, X), depth=16)

    @jax.jit
    def dropped(*sides):
        apply, key = lora_jax.lora(fn, dropout=0.3), jax.random.key(1)
        return tuple(apply(p, X, lora_key=key) for p in sides)

    assert_close(*dropped(lora_params, plain), depth=16)
    assert "trainable params: 1,248 || all params: 11,488 ||" in repr(lora_params)
    assert lora_jax.report(fn, lora_params, X).materialized == ()


def test_gradients_pass_through_what_scales_a_quantized_weight():
    params = {"w": weights(128, 64), "bias": normal(1, (1, 64))}
    params["s"] = jnp.asarray(np.linspace(1, 2, 64)[None], jnp.float32)
    quantized = quantized_of(params, targets="w")
    fn = lambda p, x: x @ (p["w"] * p["s"]).T[::-1].T + p["bias"]  # noqa: E731
    sides = lorafy(quantized, targets="w", full=["s", "bias"])
    actual, expected = both(fn, *sides, X)
    assert np.abs(actual[1].full["s"]).min() > 0
    assert_close(actual, expected, depth=16)


def test_rows_of_a_quantized_table_are_activations():
    """They are added, normed, dropped from and multiplied by a DoRA weight as any are."""
    params = {"table": weights(64, 128), "w": weights(128, 64)}
    quantized = quantized_of(params, "int8", targets=".*")
    ids = np.array([3, 60, 3])

    def fn(p, ids):
        h = p["table"][ids] + 1.0
        h = h / jnp.sqrt((h**2).mean(-1, keepdims=True))
        return h @ p["w"]

    @jax.jit
    def dropped(*sides):
        apply, key = lora_jax.lora(fn, dropout=0.5), jax.random.key(1)
        return tuple(apply(p, ids, lora_key=key) for p in sides)

    for targets in ("w", ".*"):
        sides = lorafy(quantized, targets=targets, dora=True)
        actual, expected = both(fn, *sides, ids)
        assert_close({targets: actual}, {targets: expected}, depth=16)
    mine, theirs = dropped(*sides)
    assert error(mine, actual[0][1]) > 1e-2
    assert_close(mine, theirs, depth=16)


def test_the_norms_of_a_quantized_stack_are_found_a_layer_at_a_time():
    stack = {"w": weights(6, 128, 64)}
    lora_params, plain = adapted(stack, "nf4", {"w": "bio"}, dora=True)

    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, p["w"])[0]

    assert_close(*both(fn, lora_params, plain, X), depth=32)  # six layers, there and back
    made = jax.make_jaxpr(lambda p, x: lora_jax.lora(fn)(p, x))(lora_params, X)
    made = [v.aval for e in all_eqns(made) for v in e.outvars]
    assert not [a for a in made if a.shape == (6, 128, 64) and a.dtype == jnp.float32]
    shapes = jax.eval_shape(lambda p: p, lora_params)
    assert lora_jax.report(fn, shapes, X).materialized == ()


def test_a_flax_model_on_a_quantized_base():
    model = nn.MultiHeadDotProductAttention(num_heads=2)
    x = normal(0, (2, 4, 64))
    params = jax.jit(model.init)(jax.random.key(1), x)
    quantized = quantized_of(params, "int8")
    assert_close(*both(model.apply, *lorafy(quantized, 2), x), depth=16)
    assert len(jax.tree.leaves(quantized, is_leaf=lambda x: isinstance(x, qwix.QArray))) == 8


@pytest.mark.parametrize("batch", [(), (2,)])
def test_merging_is_refused_or_plain_or_rounded_again(batch):
    layout = {"w": "b" * len(batch) + "io"}
    params = {"w": weights(*batch, 128, 64)}
    quantized = quantized_of(params, "int8", targets=".*", layout=layout, block=32)
    lora_params, plain = lorafy(quantized, targets=".*", layout=layout)
    assert lora_params.base["w"].scale.shape == (*batch, 4, 64)
    with pytest.raises(ValueError, match=r"'w' is quantized, .* quantized='dequantize'"):
        lora_jax.merge(lora_params)
    with pytest.raises(ValueError, match="quantized='round': expected"):
        lora_jax.merge(lora_params, quantized="round")
    merged = lora_jax.merge(lora_params, quantized="dequantize")
    assert_close(merged, lora_jax.merge(plain))
    again = lora_jax.merge(lora_params, quantized="requantize")
    assert isinstance(again["w"], qwix.QArray)
    assert again["w"].scale.shape == lora_params.base["w"].scale.shape
    (lost,) = lora_jax.quant.quantization_error(again, merged).values()
    assert 1e-3 < lost < 0.02


def test_leaves_without_factors_stay_quantized_in_a_merge():
    params = {"w": weights(128, 64), "v": weights(64, 64)}
    quantized = lora_jax.quant.quantize(params, targets="v")
    assert quantized["w"] is params["w"]
    lora_params = lora_jax.lorafy(quantized, 2, targets="w", init=drawn)
    merged = lora_jax.merge(lora_params)
    assert merged["v"].qvalue is quantized["v"].qvalue


@pytest.mark.parametrize(
    ("size", "block", "tile"), [(128, None, 64), (96, None, 48), (80, 16, 16), (12, None, 12)]
)
def test_blocks_divide_the_inputs(size, block, tile):
    params = {"w": jax.ShapeDtypeStruct((size, 4), jnp.float32)}
    quantized = jax.eval_shape(lambda params: lora_jax.quant.quantize(params, block=block), params)
    assert quantized["w"].scale.shape == (size // tile, 4)


@pytest.mark.parametrize("qtype", ["nf4", pytest.param("int8", marks=pytest.mark.long)])
def test_loftq_starts_nearer_to_the_model_than_quantizing_alone(qtype):
    params = {"io": weights(128, 64), "oi": weights(64, 128), "bio": weights(2, 128, 64)}
    layout = {name: name for name in params}

    @jax.jit
    def made(params):
        """What rounding leaves of the weights, and starts of one and of four steps."""
        rounded = lora_jax.quant.quantize(params, qtype, targets=".*", layout=layout)
        options = {"targets": ".*", "layout": layout}
        inits = [lora_jax.init.loftq(qtype, steps) for steps in (1, 4)]
        starts = [lora_jax.lorafy(params, 8, init=init, **options) for init in inits]
        merged = [lora_jax.merge(p, quantized="dequantize") for p in starts]
        return lora_jax.quant.dequantize(rounded), *merged, starts[-1]

    *found, lora_params = made(params)
    assert all(isinstance(x, qwix.QArray) for x in lora_params.base.values())
    for name, w in params.items():
        rounded, one, four = (np.linalg.norm(np.asarray(x[name]) - np.asarray(w)) for x in found)
        assert four < one < 0.9 * rounded, name
    fn = jax.jit(lora_jax.lora(lambda p, x: x @ p["io"]))
    expected = np.asarray(X, np.float64) @ np.asarray(found[-1]["io"])
    assert_close(fn(lora_params, X), expected, depth=16)


def test_loftq_wants_whole_plain_weights():
    loftq = lora_jax.init.loftq
    with pytest.raises(ValueError, match="steps=0: expected at least 1"):
        loftq(steps=0)
    with pytest.raises(ValueError, match="only entire weights quantize"):
        lora_jax.lorafy({"w": weights(128, 64)}, 2, targets="w[:, 0:8]", init=loftq())
    quantized = lora_jax.quant.quantize({"w": weights(128, 64)})
    with pytest.raises(ValueError, match="'w' is quantized, and this initializer"):
        lora_jax.lorafy(quantized, 2, targets="w", init=loftq())


def test_bad_input():
    params = {"w": weights(128, 64), "tall": weights(127, 4)}
    with pytest.raises(ValueError, match="qtype='nf5': expected one of"):
        lora_jax.quant.quantize(params, "nf5")
    with pytest.raises(ValueError, match="block=1: expected at least 2"):
        lora_jax.quant.quantize(params, block=1)
    with pytest.raises(ValueError, match="'tall' has an input axis of 127, whose largest divisor"):
        lora_jax.quant.quantize(params)
    with pytest.raises(ValueError, match="only entire weights"):
        lora_jax.quant.quantize(params, targets="w[:, 0:4]")
    quantized = lora_jax.quant.quantize(params, targets="w")
    with pytest.raises(ValueError, match="'w' is quantized already"):
        lora_jax.quant.quantize(quantized, targets="w")
    with pytest.raises(ValueError, match="w: quantized: dequantize it first"):
        lora_jax.lorafy(quantized, targets=[], full="w")
    for init in ("pissa", "olora"):
        with pytest.raises(ValueError, match="'w' is quantized, and this initializer"):
            lora_jax.lorafy(quantized, 2, targets="w", init=init)
    with pytest.raises(ValueError, match=r"the trees differ in \['tall'"):
        lora_jax.quant.quantization_error(quantized, {"w": params["w"]})


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(ImportError, match=r"lora-jax\[quant\]"):
        lora_jax.quant.quantize({"w": weights(128, 64)})


@pytest.mark.long
def test_float_bases_do_not_import_it():
    import subprocess
    import sys

    code = (
        "import sys, lora_jax, jax.numpy as jnp; lora_jax.merge(lora_jax.lorafy({'query': "
        "jnp.ones((4, 4))}, 2)); assert 'qwix' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_error_is_relative_to_all_entries():
    w = weights(128, 64)
    quantized = lora_jax.quant.quantize({"w": w})
    theirs = np.asarray(qwix.dequantize(quantized["w"]))
    lost, w = np.asarray(theirs, np.float64) - np.asarray(w), np.asarray(w, np.float64)
    expected = np.linalg.norm(lost) / np.linalg.norm(w)
    found = lora_jax.quant.quantization_error({"w": quantized["w"]}, {"w": weights(128, 64)})["w"]
    assert found == pytest.approx(expected, rel=tolerance(length=128 * 64))
    assert_close(lora_jax.quant.dequantize(quantized)["w"], theirs)
