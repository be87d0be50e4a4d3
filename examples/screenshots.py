"""Draw the pictures of the command line, ``examples/inspect.svg`` and ``examples/merge.svg``.

They show a tiny random model and a random adapter, or the arguments of ``--model`` and
``--adapter``.
"""

import argparse
import json
import os
import re
import shlex
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

import lora_jax
from lora_jax.cli import main as run
from lora_jax.cli._show import Show
from lora_jax.io import hf, peft

HERE = Path(__file__).absolute().parent
WIDTH = 100


def parameters(layers: int = 4, width: int = 256, vocabulary: int = 2048):
    """Return random parameters of a small Llama."""
    rng = np.random.default_rng(0)

    def kernel(*shape):
        return {"kernel": jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)}

    def layer():
        heads = {name: kernel(width, width) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        mlp = {"up_proj": kernel(width, 3 * width), "down_proj": kernel(3 * width, width)}
        return {"self_attn": heads, "mlp": mlp, "input_layernorm": {"scale": jnp.ones(width)}}

    table = {"embedding": jnp.asarray(rng.normal(size=(vocabulary, width)), jnp.float32)}
    stack = {str(k): layer() for k in range(layers)}
    return {"model": {"embed_tokens": table, "layers": stack, "norm": {"scale": jnp.ones(width)}}}


def make(folder: Path) -> tuple[Path, Path]:
    """Write a model, and an adapter with random factors."""
    model, adapter = folder / "tiny-llama", folder / "my-adapter"
    params = parameters()
    hf.save(model, params, hf.FAMILIES["llama"])
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    lora_params = lora_jax.lorafy(params, {".*q_proj.*": 16, ".*": 8}, alpha=16.0)
    factors = {}
    for k, (path, f) in enumerate(lora_params.adapter.factors.items()):
        noise = jax.random.normal(jax.random.key(k), f.b.shape) * 0.5 ** jnp.arange(f.rank)[:, None]
        factors[path] = f.map(lambda name, x, b=noise: 0.03 * b if name == "b" else x)
    peft.save(
        adapter, lora_jax.LoraParams(params, lora_jax.Adapter(factors)), base_model="tiny-llama"
    )
    return model, adapter


def picture(name: str, *words: str) -> None:
    """Run a command, and draw its output."""
    with open(os.devnull, "w") as nowhere:
        console = Console(
            width=WIDTH, record=True, file=nowhere, force_terminal=True, highlight=False
        )
        console.print(f"[bold green]$[/] lora-jax {shlex.join(words)}")
        if status := run(words, Show(console)):
            raise SystemExit(status)
        path = HERE / f"{name}.svg"
        form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.S)  # no downloads
        console.save_svg(str(path), title="lora-jax", code_format=form, unique_id=f"lora-{name}")
    print(path)


def main() -> None:
    """Draw both pictures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", type=Path, help="the folder of a model")
    options.add_argument("--adapter", type=Path, help="an adapter of the model")
    options.add_argument("--top", default="8", help="rows to show")
    args = options.parse_args()
    if (args.model is None) != (args.adapter is None):
        options.error("--model and --adapter go together")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, adapter = (args.model, args.adapter) if args.model else make(folder)
        for path in (model, adapter):  # short names in the commands
            if path.parent != folder:
                (folder / path.name).symlink_to(path.absolute(), target_is_directory=path.is_dir())
        os.chdir(folder)
        sorting = ("--sort", "norm", "--top", args.top)
        picture("inspect", "inspect", adapter.name, "--base", model.name, *sorting)
        picture("merge", "merge", model.name, adapter.name, "merged", "--dtype", "bfloat16")


if __name__ == "__main__":
    main()
