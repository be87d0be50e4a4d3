"""Measure a step of the trainer on one and on several devices, and the bytes that cross devices.

The step is that of ``examples/train_lm.py``. The model is a Llama of the shape of Llama-3-8B with
random bfloat16 weights, made on the devices; layers are scanned and checkpointed; rank 16 on all
seven projections, AdamW on the adapter. The batch per device is the same in all modes; the
efficiency is the time of one device over that of several::

    python -m benchmarks.recipes.scaling            # on all devices
    python -m benchmarks.recipes.scaling --quick    # a tiny model, on any device
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax
from benchmarks import hlo
from lora_jax.recipes.lm import flags as lm_flags
from lora_jax.recipes.lm import job as lm_job
from lora_jax.recipes.lm import mesh as lm_mesh
from lora_jax.recipes.lm import metrics as lm_metrics
from lora_jax.recipes.lm.data import Rows
from lora_jax.recipes.lm.startup import Startup, compile_step

LLAMA_8B = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 500_000.0,
}
TINY = LLAMA_8B | {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
OPTIONS = ("--dtype", "bfloat16", "--targets", "all-linear")  # flags of train_lm.py


def random_base(like: Any) -> Any:
    """Make random parameters of these shapes, on the devices of these shardings."""
    shardings = jax.tree.map(lambda x: x.sharding, like)
    return random_like(like, 1, out_shardings=shardings)


def random_like(shapes: Any, seed: int, std: float = 0.02, **options: Any) -> Any:
    """Make random arrays of these shapes; ``options`` are those of ``jax.jit``."""

    def draw(key: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(key, len(leaves))
        pairs = zip(keys, leaves, strict=True)
        return tree.unflatten([std * jax.random.normal(k, x.shape, x.dtype) for k, x in pairs])

    return jax.jit(draw, **options)(jax.random.key(seed))


def measure(sizes: dict[str, Any], mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compile, run and analyze the step in a mode: ``one``, ``data`` or ``fsdp``."""
    count = 1 if mode == "one" else jax.device_count()
    text = f"{mode if mode != 'one' else 'data'}={count}"
    flags = {"mesh": text, "batch": options.batch * count, "length": options.length}
    flags |= {"rank": options.rank, "remat": options.remat, "attention": options.attention}
    flags |= {"layers": options.layout}
    args = lm_flags.parse_args([*OPTIONS, *(f"--{name}={value}" for name, value in flags.items())])
    mesh = lm_mesh.mesh_of(args.mesh, count=count)
    model = lm_job.model_of(sizes, mesh, args)
    job = lm_job.prepare(model, random_base(lm_job.abstract(model, mesh, args)), args, mesh)
    state, frozen = job.state, job.frozen
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (args.batch, args.length + 1), np.int32)
    rows = job.place(Rows(tokens[:, :-1], tokens[:, 1:]))

    startup = Startup()
    compiled: Any = compile_step(job.steps, startup, state, frozen, rows, np.int32(0))
    print(startup)
    times, found = [], {}
    for k in range(options.repeats + 2):
        start = time.perf_counter()
        state, found = compiled(state, frozen, rows, np.int32(k))
        jax.block_until_ready(found)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    speed, peak = rows.ids.size / seconds, lm_metrics.peak() * count / jax.device_count()
    flops = lm_metrics.flops_per_token(
        model, lora_jax.combine(state.trainable, frozen), args.length
    )
    memory, crossing = compiled.memory_analysis(), hlo.collectives(compiled.as_text())
    by_kind: dict[str, int] = {}
    for c in crossing:
        by_kind[c.kind] = by_kind.get(c.kind, 0) + c.bytes * c.times
    return {
        "mode": text if mode != "one" else mode,
        "devices": count,
        "ms": 1000 * seconds,
        "tokens_per_s": speed,
        "mfu": None if math.isnan(peak) else speed * flops / peak,
        "loss": float(found["loss"]),
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
        "adapter_bytes": sum(x.nbytes for x in jax.tree.leaves(state.trainable)),
        "collective_bytes": by_kind,
    }


def main() -> None:
    """Measure all modes, and print a table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--batch", type=int, default=4, help="rows per device")
    options.add_argument("--length", type=int, default=2048)
    options.add_argument("--layers", type=int, help="number of layers instead of 32")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--remat", default="full", help="as the trainer's")
    options.add_argument("--layout", default="scanned", help="the trainer's --layers")
    options.add_argument("--attention", default="auto", help="as the trainer's")
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--quick", action="store_true", help="a tiny model")
    options.add_argument("--json", type=Path, help="JSON file to write")
    args = options.parse_args()
    sizes = TINY if args.quick else LLAMA_8B
    args.length = min(args.length, 64) if args.quick else args.length
    sizes = sizes | ({"num_hidden_layers": args.layers} if args.layers else {})
    modes = ("one", "data", "fsdp") if jax.device_count() > 1 else ("one",)
    rows = [measure(sizes, mode, args) for mode in modes]
    print(f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    print("mode       ms/step  tokens/s    MFU  efficiency  arguments GB  temp GB", end="")
    print("  collectives, MB per step")
    for row in rows:
        crossing = ", ".join(f"{k} {n / 1e6:.1f}" for k, n in row["collective_bytes"].items())
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        print(
            f"{row['mode']:9}{row['ms']:9.1f}{row['tokens_per_s']:10,.0f}{mfu:>7}"
            f"{rows[0]['ms'] / row['ms']:12.3f}{row['arguments_gb']:14.2f}{row['temp_gb']:9.2f}"
            f"  {crossing or '-'} (adapter {row['adapter_bytes'] / 1e6:.1f})"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
