"""``Rows``: table rows that train, as factors whose ``a`` is not stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same

import lora_jax
from lora_jax import Adapter, LoraParams, Rows

ONE_HOT = np.eye(7, dtype=np.float32)[[2, 5]].T  # [vocabulary, rows]
B = np.arange(6, dtype=np.float32).reshape(2, 3)


def rows(b=B, **changes):
    return dataclasses.replace(Rows(b, np.float32(1), "io", (2, 5), 7), **changes)


def test_a_picks_the_rows_wherever_b_is():
    stacked = np.stack([B, 2 * B, 3 * B])
    assert_same(rows().a, ONE_HOT)
    assert_same(rows(jnp.asarray(B)).a, jnp.asarray(ONE_HOT))
    assert_same(rows(stacked).a, np.stack([ONE_HOT] * 3))
    traced = jax.jit(lambda b, many: (rows(b).a, jax.vmap(lambda b: rows(b).a)(many), rows(many).a))
    one, mapped, many = traced(B, stacked)
    assert_same(one, jnp.asarray(ONE_HOT))
    assert_same(mapped, jnp.asarray(np.stack([ONE_HOT] * 3)))
    assert_same(many, mapped)
    shape = rows(jax.ShapeDtypeStruct((4, 2, 3), jnp.bfloat16)).a
    assert (shape.shape, shape.dtype) == ((4, 7, 2), jnp.bfloat16)


def test_only_the_rows_are_stored_and_train():
    f = lora_jax.lorafy({"t": jnp.ones((7, 3))}, targets=[], rows={"t": [5, 2]}, layout={"t": "io"})
    f = f.adapter.factors["t"]
    assert [x.shape for x in jax.tree.leaves(f)] == [(2, 3), ()]
    assert (f.ids, f.vocabulary, f.rank, f.size) == ((2, 5), 7, 2, 6)
    assert (f.trainable, f.weight_shape) == (("b",), (7, 3))
    assert dataclasses.replace(f, layout="oi").weight_shape == (3, 7)
    assert repr(rows(0, scale=1)) == "Rows(b=0, scale=1, layout='io', ids=(2, 5), vocabulary=7)"


def test_a_program_holds_no_table_of_ones():
    size = 50_000
    f = rows(jnp.ones((2, 3)), vocabulary=size, ids=(0, size - 1))
    params = LoraParams({"t": jnp.ones((size, 3))}, Adapter({"t": f}))
    apply = lora_jax.lora(lambda p, ids: p["t"][ids])
    jaxpr = jax.make_jaxpr(apply)(params, jnp.array([0, 1]))
    assert all(np.size(const) < size for const in jaxpr.consts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 8}, r"the rows of 't' do not fit .* \(7, 3\).* for 2 of 8 rows"),
        ({"layout": "oi"}, r"b has shape \(2, 3\) .*expected b \(2, 7\)"),
        ({"layout": "ii"}, "expected a table with one 'i' axis"),
        ({"b": B[:1]}, r"b has shape \(1, 3\) for 2 of 7 rows, expected b \(2, 3\)"),
        ({"ids": (5, 2)}, r"ids is \(5, 2\): expected ascending numbers from 0 to 6"),
        ({"ids": (2, 7)}, "expected ascending numbers from 0 to 6"),
        ({"ids": (2, 2)}, "expected ascending numbers from 0 to 6"),
        ({"scale": jnp.ones(2)}, "scale has shape .*This is a stack"),
        ({"b": None}, r"factors\['t'\].b is NoneType, expected an array"),
    ],
)
def test_rows_that_do_not_fit_are_refused(changes, message):
    params = LoraParams({"t": jnp.ones((7, 3))}, Adapter({"t": rows(**changes)}))
    with pytest.raises((ValueError, TypeError), match=message):
        lora_jax.merge(params)


def test_rows_and_factors_of_one_table_are_not_members_of_one_stack():
    table, layout = {"t": jnp.ones((7, 3))}, {"t": "io"}
    some = lora_jax.lorafy(table, targets=[], rows={"t": [2, 5]}, layout=layout)
    all_of_it = lora_jax.lorafy(table, 2, targets="t", layout=layout)
    with pytest.raises(ValueError, match=r"trains rows \[2, 5\] of 't' and adapters\[1\] 't'"):
        lora_jax.many.stack([some, all_of_it])
    with pytest.raises(ValueError, match=r"rows is \[2, 5\] here and 'all' there"):
        lora_jax.many.replace_at(lora_jax.many.stack([all_of_it]), 0, some)
    with pytest.raises(ValueError, match=r"rows is 'all' here and \[2, 5\] there"):
        lora_jax.many.AdapterBank(some, slots=1).add("x", all_of_it)
    with pytest.raises(ValueError, match="overlap"):
        lora_jax.lorafy(table, targets="t", rows={"t": [1]}, layout=layout)
