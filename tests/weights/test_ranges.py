"""Parts of weights as targets: fused projections of which some are adapted."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapters import adapted
from helpers import assert_close, assert_oracle, drawn, normal, products_of_shape

import lora_jax
from lora_jax._weights.ranges import Range, overlap, part_of, resolve, spell, split_range

DIM = 12
QV = [".*c_attn/kernel[:, 0:12]", ".*c_attn/kernel[:, 24:36]"]


class Fused(nn.Module):
    """Attention with one kernel for queries, keys and values."""

    stored_transposed: bool = False

    @nn.compact
    def __call__(self, x):
        if self.stored_transposed:
            shape = (3 * DIM, DIM)
            kernel = self.param("c_attn/kernel", nn.initializers.lecun_normal(), shape)
            qkv = x @ kernel.T
        else:
            qkv = nn.Dense(3 * DIM, name="c_attn")(x)
        q, k, v = jnp.split(qkv, 3, -1)
        weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k))
        return jnp.einsum("bts,bsd->btd", weights, v)


@functools.cache
def setup():
    model, x = Fused(), normal(0, (2, 5, DIM))
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    return lambda p, x: model.apply({"params": p}, x), params, x


def test_queries_and_values_of_a_fused_kernel():
    fn, params, x = setup()
    lora_params = adapted(params, targets=QV)
    names = ["c_attn/kernel[:, 0:12]", "c_attn/kernel[:, 24:36]"]
    assert list(lora_params.adapter.factors) == names
    assert lora_params.adapter.factors[names[0]].b.shape == (2, 12)
    assert_oracle(fn, lora_params, x)
    merged = np.asarray(lora_jax.merge(lora_params)["c_attn"]["kernel"])
    before = np.asarray(params["c_attn"]["kernel"])
    np.testing.assert_array_equal(merged[:, 12:24], before[:, 12:24])  # keys, to the bit
    for name, start in zip(names, (0, 24), strict=True):
        f = lora_params.adapter.factors[name]
        scale, a, b = (np.asarray(leaf, np.float64) for leaf in (f.scale, f.a, f.b))
        assert_close(merged[:, start : start + 12], before[:, start : start + 12] + scale * a @ b)
    step = lora_jax.value_and_grad(lambda p, x: lora_jax.lora(fn)(p, x).sum())
    assert not products_of_shape(step, (12, 36), lora_params, x)
    assert not products_of_shape(step, (12, 12), lora_params, x)


def test_a_part_costs_its_part():
    fn, params, x = setup()
    lora_params = adapted(params, targets=QV)
    rows = lora_jax.report(fn, lora_params, x).rows
    assert [row["path"] for row in rows] == list(lora_params.adapter.factors)
    tokens = 10
    assert {row["extra FLOPs"] for row in rows} == {2 * 2 * tokens * 2 * (12 + 12)}  # of both
    assert "12x12" in lora_params.summary()
    assert "c_attn/kernel[:, 24:36]" in lora_params.summary()


@pytest.mark.parametrize(
    ("shape", "layout", "ranges"),
    [
        ((6, 8), "io", "[1:4]"),
        ((6, 8), "io", "[1:5, 2:-1]"),
        ((8, 6), "oi", "[2:5]"),
        ((4, 6, 8), "bio", "[1:3]"),
        ((4, 6, 8), "bio", "[0:2, :, 3:]"),
        ((6, 2, 4), "ioo", "[:, :, 1:3]"),
    ],
)
def test_any_axis_may_have_a_range(shape, layout, ranges):
    w = normal(0, shape)
    lora_params = adapted({"w": w}, targets=f"w{ranges}", layout={"w": layout})
    sizes = dict(zip("abc", shape, strict=False))
    letters = "abc"[: len(shape)]
    read = [c for c, role in zip(letters, layout, strict=True) if role in "bi"]
    kept = [c for c, role in zip(letters, layout, strict=True) if role in "bo"]
    x = normal(1, [3, *(sizes[c] for c in read)])

    def fn(p, x):
        return jnp.einsum(f"x{''.join(read)},{letters}->x{''.join(kept)}", x, p["w"])

    assert_oracle(fn, lora_params, x)
    merged = lora_jax.merge(lora_params)
    back = lora_jax.unmerge(merged, lora_params.adapter)
    assert_close(back, lora_params.base)
    (name,) = lora_params.adapter.factors
    part = tuple(
        slice(*(int(s) if s.strip() else None for s in r.split(":")))
        for r in ranges[1:-1].split(",")
    )
    changed = np.asarray(merged["w"]) != np.asarray(w)
    assert changed[part].all()
    assert changed.sum() == changed[part].size
    assert name == spell("w", resolve(ranges[1:-1], "w", shape), len(shape))


def test_some_layers_of_a_scanned_stack():
    lora_params = adapted({"w": normal(0, (4, 6, 6))}, targets="w[1:3]", layout={"w": "bio"})
    x = normal(1, (3, 6))

    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    def unrolled(p, x):
        for k in range(4):
            x = jnp.tanh(x @ p["w"][k])
        return x

    assert_oracle(scanned, lora_params, x)
    assert_oracle(unrolled, lora_params, x)


@pytest.mark.usefixtures("standard_promotion")
def test_parts_train_and_the_rest_stays():
    fn, params, x = setup()
    lora_params = lora_jax.lorafy(params, 2, targets=QV, full=".*bias", init=drawn)
    tx = lora_jax.optimizer(optax.adam(1e-2))

    @jax.jit
    def step(lora_params, state):
        value, grads = jax.value_and_grad(lambda p: (lora_jax.lora(fn)(p, x) ** 2).mean())(
            lora_params
        )
        updates, state = tx.update(grads, state, lora_params)
        return optax.apply_updates(lora_params, updates), state, value

    state, values = jax.jit(tx.init)(lora_params), []
    for _ in range(4):
        trained, (lora_params, state, value) = lora_params, step(lora_params, state)
        values.append(float(value))
    assert values[-1] < values[0]
    both = jax.jit(lambda p: (fn(lora_jax.merge(p), x), lora_jax.lora(fn)(p, x)))
    assert_close(*both(trained))


def test_rank_alpha_and_exclude_go_by_the_path():
    _, params, _ = setup()
    options = {"targets": QV[0], "init": drawn}
    lora_params = lora_jax.lorafy(params, {"c_attn/kernel": 3}, alpha={".*": 6.0}, **options)
    (f,) = lora_params.adapter.factors.values()
    assert (f.rank, float(f.scale)) == (3, 2.0)
    with pytest.raises(ValueError, match=r"matches only\n  c_attn/kernel: exclude"):
        lora_jax.lorafy(params, targets=QV[0], exclude="c_attn/kernel")
    with pytest.raises(ValueError, match=r"rank=13 .*kernel\[:, 0:12\]"):
        lora_jax.lorafy(params, 13, targets=QV[0])


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ("[:, 0:99]", "'0:99' is no part of axis 1, of size 36"),
        ("[:, 5:5]", "'5:5' is no part of axis 1"),
        ("[:, -99:]", "'-99:' is no part of axis 1"),
        ("[:, :, 1:2]", r"3 ranges for a weight of shape \(12, 36\)"),
        ("[0:4:2]", "'0:4:2' is no range"),
        ("[3, 0:4]", "'3' is no range"),
    ],
)
def test_bad_ranges_raise(ranges, message):
    _, params, _ = setup()
    with pytest.raises(ValueError, match=message):
        lora_jax.lorafy(params, 2, targets=f"c_attn/kernel{ranges}")


def test_ranges_where_they_have_no_meaning_raise():
    fn, params, x = setup()
    for argument in ("exclude", "full"):
        with pytest.raises(ValueError, match=f"{argument}=.*only targets may be parts"):
            lora_jax.lorafy(params, 2, **{"targets": ".*kernel", argument: "c_attn/kernel[0:2]"})
    with pytest.raises(ValueError, match=r"'c_attn/kernel' and 'c_attn/kernel\[0:4, :\]' overlap"):
        lora_jax.lorafy(params, 2, targets=["c_attn/kernel[0:4]", "c_attn/kernel"])
    good = adapted(params, targets=["c_attn/kernel[0:4]", "c_attn/kernel[4:8]"])
    f = good.adapter.factors["c_attn/kernel[4:8, :]"]
    factors = {**good.adapter.factors, "c_attn/kernel[3:7, :]": f}
    bad = dataclasses.replace(good, adapter=lora_jax.Adapter(factors))
    for use in (lora_jax.merge, lambda p: lora_jax.lora(fn)(p, x)):
        with pytest.raises(ValueError, match="overlap: an entry of a weight has one update"):
            use(bad)


def test_the_grammar_of_ranges():
    assert split_range("layers_[0-9]/kernel") == ("layers_[0-9]/kernel", None)
    assert split_range(".*[ab]") == (".*[ab]", None)
    assert split_range("w[0:2, :]") == ("w", "0:2, :")
    assert part_of("w[:]", {"w[:]": np.ones(3)}) == ("w[:]", ())  # a leaf of that very name
    assert part_of("w[0:2]", {"w": np.ones((4, 2))}) == ("w", (Range(0, 0, 2),))
    assert spell("w", (), 2) == "w"
    one, other = (Range(0, 0, 4),), (Range(1, 0, 4),)
    assert overlap(one, other)
    assert not overlap(one, (Range(0, 4, 6), *other))
