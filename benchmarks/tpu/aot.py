"""Estimate the cost of training and merging Llama 3 8B on TPUs by their compiler, without a TPU.

    pip install '.[tpu-aot]'
    python -m benchmarks.tpu.aot                  # all cases, a minute of one core per case
    python -m benchmarks.tpu.aot --quick          # one small case
    python -m benchmarks.tpu.aot --topologies v6e:4x4 --spreads fsdp --methods lora full

The programs are a training step with AdamW on one sequence of 2048 tokens per chip (LoRA of rank 16
on all projections, the same on a base in NF4 or int8, and full fine-tuning), and ``merge`` with the
base's memory donated. Layers are scanned and recomputed in the backward pass, the base is bfloat16,
adapters and moments are float32. It prints a table; ``--json`` stores the results and skips cases
that the file contains; ``--markdown`` writes the table of ``aot.md``.
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
Sizes are GiB per chip. **args** are the base, the adapter, the optimizer's state and the batch;
**alias** is the donated part, which becomes the **output**; **peak** is the compiler's estimate of
the largest live memory. **TFLOP** counts the matrix products of one chip, each as often as its
loops run it; **once** is `cost_analysis()`, which counts the body of a loop once. Collectives are
*instructions* → *runs per step*: *GiB*, the larger of the input and the output of one chip;
asynchronous collectives are counted once. FSDP gathers the dequantized weights of a quantized base:
fewer bits save memory but no traffic. If a program does not fit, the compiler's error gives the
memory that it needs. All numbers are estimates of the compiler: nothing was run.
"""
HEADER = (
    *("topology", "spread", "program", "method", "args", "output", "alias", "temp", "peak"),
    *("TFLOP", "once", "collectives", "compiled in"),
)


def cases(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the cases to compile, the smallest slices first."""
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


def measure(case: Row) -> Row:
    """Compile a case in a separate process.

    Raises:
        RuntimeError: it failed for a reason other than too little memory.
    """
    command = [sys.executable, "-m", "benchmarks.tpu.programs", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{case} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def crossing(row: Row) -> str:
    """Format each kind of collective as ``all-gather 9 → 288: 14.91``."""
    kinds: dict[str, list[float]] = {}
    for x in row["collectives"]:
        total = kinds.setdefault(x["kind"], [0, 0, 0.0])
        total[0] += 1
        total[1] += x["times"]
        total[2] += x["times"] * x["bytes"] / GIB
    parts = [f"{k} {n} → {runs}: {size:.3g}" for k, (n, runs, size) in sorted(kinds.items())]
    return "; ".join(parts) or "none"


def cells(row: Row) -> list[str]:
    """Format a case as a row of the table."""
    start = [row[name] for name in ("topology", "spread", "program", "method")]
    seconds = f"{row['seconds']:.0f} s"
    if not row["fits"]:
        note = f"does not fit: {row['needs'] / GIB:.2f} of {row['has'] / GIB:.2f} GiB"
        return [*start, *["-"] * 7, note, seconds]
    sizes = [f"{row[x] / GIB:.3g}" for x in ("argument", "output", "alias", "temp", "peak")]
    flops = [f"{row[x] / 1e12:.3g}" for x in ("matmul_flops", "flops_once")]
    return [*start, *sizes, *flops, crossing(row), seconds]


def sort_key(row: Row) -> list[int]:
    """Return the position of a case in the table."""
    orders = (TOPOLOGIES, ("data", *SPREADS), PROGRAMS, METHODS)
    names = ("topology", "spread", "program", "method")
    return [
        order.index(row[name]) if row[name] in order else len(order)
        for order, name in zip(orders, names, strict=True)
    ]


def markdown(rows: list[Row]) -> str:
    """Format all results as the page ``aot.md``."""
    versions = " and ".join(sorted({f"jax {r['jax']} with libtpu {r['libtpu']}" for r in rows}))
    lines = [HEADER, ["---"] * 4 + ["---:"] * 7 + ["---", "---:"], *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "# Llama 3 8B on TPUs, by their compiler\n\n"
        f"Written by `python -m benchmarks.tpu.aot --json FILE --markdown FILE`: {versions}.\n"
        "One step of AdamW on a sequence of 2048 tokens per chip, rank 16 on all\n"
        "projections; base and activations bfloat16, adapters and moments float32, layers\n"
        f"scanned and recomputed.\n\n{NOTES}\n{table}\n"
    )


def main() -> None:
    """Compile the selected cases, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES, metavar="NAME")
    parser.add_argument("--spreads", nargs="+", default=SPREADS, choices=(*SPREADS, "data"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--json", type=Path, help="JSON file to store the results in")
    parser.add_argument(
        "--markdown", type=Path, help="Markdown file to write a table of all stored results to"
    )
    args = parser.parse_args()
    known: list[Row] = []
    if args.json and args.json.exists():
        known = json.loads(args.json.read_text())
    rows = []
    for case in cases(args):
        row = next((r for r in known if case.items() <= r.items()), None)
        if row is None:
            row = measure(case)
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
        args.markdown.write_text(markdown(sorted(known, key=sort_key)))


if __name__ == "__main__":
    main()
