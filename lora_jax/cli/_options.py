"""Options of several commands: names of modules, and the output."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_jax.io import _files as files
from lora_jax.io.hf._families import FAMILIES
from lora_jax.io.peft._axes import PARAMETER_ORDER


def layout_in(args: argparse.Namespace) -> dict[str, str] | None:
    """Read ``--layout``."""
    return _strings_in(args.layout, "--layout")


def order_in(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the order of ``--parameter-order``, or the usual one."""
    return args.parameter_order or PARAMETER_ORDER


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
        raise FileNotFoundError(
            f"{path}: there is no folder {path.absolute().parent} to write in: make it"
        )
    try:
        yield path
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def names_and_kinds(args: argparse.Namespace) -> tuple[Any, dict[str, str] | None]:
    """Read ``--names`` and ``--kinds``: the name of a family, JSON, or files.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file does not map strings to strings, or JSON on the command line.
    """
    if args.names in FAMILIES:
        family = FAMILIES[args.names]
        return family.names, _strings_in(args.kinds, "--kinds") or dict(family.kinds or {})
    if not _is_json(args.names) and not Path(args.names or ".").exists():
        known = ", ".join(sorted(FAMILIES))
        raise FileNotFoundError(f"--names {args.names}: no such file, and no family: {known}")
    return _strings_in(args.names, "--names", lists=True), _strings_in(args.kinds, "--kinds")


def _is_json(text: str | None) -> bool:
    return text is not None and text.lstrip().startswith("{")


def _strings_in(path: str | None, option: str, *, lists: bool = False) -> dict[str, Any] | None:
    if path is None:
        return None
    found = files.parse_json(path, option) if _is_json(path) else files.read_json(Path(path))
    kinds = (str, list) if lists else str
    if not isinstance(found, dict) or not all(isinstance(x, kinds) for x in found.values()):
        raise ValueError(f"{option} {path}: expected one object of strings, such as {{'a': 'b'}}")
    return found
