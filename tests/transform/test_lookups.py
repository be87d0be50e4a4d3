"""Spellings of a lookup: one row of a table, under no, one and two ``vmap``s and in a loop.

The oracle is the merged table, values and gradients, in one program for all spellings.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import adapted, jit_rows
from helpers import assert_close, assert_oracle, normal, randomize_b, stack_by_numpy
from jax import lax

import lora_jax
from lora_jax import Adapter, LoraParams, Rows

SIZE, WIDTH = 9, 4
IDS = jnp.array([[0, 3, 8], [5, 3, 2]])

ROWS = {
    "index": lambda t, i: t[i],
    "index and slice": lambda t, i: t[i, :],
    "index and axis": lambda t, i: t[i][None],
    "of the transpose of the transpose": lambda t, i: t.T.T[i],
    "scaled, of a cast": lambda t, i: 2 * t.astype(jnp.float32)[i],
    "from the end": lambda t, i: t[i - SIZE],
    "take": lambda t, i: jnp.take(t, i, axis=0),
    "take, clipped": lambda t, i: jnp.take(t, 2 * i - 4, axis=0, mode="clip"),
    "take, filled": lambda t, i: jnp.take(t, 2 * i, axis=0, mode="fill", fill_value=0.5),
    "take, wrapped": lambda t, i: jnp.take(t, 2 * i, axis=0, mode="wrap"),
    "get, clipped": lambda t, i: t.at[2 * i - 4].get(mode="clip"),
    "get, filled": lambda t, i: t.at[2 * i].get(mode="fill", fill_value=0.5),
    "get, in bounds": lambda t, i: t.at[i].get(mode="promise_in_bounds"),
    "in 8 bits": lambda t, i: t[i.astype(jnp.uint8)],
    "of a part": lambda t, i: t[:7][i // 2],
    "of a part, clipped": lambda t, i: jnp.take(t[2:7], 2 * i - 4, axis=0, mode="clip"),
    "of a part, filled": lambda t, i: t[2:7].at[2 * i].get(mode="fill", fill_value=0.5),
    "of two tables": lambda t, i: jnp.concatenate([t, t])[2 * i],
    "of a padded one": lambda t, i: jnp.pad(t, ((2, 5), (0, 0)))[i],
    "get, dropped": lambda t, i: t.at[i].get(mode="drop"),
    "index in dim": lambda t, i: lax.dynamic_index_in_dim(t, i, keepdims=False),
    "index in dim, axis kept": lambda t, i: lax.dynamic_index_in_dim(t, i),
    "slice": lambda t, i: lax.dynamic_slice(t, (i, 0), (1, WIDTH)),
    "slice in dim": lambda t, i: lax.dynamic_slice_in_dim(t, i, 1).reshape(WIDTH),
    "slice before the start": lambda t, i: lax.dynamic_slice_in_dim(t, i - 2 * SIZE, 1)[0],
    "along axis": lambda t, i: jnp.take_along_axis(t, jnp.full((1, WIDTH), i), axis=0),
    "one-hot": lambda t, i: jax.nn.one_hot(i, SIZE) @ t,
    "one-hot by einsum": lambda t, i: jnp.einsum("v,vd->d", jnp.float32(jnp.arange(SIZE) == i), t),
    "several rows": lambda t, i: t[jnp.stack([i, (i + 1) % SIZE])].sum(0),
    "a slice of rows": lambda t, i: lax.dynamic_slice_in_dim(t, i, 2).sum(0),
}
COLUMNS = {
    "index": lambda t, i: t[:, i],
    "index of the transpose": lambda t, i: t.T[i],
    "take": lambda t, i: jnp.take(t, i, axis=1),
    "take, clipped": lambda t, i: jnp.take(t, 2 * i - 4, axis=1, mode="clip"),
    "get, filled": lambda t, i: t.at[:, 2 * i].get(mode="fill", fill_value=0.5),
    "index in dim": lambda t, i: lax.dynamic_index_in_dim(t, i, axis=1, keepdims=False),
    "slice": lambda t, i: lax.dynamic_slice(t, (0, i), (WIDTH, 1))[:, 0],
    "along axis": lambda t, i: jnp.take_along_axis(t, jnp.full((WIDTH, 1), i), axis=1)[:, 0],
    "one-hot": lambda t, i: t @ jax.nn.one_hot(i, SIZE),
}
CALLS = {
    "no vmap": lambda f, t, ids: f(t, ids[0, 2]),
    "vmap": lambda f, t, ids: jax.vmap(lambda i: f(t, i))(ids[0]),
    "two vmaps": lambda f, t, ids: jax.vmap(jax.vmap(lambda i: f(t, i)))(ids),
    "scan": lambda f, t, ids: lax.scan(lambda c, i: (c, f(t, i)), 0, ids[0])[1],
}
TABLES = {"io": ROWS, "oi": COLUMNS}


def model(f, call):
    """Return a function of parameters: a lookup, a residual around a product, and a norm."""

    def apply(p, ids):
        x = call(f, p["t"], ids).reshape(-1, WIDTH)
        x = x + x @ p["w"]
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1)

    return apply


def every_spelling(layout, calls):
    def apply(p, ids):
        return {
            (name, how): model(f, call)(p, ids)
            for name, f in TABLES[layout].items()
            for how, call in calls.items()
        }

    return apply


def params_of(layout):
    shape = (SIZE, WIDTH) if layout == "io" else (WIDTH, SIZE)
    return {"t": normal(0, shape), "w": normal(1, (WIDTH, WIDTH))}


def rows_of(layout):
    f = Rows(normal(2, (3, WIDTH)), jnp.float32(0.5), layout, (0, 3, 8), SIZE)
    return LoraParams(params_of(layout), Adapter({"t": f}))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", TABLES)
def test_layout_of_sees_a_lookup_however_it_is_spelled(layout, call):
    for name, f in TABLES[layout].items():
        found = lora_jax.layout_of(model(f, CALLS[call]), params_of(layout), IDS)
        assert found == {"t": layout, "w": "io"}, name
        # the residual and the product read a row once
        assert len(found.weights["t"].uses) == 1, (name, found.weights["t"].uses)
        is_product = "one-hot" in name or name == "a slice of rows"
        assert found.weights["t"].kind == ("dot" if is_product else "embedding"), name


@pytest.mark.parametrize("layout", TABLES)
@pytest.mark.parametrize("kind", ["lora", "rows", "rows of a large table"])
def test_every_spelling_is_a_lookup_of_the_merged_table(layout, kind, monkeypatch):
    lora_params = rows_of(layout)
    if kind == "rows of a large table":
        monkeypatch.setattr("lora_jax._transform.one_hot.SMALL", 0)
    if kind == "lora":
        lora_params = adapted(params_of(layout), targets="t", layout={"t": layout})
    assert_oracle(every_spelling(layout, CALLS), lora_params, IDS)


@pytest.mark.parametrize("layout", TABLES)
def test_every_spelling_picks_the_members_of_a_stack(layout):
    members = [
        randomize_b(lora_jax.lorafy(params_of(layout), 2, targets="t", layout={"t": layout}), seed)
        for seed in (3, 4)
    ]
    fn = every_spelling(layout, CALLS)

    def of_one(p, ids):  # each batch row has ids of its own
        return jax.tree.map(lambda x: x[None], fn(p, ids))

    found = jit_rows(of_one)(stack_by_numpy(members), IDS, lora_ids=np.array([1, -1]))
    trees = lora_jax.merge(members[1]), members[0].base
    wanted = [of_one(p, ids) for p, ids in zip(trees, (IDS[:1], IDS[1:]), strict=True)]
    assert_close(found, jax.tree.map(lambda *x: jnp.concatenate(x), *wanted))


def test_one_row_alone_may_be_a_layers_vector():
    """Stacked biases and norms are picked from as a table is: only a product tells."""
    for use in (lambda r: jnp.tanh(r), lambda r: r[None] + jnp.ones((5, WIDTH)), lambda r: r):
        found = lora_jax.layout_of(lambda p, i, use=use: use(p["t"][i]), params_of("io"), IDS[0, 0])
        assert not dict(found)
        assert "may be a table, or vectors of layers: one row" in found.weights["t"].why_not
    lora_params = adapted(params_of("io"), targets="t", layout={"t": "io"})
    assert_oracle(lambda p, i: jnp.tanh(p["t"][i]), lora_params, IDS[0, 0])


def test_a_kernel_of_one_layer_is_no_row():
    def apply(p, x, k):
        return x @ p["w"][k] + p["b"][k][None]

    params = {"w": jnp.ones((3, 4, 5)), "b": jnp.ones((3, 5))}
    assert lora_jax.layout_of(apply, params, jnp.ones((2, 4)), 1) == {"w": "bio"}
