"""Verifying that an adapter fits a base, by the command line."""

import re

import jax
import jax.numpy as jnp
import pytest
from cli_files import PARAMS, floats

import lora_jax
from lora_jax.cli import main
from lora_jax.io import hf, orbax, peft, safetensors


@pytest.mark.parametrize("base", ["model", "params"])
@pytest.mark.parametrize(
    "name", ["adapter", "native", "orbax", "dora", "dora_native", "more", "more_native"]
)
def test_verify_says_yes(name, base, cli):
    text = cli("verify", base, name)
    assert text.startswith("yes: ")
    assert ("configuration names the base tiny/llama" in text) == (name == "adapter")
    assert cli("verify", base, name, "--json")["fits"] is True


@pytest.mark.parametrize("base", ["model", "params"])
def test_verify_says_no_and_why(base, cli, here):
    changed = jax.tree.map(lambda x: x, PARAMS)
    changed["score"]["kernel"] = changed["score"]["kernel"] + 1
    wide = jax.tree.map(lambda x: x, PARAMS)
    wide["model"]["layers"]["1"]["self_attn"]["q_proj"]["kernel"] = floats(8, 9)
    more = PARAMS | {"more": {"kernel": floats(2, 2)}}
    less = {"model": PARAMS["model"]}
    for name, params in (("changed", changed), ("wide", wide), ("more_m", more), ("less", less)):
        if base == "model":
            hf.save(name, params, hf.Family())
            (here / name / "config.json").write_text('{"model_type": "llama"}')
        else:
            orbax.save_params(name, params)
    text = cli("verify", "changed", "native", status=1)
    assert text.startswith("no: native was trained on other weights: 'score/kernel' has")
    cli("verify", "changed", "orbax")  # names, shapes and types only
    cli("verify", "changed", "adapter")
    for adapter in ("native", "orbax", "adapter", "bare"):
        text = cli("verify", "wide", adapter, status=1)
        assert re.search(r"q_proj.*shape|shape.*q_proj", text), text
    for adapter in ("native", "orbax"):
        assert "more" in cli("verify", "more_m", adapter, status=1)
        assert "score" in cli("verify", "less", adapter, status=1)
    assert cli("verify", "less", "orbax", "--json", status=1)["fits"] is False
    assert cli("verify", "less", "orbax", "--quiet", status=1) == ""
    for adapter in ("adapter", "bare"):
        cli("verify", "more_m", adapter)
    cli("convert", "dora", "dora_torch", "--to", "safetensors")
    cli("convert", "adapter", "torch", "--to", "safetensors")
    assert cli("verify", "wide", "torch", status=1).startswith("no: ")
    if base == "model":
        assert "it has no record" in cli("verify", "model", "torch")
        assert "it has no record" in cli("verify", "model", "dora_torch")
        cli("convert", "dora", "like_torch", "--to", "safetensors", "--like", "model")
        assert "all 10 leaves" in cli("verify", "model", "like_torch")
        assert cli("verify", "wide", "like_torch", status=1).startswith("no: ")


def test_verify_of_an_adapter_that_says_nothing_of_its_base(cli, refused):
    lora_params = safetensors.load("dora_native", PARAMS)
    safetensors.save("alone", lora_params.adapter)
    for base in ("model", "params"):
        assert "its 5 entries fit" in cli("verify", base, "alone")
    parts = lora_jax.lorafy(PARAMS, 2, targets=".*q_proj/kernel[:, 0:4]")
    safetensors.save("parts", parts.adapter)
    cli("verify", "params", "parts")
    refused("verify", "model", "parts", match="no record of its base, and without '.*0:4]' means")
    relative = [
        row["relative"] for row in cli("inspect", "parts", "--base", "params", "--json")["entries"]
    ]
    assert relative == [0, 0]


def test_verify_takes_the_other_order_where_the_contents_tell(cli):
    assert cli("verify", "adapter", "model") == cli("verify", "model", "adapter")


def test_verify_notes_another_precision(here, capsys):
    orbax.save_params("half", jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS))
    assert main(["verify", "orbax", "half"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("yes: ")
    assert "note: " in err
    assert "base of another precision" in err


def test_verify_refuses(refused):
    refused("verify", "model", "model", match="model is a model or a file of tensors")
    refused("verify", "other", "adapter", match="other is an adapter, expected a model")
    refused("verify", "nowhere", "adapter", match="no such file or folder")


def test_verify_knows_a_head_that_the_files_leave_out(cli):
    """The record of an adapter of a tied model lists its head, which is stored as the table."""
    params = {"embed_tokens": {"embedding": floats(7, 6)}}
    params |= {"layers": {"0": {"self_attn": {"q_proj": {"kernel": floats(6, 6)}}}}}
    config = {"model_type": "llama", "tie_word_embeddings": True}
    hf.save("tied", {"model": params}, "llama", config=config)
    lora_params = lora_jax.lorafy({"model": params}, 2, targets=".*q_proj.*")
    peft.save("theirs", lora_params, names=hf.FAMILIES["llama"].names)
    cli("convert", "theirs", "ours", "--to", "safetensors", "--like", "tied")
    assert cli("verify", "tied", "ours").startswith("yes: ")
