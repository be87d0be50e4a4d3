"""``OneHot``: lookups of trained rows compare numbers, and heads place products: no matrix of ones.

The oracle is the merged table, values and gradients, in one program for all spellings.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import jit_rows
from helpers import all_eqns, assert_oracle, normal, stack_by_numpy
from jax import lax
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import Adapter, LoraParams, Rows

SIZE = 300
ROWS = {"scattered": (0, 7, 299), "a range": (297, 298, 299)}
X, IDS = normal(2, (4, 6)), jnp.array([[0, 7, 298, 299], [3, 297, 7, 7]])

USES = {
    "index": lambda t, i, x: t[i],
    "take": lambda t, i, x: jnp.take(t, i, axis=0),
    "clipped": lambda t, i, x: jnp.take(t, 3 * i - 30, axis=0, mode="clip"),
    "filled": lambda t, i, x: t.at[3 * i - 30].get(mode="fill", fill_value=0.5),
    "small numbers": lambda t, i, x: t[(i % 256).astype(jnp.uint8)],
    "rows and columns": lambda t, i, x: t[i, i % 6],
    "columns of the transposed table": lambda t, i, x: t.T[:, i],
    "vmap": lambda t, i, x: jax.vmap(lambda i: t[i])(i),
    "scan": lambda t, i, x: lax.scan(lambda c, i: (c, t[i] @ t.T), 0, i)[1],
    "remat": lambda t, i, x: jax.checkpoint(lambda t, i: t[i])(t, i),
    "slices": lambda t, i, x: x[:, :3] @ lax.dynamic_slice(t, (i[0, 1], 1), (5, 3)).T,
    "a part of the table": lambda t, i, x: (t[290:][i % 10], x @ t[290:].T),
    "head": lambda t, i, x: x @ t.T,
    "head, vmap": lambda t, i, x: jax.vmap(lambda x: t @ x)(x),
    "head of sums": lambda t, i, x: jnp.einsum("bd,vd->v", x, t),
    "one-hot": lambda t, i, x: jax.nn.one_hot(i, SIZE, dtype=t.dtype) @ t,
    "two tables": lambda t, i, x: jnp.concatenate([t, 2 * t])[i + 5],
    "the table of the table": lambda t, i, x: t @ t[i[0]].T,
}


def rows_of(ids, seed=0, dtype=jnp.float32):
    f = Rows(normal(seed, (len(ids), 6), dtype), jnp.float32(0.5), "io", ids, SIZE)
    return LoraParams({"t": normal(1, (SIZE, 6), dtype)}, Adapter({"t": f}))


@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_every_use_of_a_table_is_that_of_the_merged_one(ids, dtype):
    def all_uses(p, i, x):
        return {name: use(p["t"], i, x) for name, use in USES.items()}

    sums = {"dtype": dtype, "length": 300 if dtype == jnp.float32 else 6}
    assert_oracle(all_uses, rows_of(ids, dtype=dtype), IDS, X.astype(dtype), sums=sums)


@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
def test_a_tied_table_takes_no_more_equations_than_dense_factors_and_no_matrix(ids):
    def tied(p, i):
        return jnp.take(p["t"], i, axis=0) @ p["t"].T

    params = rows_of(ids)
    dense = LoraParams(params.base, Adapter({"t": params.adapter.factors["t"].factors()}))

    def loss(b, params):
        f = dataclasses.replace(params.adapter.factors["t"], b=b)
        return lora_jax.lora(tied)(LoraParams(params.base, Adapter({"t": f})), IDS).sum()

    def traced(params):
        b = params.adapter.factors["t"].b
        return jax.make_jaxpr(jax.value_and_grad(loss))(b, params)

    one, other = traced(params), traced(dense)
    count = [sum(1 for _ in all_eqns(jaxpr)) for jaxpr in (one, other)]
    assert count[0] <= count[1], count
    for eqn in all_eqns(one):
        assert all(v.aval.shape not in ((SIZE, 3), (3, SIZE)) for v in eqn.outvars), eqn
    assert all(np.size(const) < SIZE for const in one.consts)


@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
def test_members_of_a_stack_share_the_rows(ids):
    members = [rows_of(ids, seed) for seed in (3, 4)]

    def tied(p, i):
        return jnp.take(p["t"], i, axis=0) @ p["t"].T

    found = jit_rows(tied)(stack_by_numpy(members), IDS, lora_ids=np.array([1, -1]))
    wanted = tied(lora_jax.merge(members[1]), IDS[0]), tied(members[0].base, IDS[1])
    np.testing.assert_allclose(found, np.stack(wanted), rtol=1e-5, atol=1e-5)


def test_merged_rows_are_the_sum_and_others_keep_their_bits():
    params = rows_of((0, 7, 299))
    params.base["t"] = params.base["t"].at[5, 2].set(-0.0)
    table, f = np.asarray(params.base["t"]), params.adapter.factors["t"]
    for merged in (lora_jax.merge(params), jax.jit(lora_jax.merge)(params)):
        wanted = table.copy()
        wanted[list(f.ids)] += np.asarray(f.b) * np.float32(0.5)
        np.testing.assert_array_equal(np.asarray(merged["t"]).view(np.int32), wanted.view(np.int32))


def test_tables_with_several_axes_of_features():
    f = Rows(normal(0, (3, 2, 4)), jnp.float32(0.5), "ioo", (0, 3, 8), 9)
    params = LoraParams({"t": normal(1, (9, 2, 4))}, Adapter({"t": f}))
    ids = jnp.array([0, 3, 5])

    def fn(p, ids, x):
        t = p["t"]
        return t[ids, ids % 2], t[ids, :, 0], jnp.einsum("bd,vhd->bvh", x, t)

    assert_oracle(fn, params, ids, X[:, :4])
    for k in range(3):  # each use alone shows that rows are read, or written
        jax.eval_shape(lora_jax.lora(lambda p, k=k: fn(p, ids, X[:, :4])[k]), params)


@pytest.mark.devices(8)
@pytest.mark.parametrize("spec", [(None, None), ("x", None), (None, "x")], ids=str)
def test_rows_enter_a_map_over_devices(spec):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, whole = P(*spec), P()

    def lookup(table, ids):
        rows = table[ids]
        if spec[0]:  # each device has a half of the words, and other ids than it has are none
            half = SIZE // 2
            own = ids - half * jax.lax.axis_index("x")
            is_own = (own >= 0) & (own < half)
            rows = jnp.where(is_own[..., None], table[jnp.clip(own, 0, half - 1)], 0)
            return jax.lax.psum(rows, "x")
        return rows

    mapped = jax.shard_map(
        lookup, mesh=mesh, in_specs=(spec, whole), out_specs=P(None, None, spec[1])
    )
    assert_oracle(lambda p, ids: mapped(p["t"], ids), rows_of((0, 7, 299)), IDS)
