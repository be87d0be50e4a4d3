"""Write a tiny model and its adapters in all formats, for the tests of the commands."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy as library
from helpers import drawn, randomize_b, tolerance

import lora_jax
from lora_jax.io import hf, orbax, peft, safetensors
from lora_jax.io.hf import _shards

RNG = np.random.default_rng(0)


def floats(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def parameters():
    layers = {
        str(k): {
            "self_attn": {
                "q_proj": {"kernel": floats(8, 8), "bias": floats(8)},
                "v_proj": {"kernel": floats(8, 4)},
            },
            "norm": {"scale": floats(8)},
        }
        for k in range(2)
    }
    model = {"embed_tokens": {"embedding": floats(11, 8)}, "layers": layers}
    return {"model": model, "score": {"kernel": floats(8, 3)}}


PARAMS = parameters()
PLAIN = {"targets": [".*q_proj/kernel", ".*v_proj/kernel"]}
DORA = PLAIN | {"dora": True, "full": "score.*"}
EQUAL = ("--tolerance", f"{tolerance():g}")  # the rounding of float32
MORE = PLAIN | {"rows": {".*embed.*": [3, 5]}, "bias": "lora_only"}


def write_all(folder):
    """Write the model and its adapters in all formats, with the names in the help texts."""
    hf.save(folder / "model", PARAMS, hf.Family())
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    orbax.save_params(folder / "params", PARAMS)
    lora_params = adapted({}, 2)
    peft.save(folder / "adapter", lora_params, base_model="tiny/llama")
    safetensors.save(folder / "native", lora_params, content=True, about="of mine")
    safetensors.save(folder / "bare", lora_params.adapter)
    orbax.save(folder / "orbax", lora_params)
    other = adapted({}, {".*q_proj.*": 3, ".*": 2}, seed=7)
    peft.save(folder / "other", other)
    safetensors.save(folder / "other_native", other)
    for name, options in (("dora", DORA), ("more", MORE)):
        lora_params = adapted(options, 2, seed=3)
        full = {p: x + 1 for p, x in lora_params.adapter.full.items()}
        adapter = lora_jax.Adapter(lora_params.adapter.factors, full)
        lora_params = lora_jax.LoraParams(PARAMS, adapter)
        peft.save(folder / name, lora_params)
        safetensors.save(folder / f"{name}_native", lora_params)
    with orbax.Checkpointer(folder / "run") as checkpointer:
        for step in (5, 10):
            checkpointer.save(step, adapted({}, 2, seed=step))
    hf.save(folder / "tuned", lora_jax.merge(adapted({}, 2)), source=folder / "model")
    orbax.save_params(folder / "tuned_params", lora_jax.merge(adapted({}, 2)))


def adapted(options, rank, seed=1):
    options = {"init": drawn} | PLAIN | options
    return randomize_b(lora_jax.lorafy(PARAMS, rank, **options), seed)


def updates(lora_params):
    """Compute every update in float64."""
    return {
        path: float(f.scale) * np.asarray(f.a, np.float64) @ np.asarray(f.b, np.float64)
        for path, f in lora_params.adapter.factors.items()
    }


def rank_of(x):
    s = np.linalg.svd(x, compute_uv=False)
    p = s[s > 1e-9 * s[0]] / s.sum()
    return np.exp(-(p * np.log(p)).sum())


def tensors_of(folder):
    return {name: t.read() for name, t in _shards.tensors_in(folder).items()}


def tensors(folder):
    return library.load_file(Path(folder) / peft.TENSORS)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype
        assert np.array_equal(x, other[name]), name


def damage(path, change):
    found = tensors(path)
    change(found)
    library.save_file(found, Path(path) / peft.TENSORS, metadata={"format": "pt"})


def run(*words, **options):
    command = [sys.executable, "-m", "lora_jax.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)
