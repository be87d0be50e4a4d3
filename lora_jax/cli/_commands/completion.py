"""``completion``: print the script by which a shell completes the words of the program."""

import argparse

from lora_jax.cli._show import Show

EXAMPLE = "bash"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the script's shell")


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
    script = shtab.complete(args.parser(), shell=args.shell)
    if show.is_json:
        show.document({"shell": args.shell, "script": script})
    elif not show.is_quiet:
        print(script)
    return 0
