"""``diff``: compare two adapters, or two models, entry by entry."""

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax._adapter.factors import Rows
from lora_jax.cli._commands.convert import to_peft
from lora_jax.cli._numbers import is_float
from lora_jax.cli._options import names_and_kinds, order_in
from lora_jax.cli._read.base import UnknownBaseError
from lora_jax.cli._read.forms import AdapterFile, Checkpoint, Update, natural
from lora_jax.cli._read.match import canonical
from lora_jax.cli._read.path import open_adapter, open_path
from lora_jax.cli._show import Column, Show, number
from lora_jax.io._state import data_of
from lora_jax.io._tensor import counted
from lora_jax.io.hf._tree import is_torch
from lora_jax.io.peft._save import write

_CHUNK = 2**22  # entries that are in float64 at a time


def run(args: argparse.Namespace, show: Show) -> int:
    """Run the command; the exit status is 0 if the two are equal, 1 if not."""
    one, two = (open_path(path, order_in(args)) for path in (args.one, args.two))
    if isinstance(one, AdapterFile) and isinstance(two, AdapterFile):
        with tempfile.TemporaryDirectory() as folder:
            rows, only = _adapters(*with_same_axes([one, two], Path(folder), args, show))
        columns = [Column("path", False), Column("rank"), Column("|first|", spare=2)]
        columns += [Column("|second|", spare=1), Column("difference"), Column("cosine")]
        cell = _adapter_cells
    elif isinstance(one, Checkpoint) and isinstance(two, Checkpoint):
        rows, only = _models(one, two, show)
        columns = [Column("name", False), Column("shape", False, 2), Column("dtype", False, 1)]
        columns += [Column("largest"), Column("difference")]
        cell = _model_cells
    else:
        raise ValueError(f"{args.one} and {args.two}: one is an adapter, and one a model")
    for row in rows:
        relative = row["relative"]
        close = relative is not None and relative <= args.tolerance and args.tolerance > 0
        row["equal"] = row["equal"] or close
    different = [row for row in rows if not row["equal"]]
    equal = not different and not any(only.values())
    if args.top:
        different = sorted(different, key=_by_difference)[: args.top]
    show.table(columns, [cell(row) for row in different])
    for side, path in (("first", args.one), ("second", args.two)):
        for name in only[side]:
            show.line(f"only in {path}: {name}")
    alike = sum(row["equal"] for row in rows)
    show.line("equal" if equal else f"{alike} of {len(rows)} entries of both are equal")
    shown = different if args.top else rows
    document = {"equal": equal, "entries": shown, **{f"only_in_{x}": y for x, y in only.items()}}
    show.document(document)
    return 0 if equal else 1


def _by_difference(row: dict[str, Any]) -> float:
    """Return a key that sorts the largest differences first; those without a number before them."""
    return -(float("inf") if row["relative"] is None else row["relative"])


def with_same_axes(
    found: list[AdapterFile], folder: Path, args: argparse.Namespace, show: Show
) -> list[AdapterFile]:
    """Return two adapters with the same axes: those of PEFT's files, unless both are ours."""
    if len({_is_ours(f) for f in found}) == 1:
        return found
    names, kinds = names_and_kinds(args)
    options = {"like": args.like, "names": names, "kinds": kinds}
    options["order"] = order_in(args)
    try:
        return [_written(f, folder, options) if _is_ours(f) else f for f in found]
    except UnknownBaseError:
        raise
    except ValueError as error:
        show.note(f"compared by names, as one of them cannot be written for PEFT: {error}")
        return found


def _written(found: AdapterFile, folder: Path, options: Mapping[str, Any]) -> AdapterFile:
    path = folder / "written"
    write(path, *to_peft(found, **options), for_vllm=False, overwrite=False)
    return open_adapter(path, options["order"])


def _is_ours(found: AdapterFile) -> bool:
    """Return whether an adapter has axes, parts and rows as here, not as PyTorch's modules."""
    if found.native is None:
        return False
    adapter = found.native[0]
    return not is_torch(adapter) or any(isinstance(f, Rows) for f in adapter.factors.values())


def _adapters(one: AdapterFile, two: AdapterFile) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    ours, theirs = [{**f.updates, **f.full, **_state(f)} for f in (one, two)]
    if (one.format == "peft") != (two.format == "peft"):  # other names for the same entries
        ours, theirs = renamed(ours), renamed(theirs)
    rows = []
    for path in _both(ours, theirs):
        a, b = ours[path], theirs[path]
        if isinstance(a, Update) and isinstance(b, Update):
            row = _updates(a, b)
        elif isinstance(a, Update) or isinstance(b, Update):
            row = {"relative": None, "cosine": None, "equal": False, "ranks": [None, None]}
        else:
            row = _arrays(np.asarray(a), np.asarray(b)) | {"ranks": [None, None], "cosine": None}
        rows.append({"path": path} | row)
    return rows, _only(ours, theirs)


def _state(found: AdapterFile) -> dict[str, np.ndarray]:
    """Return the arrays of the state beside an adapter."""
    return {f"{path} (state)": np.asarray(data_of(x)) for path, x in found.state.items()}


def renamed(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name entries by their modules, unless two get the same name."""
    new = {canonical(path): x for path, x in entries.items()}
    return new if len(new) == len(entries) else entries


def _updates(a: Update, b: Update) -> dict[str, Any]:
    """Compare two low-rank updates, without building them."""
    row: dict[str, Any] = {"ranks": [a.rank, b.rank], "norms": [None, None]}
    x, y = a.low_rank, b.low_rank
    row |= {"norms": [float(x.norm()), float(y.norm())]}
    if a.shape != b.shape:
        return row | {
            "relative": None,
            "cosine": None,
            "equal": False,
            "shapes": [a.shape, b.shape],
        }
    fields = [(a.a, b.a), (a.b, b.b), (a.scale, b.scale), (a.magnitude, b.magnitude)]
    is_same = all(_is_same(x, y) for x, y in fields)
    largest = max(row["norms"])
    difference = 0.0 if is_same else float((x - y).norm())
    relative = difference / largest if largest else 0.0
    if a.magnitude is not None and b.magnitude is not None:
        relative = max(relative, _arrays(a.magnitude, b.magnitude)["relative"])
    elif (a.magnitude is None) != (b.magnitude is None):
        return row | {"relative": None, "cosine": None, "equal": False}
    both = row["norms"][0] * row["norms"][1]
    cosine = float(x.inner(y)) / both if both else None
    return row | {"relative": relative, "cosine": cosine, "equal": is_same or relative == 0}


def _is_same(x: Any, y: Any) -> bool:
    if x is None or y is None:
        return x is y
    return np.array_equal(np.asarray(x), np.asarray(y))


def _arrays(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Compare two tensors, some entries at a time."""
    row = {"shapes": [list(a.shape), list(b.shape)], "dtypes": [str(a.dtype), str(b.dtype)]}
    if a.shape != b.shape:
        return row | {"max": None, "relative": None, "equal": False}
    largest, squares, is_same = 0.0, np.zeros(3), a.dtype == b.dtype
    a, b = a.reshape(-1), b.reshape(-1)
    for k in range(0, a.size, _CHUNK):
        x, y = a[k : k + _CHUNK], b[k : k + _CHUNK]
        alike = x == y
        if is_float(x.dtype) and is_float(y.dtype):
            alike = alike | (np.isnan(x.astype(np.float32)) & np.isnan(y.astype(np.float32)))
        if not alike.all():
            is_same = False
        x, y = x.astype(np.float64), y.astype(np.float64)
        d = np.where(alike, 0.0, x - y)
        largest = max(largest, float(np.abs(d).max()))
        squares += [np.square(z).sum() for z in (d, x, y)]
    larger = np.sqrt(max(squares[1:]))
    relative = float(np.sqrt(squares[0]) / larger) if larger else 0.0
    return row | {"max": largest, "relative": relative, "equal": bool(is_same)}


def _models(
    one: Checkpoint, two: Checkpoint, show: Show
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, names = [], _both(one.tensors, two.tensors)
    with show.progress("comparing") as progress:
        total = sum(one.tensors[name].nbytes for name in names)
        ours = counted(one.tensors, total, progress)
        for name in names:
            rows.append({"path": name} | _arrays(ours[name].read(), two.tensors[name].read()))
    return rows, _only(one.tensors, two.tensors)


def _both(one: Iterable[str], two: Iterable[str]) -> list[str]:
    return sorted({*one} & {*two}, key=natural)


def _only(one: Iterable[str], two: Iterable[str]) -> dict[str, list[str]]:
    one, two = {*one}, {*two}
    return {"first": sorted(one - two, key=natural), "second": sorted(two - one, key=natural)}


def _adapter_cells(row: dict[str, Any]) -> list[str]:
    ranks = [str(r) for r in row["ranks"] if r is not None]
    norms = row.get("norms", [None, None])
    rank = "full" if not ranks else ranks[0] if len({*ranks}) == 1 else "/".join(ranks)
    relative = number(row["relative"], ".3g") if row["relative"] is not None else "other shape"
    return [row["path"], rank, *map(number, norms), relative, number(row["cosine"], ".4f")]


def _model_cells(row: dict[str, Any]) -> list[str]:
    shapes = ["x".join(map(str, shape)) or "()" for shape in row["shapes"]]
    pairs = [x if x == y else f"{x} {y}" for x, y in (shapes, row["dtypes"])]
    return [row["path"], *pairs, number(row["max"], ".3g"), number(row["relative"], ".3g")]
