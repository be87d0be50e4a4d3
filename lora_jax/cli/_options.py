"""Options of several commands: types, files of names, and the output."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_jax.io import _files as files
from lora_jax.io.hf._families import FAMILIES
from lora_jax.io.peft._axes import PARAMETER_ORDER

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("peft", "safetensors", "orbax")


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


def add_names(parser: argparse.ArgumentParser) -> None:
    """Declare ``--names`` and ``--kinds``."""
    text = (
        "names of modules in the files, by their paths here: a file of {pattern: template}, or a "
        "family, such as llama"
    )
    parser.add_argument("--names", metavar="NAMES", help=text)
    text = "file of {pattern: kind}, where the axes leave a doubt"
    parser.add_argument("--kinds", metavar="FILE", help=text)


def add_order(parser: argparse.ArgumentParser) -> None:
    """Declare ``--parameter-order``."""
    text = (
        "order in which modules register their parameters, for adapters of several of a module; "
        f"{','.join(PARAMETER_ORDER)}"
    )
    parser.add_argument(
        "--parameter-order", type=_order, default=PARAMETER_ORDER, metavar="A,B", help=text
    )


def add_axes(parser: argparse.ArgumentParser) -> None:
    """Declare ``--layout`` and ``--parameter-order``."""
    text = "file of {pattern of paths in the model: bio or boi}, the axes of square experts"
    parser.add_argument("--layout", metavar="FILE", help=text)
    add_order(parser)


def layout_in(args: argparse.Namespace) -> dict[str, str] | None:
    """Read ``--layout``."""
    return _strings_in(args.layout, "--layout")


def _order(text: str) -> tuple[str, ...]:
    """Parse names with commas between them."""
    return tuple(name.strip() for name in text.split(","))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Check an output before the work begins, and add its path to errors of the system.

    Raises:
        OSError: the output exists, its folder does not, or it cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists: pass --overwrite, or another path")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.absolute().parent} to write in")
    try:
        yield path
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def names_and_kinds(args: argparse.Namespace) -> tuple[Any, dict[str, str] | None]:
    """Read ``--names`` and ``--kinds``: the name of a family, or files.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file does not map strings to strings.
    """
    if args.names in FAMILIES:
        family = FAMILIES[args.names]
        return family.names, _strings_in(args.kinds, "--kinds") or dict(family.kinds or {})
    if args.names is not None and not Path(args.names).exists():
        known = ", ".join(sorted(FAMILIES))
        raise FileNotFoundError(f"--names {args.names}: no such file, and no family: {known}")
    return _strings_in(args.names, "--names", lists=True), _strings_in(args.kinds, "--kinds")


def _strings_in(path: str | None, option: str, *, lists: bool = False) -> dict[str, Any] | None:
    if path is None:
        return None
    found = files.read_json(Path(path))
    kinds = (str, list) if lists else str
    if not isinstance(found, dict) or not all(isinstance(x, kinds) for x in found.values()):
        raise ValueError(f"{option} {path}: expected one object of strings, such as {{'a': 'b'}}")
    return found
