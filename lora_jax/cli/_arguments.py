"""Declare the arguments of every command, without importing what the commands import."""

import argparse
from collections.abc import Callable

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("peft", "safetensors", "orbax")
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def count(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer, at least 1")
    return int(text)


def share(text: str) -> float:
    """Parse a number that is not negative."""
    try:
        if (x := float(text)) >= 0:
            return x
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number, at least 0")


def byte_count(text: str) -> int:
    """Parse a size such as ``5GB`` into bytes."""
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


def _names(parser: argparse.ArgumentParser) -> None:
    text = (
        "names of modules in the files, by their paths here: {pattern: template} in JSON or in a "
        "file, or a family, such as llama"
    )
    parser.add_argument("--names", "--family", metavar="NAMES", help=text)
    text = "{pattern: kind} in JSON or in a file, where the axes leave a doubt"
    parser.add_argument("--kinds", metavar="KINDS", help=text)


def _names_of(text: str) -> tuple[str, ...]:
    """Parse names with commas between them."""
    return tuple(name.strip() for name in text.split(","))


def _order(parser: argparse.ArgumentParser) -> None:
    text = (
        "order in which modules register their parameters, for adapters of several of a module; "
        "that of transformers"
    )
    parser.add_argument("--parameter-order", type=_names_of, metavar="A,B", help=text)


def _axes(parser: argparse.ArgumentParser) -> None:
    text = "{pattern of paths in the model: bio or boi} in JSON or in a file, for square experts"
    parser.add_argument("--layout", metavar="LAYOUT", help=text)
    _order(parser)


def _inspect(parser: argparse.ArgumentParser) -> None:
    _order(parser)
    add = parser.add_argument
    add("path", metavar="PATH", help="adapter, checkpoint, model folder, or file")
    add("--base", metavar="PATH", help="the model, for the relative size of updates")
    add("--top", type=count, metavar="N", help="the first N rows only")
    add("--sort", choices=("path", "norm", "rank"), default="path", help="by path or largest first")
    add("--spectrum", action="store_true", help="effective ranks of a model's matrices")


def _merge(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    _axes(parser)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a Hugging Face model")
    add("adapters", metavar="ADAPTER", nargs="+", help="of any format")
    add("out", metavar="OUT", help="folder to write")
    add("--weight", type=float, action="append", metavar="W", help="once per adapter, in order")
    add("--like", metavar="PATH", help="model or adapter with the paths of an adapter of ours")
    add("--dtype", choices=DTYPES, help="of the floating tensors")
    add("--shard-size", type=byte_count, default="5GB", metavar="SIZE", help="of a file; 5GB")
    add("--overwrite", action="store_true", help="replace a model that is there")


def _convert(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    _axes(parser)
    add = parser.add_argument
    add("path", metavar="IN", help="adapter or model of any format")
    add("out", metavar="OUT", help="file or folder to write")
    add("--to", choices=(*FORMATS, "hf"), required=True, help="of a model hf or orbax")
    text = "the tree of paths: parameters in Orbax, a model's folder, or an adapter saved with them"
    add("--like", metavar="PATH", help=text)
    add("--base-model", metavar="NAME", help="for PEFT's configuration")
    add("--task-type", choices=TASKS, help="of the model in PEFT, for its configuration")
    add("--uniform", action="store_true", help="one rank and one scale, for llama.cpp and SGLang")
    add("--for-vllm", action="store_true", help="refuse what vLLM would")
    add("--dtype", choices=DTYPES, help="of a model's floating tensors")
    add("--overwrite", action="store_true", help="replace what is there")


def _diff(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    _order(parser)
    add = parser.add_argument
    add("one", metavar="FIRST", help="adapter or model of any format")
    add("two", metavar="SECOND", help="the other one, of the same kind")
    add("--like", metavar="PATH", help="parameters of an adapter of ours, beside one of PEFT's")
    add("--tolerance", type=share, default=0.0, metavar="T", help="of relative differences; 0")
    add("--top", type=count, metavar="N", help="the N that differ most only")


def _extract(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    add = parser.add_argument
    add("base", metavar="MODEL", help="model folder, or Orbax checkpoint of parameters")
    add("tuned", metavar="TUNED", help="the same model after fine-tuning")
    add("out", metavar="OUT", help="adapter to write")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=count, metavar="R", help="of every update")
    size.add_argument("--energy", type=float, metavar="E", help="share to keep, such as 0.9")
    add("--alpha", type=float, metavar="A", help="for scale alpha / rank; else 1")
    add("--targets", metavar="REGEX", help="of tensors' names; else all linear layers")
    text = "changed tensors without factors: refuse, leave out, or save in full; error"
    add("--rest", choices=("error", "ignore", "full"), default="error", help=text)
    add("--ignore-rest", action="store_const", dest="rest", const="ignore", help="--rest ignore")
    add("--to", choices=FORMATS, help="PEFT for model folders, Orbax for Orbax")
    add("--base-model", metavar="NAME", help="for PEFT's configuration")
    add("--overwrite", action="store_true", help="replace what is there")


def _verify(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    _axes(parser)
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, or Orbax checkpoint of parameters")
    add("adapter", metavar="ADAPTER", help="of any format")


def _analyze(parser: argparse.ArgumentParser) -> None:
    _names(parser)
    _axes(parser)
    add = parser.add_argument
    add("path", metavar="PATH", help="adapter of any format")
    add("--base", metavar="MODEL", help="model folder, or Orbax checkpoint of parameters")
    add("--with", dest="other", metavar="OTHER", help="another adapter of the model, for overlaps")
    add("--plot", metavar="FOLDER", help="folder to write with figures, in SVG")
    add("--overwrite", action="store_true", help="replace figures that are there")
    add(
        "--targets",
        metavar="REGEX",
        help="of the paths shown; else all, which takes a while with --base",
    )


def _completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the script's shell")


DECLARED: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "inspect": _inspect,
    "merge": _merge,
    "convert": _convert,
    "diff": _diff,
    "extract": _extract,
    "verify": _verify,
    "analyze": _analyze,
    "completion": _completion,
}
