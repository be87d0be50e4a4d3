"""Weights on the move: transposes, casts, reshapes; labels follow, nothing is built."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import adapted_weight
from helpers import (
    assert_close,
    assert_oracle,
    normal,
    products_of_shape,
    tolerance,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_jax
from lora_jax._transform.regroup import axis_groups

# shape, layout, and what happens to the weight before x @ it
MOVES = {
    "transpose": ((8, 6), "oi", lambda w: w.T),
    "transpose of three": ((4, 6, 2), "oio", lambda w: w.transpose(1, 2, 0).reshape(6, 8)),
    "cast down and up": ((6, 8), "io", lambda w: w.astype(jnp.float16).astype(jnp.float32)),
    "merge inputs": ((2, 3, 8), "iio", lambda w: w.reshape(6, 8)),
    "merge outputs": ((6, 2, 4), "ioo", lambda w: w.reshape(6, 8)),
    "split and merge": ((6, 8), "io", lambda w: w.reshape(3, 2, 4, 2).reshape(6, 8)),
    "split, swap, merge": (
        (6, 8),
        "io",
        lambda w: w.reshape(3, 2, 4, 2).transpose(1, 0, 3, 2).reshape(6, 8),
    ),
    "ones come and go": (
        (1, 6, 1, 8),
        "oioo",
        lambda w: w[0].squeeze(1)[None, :, None].reshape(6, 8),
    ),
    "expand and squeeze": ((6, 8), "io", lambda w: jnp.expand_dims(w, (0, 2)).squeeze((0, 2))),
    "broadcast": ((6, 8), "io", lambda w: jnp.broadcast_to(w[None], (3, 6, 8)).mean(0)),
    "copy": ((6, 8), "io", lambda w: jnp.array(w, copy=True)),
    "nested jit": ((8, 6), "oi", lambda w: jax.jit(jnp.transpose)(w)),
}


def adapted(shape, layout, rank=None):
    return adapted_weight(shape, layout, rank=rank or (1 if 1 in shape else 2))


@pytest.mark.parametrize("name", [n for n in MOVES if n != "broadcast"])
def test_a_moved_weight_keeps_its_update(name):
    shape, layout, move = MOVES[name]
    lora_params = adapted(shape, layout)
    x = normal(1, (5, 6))

    def fn(p, x):
        return x @ move(p["w"])

    # A cast down rounds W and W + BA to float16, each in its own way.
    assert_oracle(fn, lora_params, x, sums={"dtype": jnp.float16} if "cast" in name else None)
    step = lora_jax.value_and_grad(lambda p, x: (lora_jax.lora(fn)(p, x) ** 2).sum())
    assert not products_of_shape(step, shape, lora_params, x)


def test_a_broadcast_weight_has_one_update_for_every_copy():
    lora_params = adapted((6, 8), "io")
    x = normal(1, (3, 5, 6))

    def fn(p, x):
        w = jnp.broadcast_to(p["w"][None], (3, 6, 8))
        free = jnp.einsum("ci,bio->bco", x[0], w)
        summed = jnp.einsum("bci,bio->co", x, w)
        return jnp.einsum("bci,bio->bco", x, w), free, summed

    assert_oracle(fn, lora_params, x)


def test_stop_gradient_on_a_weight_stops_its_update_too():
    lora_params = adapted((6, 8), "io")
    fn = lambda p, x: x @ jax.lax.stop_gradient(p["w"])  # noqa: E731
    loss = lambda p: lora_jax.lora(fn)(p, jnp.ones((1, 6))).sum()  # noqa: E731
    value, grads = jax.jit(lora_jax.value_and_grad(loss))(lora_params)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    expected = np.asarray(lora_jax.merge(lora_params)["w"], np.float64)
    # Of a sum in which much cancels, the error is relative to its terms.
    gap = abs(float(value) - expected.sum())
    assert gap <= tolerance(length=expected.size) * np.abs(expected).sum()


@pytest.mark.parametrize(
    ("move", "primitive"),
    [
        (lambda w: w.reshape(8, 6)[::-1], "rev"),
        (lambda w: jnp.sin(w), "sin"),
        (lambda w: w.astype(jnp.int32).astype(jnp.float32), "convert_element_type"),
    ],
)
def test_a_move_without_a_rule_raises_and_names_everything(move, primitive):
    lora_params = adapted((6, 8), "io")
    x = jnp.ones((2, 6))

    def fn(p, x):
        return (x @ move(p["w"]).reshape(6, 8)).sum()

    with pytest.raises(NotImplementedError) as info:
        jax.eval_shape(lora_jax.lora(fn), lora_params, x)
    message = str(info.value)
    assert f"reaches '{primitive}'" in message
    assert "'w' float32[" in message
    assert __file__ in message
    assert "exclude='w'" in message
    assert "on_materialize='allow'" in message
    with pytest.warns(UserWarning, match=f"reaches '{primitive}'"):
        jax.eval_shape(lora_jax.lora(fn, on_materialize="warn"), lora_params, x)
    assert_oracle(fn, lora_params, x, on_materialize="allow")


def test_axis_groups_by_table():
    assert axis_groups((6, 4), (24,)) == [((0, 1), (0,))]
    assert axis_groups((24,), (6, 4)) == [((0,), (0, 1))]
    assert axis_groups((6, 4), (4, 6)) == [((0, 1), (0, 1))]
    assert axis_groups((1, 6, 1), (6,)) == [((1,), (0,))]
    assert axis_groups((2, 3, 4), (2, 12)) == [((0,), (0,)), ((1, 2), (1,))]


@settings(max_examples=8)
@given(st.data())
def test_reshapes_within_roles_are_exact(data):
    pieces = data.draw(
        st.lists(
            st.tuples(st.sampled_from("bio"), st.lists(st.integers(1, 3), min_size=1, max_size=2)),
            min_size=2,
            max_size=3,
        )
    )
    pieces += [("i", [2, 2]), ("o", [3, 2])]
    layout = "".join(role * len(sizes) for role, sizes in pieces)
    shape = [size for _, sizes in pieces for size in sizes]
    merged = [int(np.prod(sizes)) for _, sizes in pieces]
    lora_params = adapted(shape, layout, rank=2)
    letters = "abcdefgh"[: len(merged)]
    summed = [c for c, (role, _) in zip(letters, pieces, strict=True) if role == "i"]
    x = normal(1, [merged[letters.index(c)] for c in summed])
    out = "".join(c for c in letters if c not in summed)

    def fn(p, x):
        return jnp.einsum(f"{''.join(summed)},{letters}->{out}", x, p["w"].reshape(merged))

    both = jax.jit(lambda p, x: (lora_jax.lora(fn)(p, x), fn(lora_jax.merge(p), x)))
    assert_close(*both(lora_params, x))
