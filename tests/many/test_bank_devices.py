"""A bank over a base on other devices, on a mesh, and on that of several processes."""

import math
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, compilations, drawn, normal, randomize_b, tolerance
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from benchmarks import hlo
from lora_jax import LoraParams
from lora_jax.many import AdapterBank, _host
from lora_jax.recipes.lm import mesh as lm_mesh
from lora_jax.recipes.models import llama


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_slots_are_beside_the_shards_of_their_weights(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    plain = {"query": normal(0, (8, 4)), "value": jnp.ones((4, 8))}
    places = {"query": P("x", "y"), "value": P(None, "y")}
    params = {k: jax.device_put(x, NamedSharding(mesh, places[k])) for k, x in plain.items()}
    options = {"targets": ".*", "layout": {".*": "io"}}
    adapters = {
        f"a{n}": randomize_b(
            lora_jax.lorafy(plain, 2, key=jax.random.key(n), init=drawn, **options), n
        )
        for n in range(3)
    }
    start = lora_jax.lorafy(params, 3, init=drawn, **options)
    with compilations() as compiled:
        bank = AdapterBank(start, slots=2)
        f = bank.lora_params.adapter.factors["query"]
        ready = len(compiled)
        assert ready  # what counts counts
        for name, p in adapters.items():
            bank.add(name, p.adapter)
            bank.acquire(name)
            bank.release(name)
        assert len(compiled) == ready
    again = bank.lora_params.adapter.factors["query"]
    for x, spec in ((f.a, (None, "x", None)), (f.b, (None, None, "y")), (f.scale, (None,))):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), x.ndim)
    assert [x.sharding for x in jax.tree.leaves(again)] == [x.sharding for x in jax.tree.leaves(f)]
    # Of Explicit axes a product along sharded ones would want out_sharding= in the function.
    is_auto = kind == AxisType.Auto

    def fn(p, x, tanh=jnp.tanh):
        return tanh(x @ p["query"]) @ p["value"] if is_auto else tanh(x[:, :4] @ p["value"])

    x = normal(1, (3, 8))
    names = ["a2", None, "a0"]
    with jax.set_mesh(mesh), bank.using(names) as (lora_params, ids):
        found = jax.jit(lora_jax.many.lora_rows(fn))(lora_params, x, lora_ids=ids)
    expected = []
    for name, row in zip(names, np.asarray(x, np.float64), strict=True):
        w = {key: np.asarray(leaf, np.float64) for key, leaf in plain.items()}
        for key, f in adapters[name].adapter.factors.items() if name else ():
            w[key] = w[key] + float(f.scale) * np.asarray(f.a, np.float64) @ np.asarray(f.b)
        expected.append(fn(w, row[None], np.tanh))
    assert_close(np.asarray(found), np.concatenate(expected))


@pytest.mark.devices(8)
def test_slots_are_on_the_device_of_the_base():
    params = {"query": jnp.ones((8, 4))}
    device = jax.devices()[3]
    one = lora_jax.lorafy(params, 2, targets=".*", layout={".*": "io"}, init=drawn)
    bank = AdapterBank(LoraParams(jax.device_put(params, device), one.adapter), slots=2)
    bank.add("a0", one.adapter)
    with bank.using(["a0"]) as (lora_params, _):
        assert {d for x in jax.tree.leaves(lora_params.adapter) for d in x.devices()} == {device}


@pytest.mark.devices(8)
def test_factors_are_whole_along_axes_that_replicate_says():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    query = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("fsdp", "tensor")))
    options = {"targets": ".*", "layout": {".*": "io"}, "init": drawn}
    start = lora_jax.lorafy({"query": query}, 2, **options)
    f = AdapterBank(start, slots=3, replicate=["fsdp"]).lora_params.adapter.factors["query"]
    for x, spec in ((f.a, (None, None, None)), (f.b, (None, None, "tensor"))):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec)), x.ndim)
    with pytest.raises(ValueError, match=r"replicate.*'data'"):
        AdapterBank(start, replicate=["data"])
    alone = lora_jax.lorafy({"query": jnp.ones((8, 4))}, 2, **options)
    with pytest.raises(ValueError, match=r"replicate=\['fsdp'\], and the base is on no mesh"):
        AdapterBank(alone, replicate=["fsdp"])


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("tensor=8", marks=pytest.mark.long),
        pytest.param("data=4,tensor=2", marks=pytest.mark.long),
        "fsdp=2,tensor=4",
    ],
)
def test_between_devices_go_rank_numbers_a_row_and_no_factors(mesh):
    mesh, rows, rank = lm_mesh.mesh_of(mesh), 64, 6
    axes = llama.Cache(keys=1, values=1, lengths=0)
    model = llama.Llama(512, 256, 512, 2, 8, 8, 32, scan_layers=True)
    ids = jnp.ones((rows, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    base = lm_mesh.placed(shapes, mesh, jnp.float32)
    base = jax.tree.map(lambda s: jax.device_put(np.ones(s.shape, s.dtype), s.sharding), base)
    start = lora_jax.lorafy(base, rank, targets="all-linear", init=drawn)
    lora_params = AdapterBank(start, slots=16, replicate=["fsdp"]).lora_params

    def over_rows(x, axis):
        spec = P(*[None] * axis, lm_mesh.ROWS)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    ids, which = over_rows(ids, 0), over_rows(ids[:, 0], 0)
    cache = jax.tree.map(over_rows, jax.eval_shape(lambda: model.empty(rows, 32)), axes)
    plain = lambda p, ids, cache: model.apply({"params": p}, ids, cache)  # noqa: E731
    by_rows = lora_jax.many.lora_rows(plain, in_axes=(None, 0, axes), out_axes=(0, axes))

    def crossing(fn, *args):
        return hlo.collectives(jax.jit(fn).lower(*args).compile().as_text())

    served = lambda p, which, *x: by_rows(p, *x, lora_ids=which)  # noqa: E731
    found = crossing(served, lora_params, which, ids, cache)
    types = " ".join(c.types for c in found)
    shapes = [tuple(map(int, x.split(","))) for x in re.findall(r"\[([\d,]+)", types)]
    own = rows // mesh.shape["data"] // mesh.shape["fsdp"]
    with_rank = {math.prod(shape) for shape in shapes if rank in shape}
    assert with_rank == {own * rank}  # no factor
    alone = crossing(plain, base, ids, cache)
    assert sum(c.times for c in found) <= sum(c.times for c in alone)


# --- processes ---------------------------------------------------------------------------------


def serve(address, process):
    """What a process of two does; four devices each."""
    jax.distributed.initialize(address, 2, int(process), coordinator_bind_address=address)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    query = rng.normal(size=(8, 16)).astype(np.float32)
    bias = rng.normal(size=(16,)).astype(np.float32)
    across, along = NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P("x"))
    params = {
        "query": jax.make_array_from_callback(query.shape, across, query.__getitem__),
        "bias": jax.make_array_from_callback(bias.shape, along, bias.__getitem__),
    }
    plain = {"query": query, "bias": bias}
    options = {"targets": "query", "full": "bias", "dora": True, "layout": {"query": "io"}}
    adapters = {
        f"a{n}": randomize_b(lora_jax.lorafy(plain, 2, key=jax.random.key(n), **options), n)
        for n in range(3)
    }
    for n, p in enumerate(adapters.values()):
        p.adapter.full["bias"] = p.adapter.full["bias"] + n
    whole = lambda p, x: x @ p["query"] + p["bias"]  # noqa: E731
    apply = jax.jit(lora_jax.many.lora_rows(whole), out_shardings=NamedSharding(mesh, P()))
    with compilations() as compiled:
        bank = AdapterBank(lora_jax.lorafy(params, 3, **options), slots=2)
        ready = len(compiled)
        for name, p in adapters.items():
            bank.add(name, p.adapter)
        x = rng.normal(size=(3, 8)).astype(np.float32)
        for names in (["a0", None, "a1"], ["a2", "a1", "a2"], ["a0", "a2", None]):
            with bank.using(names) as (lora_params, ids):
                found = np.asarray(apply(lora_params, x, lora_ids=ids))
            merged = [lora_jax.merge(adapters[name]) if name else plain for name in names]
            expected = np.stack([whole(p, row) for p, row in zip(merged, x, strict=True)])
            allowed = tolerance(depth=16) * np.abs(expected).max()  # DoRA's norms too
            np.testing.assert_allclose(found, expected, atol=allowed)
        assert ready
        assert bank.stats.evictions == 2, bank.stats
    try:
        bank.add("spread", lora_jax.lorafy(params, 2, **options))
    except ValueError as error:
        assert "spread over several processes" in str(error), error  # noqa: PT017
    else:
        raise AssertionError("an adapter in parts was added")
    print("served", len(bank), jax.process_index())


def test_an_adapter_in_parts_is_refused(monkeypatch):
    """What two processes see, below: none has all of the adapter."""
    one = lora_jax.lorafy({"query": jnp.ones((8, 4))}, 2, targets=".*", layout={".*": "io"})
    bank = AdapterBank(one, slots=2)
    monkeypatch.setattr(_host, "_is_here", lambda x: False)
    with pytest.raises(ValueError, match="'a0' is spread over several processes: pass complete"):
        bank.add("a0", one)
    assert not list(bank)


@pytest.mark.long
def test_two_processes_serve_from_slots_over_one_base():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pair = [
        subprocess.Popen([sys.executable, __file__, address, str(k)], env=environment, **pipes)
        for k in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], said
    for k, text in enumerate(said):
        assert f"served 3 {k}" in text


if __name__ == "__main__":
    serve(*sys.argv[1:])
