"""What can be passed on the command line."""

import argparse
from typing import Any, NoReturn

DTYPES = ("float32", "bfloat16", "float16")
_FORMATS = ("peft", "safetensors", "orbax")


class UsageError(ValueError):
    """What was said on the command line makes no sense."""


class _Parser(argparse.ArgumentParser):
    """One line for an error, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """All that may be said."""
    top = _Parser("lora-jax", description="Look into, compare, merge, convert and extract LoRAs.")
    top.add_argument("--version", action="version", version=f"lora-jax {_version()}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON document instead of words")
    common.add_argument("--quiet", action="store_true", help="print errors only")
    common.add_argument("--debug", action="store_true", help="show where an error comes from")
    named = _Parser(add_help=False)
    named.add_argument(
        "--names",
        metavar="NAMES",
        help="the names of modules there, by their paths here: a file of {pattern: template}, or a "
        "family, such as llama",
    )
    named.add_argument(
        "--kinds", metavar="FILE", help="of {pattern: kind}, where the axes leave a doubt"
    )

    def add(name: str, text: str, example: str, *parents: Any) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  lora-jax {name} {example}",
            parents=[*parents, common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    c = add("inspect", "show what an adapter or a model holds", "adapter --base model --top 5")
    c.add_argument("path", metavar="PATH", help="adapter, checkpoint, model folder, or file")
    c.add_argument("--base", metavar="PATH", help="the model, for the relative size of updates")
    c.add_argument("--top", type=_count, metavar="N", help="the first N rows only")
    c.add_argument("--sort", choices=("path", "norm", "rank"), default="path")
    c.add_argument("--spectrum", action="store_true", help="effective ranks of a model's matrices")

    text = "merge adapters into a model's files, one tensor at a time"
    c = add("merge", text, "model adapter merged --dtype bfloat16", named)
    c.add_argument("model", metavar="MODEL", help="folder of a Hugging Face model")
    c.add_argument("adapters", metavar="ADAPTER", nargs="+", help="of any format")
    c.add_argument("out", metavar="OUT", help="folder to write")
    c.add_argument(
        "--weight", type=float, action="append", metavar="W", help="once for each adapter, in order"
    )
    c.add_argument("--like", metavar="PATH", help="what says the tree of an adapter of ours")
    c.add_argument("--dtype", choices=DTYPES, help="of the floating tensors")
    c.add_argument("--shard-size", type=_size, default="5GB", metavar="SIZE", help="as 5GB")
    c.add_argument("--overwrite", action="store_true", help="replace a model that is there")

    text = "convert an adapter, or a model, to another format"
    c = add("convert", text, "adapter adapter.safetensors --to safetensors", named)
    c.add_argument("path", metavar="IN", help="adapter or model of any format")
    c.add_argument("out", metavar="OUT", help="file or folder to write")
    c.add_argument("--to", choices=(*_FORMATS, "hf"), required=True, help="of a model hf or orbax")
    c.add_argument("--like", metavar="PATH", help="model or adapter that says the tree of paths")
    c.add_argument("--base-model", metavar="NAME", help="for PEFT's configuration")
    c.add_argument("--for-vllm", action="store_true", help="refuse what vLLM would")
    c.add_argument("--dtype", choices=DTYPES, help="of a model's floating tensors")
    c.add_argument("--overwrite", action="store_true", help="replace what is there")

    text = "compare two adapters, or two models: exit status 0 if equal, 1 if not"
    c = add("diff", text, "adapter other --json")
    c.add_argument("one", metavar="A")
    c.add_argument("two", metavar="B")
    c.add_argument(
        "--tolerance", type=_share, default=0.0, metavar="T", help="of relative differences; 0"
    )
    c.add_argument("--top", type=_count, metavar="N", help="the N that differ most only")

    text = "find the LoRA that comes nearest to what fine-tuning changed"
    c = add("extract", text, "model tuned extracted --rank 4", named)
    c.add_argument("base", metavar="BASE", help="model folder, or Orbax checkpoint of parameters")
    c.add_argument("tuned", metavar="TUNED", help="the same, after")
    c.add_argument("out", metavar="OUT", help="adapter to write")
    how = c.add_mutually_exclusive_group(required=True)
    how.add_argument("--rank", type=_count, metavar="R")
    how.add_argument("--energy", type=float, metavar="E", help="share to keep, such as 0.9")
    c.add_argument("--alpha", type=float, metavar="A", help="for scale alpha / rank; else 1")
    c.add_argument("--targets", metavar="REGEX", help="of tensors' names; else all linear layers")
    c.add_argument("--rest", choices=("error", "ignore", "full"), default="error")
    c.add_argument("--ignore-rest", action="store_const", dest="rest", const="ignore")
    c.add_argument("--to", choices=_FORMATS, help="PEFT for model folders, Orbax for Orbax")
    c.add_argument("--base-model", metavar="NAME", help="for PEFT's configuration")
    c.add_argument("--overwrite", action="store_true", help="replace what is there")

    text = "say whether an adapter is for a model: exit status 0 if it is, 1 if not"
    c = add("verify", text, "adapter model", named)
    c.add_argument("adapter", metavar="ADAPTER")
    c.add_argument("base", metavar="BASE", help="model folder, or Orbax checkpoint of parameters")

    c = add("completion", "print the completion script of a shell", "bash")
    c.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return top


def _version() -> str:
    from lora_jax import __version__

    return __version__


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def _share(text: str) -> float:
    try:
        if (x := float(text)) >= 0:
            return x
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number, at least 0")


def _size(text: str) -> int:
    """``5GB`` in bytes."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.rstrip("BKMGTIbkmgti")
    try:
        size = int(float(number) * units[text[len(number) :].upper()])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 500MB")
    return size
