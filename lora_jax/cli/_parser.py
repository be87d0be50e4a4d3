"""Parse the command line."""

import argparse
import itertools
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NoReturn

from lora_jax import __version__
from lora_jax.cli._arguments import DECLARED

COMMANDS = {  # what each does, and the words of its example
    "inspect": ("show what an adapter or a model holds", "adapter --base model --top 5"),
    "merge": (
        "merge adapters into a model's files, one tensor at a time",
        "model adapter merged --dtype bfloat16",
    ),
    "convert": (
        "convert an adapter, or a model, to another format",
        "adapter adapter.safetensors --to safetensors --like params",
    ),
    "diff": (
        "compare two adapters, or two models: exit status 0 if equal, 1 if not",
        "adapter other --json",
    ),
    "extract": (
        "find the LoRA that comes nearest to what fine-tuning changed",
        "model tuned extracted --rank 4",
    ),
    "verify": (
        "check whether an adapter is for a model: exit status 0 if it is, 1 if not",
        "model adapter",
    ),
    "analyze": (
        "measure an adapter's updates, beside the weights of its model or beside another adapter",
        "adapter --base model --with other",
    ),
    "completion": ("print the completion script of a shell", "bash"),
}
_ORDER = "The model comes first, then adapters, then what is written."


class UsageError(ValueError):
    """Report words on the command line that make no sense."""


class _Parser(argparse.ArgumentParser):
    """Report an error in one line, without the usage, and the nearest flag to one that is wrong."""

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        words = list(args or ())
        if self._subparsers is not None:  # the words of the command are its own
            words = itertools.takewhile(lambda word: word.startswith("-"), words)
        self._check_flags(words)
        return super().parse_known_args(args, namespace)

    def _check_flags(self, words: Iterable[str]) -> None:
        """Raise for a word that looks like a flag, and begins none."""
        known = [*self._option_string_actions]
        for word in itertools.takewhile(lambda word: word != "--", words):
            flag = word.partition("=")[0]
            if not re.match(r"-[^\d.\s]", word) or any(name.startswith(flag) for name in known):
                continue
            near = get_close_matches(flag, known, 1, 0.7)
            place = " before the command" if self._subparsers is not None else ""
            hint = f": did you mean {near[0]}?" if near else ""
            self.error(f"there is no {flag}{place}{hint}")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """Build the parser of the program."""
    text = f"Look into, compare, merge, convert and extract LoRAs. {_ORDER}"
    top = _Parser("lora-jax", description=text)
    top.add_argument("--version", action="version", version=f"lora-jax {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, example) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  lora-jax {name} {example}",
        )
        DECLARED[name](command)
        command.set_defaults(parser=command)
        add = command.add_argument
        add("--json", action="store_true", help="print one JSON document instead of words")
        add("--quiet", action="store_true", help="print errors only")
        add("--debug", action="store_true", help="show where an error comes from")
    return top
