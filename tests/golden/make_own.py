"""Files as this library writes them, for ``tests/io/test_golden.py``: small, and kept.

Run ``python tests/golden/make_own.py FOLDER`` to see what today's version writes. What
``tests/golden/own`` holds is never written again; a new version of a record gets another folder.
No value depends on a machine: all are made of whole numbers, and the sums of a merge are exact.
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


def whole(seed, *shape, dtype=np.float32):
    """Whole numbers from -4 to 4, whose products and sums are exact."""
    numbers = (np.arange(np.prod(shape)) * 7919 + 31 * seed) % 101 % 9 - 4
    return numbers.reshape(shape).astype(dtype)


def model():
    """A table, two dense layers and a stack; nothing in a column is zero throughout."""
    return {
        "table": {"embedding": jnp.asarray(whole(0, 9, 6))},
        "query": {"kernel": jnp.asarray(whole(1, 6, 8)), "bias": jnp.asarray(whole(2, 8))},
        "out": {"kernel": jnp.asarray(whole(3, 8, 5, dtype=ml_dtypes.bfloat16))},
        "layers": {"w": jnp.asarray(whole(4, 3, 6, 6))},
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
    """The adapter with other numbers in all that trains."""

    def new(name, x):
        if name not in f.trainable:
            return x
        return jnp.asarray(whole(len(spelled) + len(name), *x.shape) / 8, x.dtype)

    factors = {}
    for key, f in adapter.factors.items():
        spelled = f"{key}[{list(f.ids)}]" if isinstance(f, lora_jax.Rows) else key
        factors[key] = f.map(new)
    full = {path: jnp.asarray(whole(6, *x.shape), x.dtype) for path, x in adapter.full.items()}
    return lora_jax.Adapter(factors, full)


def kind(name):
    """An adapter of a kind, on its base."""
    options = {"rank": 2, "layout": {"layers/w": "bio", ".*": "io"}, **KINDS[name]}
    made = lora_jax.lorafy(model(), **options)
    # What PiSSA leaves of the base is a matter of rounding: the base as it was stands in.
    return dataclasses.replace(made, base=model(), adapter=trained(made.adapter))


def training():
    """An adapter, and a state of its optimizer with other numbers than it begins with."""
    lora_params = kind("plain")
    state = lora_jax.optimizer(optax.sgd(0.5, momentum=0.5)).init(lora_params)
    return lora_params, jax.tree.map(lambda x: jnp.asarray(whole(5, *x.shape), x.dtype), state)


def tensors():
    """The tensors of a small Llama, by PyTorch's names."""
    shapes = {"model.embed_tokens": (9, 6), "lm_head": (9, 6)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{x}_proj": (6, 6) for x in "qkvo"}
        shapes |= {f"{at}.mlp.gate_proj": (8, 6), f"{at}.mlp.down_proj": (6, 8)}
    return {f"{name}.weight": whole(k, *shape) for k, (name, shape) in enumerate(shapes.items())}


def tree():
    """The same as a tree, [out, in]."""
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
    """An adapter of that Llama."""
    options = {"targets": ".*(q_proj|v_proj|gate_proj)/weight", "layout": LLAMA, **PEFT[name]}
    made = lora_jax.lorafy(tree(), 2, alpha=4.0, **options)
    return dataclasses.replace(made, adapter=trained(made.adapter))


def write(folder):
    """Write every kind of file."""
    folder.mkdir(parents=True)
    for name in KINDS:
        save(folder / f"{name}.safetensors", name)
    orbax.save(folder / "orbax_adapter", kind("dora"), content=True)
    orbax.save_params(folder / "orbax_params", model())
    with orbax.Checkpointer(folder / "orbax_training") as checkpointer:
        checkpointer.save(STEP, *training(), SEEN)
    for path in folder.rglob("commit_success.txt"):  # Orbax looks whether it is there
        path.write_text("committed\n")
    for name in PEFT:
        peft.save(folder / f"peft_{name}", llama(name), layout=LLAMA)
    merge(folder / "peft_plain", folder)


def save(path, name):
    """Write an adapter of a kind, with checksums of its base."""
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
