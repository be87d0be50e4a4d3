"""The contract of ``lora(fn)`` on four models: identity at the start, the merged oracle after."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import CASES, all_eqns, assert_close, assert_oracle, error, loss_of

import lora_jax


@pytest.fixture(params=CASES, scope="module")
def make(request):
    return CASES[request.param]


# How a function of (params, x) is run, with x of the case and three more beside it.
TRANSFORMS = {
    "jit": lambda f, p, xs: jax.jit(f)(p, xs[0]),
    "vmap": lambda f, p, xs: jax.jit(jax.vmap(f, in_axes=(None, 0)))(p, xs),
    "grad": lambda f, p, xs: jax.jit(jax.value_and_grad(lambda x: loss_of(f)(p, x)))(xs[0]),
    "pmap": lambda f, p, xs: jax.pmap(f, in_axes=(None, 0))(p, xs),
}


def run(transform, f, p, case):
    xs = jnp.stack([case.x * factor for factor in jnp.arange(1, 5).astype(case.x.dtype)])
    return TRANSFORMS[transform](f, p, xs)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_adapted_function_starts_as_the_function_bit_for_bit(make, transform):
    case = make()
    lora_params = lora_jax.lorafy(case.params, 4, targets=case.targets)
    adapted = run(transform, lora_jax.lora(case.fn), lora_params, case)
    expected = run(transform, case.fn, case.params, case)
    if transform == "grad":  # sums of cotangents are associated differently; the value is not
        (adapted, dx), (expected, expected_dx) = adapted, expected
        assert_close(dx, expected_dx)
    assert jax.tree.structure(adapted) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(adapted), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def test_adapted_equals_merged_in_values_and_gradients(make):
    case = make()
    assert_oracle(case.fn, case.lorafy(), case.x)


def test_b_reaches_the_output(make):
    # The oracle would pass if both sides ignored the adapter.
    case = make()
    adapted = jax.jit(lora_jax.lora(case.fn))(case.lorafy(), case.x)
    assert error(adapted, jax.jit(case.fn)(case.params, case.x)) > 1e-2


def test_adapted_equals_merged_under_vmap(make):
    case = make()
    xs = jnp.stack([case.x, 2 * case.x, -case.x])

    def batched(p, xs):
        return jax.vmap(case.fn, in_axes=(None, 0))(p, xs)

    lora_params = case.lorafy()
    inside = jax.jit(lora_jax.lora(batched))(lora_params, xs)
    outside = jax.jit(jax.vmap(lora_jax.lora(case.fn), in_axes=(None, 0)))(lora_params, xs)
    expected = jax.jit(batched)(lora_jax.merge(lora_params), xs)
    assert_close(inside, expected)
    assert_close(outside, expected)


def test_adapted_equals_merged_under_pmap(make):
    case = make()
    xs = jnp.stack([case.x * (i + 1) for i in range(4)])
    lora_params = case.lorafy()

    def step(f):
        def device(p, x):
            value, grads = lora_jax.value_and_grad(loss_of(f))(p, x)
            return jax.lax.pmean((f(p, x)[0], value, grads), "d")

        return jax.pmap(device, "d", in_axes=(None, 0))(lora_params, xs)

    merged = step(lambda p, x: case.fn(lora_jax.merge(p), x))
    assert_close(step(lora_jax.lora(case.fn)), merged)


def test_adapted_equals_merged_under_grad_inside_and_second_order(make):
    case = make()
    lora_params = case.lorafy()

    def input_gradient(p, x):
        return jax.grad(lambda x: loss_of(case.fn)(p, x))(x)

    assert_oracle(input_gradient, lora_params, case.x, tolerance=1e-4)


def test_bfloat16_values_and_gradients(make, standard_promotion):
    case = make(jnp.bfloat16)
    lora_params = case.lorafy()
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
        (lora_params, case.x),
    )
    adapted = lora_jax.lora(case.fn)

    def merged(p, x):
        return case.fn(lora_jax.merge(p), x)

    actual = jax.jit(adapted)(lora_params, case.x)
    assert_close(actual, jax.jit(merged)(lora_params, case.x))

    exact_fn = make(jnp.float32).fn  # the same model, computing in float32
    exact = jax.jit(lora_jax.value_and_grad(loss_of(lora_jax.lora(exact_fn))))(*wide)[1]

    def distance(f):
        grads = jax.jit(lora_jax.value_and_grad(loss_of(f)))(lora_params, case.x)[1]
        gaps = jax.tree.map(lambda a, e: jnp.square(a - e).sum(), grads, exact)
        return float(jnp.sqrt(sum(jax.tree.leaves(gaps))))

    assert distance(adapted) <= 2 * distance(merged)


@pytest.mark.parametrize("transform", ["vmap", "pmap"])
def test_bfloat16_values_under_batching(make, transform, standard_promotion):
    case = make(jnp.bfloat16)
    lora_params = case.lorafy()
    actual = run(transform, lora_jax.lora(case.fn), lora_params, case)
    assert_close(actual, run(transform, case.fn, lora_jax.merge(lora_params), case))


def test_new_state_comes_back_and_goes_into_the_base():
    case = CASES["nnx dropout+batchnorm"]()
    lora_params = case.lorafy()
    adapted = jax.jit(lora_jax.lora(case.fn))
    _, stats = adapted(lora_params, case.x)
    base = nnx.merge_state(lora_params.base, stats)
    after = dataclasses.replace(lora_params, base=base)
    old, new = lora_params.base["norm"]["mean"], after.base["norm"]["mean"]
    assert not np.array_equal(old.get_value(), new.get_value())
    y1, _ = adapted(after, case.x)
    _, merged_stats = case.fn(lora_jax.merge(lora_params), case.x)
    y2, _ = case.fn(nnx.merge_state(lora_jax.merge(lora_params), merged_stats), case.x)
    assert_close(y1, y2)


def test_the_training_step_holds_no_dense_product_and_no_base_gradient():
    case = CASES["nnx einsum"]()
    lora_params = case.lorafy()
    step = lora_jax.value_and_grad(loss_of(lora_jax.lora(case.fn)))
    shapes = {tuple(sorted(x.shape)) for x in jax.tree.leaves(case.params) if len(x.shape) > 1}
    products = [
        tuple(sorted(eqn.outvars[0].aval.shape))
        for eqn in all_eqns(jax.make_jaxpr(step)(lora_params, case.x))
        if eqn.primitive.name == "dot_general"
    ]
    assert products
    assert not shapes.intersection(products)

    merged = lora_jax.value_and_grad(loss_of(lambda p, x: case.fn(lora_jax.merge(p), x)))
    products = {
        tuple(sorted(eqn.outvars[0].aval.shape))
        for eqn in all_eqns(jax.make_jaxpr(merged)(lora_params, case.x))
        if eqn.primitive.name == "dot_general"
    }
    assert shapes & products  # the check sees what it looks for
