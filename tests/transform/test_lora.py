"""The contract of ``lora(fn)`` on four models: identity at the start, the merged oracle after."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import CASES, all_eqns, assert_close, assert_oracle, drawn, error, loss_of

import lora_jax


def models(*slow):
    """All cases by name; the slow ones run among the long tests."""
    marks = {name: [pytest.mark.long] if name in slow else [] for name in CASES}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks[n]) for n in CASES])


SCAN, EINSUM, NORMED = "linen scan+remat", "nnx einsum", "nnx dropout+batchnorm"

# A function of (params, x) as it is run, with x of the case and three more beside it.
TRANSFORMS = {
    "jit": lambda f, p, xs: jax.jit(f)(p, xs[0]),
    "vmap": lambda f, p, xs: jax.jit(jax.vmap(f, in_axes=(None, 0)))(p, xs),
    "grad": lambda f, p, xs: jax.jit(jax.value_and_grad(lambda x: loss_of(f)(p, x)))(xs[0]),
    "pmap": lambda f, p, xs: jax.pmap(f, in_axes=(None, 0))(p, xs),
}
PMAP = pytest.param("pmap", marks=pytest.mark.devices(4))


def inputs(case):
    """The input of the case and three more."""
    x = np.asarray(case.x)
    return np.stack([x * np.asarray(k, x.dtype) for k in (1, 2, 3, 4)])


@pytest.mark.parametrize("transform", ["jit", "vmap", "grad", PMAP])
@models()
def test_the_adapted_function_starts_as_the_function_bit_for_bit(name, transform):
    case = CASES[name]()
    lora_params = lora_jax.lorafy(case.params, 4, targets=case.targets, init=drawn)
    run, xs = TRANSFORMS[transform], inputs(case)
    adapted = run(lora_jax.lora(case.fn), lora_params, xs)
    expected = run(case.fn, case.params, xs)
    if transform == "grad":  # sums of cotangents are associated differently; the value is not
        (adapted, dx), (expected, expected_dx) = adapted, expected
        assert_close(dx, expected_dx, depth=64)
    assert jax.tree.structure(adapted) == jax.tree.structure(expected)
    if jax.default_backend() != "cpu":  # where XLA fuses the two programs in different ways
        return assert_close(adapted, expected, depth=64)
    for a, e in zip(jax.tree.leaves(adapted), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def gradients(f, p, x):
    """Outputs, and gradients of a random sum of them."""

    def loss(p, x):
        outputs = f(p, x)
        return loss_of(lambda _: outputs)(None), outputs

    (_, outputs), grads = lora_jax.value_and_grad(loss, has_aux=True)(p, x)
    return outputs, grads


@functools.cache
def results(name):
    """Outputs and gradients of the adapted and of the merged function; outputs of the base."""
    case = CASES[name]()
    merged = lambda p, x: case.fn(lora_jax.merge(p), x)  # noqa: E731

    @jax.jit
    def run(p, x):
        adapted = gradients(lora_jax.lora(case.fn), p, x)
        return adapted, gradients(merged, p, x), case.fn(p.base, x)

    return run(case.lorafy(), case.x)


@models()
def test_adapted_equals_merged_in_values_and_gradients(name):
    adapted, merged, _ = results(name)
    assert_close(adapted, merged, depth=60)  # three layers of ten sums, forth and back


@models()
def test_b_reaches_the_output(name):
    # The oracle would pass if both sides ignored the adapter.
    (adapted, _), _, base = results(name)
    assert error(adapted, base) > 1e-2


@models()
def test_adapted_equals_merged_under_vmap(name):
    case = CASES[name]()

    def batched(p, xs):
        return jax.vmap(case.fn, in_axes=(None, 0))(p, xs)

    @jax.jit
    def run(p, xs):
        outside = jax.vmap(lora_jax.lora(case.fn), in_axes=(None, 0))(p, xs)
        return lora_jax.lora(batched)(p, xs), outside, batched(lora_jax.merge(p), xs)

    inside, outside, expected = run(case.lorafy(), inputs(case)[:3])
    assert_close(inside, expected, depth=16)
    assert_close(outside, expected, depth=16)


@pytest.mark.devices(4)
@models(SCAN)
def test_adapted_equals_merged_under_pmap(name):
    case = CASES[name]()
    merged = lambda p, x: case.fn(lora_jax.merge(p), x)  # noqa: E731

    @functools.partial(jax.pmap, axis_name="d", in_axes=(None, 0))
    def step(p, x):
        both = gradients(lora_jax.lora(case.fn), p, x), gradients(merged, p, x)
        return jax.lax.pmean([(outputs[0], grads) for outputs, grads in both], "d")

    assert_close(*step(case.lorafy(), inputs(case)), depth=60)


@models(SCAN, EINSUM)
def test_adapted_equals_merged_under_grad_inside_and_second_order(name, standard_promotion):
    """In float64, for second derivatives of a transformer magnify what was rounded.

    Flax keeps the statistics of batch norms in float32.
    """
    dtype = jnp.float32 if name == NORMED else jnp.float64
    with jax.enable_x64(dtype == jnp.float64):
        case = CASES[name](dtype)

        def input_gradient(p, x):
            return jax.grad(lambda x: loss_of(case.fn)(p, x))(x)

        assert_oracle(input_gradient, case.lorafy(dtype=dtype), case.x, sums={"depth": 32})


@models(SCAN, EINSUM)
def test_bfloat16_values_and_gradients(name, standard_promotion):
    case = CASES[name](jnp.bfloat16)
    exact_fn = CASES[name](jnp.float32).fn  # the same model, computing in float32

    def merged(p, x):
        return case.fn(lora_jax.merge(p), x)

    @jax.jit
    def run(p, x):
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, (p, x)
        )
        both = gradients(lora_jax.lora(case.fn), p, x), gradients(merged, p, x)
        return *both, gradients(lora_jax.lora(exact_fn), *wide)[1]

    adapted, merged_results, exact = run(case.lorafy(), case.x)
    assert_close(adapted[0], merged_results[0])

    def distance(grads):
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True)
        return np.sqrt(sum(np.square(np.asarray(a) - np.asarray(e)).sum() for a, e in pairs))

    assert distance(adapted[1]) <= 2 * distance(merged_results[1])


@models()
def test_bfloat16_values_under_vmap(name, standard_promotion):
    bfloat16_values(name, jax.vmap, jax.jit)


@pytest.mark.devices(4)
@models(SCAN, NORMED)
def test_bfloat16_values_under_pmap(name, standard_promotion):
    bfloat16_values(name, jax.pmap)


def bfloat16_values(name, batch, compiled=lambda f: f):
    """Compare adapted and merged outputs for a batch of inputs."""
    case = CASES[name](jnp.bfloat16)

    def both(p, x):
        return lora_jax.lora(case.fn)(p, x), case.fn(lora_jax.merge(p), x)

    assert_close(*compiled(batch(both, in_axes=(None, 0)))(case.lorafy(), inputs(case)))


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
    merged, plain = lora_jax.merge(lora_params), jax.jit(case.fn)
    _, merged_stats = plain(merged, case.x)
    y2, _ = plain(nnx.merge_state(merged, merged_stats), case.x)
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


def test_the_base_gets_no_gradient():
    case = CASES["plain dict"]()
    grads = jax.jit(jax.grad(loss_of(lora_jax.lora(case.fn))))(case.lorafy(), case.x)
    assert not any(np.any(g) for g in jax.tree.leaves(grads.base))
    assert all(np.any(f.a) and np.any(f.b) for f in grads.adapter.factors.values())
