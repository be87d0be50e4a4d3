"""``completion``: print the script by which a shell completes the words of the program."""

import argparse

from lora_jax.cli._parser import parser
from lora_jax.cli._show import Show


def run(args: argparse.Namespace, show: Show) -> int:
    """Run the command.

    Raises:
        ImportError: shtab, which writes the script, is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError(
            "completion is written by shtab, which is not installed: pip install 'lora-jax[cli]'"
        ) from error
    script = shtab.complete(parser(), shell=args.shell)
    if show.is_json:
        show.document({"shell": args.shell, "script": script})
    elif not show.is_quiet:
        print(script)
    return 0
