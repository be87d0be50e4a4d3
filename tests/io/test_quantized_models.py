"""Quantized models are refused by name, before anything is written; plain ones are not."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lora_jax.cli import main
from lora_jax.io import hf

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
FP8 = ml_dtypes.float8_e4m3fn
RNG = np.random.default_rng(0)


def floats(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


def codes(dtype, *shape):
    return RNG.integers(-100, 100, shape).astype(dtype)


def write(folder, tensors, **config):
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama"} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


PLAIN = {f"{Q}.weight": floats(6, 6), f"{K}.weight": floats(4, 6)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A plain model, and an adapter of it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "plain", PLAIN)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {"lora_A.weight": floats(2, 6), "lora_B.weight": floats(6, 2)}
    tensors = {f"base_model.model.{Q}.{role}": x for role, x in factors.items()}
    safetensors.numpy.save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def fp8(**beside):
    tensors = PLAIN | {f"{Q}.weight": floats(6, 6).astype(FP8)}
    return tensors | {f"{Q}.{name}": x for name, x in beside.items()}


ONE = np.ones((1, 1), np.float32)
PACKED = {f"{K}.weight": floats(4, 6)}
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
QUANTIZED = {
    "fp8 by blocks": (fp8(weight_scale_inv=ONE), "weight_scale_inv'"),
    "fp8 by rows": (fp8(weight_scale=floats(6, 1)), "weight_scale'"),
    "fp8 of a single file": (fp8(scale_weight=ONE), "scale_weight'"),
    "fp8, another scale": (fp8(scaling=ONE), "'.*q_proj.weight' holds float8_e4m3fn, beside"),
    "fp8 experts": (PLAIN | {EXPERTS: floats(2, 6, 4).astype(FP8), f"{EXPERTS}_scale": ONE}, "fl"),
    "fp8 experts by blocks": (
        PLAIN | {EXPERTS: floats(2, 6, 4).astype(FP8), f"{EXPERTS}_scale_inv": ONE},
        "_scale_inv'",
    ),
    "mxfp4 experts": (PLAIN | {f"{EXPERTS}_blocks": codes(np.uint8, 2, 6, 2, 2)}, "_blocks'"),
    "LLM.int8": (
        PACKED | {f"{Q}.weight": codes(np.int8, 6, 6), f"{Q}.SCB": floats(6)},
        "holds int8, beside '.*q_proj.SCB'",
    ),
    "BitNet": (
        PACKED | {f"{Q}.weight": codes(np.uint8, 2, 6), f"{Q}.weight_scale": floats(1)},
        "holds uint8, beside '.*weight_scale'",
    ),
    "int8 with zero points": (
        PACKED | {f"{Q}.weight": codes(np.int8, 6, 6), f"{Q}.weight_zero_point": codes("i1", 6, 1)},
        "holds int8, beside '.*weight_zero_point'",
    ),
    "nvfp4": (
        PACKED
        | {f"{Q}.weight": codes(np.uint8, 6, 3), f"{Q}.weight_scale": floats(6, 1).astype(FP8)},
        "holds uint8, beside '.*weight_scale'",
    ),
    "nf4": (
        PACKED | {f"{Q}.weight": codes(np.uint8, 18, 1), f"{Q}.weight.absmax": floats(1)},
        "absmax'",
    ),
    "GPTQ": (
        PACKED | {f"{Q}.qweight": codes(np.int32, 1, 6), f"{Q}.g_idx": codes(np.int32, 6)},
        "q_proj.qweight'",
    ),
    "HQQ": (PACKED | {f"{Q}.W_q": codes(np.uint8, 3, 6)}, "W_q'"),
    "compressed-tensors": (PACKED | {f"{Q}.weight_packed": codes(np.int32, 6, 1)}, "weight_packed"),
    "Quanto": (PACKED | {f"{Q}.weight._data": codes(np.int8, 6, 6)}, "weight._data'"),
    "torchao": (PACKED | {f"{Q}._weight_qdata": codes(np.int8, 6, 6)}, "_weight_qdata'"),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_models_are_refused_before_writing(kind, named, here):
    tensors, message = QUANTIZED[kind]
    config = {"quantization_config": {"quant_method": "mine"}} if named else {}
    write(here / "model", tensors, **config)
    message = (r"is quantized \(mine\): it.*" if named else "is quantized: it.*") + message
    message = message.replace("it.*", ".*") + ".*full precision"
    before = sorted(here.iterdir())
    with pytest.raises(ValueError, match=message):
        hf.merge("model", "adapter", "out")
    with pytest.raises(ValueError, match=message):
        hf.merge("model", {}, "out", dtype="bfloat16")
    leaves = {f"model/layers/0/self_attn/{name}/kernel": 0 for name in ("q_proj", "k_proj")}
    like = {path: jnp.zeros((6, n)) for path, n in zip(leaves, (6, 4), strict=True)}
    with pytest.raises(ValueError, match=message):
        hf.load("model", like, ignore=".*")
    with pytest.raises(ValueError, match=message):
        hf.save("out", like, source="model", ignore=".*")
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "model", "adapter", "out"),
        ("convert", "model", "out", "--to", "hf", "--dtype", "bfloat16"),
        ("convert", "model", "out", "--to", "orbax"),
        ("convert", "adapter", "out", "--to", "safetensors", "--like", "model"),
        ("extract", "model", "model", "out", "--rank", "1"),
        ("verify", "adapter", "model"),
    ],
    ids=" ".join,
)
def test_commands_refuse_them(words, here, capsys):
    write(here / "model", fp8(weight_scale_inv=ONE), quantization_config={"quant_method": "fp8"})
    before = sorted(here.iterdir())
    assert main(list(words)) == 2
    assert "model is quantized (fp8): 'model.layers" in capsys.readouterr().err
    assert sorted(here.iterdir()) == before
    plain = ["plain" if word == "model" else word for word in words]  # the remedy
    if words[0] != "extract":  # which finds no change between a model and itself
        assert main(plain) == 0


@pytest.mark.parametrize("inside", [False, True])
def test_a_configuration_alone_and_the_remedy(inside, here):
    own = {"quantization_config": {"quant_method": "bitnet"}}
    write(here / "model", PLAIN, **({"text_config": own} if inside else own))
    with pytest.raises(ValueError, match=r"\(bitnet\), and its tensors are no codes .* remove"):
        hf.merge("model", "adapter", "out")
    assert not (here / "out").exists()
    (here / "model" / "config.json").write_text('{"model_type": "llama"}')
    hf.merge("model", "adapter", "out")


def test_a_configuration_is_written_without_a_quantization(here):
    own = {"quantization_config": {"quant_method": "fp8"}, "model_type": "llama"}
    hf.save("out", {"a": {"kernel": jnp.ones((2, 3))}}, config=own | {"text_config": own})
    written = json.loads((here / "out" / "config.json").read_text())
    assert written == {"model_type": "llama", "text_config": {"model_type": "llama"}}


def test_bare_float8_is_read_and_merged_into_wider_numbers(here):
    write(here / "model", fp8(bias=floats(6)))
    with pytest.raises(ValueError, match=r"'.*q_proj.weight' is float8_e4m3fn.*dtype='bfloat16'"):
        hf.merge("model", "adapter", "out")
    assert not (here / "out").exists()
    assert main(["merge", "model", "adapter", "out", "--dtype", "bfloat16"]) == 0
    hf.merge("model", {}, "copy")


PLAIN_ONES = {
    "buffers": {"position_ids": codes(np.int64, 1, 8), "h.0.attn.bias": codes(np.uint8, 1, 1, 3)},
    "scales of a plain layer": {"norm.weight": floats(6), "norm.weight_scale": floats(6)},
    "scales alone": {"norm.weight_scale": floats(6), "ls.scale_weight": floats(2), "x.SCB": ONE},
    "an index": {"relative.weight": codes(np.int64, 3, 3), "relative.bias": floats(3)},
    "small integers": {"mask.weight": codes(np.uint8, 3, 3), "mask.weight_scale": floats(7, 7)},
    "names of queries": {"attn.W_q": floats(6, 6), "attn.qweight": floats(6), "vq.g_idx": ONE},
    "vectors": {"counter.weight": codes(np.int64, 3), "counter.weight_scale": floats(3)},
    "float8 with others": {"bn.weight": floats(6).astype(FP8), "bn.running_mean": floats(6)},
    "booleans": {"mask.weight": ONE > 0, "mask.scale": ONE},
}


@pytest.mark.parametrize("kind", PLAIN_ONES)
def test_numbers_that_are_no_weights_are_none_of_a_quantization(kind, here):
    write(here / "model", PLAIN | PLAIN_ONES[kind], quantization_config=None)
    hf.merge("model", "adapter", "out")
    found = safetensors.numpy.load_file("out/model.safetensors") if "float8" not in kind else {}
    assert all(np.array_equal(found[name], PLAIN_ONES[kind][name]) for name in found.keys() - PLAIN)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_integers_alone_are_copied_and_not_taken_for_numbers(dtype, here):
    """Of small ones a configuration that names a quantization tells that they are codes."""
    write(here / "model", PACKED | {f"{Q}.weight": codes(dtype, 6, 6)})
    hf.merge("model", {}, "copy")
    with pytest.raises(ValueError, match=r"q_proj.weight' holds u?int\d+, to which no update"):
        hf.merge("model", "adapter", "out")
    paths = {
        f"model/layers/0/self_attn/{name}/kernel": n for name, n in (("q_proj", 6), ("k_proj", 4))
    }
    like: dict = {path: jnp.zeros((6, n)) for path, n in paths.items()}
    with pytest.raises(ValueError, match=r"q_proj.weight' holds u?int\d+, and 'model.*is float32"):
        hf.load("model", like)
    like["model/layers/0/self_attn/q_proj/kernel"] = np.zeros((6, 6), dtype)  # the remedy
    hf.load("model", like)
    (here / "model" / "config.json").write_text('{"quantization_config": {"quant_method": "mine"}}')
    message = "holds u?int8" if dtype != np.int64 else "no codes of one"
    with pytest.raises(ValueError, match=rf"\(mine\).*{message}"):
        hf.merge("model", {}, "out")
    assert not (here / "out").exists()
