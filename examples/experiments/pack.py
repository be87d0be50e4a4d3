"""Write a model and its data into one file, for machines without a network.

python examples/experiments/pack.py FILE.npz
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import common
import quality_vision
import tasks

LIMIT = 60e6  # bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file, and print its size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="the .npz file to write")
    parser.add_argument("--wordnet", type=Path, help="folder of data.noun; default: Debian's")
    parser.add_argument("--vision", action="store_true", help="DINOv2 and the digits instead")
    args = parser.parse_args(argv)
    with common.one_line("pack"):
        if args.vision:
            size = tasks.write(args.file, quality_vision.download())
        else:
            size = tasks.pack(args.file, args.wordnet)
        if size > LIMIT:
            raise ValueError(f"{args.file} has {size:,} bytes, expected at most {LIMIT:,.0f}")
    print(f"wrote {args.file}: {size / 1e6:.1f} MB, {tasks.ROUNDING}")


if __name__ == "__main__":
    main()
