"""Lookups: embedding rows, tied heads, chosen experts, permutations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import adapted_weight
from helpers import assert_close, assert_oracle, drawn, normal, products_of_shape, randomize_b
from jax import lax

import lora_jax

IDS = jnp.array([[0, 3, 8], [-1, 3, 2]])


def adapted(shape=(9, 6), layout="io", rank=2):
    return adapted_weight(shape, layout, rank=rank)


LOOKUPS = {
    "rows of a slice": ("io", lambda w, i: w[1:8, :4].at[i].get(mode="fill", fill_value=0.0)),
    "parts of rows": (
        "io",
        lambda w, i: lax.gather(
            w,
            i[..., None],
            lax.GatherDimensionNumbers((2,), (0,), (0,)),
            slice_sizes=(1, 4),
            mode="clip",
        ),
    ),
    "entries": ("io", lambda w, i: w[i, i[::-1] % 6]),
    "entries, filled": (
        "io",
        lambda w, i: w.at[3 * i, i % 7].get(mode="fill", fill_value=0.0),
    ),
    "a row for each of a batch": (
        "io",
        lambda w, i: jax.vmap(lambda w, j: w[j], in_axes=(0, 0))(
            jnp.broadcast_to(w, (2, *w.shape)), i
        ),
    ),
    "entries of each row": (
        "oi",
        lambda w, i: jnp.take_along_axis(w, jnp.tile(i[:1] % 6, (9, 1)), axis=1),
    ),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups(name):
    layout, lookup = LOOKUPS[name]
    lora_params = adapted(layout=layout)
    assert_oracle(lambda p, i: jnp.tanh(2 * lookup(p["w"], i)), lora_params, IDS)
    step = lora_jax.value_and_grad(
        lambda p, i: lora_jax.lora(lambda p, i: jnp.tanh(lookup(p["w"], i)).sum())(p, i)
    )
    if "column" not in name and "each row" not in name:  # those have [.., n] columns for results
        assert not products_of_shape(step, (9, 6), lora_params, IDS)


def test_a_lookup_beyond_the_table_gives_what_it_gave():
    lora_params = adapted()
    fn = lora_jax.lora(lambda p, i: jnp.take(p["w"], i, axis=0))
    rows = np.asarray(jax.jit(fn)(lora_params, jnp.array([2, 99])))
    assert np.isnan(rows[1]).all()
    assert_close(rows[0], np.asarray(lora_jax.merge(lora_params)["w"])[2])


def test_a_tied_table_is_looked_up_and_transposed_with_one_update():
    lora_params = adapted()

    def fn(p, i):
        x = jnp.tanh(p["w"][i] * 2.5)
        return x @ p["w"].T, jnp.einsum("btd,vd->btv", x, p["w"])

    assert_oracle(fn, lora_params, IDS)
    step = lora_jax.value_and_grad(lambda p, i: sum(y.sum() for y in lora_jax.lora(fn)(p, i)))
    assert not products_of_shape(step, (9, 6), lora_params, IDS)


def test_a_sampled_softmax_reads_rows_and_meets_them():
    lora_params = adapted(layout="oi")
    x = normal(1, (5, 6))
    assert_oracle(lambda p, i, x: x @ p["w"][i[0]].T, lora_params, IDS, x)


def test_columns_looked_up_in_a_kernel_are_rows_of_its_transpose():
    fn = lora_jax.lora(lambda p, i: p["w"][:, i % 6])
    with pytest.raises(ValueError, match=r"'gather' at .*layout=\{'w': 'oi'\}"):
        jax.eval_shape(fn, adapted(), IDS)


@pytest.mark.parametrize("layout", ["io", "oi"])
def test_a_permuted_weight(layout):
    lora_params = adapted((6, 8), layout)
    order = jnp.array([3, 1, 4, 0, 5, 2])

    def fn(p, x):
        w = p["w"][order][:, jnp.array([7, 6, 5, 4, 3, 2, 1, 0])]
        return x @ w if layout == "io" else x @ w.T

    x = normal(1, (5, 6 if layout == "io" else 8))
    assert_oracle(fn, lora_params, x)
    step = lora_jax.value_and_grad(lambda p, x: lora_jax.lora(fn)(p, x).sum())
    assert not products_of_shape(step, (6, 8), lora_params, x)


@pytest.mark.parametrize("scaled", [False, True])
def test_each_token_chooses_its_expert(scaled):
    lora_params = adapted((4, 6, 8), "bio")
    x = normal(1, (5, 6))
    chosen = jnp.array([0, 3, 3, 1, 2])

    def fn(p, x):
        w = p["w"][chosen] * (2 if scaled else 1)
        return jnp.einsum("ti,tio->to", x, w)

    assert_oracle(fn, lora_params, x)
    step = lora_jax.value_and_grad(lambda p, x: lora_jax.lora(fn)(p, x).sum())
    assert not products_of_shape(step, (4, 6, 8), lora_params, x)
    assert not products_of_shape(step, (5, 6, 8), lora_params, x)


def test_positions_and_tokens_added_up():
    shapes = {"tok": (9, 6), "pos": (4, 6), "w": (6, 5)}
    params = {name: normal(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets=".*", init=drawn))

    def fn(p, i):
        x = p["tok"][i] + p["pos"][jnp.arange(3)][None]
        x = x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True))
        return lax.scan(lambda x, _: (jnp.tanh(x), x @ p["w"]), x, length=2)

    assert_oracle(fn, lora_params, IDS)


def test_a_lookup_is_read_once():
    lora_params = adapted()

    def fn(p, i):
        x = p["w"][i]
        return jnp.tanh(x) + jnp.sin(x) * jnp.cos(x)

    jaxpr = jax.make_jaxpr(lora_jax.lora(fn))(lora_params, IDS)
    assert sum(e.primitive.name == "dot_general" for e in jaxpr.eqns) == 1
