"""Converting adapters and models, by the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli_files import PARAMS, PLAIN, assert_same, damage, tensors
from helpers import assert_same as assert_tree

import lora_jax
from lora_jax.cli import main
from lora_jax.io import _files, orbax, peft, safetensors
from lora_jax.io.hf import _shards


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", ["safetensors", "orbax"])
def test_peft_there_and_back_is_the_same_bit_for_bit(to, dtype, cli):
    def narrow(found):
        found |= {name: x.astype(dtype) for name, x in found.items()}

    for name in ("adapter", "other"):
        damage(name, narrow)
        cli("convert", name, f"{name}_there", "--to", to)
        assert cli("diff", name, f"{name}_there") == "equal\n"
        cli("convert", f"{name}_there", f"{name}_back", "--to", "peft")
        assert_same(tensors(name), tensors(f"{name}_back"))


@pytest.mark.parametrize("name", ["dora", "more"])
def test_what_is_more_than_factors_wants_the_model(name, cli, refused):
    if name == "more":
        words = ("convert", name, "there", "--to", "safetensors")
        refused(*words, match="is known together with the base's only: pass --like")
    else:
        cli("convert", name, "alone", "--to", "safetensors")
        assert cli("diff", name, "alone") == "equal\n"
        refused(
            "convert", "alone", "back", "--to", "peft", match="without 'score/weight' means nothing"
        )
    cli("convert", name, "there", "--to", "safetensors", "--like", "model")
    if name == "more":
        refused("convert", "there", "back", "--to", "peft", match="needs what is in the base's")
    cli("convert", "there", "back", "--to", "peft", "--like", "model")
    assert_same(tensors(name), tensors("back"))


def test_what_is_converted_loads_onto_the_parameters_that_it_is_for(cli):
    expected = peft.load("adapter", PARAMS)
    cli("convert", "adapter", "a.safetensors", "--to", "safetensors", "--like", "params")
    assert_tree(safetensors.load("a.safetensors", PARAMS), expected)
    for k, like in enumerate([[], ["--like", "model"]]):  # in the names of PyTorch's files
        cli("convert", "adapter", f"theirs{k}", "--to", "safetensors", *like)
        with pytest.raises(
            ValueError, match=r"has names and axes of PyTorch, .*/weight'.* --like PATH"
        ):
            safetensors.load(f"theirs{k}", PARAMS)
    cli("convert", "adapter", "theirs", "--to", "orbax")
    with pytest.raises(ValueError, match=r"peft\.load\(folder, params\)"):
        orbax.load("theirs", PARAMS)


def test_paths_of_ours_by_a_tree_and_names(cli, here, refused):
    cli("convert", "adapter", "as_ours", "--to", "safetensors", "--like", "params")
    assert cli("diff", "as_ours", "native") == "equal\n"
    cli("convert", "adapter", "as_theirs", "--to", "orbax", "--like", "native")
    assert cli("diff", "as_theirs", "native") == "equal\n"
    cli("verify", "params", "as_theirs")
    (here / "names.json").write_text(json.dumps({r"model/layers/(\d+)/(.*)": r"h.\1.\2"}))
    cli("convert", "native", "renamed", "--to", "peft", "--names", "names.json")
    assert "base_model.model.h.0.self_attn.q_proj.lora_A.weight" in tensors("renamed")
    words = ("convert", "renamed", "again", "--to", "safetensors", "--like", "params")
    cli(*words, "--names", "names.json")
    assert cli("diff", "again", "native") == "equal\n"
    refused(*words[:2], "more_again", *words[3:], match="adapts a module 'h.0.self_attn")
    words = ("convert", "more_native", "p", "--to", "peft", "--names", "names.json")
    refused(*words, match="needs what is in the base's|says nothing of 'model/embed_tokens'")
    cli("convert", "native", "by_family", "--to", "peft", "--names", "llama")
    assert_same(tensors("by_family"), tensors("adapter"))
    cli("convert", "bare", "named", "--to", "peft", "--names", "names.json")
    assert_same(tensors("named"), tensors("renamed"))


def test_between_our_own_formats_the_record_goes_along(cli, here, capsys):
    assert main(["convert", "native", "there", "--to", "orbax"]) == 0
    assert "no room for words, which were 'of mine'" in capsys.readouterr().err
    cli("convert", "there", "back", "--to", "safetensors")
    with _files.open_tensors("native") as one, _files.open_tensors("back") as other:
        assert one.metadata["lora_jax"] == other.metadata["lora_jax"]
        assert_same(dict(one), dict(other))
    assert "the contents of 10" in cli("inspect", "back")
    residual = lora_jax.lorafy(PARAMS, 2, init="pissa", **PLAIN)
    safetensors.save("residual", residual)
    cli("convert", "residual", "residual_orbax", "--to", "orbax")
    found = orbax.load("residual_orbax", residual.base)
    assert all(f.residual for f in found.adapter.factors.values())


def test_convert_takes_models_from_orbax_to_hugging_face_and_back(here, cli):
    tuned = {name: x.read() for name, x in _shards.tensors_in("tuned").items()}
    cli("convert", "tuned_params", "out", "--to", "hf", "--like", "model", "--names", "llama")
    for name, x in _shards.tensors_in("out").items():
        assert np.array_equal(x.read(), tuned[name])
    assert json.loads(Path("out/config.json").read_text()) == {"model_type": "llama"}
    found = cli("convert", "out", "half", "--to", "hf", "--dtype", "bfloat16", "--json")
    assert (found["format"], found["from"], found["tensors"]) == ("hf", "huggingface", len(tuned))
    assert {str(x.dtype) for x in _shards.tensors_in("half").values()} == {"bfloat16"}

    text = cli("convert", "tuned", "again", "--to", "orbax", "--like", "params")
    assert re.match(rf"again: {len(tuned)} tensors, .* as orbax\n", text)
    assert cli("diff", "tuned_params", "again")
    cli("convert", "tuned", "own", "--to", "orbax")
    found = cli("inspect", "own", "--json")["entries"]
    assert {row["path"].replace("/", ".") for row in found} == tuned.keys()


def test_convert_refuses_models_that_it_cannot_take(here, refused):
    refused("convert", "model", "out", "--to", "peft", match="is a model, .* expected --to hf, or")
    refused("convert", "params", "out", "--to", "orbax", match="in the format orbax: expected")
    refused("convert", "adapter", "out", "--to", "hf", match="--to hf is for models, .* merge it")
    file = "model/model.safetensors"
    refused("convert", file, "out", "--to", "hf", match="one file of tensors: give the folder")
    words = ("convert", "model", "out", "--to", "orbax")
    refused(*words, "--dtype", "float16", match="--dtype goes with --to hf")
    refused(*words, "--names", "llama", match="--names is of the paths in --like")


def test_convert_says_what_it_wrote(cli):
    options = ("--base-model", "my/model", "--for-vllm", "--json")
    found = cli("convert", "run", "out", "--to", "peft", *options)
    assert (found["from"], found["format"], found["entries"]) == ("orbax", "peft", 4)
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "my/model"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    text = cli("convert", "bare", "out", "--to", "peft", "--overwrite")
    assert text.startswith("out: 4 entries, ")
    targets = json.loads(Path("out/adapter_config.json").read_text())["target_modules"]
    assert targets[0] == "model.layers.0.self_attn.q_proj"  # the other modules are not known


def test_convert_refuses(refused, here):
    refused("convert", "adapter", "out", "--to", "peft", match="in the format peft already")
    refused("convert", "adapter", "out", "--to", "orbax", "--for-vllm", match="goes with --to peft")
    refused(
        "convert", "adapter", "out", "--to", "orbax", "--base-model", "x", match="--base-model g"
    )
    refused(
        "convert", "adapter", "native", "--to", "safetensors", match="native exists: pass --over"
    )
    refused("convert", "adapter", "out", "--to", "pickle", match="argument --to: invalid choice")
    refused("convert", "native", "out", match="the following arguments are required: --to")
    words = ("convert", "adapter", "out", "--to", "orbax", "--names", "llama")
    refused(*words, match="--names is of the paths in --like PATH")
    words = ("convert", "adapter", "orbax", "--to", "orbax", "--overwrite")
    refused(*words, match="orbax exists, and is not replaced: choose another path")
    refused(
        "convert", "dora_native", "out", "--to", "peft", "--for-vllm", match="vLLM would refuse"
    )
    words = ("convert", "adapter", "out", "--to", "safetensors", "--like", "bare")
    refused(*words, match="--like bare: it is an adapter without a record of its base")
    residual = lora_jax.lorafy(PARAMS, 2, init="pissa", **PLAIN)
    safetensors.save("params/residual", residual)
    refused("convert", "params/residual", "out", "--to", "peft", match="what its initializer left")
    config = json.loads((here / "adapter" / peft.CONFIG).read_text()) | {
        "init_lora_weights": "pissa"
    }
    (here / "adapter" / peft.CONFIG).write_text(json.dumps(config))
    refused("convert", "adapter", "out", "--to", "orbax", match="init_lora_weights='pissa' changes")
