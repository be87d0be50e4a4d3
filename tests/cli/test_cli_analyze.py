"""Analyzing adapters, by the command line."""

import dataclasses
import sys

import jax
import numpy as np
import pytest
from cli_files import DORA, PARAMS, adapted, rank_of, updates
from helpers import tolerance

import lora_jax
from lora_jax._weights.paths import flatten
from lora_jax.cli._read.match import canonical
from lora_jax.io import peft, safetensors

WEIGHTS = {canonical(p): np.asarray(x, np.float64) for p, x in flatten(PARAMS)[0].items()}


def rows_of(found):
    return {canonical(row["path"]): row for row in found["entries"]}


@pytest.mark.parametrize(
    ("name", "base"), [("adapter", "model"), ("native", "model"), ("orbax", "params")]
)
def test_analyze_measures_updates_beside_weights(name, base, cli):
    found = rows_of(cli("analyze", name, "--base", base, "--json"))
    expected = {canonical(p): x for p, x in updates(adapted({}, 2)).items()}
    assert found.keys() == expected.keys()
    for path, d in expected.items():
        row, w = found[path], WEIGHTS[path]
        u, s, vt = np.linalg.svd(d, full_matrices=False)
        assert row["spectrum"] == pytest.approx(s[:2], rel=1e-9)
        assert row["rank"] == 2
        assert row["effective_rank"] == pytest.approx(rank_of(d), rel=1e-7)
        assert row["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-9)
        assert row["norm"] == pytest.approx(np.linalg.norm(d), rel=1e-9)
        assert row["relative"] == pytest.approx(np.linalg.norm(d) / np.linalg.norm(w), rel=1e-9)
        inner = np.linalg.norm(u[:, :2].T @ w @ vt[:2].T)
        assert row["amplification"] == pytest.approx(np.linalg.norm(d) / inner, rel=1e-9)
        new, old = (np.linalg.svd(x, full_matrices=False)[2] for x in (w + d, w))
        cosines = np.abs(new @ old.T).max(-1)
        assert row["intruders"] == (cosines < 0.5).sum()


def test_analyze_shows_a_table(cli):
    text = cli("analyze", "adapter", "--base", "model", "--with", "other")
    header, *lines = text.splitlines()
    assert header.split()[:5] == ["path", "rank", "eff.", "stable", "|dW|"]
    assert len(lines) == 4
    assert all(line.startswith("model.layers.") for line in lines)
    assert len(cli("analyze", "adapter", "--targets", ".*q_proj").splitlines()) == 3


def test_analyze_measures_overlaps(cli):
    one, other = (adapted({}, 2), adapted({}, {".*q_proj.*": 3, ".*": 2}, seed=7))
    phi = lora_jax.analysis.subspace_similarity(one.adapter, other.adapter, factor="b")
    cosines = lora_jax.analysis.similarity([one.adapter, other.adapter], per_weight=True)
    pairs = [("adapter", "other"), ("native", "other_native"), ("bare", "other")]
    for words in pairs:
        found = rows_of(cli("analyze", words[0], "--with", words[1], "--json"))
        for path, expected in phi.items():
            row = found[canonical(path)]
            np.testing.assert_allclose(row["phi_b"], expected, atol=tolerance())
            cosine = pytest.approx(float(cosines[path][0, 1]), abs=tolerance())
            assert row["cosine"] == cosine


def test_analyze_measures_dora_and_full_leaves_against_the_model(cli):
    expected = adapted(DORA, 2, seed=3)
    for words in (("dora", "--base", "model"), ("dora_native", "--base", "params")):
        found = rows_of(cli("analyze", *words, "--json"))
        for path, d in updates(expected).items():
            f, w = expected.adapter.factors[path], WEIGHTS[canonical(path)]
            new = (w + d) / np.linalg.norm(w + d, axis=0) * np.asarray(f.magnitude, np.float64)
            row = found[canonical(path)]
            assert row["norm"] == pytest.approx(np.linalg.norm(new - w), rel=1e-5)
            assert row["effective_rank"] == pytest.approx(rank_of(new - w), rel=1e-4)
        score = found[canonical("score/kernel")]
        assert score["norm"] == pytest.approx(np.sqrt(24), rel=tolerance())
    text = cli("analyze", "dora")
    assert text.endswith("DoRA and full leaves are measured against the model: pass --base\n")
    assert "spectrum" not in text
    found = rows_of(cli("analyze", "more_native", "--base", "params", "--json"))
    row = found["model.embed_tokens"]
    assert (row["rank"], row["amplification"], len(row["spectrum"])) == (2, None, 2)
    bias = found["model.layers.0.self_attn.q_proj.bias"]
    assert bias["norm"] == pytest.approx(np.sqrt(8), rel=tolerance())


def test_zero_and_infinite_numbers_are_null(cli):
    fresh = lora_jax.lorafy(PARAMS, 2, targets=".*q_proj/kernel")
    peft.save("fresh", fresh)
    for row in cli("analyze", "fresh", "--base", "model", "--json")["entries"]:
        assert (row["norm"], row["relative"], row["amplification"]) == (0, 0, None)
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    full = lora_jax.lorafy(zeros, 1, targets=".*q_proj/kernel", full=".*bias")
    adapter = lora_jax.Adapter(
        full.adapter.factors, {p: x + 1 for p, x in full.adapter.full.items()}
    )
    safetensors.save("over_zeros", lora_jax.LoraParams(zeros, adapter))
    lora_jax.io.orbax.save_params("zeros", zeros)
    found = rows_of(cli("analyze", "over_zeros", "--base", "zeros", "--json"))
    assert found["model.layers.0.self_attn.q_proj.bias"]["relative"] is None


def test_stacked_weights_have_a_number_for_each_layer(cli):
    base = {"w": np.random.default_rng(0).normal(size=(3, 6, 4)).astype("f4")}
    x = lora_jax.lorafy(base, 2, targets="w", layout={"w": "bio"})
    b = np.random.default_rng(1).normal(size=(3, 2, 4)).astype("f4")
    f = dataclasses.replace(x.adapter.factors["w"], b=b)
    safetensors.save("stacked", lora_jax.LoraParams(base, lora_jax.Adapter({"w": f})))
    lora_jax.io.orbax.save_params("base", base)
    words = ("analyze", "stacked", "--base", "base", "--with", "stacked")
    (row,) = cli(*words, "--json")["entries"]
    names = ("effective_rank", "stable_rank", "relative", "amplification", "intruders")
    assert all(np.shape(row[name]) == (3,) for name in names)
    assert np.shape(row["phi_a"]) == (3, 2, 2)
    text = cli(*words)
    assert "means over the layers" in text
    assert f"{np.mean(row['relative']):.3g}" in text


def test_figures_are_vectors_with_text(cli, here):
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra plot, is not installed")
    text = cli("analyze", "adapter", "--base", "model", "--with", "other", "--plot", "figures")
    names = ["change.svg", "spectra.svg", "subspaces_a.svg", "subspaces_b.svg"]
    assert sorted(p.name for p in (here / "figures").iterdir()) == names
    assert all(name in text for name in names)
    for name in names:
        drawn = (here / "figures" / name).read_text()
        assert "<text" in drawn
        assert "q_proj" in drawn
    cli("analyze", "adapter", "--plot", "figures", "--overwrite")
    assert [p.name for p in (here / "figures").iterdir()] == ["spectra.svg"]


def test_refusals_leave_no_files(refused, here, monkeypatch):
    refused("analyze", "model", match="model is a model or a file of tensors, expected an adapter")
    refused("analyze", "adapter", "--base", "other", match="other is an adapter, expected a model")
    refused("analyze", "adapter", "--targets", "x", match="--targets x selects nothing")
    refused("analyze", "native", "--base", "tuned", match="native was trained on other weights")
    refused("analyze", "dora", "--plot", "x", "--targets", "score.*", match="to draw: pass --base")
    refused("analyze", "adapter", "--plot", "other", match="other exists: pass --overwrite")
    refused("analyze", "adapter", "--plot", "other", "--overwrite", match="other holds adapter_")
    other = {"q": {"kernel": np.ones((6, 8), "f4")}}
    safetensors.save("elsewhere", lora_jax.lorafy(other, 2))
    refused("analyze", "native", "--with", "elsewhere", match="adapt no weight in common: the one")
    wide = jax.tree.map(lambda x: np.ones([2 * n for n in x.shape], "f4"), PARAMS)
    safetensors.save("wide", lora_jax.lorafy(wide, 2, targets=".*q_proj/kernel"))
    refused(
        "analyze", "native", "--with", "wide", match="of different bases: 'model/.* has the shape"
    )
    safetensors.save("wide_bare", lora_jax.lorafy(wide, 2, targets=".*q_proj/kernel").adapter)
    match = "of different bases: 'model.layers.0.self_attn.q_proj' has shape"
    refused("analyze", "bare", "--with", "wide_bare", match=match)
    moved = jax.tree.map(lambda x: x + 1, PARAMS)
    x = lora_jax.lorafy(moved, 2, targets=".*q_proj/kernel")
    safetensors.save("moved", x, content=True)
    refused("analyze", "native", "--with", "moved", match="has the contents .* in one and")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("analyze", "adapter", "--plot", "x", match=r"matplotlib, which is not installed: pip")


def test_a_number_that_is_not_finite_is_refused(refused):
    from cli_files import damage

    def change(found):
        name = next(name for name in found if "lora_B" in name)
        found[name][0, 0] = np.nan

    damage("adapter", change)
    refused("analyze", "adapter", match="NaN|not finite")
