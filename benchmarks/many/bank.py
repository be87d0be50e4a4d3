"""Measure a queue of prompts served from a bank: tokens per second by number of adapters.

The model is a Llama of the shape of Llama-3-8B with random bfloat16 weights, rank 16 on all seven
projections. ``examples/serving.py`` decodes the same prompts with the base (by id -1), with one
adapter, with 64 adapters in 64 slots, and in fewer slots, where adapters are loaded when they are
needed. Reading prompts with the full bank is compared with the base alone, without LoRA. All
numbers are from one run::

    python -m benchmarks.many.bank            # one GPU of 80 GB or more
    python -m benchmarks.many.bank --quick    # a tiny model, on any device
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
from serving import Request, Server

import lora_jax
from benchmarks.many.together import AXES, median_seconds, random_like, random_llama
from lora_jax import LoraParams
from lora_jax.many import AdapterBank
from lora_jax.recipes.models import llama


def make_bank(base: Any, args: Any, slots: int, count: int) -> AdapterBank:
    """Make a bank of ``count`` adapters: one adapter under many names costs as much as many."""
    shapes = jax.eval_shape(lambda p: lora_jax.lorafy(p, args.rank, targets="all-linear"), base)
    like = LoraParams(base, shapes.adapter)
    bank = AdapterBank(like, slots, dtype=jnp.bfloat16, donate=True)
    one = jax.device_get(random_like(shapes.adapter, 2))
    for k in range(count):
        bank.add(f"adapter{k}", one)
    return bank


def loading_seconds(bank: AdapterBank) -> float:
    """Return the median seconds to load an adapter from host memory into its slot."""
    names, times = list(bank)[:20], []
    for name in names:
        start = time.perf_counter()
        bank.acquire(name)
        jax.block_until_ready(bank.lora_params.adapter)
        times.append(time.perf_counter() - start)
        bank.release(name)
    return statistics.median(times)


def measure_prompts(
    model: llama.Llama, base: Any, bank: AdapterBank, args: Any
) -> dict[str, float]:
    """Return the milliseconds to read prompts, each with its adapter, and with the base alone."""

    def plain(p: Any, ids: jax.Array, cache: llama.Cache) -> Any:
        return model.apply({"params": p}, ids, cache)

    apply_rows = lora_jax.many.lora_rows(plain, in_axes=(None, 0, AXES), out_axes=(0, AXES))
    ids = jnp.ones((args.prompts, args.prompt), jnp.int32)
    names = [f"adapter{7 * k % args.adapters}" for k in range(args.prompts)]
    with bank.using(names) as (lora_params, slots):
        ways = {
            "base": (plain, base),
            "rows": (lambda p, ids, cache: apply_rows(p, ids, cache, lora_ids=slots), lora_params),
        }
        found = {}
        for how, (apply, params) in ways.items():

            def read(params, ids, cache, apply=apply):
                logits, cache = apply(params, ids, cache)
                return logits[:, -1].argmax(-1), cache

            step = jax.jit(read, donate_argnums=2)
            cache = model.empty(args.prompts, args.prompt)
            compiled = step.lower(params, ids, cache).compile()

            def run(carry, compiled=compiled, params=params):
                return compiled(params, ids, carry[1]._replace(lengths=carry[1].lengths * 0))

            found[how] = 1000 * median_seconds(run, (None, cache), args.repeats)
    return found


def serve(
    model: llama.Llama, bank: AdapterBank, names: Sequence[str | None], args: Any
) -> dict[str, Any]:
    """Decode one prompt per name, all of the same length."""
    size = args.length + args.new
    server = Server(model, bank, rows=args.rows, size=size, lengths=[args.length])
    prompts = np.random.default_rng(0).integers(0, model.vocab_size, (len(names), args.length))
    for prompt, name in zip(prompts.tolist(), names, strict=True):
        server.submit(Request(prompt, name, args.new))
    server.warm_up()
    before = bank.stats
    start = time.perf_counter()
    done = list(server.run())
    took = time.perf_counter() - start
    assert all(one.error is None for one in done), done[0].error
    return {
        "tokens_per_s": server.tokens / took,
        "seconds": took,
        "steps": server.steps,
        "misses": bank.stats.misses - before.misses,
    }


def measure_queues(
    model: llama.Llama, base: Any, args: Any
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure reading prompts, and decoding a queue with each number of adapters and slots."""
    bank = make_bank(base, args, 1, 1)
    found = [
        {"how": "the base, by id -1"} | serve(model, bank, [None] * args.requests, args),
        {"how": "one adapter"} | serve(model, bank, ["adapter0"] * args.requests, args),
    ]
    chosen = np.random.default_rng(1).integers(0, args.adapters, args.requests)
    read: dict[str, float] = {}
    for slots in args.slots:
        bank = make_bank(base, args, slots, args.adapters)
        if slots >= args.adapters:
            read = measure_prompts(model, base, bank, args)
        load = {"load_ms": 1000 * loading_seconds(bank)}
        served = serve(model, bank, [f"adapter{k}" for k in chosen], args)
        found.append({"how": f"{args.adapters} adapters in {slots} slots"} | served | load)
        del bank  # before the next one takes as much memory
    return read, found


def main() -> None:
    """Measure all, and print a table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--requests", type=int, default=256, help="number of prompts to decode")
    options.add_argument("--length", type=int, default=128, help="tokens per prompt")
    options.add_argument("--new", type=int, default=64, help="tokens to add to each prompt")
    options.add_argument("--prompts", type=int, default=16, help="prompts to read at once")
    options.add_argument("--prompt", type=int, default=512, help="tokens of each of --prompts")
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--rows", type=int, default=64, help="prompts decoded at once")
    options.add_argument("--adapters", type=int, default=64)
    options.add_argument("--slots", type=int, nargs="+", default=[64, 32, 16])
    options.add_argument("--layers", type=int, help="number of layers instead of 32")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--quick", action="store_true", help="a tiny model")
    options.add_argument("--json", type=Path, help="JSON file to write")
    args = options.parse_args()
    if args.quick:
        args.requests, args.length, args.new, args.rows = 32, 8, 8, 8
        args.adapters, args.slots, args.prompts, args.prompt = 8, [8, 2], 4, 16
    model, base = random_llama(args.quick, args.layers)
    read, found = measure_queues(model, base, args)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {model.num_hidden_layers} layers, "
        f"{args.requests} prompts of {args.length} tokens, {args.new} new ones each, {args.rows} "
        "rows"
    )
    if read:
        print(
            f"{args.prompts} prompts of {args.prompt} tokens: the base {read['base']:.1f} ms, "
            f"one of {args.adapters} adapters for each {read['rows']:.1f} ms, "
            f"ratio {read['rows'] / read['base']:.3f}"
        )
    for row in found:
        ratio = row["tokens_per_s"] / found[0]["tokens_per_s"]
        loads = f"{row['misses']:5} loaded" if row["misses"] else ""
        loads += f", {row['load_ms']:.1f} ms each" if "load_ms" in row else ""
        print(
            f"{row['how']:26}{row['tokens_per_s']:9.0f} tokens/s{ratio:7.3f}"
            f"{row['steps']:6} steps {loads}"
        )
    if args.json:
        args.json.write_text(
            json.dumps({"prompts_ms": read, "served": found}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
