"""Write the page of results: every claim, the paper's number, ours with its interval, the verdict.

    python examples/experiments/page.py examples/experiments/results

It reads all CSV files of the folder and the JSON files beside them. The claims and the rules are in
``claims.py``; a claim whose experiment has fewer than five seeds has not been run.
"""

import argparse
import csv
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import claims
import common

PAGE = Path(__file__).with_name("README.md")
HEADER = """# Results of the experiments

Written by `page.py` from the CSV files of the experiments; do not edit it. Each row is one number
per seed, 5 seeds, and the 95 % interval of their mean (Student's t). The rules
are in `claims.py`, and were fixed before the runs:

- **contains 0, narrower than 0.02** ("on par"): the interval of the paired difference
  does both. If it excludes 0, the claim does not hold, whichever side is better.
- **above**, **below** a bound: the entire interval is. If all of it is on the other side, the claim
  does not hold.
- Any other interval: the claim cannot be seen at this scale.

One interval in twenty misses its mean by chance, so a few verdicts of such a long table are wrong.

Each group of rows comes from one command, which continues after an interruption:

```
python examples/experiments/SCRIPT.py --out {folder} [--packed FILE.npz]
python examples/experiments/page.py {folder}
```
"""
SCRIPTS = {
    "Quality": "quality, quality_vision",
    "LoRA variants": "quality, quality_vision",
    "Costs": "quality",
    "Weights and rank": "weights_and_ranks",
    "Subspaces": "subspaces",
    "Full rank": "full_rank",
    "Latency": "latency",
    "Task switching": "switching",
}


def read(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Read the rows of all CSV files, and what the JSON files beside them tell, by name.

    Raises:
        FileNotFoundError: there is no such folder, or a CSV file has no JSON file.
        ValueError: a file is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; pass the --out of the experiments")
    rows, shared = {}, {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            rows[path.stem] = [_row(path, table.line_num, row) for row in table]
        sidecar = path.with_suffix(".json")
        if not sidecar.is_file():
            raise FileNotFoundError(
                f"{sidecar}: no such file; {path.name} comes with it from its experiment: copy it, "
                "or remove the CSV file"
            )
        shared[path.stem] = _shared(sidecar)
    return rows, shared


def _shared(sidecar: Path) -> dict[str, Any]:
    """Read what the rows of a file share; raise if another version wrote it."""
    remedy = f"remove it and {sidecar.with_suffix('.csv').name}, and run the experiment"
    try:
        found = json.loads(sidecar.read_text("utf-8"))
        _how(sidecar.stem, found)
    except json.JSONDecodeError as error:
        raise ValueError(f"{sidecar}: not JSON ({error}); {remedy}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{sidecar}: this version of the experiments did not write it "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    return found


def _row(path: Path, line: int, row: dict[Any, Any]) -> dict[str, Any]:
    """Convert numbers; empty fields are None."""
    try:
        return {
            name: x if name in common.KEYS[:3] else int(x) if name == "seed" else _number(x)
            for name, x in row.items()
        }
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}, line {line}: {error}; remove the line, and run the experiment again: it "
            "computes the row"
        ) from error


def _number(text: str) -> float | None:
    return float(text) if text != "" else None


def judge(claim: claims.Claim, files: claims.Files) -> tuple[str, str]:
    """Return our number with its interval, and the verdict."""
    values = claim.get(files)
    if len(values) < len(common.SEEDS):
        part = f" ({len(values)} of {len(common.SEEDS)} seeds)" if values else ""
        return "", f"not run{part}"
    x = common.interval(list(values.values()))
    return f"{_signed(x.mean)} ± {_digits(x.half)}", claim.rule.verdict(x)


def _digits(x: float) -> str:
    return f"{x:.4f}" if abs(x) < 1 else f"{x:.2f}"


def _signed(x: float) -> str:
    return f"{'-' if x < 0 else '+'}{_digits(abs(x))}"


def page(
    files: claims.Files, shared: dict[str, dict[str, Any]], folder: str, figures: Sequence[str]
) -> str:
    """Return the page as Markdown.

    Args:
        files: the rows by file.
        shared: what the JSON files tell.
        folder: the folder of the results, relative to the page.
        figures: the names of its figures, without ``-light.png``.
    """
    judged = [(claim, *judge(claim, files)) for claim in claims.every()]
    counts = Counter(verdict.partition(" (")[0] for _, _, verdict in judged)
    summary = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items()))
    out = [HEADER.format(folder=folder), f"{len(judged)} claims: {summary}.", ""]
    head = ("claim", "the paper", "number", "ours", "rule", "verdict")
    out += [_line(("", *head)[1:]), _line(["---"] * len(head))]
    group = None
    for claim, ours, verdict in judged:
        if claim.group != group:
            group = claim.group
            title = f"**{group}** ({SCRIPTS[group]})"
            out.append(_line([title, *[""] * (len(head) - 1)]))
        bold = f"**{verdict}**" if verdict == claims.FAILS else verdict
        out.append(_line([claim.text, claim.paper, claim.number, ours, str(claim.rule), bold]))
    out += ["", "## Figures", ""]
    for name in figures:
        out += [
            "<picture>",
            f'<source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.png">',
            f'<img alt="{name}" src="{folder}/{name}-light.png" width="800">',
            "</picture>",
            "",
        ]
    out += ["## How they were run", ""]
    for name, own in shared.items():
        out += _how(name, own)
    if not shared:
        out.append("No experiment has been run.")
    return "\n".join(out) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(x.replace('|', '/') for x in cells)} |"


def _how(name: str, own: dict[str, Any]) -> list[str]:
    """Describe the runs of one file: commands, hardware, versions."""
    versions = ", ".join(f"{k} {v}" for k, v in own["versions"].items())
    inputs = ", ".join(f"{k} {v}" for k, v in own["inputs"].items())
    return [
        f"`{name}.csv`: {own['hardware']}; {versions}; {own['rounding']}; precision: "
        f"{own['precision']}; code {own['code']}, inputs: {inputs}.",
        "",
        "```",
        *own["commands"],
        "```",
        "",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="the --out of the experiments")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file to write: %(default)s")
    args = parser.parse_args(argv)
    with common.one_line("page"):
        files, shared = read(args.folder)
        figures = sorted(x.name.removesuffix("-light.png") for x in args.folder.glob("*-light.png"))
        folder = os.path.relpath(args.folder, args.page.parent)
        text = page(files, shared, folder, figures)
        with common.written_file(args.page) as file:
            file.write(text.encode())
    print(f"wrote {args.page}, from {', '.join(files) or 'no CSV file'}")


if __name__ == "__main__":
    main()
