"""``inspect``: show what a path holds, as a table."""

import argparse
import dataclasses
from math import prod
from typing import Any

import numpy as np

from lora_jax.cli._numbers import effective_rank, is_float, tensor_norm
from lora_jax.cli._options import order_in
from lora_jax.cli._read.base import fitted_leaves, source_of
from lora_jax.cli._read.forms import AdapterFile, Checkpoint, Update, natural
from lora_jax.cli._read.match import find, part_of
from lora_jax.cli._read.path import open_checkpoint, open_path
from lora_jax.cli._show import Column, Show, number, size
from lora_jax.io._torch import as_path

_FORMATS = {
    "peft": "PEFT adapter",
    "safetensors": "adapter in one file",
    "orbax": "adapter in an Orbax checkpoint",
}

_MODELS = {
    "huggingface": "Hugging Face model",
    "safetensors": "tensors in one file",
    "gguf": "GGUF model",
    "orbax": "parameters in an Orbax checkpoint",
}


def run(args: argparse.Namespace, show: Show) -> int:
    """Run the command."""
    found = open_path(args.path, order_in(args))
    if isinstance(found, Checkpoint):
        if args.base:
            raise ValueError(f"--base is for adapters, and {args.path} is a model")
        _model(found, args, show)
    else:
        if args.spectrum:
            raise ValueError(f"--spectrum is for models, and {args.path} is an adapter")
        _adapter(found, args, show)
    return 0


def _adapter(found: AdapterFile, args: argparse.Namespace, show: Show) -> None:
    model = open_checkpoint(args.base) if args.base else None
    base = _named(found, model) if model else None
    rows = [_low_rank(u, base) for u in found.updates.values()]
    rows += [_full(path, x, base) for path, x in found.full.items()]
    shown = _sorted(rows, args)
    totals = _totals(found, model)
    dora = sum(u.magnitude is not None for u in found.updates.values())
    columns = [Column("path", False), Column("shape", False), Column("kind", False, 3)]
    columns += [Column("rank"), Column("alpha", spare=2), Column("|dW|"), Column("eff.")]
    columns += [Column("|dW|/|W|")] if base else []
    columns += [Column("params", spare=1)]
    note = f", {found.note}" if found.note else ""
    show.line(f"{found.path}: {_FORMATS[found.format]}{note}, {size(found.size)}")
    _table(columns, [_cells(row, base) for row in shown], len(rows), show)
    show.line(_count_line(totals))
    if dora:
        show.line(f"DoRA: {dora} of {len(found.updates)} weights have magnitudes of their own")
    show.line(f"base: {found.base}")
    state = {path: [str(x.dtype), *x.shape] for path, x in found.state.items()}
    if state:
        show.line(f"state beside it: {', '.join(state)}")
    show.document(
        {
            "what": "adapter",
            "path": str(found.path),
            "format": found.format,
            "base": found.base,
            "note": found.note,
            "state": state,
            "entries": shown,
            "totals": totals | {"bytes": found.size},
        }
    )


def _named(found: AdapterFile, base: Checkpoint) -> Checkpoint:
    """Name the tensors of a model as an adapter does."""
    if base.format == "orbax":
        return base
    keys = [key.removesuffix(" (rows)") for key in (*found.updates, *found.full)]
    leaves = {as_path(name): x for name, x in base.tensors.items()}
    try:
        return dataclasses.replace(
            base, tensors=fitted_leaves(leaves, keys, source_of(base), found.full)
        )
    except ValueError:  # it may be several: then the entry has no tensor of its name
        return base


def _table(columns: list[Column], cells: list[list[str]], count: int, show: Show) -> None:
    """Show some rows of ``count``."""
    show.table(columns, cells)
    if len(cells) < count:
        show.line(f"... {len(cells)} of {count} rows")


def _entry(path: str, shape: tuple[int, ...], kind: str, size: int, **more: Any) -> dict[str, Any]:
    """Make a row of an adapter's table; a number that there is not is None."""
    row = {"path": path, "shape": list(shape), "kind": kind, "dora": False}
    row |= dict.fromkeys(("rank", "alpha", "scale", "norm", "effective_rank"))
    return row | {"parameters": size} | more


def _low_rank(u: Update, base: Checkpoint | None) -> dict[str, Any]:
    s = u.low_rank.svd(left=False, right=False).s
    more: dict[str, Any] = {"dora": u.magnitude is not None, "rank": u.rank, "alpha": u.alpha}
    more |= {
        "scale": u.scale,
        "norm": float(np.linalg.norm(s)),
        "effective_rank": effective_rank(s),
    }
    if base is not None and u.kind == "rows":  # relative to the full table
        table = base.tensors[find(u.path, base.tensors, base.path)[0]].read()
        more["relative"] = _ratio(more["norm"], tensor_norm(table))
    elif base is not None:
        weight = part_of(u.path, base.tensors, u.shape, base.path)
        more["relative"] = _ratio(more["norm"], tensor_norm(weight))
    return _entry(u.path, u.shape, u.kind, u.trainable, **more)


def _full(path: str, x: np.ndarray, base: Checkpoint | None) -> dict[str, Any]:
    row = _entry(path, x.shape, "rows" if path.endswith(" (rows)") else "full", int(x.size))
    if base is not None and row["kind"] == "full":
        w = part_of(path, base.tensors, x.shape, base.path).astype(np.float64).reshape(x.shape)
        row["norm"] = tensor_norm(x.astype(np.float64) - w)
        row["relative"] = _ratio(row["norm"], tensor_norm(w))
    return row


def _ratio(change: Any, weight: Any) -> float | None:
    return change / weight if weight else None


def _cells(row: dict[str, Any], base: Checkpoint | None) -> list[str]:
    rank = row["kind"] if row["rank"] is None else str(row["rank"])
    cells = [
        row["path"],
        "x".join(map(str, row["shape"])) or "()",
        row["kind"] + " DoRA" * row["dora"],
        rank,
        number(row["alpha"], "g"),
        number(row["norm"]),
        number(row["effective_rank"], ".1f"),
    ]
    cells += [number(row.get("relative"), ".3g")] if base else []
    return [*cells, f"{row['parameters']:,}"]


def _totals(found: AdapterFile, base: Checkpoint | None) -> dict[str, Any]:
    added = sum(u.a.size + u.b.size for u in found.updates.values())
    added += sum(u.magnitude.size for u in found.updates.values() if u.magnitude is not None)
    shapes = None
    if base is not None:
        shapes = [t.shape for t in base.tensors.values()]
    elif found.native is not None and found.native[1]["base"] is not None:
        shapes = [leaf[1:] for leaf in found.native[1]["base"]["leaves"].values()]
    every = None if shapes is None else added + sum(map(prod, shapes))
    percent = None if not every else 100 * found.trainable / every
    return {"trainable": found.trainable, "all": every, "trainable_percent": percent}


def _count_line(totals: dict[str, Any]) -> str:
    text = f"trainable params: {totals['trainable']:,}"
    if totals["all"] is None:
        return text
    return (
        f"{text} || all params: {totals['all']:,} || trainable%: {totals['trainable_percent']:.3g}"
    )


def _model(found: Checkpoint, args: argparse.Namespace, show: Show) -> None:
    if args.sort == "rank" and not args.spectrum:
        raise ValueError("--sort rank: of a model, effective ranks want --spectrum")
    rows, total = [], sum(prod(t.shape) for t in found.tensors.values())
    with show.progress("reading") as progress:
        done = 0
        for name, tensor in found.tensors.items():
            x = np.asarray(tensor.read())
            row = {
                "path": name,
                "shape": list(x.shape),
                "dtype": tensor.kind or str(x.dtype),
            }
            row |= {"norm": tensor_norm(x), "parameters": int(x.size)}
            if args.spectrum:
                is_matrix = x.ndim == 2 and is_float(x.dtype) and 0 not in x.shape
                row["effective_rank"] = _spectrum(x) if is_matrix else None
            rows.append(row)
            progress(done := done + x.size, total)
    shown = _sorted(rows, args)
    columns = [Column("name", False), Column("shape", False), Column("dtype", False, 1)]
    columns += [Column("norm")] + [Column("eff.")] * args.spectrum + [Column("params")]
    cells = [
        [
            row["path"],
            "x".join(map(str, row["shape"])) or "()",
            row["dtype"],
            number(row["norm"]),
            *[number(row.get("effective_rank"), ".1f")] * args.spectrum,
            f"{row['parameters']:,}",
        ]
        for row in shown
    ]
    show.line(f"{found.path}: {_MODELS[found.format]}, {size(found.size)}")
    _table(columns, cells, len(rows), show)
    kinds = sorted({row["dtype"] for row in rows})
    show.line(f"{len(rows)} tensors, {total:,} parameters, {', '.join(kinds)}")
    totals = {"tensors": len(rows), "parameters": total, "bytes": found.size, "dtypes": kinds}
    show.document(
        {
            "what": "model",
            "path": str(found.path),
            "format": found.format,
            "entries": shown,
            "totals": totals,
        }
    )


def _spectrum(x: np.ndarray) -> float | None:
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        return None
    return effective_rank(np.linalg.svd(x, compute_uv=False).astype(np.float64)[None])


def _sorted(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Sort the rows as asked for, the greatest first or by path; and keep as many as asked for."""
    if args.sort == "path":
        rows = sorted(rows, key=lambda row: natural(row["path"]))
    else:
        keys = {"norm": "norm", "rank": "effective_rank" if args.spectrum else "rank"}
        rows = sorted(rows, key=lambda row: -(row.get(keys[args.sort]) or 0.0))
    return rows[: args.top]
