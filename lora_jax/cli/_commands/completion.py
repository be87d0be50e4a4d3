"""``completion``: what a shell reads to complete our words."""

import argparse

from lora_jax.cli._show import Show


def run(args: argparse.Namespace, show: Show) -> int:
    """The command.

    Raises:
        ImportError: shtab, which writes it, is not installed.
    """
    from lora_jax.cli._parser import parser

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
