"""``analyze``: measure an adapter's updates, beside its model's weights or another adapter."""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import analysis
from lora_jax._adapter.factors import Factors, Rows
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.ranges import part_of
from lora_jax._weights.selector import select
from lora_jax.analysis._changes import no_map, no_matrix
from lora_jax.analysis._plots import import_matplotlib
from lora_jax.analysis._spectra import entropy_rank, norm_rank
from lora_jax.cli._commands.convert import read_peft
from lora_jax.cli._commands.diff import renamed, with_same_axes
from lora_jax.cli._commands.verify import check_native, native_leaves
from lora_jax.cli._options import names_and_kinds, order_in, writing
from lora_jax.cli._read.forms import AdapterFile, Checkpoint, Update, natural
from lora_jax.cli._read.match import canonical
from lora_jax.cli._read.path import open_adapter, open_checkpoint
from lora_jax.cli._show import Column, Show, number
from lora_jax.io._files import written_aside

_DRAWN = {  # the functions that draw, and what they draw, by the names of the files
    "spectra": (analysis.plot_spectra, "spectrum"),
    "change": (analysis.plot_change, "relative"),
    "subspaces_a": (analysis.plot_subspaces, "phi_a"),
    "subspaces_b": (analysis.plot_subspaces, "phi_b"),
}


def run(args: argparse.Namespace, show: Show) -> int:
    """Run the command."""
    if args.plot:
        import_matplotlib()
        with writing(args.plot, overwrite=args.overwrite):
            pass
    found = open_adapter(args.path, order_in(args))
    other = open_adapter(args.other, order_in(args)) if args.other else None
    args.like = args.base
    with jax.enable_x64(True):
        rows = _rows(found, args, show)
        if other is not None:
            rows = _with_overlaps(rows, found, other, args, show)
    figures = _figures(rows) if args.plot else {}
    if figures:
        _write(figures, args)
    _report(found, rows, args, show)
    if figures:
        show.line(f"{args.plot}: {', '.join(f'{name}.svg' for name in figures)}")
    return 0


def _rows(found: AdapterFile, args: argparse.Namespace, show: Show) -> dict[str, dict[str, Any]]:
    """Measure every entry, by its name in the file."""
    adapter, leaves, new = _opened(found, args, show)
    shown = {canonical(path): path for path in (*found.updates, *found.full)}
    entries: dict[str, Any] = {**adapter.factors, **adapter.full}
    names = {shown.get(canonical(key), key): key for key in sorted(entries, key=natural)}
    if args.targets:
        chosen = select(args.targets, dict.fromkeys(names), {}, "targets")
        names = {name: key for name, key in names.items() if name in chosen}
    rows = {}
    with show.progress("analyzing") as progress:
        for k, (name, key) in enumerate(names.items()):
            f = entries[key]
            known = None if key in new else leaves
            rows[name] = {"path": name, **_measured(key, f, known)}
            progress(k + 1, len(names))
    return rows


def _opened(
    found: AdapterFile, args: argparse.Namespace, show: Show
) -> tuple[Adapter, Mapping[str, Any] | None, set[str]]:
    """Return an adapter, the leaves of its base if that is given, and the keys of new heads."""
    if args.base is None:
        factors = {path: _factors(u) for path, u in found.updates.items()}
        return Adapter({**factors}, dict(found.full)), None, set()
    model = open_checkpoint(args.base)
    if found.native is None:
        assert found.folder is not None
        adapter, leaves = read_peft(found.folder, args)
    else:
        names, kinds = names_and_kinds(args)
        adapter, record = found.native
        leaves = native_leaves(found, model, {"names": names, "kinds": kinds})
        check_native(found, leaves, model)
        if record["base"] and record["base"].get("under"):
            show.note(
                "it was trained on top of another adapter, which the weights here are without"
            )
    return adapter, leaves, _new(adapter, model)


def _new(adapter: Adapter, model: Checkpoint) -> set[str]:
    """Return the full leaves that a model lacks, and that an adapter brings."""
    known = {canonical(name) for name in model.tensors}
    return {path for path in adapter.full if not any(x.endswith(canonical(path)) for x in known)}


def _factors(u: Update) -> Factors:
    """Return an update as factors of a matrix, or of a stack of matrices."""
    a, b = u.a.astype(np.float64), u.b.astype(np.float64)
    if not u.batch:
        return Factors(a[0], b[0], u.scale, "io", u.magnitude)
    a, b = a.reshape(*u.batch, *a.shape[1:]), b.reshape(*u.batch, *b.shape[1:])
    return Factors(a, b, u.scale, "b" * len(u.batch) + "io", u.magnitude)


def _measured(key: str, f: Any, leaves: Mapping[str, Any] | None) -> dict[str, Any]:
    """Measure one entry; a number that there is not is None."""
    is_full = not isinstance(f, Factors | Rows)
    shape = f.shape if is_full else f.weight_shape
    kind = "full" if is_full else "rows" if isinstance(f, Rows) else f.layout
    row: dict[str, Any] = {"shape": list(shape), "kind": kind}
    row |= {"dora": not is_full and f.magnitude is not None, "rank": None if is_full else f.rank}
    names = ("norm", "effective_rank", "stable_rank", "spectrum")
    row |= dict.fromkeys((*names, "relative", "amplification", "intruders"))
    if leaves is None and (is_full or row["dora"]):
        return row
    one = _alone(key, f, leaves)
    if no_matrix(key, f) is None:
        s = np.asarray(analysis.spectra(one)[key])
        row |= {"spectrum": s.tolist(), "norm": float(np.linalg.norm(s))}
        row |= {"effective_rank": entropy_rank(s).tolist(), "stable_rank": norm_rank(s).tolist()}
    if leaves is not None:
        assert isinstance(one, LoraParams)
        row |= _beside(key, f, one, row)
    return row


def _alone(key: str, f: Any, leaves: Mapping[str, Any] | None) -> Adapter | LoraParams:
    """Make an adapter of one entry, in float64, with the leaf that it is of."""
    double = lambda _, x: np.asarray(x, np.float64)  # noqa: E731
    is_full = not isinstance(f, Factors | Rows)
    adapter = Adapter({}, {key: double("", f)}) if is_full else Adapter({key: f.map(double)})
    if leaves is None:
        return adapter
    path = part_of(key, leaves).path
    return LoraParams({path: np.asarray(leaves[path]).astype(np.float64)}, adapter)


def _beside(key: str, f: Any, one: LoraParams, row: dict[str, Any]) -> dict[str, Any]:
    """Compare one entry with its weight."""
    relative = np.asarray(analysis.change_per_layer(one)[key])
    found: dict[str, Any] = {"relative": relative.tolist()}
    if row["norm"] is None:
        d = np.asarray(f, np.float64) - np.asarray(one.base[key], np.float64)
        found["norm"] = float(np.linalg.norm(d))
    if row["rank"] is None or no_map(key, f) is not None:
        return found
    if not np.linalg.norm(row["spectrum"], axis=-1).all():  # a zero update has no directions
        return found
    found["amplification"] = np.asarray(analysis.amplification(one)[key].factor).tolist()
    found["intruders"] = np.asarray(analysis.intruder_dimensions(one)[key].number).tolist()
    return found


def _with_overlaps(
    rows: dict[str, dict[str, Any]],
    found: AdapterFile,
    other: AdapterFile,
    args: argparse.Namespace,
    show: Show,
) -> dict[str, dict[str, Any]]:
    """Add what the rows have in common with another adapter."""
    _check_recorded(found, other)
    is_recorded = all(f.native is None or f.native[1]["base"] for f in (found, other))
    options = argparse.Namespace(**{**vars(args), "like": None if is_recorded else args.base})
    with tempfile.TemporaryDirectory() as folder:
        one, two = with_same_axes([found, other], Path(folder), options, show)
    ours, theirs = (renamed(f.updates) for f in (one, two))
    both = {path: (u, theirs[path]) for path, u in ours.items() if path in theirs}
    if not both:
        raise ValueError(
            f"{args.path} and {args.other} adapt no weight in common: the one has "
            f"{next(iter(ours), None)!r}, the other {next(iter(theirs), None)!r}"
        )
    for path, (u, v) in both.items():
        if u.shape != v.shape:
            raise ValueError(
                f"{args.path} and {args.other} are of different bases: {path!r} has shape "
                f"{u.shape} in one and {v.shape} in the other"
            )
    return {name: row | _overlap(both.get(canonical(name))) for name, row in rows.items()}


def _check_recorded(found: AdapterFile, other: AdapterFile) -> None:
    """Raise if two adapters have recorded bases of different shapes or contents."""
    one, two = (f.native[1]["base"] or {} if f.native else {} for f in (found, other))
    shapes = [{p: x[1:] for p, x in base.get("leaves", {}).items()} for base in (one, two)]
    contents = [base.get("content", {}) for base in (one, two)]
    for what, (mine, theirs) in {"shape": shapes, "contents": contents}.items():
        for path, known in mine.items():
            if path in theirs and theirs[path] != known:
                raise ValueError(
                    f"{found.path} and {other.path} are of different bases: {path!r} has the "
                    f"{what} {known} in one and {theirs[path]} in the other"
                )


def _overlap(pair: tuple[Update, Update] | None) -> dict[str, Any]:
    """Compare two updates of a weight."""
    row: dict[str, Any] = dict.fromkeys(("cosine", "phi_a", "phi_b"))
    if pair is None or any(u.magnitude is not None or u.kind == "rows" for u in pair):
        return row
    x, y = (Adapter({"w": _factors(u)}) for u in pair)
    row["cosine"] = float(analysis.similarity([x, y])[0, 1])
    for factor in ("a", "b"):
        phi = analysis.subspace_similarity(x, y, factor=factor)["w"]
        row[f"phi_{factor}"] = np.asarray(phi).tolist()
    return row


def _report(
    found: AdapterFile, rows: dict[str, dict[str, Any]], args: argparse.Namespace, show: Show
) -> None:
    columns = [Column("path", False), Column("rank"), Column("eff."), Column("stable", spare=1)]
    columns += [Column("|dW|")]
    if args.base:
        columns += [Column("|dW|/|W|"), Column("amplif.", spare=2), Column("intruders", spare=3)]
    if args.other:
        columns += [Column("cosine"), Column("phi a", spare=4), Column("phi b", spare=5)]
    show.table(columns, [_cells(row, args) for row in rows.values()])
    if any(np.ndim(row["effective_rank"]) for row in rows.values()):
        show.line("stacked weights: means over the layers, and the sum of their intruders")
    if not args.base and any(row["rank"] is None or row["dora"] for row in rows.values()):
        show.line("DoRA and full leaves are measured against the model: pass --base")
    options = {"base": args.base, "with": args.other}
    document = {"path": str(found.path), "format": found.format, **options}
    show.document(document | {"entries": [*rows.values()]})


def _cells(row: dict[str, Any], args: argparse.Namespace) -> list[str]:
    cells = [row["path"], row["kind"] if row["rank"] is None else str(row["rank"])]
    cells += [_mean(row[name], ".2f") for name in ("effective_rank", "stable_rank")]
    cells += [_mean(row["norm"], ".4g")]
    if args.base:
        cells += [_mean(row["relative"], ".3g"), _mean(row["amplification"], ".3g")]
        intruders = row["intruders"]
        cells += ["-" if intruders is None else str(int(np.sum(intruders)))]
    if args.other:
        cells += [_mean(row["cosine"], ".4f")]
        maps = (row["phi_a"], row["phi_b"])
        cells += [_mean(None if x is None else np.asarray(x)[..., -1, -1], ".3f") for x in maps]
    return cells


def _mean(x: Any, form: str) -> str:
    return "-" if x is None or not np.isfinite(x).all() else number(float(np.mean(x)), form)


def _figures(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Draw what there is, by the names of the files."""
    figures = {}
    for name, (draw, field) in _DRAWN.items():
        if found := {k: row[field] for k, row in rows.items() if row.get(field) is not None}:
            figures[name] = draw(found)
    if not figures:
        raise ValueError("--plot: no entry has numbers to draw: pass --base")
    return figures


def _write(figures: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Write the figures in SVG, with text as text."""
    owns = [f"{name}.svg" for name in _DRAWN]
    with (
        writing(args.plot, overwrite=args.overwrite) as out,
        written_aside(out, overwrite=args.overwrite, owns=owns) as partial,
        import_matplotlib().rc_context({"svg.fonttype": "none"}),
    ):
        partial.mkdir()
        for name, figure in figures.items():
            figure.savefig(partial / f"{name}.svg")
