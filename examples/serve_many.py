"""Serve many adapters of one language model at once, each prompt with its own.

    python examples/serve_many.py                 # SmolLM2, 24 prompts, 16 random adapters
    python examples/serve_many.py --requests 200 --adapters 64 --slots 8 --check 200
    python examples/serve_many.py --adapter poet=runs/lm/adapter --prompts prompts.jsonl

A queue of prompts is decoded with continuous batching (``serving.py``): a free row of the batch
takes the next prompt, with any adapter, or none. A few adapters are on the device, in the slots of
a bank, and the others are in host memory. An adapter is a PEFT folder, such as
``train_lm.py --export`` writes, or a file of ``lora_jax.io.safetensors``. If none is given,
adapters with random B are made up: their text means nothing, but each writes a different one.
``--prompts`` is a file with one prompt per line::

    {"prompt": "To be, or", "adapter": "poet", "max_new": 24}

A line without ``adapter`` uses the base alone; ``--max-new`` is the default of ``max_new``.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import data
import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from serve_check import TOLERANCE, check, plain_of
from serve_prompts import Prompt, check_names, make_prompts, read_prompts
from serving import Completion, Request, Server
from tokenizers import Tokenizer

import lora_jax
from lora_jax import LoraParams
from lora_jax.io import hf, peft, safetensors
from lora_jax.recipes.lm.data import tokenizer_of
from lora_jax.recipes.lm.flags import number
from lora_jax.recipes.models import llama


def run(args: argparse.Namespace) -> None:
    """Load the model and its adapters, decode the prompts, and print the completions."""
    console = Console(highlight=False)
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    files = named_files(args.adapter or [])
    names = list(files) or [f"random{k}" for k in range(args.adapters)]
    if args.prompts:
        prompts = list(read_prompts(args.prompts, args.max_new))
    else:
        prompts = list(make_prompts(names, args.requests, args.max_new, args.seed))
    check_names(prompts, names)
    path = args.model or data.smollm2()
    source = hf.open_source(path)
    if source.config is None:
        raise FileNotFoundError(f"--model {path}: no config.json in it")
    dtype = jnp.dtype(args.dtype)
    model = llama.from_config(source.config, scan_layers=True, dtype=dtype)
    tokenizer = tokenizer_of(source)

    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    base = hf.load(path, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes))
    layout = lora_jax.layout_of(plain_of(model), base, ids)
    if files:
        known = hf.FAMILIES[source.config["model_type"]].names
        adapters = {name: load_adapter(file, base, known, layout) for name, file in files.items()}
        say(f"{path}, {len(adapters)} adapters: {', '.join(adapters)}")
    else:
        like = lora_jax.lorafy(base, args.rank, layout=layout)
        adapters = {name: random_adapter(like, [args.seed, k]) for k, name in enumerate(names)}
        say(f"{path}, {len(adapters)} adapters of rank {args.rank} with random B")
    bank = make_bank(adapters, base, args.slots, dtype)

    server = Server(
        model,
        bank,
        rows=args.rows,
        size=max(args.lengths) + max(prompt.max_new for prompt in prompts),
        lengths=args.lengths,
        stop=stop_tokens(source.config),
    )
    submit(server, prompts, tokenizer, max(args.lengths))
    start = time.perf_counter()
    server.warm_up()
    say(f"compiled in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    done = list(server.run())
    seconds = time.perf_counter() - start

    if args.show:
        console.print(completion_table(done[: args.show], tokenizer))
    for text in summary(server, bank, done, seconds):
        say(text)
    for one in done:
        if one.error:
            say(f"{prompts[one.number].where}: {one.error}")
    if args.check:
        say(check(model, bank, base, done[: args.check]))


def submit(server: Server, prompts: Sequence[Prompt], tokenizer: Tokenizer, longest: int) -> None:
    """Tokenize the prompts and add them to the queue; an error names the prompt."""
    for prompt in prompts:
        ids = []
        try:
            ids = tokenizer.encode(prompt.text).ids
            server.submit(Request(ids, prompt.adapter, prompt.max_new))
        except (TypeError, ValueError) as error:
            hint = f" (--lengths is at most {longest})" if len(ids) > longest else ""
            raise ValueError(f"{prompt.where}: {error}{hint}") from error


# Adapters


def named_files(arguments: Sequence[str]) -> dict[str, Path]:
    """Parse the arguments of ``--adapter``, each ``NAME=PATH``."""
    files = {}
    for text in arguments:
        name, mark, path = text.partition("=")
        if not (name and mark and path) or name in files:
            raise ValueError(f"--adapter {text}: expected NAME=PATH, each name once")
        if not Path(path).exists():
            raise FileNotFoundError(f"--adapter {text}: no such file or folder")
        files[name] = Path(path)
    return files


def load_adapter(path: Path, base: Any, names: Any, layout: Mapping[str, str]) -> LoraParams:
    """Load an adapter from a PEFT folder or from a file of ``lora_jax.io.safetensors``."""
    if path.suffix == ".safetensors":
        return safetensors.load(path, base)
    return peft.load(path, base, names=names, layout=layout)


def random_adapter(like: LoraParams, seed: Sequence[int]) -> LoraParams:
    """Make an adapter with the same A and a random B."""
    rng = np.random.default_rng(seed)

    def randomize(f: lora_jax.Factors) -> lora_jax.Factors:
        b = rng.normal(0, 0.05, f.b.shape).astype(np.float32)
        return dataclasses.replace(f, b=b.astype(f.b.dtype))

    factors = {path: randomize(f) for path, f in like.adapter.factors.items()}
    return LoraParams(like.base, lora_jax.Adapter(factors))


def make_bank(
    adapters: Mapping[str, LoraParams], base: Any, slots: int, dtype: Any
) -> lora_jax.many.AdapterBank:
    """Make a bank with room for every weight of the adapters, each at its largest rank."""
    factors: dict[str, lora_jax.Factors] = {}
    full: dict[str, Any] = {}
    for lora_params in adapters.values():
        full |= lora_params.adapter.full
        for key, f in lora_params.adapter.factors.items():
            if key not in factors or f.rank > factors[key].rank:
                factors[key] = f
    like = LoraParams(base, lora_jax.Adapter(factors, full))
    bank = lora_jax.many.AdapterBank(like, slots, dtype=dtype, donate=True)
    for name, lora_params in adapters.items():
        bank.add(name, lora_params)
    return bank


def stop_tokens(config: Mapping[str, Any]) -> list[int]:
    """Return the tokens that end a text."""
    end = config.get("eos_token_id")
    return end if isinstance(end, list) else [] if end is None else [end]


# Results


def completion_table(done: Sequence[Completion], tokenizer: Tokenizer) -> Table:
    """Make a table with one completion per line."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("adapter", "prompt", "completion"):
        table.add_column(name, no_wrap=name == "adapter")
    for one in done:
        texts = [tokenizer.decode(ids) for ids in (one.request.prompt, one.tokens)]
        cells = [one.request.adapter or "none", *(" ".join(text.split()) for text in texts)]
        table.add_row(*map(Text, cells))  # Text: never markup
    return table


def summary(
    server: Server,
    bank: lora_jax.many.AdapterBank,
    done: Sequence[Completion],
    seconds: float,
) -> Iterator[str]:
    """Yield lines with the counts and the speed of the run."""
    failed = sum(one.error is not None for one in done)
    read = sum(len(one.request.prompt) for one in done)
    stats = bank.stats
    asked = stats.hits + stats.misses
    rate = f", {stats.hits / asked:.0%} hits" if asked else ""
    yield f"requests      {len(done)}" + (f", {failed} failed" if failed else "")
    yield f"tokens        {server.tokens:,} new, {read:,} of prompts, {server.steps} steps"
    yield f"speed         {server.tokens / seconds:.1f} new tokens/s, in {seconds:.1f} s"
    yield f"rows in use   {server.peak} at most"
    yield (
        f"slots         {stats.hits} hits, {stats.misses} misses, {stats.evictions} evictions{rate}"
    )


# The command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    description = "Serve many adapters of one language model at once, each prompt with its own."
    parser = argparse.ArgumentParser(description=description)
    count, natural = number(int, 1), number(int, 0)

    def group(name: str, **flags: dict[str, Any]) -> None:
        members = parser.add_argument_group(name)
        for flag, options in flags.items():
            options["help"] += f" ({options['default']})" if "default" in options else ""
            members.add_argument(f"--{flag.replace('_', '-')}", **options)

    group(
        "model and adapters",
        model={"type": Path, "help": "a folder or a GGUF file (SmolLM2-135M)"},
        adapter={
            "action": "append",
            "metavar": "NAME=PATH",
            "help": "a PEFT folder or a .safetensors file of lora_jax; may be repeated",
        },
        adapters={"type": count, "default": 16, "help": "number to make up, without --adapter"},
        rank={"type": count, "default": 8, "help": "rank of made-up adapters"},
        dtype={"choices": tuple(TOLERANCE), "default": "float32", "help": "dtype of all arrays"},
    )
    group(
        "prompts",
        prompts={"type": Path, "help": "a .jsonl file of prompt, adapter and max_new"},
        requests={"type": count, "default": 24, "help": "number to make up, without --prompts"},
        max_new={"type": count, "default": 16, "help": "tokens to add, if a prompt sets none"},
        seed={"type": natural, "default": 0, "help": "seed of made-up adapters and prompts"},
    )
    group(
        "serving",
        rows={"type": count, "default": 8, "help": "prompts decoded at once"},
        slots={"type": count, "default": 6, "help": "adapters on the device at once"},
        lengths={
            "type": count,
            "nargs": "+",
            "default": [16, 32],
            "metavar": "TOKENS",
            "help": "a prompt is padded to the next of these; one program per length",
        },
        show={"type": natural, "default": 8, "help": "completions to print"},
        check={
            "type": natural,
            "default": 0,
            "help": "completions to compare with those of each adapter alone",
        },
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, and report errors that the user can fix as one message."""
    args = parse_args(argv)
    try:
        run(args)
    except (ImportError, OSError, TypeError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"serve_many: {error}") from error


if __name__ == "__main__":
    main()
