"""Measure a LoRA training step in JAX and in PyTorch, side by side in one run.

Each row is a process of its own: the trainer's step, its floor without adapters, qwix on the same
model, and Hugging Face PEFT: compiled, eager, and with the settings of TRL's ``SFTTrainer``. Each
gets its own fastest setting that fits; "all recomputed" recomputes every layer::

    python -m benchmarks.recipes.side_by_side --size 8b                    # one large GPU
    python -m benchmarks.recipes.side_by_side --size small                 # any machine
    python -m benchmarks.recipes.side_by_side --size 1b --length 512 8192  # several lengths

The rows are added to a file of JSON lines, and ``--figure`` draws what is in it.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.recipes.scaling import LLAMA_8B

SIZES = {
    "8b": LLAMA_8B,
    "1b": LLAMA_8B
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "small": LLAMA_8B
    | {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
}
UNROLLED = ["--layers=unrolled", "--remat=none"]
OURS = [UNROLLED, ["--remat=dots"], ["--remat=full"], ["--remat=offload"]]
AUTOCAST = ["--autocast", "--checkpoint"]

# Settings of each, the fastest first: the first that fits counts.
CONTENDERS: dict[str, tuple[str, Sequence[list[str]]]] = {
    "ours": ("ours", OURS),
    "ours, all recomputed": ("ours", [["--layers=unrolled", "--remat=full"]]),
    "floor": ("floor", OURS),
    "qwix": ("qwix", OURS),
    "PEFT compiled": ("torch", [["--compile"], ["--compile", "--checkpoint"]]),
    "PEFT compiled, all recomputed": ("torch", [["--compile", "--checkpoint"]]),
    "PEFT eager": ("torch", [["--eager"], ["--eager", "--checkpoint"]]),
    "PEFT, settings of TRL": ("torch", [["--eager", *AUTOCAST]]),
}
OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "RESOURCE_EXHAUSTED")


def measure(name: str, length: int, args: argparse.Namespace, sizes: Path) -> dict[str, Any]:
    """Return the row of a contender, in its fastest setting that fits; or why there is none."""
    kind, settings = CONTENDERS[name]
    batch = max(1, args.tokens // length)
    row = {"name": name, "size": args.size, "batch": batch, "length": length}
    for flags in settings:
        common = [f"--batch={batch}", f"--length={length}", f"--sizes={sizes}", "--rank=16"]
        common += [f"--repeats={args.repeats}", f"--dtype={args.dtype}"]
        if kind == "torch":
            script = str(Path(__file__).with_name("contender_torch.py"))
            command = [args.torch, script, *(x for x in flags if x != "--eager")]
        else:
            command = [sys.executable, "-m", "benchmarks.recipes.contender", kind, *flags]
        try:
            run = subprocess.run(
                [*command, *common], capture_output=True, text=True, timeout=args.timeout
            )
        except subprocess.TimeoutExpired:
            return row | {"flags": flags, "error": f"no result after {args.timeout} s"}
        if run.returncode == 0:
            found = json.loads(run.stdout.splitlines()[-1])
            found["tokens_per_s"] = 1000 * batch * length / found["ms"]
            return row | {"flags": flags} | found
        text = run.stdout + run.stderr
        row["error"] = text.strip().splitlines()[-1] if text.strip() else f"exit {run.returncode}"
        if not any(x in text for x in OUT_OF_MEMORY):
            return row | {"flags": flags}
        row["error"] = f"out of memory with {' '.join(flags)}"
    return row


def line_of(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    start = f"{row['name']:31}{row['batch']:3} x {row['length']:<7}"
    if "ms" not in row:
        return f"{start}{row['error']}"
    memory = "-" if row["memory_gb"] is None else f"{row['memory_gb']:.1f}"
    return (
        f"{start}{row['ms']:9.1f}{row['tokens_per_s']:10,.0f}{memory:>9}{row['warm_s']:9.1f}  "
        f"{row['attention']:7}{' '.join(row['flags'])}"
    )


def figure(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Draw tokens per second, and memory against length, for a light and a dark page."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in rows if "ms" in row]
    lengths = sorted({row["length"] for row in rows})
    sizes = [size for size in ("8b", "1b", "small") if any(r["size"] == size for r in rows)]
    main = sizes[0]
    bars = [r for r in rows if r["size"] == main and r["length"] == 2048] or rows
    bars = sorted({r["name"]: r for r in bars}.values(), key=lambda r: r["tokens_per_s"])
    for theme, ink, page in (("light", "#1f2328", "#ffffff"), ("dark", "#e6edf3", "#0d1117")):
        style = {"svg.fonttype": "path", "svg.hashsalt": "0", "font.size": 9}
        style |= {f"{x}.color": ink for x in ("xtick", "ytick", "text")}
        style |= {"axes.edgecolor": ink, "axes.labelcolor": ink, "axes.facecolor": page}
        style |= {"figure.facecolor": page, "axes.spines.top": False, "axes.spines.right": False}
        with mpl.rc_context(style):
            fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.2), layout="constrained")
            colors = [_color(row["name"]) for row in bars]
            names = [row["name"] for row in bars]
            drawn = left.barh(names, [row["tokens_per_s"] for row in bars], color=colors)
            left.bar_label(drawn, [f"{row['tokens_per_s']:,.0f}" for row in bars], padding=3)
            left.margins(x=0.18)
            left.xaxis.set_major_locator(MaxNLocator(4))
            left.xaxis.set_major_formatter("{x:,.0f}")
            left.set_xlabel(f"tokens per second, {main.upper()}, {bars[0]['batch']} x 2048")
            for name in ("ours", "PEFT compiled", "PEFT, settings of TRL"):
                for size, dash in zip(sizes, ("-", "--", ":"), strict=False):
                    found = {
                        r["length"]: r["memory_gb"]
                        for r in rows
                        if (r["name"], r["size"]) == (name, size) and r["memory_gb"]
                    }
                    x = [length for length in lengths if length in found]
                    y = [found[length] for length in x]
                    label = f"{name}, {size.upper()}"
                    right.plot(x, y, dash, marker="o", ms=3, color=_color(name), label=label)
            right.set_xscale("log", base=2)
            right.set_xticks(lengths, [f"{x:,}" for x in lengths])
            right.set_ylim(bottom=0)
            right.set_xlabel("tokens per row")
            right.set_ylabel("memory, GB")
            right.legend(frameon=False, fontsize=7, labelcolor=ink)
            fig.savefig(folder / f"side-by-side-{theme}.svg", metadata={"Date": None})
            plt.close(fig)


def _missing(name: str, args: argparse.Namespace) -> bool:
    """Return whether a contender needs what is not here; bfloat16 is no dtype for CPUs."""
    if name == "qwix":
        return importlib.util.find_spec("qwix") is None
    return name == "PEFT, settings of TRL" and args.dtype == "float32"


def _color(name: str) -> str:
    """Return the color of a contender."""
    colors = {"ours": "#2f81f7", "floor": "#8b949e", "qwix": "#a371f7"}
    colors |= {"PEFT, settings": "#bf3989"}
    return next((c for start, c in colors.items() if name.startswith(start)), "#db6d28")


def main() -> None:
    """Measure, print a table, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--length", type=int, nargs="+", default=[2048])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per step, if they fit")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="default: all there are")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--timeout", type=int, default=600, help="seconds per setting")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has torch and peft")
    parser.add_argument("--json", type=Path, help="file of JSON lines to append to")
    parser.add_argument("--figure", type=Path, help="draw the rows of --json into this folder")
    args = parser.parse_args()
    args.only = args.only or [name for name in CONTENDERS if not _missing(name, args)]
    print(f"{'':31}{'batch':13}  ms/step  tokens/s   GB       start s  attention", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        sizes = Path(folder, "sizes.json")
        sizes.write_text(json.dumps(SIZES[args.size]))
        for length in args.length:
            for name in args.only:
                row = measure(name, length, args, sizes)
                print(line_of(row), flush=True)
                if args.json:
                    with args.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    if args.figure and args.json:
        lines = args.json.read_text("utf-8").splitlines()
        figure([json.loads(line) for line in lines], args.figure)


if __name__ == "__main__":
    main()
