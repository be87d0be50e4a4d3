"""Measure training and serving of many adapters over one base.

The model is a Llama of the shape of Llama-3-8B with random bfloat16 weights, rank 16 on all seven
projections. Training is one step of AdamW on N adapters, which share the same number of tokens.
Serving uses the base alone, one adapter for all rows, or for each row its adapter from a stack of
64. It reads prompts, and one token per row with a cache. All medians are from one run::

    python -m benchmarks.many.together            # one GPU of 80 GB or more
    python -m benchmarks.many.together --quick    # a tiny model, on any device
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax
from benchmarks.recipes.scaling import LLAMA_8B, TINY, random_like
from lora_jax import LoraParams
from lora_jax.recipes.models import llama

ADAPTERS = (1, 4, 16)  # trained at once
AXES = llama.Cache(keys=1, values=1, lengths=0)  # the axes of the batch


def random_llama(quick: bool, layers: int | None, **options: Any) -> tuple[llama.Llama, Any]:
    """Make a Llama of the shape of Llama-3-8B, or a tiny one, and random bfloat16 parameters."""
    sizes = dict(TINY if quick else LLAMA_8B) | ({"num_hidden_layers": layers} if layers else {})
    model = llama.from_config(sizes, dtype=jnp.bfloat16, scan_layers=True, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8), jnp.int32))["params"]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    return model, random_like(shapes, 1)


def median_seconds(step: Callable[[Any], Any], carry: Any, repeats: int) -> float:
    """Return the median time of ``carry = step(carry)`` after two warm-up runs."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        carry = jax.block_until_ready(step(carry))
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure_training(
    model: llama.Llama, base: Any, rank: int, count: int, args: Any
) -> dict[str, Any]:
    """Measure a training step on ``count`` adapters, which share the rows."""
    apply, tx = lora_jax.lora(model.apply), optax.adamw(1e-4)

    def loss(trainable, frozen, ids):
        logits = apply({"params": lora_jax.combine(trainable, frozen)}, ids)[:, :-1]
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def step(trainable, opt_state, frozen, ids):
        value, grads = jax.value_and_grad(loss)(trainable, frozen, ids)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    together = jax.vmap(step, in_axes=(0, 0, LoraParams(base=None, adapter=0), 0))
    fresh = lora_jax.lorafy(base, rank, targets="all-linear").adapter
    stacked = lora_jax.many.stack([fresh] * count)
    trainable, frozen = lora_jax.split(LoraParams(base, stacked))
    ids = jax.random.randint(
        jax.random.key(0), (count, args.rows // count, args.length), 0, model.vocab_size
    )
    carry = trainable, jax.vmap(tx.init)(trainable)
    jitted = jax.jit(together, donate_argnums=(0, 1))
    compiled = jitted.lower(*carry, frozen, ids).compile()
    found = median_seconds(lambda c: compiled(*c[:2], frozen, ids), (*carry, None), args.repeats)
    memory = compiled.memory_analysis()
    return {
        "what": "a training step",
        "how": f"{count} adapters" if count > 1 else "1 adapter",
        "ms": 1000 * found,
        "temp_gb": memory.temp_size_in_bytes / 1e9,
    }


def measure_serving(model: llama.Llama, base: Any, rank: int, args: Any) -> list[dict[str, Any]]:
    """Measure prompts and tokens with the base, one adapter, and an adapter for each row."""

    def plain(p, ids, cache):
        return model.apply({"params": p}, ids, cache)

    shapes = jax.eval_shape(
        lambda p: lora_jax.lorafy(p, rank, targets="all-linear", dtype=model.dtype).adapter, base
    )
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((args.stack, *x.shape), x.dtype), shapes)
    many = LoraParams(base, random_like(stack, 2))
    one = LoraParams(base, random_like(shapes, 2))
    lora_rows = lora_jax.many.lora_rows(plain, in_axes=(None, 0, AXES), out_axes=(0, AXES))

    def apply_rows(p, ids, cache):
        lora_ids = jnp.arange(len(ids), dtype=jnp.int32) * 7 % args.stack
        return lora_rows(p, ids, cache, lora_ids=lora_ids)

    ways = {
        "the base alone": (plain, base),
        "one adapter": (lora_jax.lora(plain), one),
        f"rows of {args.stack} adapters": (apply_rows, many),
    }
    found = []
    for what, count, length in (
        ("a prompt", args.prompts, args.length),
        ("a token", args.streams, 1),
    ):
        ids = jnp.ones((count, length), jnp.int32)
        for how, (apply, params) in ways.items():

            def next_tokens(params, ids, cache, apply=apply):
                logits, cache = apply(params, ids, cache)
                return logits[:, -1].argmax(-1), cache._replace(lengths=cache.lengths % args.length)

            step = jax.jit(next_tokens, donate_argnums=2)
            cache = model.empty(count, 2 * args.length)
            compiled = step.lower(params, ids, cache).compile()
            took = median_seconds(
                lambda c, run=compiled, p=params, ids=ids: run(p, ids, c[1]),
                (None, cache),
                args.repeats,
            )
            temp = compiled.memory_analysis().temp_size_in_bytes / 1e9
            what_of = f"{what} of {length} for {count}" if length > 1 else f"{what} for {count}"
            found.append({"what": what_of, "how": how, "ms": 1000 * took, "temp_gb": temp})
    return found


def main() -> None:
    """Measure all, and print a table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument(
        "--rows", type=int, default=16, help="rows per training step, over all adapters"
    )
    options.add_argument("--length", type=int, default=512, help="tokens per row")
    options.add_argument("--prompts", type=int, default=16, help="number of prompts")
    options.add_argument(
        "--streams", type=int, default=64, help="number of rows that read one token"
    )
    options.add_argument("--stack", type=int, default=64, help="number of adapters in the stack")
    options.add_argument("--layers", type=int, help="number of layers instead of 32")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--quick", action="store_true", help="a tiny model")
    options.add_argument("--json", type=Path, help="JSON file to write")
    args = options.parse_args()
    model, base = random_llama(args.quick, args.layers, remat=True)
    args.length = min(args.length, 32) if args.quick else args.length
    found = [measure_training(model, base, args.rank, n, args) for n in ADAPTERS]
    found += measure_serving(model, base, args.rank, args)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {model.num_hidden_layers} layers"
    )
    first: dict[str, float] = {}
    for row in found:
        ratio = row["ms"] / first.setdefault(row["what"], row["ms"])
        print(
            f"{row['what']:24}{row['how']:22}{row['ms']:9.2f} ms{ratio:7.3f}"
            f"{row['temp_gb']:9.2f} GB temp"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
