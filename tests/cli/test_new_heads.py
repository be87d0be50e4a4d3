"""Commands on an adapter that brings a head which the model's files lack, bare or not."""

import json

import numpy as np
import pytest
import safetensors.numpy

from lora_jax.cli import main

RNG = np.random.default_rng(0)
QUERY = "encoder.layer.0.attention.self.query"


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(params=["", "bert."], ids=["bare", "prefixed"])
def model(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "adapter"):
        (tmp_path / name).mkdir()
    names = [QUERY, "encoder.layer.0.attention.self.value"]
    tensors = {f"{request.param}{name}.weight": floats(8, 8) for name in names}
    tensors[f"{request.param}embeddings.word_embeddings.weight"] = floats(11, 8)
    safetensors.numpy.save_file(tensors, "model/model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    pre = "base_model.model."
    own = {f"{pre}bert.{QUERY}.lora_A.weight": floats(2, 8)}
    own |= {f"{pre}bert.{QUERY}.lora_B.weight": floats(8, 2)}
    own |= {f"{pre}classifier.weight": floats(3, 8), f"{pre}classifier.bias": floats(3)}
    safetensors.numpy.save_file(own, "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"]}
    config |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def test_every_command_takes_the_head_for_a_new_one(model, capsys):
    convert = "convert adapter own.safetensors --to safetensors --like model"
    back = "convert own.safetensors again --to peft --like model"
    for line in (
        "inspect adapter --base model",
        "verify model adapter",
        "merge model adapter one",
        convert,
        "verify model own.safetensors",
        "merge model own.safetensors two",
        back,
        "merge model again three",
    ):
        assert main(line.split()) == 0, (line, capsys.readouterr())
    one, two, three = (
        safetensors.numpy.load_file(f"{name}/model.safetensors") for name in ("one", "two", "three")
    )
    assert "classifier.bias" in one
    assert len(one) == len(model) + 2
    for other in (two, three):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
