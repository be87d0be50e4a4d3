"""DoRA: magnitudes and directions apart, without a dense product, wherever a weight goes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_programs
from helpers import assert_close, assert_oracle, drawn, normal, products_of_shape, randomize_b
from jax import lax

import lora_jax

X = normal(9, (5, 6))


def adapted(params, layout=None, targets=".*", rank=2, **options):
    """With random ``b`` and magnitudes."""
    options = {"targets": targets, "layout": layout, "init": drawn, **options}
    lora_params = randomize_b(lora_jax.lorafy(params, rank, dora=True, **options))
    factors = lora_params.adapter.factors
    for i, (path, f) in enumerate(factors.items()):
        noise = np.random.default_rng(i).uniform(0.5, 1.5, f.magnitude.shape)
        magnitude = jnp.asarray(np.asarray(f.magnitude) * noise, jnp.float32)
        factors[path] = dataclasses.replace(f, magnitude=magnitude)
    return lora_params


def weights(*shape, seed=0):
    return normal(seed, shape)


def test_it_is_the_formula_with_a_norm_that_passes_no_gradient():
    lora_params = adapted({"w": weights(6, 8)})

    def formula(lora_params, x):
        f, w = lora_params.adapter.factors["w"], lora_params.base["w"]
        v = w + f.scale * f.a @ f.b
        norm = lax.stop_gradient(jnp.sqrt((v**2).sum(0)))
        return jnp.sin(x @ (v * (f.magnitude / norm)[None]))

    fn = lora_jax.lora(lambda p, x: jnp.sin(x @ p["w"]))
    loss = lambda fn: lora_jax.value_and_grad(lambda p, x: fn(p, x).sum())  # noqa: E731
    both = jax.jit(lambda *args: (loss(fn)(*args), loss(formula)(*args)))
    assert_close(*both(lora_params, X))
    assert_close(lora_jax.merge(lora_params), {"w": _merged(lora_params)})


def _merged(lora_params):
    """By NumPy in float64."""
    f = lora_params.adapter.factors["w"]
    w, scale, a, b, magnitude = (
        np.asarray(x, np.float64) for x in (lora_params.base["w"], f.scale, f.a, f.b, f.magnitude)
    )
    v = w + scale * a @ b
    return v / np.linalg.norm(v, axis=0) * magnitude


# Of norms and quotients, forth and back.
SUMS = {"depth": 16}

CASES = {
    "dense": ((6, 8), "io", lambda w, x: x @ w),
    "stored transposed": ((8, 6), "oi", lambda w, x: x @ w.T),
    "read from behind": ((6, 8), "io", lambda w, x: jnp.tanh(x @ w) @ w.T),
    "attention heads": ((6, 2, 4), "ioo", lambda w, x: jnp.einsum("bi,inh->bnh", x, w)),
    "heads merged": ((6, 2, 4), "ioo", lambda w, x: x @ w.reshape(6, 8)),
    "several inputs": ((2, 3, 4), "iio", lambda w, x: x @ w.reshape(6, 4)),
    "experts": ((3, 6, 8), "bio", lambda w, x: jnp.einsum("bi,eio->ebo", x, w)),
    "experts in groups": (
        (3, 6, 8),
        "bio",
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 0, 2])),
    ),
    "an expert a row": (
        (3, 6, 8),
        "bio",
        lambda w, x: jnp.einsum("bi,bio->bo", x, w[jnp.array([2, 0, 1, 1, 0])]),
    ),
    "layers": (
        (3, 6, 6),
        "bio",
        lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), x @ w), x, w),
    ),
    "a convolution": (
        (3, 2, 4),
        "iio",
        lambda w, x: lax.conv_general_dilated(
            x.reshape(5, 3, 2), w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
    ),
    "a convolution by groups": (
        (3, 1, 4),
        "iio",
        lambda w, x: lax.conv_general_dilated(
            x.reshape(5, 3, 2),
            w,
            (1,),
            "SAME",
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=2,
        ),
    ),
    "a table": ((9, 4), "io", lambda w, x: jnp.take(w, jnp.array([0, 8, 3]), 0) * x[:3, :4]),
    "a tied table": ((9, 6), "io", lambda w, x: (x + w[jnp.array([1, 7, 2, 2, 0])]) @ w.T),
    "fused, taken apart": ((6, 9), "io", lambda w, x: [x @ v for v in jnp.split(w, 3, 1)]),
    "scaled": ((6, 8), "io", lambda w, x: x @ (-2 * w * jnp.arange(1.0, 9)[None])),
    "in a shared block": (
        (6, 6),
        "io",
        lambda w, x: jax.checkpoint(lambda w, x: jnp.sin(x @ w))(w, x @ w),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_wherever_a_weight_goes(name):
    shape, layout, fn = CASES[name]
    lora_params = adapted({"w": weights(*shape)}, {"w": layout})
    assert_oracle(lambda p, x: fn(p["w"], x), lora_params, X, sums=SUMS)


MOVED = """
a kernel stored transposed; a slice of inputs; every other output; a broadcast kernel
a window of layers; one layer by a traced index; another expert for each row; columns permuted
rows permuted; a part of the outputs; outputs padded; inputs flipped; outputs times a vector
layers and inputs merged and split again; outputs of two weights; several contracted axes
a lookup in stacked tables; a convolution in other orders; a ragged dot of scaled experts
a checkpoint in a scan; moved before and in vmap rows; moved before and in fori
"""


@pytest.mark.parametrize("name", MOVED.strip().replace("\n", "; ").split("; "))
def test_programs_of_the_table(name):
    program = dataclasses.replace(test_programs.TABLE[name], ways=("DoRA",))
    test_programs.check(program)


def test_parts_of_a_fused_kernel_have_their_own_magnitudes():
    params = {"qkv": weights(6, 12)}
    lora_params = adapted(params, targets=["qkv[:, 0:4]", "qkv[:, 8:12]"])
    assert_oracle(lambda p, x: jnp.tanh(x @ p["qkv"]) @ p["qkv"].T, lora_params, X)
    fn = lambda p, x: x @ p["qkv"]  # noqa: E731
    y, base = jax.jit(lambda p: (lora_jax.lora(fn)(p, X), fn(params, X)))(lora_params)
    assert_close(np.asarray(y)[:, 4:8], np.asarray(base)[:, 4:8])


def test_a_part_of_the_inputs_is_not_a_column():
    lora_params = adapted({"w": weights(6, 8)}, targets="w[0:3]")
    with pytest.raises(NotImplementedError, match="'dot_general' in a form"):
        jax.eval_shape(lora_jax.lora(lambda p, x: x @ p["w"]), lora_params, X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ (p["w"] + p["v"]),
        lambda p, x: p["w"].sum(1) * x.sum(0)[:6],
        lambda p, x: x @ jnp.concatenate([p["w"][:3], p["v"][:3]]),
        lambda p, x: p["w"] @ p["v"].T + x.sum(),
        lambda p, x: jnp.take(p["w"], jnp.array([9]), 0, fill_value=1.0),
    ],
)
def test_what_is_no_gain_of_columns_any_more_is_refused(fn):
    lora_params = adapted({"w": weights(6, 8), "v": weights(6, 8, seed=1)})
    with pytest.raises(NotImplementedError, match="in a form that has no low-rank rule"):
        jax.eval_shape(lora_jax.lora(fn), lora_params, X)
    assert_oracle(fn, lora_params, X, on_materialize="allow", sums=SUMS)


def test_no_product_of_the_weights_shape_is_built():
    lora_params = adapted({"w": weights(6, 8)})
    step = lora_jax.value_and_grad(lambda p, x: lora_jax.lora(lambda p, x: x @ p["w"])(p, x).sum())
    assert not products_of_shape(step, (6, 8), lora_params, X)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_bases(dtype):
    w = normal(0, (64, 32), dtype)
    start = lora_jax.lorafy({"w": w}, 4, targets="w", dora=True, init=drawn).adapter.factors["w"]
    norm = np.linalg.norm(np.asarray(w, np.float64), axis=0)
    assert_close((start.magnitude, start.norm), (norm, norm**2), dtype=jnp.float32)
    lora_params = adapted({"w": w}, rank=4)
    fn = lambda p, x: (x @ p["w"]).astype(jnp.float32)  # noqa: E731
    assert_oracle(fn, lora_params, normal(1, (5, 64), dtype), sums={"dtype": dtype})


def test_a_flax_model_trains_its_magnitudes_by_either_style(standard_promotion):
    import optax

    model = nn.MultiHeadDotProductAttention(num_heads=2)
    x = weights(2, 4, 8)
    params = jax.jit(model.init)(jax.random.key(0), x)
    start = lora_jax.lorafy(params, 2, targets="all-linear", dora=True, init=drawn)
    apply = lora_jax.lora(model.apply)
    assert_close(*jax.jit(lambda p: (apply(p, x), model.apply(params, x)))(start))

    def loss(lora_params):
        return (apply(lora_params, x) ** 2).mean()

    tx, own = lora_jax.optimizer(optax.adamw(1e-2)), optax.adamw(1e-2)
    trainable, frozen = lora_jax.split(start)

    def two_steps(whole, state, trainable, own_state):
        """A step of the whole tree, and a step of what trains."""
        updates, state = tx.update(jax.grad(loss)(whole), state, whole)
        whole = optax.apply_updates(whole, updates)
        _, grads = lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen))
        updates, own_state = own.update(grads, own_state, trainable)
        return whole, state, optax.apply_updates(trainable, updates), own_state

    state, own_state = jax.jit(lambda: (tx.init(start), own.init(trainable)))()
    step = jax.jit(two_steps)
    whole = start
    for _ in range(3):
        whole, state, trainable, own_state = step(whole, state, trainable, own_state)
    assert_close(trainable, lora_jax.split(whole)[0], depth=64)  # three steps, forth and back
    for path, f in whole.adapter.factors.items():
        first = start.adapter.factors[path]
        assert (np.asarray(f.magnitude) != np.asarray(first.magnitude)).all()
        np.testing.assert_array_equal(f.norm, first.norm)
        np.testing.assert_array_equal(f.scale, first.scale)
    assert "trainable params: 160 ||" in repr(start)  # four times 2 (8 + 8), and 8


def test_an_adapter_without_norms_works_them_out():
    lora_params = adapted({"w": weights(6, 8)})
    f = dataclasses.replace(lora_params.adapter.factors["w"], norm=None)
    other = lora_jax.LoraParams(lora_params.base, lora_jax.Adapter({"w": f}))
    fn = lora_jax.lora(lambda p, x: x @ p["w"])
    assert_close(*jax.jit(lambda *two: tuple(fn(p, X) for p in two))(other, lora_params))


def test_stacks_of_adapters_under_vmap():
    base = {"w": weights(6, 8)}
    many = [adapted(base, init=lambda *_, i=i: some_factors(i)).adapter for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *many)
    fn = lora_jax.lora(lambda p, x: x @ p["w"])
    axes = lora_jax.LoraParams(None, 0), None

    @jax.jit
    def both(stacked, many):
        """At once, and one by one."""
        at_once = jax.vmap(fn, axes)(lora_jax.LoraParams(base, stacked), X)
        return at_once, jnp.stack([fn(lora_jax.LoraParams(base, one), X) for one in many])

    assert_close(*both(stacked, many))


def some_factors(seed):
    return normal(seed, (6, 2)), normal(seed + 10, (2, 8))


def test_columns_without_direction_are_refused():
    for rows, value in ((slice(None), 0), (2, np.nan)):
        bad = np.array(weights(6, 8))
        bad[rows, 3] = value
        with pytest.raises(ValueError, match=r"1 columns of 'w' are zero .* first at \[3\]"):
            lora_jax.lorafy({"w": jnp.asarray(bad)}, 2, targets="w", dora=True, init=drawn)


def test_merging_cannot_be_undone():
    lora_params = adapted({"w": weights(6, 8)})
    with pytest.raises(ValueError, match="'w' has a DoRA magnitude"):
        lora_jax.unmerge(lora_jax.merge(lora_params), lora_params.adapter)


def test_a_magnitude_of_another_shape_is_refused():
    lora_params = adapted({"w": weights(6, 8)})
    f = dataclasses.replace(lora_params.adapter.factors["w"], magnitude=jnp.ones(6))
    with pytest.raises(ValueError, match=r"magnitude has shape \(6,\), expected .* = \(8,\)"):
        lora_jax.merge(lora_jax.LoraParams(lora_params.base, lora_jax.Adapter({"w": f})))


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="counts of a CPU: products of GPUs are library calls"
)
def test_a_step_costs_little_more_than_one_of_lora():
    """By XLA's own counts, for transformer blocks, checkpointed as large models have them or not.

    Without checkpoints, what the magnitudes multiply is kept for their gradient.
    """
    size, hidden = 256, 1024

    def block(p, x):
        q, k, v = (x @ p[name] for name in "qkv")
        x = x + jax.nn.softmax(q @ k.T) @ v @ p["o"]
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"]

    def model(block):
        def fn(params, x):
            for p in params:
                x = block(p, x)
            return x

        return fn

    shapes = dict.fromkeys("qkvo", (size, size)) | {"up": (size, hidden), "down": (hidden, size)}
    spec = jax.ShapeDtypeStruct
    params = [{name: spec(shape, jnp.float32) for name, shape in shapes.items()}] * 2

    def cost(fn, dora):
        lora_params = jax.eval_shape(
            lambda p: lora_jax.lorafy(p, 8, targets=".*", dora=dora), params
        )
        step = lora_jax.value_and_grad(lambda p, x: (lora_jax.lora(fn)(p, x) ** 2).mean())
        compiled = jax.jit(step).lower(lora_params, spec((1024, size), jnp.float32)).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    for wrap, most in ((jax.checkpoint, 1.15), (lambda f: f, 1.2)):
        (flops, temp), (dora_flops, dora_temp) = (
            cost(model(wrap(block)), dora) for dora in (False, True)
        )
        assert dora_flops < 1.15 * flops
        assert dora_temp < most * temp
