"""The command line: ``lora-jax inspect | merge | convert | diff | extract | verify | completion``.

* ``_parser``: parses the words; ``_commands``: one module per command, with its arguments.
* ``_read``: finds out what a path holds.
* ``_options``, ``_numbers``, ``_show``: what several commands share.
"""

import functools
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.cli._commands import SUMMARIES
from lora_jax.cli._parser import parser
from lora_jax.cli._show import Show

__all__ = ["main"]

_BAD_INPUT, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141

# The remedies that errors offer, and the same at the command line.
_FLAGS = {
    "pass overwrite=True": "pass --overwrite",
    "pass parameter_order=(..., ...)": "pass --parameter-order A,B",
    "pass layout={": "pass --layout, a file of {",
}


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
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")
    command = argv[0] if argv and not argv[0].startswith("-") else ""
    try:
        args = parser(next((word for word in argv if word in SUMMARIES), "")).parse_args(argv)
        show = show or Show()
        show.is_json, show.is_quiet = args.json, args.quiet
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = functools.partial(_warned, show)
            status = args.run(args, show)
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
            print(f"{' '.join(['lora-jax', command]).strip()}: {_line(error)}", file=sys.stderr)
        return _BAD_INPUT


def _silence_others() -> None:
    """Silence the logs and the unraisable errors of other libraries: the process is ours."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if "--debug" not in sys.argv:
        sys.unraisablehook = lambda _: None  # Orbax closes its event loop too early


def _warned(show: Show, message: Any, category: Any, filename: str, *_: Any) -> None:
    """Show a warning of this library; drop those of others."""
    if "lora_jax" in filename:
        show.note(str(message))


def _line(error: BaseException) -> str:
    """Write an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        files = (name for name in (error.filename, error.filename2) if name is not None)
        text = ": ".join([*map(str, files), error.strerror])
    else:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    for own, there in _FLAGS.items():
        text = text.replace(own, there)
    return " ".join(text.split()) or type(error).__name__


def _close_stdout() -> None:
    """Discard what is still buffered: nobody reads any more."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # a stand-in for stdout, as in tests
        pass
