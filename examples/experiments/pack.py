"""Write MiniLM and the tokenized tasks into one file, for machines without a network.

python examples/experiments/pack.py FILE.npz
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import common
import tasks

LIMIT = 60e6  # bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file, and print its size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="the .npz file to write")
    parser.add_argument("--wordnet", type=Path, help="folder of data.noun; default: Debian's")
    args = parser.parse_args(argv)
    with common.one_line("pack"):
        size = tasks.pack(args.file, args.wordnet)
        if size > LIMIT:
            raise ValueError(f"{args.file} has {size:,} bytes, expected at most {LIMIT:,.0f}")
    print(f"wrote {args.file}: {size / 1e6:.1f} MB, {', '.join(tasks.TASKS)}, {tasks.ROUNDING}")


if __name__ == "__main__":
    main()
