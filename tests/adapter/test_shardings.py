"""Factors beside the shards of their weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_close, assert_same, compilations, drawn, normal, randomize_b
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax

pytestmark = pytest.mark.devices(8)


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


def placed(shape, *spec, mesh=None, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jax.device_put(x, NamedSharding(mesh or mesh_of(), P(*spec)))


def spec_of(x, ndim=None):
    spec = tuple((x.sharding if isinstance(x, jax.Array) else x).spec)
    return spec + (None,) * ((ndim if ndim is not None else len(spec)) - len(spec))


# Layout, shape and spec of a weight; of a and of b.
WEIGHTS = {
    "dense": ("io", (8, 4), ("x", "y"), ("x", None), (None, "y")),
    "transposed": ("oi", (8, 4), ("x", "y"), ("y", None), (None, "x")),
    "by both": ("io", (16, 4), (("x", "y"), None), (("x", "y"), None), (None, None)),
    "heads": ("ioo", (8, 4, 2), ("x", "y"), ("x", None), (None, "y", None)),
    "out": ("iio", (4, 2, 8), ("x", None, "y"), ("x", None, None), (None, "y")),
    "stacked": ("bio", (4, 8, 6), ("x", None, "y"), ("x", None, None), ("x", None, "y")),
    "window": ("iio", (3, 8, 4), (None, "x", "y"), (None, "x", None), (None, "y")),
    "part": ("io", (8, 8), ("x", "y"), ("x", None), (None, "y")),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_factor_is_sharded_as_the_axes_it_stands_for(name, kind):
    letters, shape, spec, of_a, of_b = WEIGHTS[name]
    mesh = mesh_of(kind)
    params = {"w": placed(shape, *spec, mesh=mesh), "v": jnp.ones(3)}
    targets = "w[0:4, 2:6]" if name == "part" else "w"
    options = {"targets": targets, "layout": {"w": letters}, "full": "v", "dora": True}
    lora_params = lora_jax.lorafy(params, 2, **options, init=drawn)
    (f,) = lora_params.adapter.factors.values()
    assert (spec_of(f.a, f.a.ndim), spec_of(f.b, f.b.ndim)) == (of_a, of_b)
    batch = letters.count("b")
    norms = of_b[:batch] + of_b[batch + 1 :]
    assert spec_of(f.magnitude, f.magnitude.ndim) == spec_of(f.norm, f.norm.ndim) == norms
    assert lora_params.base["w"] is params["w"]
    assert lora_params.adapter.full["v"].sharding.mesh == mesh

    places = lora_jax.shardings(lora_params)
    assert jax.tree.structure(places) == jax.tree.structure(lora_params)
    where = lambda s, x: s.is_equivalent_to(x.sharding, x.ndim)  # noqa: E731
    agree = jax.tree.map(where, places.adapter, lora_params.adapter)
    assert all(jax.tree.leaves(agree))


INITS = ("gaussian", "kaiming_uniform", "orthogonal", "pissa", "olora")


@functools.cache
def made_on_one_device():
    """Parameters, and for every initializer the adapter and what it merges into."""
    plain = {"w": np.asarray(normal(0, (8, 4))), "v": np.ones((8, 4), np.float32)}

    def made(params, init):
        lora_params = lora_jax.lorafy(params, 2, targets=".*", init=init, dora=init == "gaussian")
        return lora_params.adapter, lora_jax.merge(lora_params)

    return plain, jax.jit(lambda params: {init: made(params, init) for init in INITS})(plain)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_factors_are_those_of_a_base_on_one_device(kind):
    plain, here = made_on_one_device()
    spread = jax.device_put(plain, NamedSharding(mesh_of(kind), P("x", "y")))
    for init in INITS if kind == AxisType.Explicit else ("gaussian", "pissa"):
        there = lora_jax.lorafy(spread, 2, targets=".*", init=init, dora=init == "gaussian")
        adapter, merged = here[init]
        if init in ("gaussian", "kaiming_uniform"):
            assert_close(*(jax.tree.map(np.asarray, x) for x in (there.adapter, adapter)))
        merged_there = jax.tree.map(np.asarray, lora_jax.merge(there))
        assert_close(merged_there, jax.tree.map(np.asarray, merged))


def test_leaves_of_one_kind_share_a_program_that_later_calls_have():
    def params(seed):
        names = ("q", "k", "v")
        return {
            f"layer_{i}": {n: placed((8, 4), "x", "y", seed=seed) for n in names} for i in (0, 1)
        }

    options = {"targets": ".*", "bias": "none"}
    with compilations() as seen:
        lora_params = lora_jax.lorafy(params(0), 3, **options)
    assert len([name for name in seen if "_make" in str(name)]) <= 1, seen
    with compilations() as seen:
        again = lora_jax.lorafy(params(1), 3, **options)
    assert not seen
    alone = lora_jax.lorafy(jax.tree.map(np.asarray, params(0)), 3, **options)
    for x in (lora_params, again):
        assert_same(jax.tree.map(np.asarray, x.adapter), jax.tree.map(np.asarray, alone.adapter))
    with pytest.raises(ValueError, match=r"rank=3 of 'layer_0/k' is odd"):
        lora_jax.lorafy(params(0), 3, init="orthogonal", **options)


def test_lorafy_makes_factors_where_they_belong_under_jit():
    params = {"w": placed((8, 4), "x", "y")}
    lorafy = functools.partial(lora_jax.lorafy, rank=2, targets=".*")
    places = lora_jax.shardings(jax.eval_shape(lorafy, params), {"w": params["w"].sharding})
    made = jax.jit(lorafy, out_shardings=places)(params)
    eager = lorafy(params)
    assert_close(*(jax.tree.map(np.asarray, x) for x in (made, eager)))
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(eager), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_what_cannot_start_is_noticed_on_devices_too():
    w = placed((8, 4), "x", "y")
    params = {
        "w": jax.device_put(np.where(np.arange(32).reshape(8, 4) == 0, np.nan, w), w.sharding)
    }
    with pytest.raises(ValueError, match="the factors of 'w' are not finite"):
        lora_jax.lorafy(params, 2, targets=".*", init="pissa")
    with pytest.raises(ValueError, match="dora=True: 1 columns of 'w' are zero or not finite"):
        lora_jax.lorafy(params, 2, targets=".*", dora=True)
    params = {"w": w}
    zeros = lambda key, target: (np.zeros((8, 2)), np.zeros((2, 4)))  # noqa: E731
    with pytest.raises(ValueError, match="both factors of 'w' are zero"):
        lora_jax.lorafy(params, 2, targets=".*", init=zeros)


def test_linen_says_how_its_parameters_are_sharded():
    mesh = mesh_of()
    dense = nn.Dense(6, kernel_init=nn.with_partitioning(nn.initializers.ones, ("x", "y")))
    boxed = dense.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    found = lora_jax.shardings(
        lora_jax.lorafy(boxed, 2, targets=".*"), nn.get_sharding(boxed, mesh)
    )
    f = found.adapter.factors["kernel"]
    assert (f.a.spec, f.b.spec) == (P("x", None), P(None, "y"))
    logical = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
    boxed = nn.Dense(6, kernel_init=logical).init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    specs = nn.get_partition_spec(boxed)
    rules = [("embed", "x"), ("mlp", "y")]
    places = nn.logical_to_mesh_sharding(specs, mesh, rules)
    found = lora_jax.shardings(lora_jax.lorafy(boxed, 2, targets=".*"), places)
    f = found.adapter.factors["kernel"]
    assert (f.a.spec, f.b.spec) == (P("x", None), P(None, "y"))


def test_nnx_says_how_its_state_is_sharded():
    init = nnx.with_partitioning(nnx.initializers.ones, ("x", "y"))
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        linear = nnx.Linear(8, 6, kernel_init=init, rngs=nnx.Rngs(0))
        state = nnx.state(linear, nnx.Param)
    lora_state = lora_jax.lorafy(state, 2, targets=".*kernel")
    found = lora_jax.shardings(lora_state, nnx.get_named_sharding(state, mesh))
    f = found.adapter.factors["kernel"]
    assert (f.a.spec, f.b.spec) == (P("x", None), P(None, "y"))
    assert jax.tree.structure(found) == jax.tree.structure(lora_state)


TXS = {
    "adamw": optax.adamw(1e-3),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-3, momentum=0.9)),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "lora_plus": lora_jax.optim.lora_plus(optax.adamw(1e-3), ratio=4),
    "steps": optax.MultiSteps(optax.adamw(1e-3), 2),
}


@pytest.mark.parametrize("style", ["whole", "split"])
@pytest.mark.parametrize("kind", TXS)
def test_the_state_of_an_optimizer_is_sharded_alike(kind, style):
    params = {"w": placed((8, 4), "x", "y"), "v": placed((4,), "y")}
    lora_params = lora_jax.lorafy(params, 2, targets="w", full="v", init=drawn)
    places = lora_jax.shardings(lora_params)
    tx = TXS[kind]
    if style == "whole":
        tx, trained = lora_jax.optimizer(tx), lora_params
    else:
        trained, places = lora_jax.split(lora_params)[0], lora_jax.split(places)[0]
    found = lora_jax.state_shardings(jax.eval_shape(tx.init, trained), trained, places)
    state = jax.jit(tx.init, out_shardings=found)(trained)
    specs = {}
    for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path)
        for own, shape in ((".a", (8, 2)), (".b", (2, 4)), ("['v']", (4,))):
            if name.endswith(own) and x.shape == shape:
                specs.setdefault(own, set()).add(spec_of(x, x.ndim))
        if x.ndim == 0:
            assert x.sharding.is_fully_replicated
    if kind != "adafactor":
        assert specs == {".a": {("x", None)}, ".b": {(None, "y")}, "['v']": {("y",)}}


# What is wrong.


def test_what_is_no_sharding_is_refused():
    params = {"w": jnp.ones((8, 4)), "v": jnp.ones(3)}
    lora_params = lora_jax.lorafy(params, 2, targets="w")
    with pytest.raises(ValueError, match="expected one mesh, and the base has none"):
        lora_jax.shardings(lora_params)
    whole = NamedSharding(mesh_of(), P())
    with pytest.raises(TypeError, match=r"base_shardings: 'v' is .*, expected a NamedSharding"):
        lora_jax.shardings(lora_params, {"w": P("x"), "v": P()})
    with pytest.raises(ValueError, match=r"base_shardings has no leaf 'v'\. Nearest: w"):
        lora_jax.shardings(lora_params, {"w": whole})
    places = {"w": whole, "v": NamedSharding(mesh_of(), P("x", "y"))}
    with pytest.raises(ValueError, match=r"'v' has .* for shape \(3,\)"):
        lora_jax.shardings(lora_params, places)
    other = NamedSharding(jax.make_mesh((8,), ("z",), axis_types=(AxisType.Auto,)), P())
    with pytest.raises(ValueError, match=r"one mesh, and the base has .*'z': 8.*'x': 4"):
        lora_jax.shardings(lora_params, {"w": whole, "v": other})
    with pytest.raises(ValueError, match="have different structures"):
        lora_jax.state_shardings({}, lora_params, {"w": whole})


def test_a_part_that_the_mesh_does_not_divide_is_replicated_and_said():
    params = {"w": placed((8, 8), "x", "y")}
    with pytest.warns(UserWarning, match=r"its axis 0 of 3 .* by the 4 parts of 'x'"):
        lora_params = lora_jax.lorafy(params, 2, targets="w[0:3, :]")
    f = lora_params.adapter.factors["w[0:3, :]"]
    assert (spec_of(f.a, 2), spec_of(f.b, 2)) == ((None, None), (None, "y"))


def test_factors_may_be_whole_along_the_axes_of_the_batch():
    params = {"w": placed((16, 4), ("x", "y"), None), "u": placed((8, 4), "x", "y")}
    params["v"] = placed((4,), "x")
    options = {"targets": ["w", "u"], "full": "v", "dora": True, "init": drawn}
    lora_params = lora_jax.lorafy(params, 2, **options)
    found = lora_jax.shardings(lora_params, replicate=("x",))
    w, u = (found.adapter.factors[path] for path in "wu")
    assert (spec_of(w.a), spec_of(u.a), spec_of(u.b)) == (("y", None), (None, None), (None, "y"))
    assert (spec_of(u.magnitude), spec_of(found.adapter.full["v"], 1)) == (("y",), (None,))
    assert spec_of(found.base["u"]) == ("x", "y")
    for wrong in ("x", ("z",)):
        with pytest.raises(ValueError, match=r"replicate=.*: expected a collection of axes"):
            lora_jax.shardings(lora_params, replicate=wrong)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_the_arrays_of_a_quantized_weight_are_sharded_as_far_as_they_divide(dtype):
    params = {"w": normal(0, (256, 8))}
    base = lora_jax.quant.quantize(params, dtype, targets="w")
    places = {"w": NamedSharding(mesh_of(), P("x", "y"))}
    lora_params = randomize_b(lora_jax.lorafy(base, 2, targets="w", init=drawn))
    there = jax.device_put(lora_params, lora_jax.shardings(lora_params, places))
    whole = [x for x in jax.tree.leaves(there.base) if x.shape == (256, 8)]
    assert whole
    assert all(spec_of(x, 2) == ("x", "y") for x in whole)
    x = normal(1, (4, 256))
    fn = jax.jit(lora_jax.lora(lambda params, x: x @ params["w"]))
    assert_close(np.asarray(fn(there, x)), np.asarray(fn(lora_params, x)))


def test_layouts_are_enough_to_say_where_an_adapter_goes():
    params = {"w": placed((8, 4), "x", "y"), "norm": {"scale": placed((4,), "y")}}

    def fn(p, x):
        return (x @ p["w"]) * p["norm"]["scale"][None]

    layouts = lora_jax.layout_of(fn, params, jnp.ones((2, 8)))
    of_base = jax.tree.map(lambda x: x.sharding, params)
    found = lora_jax.shardings(layouts, of_base)
    made = jax.jit(
        lambda p: lora_jax.lorafy(p, 2, targets=".*", layout=layouts), out_shardings=found
    )(params)
    assert jax.tree.structure(found) == jax.tree.structure(made)
    assert [*found.adapter.factors] == ["w"]
    expected = lora_jax.shardings(made, of_base)
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)
    whole = lora_jax.shardings(layouts, of_base, replicate=["x"]).adapter.factors["w"]
    assert (spec_of(whole.a, 2), spec_of(whole.b, 2)) == ((None, None), (None, "y"))
    with pytest.raises(ValueError, match=r"layouts have no arrays.*pass base_shardings"):
        lora_jax.shardings(layouts)
    with pytest.raises(ValueError, match=r"base_shardings has no leaf 'norm/scale'"):
        lora_jax.shardings(layouts, {"w": of_base["w"]})
