"""What fine-tuning changed, as a LoRA: against the truncated SVD in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, drawn, randomize_b, tolerance

import lora_jax

RNG = np.random.default_rng(0)


def floats(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def changed(tree, f):
    """Apply ``f`` to every leaf by NumPy."""
    return jax.tree.map(lambda x: jnp.asarray(f(np.asarray(x))), tree)


def add(x, *layers):
    """One in these layers of a stack, and zero in the others."""
    return np.isin(np.arange(len(x)), layers).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def noisy(x):
    return x + np.asarray(floats(*x.shape))


def planted(base, **options):
    """A model that differs from ``base`` by a LoRA, and that LoRA."""
    lora_params = randomize_b(lora_jax.lorafy(base, 2, init=drawn, **options))
    return lora_jax.merge(lora_params), lora_params


BASE = {
    "query": {"kernel": floats(9, 7), "bias": floats(7)},
    "layers": {"kernel": floats(3, 8, 6), "bias": floats(3, 6)},
    "attn": {"out": {"kernel": floats(2, 4, 6)}},
    "embed": {"embedding": floats(11, 6)},
}
LAYOUT = {"layers/kernel": "bio", "attn.*": "iio", "query/kernel": "io"}


def matrices(x, letters):
    """``[layers, in, out]`` in float64."""
    x = np.asarray(x, np.float64)
    if letters == "bio":
        return x
    return x.reshape(1, -1, x.shape[-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_planted_difference_is_found_again(dtype):
    base = changed(BASE, lambda x: x.astype(jnp.dtype(dtype)))
    wide = changed(base, lambda x: x.astype(np.float32))
    tuned, _ = planted(wide, targets=".*kernel", layout=LAYOUT)
    found = lora_jax.algebra.extract(base, tuned, 2, layout=LAYOUT)
    assert found.base is base
    assert {path: f.layout for path, f in found.adapter.factors.items()} == {
        "query/kernel": "io",
        "layers/kernel": "bio",
        "attn/out/kernel": "iio",
    }
    merged = lora_jax.merge(lora_jax.LoraParams(wide, found.adapter))
    assert_close(merged, tuned)


@pytest.mark.parametrize(("rank", "alpha"), [(1, None), (3, 16.0), (5, None)])
def test_no_matrix_of_that_rank_is_nearer(rank, alpha):
    tuned = changed(BASE, noisy)
    found = lora_jax.algebra.extract(BASE, tuned, rank, alpha=alpha, layout=LAYOUT, rest="ignore")
    merged = lora_jax.merge(found)
    for path, f in found.adapter.factors.items():
        *outer, _ = path.split("/")
        leaf = lambda tree, outer=outer: jax.tree.reduce(  # noqa: E731
            lambda _, x: x, {"kernel": _at(tree, outer)["kernel"]}
        )
        delta = matrices(leaf(tuned), f.layout) - matrices(leaf(BASE), f.layout)
        rest = matrices(leaf(tuned), f.layout) - matrices(leaf(merged), f.layout)
        tail = np.linalg.svd(delta, compute_uv=False)[:, rank:]
        assert np.linalg.norm(rest) == pytest.approx(np.sqrt((tail**2).sum()), rel=tolerance())
        assert float(f.scale) == pytest.approx(
            1 if alpha is None else alpha / rank, rel=tolerance()
        )
        a, b = np.asarray(f.a), np.asarray(f.b)  # the singular values are split evenly
        assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=tolerance())


def _at(tree, names):
    for name in names:
        tree = tree[name]
    return tree


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.99, 1.0])
def test_the_smallest_rank_keeps_the_energy_in_every_layer(energy):
    tuned = changed(BASE, noisy)
    options = {"layout": LAYOUT, "targets": ["query/kernel", "layers/kernel"], "rest": "ignore"}
    found = lora_jax.algebra.extract(BASE, tuned, energy=energy, **options)
    for path in ("query", "layers"):
        f = found.adapter.factors[f"{path}/kernel"]
        delta = matrices(tuned[path]["kernel"], f.layout) - matrices(BASE[path]["kernel"], f.layout)
        squares = np.linalg.svd(delta, compute_uv=False) ** 2
        shares = squares.cumsum(-1) / squares.sum(-1, keepdims=True)
        assert (shares[:, f.rank - 1] > energy - tolerance()).all()
        assert f.rank == 1 or (shares[:, f.rank - 2] < energy).any()


def test_small_weights_are_exact_and_ranks_go_by_pattern():
    tuned = {"head": {"kernel": floats(8, 2)}, "q": floats(6, 6)}
    base = changed(tuned, noisy)
    found = lora_jax.algebra.extract(base, tuned, {"q": 3, ".*": 4}, targets=".*")
    assert {path: f.rank for path, f in found.adapter.factors.items()} == {
        "head/kernel": 2,
        "q": 3,
    }
    found = lora_jax.algebra.extract(
        base, tuned, 1, targets=[lambda path, leaf: 2 * (path == "q"), "h.*"]
    )
    assert {path: f.rank for path, f in found.adapter.factors.items()}["q"] == 2
    with pytest.raises(ValueError, match=r"no pattern of the mapping matches 'head/kernel'"):
        lora_jax.algebra.extract(base, tuned, {"q": 3}, targets=".*")


def test_what_did_not_change_gets_no_factors():
    tuned, _ = planted(BASE, targets="query/kernel")
    found = lora_jax.algebra.extract(BASE, tuned, 4)  # and ambiguous layouts do not matter
    assert list(found.adapter.factors) == ["query/kernel"]
    stack = changed(BASE["layers"]["kernel"], lambda x: x + noisy(x) * add(x, 1))
    tuned = BASE | {"layers": BASE["layers"] | {"kernel": stack}}
    f = lora_jax.algebra.extract(BASE, tuned, energy=0.999, layout=LAYOUT).adapter.factors[
        "layers/kernel"
    ]
    assert not np.asarray(f.a)[0].any()  # layers that did not change have zeros, and no say


def test_parts_of_weights():

    def moved(*layers):
        stack = changed(BASE["layers"]["kernel"], lambda x: x + add(x, *layers))
        return BASE | {"layers": BASE["layers"] | {"kernel": stack}}

    tuned = moved(1, 2)
    options = {"targets": "layers/kernel[1:3]", "layout": LAYOUT}
    found = lora_jax.algebra.extract(BASE, tuned, 1, **options)
    assert list(found.adapter.factors) == ["layers/kernel[1:3, :, :]"]
    assert_close(lora_jax.merge(found), tuned)
    tuned = moved(0, 1, 2)
    with pytest.raises(ValueError, match=r"1 tensors changed that are no targets: layers/kernel\."):
        lora_jax.algebra.extract(BASE, tuned, 1, **options)
    with pytest.raises(ValueError, match=r"changed outside the part in targets="):
        lora_jax.algebra.extract(BASE, tuned, 1, rest="full", **options)
    options["targets"] = "layers/kernel[0:2]"
    tuned = moved(2)
    found = lora_jax.algebra.extract(BASE, tuned, 1, rest="full", **options)
    assert list(found.adapter.full) == ["layers/kernel"]


def test_what_else_changed_is_not_silent():
    tuned, _ = planted(BASE, targets="query/kernel")
    tuned["query"]["bias"] = changed(tuned["query"]["bias"], lambda x: x + 1)
    tuned["embed"]["embedding"] = changed(tuned["embed"]["embedding"], lambda x: x + 1)
    with pytest.raises(ValueError, match=r"2 tensors changed .*: embed/embedding, query/bias\. To"):
        lora_jax.algebra.extract(BASE, tuned, 2)
    ignored = lora_jax.algebra.extract(BASE, tuned, 2, rest="ignore")
    assert not ignored.adapter.full
    found = lora_jax.algebra.extract(BASE, tuned, 2, rest="full")
    assert list(found.adapter.full) == ["embed/embedding", "query/bias"]
    assert_close(lora_jax.merge(found), tuned)
    many = {str(k): floats(2) for k in range(10)} | {"q": floats(2, 2)}
    after = changed(many, lambda x: x + 1)
    with pytest.raises(ValueError, match=r"10 tensors .* and 2 more"):
        lora_jax.algebra.extract(many, after, 1)


def test_a_quantized_base_counts_as_what_it_stands_for():
    base = lora_jax.quant.quantize(BASE, "int8", targets="query/kernel")
    plain = lora_jax.quant.dequantize(base)
    tuned, _ = planted(plain, targets="query/kernel")
    found = lora_jax.algebra.extract(base, tuned, 2)
    assert_close(lora_jax.merge(found, quantized="dequantize"), tuned)


def test_misuse_is_explained():
    tuned, _ = planted(BASE, targets="query/kernel")

    def refused(error, message, *args, base=BASE, tuned=tuned, **options):
        with pytest.raises(error, match=message):
            lora_jax.algebra.extract(base, tuned, *args, **options)

    refused(ValueError, "rank=None and energy=None: expected one of the two")
    refused(ValueError, r"rank=2 and energy=0\.5: expected one", 2, energy=0.5)
    refused(TypeError, r"rank=2\.0: expected an int", 2.0)
    refused(TypeError, "rank=True: expected an int", True)
    refused(ValueError, "rank=0: expected at least 1", 0)
    refused(ValueError, r"energy=1\.5: expected a share", energy=1.5)
    refused(ValueError, r"alpha=-1: expected a finite number", 2, alpha=-1)
    refused(ValueError, "rest='drop': expected one of", 2, rest="drop")
    refused(ValueError, "base and tuned are equal", 2, tuned=BASE)
    refused(ValueError, "base has no arrays", 2, base={}, tuned={})
    refused(
        ValueError, r"only base has a leaf 'attn/out/kernel'", 2, tuned={"query": BASE["query"]}
    )
    refused(ValueError, r"only tuned has a leaf 'more'", 2, tuned=BASE | {"more": floats(1)})
    other = BASE | {"embed": {"embedding": floats(12, 6)}}
    refused(ValueError, r"shape \(11, 6\) in base and \(12, 6\) in tuned", 2, tuned=other)
    nans = BASE | {
        "query": changed(BASE["query"], lambda x: np.where(np.arange(7) == 2, np.nan, x))
    }
    refused(ValueError, "'query/kernel' is not finite in base or tuned", 2, tuned=nans)
    counts = {"q": floats(3, 3), "n": jnp.asarray(np.zeros(2, np.int32))}
    after = {"q": floats(3, 3), "n": jnp.asarray(np.ones(2, np.int32))}
    message = "'n' changed, and cannot train fully: dtype int32"
    refused(ValueError, message, 1, base=counts, tuned=after, rest="full")


def test_running_statistics_are_no_full_leaves():
    base = {"params": BASE, "batch_stats": {"norm": {"mean": floats(5)}}}
    tuned = changed(base, noisy)
    options = {"rank": 2, "layout": LAYOUT}
    message = r"batch_stats/norm/mean' \(in the collection 'batch_stats', not in 'params'\) changed"
    with pytest.raises(ValueError, match=message):
        lora_jax.algebra.extract(base, tuned, rest="full", **options)
    found = lora_jax.algebra.extract(BASE, tuned["params"], rest="full", **options)
    assert "query/bias" in found.adapter.full
