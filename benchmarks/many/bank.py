"""A queue of prompts served from a bank's slots: tokens a second, by how many adapters there are.

A Llama of the shape of Llama-3-8B with random bfloat16 weights, rank 16 on all seven projections.
``examples/serving.py`` decodes the same prompts for the base (by id -1), for one adapter, and for
64 in as many slots, and in fewer, where adapters are loaded as their turn comes. Before
that, prompts by rows of the full bank beside the base alone, called without LoRA. All in one run::

    python -m benchmarks.many.bank            # one GPU of 80 GB or more
    python -m benchmarks.many.bank --quick    # a tiny model, anywhere
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
from benchmarks.many.together import AXES, random_like, random_llama, seconds
from lora_jax import LoraParams
from lora_jax.many import AdapterBank
from lora_jax.recipes.models import llama


def bank_of(base: Any, args: Any, slots: int, count: int) -> AdapterBank:
    """A bank of ``count`` adapters: the same numbers under many names, which is as much to do."""
    shapes = jax.eval_shape(lambda p: lora_jax.lorafy(p, args.rank, targets="all-linear"), base)
    like = LoraParams(base, shapes.adapter)
    bank = AdapterBank(like, slots, dtype=jnp.bfloat16, donate=True)
    one = jax.device_get(random_like(shapes.adapter, 2))
    for k in range(count):
        bank.add(f"adapter{k}", one)
    return bank


def loading(bank: AdapterBank) -> float:
    """The median seconds until an adapter that was in the host's memory is in its slot."""
    names, times = list(bank)[:20], []
    for name in names:
        start = time.perf_counter()
        bank.acquire(name)
        jax.block_until_ready(bank.lora_params.adapter)
        times.append(time.perf_counter() - start)
        bank.release(name)
    return statistics.median(times)


def prompts(model: llama.Llama, base: Any, bank: AdapterBank, args: Any) -> dict[str, float]:
    """The milliseconds of reading prompts, each by an adapter of its own; and by the base alone."""

    def plain(p: Any, ids: jax.Array, cache: llama.Cache) -> Any:
        return model.apply({"params": p}, ids, cache)

    by_rows = lora_jax.many.lora_rows(plain, in_axes=(None, 0, AXES), out_axes=(0, AXES))
    ids = jnp.ones((args.prompts, args.prompt), jnp.int32)
    names = [f"adapter{7 * k % args.adapters}" for k in range(args.prompts)]
    with bank.using(names) as (lora_params, slots):
        ways = {
            "base": (plain, base),
            "rows": (lambda p, ids, cache: by_rows(p, ids, cache, lora_ids=slots), lora_params),
        }
        found = {}
        for how, (apply, params) in ways.items():

            def last(params, ids, cache, apply=apply):
                logits, cache = apply(params, ids, cache)
                return logits[:, -1].argmax(-1), cache

            step = jax.jit(last, donate_argnums=2)
            cache = model.empty(args.prompts, args.prompt)
            compiled = step.lower(params, ids, cache).compile()

            def again(carry, compiled=compiled, params=params):
                return compiled(params, ids, carry[1]._replace(lengths=carry[1].lengths * 0))

            found[how] = 1000 * seconds(again, (None, cache), args.repeats)
    return found


def serve(
    model: llama.Llama, bank: AdapterBank, names: Sequence[str | None], args: Any
) -> dict[str, Any]:
    """Decode a prompt for each of the names, all of the same lengths."""
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


def main() -> None:
    """Measure all, and print a table."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--requests", type=int, default=256)
    options.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    options.add_argument("--new", type=int, default=64, help="tokens to add to each")
    options.add_argument("--prompts", type=int, default=16, help="prompts to read at once")
    options.add_argument("--prompt", type=int, default=512, help="tokens of each")
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--rows", type=int, default=64, help="prompts at work at once")
    options.add_argument("--adapters", type=int, default=64)
    options.add_argument("--slots", type=int, nargs="+", default=[64, 32, 16])
    options.add_argument("--layers", type=int, help="other than 32")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--quick", action="store_true", help="a tiny model")
    options.add_argument("--json", type=Path, help="file to write")
    args = options.parse_args()
    if args.quick:
        args.requests, args.length, args.new, args.rows = 32, 8, 8, 8
        args.adapters, args.slots, args.prompts, args.prompt = 8, [8, 2], 4, 16
    model, base = random_llama(args.quick, args.layers)

    one = bank_of(base, args, 1, 1)
    cases = [
        ("the base, by id -1", one, [None] * args.requests),
        ("one adapter", one, ["adapter0"] * args.requests),
    ]
    chosen = np.random.default_rng(1).integers(0, args.adapters, args.requests)
    mixed = [f"adapter{k}" for k in chosen]
    found: list[dict[str, Any]] = []
    read: dict[str, float] = {}
    for how, bank, names in cases:
        found.append({"how": how} | serve(model, bank, names, args))
    for slots in args.slots:
        bank = bank_of(base, args, slots, args.adapters)
        how = f"{args.adapters} adapters in {slots} slots"
        if slots >= args.adapters:
            read = prompts(model, base, bank, args)
        load = {"load_ms": 1000 * loading(bank)}
        found.append({"how": how} | serve(model, bank, mixed, args) | load)
        del bank
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {model.num_hidden_layers} layers, "
        f"{args.requests} prompts of {args.length} tokens, {args.new} new ones each, {args.rows} "
        "rows"
    )
    if read:
        print(
            f"{args.prompts} prompts of {args.prompt} tokens: the base {read['base']:.1f} ms, "
            f"each its own of {args.adapters} in the bank {read['rows']:.1f} ms, "
            f"{read['rows'] / read['base']:.3f}"
        )
    for row in found:
        ratio = row["tokens_per_s"] / found[0]["tokens_per_s"]
        loads = f"{row['misses']:5} loaded" if row["misses"] else ""
        loads += f", {row['load_ms']:.1f} ms one" if "load_ms" in row else ""
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
