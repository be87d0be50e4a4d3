"""Read the command line of the trainer, and list the flags that save memory."""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_jax.recipes import remat
from lora_jax.recipes.attention import NAMES


def number(kind: type, least: float = -math.inf, above: float = -math.inf) -> Callable[[str], Any]:
    """Return an argparse type: a finite int or float in a range."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (value >= least and value > above and math.isfinite(value)):
            wanted = f">= {least:g}" if math.isfinite(least) else f"> {above:g}"
            raise argparse.ArgumentTypeError(f"{text}: expected a finite number {wanted}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    description = "Fine-tune a language model with LoRA: on one device or many."
    parser = argparse.ArgumentParser(description=description)
    count, natural, positive = number(int, 1), number(int, 0), number(float, above=0)

    def add_group(name: str, **flags: dict[str, Any]) -> None:
        group = parser.add_argument_group(name)
        for flag, options in flags.items():
            options["help"] += f" ({options['default']})" if "default" in options else ""
            group.add_argument(f"--{flag}", **options)

    is_set = {"action": "store_true"}
    add_group(
        "model and data",
        model={"type": Path, "help": "a folder or a GGUF file (SmolLM2-135M)"},
        data={"type": Path, "help": "a .txt, or a .jsonl of prompt and completion (Shakespeare)"},
        length={"type": count, "default": 64, "help": "tokens per row"},
        validation={"type": count, "default": 64, "help": "largest number of validation rows"},
        dtype={
            "choices": ("float32", "bfloat16"),
            "default": "float32",
            "help": "dtype of base and activations",
        },
    )
    add_group(
        "training",
        rank={"type": count, "default": 8, "help": "rank of A and B"},
        alpha={"type": positive, "default": 16.0, "help": "the update is scaled by alpha / rank"},
        targets={"help": "a regular expression, or all-linear (queries, values)"},
        dropout={"type": number(float, 0), "default": 0.0, "help": "on the adapters' inputs"},
        batch={"type": count, "default": 8, "help": "rows per step, on all devices together"},
        accumulate={"type": count, "default": 1, "help": "parts of a batch, one after the other"},
        steps={"type": count, "default": 100, "help": "total number of steps"},
        rate={"type": positive, "default": 1e-3, "help": "peak learning rate; a cosine ends it"},
        warmup={"type": natural, "default": 10, "help": "warmup steps"},
        clip={"type": positive, "default": 1.0, "help": "largest gradient norm"},
        seed={"type": natural, "default": 0, "help": "seed of factors, data and dropout"},
        remat={
            "nargs": "?",
            "const": "full",
            "choices": ("auto", *remat.NAMES),
            "default": "auto",
            "help": "what the backward pass computes again, to save memory: all of a layer (full, "
            "also without a value), all but projections and attention (dots), all but attention; "
            "offload is full with the layers' inputs on the host; auto takes the fastest that fits",
        },
        layers={
            "choices": ("scanned", "unrolled"),
            "default": "scanned",
            "help": "a loop over the layers, or a program of all of them, which is faster on a GPU "
            "and takes longer to compile",
        },
        attention={
            "choices": NAMES,
            "default": "auto",
            "help": "cudnn (GPUs) and splash (TPUs) are kernels that form no scores of all pairs; "
            "auto takes them where they can",
        },
    )
    add_group(
        "devices",
        mesh={"help": "sizes of data, fsdp, tensor, such as data=2,tensor=-1 (data=-1)"},
        explicit=is_set | {"help": "shardings in array types, instead of the compiler's choice"},
        pmap=is_set | {"help": "data parallel by jax.pmap"},
        distributed=is_set | {"help": "several processes, set by the cluster's environment"},
        coordinator={"help": "several processes, set by these flags: host:port of process 0"},
        processes={"type": count, "help": "number of processes"},
        process={"type": natural, "help": "number of this process"},
    )
    add_group(
        "files",
        out={"type": Path, "default": Path("runs", "lm"), "help": "checkpoints, metrics.csv"},
        every={"type": count, "default": 50, "help": "steps between checkpoints, each validated"},
        log={"type": count, "default": 10, "help": "steps between printed lines"},
        resume=is_set | {"help": "fail if --out has no checkpoint to continue from"},
        export=is_set | {"help": "write OUT/adapter for PEFT and OUT/merged at the end"},
        tensorboard=is_set | {"help": "write events to OUT/tensorboard"},
        cache={
            "metavar": "FOLDER",
            "help": "for compiled programs, shared by all processes; or none "
            "(JAX_COMPILATION_CACHE_DIR; else .cache/lora_jax/compiled, but none on CPUs and with "
            "several processes)",
        },
    )
    return parser.parse_args(argv)


def out_of_memory(error: str, args: argparse.Namespace) -> str:
    """Turn XLA's error into one line: the memory needed, if known, and flags that need less."""
    first = error.partition("RESOURCE_EXHAUSTED:")[2].strip().partition("\n")[0].rstrip(".")
    needed = re.sub(r"(\d{7,}) bytes", lambda n: f"{int(n[1]) / 2**30:,.2f} GiB", first)
    helps = {
        "--remat": args.remat not in ("full", "offload"),
        f"--accumulate above {args.accumulate}": args.accumulate < args.batch,
        f"--batch below {args.batch}": True,
        f"--length below {args.length}": True,
        "--mesh fsdp=-1": "fsdp" not in (args.mesh or ""),
        "--dtype bfloat16": args.dtype != "bfloat16",
    }
    return (
        f"the memory of the devices is too small: {needed or 'XLA gives no details'}. Pass "
        f"{', or '.join(flag for flag, is_open in helps.items() if is_open)}"
    )
