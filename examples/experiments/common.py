"""Share the command line, inputs, results and statistics among the experiments.

::

    args = common.parser(__doc__).parse_args()
    with common.one_line("quality"):
        inputs = tasks.load(["movie"], args.packed, args.wordnet)
        results = common.Results(args.out / "quality.csv", settings, inputs.digest)
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # bert, data, training

import tasks
from results import KEYS, Results, code_digest, identity, written_file
from stats import Interval, interval, on_par, paired, student

__all__ = [
    "KEYS",
    "Interval",
    "Results",
    "code_digest",
    "identity",
    "interval",
    "on_par",
    "one_line",
    "paired",
    "parser",
    "student",
    "tasks",
    "written_file",
]

SEEDS = (0, 1, 2, 3, 4)  # of what is reported
CHOICE_SEEDS = (100, 101)  # of what is chosen on validation data


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options of every experiment."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--quick", action="store_true", help="a small run, under a minute on a CPU")
    made.add_argument(
        "--packed", type=Path, help="a file of pack.py; needs no download, tokenizer or WordNet"
    )
    made.add_argument("--wordnet", type=Path, help="folder of data.noun; default: Debian's")
    made.add_argument(
        "--out",
        type=Path,
        default=Path("runs", "experiments"),
        help="folder of the CSV, its JSON and the figures; rows that it has are not run again",
    )
    return made


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Report errors that the user can fix as one line."""
    try:
        yield
    except (OSError, TypeError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"{name}: {' '.join(str(error).splitlines())}") from error
