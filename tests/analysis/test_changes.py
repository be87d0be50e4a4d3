"""Spectra, ranks, amplification, intruders and relative changes: against dense float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import BASE, LAYOUT, dense, split
from helpers import array, error, normal, stack_by_numpy, tolerance

import lora_jax
from lora_jax import Adapter, Factors, LoraParams, Rows, analysis

CLOSE = {"rtol": 0, "atol": tolerance(length=64)}
EPS = 0.7
PLAIN = split(1, 2, alpha=4)
FEW = LoraParams(
    BASE, Adapter({k: PLAIN.adapter.factors[k] for k in ("transposed", "conv", "stack", "experts")})
)
DORA = split(2, 2, targets=("dense", "query", "conv", "stack"), dora=True)
DORA = LoraParams(
    BASE,
    Adapter(
        {
            key: dataclasses.replace(f, magnitude=f.magnitude * array(1.5))
            for key, f in DORA.adapter.factors.items()
        }
    ),
)
TABLE = {"embed": normal(7, (9, 6)), "bias": normal(8, (4,))}
ROWS = LoraParams(
    TABLE,
    Adapter(
        {"embed": Rows(normal(9, (3, 6)), array(2.0), "io", (1, 4, 8), 9)},
        {"bias": normal(10, (4,))},
    ),
)
WHOLE = split(4, 2, targets=("dense",), full=("one", "bias"))
CASES = {"plain": PLAIN, "dora": DORA, "rows": ROWS, "full": WHOLE}


def matrix(x, layout):
    """The matrices of an array with the axes of a weight, in float64: [*batch, in, out]."""
    groups = [[k for k, c in enumerate(layout) if c == role] for role in "bio"]
    batch, inputs, outputs = ([np.shape(x)[k] for k in group] for group in groups)
    x = np.asarray(x, np.float64).transpose([k for group in groups for k in group])
    return x.reshape(*batch, int(np.prod(inputs)), int(np.prod(outputs)))


def parts_of(x):
    """The update and the weight of every entry, as matrices."""
    found = {}
    for key, update in dense(x).items():
        f = x.adapter.factors.get(key)
        letters = f.layout if f is not None else LAYOUT.get(key)
        before = np.asarray(x.base[key], np.float64)
        if letters is None:
            found[key] = update.reshape(1, -1), before.reshape(1, -1)
            continue
        w, d = matrix(before, letters), matrix(update, letters)
        if f is not None and f.magnitude is not None:
            m = np.asarray(f.magnitude, np.float64).reshape(*w.shape[:-2], 1, -1)
            d = m * (w + d) / np.linalg.norm(w + d, axis=-2, keepdims=True) - w
        found[key] = d, w
    return found


def svd(x):
    return np.linalg.svd(x, full_matrices=False)


def norm(x):
    return np.linalg.norm(x, axis=(-2, -1))


def intruders(w, d, k, factor):
    (u0, _, vt0), (u, s, vt) = svd(w), svd(w + d)
    cosines = u.mT @ u0 if factor == "a" else vt @ vt0.mT
    return u[..., :k], s[..., :k], vt[..., :k, :], np.abs(cosines).max(-1)[..., :k]


@jax.jit
def measured(base, adapter):
    x = LoraParams(base, adapter)
    found = [f(x) for f in (analysis.spectra, analysis.effective_rank, analysis.stable_rank)]
    return *found, analysis.change_per_layer(x)


@pytest.mark.parametrize("case", CASES)
def test_singular_values_and_sizes_are_those_of_the_dense_update(case):
    x = CASES[case]
    spectra, entropy, stable, relative = jax.tree.map(np.asarray, measured(x.base, x.adapter))
    parts = parts_of(x)
    assert spectra.keys() == entropy.keys() == stable.keys() == parts.keys() - {"bias"}
    assert relative.keys() == parts.keys()
    for key, (d, w) in parts.items():
        size = norm(d) / norm(w)
        assert relative[key].shape == (() if key == "bias" else w.shape[:-2])
        np.testing.assert_allclose(relative[key], size.reshape(relative[key].shape), rtol=1e-4)
        if key == "bias":
            continue
        s = np.linalg.svd(d, compute_uv=False)[..., : spectra[key].shape[-1]]
        plain = key in x.adapter.factors and x.adapter.factors[key].magnitude is None
        assert s.shape[-1] == min(*d.shape[-2:], x.adapter.factors[key].rank if plain else 99)
        np.testing.assert_allclose(spectra[key] / s.max(), s / s.max(), **CLOSE)
        p = s / s.sum(-1, keepdims=True)
        np.testing.assert_allclose(entropy[key], np.exp(-(p * np.log(p)).sum(-1)), rtol=1e-4)
        np.testing.assert_allclose(stable[key], (s**2).sum(-1) / s[..., 0] ** 2, rtol=1e-4)


@pytest.mark.parametrize("x", [FEW, DORA], ids=["plain", "dora"])
def test_amplification_and_intruders_are_those_of_the_dense_weights(x):
    @jax.jit
    def run(base, adapter):
        x = LoraParams(base, adapter)
        key = jax.random.key(0)
        kinds = {"update": {}, "weight": {}, "random": {"key": key}}
        found = {k: analysis.amplification(x, directions=k, **more) for k, more in kinds.items()}
        both = [analysis.intruder_dimensions(x, k=3, eps=EPS, factor=f) for f in "ab"]
        return found, both

    found, both = jax.tree.map(np.asarray, run(x.base, x.adapter))
    numbers = []
    for key, (d, w) in parts_of(x).items():
        (u, _, vt), (u0, _, vt0) = svd(d), svd(w)
        r = min(2, *d.shape[-2:])
        sides = {"update": (u, vt), "weight": (u0, vt0)}
        for kind, (left, right) in sides.items():
            one = found[kind][key]
            inner = norm(left[..., :r].mT @ w @ right[..., :r, :].mT)
            np.testing.assert_allclose(one.projected, inner, rtol=1e-3)
            np.testing.assert_allclose(one.factor, norm(d) / inner, rtol=1e-3)
            np.testing.assert_allclose(one.weight, norm(w), rtol=1e-5)
        largest = np.linalg.svd(w, compute_uv=False)[..., :r]
        drawn = found["random"][key].projected  # of r random directions, of any weight
        assert (drawn > 0).all()
        assert (drawn < np.linalg.norm(largest, axis=-1)).all()
        for factor, each in zip("ab", both, strict=True):
            _, s, _, cosines = intruders(w, d, 3, factor)
            np.testing.assert_allclose(each[key].values, s, rtol=1e-4)
            np.testing.assert_allclose(each[key].cosines, cosines, atol=1e-3)
            assert np.array_equal(each[key].found, each[key].cosines < EPS)
            numbers.append(each[key].number.ravel())
    numbers = np.concatenate(numbers)
    assert 0 in numbers, "some weights have none"
    assert numbers.max() > 0, "and some have intruders"


@pytest.mark.parametrize("scale", [0.0, 0.25])
def test_reduced_intruders_are_a_share_of_what_they_were(scale):
    x = LoraParams(BASE, Adapter({k: FEW.adapter.factors[k] for k in ("conv", "stack")}))
    parts = parts_of(x)
    y = analysis.reduce_intruders(x, scale=scale, k=3, eps=EPS)
    after, grown = parts_of(y), 0
    for key, (d, w) in parts.items():
        u, s, vt, cosines = intruders(w, d, 3, "b")
        gone = (1 - scale) * s * (cosines < EPS)
        expected = d - (u * gone[..., None, :]) @ vt
        assert error(jnp.asarray(after[key][0], jnp.float32), expected) < 1e-3
        rank = y.adapter.factors[key].rank
        number = (cosines < EPS).reshape(-1, cosines.shape[-1]).any(0).sum()
        assert rank == x.adapter.factors[key].rank + number
        assert (y.adapter.factors[key] is x.adapter.factors[key]) == (number == 0)
        grown += number
    assert grown
    same = analysis.reduce_intruders(x, scale=scale, targets="conv", k=3, eps=EPS)
    assert same.adapter.factors["stack"] is x.adapter.factors["stack"]


def test_a_frozen_adapter_belongs_to_the_weight():
    under = split(5, 2, targets=("dense",))
    x = LoraParams(under, split(6, 2, targets=("dense",)).adapter)
    merged = LoraParams(lora_jax.merge(under), x.adapter)
    for f in (analysis.amplification, analysis.change_per_layer):
        np.testing.assert_allclose(f(x)["dense"], f(merged)["dense"], rtol=1e-5)


def test_parts_are_selected_by_their_keys_or_by_their_weight():
    base = {"w": normal(0, (6, 8)), "v": normal(1, (4, 4))}
    x = split(1, 2, base, ["w[:, 0:3]", "w[:, 4:8]", "v"], layout=None)
    assert analysis.spectra(x, targets="w").keys() == {"w[:, 0:3]", "w[:, 4:8]"}
    found = analysis.change_per_layer(x, targets=["v", "w[:, 4:8]"])
    assert found.keys() == {"v", "w[:, 4:8]"}
    expected = np.linalg.norm(dense(x)["w[:, 4:8]"]) / np.linalg.norm(base["w"][:, 4:8])
    np.testing.assert_allclose(found["w[:, 4:8]"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"targets='w\[:, 0:2\]': the adapter has no entry for th"):
        analysis.spectra(x, targets="w[:, 0:2]")


def test_two_checkpoints_are_compared_by_what_is_extracted():
    base = {"q": {"kernel": normal(0, (6, 4))}, "norm": {"bias": normal(1, (4,))}}
    tuned = jax.tree.map(lambda w: array(np.asarray(w) + normal(2, w.shape)), base)
    x = lora_jax.algebra.extract(base, tuned, energy=1.0, rest="full")
    d = np.asarray(tuned["q"]["kernel"], np.float64) - np.asarray(base["q"]["kernel"])
    s = np.linalg.svd(d, compute_uv=False)
    np.testing.assert_allclose(analysis.spectra(x)["q/kernel"], s, rtol=1e-4)
    ratio = np.linalg.norm(d) / np.linalg.norm(base["q"]["kernel"])
    found = analysis.change_per_layer(x)
    np.testing.assert_allclose(found["q/kernel"], ratio, rtol=1e-4)
    assert found.keys() == {"q/kernel", "norm/bias"}


def test_a_stack_says_how_to_take_one_and_runs_under_vmap():
    xs = [split(k, 2, targets=("dense", "stack")) for k in (1, 2)]
    stacked = stack_by_numpy(xs)
    with pytest.raises(ValueError, match=r"spectra: x is a stack: .*lora_jax.many.unstack"):
        analysis.spectra(stacked)
    for one, x in zip(lora_jax.many.unstack(stacked), xs, strict=True):
        assert analysis.spectra(one).keys() == x.adapter.factors.keys()
    both = jax.jit(jax.vmap(analysis.spectra))(stacked.adapter)
    for n, x in enumerate(xs):
        for key, (d, _) in parts_of(x).items():
            s = np.linalg.svd(d, compute_uv=False)[..., :2]
            np.testing.assert_allclose(both[key][n], s, rtol=1e-4)


def test_no_update_of_a_weight_is_built_for_its_spectrum():
    x = split(1, 2, targets=("dense", "query", "conv"))
    for f in (analysis.spectra, analysis.effective_rank, analysis.stable_rank):
        shapes = [v.aval.shape for e in jax.make_jaxpr(f)(x.adapter).eqns for v in e.outvars]
        assert shapes
        assert not {(6, 8), (12, 6)} & {shape[-2:] for shape in shapes}


def test_weights_are_ordered_by_module_and_layer():
    base = {f"layers_{k}": {n: {"kernel": np.ones((2, 2), "f4")} for n in "qv"} for k in (10, 2)}
    factors = {
        f"layers_{k}/{n}/kernel": Factors(np.ones((2, 1), "f4"), np.ones((1, 2), "f4"), 1.0, "io")
        for k in (10, 2)
        for n in "qv"
    }
    found = analysis.change_per_layer(LoraParams(base, Adapter(factors)))
    expected = [f"layers_{k}/{n}/kernel" for n in "qv" for k in (2, 10)]
    assert list(found) == expected
    base["layers_2"]["q"]["kernel"] *= 0
    found = analysis.change_per_layer(LoraParams(base, Adapter(factors)))
    assert np.isinf(found["layers_2/q/kernel"])


def test_zero_updates_have_no_directions():
    fresh = lora_jax.lorafy(BASE, 2, targets="dense")
    assert analysis.effective_rank(fresh)["dense"] == 0
    assert analysis.stable_rank(fresh)["dense"] == 0
    assert analysis.change_per_layer(fresh)["dense"] == 0
    with pytest.raises(ValueError, match="amplification: the update of 'dense' is zero, and has"):
        analysis.amplification(fresh)
    f = PLAIN.adapter.factors["stack"]
    b = np.array(f.b)
    b[1] = 0
    some = LoraParams(BASE, Adapter({"stack": dataclasses.replace(f, b=array(b))}))
    with pytest.raises(ValueError, match=r"the update of 'stack' is zero \(batch entries \[\[1\]"):
        analysis.amplification(some)
    doubled = PLAIN + PLAIN  # of rank 4 in shape, and 2 in fact
    one, two = (analysis.amplification(x, targets="one")["one"] for x in (PLAIN, doubled))
    np.testing.assert_allclose(two.factor, 2 * one.factor, rtol=1e-3)


def test_misuse_is_explained():
    adapter, x = PLAIN.adapter, PLAIN
    for f in (analysis.amplification, analysis.change_per_layer, analysis.intruder_dimensions):
        with pytest.raises(TypeError, match=r"x is an Adapter, .*pass lora_jax.LoraParams\(base"):
            f(adapter)
    with pytest.raises(TypeError, match=r"'conv' has a DoRA magnitude, .*pass lora_jax.LoraParam"):
        analysis.spectra(DORA.adapter)
    with pytest.raises(TypeError, match=r"'bias' is a full leaf, .*pass lora_jax.LoraParams\(base"):
        analysis.spectra(WHOLE.adapter)
    with pytest.raises(ValueError, match=r"selects nothing. It matches only\n  bias: a vector"):
        analysis.spectra(WHOLE, targets="bias")
    with pytest.raises(ValueError, match=r"embed: rows of a table: they are looked up"):
        analysis.intruder_dimensions(ROWS)
    with pytest.raises(ValueError, match="spectra: targets='kernel' selects nothing"):
        analysis.spectra(adapter, targets="kernel")
    pissa = lora_jax.lorafy(BASE, 2, targets="dense", init="pissa")
    with pytest.raises(ValueError, match="'dense' belongs to what its initializer left"):
        analysis.spectra(pissa)
    with pytest.raises(TypeError, match="spectra: x is int"):
        analysis.spectra(3)
    assert analysis.spectra(Adapter({})) == {}
    with pytest.raises(ValueError, match="rank=3: the update of 'dense' has 2 directions: pass"):
        analysis.amplification(x, rank=3, targets="dense")
    with pytest.raises(ValueError, match="'one' is a full leaf, and has no rank: pass rank="):
        analysis.amplification(WHOLE, targets="one")
    assert analysis.amplification(WHOLE, targets="one", rank=4)["one"].factor > 0
    with pytest.raises(ValueError, match="directions='base': expected one of"):
        analysis.amplification(x, directions="base")
    with pytest.raises(TypeError, match="directions='random' and key=None: expected a PRNG key"):
        analysis.amplification(x, directions="random")
    with pytest.raises(ValueError, match="intruder_dimensions: eps=0: expected a cosine"):
        analysis.intruder_dimensions(x, eps=0)
    with pytest.raises(ValueError, match="intruder_dimensions: k=0: expected at least 1"):
        analysis.intruder_dimensions(x, k=0)
    with pytest.raises(ValueError, match="factor='u': expected 'a' or 'b'"):
        analysis.intruder_dimensions(x, factor="u")
    with pytest.raises(ValueError, match="reduce_intruders: scale=2: expected a share"):
        analysis.reduce_intruders(x, scale=2)
    with pytest.raises(ValueError, match="reduce_intruders: 'dense' has a DoRA magnitude"):
        analysis.reduce_intruders(DORA, scale=0, targets="dense")
    with pytest.raises(ValueError, match="matches only\n  one: a full leaf"):
        analysis.reduce_intruders(WHOLE, scale=0, targets="one")
    one = LoraParams(BASE, Adapter({"one": adapter.factors["one"]}))
    with pytest.raises(TypeError, match="reduce_intruders: x is traced"):
        jax.jit(lambda x: analysis.reduce_intruders(x, scale=0))(one)


def test_numbers_that_are_not_finite_are_named():
    f = PLAIN.adapter.factors["dense"]
    for value in (np.nan, np.inf):
        b = np.array(f.b)
        b[0, 0] = value
        x = LoraParams(
            BASE, Adapter({**PLAIN.adapter.factors, "dense": dataclasses.replace(f, b=b)})
        )
        with pytest.raises(ValueError, match="spectra: x has NaNs or infinities in b of 'dense'"):
            analysis.spectra(x)
        assert analysis.spectra(x, targets="one").keys() == {"one"}  # the remedy
        for compare in (analysis.distance, analysis.subspace_similarity):
            with pytest.raises(
                ValueError, match="operand 1 has NaNs or infinities in b of 'dense'"
            ):
                compare(PLAIN, x)
        with pytest.raises(ValueError, match="similarity: operand 0 has NaNs"):
            analysis.similarity([x])
    base = BASE | {"one": BASE["one"] * np.float32(np.nan)}
    with pytest.raises(ValueError, match="weight of 'one' in the base is not finite"):
        analysis.intruder_dimensions(LoraParams(base, PLAIN.adapter), targets="one")


def test_a_full_leaf_of_doubtful_axes_names_a_remedy_that_works():
    base = {"conv": normal(0, (3, 4, 6)), "w": normal(1, (4, 4))}
    x = LoraParams(base, Adapter({}, {"conv": normal(2, (3, 4, 6)), "w": normal(3, (4, 4))}))
    assert analysis.spectra(x).keys() == {"w"}
    with pytest.raises(ValueError, match=r"axes are ambiguous: lora_jax.algebra.extract\(base"):
        analysis.spectra(x, targets="conv")
    layout = {"conv": "iio"}
    y = lora_jax.algebra.extract(
        base, lora_jax.merge(x), energy=1.0, rest="full", layout=layout, targets="conv"
    )
    d = np.asarray(x.adapter.full["conv"], np.float64) - np.asarray(base["conv"])
    s = np.linalg.svd(d.reshape(12, 6), compute_uv=False)
    np.testing.assert_allclose(analysis.spectra(y, targets="conv")["conv"], s, rtol=1e-4)
