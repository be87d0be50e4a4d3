"""Orbax: exact resumption, other topologies, wrong bases, damage, and processes that are killed."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import drawn, normal, randomize_b
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import lora_jax
from lora_jax.io import orbax

LAYOUT = {".*": "io"}


def weights(*shape, seed=0, dtype=jnp.float32):
    return normal(seed, shape, dtype)


def adapted(params, rank=2, targets=".*", **options):
    options = {"layout": LAYOUT, "init": drawn} | options
    return randomize_b(lora_jax.lorafy(params, rank, targets=targets, **options))


def mlp():
    return {"up": {"kernel": weights(6, 8)}, "down.2": weights(8, 4, seed=1)}


def forward(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down.2"]


def assert_same(actual, expected):
    """Every bit, type and place in the tree."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(e)
        if hasattr(a, "dtype"):
            assert (a.dtype, a.shape) == (e.dtype, e.shape)
            is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
            a, e = map(jax.random.key_data, (a, e)) if is_key else (a, e)
            assert np.asarray(a).tobytes() == np.asarray(e).tobytes()
        else:
            assert a == e


def whole_style(tx):
    tx = lora_jax.optimizer(tx)
    loss = lambda p, x: (lora_jax.lora(forward)(p, x) ** 2).mean()  # noqa: E731

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(lora_params, opt_state, x):
        updates, opt_state = tx.update(jax.grad(loss)(lora_params, x), opt_state, lora_params)
        return optax.apply_updates(lora_params, updates), opt_state

    return tx.init, step


def split_style(tx):
    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def update(trainable, frozen, opt_state, x):
        loss = lambda p: (lora_jax.lora(forward)(p, x) ** 2).mean()  # noqa: E731
        _, grads = lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen))
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    def step(lora_params, opt_state, x):
        trainable, frozen = lora_jax.split(lora_params)
        trainable, opt_state = update(trainable, frozen, opt_state, x)
        return lora_jax.combine(trainable, frozen), opt_state

    return lambda lora_params: tx.init(lora_jax.split(lora_params)[0]), step


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("style", "dora"),
    [
        (whole_style, False),
        (split_style, True),
        pytest.param(whole_style, True, marks=pytest.mark.long),
        pytest.param(split_style, False, marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, style, dora):
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, 14)
    init, step = style(optax.adamw(schedule, weight_decay=0.1))

    def run(state, first, last, checkpointer=None):
        lora_params, opt_state, extra = state
        for i in range(first, last):
            key, part = jax.random.split(extra["key"])
            x = jax.random.normal(part, (5, 6))
            lora_params, opt_state = step(lora_params, opt_state, x)
            extra = {"key": key, "position": extra["position"] + 5, "scale": extra["scale"] * 2}
            if checkpointer:  # the next step donates what is being written
                checkpointer.save(i, lora_params, opt_state, extra)
        return lora_params, opt_state, extra

    def start():
        lora_params = adapted(mlp(), dora=dora)
        extra = {"key": jax.random.key(7), "position": 0, "scale": jnp.asarray(2.0)}
        return lora_params, init(lora_params), extra

    with orbax.Checkpointer(tmp_path, every=3) as checkpointer:
        expected = run(start(), 0, 14, checkpointer)
        assert checkpointer.steps == [0, 3, 6, 9, 12]
    fresh = lora_jax.lorafy(mlp(), 2, targets=".*", layout=LAYOUT, dora=dora)
    target = {"key": jax.random.key(0), "position": 0, "scale": jnp.asarray(0.0)}
    with orbax.Checkpointer(tmp_path) as checkpointer:
        found = checkpointer.load(mlp(), init(fresh), target, step=6)
    assert found.step == 6
    assert found.extra["position"] == 35
    assert found.extra["scale"].weak_type
    assert_same(run(found[1:], 7, 14), expected)


def test_an_adapter_comes_back_without_base_and_optimizer(tmp_path):
    lora_params = adapted(mlp())
    tx = lora_jax.optimizer(optax.adam(1e-3))
    with orbax.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(4, lora_params, tx.init(lora_params), {"seen": jnp.ones(2)})
        assert_same(checkpointer.load(mlp()).lora_params, lora_params)
        found = checkpointer.load(None)
        assert_same(found.lora_params, lora_params.adapter)
        assert found[::2] + found[3:] == (4, None, None)
    assert_same(orbax.load(tmp_path / "4"), lora_params.adapter)
    assert_same(orbax.load(tmp_path / "4", mlp()), lora_params)
    stored = ocp.metadata(tmp_path / "4", checkpointable_name="adapter").metadata
    assert "up%2Fkernel%2Ea" in stored
    assert not any("." in name or "/" in name for name in stored)
    names = {path.name for path in (tmp_path / "4").iterdir() if path.is_dir()}
    assert names == {"adapter", "opt_state", "extra", "config"}


def every_kind():
    params = {
        "a.b": weights(6, 8),
        "a": {"b": weights(6, 8, seed=1), "é [0:2]/%": weights(8, 4, seed=2)},
        "table": weights(9, 5, seed=3),
        "bias": jnp.ones(4, jnp.bfloat16),
    }
    targets = [r"a\.b", r"a/.*"]
    return adapted(params, targets=targets, full="bias", rows={"table": [1, 4]})


KINDS = {
    "rows, full leaves, odd keys": every_kind,
    "ranges": lambda: adapted({"w": weights(6, 8)}, targets=["w[:, 0:3]", "w[2:4, 5:8]"]),
    "dora, frozen": lambda: adapted({"w": weights(6, 8)}, dora=True, freeze=("a",)),
    "bfloat16": lambda: adapted({"w": weights(6, 8)}, dtype=jnp.bfloat16, rslora=True),
    "pissa": lambda: adapted({"w": weights(6, 8)}, init="pissa"),
    "nothing": lambda: lora_jax.LoraParams({"w": jnp.ones(3)}, lora_jax.Adapter({})),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_comes_back(tmp_path, kind):
    lora_params = KINDS[kind]()
    orbax.save(tmp_path / "a", lora_params, content=True)
    loaded = orbax.load(tmp_path / "a", lora_params.base)
    assert_same(loaded, lora_params)
    with orbax.Checkpointer(tmp_path / "steps") as checkpointer:
        checkpointer.save(0, lora_params)
        assert_same(checkpointer.load(lora_params.base).lora_params, lora_params)


def test_an_adapter_without_its_base_comes_back(tmp_path):
    adapter = adapted(mlp()).adapter
    orbax.save(tmp_path / "a", adapter)
    assert_same(orbax.load(tmp_path / "a", mlp()).adapter, adapter)


def test_norms_are_those_of_a_base_of_another_precision(tmp_path):
    lora_params = adapted({"w": weights(6, 8)}, dora=True)
    with orbax.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, lora_params)
        base = {"w": weights(6, 8, dtype=jnp.bfloat16)}
        with pytest.warns(UserWarning, match="another precision"):
            found = checkpointer.load(base).lora_params.adapter.factors["w"]
    assert np.array_equal(found.norm, adapted(base, dora=True).adapter.factors["w"].norm)
    assert not np.array_equal(found.norm, lora_params.adapter.factors["w"].norm)


def mesh_of(*shape):
    return Mesh(np.array(jax.devices()).reshape(shape), ("x", "y"))


@pytest.mark.devices(8)
def test_another_topology_has_the_same_bytes(tmp_path):
    params = {"w": weights(16, 8)}
    specs = {"a": P("x", None), "b": P(None, "y"), "scale": P()}

    def sharding(mesh, name, shape):
        return NamedSharding(mesh, specs[name.rsplit(".", 1)[1]])

    def spread(mesh):
        lora_params = adapted(jax.device_put(params, NamedSharding(mesh, P("x", "y"))))
        adapter = jax.tree.map_with_path(
            lambda path, x: jax.device_put(x, NamedSharding(mesh, specs[path[-1].name])),
            lora_params.adapter,
        )
        lora_params = dataclasses.replace(lora_params, adapter=adapter)
        return lora_params, optax.adam(1e-3).init(adapter)

    (lora_params, state), (other, target) = (spread(mesh_of(4, 2)), spread(mesh_of(2, 4)))
    moved = lambda x: jax.device_put(np.asarray(x) + 3, x.sharding if x.ndim else None)  # noqa: E731
    state = jax.tree.map(moved, state)
    with orbax.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, lora_params, state)
        place = functools.partial(sharding, mesh_of(2, 4))
        found = checkpointer.load(other.base, target, shardings=place)
        replicated = checkpointer.load(other.base).lora_params.adapter
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
        )
        again = checkpointer.load(other.base, shapes, shardings=NamedSharding(mesh_of(2, 4), P()))
    assert_same(found.lora_params.adapter, lora_params.adapter)
    assert_same((found.opt_state, again.opt_state), (state, state))
    factors = found.lora_params.adapter.factors["w"]
    assert factors.a.sharding == NamedSharding(mesh_of(2, 4), P("x", None))
    assert found.opt_state[0].mu.factors["w"].b.sharding.spec == P(None, "y")
    for adapter in (replicated, again.lora_params.adapter):
        assert_same(adapter, lora_params.adapter)
        for x in jax.tree.leaves(adapter):
            assert x.sharding == NamedSharding(mesh_of(2, 4), P())
    # The counter of a fresh state is on no device yet: it goes where the adapter's arrays are.
    assert not target[0].count.committed
    assert found.opt_state[0].count.sharding == NamedSharding(mesh_of(2, 4), P())


@pytest.mark.devices(8)
def test_without_a_mesh_arrays_may_be_moved_by_jax(tmp_path):
    lora_params = adapted(mlp())
    orbax.save(tmp_path / "a", lora_params)
    loaded = orbax.load(tmp_path / "a", mlp())
    assert not any(x.committed for x in jax.tree.leaves(loaded.adapter))
    x = jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh_of(4, 2), P("x")))
    assert lora_jax.lora(forward)(loaded, x).shape == (8, 4)


@pytest.mark.devices(8)
def test_a_sharding_that_does_not_fit_is_told(tmp_path):
    lora_params = adapted(mlp())
    orbax.save(tmp_path / "a", lora_params)
    with pytest.raises(ValueError, match=r"down.2.a of float32\[8,2\] cannot have the sharding"):
        orbax.load(tmp_path / "a", shardings=NamedSharding(mesh_of(4, 2), P(None, "x")))
    mesh = Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("x", "y"))
    message = r"down.2.a of float32\[8,2\] cannot have .*: axis 0 of 8 entries is not divided by "
    cases = [
        (P("x"), message + "mesh axis 'x' of size 3. Give it one of its own"),
        (P(("y", "x")), "'y' of size 2 x mesh axis 'x' of size 3"),
        (P(None, None, "x"), r"it has 2 axes, and P\w*\(None, None, 'x'.* is for 3"),
    ]
    for spec, message in cases:
        with pytest.raises(ValueError, match=message):
            orbax.load(tmp_path / "a", shardings=NamedSharding(mesh, spec))
    with pytest.raises(TypeError, match=r"is 'x', expected a jax.sharding.Sharding"):
        orbax.load(tmp_path / "a", shardings=lambda name, shape: "x")


def test_another_base_is_told(tmp_path):
    orbax.save(tmp_path / "a", adapted(mlp()))
    with pytest.raises(ValueError, match=r"another model: its base had a leaf 'down\.2'"):
        orbax.load(tmp_path / "a", {"up": mlp()["up"]})
    with pytest.raises(ValueError, match=r"'up/kernel' has shape \(6, 8\), here \(7, 8\)"):
        orbax.load(tmp_path / "a", mlp() | {"up": {"kernel": weights(7, 8)}})
    with pytest.raises(TypeError, match="params is a LoraParams"):
        orbax.load(tmp_path / "a", adapted(mlp()))


def test_other_contents_of_the_base_are_told_where_they_matter(tmp_path):
    pissa = adapted({"w": weights(6, 8)}, init="pissa")
    with pytest.raises(ValueError, match="pass the LoraParams"):
        orbax.save(tmp_path / "a", pissa.adapter)
    with orbax.Checkpointer(tmp_path / "steps") as checkpointer:
        checkpointer.save(0, pissa)
        assert_same(checkpointer.load(pissa.base).lora_params, pissa)
        with pytest.raises(ValueError, match="was trained on other weights: 'w'"):
            checkpointer.load({"w": weights(6, 8)})
    orbax.save(tmp_path / "b", adapted(mlp()), content=True)
    with pytest.raises(ValueError, match=r"was trained on other weights: 'down\.2'"):
        orbax.load(tmp_path / "b", mlp() | {"down.2": weights(8, 4, seed=5)})


def test_leaves_of_every_type_come_back(tmp_path):
    extra = {
        "keys": [jax.random.split(jax.random.key(1), 3), jax.random.key(2, impl="rbg")],
        "old key": jax.random.PRNGKey(3),
        "numbers": (2**80, -0.1, float("inf"), True, "é\n"),
        "numpy": {
            "position": np.int64(2**40),
            "order": np.arange(5)[::-1],
            "mask": np.ones(2, bool),
        },
        "small": jnp.asarray([1.5, -2], jnp.float8_e4m3fn),
        "int4": jnp.asarray([-8, 7], jnp.int4),
        "bf": [np.ones((), jnp.bfloat16), jnp.bfloat16(3)],
        "empty": [jnp.zeros((0, 3)), None, {}],
        "complex": jnp.asarray([1 + 2j], jnp.complex64),
    }
    with orbax.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, adapted(mlp()), optax.sgd(1e-3).init(mlp()), extra)
        found = checkpointer.load(mlp(), optax.sgd(1e-3).init(mlp()), extra)
        shapes = jax.eval_shape(lambda: extra["keys"])
        keys = checkpointer.load(mlp(), extra=extra | {"keys": shapes}).extra["keys"]
    assert_same(found.extra, extra)
    assert_same(keys, extra["keys"])
    assert found.opt_state == optax.sgd(1e-3).init(mlp())


def test_a_target_of_another_structure_is_refused(tmp_path):
    lora_params = adapted(mlp())
    state = optax.adam(1e-3).init({"w": jnp.ones(3)})
    with orbax.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, lora_params, state, {"n": 1})

        def refused(match, opt_state=None, extra=None):
            with pytest.raises(ValueError, match=match):
                checkpointer.load(mlp(), opt_state, extra)

        refused(
            r"structure: opt_state\[0\].count was saved where opt_state\[0\].trace\['w'\] is given",
            optax.sgd(1e-3, momentum=0.9).init({"w": jnp.ones(3)}),
        )
        refused(
            r"mu\['w'\] was saved as float32\[3\], and float32\[4\] is given",
            optax.adam(1e-3).init({"w": jnp.ones(4)}),
        )
        refused(
            r"mu\['w'\] was saved as float32\[3\], and bfloat16\[3\] is given",
            optax.adam(1e-3).init({"w": jnp.ones(3, jnp.bfloat16)}),
        )
        refused(r"opt_state\[0\].count was saved where nothing is given", ())
        refused(r"nothing was saved where opt_state\[2\] is given", (*state, jnp.ones(2)))
        refused(r"extra\['n'\] was saved as int, and float is given", extra={"n": 1.0})
        checkpointer.save(1, lora_params)
        refused("1 was saved without opt_state", state)
    with orbax.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match=r"extra\['f'\] is function, expected an array"):
            checkpointer.save(2, lora_params, extra={"f": lambda: 0})
        with pytest.raises(TypeError, match=r"extra\['s'\] is a NumPy array of <U1"):
            checkpointer.save(2, lora_params, extra={"s": np.array(["a"])})
        with pytest.raises(TypeError, match="expected a LoraParams or an Adapter, got dict"):
            checkpointer.save(2, mlp())
        assert checkpointer.steps == [0, 1]
        assert checkpointer.save(2, lora_params)


def test_steps_are_saved_when_due_and_only_forward(tmp_path):
    lora_params = adapted(mlp())
    with orbax.Checkpointer(tmp_path / "new", every=2, keep=2) as checkpointer:
        assert checkpointer.latest is None
        assert checkpointer.steps == []
        with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
            checkpointer.load(mlp())
        assert [checkpointer.save(np.int64(i), lora_params) for i in range(7)] == [
            True,
            False,
        ] * 3 + [True]
        assert checkpointer.steps == [4, 6]
        assert checkpointer.latest == 6
        for step in (6, 5, 0):
            with pytest.raises(ValueError, match=f"step={step}, and .*new has step 6: go on"):
                checkpointer.save(step, lora_params)
        with pytest.raises(FileNotFoundError, match=r"has no step 2, but \[4, 6\]"):
            checkpointer.load(mlp(), step=2)
    for options in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="=0, expected at least 1"):
            orbax.Checkpointer(tmp_path / "none", **options)


def test_what_killed_processes_left_goes_at_the_first_save_and_not_for_readers(tmp_path):
    left = tmp_path / "7.orbax-checkpoint-tmp" / "adapter"
    left.mkdir(parents=True)
    with orbax.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps == []
        assert left.exists()
        checkpointer.save(0, adapted(mlp()))
        assert not left.parent.exists()
        assert checkpointer.steps == [0]


def test_a_save_that_fails_is_told_by_the_next_call(tmp_path, monkeypatch):
    lora_params = adapted(mlp())

    async def fail(*args, **kwargs):
        raise OSError("the disk is full")

    with orbax.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, lora_params)
    monkeypatch.setattr(ocp.handlers.JsonHandler, "_background_save", fail)
    checkpointer = orbax.Checkpointer(tmp_path)
    checkpointer.save(1, lora_params)
    for call in (lambda: checkpointer.save(2, lora_params), checkpointer.close):
        with pytest.raises(OSError, match="the disk is full"):
            call()
    monkeypatch.undo()
    with orbax.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest == 0
        checkpointer.save(1, lora_params)
        assert checkpointer.latest == 1


def test_what_exists_is_not_replaced(tmp_path):
    lora_params = adapted(mlp())
    orbax.save(tmp_path / "a", lora_params)
    with pytest.raises(FileExistsError, match="a exists, and is not replaced"):
        orbax.save(tmp_path / "a", lora_params)
    with pytest.raises(FileExistsError, match="a exists, and is not replaced"):
        orbax.save_params(tmp_path / "a", mlp())
    assert_same(orbax.load(tmp_path / "a", mlp()), lora_params)


def test_what_is_no_checkpoint_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no checkpoint"):
        orbax.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Orbax cannot read 'config'"):
        orbax.load(tmp_path / "empty")
    ocp.save(tmp_path / "foreign", mlp()["up"])
    with pytest.raises(ValueError, match="Orbax cannot read 'config'"):
        orbax.load(tmp_path / "foreign")
    ocp.save_checkpointables(tmp_path / "other", {"config": {"rank": 4}})
    with pytest.raises(ValueError, match="is no checkpoint of lora_jax"):
        orbax.load(tmp_path / "other")
    orbax.save_params(tmp_path / "params", mlp())
    with pytest.raises(ValueError, match="no record of an adapter"):
        orbax.load(tmp_path / "params")
    orbax.save(tmp_path / "a", adapted(mlp()))
    with pytest.raises(ValueError, match="a was saved without params"):
        orbax.load_params(tmp_path / "a", mlp())


def test_values_that_are_not_finite_are_refused(tmp_path):
    lora_params = adapted({"w": weights(6, 8).at[0, 0].set(jnp.inf)}, full="w", targets=[])
    with orbax.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, lora_params)
        with pytest.raises(ValueError, match=r"'w.full' has values that are not finite"):
            checkpointer.load(lora_params.base)
        assert_same(checkpointer.load(lora_params.base, finite=False).lora_params, lora_params)
    assert_same(orbax.load(tmp_path / "0", finite=False), lora_params.adapter)


def test_doubles_are_not_cut(tmp_path):
    with jax.enable_x64(True):
        lora_params = adapted({"w": weights(6, 8).astype(jnp.float64)}, dtype=jnp.float64)
        orbax.save(tmp_path / "a", lora_params)
        assert_same(orbax.load(tmp_path / "a"), lora_params.adapter)
    with pytest.raises(
        ValueError, match=r"w.a is float64\[6,2\], which JAX has with jax_enable_x64"
    ):
        orbax.load(tmp_path / "a")


TREES = {
    "plain": lambda: {
        "layers": [{"w": weights(3, 2)}, (weights(2),)],
        "b": jnp.ones(2, jnp.bfloat16),
    },
    "dots": lambda: {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2)}, "a%2Eb": jnp.full(2, 2.0)},
    "slashes": lambda: {"a": jnp.zeros(2), "a/b": jnp.ones(2), "a/b/c": {"d": jnp.full(2, 2.0)}},
    "one key with a dot": lambda: [{"a.b": jnp.zeros(2)}, {"é": jnp.arange(3)}],
    "numbers as keys": lambda: {1: jnp.zeros(2), 2: {0: np.arange(3)}},
    "one array": lambda: weights(2),
    "line ends": lambda: {"a\nb": jnp.zeros(2), "a": {"b.": jnp.ones(2)}},
    "a PRNG key": lambda: {"rngs": jax.random.key(4), "w": weights(2)},
}


@pytest.mark.parametrize("tree", TREES)
def test_parameters_come_back(tmp_path, tree):
    params = TREES[tree]()
    orbax.save_params(tmp_path / "p", params)
    assert_same(orbax.load_params(tmp_path / "p", params), params)


@pytest.mark.devices(8)
def test_plain_orbax_reads_merged_parameters_and_we_spread_them(tmp_path):
    merged = lora_jax.merge(adapted({"up": {"kernel": weights(8, 8)}, "down": weights(8, 4)}))
    orbax.save_params(tmp_path / "p", merged)
    place = NamedSharding(mesh_of(4, 2), P("x", "y"))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), merged)
    assert_same(ocp.load(tmp_path / "p", like), merged)
    loaded = orbax.load_params(tmp_path / "p", like)
    assert_same(loaded, merged)
    assert loaded["down"].sharding == place
    bare = {"up": {"kernel": like["up"]["kernel"]}, "down": jax.ShapeDtypeStruct((8, 4), "float32")}
    loaded = orbax.load_params(tmp_path / "p", bare)
    assert loaded["down"].sharding == NamedSharding(mesh_of(4, 2), P())
    with pytest.raises(ValueError, match=r"params\['down'\] was saved as float32\[8,4\], and"):
        orbax.load_params(tmp_path / "p", like | {"down": jnp.ones((4, 8))})
    with pytest.raises(ValueError, match="params has another structure"):
        orbax.load_params(tmp_path / "p", {"up": like["up"]})
    with pytest.raises(TypeError, match=r"params\['n'\] is int, expected an array with"):
        orbax.save_params(tmp_path / "q", merged | {"n": 1})
    with pytest.raises(TypeError, match=r"params\['n'\] is an array of shape \(0, 3\), expected"):
        orbax.save_params(tmp_path / "q", merged | {"n": jnp.ones((0, 3))})
    with pytest.raises(TypeError, match=r"params=\{\} has no arrays"):
        orbax.save_params(tmp_path / "q", {})
    assert not (tmp_path / "q").exists()


def test_nnx_states_are_parameters(tmp_path):
    from flax import nnx

    state = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    orbax.save_params(tmp_path / "p", state)
    assert_same(orbax.load_params(tmp_path / "p", state), state)


@pytest.fixture
def noise():
    """Where a file is damaged, Orbax closes its event loop before all answers are there."""
    yield
    time.sleep(0.2)


@pytest.mark.usefixtures("noise")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("each", [1, pytest.param(4, marks=pytest.mark.long)])
def test_no_flipped_bit_is_silent(tmp_path, each):
    lora_params = adapted({"w": weights(48, 32), "v.x": weights(32, 16)}, rank=8)
    state = optax.adam(1e-3).init(lora_params.adapter)
    state = jax.tree.map(lambda x: x + 1, state)
    extra = {"key": jax.random.key(1), "n": 3}
    step = tmp_path / "0"
    with orbax.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, lora_params, state, extra)
        checkpointer.wait()
        found = flips(
            step,
            lambda: checkpointer.load(lora_params.base, state, extra)[1:],
            (lora_params, state, extra),
            each,
        )
    assert found["told"] > 7 * each
    assert set(found["where"]) >= {"adapter", "opt_state", "extra", "config"}


def flips(path, load, expected, each=4):
    """Flip bits of every file: either that is told, or what is loaded is what was saved."""
    rng = random.Random(0)
    found = {"told": 0, "without effect": 0, "where": set()}
    for file in sorted(x for x in path.rglob("*") if x.is_file() and x.stat().st_size):
        data = file.read_bytes()
        for bit in rng.sample(range(8 * len(data)), each):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            try:
                actual = load()
            except ValueError as error:
                assert "damaged" in str(error)  # noqa: PT017
                found["told"] += 1
                found["where"].add(file.relative_to(path).parts[0])
            else:
                assert_same(actual, expected)
                found["without effect"] += 1
        file.write_bytes(data)
    assert_same(load(), expected)
    return found


@pytest.mark.usefixtures("noise")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_parameters_and_missing_files_are_told(tmp_path):
    params = {"w": weights(64, 64), "b": weights(4)}
    orbax.save_params(tmp_path / "p", params)
    assert (
        flips(tmp_path / "p", lambda: orbax.load_params(tmp_path / "p", params), params)["told"]
        > 10
    )
    file = max((tmp_path / "p" / "params").rglob("*"), key=lambda x: x.stat().st_size * x.is_file())
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match="Orbax cannot read 'params': it is damaged"):
        orbax.load_params(tmp_path / "p", params)
    file.unlink()
    with pytest.raises(ValueError, match="Orbax cannot read 'params': it is damaged"):
        orbax.load_params(tmp_path / "p", params)


def test_a_changed_record_is_told(tmp_path):
    orbax.save(tmp_path / "a", adapted(mlp()))
    file = tmp_path / "a" / "config" / "data.json"
    config = json.loads(file.read_text())
    config["record"]["factors"]["down.2"]["rank"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a is damaged: its config is not what was written"):
        orbax.load(tmp_path / "a")


# Processes that are killed


def big(step):
    """An adapter, a state and an extra of 10 MB that do not compress, all of this step."""
    drawn = np.random.default_rng(step).standard_normal((5, 512, 1024), np.float32)
    a, b, *moments = (jnp.asarray(x) for x in (drawn[0].T, *drawn[1:]))
    f = lora_jax.Factors(a, b, jnp.asarray(np.float32(1)), "io")
    base = {"w": jnp.asarray(np.zeros((1024, 1024), np.float32))}
    lora_params = lora_jax.LoraParams(base, lora_jax.Adapter({"w": f}))
    return lora_params, moments, {"step": step}


def train_until_killed(directory, ready):
    """Check the last step, and save more of them."""
    with orbax.Checkpointer(directory, keep=3) as checkpointer:
        step = -1
        if checkpointer.latest is not None:
            step = check_last(checkpointer)
        while True:
            step += 1
            checkpointer.save(step, *big(step))
            os.write(ready, b"1")  # from the first save on


def check_last(checkpointer):
    lora_params, moments, extra = big(0)
    found = checkpointer.load(lora_params.base, moments, extra)
    assert_same(found[1:], big(found.step))
    return found.step


def found_in(directory):
    """The last step, and whether one is half written."""
    names = os.listdir(directory)
    last = max((int(name) for name in names if name.isdigit()), default=-1)
    return last, any("orbax-checkpoint-tmp" in name for name in names)


def kill_children(directory, kills):
    """Fork and kill; JAX starts its threads in the children, so that forking is safe."""
    rng, hits, steps = random.Random(0), 0, [-1]
    for k in range(kills):
        ready, writer = os.pipe()
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                train_until_killed(directory, writer)
            os._exit(1)
        os.close(writer)
        begun = os.read(ready, 1) == b"1"
        until = time.monotonic() + 60
        while begun and time.monotonic() < until:
            last, partial = found_in(directory)
            if partial if k == 0 else last > steps[-1]:  # the first kill hits a step half written
                break
            time.sleep(0.001)
        time.sleep(k and rng.uniform(0.0, 0.3))
        assert begun
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "a child failed by itself"
        os.close(ready)
        last, partial = found_in(directory)
        hits += partial
        steps.append(last)
    print(json.dumps({"hits": hits, "steps": steps}))


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.long)])
def test_a_killed_process_leaves_the_last_step_whole(tmp_path, kills):
    command = [sys.executable, __file__, str(tmp_path), str(kills)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["hits"] >= 1  # the others may fall between two saves
    assert result["steps"] == sorted(result["steps"])
    assert result["steps"][-1] >= kills - 2  # all but the first left one more
    with orbax.Checkpointer(tmp_path, keep=3) as checkpointer:
        step = check_last(checkpointer)
        assert step == result["steps"][-1]
        assert checkpointer.save(step + 1, *big(step + 1))
        assert check_last(checkpointer) == step + 1
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


if __name__ == "__main__":
    kill_children(Path(sys.argv[1]), int(sys.argv[2]))


def test_negative_steps_and_foreign_numbers_are_refused(tmp_path):
    with orbax.Checkpointer(tmp_path / "steps") as checkpointer:
        with pytest.raises(ValueError, match=r"step=-1, expected at least 0"):
            checkpointer.save(-1, adapted(mlp()))
    with pytest.raises(TypeError, match="which other machines read otherwise"):
        orbax.save_params(tmp_path / "p", {"a": np.arange(3, dtype=">f4")})
