"""Mixtures of experts: ragged and batched products, factors for each expert or shared."""

import jax
import jax.numpy as jnp
import pytest
from adapters import adapted_weight
from helpers import (
    assert_close,
    assert_oracle,
    normal,
    products_of_shape,
    use_as,
)
from jax import lax

import lora_jax

SIZES = jnp.array([3, 0, 4])


def adapted(shape=(3, 6, 8), layout="bio", rank=2, dtype=jnp.float32):
    return adapted_weight(shape, layout, dtype, rank)


@pytest.mark.parametrize("layout", ["bio", "iio", "oio"])
def test_rows_in_groups(layout):
    """Factors for each expert; shared b; shared a."""
    lora_params = adapted(layout=layout)
    x = normal(1, (9, 6))  # two rows belong to no group

    def fn(p, x):
        y = lax.ragged_dot(x, p["w"], SIZES)
        return y if layout == "bio" else (y, use_as(layout, p["w"]))

    assert_oracle(fn, lora_params, x)
    step = lora_jax.value_and_grad(
        lambda p, x: sum(y.sum() for y in jax.tree.leaves(lora_jax.lora(fn)(p, x)))
    )
    assert not products_of_shape(step, (3, 6, 8), lora_params, x)


def test_rows_in_groups_against_the_transposed_experts():
    lora_params = adapted(layout="bio")
    x = normal(1, (7, 6))

    def fn(p, x):
        h = jnp.tanh(lax.ragged_dot(x, p["w"], SIZES))
        return lax.ragged_dot(h, p["w"].swapaxes(1, 2), SIZES)

    assert_oracle(fn, lora_params, x)


GENERAL = {
    "several contracted axes": (
        ((9, 2, 3), (3, 2, 3, 8)),
        "biio",
        lax.RaggedDotDimensionNumbers((((1, 2), (1, 2)), ((), ())), (0,), (0,)),
    ),
    "groups last, several written axes": (
        ((9, 6), (2, 6, 4, 3)),
        "oiob",
        lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (3,)),
    ),
    "a batch axis": (
        ((2, 9, 6), (2, 3, 6, 8)),
        "bbio",
        lax.RaggedDotDimensionNumbers((((2,), (2,)), ((0,), (0,))), (1,), (1,)),
    ),
    "ragged contraction": (
        ((5, 9), (9, 8)),
        "io",
        lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), (1,), ()),
    ),
    "ragged contraction with a batch axis": (
        ((2, 5, 9), (2, 9, 8)),
        "bio",
        lax.RaggedDotDimensionNumbers((((2,), (1,)), ((0,), (0,))), (2,), ()),
    ),
    "ragged batch": (
        ((9, 5, 6), (9, 6, 8)),
        "bio",
        lax.RaggedDotDimensionNumbers((((2,), (1,)), ((0,), (0,))), (0,), ()),
    ),
}


@pytest.mark.parametrize("name", GENERAL)
def test_ragged_dot_general(name):
    if name == "a batch axis" and jax.default_backend() == "gpu":
        pytest.skip("XLA's compiler for GPUs fails on it, without LoRA as well")
    (x_shape, w_shape), layout, numbers = GENERAL[name]
    lora_params = adapted(w_shape, layout)
    x = normal(1, x_shape)

    def fn(p, x):
        return lax.ragged_dot_general(x, p["w"], SIZES, numbers)

    if numbers.rhs_group_dimensions:
        assert_oracle(fn, lora_params, x)
    else:  # JAX itself does not differentiate these
        both = jax.jit(lambda p, x: (lora_jax.lora(fn)(p, x), fn(lora_jax.merge(p), x)))
        assert_close(*both(lora_params, x))


def test_bfloat16_experts_train():
    lora_params = adapted(dtype=jnp.bfloat16)
    x = normal(1, (7, 6), jnp.bfloat16)

    def fn(p, x):
        y = lax.ragged_dot(x, p["w"], SIZES, preferred_element_type=jnp.float32)
        return y, lax.ragged_dot(x, p["w"], SIZES).astype(jnp.float32)

    assert_oracle(fn, lora_params, x, sums={"dtype": jnp.bfloat16})


def test_factors_that_both_read_and_write_are_refused():
    lora_params = adapted((3, 6, 4, 2), "bioi")
    numbers = lax.RaggedDotDimensionNumbers((((1, 2), (1, 2)), ((), ())), (0,), (0,))

    def fn(p, x):
        y = lax.ragged_dot_general(x, p["w"], SIZES, numbers)
        return y, use_as("bioi", p["w"])

    with pytest.raises(NotImplementedError, match="'ragged_dot_general' in a form"):
        jax.eval_shape(lora_jax.lora(fn), lora_params, jnp.ones((7, 6, 4)))


# equations of mixtures of experts, as models write them: capacity buckets, dense dispatch, top-k
EXPERTS = [
    ("ecd,edf->ecf", "bio"),
    ("becd,edf->becf", "bio"),
    ("becd,dfe->becf", "iob"),
    ("td,edf->tef", "bio"),
    ("tef,efd->ted", "bio"),
    ("tef,efd,te->td", "bio"),
    ("bsd,ednh->bsenh", "bioo"),
]


@pytest.mark.parametrize(("equation", "layout"), EXPERTS)
def test_batched_experts(equation, layout):
    sizes = dict(zip("becdftsnh", (2, 3, 4, 6, 5, 7, 4, 2, 3), strict=True))
    terms = equation.split("->")[0].split(",")
    shapes = [[sizes[c] for c in term] for term in terms]
    lora_params = adapted(shapes[1], layout)
    x = normal(1, shapes[0])
    rest = [normal(2, shape) for shape in shapes[2:]]

    def fn(p, x):
        return jnp.einsum(equation, x, p["w"], *rest)

    assert_oracle(fn, lora_params, x)
    step = lora_jax.value_and_grad(lambda p, x: lora_jax.lora(fn)(p, x).sum())
    assert not products_of_shape(step, shapes[1], lora_params, x)
