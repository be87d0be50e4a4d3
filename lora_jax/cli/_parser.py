"""Parse the command line; each command declares its own arguments."""

import argparse
from importlib import import_module
from typing import NoReturn

from lora_jax import __version__
from lora_jax.cli._commands import SUMMARIES


class UsageError(ValueError):
    """Report words on the command line that make no sense."""


class _Parser(argparse.ArgumentParser):
    """Report an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Build the parser of the program.

    Args:
        only: the command whose arguments are declared, so that no other is imported; None
            declares those of all commands.
    """
    top = _Parser("lora-jax", description="Look into, compare, merge, convert and extract LoRAs.")
    top.add_argument("--version", action="version", version=f"lora-jax {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in SUMMARIES.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if only in (None, name):
            module = import_module(f"lora_jax.cli._commands.{name}")
            module.arguments(command)
            command.epilog = f"example:\n  lora-jax {name} {module.EXAMPLE}"
            command.set_defaults(run=module.run, parser=parser)
        add = command.add_argument
        add("--json", action="store_true", help="print one JSON document instead of words")
        add("--quiet", action="store_true", help="print errors only")
        add("--debug", action="store_true", help="show where an error comes from")
    return top
