"""``merge`` and ``unmerge``: values, dtypes, shardings, memory, donation."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import adapted_weight
from flax import nnx
from helpers import CASES, assert_close, drawn, error, normal, randomize_b, tolerance
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lora_jax
from lora_jax import Adapter, Factors, LoraParams
from lora_jax._merge import _jitted


def expected(lora_params, path="w"):
    """``W + scale a b`` by NumPy in float64, from the definition."""
    f = lora_params.adapter.factors[path]
    axes = {role: [i for i, c in enumerate(f.layout) if c == role] for role in "bio"}
    letters = "abcdefg"
    pick = lambda role: "".join(letters[i] for i in axes[role])  # noqa: E731
    equation = f"{pick('b')}{pick('i')}z,{pick('b')}z{pick('o')}->{letters[: len(f.layout)]}"
    a, b = (np.asarray(x, np.float64) for x in (f.a, f.b))
    w = np.asarray(lora_params.base[path], np.float64)
    return w + float(f.scale) * np.einsum(equation, a, b)


LAYOUTS = [
    ((6, 8), "io"),
    ((6, 8), "oi"),
    ((6, 2, 4), "ioo"),
    ((2, 4, 6), "iio"),
    ((3, 6, 8), "bio"),
    ((6, 3, 8), "ibo"),
    ((8, 3, 6, 2), "obib"),
    ((2, 3, 4, 5), "bbio"),
]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_merge_is_w_plus_scaled_product(shape, layout):
    lora_params = adapted_weight(shape, layout)
    merged = lora_jax.merge(lora_params)["w"]
    assert_close(merged, expected(lora_params))
    assert np.abs(np.asarray(merged) - np.asarray(lora_params.base["w"])).max() > 0.01


def test_merge_of_any_layout():
    """All layouts of two and three axes and every fourth of four, in one program."""
    layouts = [
        "".join(letters)
        for n in (2, 3, 4)
        for letters in itertools.product("bio", repeat=n)
        if {"i", "o"} <= {*letters}
    ]
    layouts = layouts[:14] + layouts[14::4]
    params = {layout: normal(k, [2, 3, 4, 5][: len(layout)]) for k, layout in enumerate(layouts)}
    options = {"targets": ".*", "layout": {x: x for x in layouts}, "init": drawn}
    lora_params = randomize_b(lora_jax.lorafy(params, 2, **options))
    merged = jax.jit(lora_jax.merge)(lora_params)
    for layout in layouts:
        assert error(merged[layout], expected(lora_params, layout)) <= tolerance(), layout


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_sum_is_wide_and_rounded_once(dtype):
    lora_params = adapted_weight((64, 48), "io", dtype)
    merged = lora_jax.merge(lora_params)["w"]
    assert merged.dtype == dtype
    exact = expected(lora_params)
    nearest = exact.astype(np.float32).astype(dtype).astype(np.float64)
    # Off by more than a rounding only where float32 itself puts a tie on the other side.
    assert np.mean(np.asarray(merged, np.float64) != nearest) < (
        0.02 if dtype != jnp.float32 else 1
    )
    ulp = float(jnp.finfo(dtype).eps)
    assert np.abs(np.asarray(merged, np.float64) - exact).max() <= ulp * np.abs(exact).max()


def test_full_leaves_and_untouched_ones():
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones(4, jnp.bfloat16), "n": jnp.int32(3)}
    lora_params = lora_jax.lorafy(params, 2, targets="w", full="b")
    full = {"b": lora_params.adapter.full["b"] + 0.5}
    adapter = dataclasses.replace(lora_params.adapter, full=full)
    merged = lora_jax.merge(lora_jax.LoraParams(params, adapter))
    assert merged["n"] is params["n"]
    assert merged["b"].dtype == jnp.bfloat16
    assert np.all(merged["b"] == 1.5)


def test_merge_under_jit_and_grad():
    lora_params = adapted_weight((3, 6, 8), "bio")
    jitted = jax.jit(lora_jax.merge)(lora_params)["w"]
    assert_close(jitted, expected(lora_params))
    step = lora_jax.value_and_grad(lambda p: lora_jax.merge(p)["w"].sum())
    _, grads = jax.jit(step)(lora_params)
    f = lora_params.adapter.factors["w"]
    summed = float(f.scale) * np.asarray(f.a, np.float64)[0].sum(0)
    assert_close(np.asarray(grads.factors["w"].b)[0, :, 0], summed)


def test_nnx_state_merges_into_a_state_that_runs():
    case = CASES["nnx einsum"]()
    merged = lora_jax.merge(case.lorafy())
    assert isinstance(merged, nnx.State)
    assert np.isfinite(jax.jit(case.fn)(merged, case.x)).all()


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="memory of a CPU: products of GPUs have workspaces"
)
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_memory_of_a_stack_is_one_layer(dtype, donate):
    layer = 128 * 128 * 4  # one product in float32
    lora_params = adapted_weight((16, 128, 128), "bio", dtype)
    w, f = lora_params.base["w"], lora_params.adapter.factors["w"]
    analysis = _jitted(None, donate).lower(w, [f], static=((True, ()),)).compile().memory_analysis()
    # Before jax 0.11, XLA for CPUs copies a bfloat16 loop state once, in bfloat16.
    copy = w.nbytes if dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11) else 0
    assert analysis.temp_size_in_bytes <= 3 * layer + copy < 16 * layer
    assert analysis.alias_size_in_bytes == (w.nbytes if donate else 0)


def test_donation_takes_the_adapted_arrays_and_no_others():
    lora_params = adapted_weight((6, 8), "io")
    other = jnp.ones(3)
    lora_params.base["other"] = other
    want = expected(lora_params)
    merged = lora_jax.merge(lora_params, donate=True)
    assert_close(merged["w"], want)
    assert lora_params.base["w"].is_deleted()
    assert not other.is_deleted()


def test_donation_spares_an_array_that_stands_at_two_places():
    lora_params = adapted_weight((6, 8), "io")
    lora_params.base["tied"] = lora_params.base["w"]
    merged = lora_jax.merge(lora_params, donate=True)
    assert not merged["tied"].is_deleted()
    assert not np.array_equal(merged["tied"], merged["w"])


@pytest.mark.devices(8)
@pytest.mark.parametrize("axis_types", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    ("shape", "layout", "spec"),
    [
        ((8, 16), "io", ("x", "y")),
        ((4, 8, 16), "bio", (None, "x", "y")),
        ((4, 8, 16), "bio", ("x", None, "y")),
    ],
)
def test_sharded_stays_sharded(shape, layout, spec, axis_types):
    kinds = (getattr(jax.sharding.AxisType, axis_types),) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    lora_params = adapted_weight(shape, layout)
    want = expected(lora_params)
    base = {"w": jax.device_put(lora_params.base["w"], sharding)}
    everywhere = NamedSharding(mesh, PartitionSpec())
    adapter = jax.device_put(lora_params.adapter, everywhere)
    with jax.set_mesh(mesh):
        merged = lora_jax.merge(lora_jax.LoraParams(base, adapter))["w"]
    assert merged.sharding.is_equivalent_to(sharding, len(shape))
    assert_close(merged, want)


@pytest.mark.devices(8)
def test_sharded_by_the_old_mesh_too():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    lora_params = adapted_weight((8, 16), "io")
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    base = {"w": jax.device_put(lora_params.base["w"], sharding)}
    merged = lora_jax.merge(lora_jax.LoraParams(base, lora_params.adapter))["w"]
    assert merged.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_unmerge_is_within_one_rounding(dtype):
    lora_params = adapted_weight((3, 64, 48), "bio", dtype)
    merged = lora_jax.merge(lora_params)
    back = lora_jax.unmerge(merged, lora_params.adapter)["w"]
    assert back.dtype == dtype
    gap = np.abs(np.asarray(back, np.float64) - np.asarray(lora_params.base["w"], np.float64))
    largest = np.abs(np.asarray(merged["w"], np.float64)).max()
    assert 0 < gap.max() <= float(jnp.finfo(dtype).eps) * largest
    merged, base = (np.asarray(x["w"], np.float64) for x in (merged, lora_params.base))
    moved = np.abs(merged - base)
    assert moved.max() > 10 * gap.max()


# --- bad input ---------------------------------------------------------------------------------


def test_merging_twice_raises():
    merged = lora_jax.merge(adapted_weight((6, 8), "io"))
    with pytest.raises(TypeError, match=r"expected a LoraParams, got dict.*merged already"):
        lora_jax.merge(merged)


def test_unmerge_of_wrong_things_raises():
    lora_params = adapted_weight((6, 8), "io")
    with pytest.raises(TypeError, match="nothing is merged"):
        lora_jax.unmerge(lora_params, lora_params.adapter)
    with pytest.raises(TypeError, match="expected an Adapter"):
        lora_jax.unmerge(lora_params.base, {"w": 1})
    full = lora_jax.lorafy(lora_params.base, targets=[], full="w")
    with pytest.raises(ValueError, match=r"full leaves \(w\).*Keep the base"):
        lora_jax.unmerge(full.base, full.adapter)


def replaced(lora_params, **changes):
    f = dataclasses.replace(lora_params.adapter.factors["w"], **changes)
    return lora_jax.LoraParams(lora_params.base, lora_jax.Adapter({"w": f}))


@pytest.mark.parametrize("use", [lora_jax.merge, lora_jax.lora(lambda p: jnp.ones(6) @ p["w"])])
def test_an_adapter_that_does_not_fit_raises(use):
    good = adapted_weight((6, 8), "io")
    w, f = good.base["w"], good.adapter.factors["w"]
    with pytest.raises(ValueError, match=r"factors of 'w' do not fit.*a \(6, 2\) and b \(2, 8\)"):
        use(replaced(good, b=jnp.ones((2, 7))))
    with pytest.raises(ValueError, match="do not fit"):
        use(replaced(good, a=jnp.ones((6, 3))))
    with pytest.raises(ValueError, match="expected another layout"):
        use(replaced(good, layout="bio"))
    with pytest.raises(ValueError, match=r"scale has shape \(3,\).*jax.vmap"):
        use(replaced(good, scale=jnp.ones(3)))
    with pytest.raises(TypeError, match=r"\.a is NoneType.*lora_jax.combine"):
        use(replaced(good, a=None))
    with pytest.raises(ValueError, match=r"entry for 'w', and the base has no such leaf.*v"):
        use(lora_jax.LoraParams({"v": w}, good.adapter))
    with pytest.raises(TypeError, match=r"adapter is int, expected an Adapter"):
        use(lora_jax.LoraParams({"w": w}, 0))
    with pytest.raises(ValueError, match=r"full\['w'\] has shape \(3,\)"):
        use(lora_jax.LoraParams({"w": w}, lora_jax.Adapter({}, {"w": jnp.ones(3)})))
    with pytest.raises(ValueError, match=r"both in adapter.factors and in adapter.full"):
        use(lora_jax.LoraParams({"w": w}, lora_jax.Adapter({"w": f}, {"w": w})))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_weights_of_few_bits_are_merged_on_request_only(dtype):
    plain = adapted_weight((16, 12), "io")
    coarse = dataclasses.replace(plain, base={"w": plain.base["w"].astype(dtype)})
    with pytest.raises(ValueError, match=f"'w' is {dtype}, and its merged values do not fit"):
        lora_jax.merge(coarse)
    with pytest.raises(ValueError, match="quantized, or of 8 bits"):
        lora_jax.unmerge(coarse.base, coarse.adapter)
    wide = lora_jax.quant.dequantize(coarse.base)
    assert wide["w"].dtype == jnp.bfloat16
    wanted = lora_jax.merge(LoraParams(wide, coarse.adapter))
    merged = lora_jax.merge(coarse, quantized="dequantize")
    np.testing.assert_array_equal(np.asarray(merged["w"]), np.asarray(wanted["w"]))
    again = lora_jax.merge(coarse, quantized="requantize")
    assert again["w"].dtype == dtype
    errors = lora_jax.quant.quantization_error(again, merged)
    assert 0 < errors["w"] < 0.5


@pytest.mark.parametrize("donate", [False, True])
def test_a_float16_weight_that_overflows_is_told_and_kept(donate):
    lora_params = adapted_weight((8, 6), "io", jnp.float16)
    f = lora_params.adapter.factors["w"]
    large = dataclasses.replace(f, scale=jnp.float32(1e7))
    with pytest.raises(OverflowError, match=r"merge: \d+ entries of 'w' are infinite in float16"):
        lora_jax.merge(LoraParams(lora_params.base, Adapter({"w": large})), donate=donate)
    base = jax.tree.map(lambda x: x.astype("bfloat16"), lora_params.base)  # not deleted
    merged = lora_jax.merge(LoraParams(base, Adapter({"w": large})), donate=donate)
    assert bool(jnp.isfinite(merged["w"]).all())
    lora_params.base["w"] = lora_params.base["w"].at[0].set(jnp.inf)
    lora_jax.merge(lora_params)  # what is infinite stays so


def constant(a, b):
    return Adapter({"w": Factors(jnp.full((2, 1), a), jnp.full((1, 2), b), jnp.float32(1), "io")})


def base_of(value, dtype):
    return {"w": jnp.full((2, 2), value, dtype)}


@pytest.mark.parametrize(("dtype", "value"), [("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0)])
def test_float8_that_overflows_is_told(dtype, value):
    params = LoraParams(base_of(value, dtype), constant(value, 1.0))
    with pytest.raises(OverflowError, match=rf"4 entries of 'w' are infinite in {dtype}"):
        lora_jax.merge(params, quantized="requantize")
    assert float(lora_jax.merge(params, quantized="dequantize")["w"][0, 0]) == 2 * value


def test_a_full_leaf_that_overflows_is_told():
    full = LoraParams(base_of(1.0, jnp.float16), Adapter({}, {"w": jnp.full((2, 2), 1e6)}))
    with pytest.raises(OverflowError, match="4 entries of 'w' are infinite in float16"):
        lora_jax.merge(full)


def test_a_merge_rounds_once():
    def merged(dtype, *updates, base=1.0):
        params = base_of(base, dtype)
        for update in updates:
            params = LoraParams(params, constant(update, 1.0))
        return float(lora_jax.merge(params, quantized="requantize")["w"][0, 0])

    def rounded(x, dtype):
        return float(jnp.float32(x).astype(dtype))

    assert merged(jnp.bfloat16, 0.003, 0.003) == rounded(1.006, jnp.bfloat16) > 1
    assert merged(jnp.float8_e4m3fn, 0.0627) == rounded(1.0627, jnp.float8_e4m3fn) > 1
    assert merged(jnp.float8_e4m3fn, 0.05, 0.05) == rounded(1.1, jnp.float8_e4m3fn) > 1
    assert merged(jnp.float16, 1e4, -1e4, base=60000.0) == 60000  # the sum fits
