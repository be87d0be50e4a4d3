"""LoRA training on one and on several devices: time, tokens, memory, and what crosses devices.

A Llama of the shape of Llama-3-8B with random bfloat16 weights, scanned and checkpointed layers,
rank 16 on all seven projections, AdamW on the adapter. Each mode does a batch of the same size per
device; the efficiency is the time of one device over that of several::

    python benchmarks/scaling.py            # all devices there are
    python benchmarks/scaling.py --quick    # a tiny model, anywhere
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "examples"))
sys.path.append(str(Path(__file__).parents[1] / "examples" / "models"))

import hlo
import jax
import jax.numpy as jnp
import llama
import lm_mesh
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax

LLAMA_8B = {
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
DTYPE = jnp.bfloat16


def measured(sizes: dict[str, Any], mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """A mode such as ``data=2``: compiled, run, and looked into."""
    count = 1 if mode == "one" else jax.device_count()
    shape = {"one": (1, 1, 1), "data": (count, 1, 1), "fsdp": (1, count, 1)}[mode]
    mesh = jax.make_mesh(
        shape,
        lm_mesh.AXES,
        devices=jax.devices()[:count],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    rows = NamedSharding(mesh, P(lm_mesh.ROWS))
    model = llama.Llama(
        **sizes, scan_layers=True, remat=True, dtype=DTYPE, activations=rows, rms_norm_eps=1e-5
    )
    ids = jax.random.randint(
        jax.random.key(0), (args.batch * count, args.length), 0, sizes["vocab_size"]
    )
    ids = jax.device_put(ids, rows)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids[:1])["params"]
    like = lm_mesh.placed(shapes, mesh, DTYPE)

    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda x: x.sharding, like))
    def random(key):
        leaves, tree = jax.tree.flatten(like)
        keys = jax.random.split(key, len(leaves))
        made = [
            0.02 * jax.random.normal(k, x.shape, DTYPE) for k, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, made)

    params = random(jax.random.key(1))
    layout = lora_jax.layout_of(model.apply, {"params": like}, ids)
    lora_params = lora_jax.lorafy(params, args.rank, targets="all-linear", layout=layout)
    trainable, frozen = lora_jax.split(lora_params)
    tx = optax.adamw(1e-4)
    places = lora_jax.split(lora_jax.shardings(lora_params))[0]
    of_state = lora_jax.state_shardings(jax.eval_shape(tx.init, trainable), trainable, places)
    opt_state = jax.jit(tx.init, out_shardings=of_state)(trainable)

    def loss(lora_params, ids):
        logits = lora_jax.lora(model.apply)({"params": lora_params}, ids)[:, :-1]
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    @functools.partial(
        jax.jit, donate_argnums=(0, 1), out_shardings=(places, of_state, NamedSharding(mesh, P()))
    )
    def step(trainable, opt_state, frozen, ids):
        value, grads = lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen), ids)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    compiled = step.lower(trainable, opt_state, frozen, ids).compile()
    times = []
    for _ in range(args.repeats + 2):
        start = time.perf_counter()
        trainable, opt_state, value = compiled(trainable, opt_state, frozen, ids)
        jax.block_until_ready(value)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])
    memory, crossing = compiled.memory_analysis(), hlo.collectives(compiled.as_text())
    by_kind: dict[str, int] = {}
    for c in crossing:
        by_kind[c.kind] = by_kind.get(c.kind, 0) + c.bytes * c.times
    return {
        "mode": mode if mode == "one" else f"{mode}={count}",
        "devices": count,
        "ms": 1000 * seconds,
        "tokens_per_s": ids.size / seconds,
        "loss": float(value),
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
        "adapter_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trainable)),
        "collective_bytes": by_kind,
    }


def main() -> None:
    """Measure all modes, and print a table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--batch", type=int, default=4, help="rows a device")
    options.add_argument("--length", type=int, default=2048)
    options.add_argument("--layers", type=int, help="other than 32")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--quick", action="store_true", help="a tiny model")
    options.add_argument("--json", type=Path, help="file to write")
    args = options.parse_args()
    sizes = TINY if args.quick else LLAMA_8B
    args.length = min(args.length, 64) if args.quick else args.length
    sizes = sizes | ({"num_hidden_layers": args.layers} if args.layers else {})
    modes = ("one", "data", "fsdp") if jax.device_count() > 1 else ("one",)
    rows = [measured(sizes, mode, args) for mode in modes]
    print(f"jax {jax.__version__}, {jax.device_count()} x {jax.devices()[0].device_kind}")
    print("mode       ms/step  tokens/s  efficiency  arguments GB  temp GB  collectives, MB a step")
    for row in rows:
        crossing = ", ".join(f"{k} {n / 1e6:.1f}" for k, n in row["collective_bytes"].items())
        print(
            f"{row['mode']:9}{row['ms']:9.1f}{row['tokens_per_s']:10,.0f}"
            f"{rows[0]['ms'] / row['ms']:12.3f}{row['arguments_gb']:14.2f}{row['temp_gb']:9.2f}"
            f"  {crossing or '-'} (adapter {row['adapter_bytes'] / 1e6:.1f})"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
