"""``dot_general``: every contraction, both sides, batch axes; and no product of ``W``'s shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    all_eqns,
    assert_close,
    assert_oracle,
    drawn,
    normal,
    products_of_shape,
    randomize_b,
)
from jax import lax

import lora_jax
from lora_jax._transform.labelled import Axis
from lora_jax._transform.rules.dot import product_cost

SIZES = dict(zip("bcdehijkno", (3, 5, 6, 7, 2, 4, 5, 6, 3, 8), strict=True))

# einsum, layout of the weight w
EINSUMS = [
    ("bd,do->bo", "io"),
    ("bd,od->bo", "oi"),
    ("bcd,dhn->bchn", "ioo"),
    ("bchn,hnd->bcd", "iio"),
    ("bchn,dhn->bcd", "oii"),
    ("bhn,hdn->bd", "ioi"),
    ("bcd,hdn->bchn", "oio"),
    ("bce,beo->bco", "bio"),
    ("cbe,beo->cbo", "bio"),
    ("ce,beo->bco", "bio"),
    ("bce,ebo->bco", "ibo"),
    ("be,beo->o", "bio"),
    ("bce,bhoe->bcho", "booi"),
    ("d,do->o", "io"),
    ("cd,do->oc", "io"),
]


def setup(equation, layout, dtype=jnp.float32, rank=2):
    x_axes, w_axes = equation.split("->")[0].split(",")
    x = normal(0, [SIZES[c] for c in x_axes], dtype)
    return x, adapted({"w": normal(1, [SIZES[c] for c in w_axes], dtype)}, {"w": layout}, rank)


def adapted(params, layout=None, rank=2):
    options = {"targets": ".*", "layout": layout, "init": drawn}
    return randomize_b(lora_jax.lorafy(params, rank, **options))


def both(fn):
    """The adapted and the merged outputs, by one program."""
    return jax.jit(lambda p, x: (lora_jax.lora(fn)(p, x), fn(lora_jax.merge(p), x)))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("equation", "layout"), EINSUMS)
def test_every_contraction_on_both_sides(equation, layout, side):
    x, lora_params = setup(equation, layout)
    inputs, out = equation.split("->")

    def fn(p, x):
        if side == "right":
            return jnp.einsum(equation, x, p["w"])
        return jnp.einsum(",".join(inputs.split(",")[::-1]) + "->" + out, p["w"], x)

    assert_oracle(fn, lora_params, x)
    step = lora_jax.value_and_grad(lambda p, x: (lora_jax.lora(fn)(p, x) ** 2).sum())
    w_shape = lora_params.base["w"].shape
    if sorted(w_shape) != sorted(jax.eval_shape(fn, lora_params.base, x).shape):
        assert not products_of_shape(step, w_shape, lora_params, x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_dtypes_are_those_of_the_function(dtype, preferred):
    x, lora_params = setup("bd,do->bo", "io", dtype)

    def fn(p, x):
        return lax.dot(x, p["w"], preferred_element_type=preferred)

    actual, expected = both(fn)(lora_params, x)
    assert actual.dtype == expected.dtype == (preferred or dtype)
    assert_close(actual, expected, dtype=dtype)


def test_low_precision_products_accumulate_in_float32():
    x, lora_params = setup("bd,do->bo", "io", jnp.bfloat16)
    fn = lora_jax.lora(lambda p, x: x @ p["w"])
    dots = [
        e for e in all_eqns(jax.make_jaxpr(fn)(lora_params, x)) if e.primitive.name == "dot_general"
    ]
    assert [e.outvars[0].aval.dtype for e in dots] == [jnp.bfloat16, jnp.float32, jnp.float32]
    assert all(v.aval.dtype == jnp.bfloat16 for e in dots for v in e.invars)


def test_gradients_of_low_precision_products_leave_them_in_float32():
    """What is summed over devices is what a product returns."""
    x, lora_params = setup("bd,do->bo", "io", jnp.bfloat16)
    trainable, frozen = lora_jax.split(lora_params)

    def loss(trainable):
        out = lora_jax.lora(lambda p, x: x @ p["w"])(lora_jax.combine(trainable, frozen), x)
        return out.astype(jnp.float32).sum()

    dots = [
        e.outvars[0].aval
        for e in all_eqns(jax.make_jaxpr(jax.grad(loss))(trainable))
        if e.primitive.name == "dot_general"
    ]
    for x in jax.tree.leaves(trainable):
        sizes = [sorted(x.shape), jnp.float32]
        assert sizes in [[sorted(dot.shape), dot.dtype] for dot in dots]


def test_integer_activations_meet_the_weight():
    x, lora_params = setup("bd,do->bo", "io")

    def fn(p, x):
        return lax.dot(x, p["w"], preferred_element_type=jnp.float32)

    x = jnp.asarray(np.round(3 * np.asarray(x)).astype(np.int32))
    assert_close(*both(fn)(lora_params, x))


def test_precision_follows_its_operand():
    x, lora_params = setup("bd,do->bo", "io")
    x_first, w_first = lax.Precision.HIGH, lax.Precision.HIGHEST

    def precisions(f):
        eqns = all_eqns(jax.make_jaxpr(lora_jax.lora(f))(lora_params, x))
        return [e.params["precision"] for e in eqns if e.primitive.name == "dot_general"]

    right = precisions(lambda p, x: lax.dot(x, p["w"], precision=(x_first, w_first)))
    left = precisions(lambda p, x: lax.dot(p["w"].T, x.T, precision=(w_first, x_first)))
    assert right == [(x_first, w_first)] * 3
    assert left == [(w_first, x_first)] + [(x_first, w_first)] * 2


def test_a_weight_times_an_adapted_weight():
    params = {"u": normal(0, (12, 10)), "v": normal(1, (10, 9))}
    x = normal(2, (3, 12))
    # u never meets an input, only v: its contracted axis counts as the one it reads.
    lora_params = adapted(params, {"u": "oi"})
    fn = lambda p, x: x @ (p["u"] @ p["v"])  # noqa: E731
    assert_oracle(fn, lora_params, x)


def test_a_weight_times_itself():
    lora_params = adapted({"w": normal(0, (8, 8))})

    def fn(p, x):
        return x @ (p["w"] @ p["w"]), x @ (p["w"].T @ p["w"])

    assert_oracle(fn, lora_params, jnp.ones((2, 8)))


def test_one_weight_used_twice_has_one_update():
    x, lora_params = setup("bd,do->bo", "io")

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    assert_oracle(fn, lora_params, x)


def test_two_adapted_trees_of_the_same_paths():
    x, encoder = setup("bd,do->bo", "io")
    decoder = randomize_b(encoder, seed=7)

    def fn(params, x):
        return x @ params["encoder"]["w"] - x @ params["decoder"]["w"]

    @jax.jit
    def both(trees, x):
        merged = {name: lora_jax.merge(tree) for name, tree in trees.items()}
        return lora_jax.lora(fn)(trees, x), fn(merged, x)

    actual, expected = both({"encoder": encoder, "decoder": decoder}, x)
    assert_close(actual, expected)
    assert np.abs(np.asarray(expected)).max() > 0.1


def test_the_cheaper_order_of_products():
    sizes = {"m": 64, 0: 32, 1: 128, Axis.RANK: 4}
    a, b = (0, Axis.RANK), (Axis.RANK, 1)
    assert product_cost(("m", 0), a, b, ("m", 1), sizes) == 64 * 4 * (32 + 128)
    assert product_cost(("m", 0), b, a, ("m", 1), sizes) > 64 * 32 * 128


def test_an_outer_product_is_refused():
    _, lora_params = setup("bd,do->bo", "io")
    outer = lambda p, x: jnp.einsum("b,do->bdo", x, p["w"])  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"'w' float32\[6, 8\] reaches 'dot_general'"):
        jax.eval_shape(lora_jax.lora(outer), lora_params, jnp.ones(3))


def test_a_layout_that_every_use_contradicts_raises_and_says_which_is_right():
    x, lora_params = setup("bd,do->bo", "oi")
    fn = lora_jax.lora(lambda p, x: x @ p["w"])
    with pytest.raises(
        ValueError, match=r"layout 'oi', but 'dot_general' at .*layout=\{'w': 'io'\}"
    ):
        jax.eval_shape(fn, lora_params, x)
    x, lora_params = setup("bchn,hnd->bcd", "ioo")
    fn = lora_jax.lora(lambda p, x: jnp.einsum("bchn,hnd->bcd", x, p["w"]))
    with pytest.raises(ValueError, match=r"layout=\{'w': 'iio'\}"):
        jax.eval_shape(fn, lora_params, x)


def test_a_square_weight_read_through_its_transpose_is_caught():
    lora_params = lora_jax.lorafy({"w": jnp.ones((4, 4))}, 2, targets="w", init=drawn)
    with pytest.raises(ValueError, match=r"layout=\{'w': 'oi'\}"):
        jax.eval_shape(lora_jax.lora(lambda p, x: x @ p["w"].T), lora_params, jnp.ones((1, 4)))


def test_float8_activations_do_not_overflow():
    x, lora_params = setup("bd,do->bo", "io")
    x = jnp.asarray((100 * np.asarray(x)).astype(jnp.float8_e4m3fn))

    def fn(p, x):
        w = p["w"].astype(jnp.float8_e4m3fn)
        return lax.dot(x, w, preferred_element_type=jnp.float32)

    actual = jax.jit(lora_jax.lora(fn))(lora_params, x)
    # The frozen product is float8's own, and the update is bfloat16's: its a and b are rounded.
    f, w = lora_params.adapter.factors["w"], lora_params.base["w"].astype(jnp.float8_e4m3fn)
    x, w, scale, a, b = (np.asarray(leaf, np.float64) for leaf in (x, w, f.scale, f.a, f.b))
    assert np.isfinite(actual).all()
    assert_close(actual, x @ w + scale * x @ a @ b, dtype=jnp.bfloat16)
