"""Convolutions: windows, groups and dimension numbers; factors with the window on either side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_eqns, assert_oracle, drawn, normal, products_of_shape, randomize_b, use_as
from jax import lax

import lora_jax

WINDOWS = {
    "plain": {"padding": "VALID"},
    "same": {"padding": "SAME"},
    "strides": {"padding": ((1, 2), (0, 1)), "window_strides": (2, 1)},
    "dilated kernel": {"padding": "SAME", "rhs_dilation": (2, 1)},
    "dilated input": {"padding": ((2, 1), (1, 2)), "lhs_dilation": (2, 3)},
    "feature groups": {"padding": "SAME", "feature_group_count": 2, "window_strides": (1, 2)},
    "batch groups": {"padding": "SAME", "batch_group_count": 2},
}
NUMBERS = [
    ("NHWC", "HWIO", "NHWC"),
    ("NCHW", "OIHW", "NCHW"),
    ("CWNH", "WOIH", "WHNC"),
]


def convolution(
    numbers,
    groups=1,
    batch=2,
    channels=4,
    out=6,
    window=(3, 2),
    layout=None,
    dtype=jnp.float32,
):
    sizes = {"N": batch, "C": channels, "H": 5, "W": 6, "I": channels // groups, "O": out}
    kernel = {**sizes, "H": window[0], "W": window[1]}
    w = normal(0, [kernel[c] for c in numbers[1]], dtype)
    x = normal(1, [sizes[c] for c in numbers[0]], dtype)
    layout = layout or "".join("o" if c == "O" else "i" for c in numbers[1])
    return adapted(w, layout), x


def adapted(w, layout):
    options = {"targets": "w", "layout": {"w": layout}, "init": drawn}
    return randomize_b(lora_jax.lorafy({"w": w}, 2, **options))


@pytest.mark.parametrize("numbers", NUMBERS, ids="-".join)
@pytest.mark.parametrize("name", WINDOWS)
def test_convolutions(name, numbers):
    options = {"window_strides": (1, 1), **WINDOWS[name]}
    lora_params, x = convolution(numbers, options.get("feature_group_count", 1))

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **options)

    assert_oracle(fn, lora_params, x)


@pytest.mark.parametrize("ndim", [1, 3])
def test_one_and_three_dimensions(ndim):
    x = normal(1, (2, *[4] * ndim, 3))
    letters = "DHW"[-ndim:]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    lora_params = adapted(normal(0, (*[2] * ndim, 3, 5)), "i" * ndim + "io")

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], [1] * ndim, "SAME", dimension_numbers=numbers)

    assert_oracle(fn, lora_params, x)


@pytest.mark.parametrize("layout", ["iiio", "oiio", "ooio", "iioi", "oooi"])
@pytest.mark.parametrize("name", ["strides", "dilated input", "feature groups"])
def test_a_window_axis_may_be_of_either_factor(name, layout):
    options = {"window_strides": (1, 1), **WINDOWS[name]}
    groups = options.get("feature_group_count", 1)
    numbers = NUMBERS[0]
    lora_params, x = convolution(numbers, groups, layout=layout)

    def fn(p, x):
        y = lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **options)
        return y, use_as(layout, p["w"])

    assert_oracle(fn, lora_params, x)


def test_a_depthwise_convolution():
    numbers = NUMBERS[0]
    lora_params, x = convolution(numbers, groups=4, out=8)

    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
        )

    assert_oracle(fn, lora_params, x)


def test_a_transposed_convolution_through_its_flipped_kernel():
    lora_params, x = convolution(NUMBERS[0], layout="iioi", channels=6, out=4)
    lora_params = adapted(np.swapaxes(lora_params.base["w"], 2, 3), "iioi")

    def fn(p, x):
        return lax.conv_transpose(
            x, p["w"], (2, 2), "SAME", dimension_numbers=NUMBERS[0], transpose_kernel=True
        )

    assert_oracle(fn, lora_params, x)


def test_bfloat16_trains():
    lora_params, x = convolution(NUMBERS[0], dtype=jnp.bfloat16)

    def fn(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=NUMBERS[0]
        ).astype(jnp.float32)

    assert_oracle(fn, lora_params, x, sums={"dtype": jnp.bfloat16})


def test_the_update_costs_two_small_convolutions_and_no_kernel_is_built():
    lora_params, x = convolution(NUMBERS[0])

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=NUMBERS[0])

    step = lora_jax.value_and_grad(lambda p, x: lora_jax.lora(fn)(p, x).sum())
    shapes = [
        eqn.outvars[0].aval.shape
        for eqn in all_eqns(jax.make_jaxpr(step)(lora_params, x))
        if eqn.primitive.name in ("conv_general_dilated", "dot_general")
    ]
    assert sorted(lora_params.base["w"].shape) not in [sorted(shape) for shape in shapes]
    assert (2, 5, 6, 2) in shapes  # x a: rank channels


@pytest.mark.parametrize("permuted", ["inputs", "outputs", "window"])
def test_a_kernel_permuted_by_an_index_is_not_built(permuted):
    lora_params, x = convolution(NUMBERS[0])
    axis = {"inputs": 2, "outputs": 3, "window": 0}[permuted]

    def fn(p, x):
        w = jnp.take(p["w"], jnp.arange(p["w"].shape[axis])[::-1], axis)
        return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NUMBERS[0])

    assert_oracle(fn, lora_params, x)
    step = lora_jax.value_and_grad(lambda p, x: lora_jax.lora(fn)(p, x).sum())
    assert not products_of_shape(step, lora_params.base["w"].shape, lora_params, x)


def test_factors_that_both_read_and_write_are_refused():
    lora_params, x = convolution(NUMBERS[0], layout="ooii")

    def fn(p, x):
        y = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=NUMBERS[0])
        return y, use_as("ooii", p["w"])

    with pytest.raises(NotImplementedError, match="'conv_general_dilated' in a form"):
        jax.eval_shape(lora_jax.lora(fn), lora_params, x)


def test_an_adapted_weight_as_the_image_is_refused():
    lora_params, _ = convolution(NUMBERS[0], layout="iiio")

    def fn(p, x):
        return lax.conv_general_dilated(p["w"], x, (1, 1), "SAME", dimension_numbers=NUMBERS[0])

    with pytest.raises(NotImplementedError, match="'conv_general_dilated' in a form"):
        jax.eval_shape(lora_jax.lora(fn), lora_params, jnp.ones((1, 1, 6, 2)))
