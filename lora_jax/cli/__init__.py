"""The command line, ``lora-jax``.

The commands are ``inspect | merge | convert | diff | extract | verify | analyze | completion``.

* ``_arguments``, ``_parser``: declare and parse the words, without importing more.
* ``_commands``: one module per command, which is imported to run it.
* ``_read``: finds out what a path holds.
* ``_flags``: spells messages of the library with flags.
* ``_options``, ``_numbers``, ``_show``: what several commands share.
"""

import argparse
import functools
import importlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from lora_jax.cli._parser import parser
from lora_jax.cli._show import Show

__all__ = ["main"]

_BAD_INPUT, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None, show: Show | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``lora-jax``; None takes those of the process.
        show: where the output goes.

    Returns:
        The exit status: the command's own; 2 for bad input, with one line on stderr; 130 for an
        interrupt. An exception that is no error of input is a bug and passes through.
    """
    if argv is None:
        _silence_others()
    argv = sys.argv[1:] if argv is None else list(argv)
    name, known = " ".join(["lora-jax", *argv[:1]]).split(" -")[0], None
    try:
        args = parser().parse_args(argv)
        name, known = f"lora-jax {args.command}", args.parser
        show = show or Show()
        show.is_json, show.is_quiet = args.json, args.quiet
        status = _run(args, show)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return _BROKEN_PIPE
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        if "--debug" in argv:
            traceback.print_exc()
        else:
            print(f"{name}: {_line(error, known)}", file=sys.stderr)
        return _BAD_INPUT


def _run(args: argparse.Namespace, show: Show) -> int:
    """Import a command and run it, on the CPU unless the environment names a platform."""
    import jax

    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    command = importlib.import_module(f"lora_jax.cli._commands.{args.command}")
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = functools.partial(_warned, show, args.parser)
        return command.run(args, show)


def _silence_others() -> None:
    """Silence the logs and the unraisable errors of other libraries: the process is ours."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if "--debug" not in sys.argv:
        sys.unraisablehook = lambda _: None  # Orbax closes its event loop too early


def _warned(
    show: Show, known: argparse.ArgumentParser, message: Any, category: Any, filename: str, *_: Any
) -> None:
    """Show a warning of this library; drop those of others."""
    if "lora_jax" in filename:
        show.note(_spelled(str(message), known))


def _line(error: BaseException, known: argparse.ArgumentParser | None) -> str:
    """Write an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        files = (name for name in (error.filename, error.filename2) if name is not None)
        text = ": ".join([*map(str, files), error.strerror])
    else:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(_spelled(text, known).split()) or type(error).__name__


def _spelled(text: str, known: argparse.ArgumentParser | None) -> str:
    if known is None:
        return text
    from lora_jax.cli._flags import spelled

    command = known.prog.rpartition(" ")[2]
    return spelled(text.removeprefix(f"{command}: "), known)


def _close_stdout() -> None:
    """Discard what is still buffered: nobody reads any more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stand-in for stdout, as in tests
        pass
