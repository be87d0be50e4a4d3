"""Weights multiplied, added, summed; sliced, joined, padded: exact without a dense product."""

import jax
import jax.numpy as jnp
import pytest
from adapters import adapted_weight
from helpers import assert_close, assert_oracle, drawn, normal, products_of_shape, randomize_b
from jax import lax

import lora_jax

V = jnp.linspace(0.5, 1.5, 8)
U = jnp.linspace(-1.0, 1.0, 6)

# shape, layout, and what happens to the weight before x @ it, x [7, 6]
MOVES = {
    "scalar multiple": ((6, 8), "io", lambda w, s: w * s),
    "literal multiple": ((6, 8), "io", lambda w, s: 2 * w),
    "quotient": ((6, 8), "io", lambda w, s: w / s),
    "output scale": ((6, 8), "io", lambda w, s: w * V[None]),
    "input scale": ((6, 8), "io", lambda w, s: U[:, None] * w),
    "scale per output of a stored transpose": ((8, 6), "oi", lambda w, s: (w / V[:, None]).T),
    "scale broadcast to the whole shape": (
        (6, 8),
        "io",
        lambda w, s: w * jnp.broadcast_to(V[None], (6, 8)),
    ),
    "scale by einsum": ((6, 8), "io", lambda w, s: jnp.einsum("io,i->io", w, U)),
    "negation": ((6, 8), "io", lambda w, s: -w),
    "the weight centered": ((6, 8), "io", lambda w, s: w - w.mean(0, keepdims=True)),
    "a constant of its shape added": ((6, 8), "io", lambda w, s: w + jnp.ones((6, 8))),
    "twice the weight": ((6, 8), "io", lambda w, s: w + w),
    "an axis of copies summed": (
        (6, 8),
        "io",
        lambda w, s: jnp.broadcast_to(w[None], (3, 6, 8)).sum(0),
    ),
    "an axis of scaled copies summed": (
        (6, 8),
        "io",
        lambda w, s: (jnp.broadcast_to(w[None], (3, 6, 8)) * jnp.arange(3.0)[:, None, None]).sum(0),
    ),
    "batch, input and output scales": (
        (3, 6, 8),
        "bio",
        lambda w, s: (w * jnp.arange(18.0).reshape(3, 6, 1) * jnp.ones((3, 1, 8)))[1],
    ),
    "slice of inputs": ((9, 8), "io", lambda w, s: w[2:8]),
    "strided slice": ((13, 8), "io", lambda w, s: w[1::2]),
    "slice of outputs": ((6, 12), "io", lambda w, s: w[:, 3:11]),
    "one layer of a stack": ((3, 6, 8), "bio", lambda w, s: w[1]),
    "one layer by a traced index": ((3, 6, 8), "bio", lambda w, s: w[s.astype(int) % 3]),
    "dynamic slice of both": (
        (9, 12),
        "io",
        lambda w, s: lax.dynamic_slice(w, (s.astype(int), s.astype(int) + 99), (6, 8)),
    ),
    "taken apart and put together": (
        (6, 8),
        "io",
        lambda w, s: jnp.concatenate(jnp.split(w, 4, 1)[::-1], 1),
    ),
    "inputs swapped by a roll": ((6, 8), "io", lambda w, s: jnp.roll(w, 2, 0)),
    "padded with constants": ((5, 6), "io", lambda w, s: jnp.pad(w, ((0, 1), (2, 0)))),
    "padded inside and cropped": (
        (4, 8),
        "io",
        lambda w, s: lax.pad(w, 1.0, ((-1, 0, 1), (0, 0, 0))),
    ),
    "reversed": ((6, 8), "io", lambda w, s: w[::-1, ::-1]),
    "tiled": ((3, 4), "io", lambda w, s: jnp.tile(w, (2, 2))),
    "repeated": ((6, 8), "io", lambda w, s: jnp.concatenate([w, w], 1)[:, 4:12]),
    "part of a padded weight reshaped": (
        (6, 4),
        "io",
        lambda w, s: jnp.pad(w, ((0, 0), (0, 4))).reshape(6, 2, 4)[:, ::-1].reshape(6, 8),
    ),
    "merged across roles and split again": (
        (6, 8),
        "io",
        lambda w, s: -w.reshape(-1).astype(jnp.float32).reshape(2, 3, 8).reshape(6, 8),
    ),
    "stacked with itself, then one of two": (
        (6, 8),
        "io",
        lambda w, s: jnp.stack([w, 2 * w])[1],
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_weight_under_linear_operations_keeps_its_update(name):
    shape, layout, move = MOVES[name]
    lora_params = adapted_weight(shape, layout)
    x = normal(1, (7, 6))

    def fn(p, x, s):
        return x @ move(p["w"], s)

    assert_oracle(fn, lora_params, x, jnp.float32(1.7))
    step = lora_jax.value_and_grad(
        lambda p, x: (lora_jax.lora(fn)(p, x, jnp.float32(1.7)) ** 2).sum()
    )
    assert not products_of_shape(step, shape, lora_params, x)


@pytest.mark.parametrize(
    "move",
    [
        lambda w: w - w.mean(),
        lambda w: w.sum() - w,
        lambda w: w + w[2, 3],
        lambda w: w * w.sum(),
    ],
)
def test_a_number_read_off_a_weight_is_no_part_of_it(move):
    lora_params, x = adapted_weight((6, 8), "io"), normal(1, (7, 6))
    fn = lambda p, x: x @ move(p["w"])  # noqa: E731
    with pytest.raises(NotImplementedError, match="a form that has no low-rank rule"):
        lora_jax.lora(fn)(lora_params, x)
    built = lora_jax.lora(fn, on_materialize="allow")(lora_params, x)
    assert_close(built, fn(lora_jax.merge(lora_params), x), length=48, depth=3)


def fused(names="qkv", layout="io", shape=(6, 4)):
    params = {name: normal(i, shape) for i, name in enumerate(names)}
    return params, dict.fromkeys(names, layout)


def test_a_fused_kernel_built_from_adapted_and_frozen_parts():
    params, layout = fused()
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets="q|v", layout=layout, init=drawn))
    x = normal(1, (7, 6))

    def outputs(p, x):
        qkv = x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1)
        return jnp.split(qkv, 3, -1)

    def inputs(p, x):
        return jnp.concatenate([x, -x, 2 * x], 1) @ jnp.concatenate([p["q"], p["k"], p["v"]], 0)

    def stacked(p, x):
        return jnp.einsum("bi,eio->beo", x, jnp.stack([p["q"], p["k"], p["v"]]))

    for fn in (outputs, inputs, stacked):
        assert_oracle(fn, lora_params, x)
        step = lora_jax.value_and_grad(
            lambda p, x, fn=fn: sum((y**2).sum() for y in lora_jax.lora(fn)(p, x))
        )
        assert not products_of_shape(step, (6, 4), lora_params, x)


def test_the_part_of_a_fused_kernel_that_is_not_adapted_costs_nothing():
    params, layout = fused()
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets="q", layout=layout, init=drawn))

    def fn(p, x):
        qkv = jnp.concatenate([p["q"], p["k"], p["v"]], 1)
        return x @ qkv[:, 4:]  # k and v alone

    x = jnp.ones((5, 6))
    with pytest.raises(ValueError, match="uses none of the 1 adapted leaves"):
        jax.eval_shape(lora_jax.lora(fn), lora_params, x)


def test_the_sum_of_two_adapted_weights():
    params, layout = fused("uv")
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets=".*", layout=layout, init=drawn))
    x = normal(1, (7, 6))
    assert_oracle(lambda p, x: x @ (p["u"] - 3 * p["v"]), lora_params, x)


def test_a_product_and_a_sum_written_out_are_a_contraction():
    lora_params = adapted_weight((6, 8), "io")
    x = normal(1, (7, 6))
    fn = lambda p, x: jnp.tanh((x[:, :, None] * p["w"][None]).sum(1))  # noqa: E731
    assert_oracle(fn, lora_params, x)


def test_a_scan_over_weights_stacked_inside_the_function():
    params, layout = fused("uvw", shape=(6, 6))
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets="u|w", layout=layout, init=drawn))
    x = normal(1, (7, 6))

    def fn(p, x):
        stack = jnp.stack([p["u"], p["v"], p["w"]])
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    assert_oracle(fn, lora_params, x)


def test_weights_that_a_scan_puts_out():
    lora_params = adapted_weight((3, 6, 6), "bio")
    x = normal(1, (7, 6))

    def fn(p, x):
        def body(x, w):
            return jnp.tanh(x @ w), (2 * w.T)

        x, ws = lax.scan(body, x, p["w"])
        return jnp.einsum("bi,eio->beo", x, ws)

    assert_oracle(fn, lora_params, x)


@pytest.mark.parametrize(
    ("move", "primitive"),
    [
        (lambda w: w * jnp.ones((6, 8)), "mul"),
        (lambda w: 1 / w, "div"),
        (lambda w: w * w, "mul"),
        (lambda w: w[None] + jnp.ones((2, 6, 8)), "add"),
        (lambda w: jnp.where(w > 0, w, 0), "gt"),
        (lambda w: jnp.abs(w).sum(), "abs"),
        (lambda w: (w**2).sum(0), "integer_pow|square"),
        (lambda w: w.reshape(8, 6)[::-1], "rev"),
        (lambda w: jnp.arange(1.0, 7.0).reshape(6, 1) ** w, "pow"),
    ],
)
def test_what_is_not_linear_in_the_weight_is_refused(move, primitive):
    lora_params = adapted_weight((6, 8), "io")
    with pytest.raises(NotImplementedError, match=f"reaches '({primitive})'"):
        jax.eval_shape(lora_jax.lora(lambda p: move(p["w"])), lora_params)
    assert_oracle(lambda p: move(p["w"]), lora_params, on_materialize="allow")


def test_a_weight_reshaped_across_its_roles_is_refused_with_the_reason():
    lora_params = adapted_weight((6, 8), "io")
    fn = lora_jax.lora(lambda p, x: x @ p["w"].reshape(8, 6))
    with pytest.raises(NotImplementedError, match="reshaped across its input and output axes"):
        jax.eval_shape(fn, lora_params, jnp.ones((2, 8)))
