"""Weights spread over devices: shard_map and pmap inside the function, Explicit meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import adapted_weight
from helpers import (
    assert_close,
    assert_oracle,
    loss_of,
    normal,
    products_of_shape,
)
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax

pytestmark = pytest.mark.devices(8)

X = normal(1, (8, 4))
SHARDED = {
    "columns": (P(None, "y"), P("x", None), lambda y: y, P("x", "y")),
    "rows": (P("y", None), P("x", "y"), lambda y: lax.psum(y, "y"), P("x", None)),
    "whole": (P(), P(("x", "y"), None), lambda y: y, P(("x", "y"), None)),
}


def adapted(shape=(4, 6), layout="io", **options):
    return adapted_weight(shape, layout, **options)


@pytest.mark.parametrize("targets", ["w", "w[1:4, 2:5]"])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", SHARDED)
def test_a_weight_enters_a_shard_map(name, check_vma, targets):
    w_spec, x_spec, after, out_spec = SHARDED[name]
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    lora_params = adapted(targets=targets)

    def fn(p, x):
        body = lambda w, x: after(jnp.tanh(x) @ w)  # noqa: E731
        mapped = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
        return mapped(body, in_specs=(w_spec, x_spec), out_specs=out_spec)(p["w"], x)

    assert_oracle(fn, lora_params, X)
    step = lora_jax.value_and_grad(lambda p, x: lora_jax.lora(fn)(p, x).sum())
    assert not products_of_shape(step, (4, 6), lora_params, X)
    assert not products_of_shape(step, (4, 3), lora_params, X)


def test_a_weight_that_leaves_a_shard_map_is_a_materialization():
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))
    lora_params = adapted((8, 6))

    def fn(p, x):
        flip = jax.shard_map(lambda w: 2 * w, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        return jnp.tile(x, (1, 2)) @ flip(p["w"])

    with pytest.raises(NotImplementedError, match="leaves a 'shard_map'"):
        jax.eval_shape(lora_jax.lora(fn), lora_params, X)
    assert_oracle(fn, lora_params, X, on_materialize="allow")


def test_a_weight_enters_a_pmap():
    def fn(p, x):
        same = jax.pmap(lambda x, w: jnp.tanh(x) @ w, in_axes=(0, None))(x[:, None], p["w"])
        own = jax.pmap(lambda w: w[0] @ w)(jnp.broadcast_to(p["w"].T[:4], (8, 4, 4)))
        return same, own

    def own_layout(p, x):
        return fn(p, x)[0]

    assert_oracle(own_layout, adapted(), X)


def explicit(spec, x):
    mesh = jax.sharding.get_mesh()
    return jax.device_put(x, NamedSharding(mesh, spec))


EXPLICIT = {
    "columns": (P(None, "y"), P("x", None), lambda x, w: x @ w),
    "columns, tokens not": (P(None, "y"), P(None, None), lambda x, w: x @ w),
    "rows": (
        P("y", None),
        P("x", "y"),
        lambda x, w: jnp.einsum("bi,io->bo", x, w, out_sharding=P("x", None)),
    ),
    "rows, result spread": (
        P("y", None),
        P("x", "y"),
        lambda x, w: jnp.einsum("bi,io->bo", x, w, out_sharding=P("x", "y")),
    ),
    "fully sharded": (
        P("x", "y"),
        P("x", None),
        lambda x, w: x @ jax.sharding.reshard(w, P(None, "y")),
    ),
    "moved": (P(None, "y"), P("x", None), lambda x, w: x @ (2 * w.T).T[:, ::-1]),
    "rows of a table": (
        P("x", None),
        P("x", None),
        lambda x, w: jnp.tanh(w.at[jnp.argmax(x, 1) % 4].get(out_sharding=P("x", None))),
    ),
}


@pytest.mark.parametrize("factors", ["replicated", "as the weight"])
@pytest.mark.parametrize("name", EXPLICIT)
def test_results_on_an_explicit_mesh_are_spread_as_without_lora(name, factors):
    w_spec, x_spec, fn = EXPLICIT[name]
    lora_params = adapted()
    plain = lora_jax.lora(lambda p, x: fn(x, p["w"]))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        f = lora_params.adapter.factors["w"]
        if factors == "as the weight":
            a = explicit(P(w_spec[0], None), f.a)
            b = explicit(P(None, w_spec[1]), f.b)
            f = lora_jax.Factors(a, b, f.scale, f.layout)
        base = {"w": explicit(w_spec, lora_params.base["w"])}
        lora_params = lora_jax.LoraParams(base, lora_jax.Adapter({"w": f}))
        x = explicit(x_spec, X)
        expected = jax.jit(lambda p, x: fn(x, p["w"]))(base, x)
        merged = lora_jax.merge(lora_params)
        assert merged["w"].sharding == base["w"].sharding

        def values_and_gradients(fn, p, x):
            def loss(p, x):
                y = fn(p, x)
                return (y**2).sum(), y

            (_, y), grads = lora_jax.value_and_grad(loss, has_aux=True)(p, x)
            return y, grads

        def oracle(p, x):
            return fn(x, lora_jax.merge(p)["w"])

        actual, grads = jax.jit(functools.partial(values_and_gradients, plain))(lora_params, x)
        assert actual.sharding == expected.sharding
        if factors == "replicated":
            both = jax.jit(functools.partial(values_and_gradients, oracle))(lora_params, x)
            assert_close(*jax.device_get(((actual, grads), both)), depth=16)
        else:
            values = jax.jit(lambda p, x: fn(x, p["w"]))(merged, x)
            assert_close(*jax.device_get((actual, values)))


@pytest.mark.parametrize("layout", ["io", "oi"])
def test_gains_go_where_the_product_is_on_an_explicit_mesh(layout):
    """A gain of DoRA is of size 1 along the axes of the tokens, which are spread."""
    lora_params = adapted(layout=layout, dora=True)
    with jax.set_mesh(jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)):
        base = {"w": explicit(P(None, "y"), lora_params.base["w"])}
        lora_params = lora_jax.LoraParams(base, lora_params.adapter)
        equation = "bi,io->bo" if layout == "io" else "bi,oi->bo"
        product = functools.partial(jnp.einsum, equation, out_sharding=P("x", None))
        x = explicit(P("x", None), normal(2, (8, 4 if layout == "io" else 6)))
        found = jax.jit(lora_jax.lora(lambda p, x: product(x, p["w"])))(lora_params, x)
        merged = jax.device_get(lora_jax.merge(lora_params)["w"]).astype(np.float64)
    wanted = np.asarray(x) @ (merged if layout == "io" else merged.T)
    assert_close(np.asarray(found), wanted)


def test_constraints_on_an_adapted_weight_stay():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    lora_params = adapted()

    def fn(p, x):
        w = lax.with_sharding_constraint(p["w"], NamedSharding(mesh, P(None, "y")))
        return x @ lax.optimization_barrier(w)

    assert_oracle(fn, lora_params, X)
    jaxpr = str(jax.make_jaxpr(lora_jax.lora(fn))(lora_params, X))
    assert jaxpr.count("sharding_constraint[") == str(
        jax.make_jaxpr(fn)(lora_params.base, X)
    ).count("sharding_constraint[")
    assert loss_of(fn)(lora_params.base, X).ndim == 0
