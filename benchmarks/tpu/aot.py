"""What training and merging Llama 3 8B takes on TPUs, by their compiler: no TPU is needed.

    pip install '.[tpu-aot]'
    python -m benchmarks.tpu.aot                  # all cases, a minute of one core for each
    python -m benchmarks.tpu.aot --quick          # one small case
    python -m benchmarks.tpu.aot --topologies v6e:4x4 --spreads fsdp --methods lora full

One training step with AdamW, of sequences of 2048 tokens, one for each chip: LoRA of rank 16 on
all projections, the same on a base in NF4 or int8, and full fine-tuning; the layers scanned and
recomputed in the backward pass, the base in bfloat16, adapters and moments in float32. And
``merge`` with the base's memory donated. Prints a table; ``--json`` keeps what is measured, and
what it has already is not compiled again; ``--markdown`` writes the table of ``aot.md``.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5p:2x2x1", "v6e:2x2", "v6e:4x4")
SPREADS = ("pmap", "fsdp", "fsdp+tp")
METHODS = ("lora", "nf4", "int8", "full")
PROGRAMS = ("train", "merge")
QUICK = {"topology": "v5e:2x2", "spread": "pmap", "model": "tiny", "length": 128, "rank": 8}
GIB = 2**30
NOTES = """\
Sizes are GiB of one chip. **args** holds the base, the adapter and the optimizer's state, and the
batch; **alias** is the part of them that is donated and becomes the **output**; **peak** is the
compiler's estimate of the most that is live at once. **TFLOP** counts the matrix products of one
chip, each as often as its loops run it; **once** is `cost_analysis()`, which counts the body of a
loop once. Collectives are *instructions* → *runs in a step*: *GiB*, of the larger of what goes in
and what comes out of one chip; what runs beside other work is counted once. Of a quantized base
FSDP gathers weights that are made already, so fewer bits save memory there, and no traffic. Where a
program does not fit, the compiler's error says what it would need. The compiler estimates: nothing
was run.
"""
HEADER = (
    *("topology", "spread", "program", "method", "args", "output", "alias", "temp", "peak"),
    *("TFLOP", "once", "collectives", "compiled in"),
)


def cases(args: argparse.Namespace) -> Iterator[Row]:
    """The cases to compile, the smallest slices first."""
    if args.quick:
        yield QUICK
        return
    for topology in args.topologies:
        for spread in args.spreads:
            for program in args.programs:
                for method in args.methods if program == "train" else ["lora"]:
                    yield {
                        "topology": topology,
                        "spread": spread,
                        "program": program,
                        "method": method,
                    }


def measured(case: Row) -> Row:
    """Compile a case in a process of its own.

    Raises:
        RuntimeError: it failed, other than for want of memory.
    """
    command = [sys.executable, "-m", "benchmarks.tpu.programs", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def crossing(row: Row) -> str:
    """``all-gather 9 → 288: 14.91``, of each kind of collective."""
    kinds: dict[str, list[float]] = {}
    for x in row["collectives"]:
        total = kinds.setdefault(x["kind"], [0, 0, 0.0])
        total[0] += 1
        total[1] += x["times"]
        total[2] += x["times"] * x["bytes"] / GIB
    parts = [f"{k} {n} → {runs}: {size:.3g}" for k, (n, runs, size) in sorted(kinds.items())]
    return "; ".join(parts) or "none"


def cells(row: Row) -> list[str]:
    """A line of the table."""
    start = [row[name] for name in ("topology", "spread", "program", "method")]
    seconds = f"{row['seconds']:.0f} s"
    if not row["fits"]:
        said = f"does not fit: {row['needs'] / GIB:.2f} of {row['has'] / GIB:.2f} GiB"
        return [*start, *["-"] * 7, said, seconds]
    sizes = [f"{row[x] / GIB:.3g}" for x in ("argument", "output", "alias", "temp", "peak")]
    flops = [f"{row[x] / 1e12:.3g}" for x in ("matmul_flops", "flops_once")]
    return [*start, *sizes, *flops, crossing(row), seconds]


def place_of(row: Row) -> list[int]:
    """Where a case stands in the table."""
    orders = (TOPOLOGIES, ("data", *SPREADS), PROGRAMS, METHODS)
    names = ("topology", "spread", "program", "method")
    return [
        order.index(row[name]) if row[name] in order else len(order)
        for order, name in zip(orders, names, strict=True)
    ]


def markdown(rows: list[Row]) -> str:
    """The page."""
    versions = " and ".join(sorted({f"jax {r['jax']} with libtpu {r['libtpu']}" for r in rows}))
    lines = [HEADER, ["---"] * 4 + ["---:"] * 7 + ["---", "---:"], *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "# Llama 3 8B on TPUs, by their compiler\n\n"
        f"Written by `python -m benchmarks.tpu.aot --json FILE --markdown FILE`: {versions}.\n"
        "One step of AdamW on a sequence of 2048 tokens for each chip, rank 16 on all\n"
        "projections; base and activations bfloat16, adapters and moments float32, layers\n"
        f"scanned and recomputed.\n\n{NOTES}\n{table}\n"
    )


def main() -> None:
    """Compile the cases that are asked for, and show them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES, metavar="NAME")
    parser.add_argument("--spreads", nargs="+", default=SPREADS, choices=(*SPREADS, "data"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--json", type=Path, help="a file to keep what is measured in")
    parser.add_argument("--markdown", type=Path, help="a file to write a table of all of that to")
    args = parser.parse_args()
    known: list[Row] = []
    if args.json and args.json.exists():
        known = json.loads(args.json.read_text())
    rows = []
    for case in cases(args):
        row = next((r for r in known if case.items() <= r.items()), None)
        if row is None:
            row = measured(case)
            known.append(row)
            if args.json:
                args.json.write_text(json.dumps(known, indent=1))
        rows.append(row)
        print(*cells(row), sep="  ", file=sys.stderr, flush=True)
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*cells(row))
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
    if args.markdown:
        args.markdown.write_text(markdown(sorted(known, key=place_of)))


if __name__ == "__main__":
    main()
