"""Which dense layers of a model's files are stored transposed, and merging into those."""

import json
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_close

from lora_jax.cli import main
from lora_jax.io import hf, peft
from lora_jax.io.hf._transposed import transposed
from lora_jax.io.peft._folder import Folder

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def leaves(**shapes):
    found = {}
    for name, (shape, bias) in shapes.items():
        path = name.replace("__", "/")
        found[f"{path}/weight"] = np.zeros(shape)
        if bias:
            found[f"{path}/bias"] = np.zeros(bias)
    return found


def adapter(flag, **factors):
    tensors = {}
    for name, (inputs, outputs) in factors.items():
        module = name.replace("__", ".")
        tensors[f"{module}.lora_A.weight"] = np.zeros((2, inputs))
        tensors[f"{module}.lora_B.weight"] = np.zeros((outputs, 2))
    return Folder("a", {"fan_in_fan_out": flag}, tensors)


GPT2, SQUARE = {"model_type": "gpt2"}, {"h__0__attn__c_proj": ((4, 4), 4)}
BESIDE = SQUARE | {"h__0__attn__c_attn": ((4, 12), 12)}
LINEAR = SQUARE | {"h__1__mlp__c_fc": ((16, 4), 16)}
NESTED = {"model_type": "vision-encoder-decoder", "encoder": {"model_type": "vit"}, "decoder": GPT2}
OWN = {"x__0__mix": ((4, 4), 0)}
UP = {"x__1__up": ((4, 8), 0)}


@pytest.mark.parametrize(
    ("shapes", "config", "own", "expected"),
    [
        (SQUARE, GPT2, None, {"c_proj": True}),
        (SQUARE, {"model_type": "gpt_bigcode"}, None, {"c_proj": False}),
        (SQUARE, None, None, {"c_proj": None}),
        (SQUARE, None, adapter(True), {"c_proj": True}),
        (SQUARE, {"model_type": "mine"}, adapter(True), {"c_proj": True}),
        (SQUARE, {"model_type": "mine"}, adapter(False), {"c_proj": False}),
        (BESIDE, None, None, {"c_proj": True, "c_attn": True}),
        (BESIDE, {"model_type": "mine"}, None, {"c_proj": True, "c_attn": True}),
        (LINEAR, None, adapter(True), {"c_proj": False, "c_fc": False}),
        (LINEAR, GPT2, None, {"c_proj": False, "c_fc": False}),
        ({f"decoder__{n}": s for n, s in SQUARE.items()}, NESTED, None, {"c_proj": True}),
        ({f"encoder__{n}": s for n, s in SQUARE.items()}, NESTED, None, {"c_proj": False}),
        ({f"language__{n}": s for n, s in SQUARE.items()}, NESTED, None, {"c_proj": True}),
        ({"encoder__x__0__query": ((4, 4), 4)}, NESTED, adapter(True), {"query": False}),
        (OWN, {"model_type": "llama"}, adapter(True), {"mix": False}),
        (OWN, {"model_type": "mine"}, adapter(False), {"mix": False}),
        (OWN, {"model_type": "mine"}, adapter(True), {"mix": None}),
        (OWN | UP, {}, adapter(True, x__1__up=(4, 8)), {"mix": True, "up": True}),
        (OWN | UP, {}, adapter(True, x__1__up=(8, 4)), {"mix": False, "up": False}),
        (OWN | UP, {}, adapter(False, x__1__up=(4, 8)), {"mix": False, "up": True}),
        (OWN | UP, {}, adapter(False, x__1__up=(4, 5)), {"mix": False, "up": False}),
    ],
)
def test_shapes_then_the_stack_then_the_model_then_the_adapter(shapes, config, own, expected):
    found = transposed(leaves(**shapes), config, own)
    assert {path.split("/")[-2]: known for path, known in found.items()} == expected


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(tensors, config, factors, flag):
    """A model, an adapter of it with rank 2 and alpha 2, and what they are together."""
    os.mkdir("model")
    os.mkdir("adapter")
    safetensors.numpy.save_file(tensors, "model/model.safetensors")
    if config is not None:
        with open("model/config.json", "w") as file:
            json.dump(config, file)
    arrays = {}
    for module, (inputs, outputs) in factors.items():
        arrays[f"base_model.model.{module}.lora_A.weight"] = floats(2, inputs)
        arrays[f"base_model.model.{module}.lora_B.weight"] = floats(outputs, 2)
    safetensors.numpy.save_file(arrays, "adapter/adapter_model.safetensors")
    own = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": sorted(factors)}
    with open("adapter/adapter_config.json", "w") as file:
        json.dump(own | {"fan_in_fan_out": flag}, file)
    return {
        module: arrays[f"base_model.model.{module}.lora_B.weight"]
        @ arrays[f"base_model.model.{module}.lora_A.weight"]
        for module in factors
    }


def weights(folder):
    return safetensors.numpy.load_file(f"{folder}/model.safetensors")


def test_a_transposed_decoder_inside_another_model(here):
    query, proj = "encoder.encoder.layer.0.attention.query", "decoder.transformer.h.0.attn.c_proj"
    tensors = {f"{module}.weight": floats(4, 4) for module in (query, proj)}
    updates = write(tensors, NESTED, {query: (4, 4), proj: (4, 4)}, True)
    hf.merge("model", "adapter", "out")
    merged = weights("out")
    assert_close(merged[f"{query}.weight"], tensors[f"{query}.weight"] + updates[query])
    assert_close(merged[f"{proj}.weight"], tensors[f"{proj}.weight"] + updates[proj].T)


def test_layers_of_a_model_that_is_not_known(here, capsys):
    """With the configuration: refused, and both remedies; other layers are merged."""
    tensors = {"x.0.mix.weight": floats(4, 4)}
    update = write(tensors, {"model_type": "mine"}, {"x.0.mix": (4, 4)}, True)["x.0.mix"]
    with pytest.raises(ValueError, match=r"'x.0.mix.weight' is square, .* set fan_in_fan_out to f"):
        hf.merge("model", "adapter", "out")
    assert sorted(p.name for p in here.iterdir()) == ["adapter", "model"]
    like = {"x": {"0": {"mix": {"kernel": jnp.zeros((4, 4))}}}}
    kinds = {".*mix.*": "Conv1D"}
    more = {"family": hf.Family(), "kinds": kinds}
    lora_params = peft.load("adapter", hf.load("model", like, **more), kinds=kinds)
    hf.save("saved", lora_params, source="model", **more)
    assert_close(weights("saved")["x.0.mix.weight"], tensors["x.0.mix.weight"] + update.T)
    config = json.loads((here / "adapter" / "adapter_config.json").read_text())
    (here / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"fan_in_fan_out": False})
    )
    hf.merge("model", "adapter", "out")
    assert_close(weights("out")["x.0.mix.weight"], tensors["x.0.mix.weight"] + update)


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "adapter", "model"),
        ("convert", "adapter", "out", "--to", "safetensors", "--like", "model"),
        ("extract", "model", "model", "out", "--rank", "1"),
        ("merge", "model", "adapter", "out"),
    ],
    ids=lambda words: words[0],
)
def test_a_model_without_a_configuration(words, here, capsys):
    write({"h.0.c_proj.weight": floats(4, 4)}, None, {"h.0.c_proj": (4, 4)}, False)
    assert main(list(words)) == 2
    assert re.search(r"model holds no config\.json, whose model_type", capsys.readouterr().err)
    assert not (here / "out").exists()
    (here / "model" / "config.json").write_text('{"model_type": "gpt2"}')  # the remedy
    if words[0] != "extract":
        assert main(list(words)) == 0


def test_an_adapter_of_ours_on_a_model_without_a_configuration(here, capsys):
    write({"h.0.c_proj.weight": floats(4, 4)}, GPT2, {"h.0.c_proj": (4, 4)}, False)
    assert main(["convert", "adapter", "native", "--to", "orbax", "--like", "model"]) == 0
    assert main(["verify", "native", "model"]) == 0
    (here / "model" / "config.json").unlink()
    assert main(["verify", "native", "model"]) == 2
