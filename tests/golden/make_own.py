"""Write the golden files of this library for ``tests/io/test_golden.py``.

``python tests/golden/make_own.py FOLDER`` writes the files of the current version. The files in
``tests/golden/own`` are never overwritten; a new version of a record gets a new folder. Values do
not depend on the machine: all are small integers, and the sums of a merge are exact.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

import lora_jax
from lora_jax.io import hf, orbax, peft, safetensors

CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "float32"}
WORDS = "a golden file"
STEP, SEEN = 7, {"seen": 224, "name": "reviews"}


def integers(seed, *shape, dtype=np.float32):
    """Make integers from -4 to 4, whose products and sums are exact."""
    numbers = (np.arange(np.prod(shape)) * 7919 + 31 * seed) % 101 % 9 - 4
    return numbers.reshape(shape).astype(dtype)


def model():
    """Make a table, two dense layers and a stack; no column is zero."""
    return {
        "table": {"embedding": jnp.asarray(integers(0, 9, 6))},
        "query": {"kernel": jnp.asarray(integers(1, 6, 8)), "bias": jnp.asarray(integers(2, 8))},
        "out": {"kernel": jnp.asarray(integers(3, 8, 5, dtype=ml_dtypes.bfloat16))},
        "layers": {"w": jnp.asarray(integers(4, 3, 6, 6))},
    }


KINDS = {
    "plain": {"targets": "query/kernel|out/kernel|layers/w", "rank": {"query/.*": 3, ".*": 2}},
    "dora": {"targets": "query/kernel", "dora": True},
    "ranges": {"targets": ["query/kernel[:, 0:4]", "query/kernel[:, 4:8]"], "alpha": 5.0},
    "rows": {"targets": "query/kernel", "rows": {"table/embedding": [7, 2]}},
    "whole": {"targets": "query/kernel", "full": "out/kernel", "bias": "all"},
    "residual": {"targets": "query/kernel", "init": "pissa"},
    "stacked": {"targets": "layers/w", "dora": True, "rslora": True},
}


def trained(adapter):
    """Replace all trained numbers of an adapter."""

    def replace(name, x):
        if name not in f.trainable:
            return x
        return jnp.asarray(integers(len(spelled) + len(name), *x.shape) / 8, x.dtype)

    factors = {}
    for key, f in adapter.factors.items():
        spelled = f"{key}[{list(f.ids)}]" if isinstance(f, lora_jax.Rows) else key
        factors[key] = f.map(replace)
    full = {path: jnp.asarray(integers(6, *x.shape), x.dtype) for path, x in adapter.full.items()}
    return lora_jax.Adapter(factors, full)


def kind(name):
    """Make LoraParams of a kind."""
    options = {"rank": 2, "layout": {"layers/w": "bio", ".*": "io"}, **KINDS[name]}
    lora_params = lora_jax.lorafy(model(), **options)
    # The base that PiSSA leaves depends on rounding: keep the original base.
    return dataclasses.replace(lora_params, base=model(), adapter=trained(lora_params.adapter))


def training():
    """Make LoraParams, and a state of the optimizer with new numbers."""
    lora_params = kind("plain")
    state = lora_jax.optimizer(optax.sgd(0.5, momentum=0.5)).init(lora_params)
    return lora_params, jax.tree.map(lambda x: jnp.asarray(integers(5, *x.shape), x.dtype), state)


def tensors():
    """Make the tensors of a small Llama, with PyTorch's names."""
    shapes = {"model.embed_tokens": (9, 6), "lm_head": (9, 6)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{x}_proj": (6, 6) for x in "qkvo"}
        shapes |= {f"{at}.mlp.gate_proj": (8, 6), f"{at}.mlp.down_proj": (6, 8)}
    return {f"{name}.weight": integers(k, *shape) for k, (name, shape) in enumerate(shapes.items())}


def tree():
    """Make the same tensors as a tree of ``[out, in]`` weights."""
    found = {}
    for name, x in tensors().items():
        *path, last = name.split(".")
        at = found
        for part in path:
            at = at.setdefault(part, {})
        at["embedding" if "embed_tokens" in path else last] = jnp.asarray(x)
    return found


LLAMA = {"model/embed_tokens/.*": "io", ".*": "oi"}
PEFT = {
    "plain": {},
    "dora": {"dora": True},
    "rows": {"rows": {"model/embed_tokens/embedding": [7, 2]}},
    "whole": {"full": "lm_head/weight"},
}


def llama(name):
    """Make LoraParams of that Llama."""
    options = {"targets": ".*(q_proj|v_proj|gate_proj)/weight", "layout": LLAMA, **PEFT[name]}
    lora_params = lora_jax.lorafy(tree(), 2, alpha=4.0, **options)
    return dataclasses.replace(lora_params, adapter=trained(lora_params.adapter))


def write(folder):
    """Write every kind of file."""
    folder.mkdir(parents=True)
    for name in KINDS:
        save(folder / f"{name}.safetensors", name)
    orbax.save(folder / "orbax_adapter", kind("dora"), content=True)
    orbax.save_params(folder / "orbax_params", model())
    with orbax.Checkpointer(folder / "orbax_training") as checkpointer:
        checkpointer.save(STEP, *training(), SEEN)
    for path in folder.rglob("commit_success.txt"):  # Orbax only checks that it exists
        path.write_text("committed\n")
    for name in PEFT:
        peft.save(folder / f"peft_{name}", llama(name), layout=LLAMA)
    merge(folder / "peft_plain", folder)


def save(path, name):
    """Write LoraParams of a kind, with checksums of the base."""
    safetensors.save(path, kind(name), content=True, about=WORDS)


def merge(adapter, folder):
    """Write a model, and merge an adapter into its files."""
    from safetensors.numpy import save_file

    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / "model" / "model.safetensors", {"format": "pt"})
    hf.merge(folder / "model", adapter, folder / "merged")


if __name__ == "__main__":
    write(Path(sys.argv[1]).absolute())
