"""``switch``: one adapter for another in merged weights, and the drift of doing so often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import BASE, dense, split
from helpers import assert_close, tolerance

import lora_jax
from lora_jax import Adapter, Factors, LoraParams


def narrow(dtype):
    cast = lambda x: jax.device_put(np.asarray(x).astype(dtype))  # noqa: E731
    return BASE | {name: cast(x) for name, x in BASE.items() if x.ndim > 1}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_switching_takes_one_out_and_puts_the_other_in(dtype):
    base = narrow(dtype)
    x = split(1, 2, base, ["dense", "stack", "query"], alpha=4)
    y = split(2, 3, base, ["dense", "stack", "conv"], alpha=5, rslora=True)
    params = lora_jax.merge(x)
    switched = lora_jax.switch(params, x.adapter, y.adapter)
    before, after = dense(x), dense(y)
    assert jax.tree.structure(switched) == jax.tree.structure(params)
    for key in ("dense", "stack", "query", "conv"):
        w = np.asarray(params[key], np.float64)
        without = w - before.get(key, 0.0)
        exact = without + after.get(key, 0.0)
        assert switched[key].dtype == dtype
        # half a unit in the last place of each sum, and what float32 itself adds
        eps = float(jnp.finfo(dtype).eps)
        largest = np.abs(w).max() + np.abs(before.get(key, 0)).max() + np.abs(exact).max()
        room = eps / 2 * (np.abs(without) + (1 + eps) * np.abs(exact) + eps * largest)
        gap = np.abs(np.asarray(switched[key], np.float64) - exact)
        assert (gap <= room + 8 * 2.0**-24 * largest).all()
    back = lora_jax.unmerge(params, x.adapter)
    assert np.array_equal(switched["query"], back["query"])
    assert switched["experts"] is params["experts"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adapters_of_other_parts_of_a_weight(dtype):
    base = {"w": jax.device_put(np.random.default_rng(0).normal(size=(6, 8)).astype(dtype))}
    x = split(1, 2, base, ["w[:, 0:4]"], layout=None)
    y = split(2, 2, base, ["w[2:5, 3:8]"], layout=None)
    switched = lora_jax.switch(lora_jax.merge(x), x.adapter, y.adapter)["w"]
    want = lora_jax.merge(y)["w"]
    switched, want, old = (np.asarray(x, np.float64) for x in (switched, want, base["w"]))
    largest = max(np.abs(d).max() for z in (x, y) for d in dense(z).values()) + np.abs(old).max()
    np.testing.assert_allclose(switched, want, atol=tolerance(dtype) * largest)
    assert np.abs(want - old).max() > 1


def test_donation_and_jit():
    x, y = split(1, targets=["dense", "stack"]), split(2, targets=["dense"])
    params = lora_jax.merge(x)
    want = lora_jax.switch(params, x.adapter, y.adapter)
    jitted = jax.jit(lora_jax.switch)(params, x.adapter, y.adapter)
    for key in ("dense", "stack"):
        assert_close(jitted[key], want[key])
    donated = lora_jax.switch(params, x.adapter, y.adapter, donate=True)
    assert params["dense"].is_deleted()
    assert not params["experts"].is_deleted()
    assert np.array_equal(donated["dense"], want["dense"])


def drift(dtype, order, size=96):
    """The relative error after 1, 10, 100 and 1,000 switches between four adapters."""
    rng = np.random.default_rng(0)
    base = {"w": jax.device_put((rng.normal(size=(size, size)) / np.sqrt(size)).astype(dtype))}
    adapters = []
    for _ in range(4):  # updates of a tenth of the weight
        a, b = rng.normal(size=(size, 4)) / np.sqrt(size), rng.normal(size=(4, size)) * 0.05
        a, b = (x.astype(np.float32) for x in (a, b))
        adapters.append(Adapter({"w": Factors(a, b, np.float32(1), "io")}))
    exact = [np.asarray(base["w"], np.float64) + dense(x)["w"] for x in adapters]
    params = lora_jax.merge(LoraParams(base, adapters[order[0]]))
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *adapters)
    order, found, start = np.asarray(order, np.int32), {}, 0
    for stop in (1, 10, 100, 1000):
        params = switches(params, stacked, order, start, stop)
        start, goal = stop, exact[order[stop]]
        gap = np.asarray(params["w"], np.float64) - goal
        found[stop] = np.linalg.norm(gap) / np.linalg.norm(goal)
    return found


@jax.jit
def switches(params, stacked, order, start, stop):
    """From the adapter of one place of the order to that of another, one by one."""
    adapter = lambda n: jax.tree.map(lambda x: x[order[n]], stacked)  # noqa: E731
    one = lambda n, params: lora_jax.switch(params, adapter(n), adapter(n + 1))  # noqa: E731
    return jax.lax.fori_loop(start, stop, one, params)


ORDERS = {
    "around": [n % 4 for n in range(1001)],
    "two": [n % 2 for n in range(1001)],
    "any": np.cumsum(np.random.default_rng(0).integers(1, 4, 1001)) % 4,
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_drift_of_a_thousand_switches(order):
    found = drift(jnp.bfloat16, ORDERS[order])
    once = 2.0**-9  # of the relative errors of rounding once, about the root of their mean square
    assert found[1] < 2 * once
    assert max(found.values()) < 8 * once, found  # with one rounding a switch: 0.2
    allowed = tolerance(length=4, depth=1000)  # a thousand switches, of rank 4
    assert max(drift(jnp.float32, ORDERS[order]).values()) < allowed


def test_keeping_the_base_does_not_drift():
    base = narrow(jnp.bfloat16)
    x, y = (split(k, 2, base, ["dense"]) for k in (1, 2))
    once = lora_jax.merge(y)["dense"]
    for z in (x, y, x, y):
        merged = lora_jax.merge(z)["dense"]
    assert np.array_equal(merged, once)


def test_what_cannot_be_switched_is_explained():
    x = split(1, targets=["dense"])
    params = lora_jax.merge(x)

    def refused(error, message, *args):
        with pytest.raises(error, match=message):
            lora_jax.switch(*args)

    refused(TypeError, "switch: params is a LoraParams: nothing is merged", x, x.adapter, x.adapter)
    refused(TypeError, "switch: old is LoraParams, expected an Adapter", params, x, x.adapter)
    refused(TypeError, "switch: new is NoneType, expected an Adapter", params, x.adapter, None)
    full = split(1, targets=["dense"], full="bias").adapter
    for pair in ((full, x.adapter), (x.adapter, full)):
        message = r"has full leaves \(bias\).*Keep the base: merge\(LoraParams\(base"
        refused(ValueError, message, params, *pair)
    dora = split(1, targets=["dense"], dora=True).adapter
    refused(ValueError, "switch: 'dense' has a DoRA magnitude", params, x.adapter, dora)
    pissa = lora_jax.lorafy(BASE, 2, init="pissa", targets="dense").adapter
    refused(ValueError, "switch: 'dense' belongs to what its init", params, pissa, x.adapter)
    other = split(1, base={"v": jnp.zeros((3, 4))}, targets=["v"], layout=None).adapter
    refused(ValueError, "entry for 'v', and the base has no such leaf", params, x.adapter, other)


def test_a_quantized_weight_is_told_what_to_do():
    pytest.importorskip("qwix")
    params = lora_jax.quant.quantize({"query": {"kernel": jnp.ones((64, 64))}}, "int8")
    x = lora_jax.lorafy({"query": {"kernel": jnp.ones((64, 64))}}, 2).adapter
    with pytest.raises(ValueError, match=r"switch: 'query/kernel' is quantized.*quant.dequantize"):
        lora_jax.switch(params, x, x)
    with pytest.raises(ValueError, match=r"unmerge: 'query/kernel' is quantized"):
        lora_jax.unmerge(params, x)


def test_under_vmap_nothing_is_donated_that_is_not_ours():
    x = split(1, targets=["dense"])
    params = lora_jax.merge(x)
    many = jax.vmap(lambda c: lora_jax.switch(params, x.adapter, c * x.adapter))(jnp.arange(3.0))
    wanted = [BASE["dense"] + c * dense(x)["dense"] for c in range(3)]
    assert_close(many["dense"], np.stack(wanted))
