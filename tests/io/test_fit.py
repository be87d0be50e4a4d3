"""Names of a model's files beside those of an adapter: prefixes, wrappers, and renamed roots."""

import json
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_close, drawn, randomize_b

import lora_jax
from lora_jax.cli import main
from lora_jax.io import hf, peft
from lora_jax.io._fit import fitted
from lora_jax.io.hf import _shards

LAYER = "layers.0.self_attn.q_proj"
# What the adapter names, and the modules in the files.
FITS = {
    "the same": ([f"model.{LAYER}"], [f"model.{LAYER}"]),
    "files without the head's prefix": (["bert.e.q"], ["e.q"]),
    "an adapter without the prefix": (["e.q"], ["bert.e.q"]),
    "files of a compiled model": ([f"model.{LAYER}"], [f"_orig_mod.model.{LAYER}"]),
    "an adapter of a compiled model": ([f"_orig_mod.model.{LAYER}"], [f"model.{LAYER}"]),
    "compiled layers": (["h.0._orig_mod.q"], ["h.0.q"]),
    "compiled layers in files": (["transformer.h.0.q"], ["h.0._orig_mod.q"]),
    "two prefixes": (["base.model.h.0.q"], ["h.0.q"]),
    "experts": (["model.mlp.experts"], ["mlp.experts.gate_up_proj"]),
    "LLaVA, files of before 4.52": (
        [f"model.language_model.{LAYER}", "model.vision_tower.h.0.q", "lm_head"],
        [f"language_model.model.{LAYER}", "vision_tower.h.0.q", "language_model.lm_head"],
    ),
    "LLaVA, an adapter of before 4.52": (
        [f"language_model.model.{LAYER}", "multi_modal_projector.linear_1"],
        [f"model.language_model.{LAYER}", "model.multi_modal_projector.linear_1"],
    ),
    "Qwen2-VL, files of before 4.52": (
        [f"model.language_model.{LAYER}", "model.visual.blocks.0.q", "lm_head"],
        [f"model.{LAYER}", "visual.blocks.0.q", "lm_head"],
    ),
    "Qwen2-VL, an adapter of before 4.52": (
        [f"model.{LAYER}", "visual.blocks.0.q"],
        [f"model.language_model.{LAYER}", "model.visual.blocks.0.q"],
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_modules_are_found_whatever_stands_before_them(name):
    wanted, modules = FITS[name]
    found = fitted(wanted, [*modules, "other.norm"], "m")
    assert list(found) == [*modules, "other.norm"]
    for one, module in zip(wanted, modules, strict=True):
        assert found[module] == one or found[module].startswith(f"{one}.")


def test_a_name_that_is_there_counts():
    wanted = ["encoder.q", "head"]
    modules = ["encoder.q", "bert.encoder.q", "head", "bert.encoder.k"]
    assert fitted(wanted, modules, "m") == {m: m for m in modules}


def test_a_head_keeps_its_name_beside_bare_files():
    found = fitted(["bert.h.0.q", "score"], ["h.0.q", "score", "h.0.k"], "m")
    assert found == {"h.0.q": "bert.h.0.q", "score": "score", "h.0.k": "bert.h.0.k"}


def test_of_two_that_would_do_none_is_chosen():
    modules = ["text_model.h.0.q", "vision_model.h.0.q"]
    message = "'h.0.q' may be any of ['text_model.h.0.q', 'vision_model.h.0.q']: pass the one"
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        fitted(["h.0.q"], modules, "m")
    offered = re.search("names=({.*?})", str(error.value))
    assert offered is not None
    remedy = eval(offered[1])
    assert fitted(["h.0.q"], modules, "m", remedy)["text_model.h.0.q"] == "h.0.q"
    both = {r"(text|vision)_model/(.+)": r"\1.\2"}
    assert fitted(["vision.h.0.q"], modules, "m", both)["vision_model.h.0.q"] == "vision.h.0.q"


def test_what_is_not_there_keeps_its_name():
    modules = ["model.h.0.q", "model.h.1.q"]
    assert fitted(["transformer.h.7.q"], modules, "m") == {m: m for m in modules}
    assert fitted(["h.7.q"], [], "m") == {}


# Whole folders.

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def written(folder, prefix) -> tuple[lora_jax.LoraParams, dict[str, Any]]:
    """A model whose file has its weights under a prefix, and an adapter that says ``bert.``."""
    tensors = {
        "embeddings.word_embeddings.weight": floats(7, 6),
        "encoder.layer.0.attention.self.query.weight": floats(6, 6),
        "encoder.layer.0.attention.self.query.bias": floats(6),
        "encoder.layer.1.attention.self.query.weight": floats(6, 6),
        "encoder.layer.1.attention.self.query.bias": floats(6),
        "encoder.layer.1.output.LayerNorm.weight": floats(6),
    }
    (folder / "model").mkdir()
    there = {prefix + name: x for name, x in tensors.items()}
    safetensors.numpy.save_file(there, folder / "model" / "model.safetensors")
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    params = {name.replace(".", "/"): jnp.asarray(x) for name, x in tensors.items()}
    layout = {".*embeddings.*": "io", ".*query/weight": "oi"}
    options = {"targets": [".*query/weight", ".*embeddings.*"], "layout": layout, "init": drawn}
    lora_params = lora_jax.lorafy(params, 2, full=".*LayerNorm.*", bias="lora_only", **options)
    lora_params = randomize_b(lora_params)
    full = {path: x + 1 for path, x in lora_params.adapter.full.items()}
    lora_params = lora_jax.LoraParams(params, lora_jax.Adapter(lora_params.adapter.factors, full))
    kinds = {".*embeddings.*": "Embedding", ".*query.*": "Linear"}
    return lora_params, {"layout": layout, "kinds": kinds, "task_type": "FEATURE_EXTRACTION"}


def tensors_of(folder):
    return {name: t.read() for name, t in _shards.tensors_in(folder).items()}


@pytest.mark.parametrize("prefix", ["", "bert.", "_orig_mod.", "_orig_mod.bert.", "encoders.a."])
@pytest.mark.parametrize("theirs", ["", "bert."])
def test_bare_and_prefixed_files_and_adapters_fit_each_other(prefix, theirs, tmp_path):
    lora_params, options = written(tmp_path, prefix)
    names = {"(.+)": rf"{theirs}\1"}
    peft.save(tmp_path / "adapter", lora_params, names=names, **options)
    if prefix == "encoders.a." and theirs:  # no common name, and nobody renamed it
        with pytest.raises(ValueError, match=r"If it has another name here, pass names="):
            hf.merge(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        more: dict[str, Any] = {"names": {r"encoders/a/(.+)": r"bert.\1"}}
    else:
        more = {}
    hf.merge(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", **more)
    found = tensors_of(tmp_path / "out")
    expected = lora_jax.merge(lora_params)
    assert {prefix + path.replace("/", ".") for path in expected} == found.keys()
    for path, x in expected.items():
        assert_close(found[prefix + path.replace("/", ".")], np.asarray(x))


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("theirs", ["", "bert."])
def test_the_command_line_fits_them_too(prefix, theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lora_params, options = written(tmp_path, prefix)
    peft.save("adapter", lora_params, names={"(.+)": rf"{theirs}\1"}, **options)
    hf.merge("model", "adapter", "out")

    def cli(*words):
        assert main(list(words)) == 0
        return capsys.readouterr().out

    cli("convert", "adapter", "bare", "--to", "safetensors")
    cli("convert", "adapter", "recorded", "--to", "safetensors", "--like", "model")
    for name in ("adapter", "bare", "recorded"):
        cli("merge", "model", name, f"{name}_out")
        assert cli("diff", "out", f"{name}_out") == "equal\n"
        assert cli("verify", name, "model").startswith("yes")
    for name in ("bare", "recorded"):
        cli("convert", name, f"{name}_peft", "--to", "peft", "--like", "model")
        assert cli("verify", f"{name}_peft", "model").startswith("yes")


def test_the_command_line_takes_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora_params, options = written(tmp_path, "encoders.a.")
    peft.save("adapter", lora_params, names={"(.+)": r"bert.\1"}, **options)
    assert main(["merge", "model", "adapter", "out"]) == 2
    assert not (tmp_path / "out").exists()
    (tmp_path / "names.json").write_text(json.dumps({r"encoders/a/(.+)": r"bert.\1"}))
    assert main(["merge", "model", "adapter", "out", "--names", "names.json"]) == 0
    assert main(["verify", "adapter", "model", "--names", "names.json"]) == 0
    with pytest.raises(
        TypeError, match=r"for 'encoders/a/.*', expected one name: it is one module"
    ):
        hf.merge("model", "adapter", "other", names={"encoders/a/(.+)": [r"bert.\1"]})
