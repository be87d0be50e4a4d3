"""Merging adapters into a model, by the command line."""

import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from cli_files import DORA, EQUAL, MORE, PARAMS, adapted, floats, tensors_of, updates
from helpers import assert_close, randomize_b

import lora_jax
from lora_jax.cli._read.match import canonical
from lora_jax.io import _files, hf, peft, safetensors
from lora_jax.io.hf import _shards

TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    "name", ["adapter", "native", "orbax", "bare", "dora", "dora_native", "more"]
)
def test_merge_writes_what_merge_computes(name, cli):
    options = {"dora": DORA, "more": MORE}.get(name.split("_")[0], {})
    lora_params = adapted(options, 2, seed=3 if options else 1)
    full = {p: x + 1 for p, x in lora_params.adapter.full.items()}
    adapter = lora_jax.Adapter(lora_params.adapter.factors, full)
    expected = lora_jax.merge(lora_jax.LoraParams(PARAMS, adapter))
    found = cli("merge", "model", name, "out", "--json")
    merged = hf.load("out", expected)
    assert_close(merged, expected)
    changed = sum(
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(expected), strict=True)
    )
    assert found["tensors_changed"] == changed
    assert found["files"] == ["model.safetensors"]


def test_merge_of_what_was_peft_s(cli):
    cli("convert", "dora", "there", "--to", "orbax")
    cli("merge", "model", "there", "one")
    cli("merge", "model", "dora", "two")
    cli("merge", "model", "more_native", "three", "--like", "params")
    cli("merge", "model", "more", "four")
    assert cli("diff", "one", "two") == cli("diff", "three", "four", *EQUAL) == "equal\n"


def test_layers_that_are_stacked_in_the_middle(cli):
    """The layouts of an adapter's own factors tell which axis has the layers."""
    mlp = {"wi": floats(6, 3, 8), "wo": floats(8, 3, 6)}
    params = {"layers": {k: {"kernel": x} for k, x in mlp.items()}}
    axes = {"layout": {".*kernel": "ibo"}}
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets=".*", **axes))
    names = {r"layers/(w.)": r"layers.{layer}.\1"}
    Path("names.json").write_text(json.dumps(names))
    hf.save("stacked", params, hf.Family(names, **axes), config={"model_type": "own"})
    safetensors.save("own", lora_params)
    peft.save("theirs", lora_params, names=names)
    cli("convert", "own", "there", "--to", "peft", "--names", "names.json")
    assert cli("diff", "there", "theirs") == "equal\n"
    cli("merge", "stacked", "own", "one", "--names", "names.json")
    cli("merge", "stacked", "theirs", "two")
    assert cli("diff", "one", "two", *EQUAL) == "equal\n"


def test_square_experts_of_other_names(cli, refused):
    """The order of their wrappers and the axis that is read are known by their own adapter only."""
    params = {"moe": {name: np.asarray(floats(3, 4, 4)) for name in ("up", "down")}}
    hf.save("experts", params, hf.Family(layout={".*": "bio"}), config={"model_type": "own"})
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets=".*", layout={".*": "bio"}))
    safetensors.save("own.safetensors", lora_params.adapter)
    peft.save("theirs", lora_params, parameter_order=("up", "down"))
    order = ("--parameter-order", "up, down")
    cli("merge", "experts", "own.safetensors", "one", *order)
    assert_close(
        tensors_of("one"), {f"moe.{k}": x for k, x in lora_jax.merge(lora_params)["moe"].items()}
    )
    for words in (("inspect", "theirs"), ("diff", "theirs", "own.safetensors")):
        refused(*words, match=r"is not known: pass --parameter-order A,B$")
        cli(*words, *order)
    cli("convert", "theirs", "back.safetensors", "--to", "safetensors", *order)
    refused("merge", "experts", "theirs", "two", match=r"pass --parameter-order A,B$")
    words = ("experts", "theirs", "two", *order)
    refused("merge", *words, match=r"""is square, .* --layout '{"moe/(up|down)": "bio"}'""")
    Path("axes.json").write_text('{"moe/.*": "bio"}')
    cli("verify", "theirs", "experts", *order, "--layout", "axes.json")
    cli("merge", *words, "--layout", "axes.json")
    assert cli("diff", "one", "two") == "equal\n"


@pytest.mark.parametrize("has_head", [False, True])
def test_an_adapter_of_ours_of_a_tied_table(has_head, cli, refused):
    """It is of the head as well, unless the parameters have one beside."""
    table = np.random.default_rng(0).normal(size=(7, 6)).astype("float32")
    params = {"model": {"embed_tokens": {"embedding": table}}}
    params |= {"lm_head": {"kernel": table.T}} if has_head else {}
    hf.save("tied", params, "llama", config={"model_type": "llama"} | TIED)
    lora_params = lora_jax.lorafy(params, 2, targets=".*embedding")
    (key,) = lora_params.adapter.factors
    f = lora_params.adapter.factors[key]
    own = lora_jax.Adapter({key: f.map(lambda name, x: x + 0.5 if name == "b" else x)})
    safetensors.save("own", lora_jax.LoraParams(params, own))
    merged = lora_jax.merge(lora_jax.LoraParams(params, own))["model"]["embed_tokens"]["embedding"]
    cli("merge", "tied", "own", "out")
    words = ("convert", "own", "peft", "--to", "peft")
    if has_head:
        cli(*words)
    else:
        refused(*words, match="own: the table .* is an .* or may be: tied.*--task-type")
        cli(*words, "--task-type", "FEATURE_EXTRACTION")
    found = tensors_of("out")
    assert_close(found["model.embed_tokens.weight"], merged)
    assert ("lm_head.weight" in found) == has_head
    if has_head:
        assert np.array_equal(found["lm_head.weight"], table)


def test_an_adapter_without_a_record_of_a_tied_table_is_refused(cli, refused):
    table = np.random.default_rng(0).normal(size=(7, 6)).astype("float32")
    params = {"model": {"embed_tokens": {"embedding": table}}}
    hf.save("tied", params, "llama", config={"model_type": "llama"} | TIED)
    own = randomize_b(lora_jax.lorafy(params, 2, targets=".*embedding"))
    safetensors.save("alone", own.adapter)
    message = "'lm_head' is tied to 'model.embed_tokens' in tied.*save it as a LoraParams"
    refused("merge", "tied", "alone", "out", match=message)
    safetensors.save("alone", own, overwrite=True)
    cli("merge", "tied", "alone", "out")


def test_merge_weighs_and_shards(cli):
    words = (
        "merge",
        "model",
        "adapter",
        "other_native",
        "out",
        "--weight",
        "0.5",
        "--weight",
        "-2",
    )
    text = cli(*words, "--shard-size", "0.5kB", "--dtype", "float32")
    count = len(list(Path("out").glob("*.safetensors")))
    assert count > 1
    assert f"out: 4 of 10 tensors changed; {count} files of weights" in text
    other = adapted({}, {".*q_proj.*": 3, ".*": 2}, seed=7)
    expected = tensors_of("model")
    for weight, lora_params in ((0.5, adapted({}, 2)), (-2, other)):
        for path, x in updates(lora_params).items():
            expected[f"{canonical(path)}.weight"] = (
                expected[f"{canonical(path)}.weight"] + weight * x.T
            )
    for name, x in tensors_of("out").items():
        assert_close(x, np.asarray(expected[name], np.float64))


def test_a_model_without_a_configuration_gets_one(cli, here, refused):
    hf.save("bare_model", PARAMS, hf.Family())
    words, text = ("merge", "bare_model", "adapter", "out"), '{"model_type": "llama"}'
    refused(*words, match=f"holds no config.json, .* such as {text}$")
    (here / "bare_model" / "config.json").write_text(text)
    assert "4 of 10 tensors changed" in cli(*words)


def test_merge_refuses(refused, here, monkeypatch):
    refused(
        "merge", "model", "adapter", "other", "out", "--weight", "1", match="1 weights for 2 ad"
    )
    refused("merge", "model", "adapter", "adapter/", "out", match="an adapter is there twice")
    refused("merge", "model", "adapter", "tuned", match="tuned exists: pass --overwrite")
    refused(
        "merge", "model", "adapter", "no/out", match="no/out: there is no folder .*/no to write"
    )
    refused(
        "merge", "model", "adapter", "out", "--dtype", "float17", match="invalid choice: 'float17'"
    )
    refused(
        "merge", "model", "adapter", "out", "--shard-size", "5XB", match="'5XB': expected a size"
    )
    refused("merge", "nowhere", "adapter", "out", match="nowhere: no such file or folder")
    refused("merge", "model", "tuned", "out", match="tuned is a model or a file of tensors")
    refused("merge", "adapter", "model", "out", match="adapter is an adapter, expected a model")
    refused("merge", "model", "out", match="the following arguments are required: OUT")
    refused("merge", "model", "dora", "other", "out", match="can neither be weighted nor summed")
    refused("merge", "model", "native", "out", "--names", "my", match="no such file, and no family")
    (here / "names.json").write_text('{"a": 1}')
    refused("merge", "model", "native", "out", "--names", "names.json", match="object of strings")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((os, "fsync"), (_shards, "_write_one"), (_files, "_put")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            refused("merge", "model", "adapter", "out", match="out: No space left on device")
            refused("merge", "model", "adapter", "tuned", "--overwrite", match="No space left")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        words = ("adapter", "out", "--to", "safetensors")
        refused("convert", *words, match="out: No space left on device")
        refused("extract", "model", "tuned", "out", "--rank", "1", match="out: No space left")


def test_merge_replaces_if_told_to(cli):
    before = tensors_of("tuned")
    cli("merge", "model", "other", "tuned", "--overwrite")
    assert any((x != before[name]).any() for name, x in tensors_of("tuned").items())
