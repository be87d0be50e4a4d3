"""One rank and one scale for all modules, as llama.cpp and SGLang read them."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_close, drawn, normal, randomize_b

import lora_jax
from lora_jax.cli import main
from lora_jax.io import peft

pytestmark = pytest.mark.usefixtures("standard_promotion")

PRE = "base_model.model."
GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
LAYOUT = {"conv/.*": "iio", "moe/.*": "bio"}
OPTIONS = {"layout": LAYOUT, "kinds": {"conv/kernel": "Conv"}}
SHAPES = {
    "q/kernel": (6, 5),
    "small/kernel": (6, 2),
    "conv/kernel": (3, 4, 8),
    "embed/embedding": (7, 6),
    "moe/up": (3, 6, 5),
}
RANKS = {"q.*": 4, "small.*": 1, "conv.*": 3, ".*": 2}
CASES = {
    "ranks and alphas": {"rank": RANKS, "alpha": {"q.*": 5.0, "conv.*": 0.3, ".*": 16.0}},
    "ranks": {"rank": RANKS},
    "rsLoRA": {"rank": RANKS, "rslora": True, "alpha": 7.0},
    "DoRA": {"rank": RANKS, "alpha": {"q.*": 5.0, ".*": 16.0}, "dora": True, "exclude": "moe.*"},
    "alike": {"rank": 2},
}


def leaves():
    params: dict = {}
    for k, (path, shape) in enumerate(SHAPES.items()):
        module, leaf = path.split("/")
        params[module] = {leaf: normal(k, shape)}
    return params


def adapted(**options):
    options = {"targets": ".*", "layout": LAYOUT, "init": drawn} | options
    return randomize_b(lora_jax.lorafy(leaves(), options.pop("rank"), **options))


def read_as_llama_cpp(folder):
    """The updates of dense modules and tables, by a reader that looks at one alpha alone."""
    config = json.loads((folder / peft.CONFIG).read_text())
    found = safetensors.numpy.load_file(folder / peft.TENSORS)
    found = {k.removeprefix(PRE): x.astype(np.float64) for k, x in found.items()}
    updates = {}
    for name in ("q", "small"):
        b = found[f"{name}.lora_B.weight"]
        updates[name] = config["lora_alpha"] / b.shape[1] * b @ found[f"{name}.lora_A.weight"]
    b = found["embed.lora_embedding_B"]
    updates["embed"] = config["lora_alpha"] / b.shape[1] * b @ found["embed.lora_embedding_A"]
    return config, updates


def updates_of(lora_params):
    found = {path.split("/")[0]: f for path, f in lora_params.adapter.factors.items()}
    return {
        name: (float(f.scale) * np.asarray(f.a, "f8") @ np.asarray(f.b, "f8")).T
        for name, f in found.items()
        if name in ("q", "small", "embed")
    }


@pytest.mark.parametrize("name", CASES)
def test_readers_of_one_scale_read_the_same_update(name, tmp_path):
    lora_params = adapted(**CASES[name])
    peft.save(tmp_path / "a", lora_params, uniform=True, **OPTIONS)
    config, updates = read_as_llama_cpp(tmp_path / "a")
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert (config["use_rslora"], config["lora_alpha"]) == (False, config["r"])
    assert_close(updates, updates_of(lora_params), dtype=np.float32)
    again = peft.load(tmp_path / "a", leaves(), **OPTIONS)
    assert {f.rank for f in again.adapter.factors.values()} == {config["r"]}
    assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))


def test_factors_keep_their_dtype_where_that_is_exact(tmp_path):
    for alpha, dtype in ((8.0, "bfloat16"), (3.0, "float32")):
        lora_params = adapted(rank={"q.*": 4, ".*": 2}, alpha=alpha, dtype=jnp.bfloat16)
        peft.save(tmp_path / dtype, lora_params, uniform=True, **OPTIONS)
        found = safetensors.numpy.load_file(tmp_path / dtype / peft.TENSORS)
        assert found[f"{PRE}q.lora_A.weight"].dtype == "bfloat16"
        assert found[f"{PRE}q.lora_B.weight"].dtype == dtype
        again = peft.load(tmp_path / dtype, leaves(), **OPTIONS)
        assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))


def test_scales_of_any_sign_and_none(tmp_path):
    lora_params = adapted(rank=2)
    scales = {"q/kernel": -1.5, "small/kernel": 0.0}
    factors = {
        key: f.map(lambda n, x, key=key: jnp.float32(scales.get(key, 2)) if n == "scale" else x)
        for key, f in lora_params.adapter.factors.items()
    }
    lora_params = lora_jax.LoraParams(lora_params.base, lora_jax.Adapter(factors))
    peft.save(tmp_path / "a", lora_params, uniform=True, **OPTIONS)
    assert_close(read_as_llama_cpp(tmp_path / "a")[1], updates_of(lora_params), dtype=np.float32)


def test_one_scale_and_rslora_exclude_each_other(tmp_path):
    lora_params = adapted(rank=RANKS, rslora=True)
    with pytest.raises(ValueError, match=r"uniform=True has one scale, .* leave out one of"):
        peft.save(tmp_path / "a", lora_params, uniform=True, rslora=True, **OPTIONS)
    assert not (tmp_path / "a").exists()
    for k, more in enumerate(({"uniform": True}, {"rslora": True})):
        peft.save(tmp_path / f"{k}", lora_params, **more, **OPTIONS)
        again = peft.load(tmp_path / f"{k}", leaves(), **OPTIONS)
        assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))


# Adapters that PEFT wrote, by the command line: what else they hold stays.


def golden(name):
    """The base of a golden adapter, in PyTorch's axes, and what tells them."""
    found = safetensors.numpy.load_file(GOLDEN / name / "expected.safetensors")
    base = {k.removeprefix("base."): x for k, x in found.items() if k.startswith("base.")}
    params = {k.replace(".", "/"): jnp.asarray(x) for k, x in base.items()}
    layout = {"table/weight": "io", "conv/weight": "oii", ".*_proj": "boi", ".*": "oi"}
    return params, {"layout": layout, "kinds": {"table.*": "Embedding", "conv/weight": "Conv"}}


@pytest.mark.parametrize("name", ["dora", "experts", "plain", "rows", "rslora", "saved"])
def test_folders_of_peft_are_made_uniform(name, tmp_path):
    out = tmp_path / "out"
    assert main(["convert", str(GOLDEN / name), str(out), "--to", "peft", "--uniform"]) == 0
    old, new = (safetensors.numpy.load_file(f / peft.TENSORS) for f in (GOLDEN / name, out))
    before, after = (json.loads((f / peft.CONFIG).read_text()) for f in (GOLDEN / name, out))
    assert old.keys() == new.keys()
    assert (after["lora_alpha"], after["use_rslora"]) == (after["r"], False)
    assert not after["rank_pattern"]
    assert not after["alpha_pattern"]
    changed = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    same = {key: x for key, x in before.items() if x is not None and key not in changed}
    assert {key: after[key] for key in same} == same
    for key, x in old.items():
        if ".lora_" not in key or "magnitude" in key:
            assert np.array_equal(new[key], x)
    params, options = golden(name)
    one, other = (peft.load(f, params, **options) for f in (GOLDEN / name, out))
    assert_close(lora_jax.merge(other), lora_jax.merge(one))


def test_what_an_initializer_repeats_is_refused_and_made_plain(tmp_path, capsys):
    words = ["convert", str(GOLDEN / "pissa"), str(tmp_path / "out"), "--to", "peft", "--uniform"]
    assert main(words) != 0
    assert "Make it a plain LoRA first, by peft.load and peft.save" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    params, options = golden("pissa")
    plain = peft.load(GOLDEN / "pissa", params, **options)
    peft.save(tmp_path / "plain", plain, **options)
    assert main([words[0], str(tmp_path / "plain"), *words[2:]]) == 0
    again = peft.load(tmp_path / "out", params, **options)
    assert_close(lora_jax.merge(again), lora_jax.merge(plain))
    main([*words[:2], str(tmp_path / "new"), "--to", "orbax", "--uniform"])
    assert "--uniform goes with --to peft" in capsys.readouterr().err


def test_biases_of_factors_are_scaled_as_well(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    tensors = {"q.lora_A.weight": (2, 6), "q.lora_B.weight": (5, 2), "q.lora_B.bias": (5,)}
    tensors = {PRE + k: np.array(normal(n, s)) for n, (k, s) in enumerate(tensors.items())}
    safetensors.numpy.save_file(tensors, folder / peft.TENSORS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "lora_bias": True}
    (folder / peft.CONFIG).write_text(json.dumps(config | {"target_modules": ["q"]}))
    params = {"q": {"kernel": normal(8, (6, 5)), "bias": normal(9, (5,))}}
    main(["convert", str(folder), str(tmp_path / "out"), "--to", "peft", "--uniform"])
    one, other = (lora_jax.merge(peft.load(f, params)) for f in (folder, tmp_path / "out"))
    assert_close(other, one)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_llama_cpp_converts_what_peft_reads(tmp_path):
    """Convert such a folder by llama.cpp's script, whose result has one alpha for all."""
    transformers = pytest.importorskip("transformers")
    their_peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    gguf = pytest.importorskip("gguf")
    script = llama_cpp(tmp_path)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)

    def model():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()

    model().save_pretrained(tmp_path / "model")
    config = their_peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["v_proj", "o_proj", "down_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"o_proj": 5},
        use_rslora=True,
    )
    theirs = their_peft.get_peft_model(model(), config).eval()
    for name, x in theirs.named_parameters():
        if "lora_" in name:
            x.data.add_(0.1 * torch.randn(x.shape))
    theirs.save_pretrained(tmp_path / "theirs")
    words = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "peft"]
    assert main([*words, "--uniform"]) == 0
    ids = torch.arange(12)[None]
    again = their_peft.PeftModel.from_pretrained(model(), tmp_path / "ours").eval()
    assert_close(again(ids).logits.detach().numpy(), theirs(ids).logits.detach().numpy(), depth=32)

    out = tmp_path / "adapter.gguf"
    words = ["--base", tmp_path / "model", "--outfile", out, tmp_path / "ours"]
    subprocess.run([sys.executable, script, *map(str, words)], check=True, capture_output=True)
    reader = gguf.GGUFReader(out)
    alpha = float(reader.get_field("adapter.lora.alpha").contents())
    found = {x.name: np.array(x.data, np.float64) for x in reader.tensors}
    compared = 0
    for name, module in theirs.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        layer = name.split(".")[4]
        role = {"v_proj": "attn_v", "o_proj": "attn_output", "down_proj": "ffn_down"}
        own = f"blk.{layer}.{role[name.split('.')[-1]]}.weight"
        a, b = found[f"{own}.lora_a"], found[f"{own}.lora_b"]
        delta = module.get_delta_weight("default").detach().numpy()
        update = alpha / b.shape[1] * b @ a  # as llama.cpp scales
        assert_close(update.astype(np.float32), delta)
        compared += 1
    assert compared == 6


def llama_cpp(folder):
    """The script of llama.cpp, from the source of its Python package."""
    package = "llama-cpp-python==0.3.36"
    words = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([sys.executable, *words, "--dest", str(folder / "sdist"), package], check=True)
    (archive,) = (folder / "sdist").iterdir()
    with tarfile.open(archive) as tar:
        wanted = ("convert_lora_to_gguf.py", "convert_hf_to_gguf.py")
        inner = ("/vendor/llama.cpp/conversion/", "/vendor/llama.cpp/gguf-py/")
        members = [
            x for x in tar if x.name.endswith(wanted) or any(part in x.name for part in inner)
        ]
        tar.extractall(folder / "llama_cpp", members, filter="data")
    (script,) = (folder / "llama_cpp").rglob("convert_lora_to_gguf.py")
    shutil.rmtree(folder / "sdist")
    return script
