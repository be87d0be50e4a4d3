"""Comparing adapters and models, by the command line."""

import json

import numpy as np
import pytest
import safetensors.numpy as library
from cli_files import EQUAL, PARAMS, PLAIN, adapted, floats, updates
from helpers import drawn, randomize_b, tolerance

import lora_jax
from lora_jax.cli import main
from lora_jax.cli._read.match import canonical
from lora_jax.io import peft, safetensors


def test_diff_of_adapters_is_that_of_their_updates(cli):
    one = {canonical(p): x for p, x in updates(adapted({}, 2)).items()}
    ranks = {".*q_proj.*": 3, ".*": 2}
    two = {canonical(p): x for p, x in updates(adapted({}, ranks, seed=7)).items()}
    found = cli("diff", "adapter", "other", "--json", status=1)
    assert not found["equal"]
    for row in found["entries"]:
        x, y = one[row["path"]], two[row["path"]]
        largest = max(np.linalg.norm(x), np.linalg.norm(y))
        assert row["relative"] == pytest.approx(np.linalg.norm(x - y) / largest, rel=1e-9)
        cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
        assert row["cosine"] == pytest.approx(cosine, rel=1e-7)
        assert row["ranks"] == [2, 3 if "q_proj" in row["path"] else 2]
    text = cli("diff", "adapter", "other", "--top", "1", status=1)
    assert text.count("q_proj") + text.count("v_proj") == 1
    assert "0 of 4 entries of both are equal" in text
    assert cli("diff", "native", "orbax") == "equal\n"
    assert cli("diff", "adapter", "bare", "--json")["equal"]
    assert cli("diff", "adapter", "other", "--quiet", status=1) == ""


def test_diff_sees_the_same_update_in_other_factors(cli):
    lora_params = adapted({}, 2)
    factors = {
        path: f.map(lambda name, x: {"a": x * 3, "b": x / 3}.get(name, x))
        for path, f in lora_params.adapter.factors.items()
    }
    safetensors.save("scaled", lora_jax.Adapter(factors))
    found = cli("diff", "native", "scaled", "--json", status=1)
    assert max(row["relative"] for row in found["entries"]) < tolerance()
    cli("diff", "native", "scaled", *EQUAL)


def test_diff_of_an_adapter_with_more_entries_is_not_equal(cli):
    adapter = adapted({}, 2).adapter
    *most, last = adapter.factors
    safetensors.save("fewer", lora_jax.Adapter({path: adapter.factors[path] for path in most}))
    for pair, side in (
        (("native", "fewer"), "only_in_first"),
        (("fewer", "native"), "only_in_second"),
    ):
        found = cli("diff", *pair, "--json", status=1)
        assert not found["equal"]
        assert all(row["equal"] for row in found["entries"])
        assert list(map(canonical, found[side])) == [canonical(last)]


def test_diff_of_magnitudes_wholes_and_what_one_has_only(cli):
    found = cli("diff", "adapter", "dora", "--json", status=1)
    assert found["only_in_second"] == ["score.weight"]
    assert all(row["relative"] is None and not row["equal"] for row in found["entries"])
    assert "only in dora: score.weight" in cli("diff", "adapter", "dora", status=1)
    lora_params = safetensors.load("dora_native", PARAMS)
    f = lora_params.adapter.factors["model/layers/0/self_attn/q_proj/kernel"]
    f = f.map(lambda name, x: x * (1.5 if name == "magnitude" else 1.0))
    factors = lora_params.adapter.factors | {"model/layers/0/self_attn/q_proj/kernel": f}
    full = {path: x * 2 for path, x in lora_params.adapter.full.items()}
    safetensors.save("changed", lora_jax.Adapter(factors, full))
    rows = cli("diff", "dora_native", "changed", "--json", status=1)["entries"]
    relative = {row["path"]: row["relative"] for row in rows if not row["equal"]}
    assert relative == pytest.approx(
        {"model/layers/0/self_attn/q_proj/kernel": 1 / 3, "score/kernel": 0.5}, rel=tolerance()
    )
    other = {"model": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": floats(9, 8)}}}}}}
    safetensors.save("wide", randomize_b(lora_jax.lorafy(other, 2)))
    text = cli("diff", "native", "wide", status=1)
    assert "other shape" in text
    whole = lora_jax.Adapter({}, {"model/layers/0/self_attn/q_proj/kernel": floats(8, 8)})
    safetensors.save("whole", whole)
    cli("diff", "native", "whole", status=1)


def test_diff_of_one_adapter_in_two_formats_is_equal(cli, refused):
    for name in ("dora", "more"):  # a head in full, rows, biases
        for pair in ((name, f"{name}_native"), (f"{name}_native", name)):
            assert cli("diff", *pair, "--like", "params") == "equal\n"
    refused("diff", "more", "more_native", match="needs what is in the base's .*: pass --like")
    cli("diff", "dora", "other_native", status=1)
    params = {"layers": {"q": {"kernel": floats(3, 8, 6)}, "v": {"kernel": floats(3, 8, 6)}}}
    options = {"targets": [".*q/kernel", ".*v/kernel[:, :, 0:4]"], "layout": {".*": "bio"}}
    lora_params = randomize_b(lora_jax.lorafy(params, 2, init=drawn, **options))
    names = {"layers/(.*)": r"layers.{layer}.\1"}
    peft.save("stacked", lora_params, names=names)
    safetensors.save("stacked_native", lora_params)
    pair = ("stacked", "stacked_native", "--names", json.dumps(names))
    assert cli("diff", *pair) == "equal\n"
    cli("convert", "stacked", "theirs", "--to", "safetensors")
    assert cli("diff", "theirs", *pair[1:]) == "equal\n"
    safetensors.save("alone", lora_params.adapter)
    refused("diff", pair[0], "alone", *pair[2:], match="no record of its base.* pass --like")
    assert cli("diff", pair[0], "alone", *pair[2:], "--like", "stacked_native") == "equal\n"


def test_diff_by_names_says_so(here, capsys):
    safetensors.save("residual", lora_jax.lorafy(PARAMS, 2, init="pissa", **PLAIN))
    assert main(["diff", "residual", "adapter"]) == 1
    out, err = capsys.readouterr()
    assert "0 of 4 entries" in out
    assert "note: compared by names, as one of them cannot be written for PEFT" in err


@pytest.mark.parametrize("pair", [("model", "tuned"), ("params", "tuned_params")])
def test_diff_of_models(pair, cli):
    expected = {canonical(p): x for p, x in updates(adapted({}, 2)).items()}
    found = cli("diff", *pair, "--json", status=1)
    assert len(found["entries"]) == 10
    for row in found["entries"]:
        x = expected.get(canonical(row["path"]))
        assert row["equal"] == (x is None)
        if x is None:
            assert row["max"] == row["relative"] == 0
        else:
            largest = np.abs(x).max()  # rounded where it was added to weights of up to 4
            assert row["max"] == pytest.approx(largest, abs=tolerance() * (4 + largest))
    text = cli("diff", *pair, status=1)
    assert "6 of 10 entries of both are equal" in text
    assert cli("diff", pair[0], pair[0]) == "equal\n"
    cli("diff", *pair, "--tolerance", "10")


def test_diff_of_types_shapes_and_nans(cli):
    one = {"a": np.ones(3, np.float32), "n": np.arange(3), "x": np.array([np.nan, 1])}
    two = {"a": np.ones(3, "float16"), "n": np.arange(3), "x": np.array([np.nan, 1]), "y": one["a"]}
    library.save_file(one, "one")
    library.save_file(two, "two")
    found = cli("diff", "one", "two", "--json", status=1)
    assert {row["path"]: row["equal"] for row in found["entries"]} == {
        "a": False,
        "n": True,
        "x": True,
    }
    assert found["only_in_second"] == ["y"]
    assert "float32 float16" in cli("diff", "one", "two", status=1)
    library.save_file({**one, "a": np.ones(4, np.float32)}, "wider")
    assert "3 4" in cli("diff", "one", "wider", status=1)


def test_diff_refuses(refused):
    refused("diff", "adapter", "model", match="one is an adapter, and one a model")
    refused("diff", "adapter", "nowhere", match="no such file or folder")
    refused("diff", "adapter", "other", "--tolerance", "-1", match="expected a number, at least 0")
