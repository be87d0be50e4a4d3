"""``extract``: find the LoRA that comes nearest to what fine-tuning changed in a model."""

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Entry, Factors
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.axes import not_trainable
from lora_jax._weights.conventions import is_head
from lora_jax._weights.paths import RANDOM, nearest
from lora_jax._weights.ranges import Part
from lora_jax._weights.selector import select
from lora_jax._weights.target import Target
from lora_jax.algebra._extract import check_options, check_rest, extract, truncated
from lora_jax.cli._options import names_and_kinds, writing
from lora_jax.cli._read.base import full_names, source_of
from lora_jax.cli._read.forms import Checkpoint, size_of, update_of
from lora_jax.cli._read.path import open_checkpoint
from lora_jax.cli._show import Column, Show, number, size
from lora_jax.io import orbax, peft, safetensors
from lora_jax.io._torch import as_path
from lora_jax.io.hf._tree import TorchTree


def run(args: argparse.Namespace, show: Show) -> int:
    """Run the command."""
    check_options(args.rank, args.energy, args.alpha, args.rest)
    base, tuned = open_checkpoint(args.base), open_checkpoint(args.tuned)
    if base.format != tuned.format and "orbax" in (base.format, tuned.format):
        raise ValueError(f"{args.base} and {args.tuned} are of different formats")
    _check_same(base, tuned)
    to = args.to or ("orbax" if base.format == "orbax" else "peft")
    names, kinds = names_and_kinds(args)
    if to != "peft" and (names or kinds or args.base_model):
        raise ValueError("--names, --kinds and --base-model go with --to peft")
    with writing(args.out, overwrite=args.overwrite) as out:
        more: dict[str, Any] = {"kinds": kinds}
        if base.format == "orbax":
            lora_params, rows = _of_parameters(base, tuned, args)
        else:
            tree = _tree_of(base)
            lora_params, rows = _of_folder(tree, base, tuned, args, show)
            more = tree.options(kinds)
            if to == "peft":
                _check_ties(tree, lora_params.adapter)
                names = full_names(source_of(base)) if names is None else names
        if to == "orbax":
            orbax.save(out, lora_params)
        elif to == "safetensors":
            safetensors.save(out, lora_params, overwrite=args.overwrite)
        else:
            more |= {"base_model": args.base_model, "overwrite": args.overwrite}
            peft.save(out, lora_params, names=names, **more)
    _report(out, to, rows, lora_params.adapter, show)
    return 0


def _check_ties(tree: TorchTree, adapter: Adapter) -> None:
    """Raise if a table changed that is a head as well: in PEFT its adapter is of lookups alone."""
    changed = {tree.names[path] for path in (*adapter.factors, *adapter.full)}
    for head, table in tree.ties.tables.items():
        if f"{table}.weight" in changed and f"{head}.weight" not in changed:
            raise ValueError(
                f"{table!r} changed, and {head!r} is tied to it: PEFT would change the lookups "
                "alone. Write --to safetensors, which is of both, or leave it out: --rest ignore, "
                "or --targets without it"
            )


def _report(out: Path, to: str, rows: list[Any], adapter: Adapter, show: Show) -> None:
    squares = sum(row["norm"] ** 2 for row in rows)
    lost = sum((row["norm"] * row["error"]) ** 2 for row in rows)
    error = (lost / squares) ** 0.5
    columns = [Column("path", False), Column("shape", False, 2), Column("rank")]
    columns += [Column("|change|", spare=1), Column("kept"), Column("error")]
    cells = [
        [
            row["path"],
            "x".join(map(str, row["shape"])),
            str(row["rank"]),
            number(row["norm"]),
            f"{100 * row['kept']:.2f}%",
            number(row["error"], ".3g"),
        ]
        for row in rows
    ]
    show.table(columns, cells)
    full = f", {len(adapter.full)} full leaves" if adapter.full else ""
    show.line(
        f"{out}: {len(rows)} weights{full}; {100 * (1 - error**2):.2f}% of the energy kept, "
        f"relative error {number(error, '.3g')}; {size(size_of(out))} as {to}"
    )
    show.document(
        {
            "path": str(out),
            "format": to,
            "entries": rows,
            "full": list(adapter.full),
            "kept": 1 - error**2,
            "error": error,
            "bytes": size_of(out),
        }
    )


def _check_same(base: Checkpoint, tuned: Checkpoint) -> None:
    for one, two in ((base, tuned), (tuned, base)):
        for name, tensor in one.tensors.items():
            if name not in two.tensors:
                raise ValueError(
                    f"{two.path} has no tensor {name!r}, which {one.path} has: these are two "
                    f"models. Nearest: {nearest(name, two.tensors)}"
                )
            if tuple(tensor.shape) != tuple(two.tensors[name].shape):
                raise ValueError(
                    f"{name!r} has shape {tuple(tensor.shape)} in {one.path} and "
                    f"{tuple(two.tensors[name].shape)} in {two.path}: these are two models"
                )


def _of_parameters(
    base: Checkpoint, tuned: Checkpoint, args: argparse.Namespace
) -> tuple[LoraParams, list[dict[str, Any]]]:
    """Extract from two trees of parameters."""
    others = {**base.others, **tuned.others}
    trees = [
        {path: jnp.asarray(t.read()) for path, t in model.tensors.items() if path not in others}
        for model in (base, tuned)
    ]
    if state := [path for path, what in others.items() if what not in RANDOM]:
        warnings.warn(
            f"these are no parameters, and are left out: {', '.join(state)}", stacklevel=2
        )
    options: dict[str, Any] = {"targets": args.targets or "all-linear", "rest": args.rest}
    options |= {"energy": args.energy, "alpha": args.alpha}
    lora_params = extract(trees[0], trees[1], args.rank, **options)
    rows = []
    for key, f in lora_params.adapter.factors.items():
        after, before = (Target(key, tree[key], Part(key), f.layout) for tree in trees[::-1])
        rows.append(_row(key, after.shape, np.asarray(after.matrix() - before.matrix()), f))
    return lora_params, rows


def _row(path: str, shape: tuple[int, ...], change: np.ndarray, f: Entry) -> dict[str, Any]:
    """Tell what factors keep of a change, ``[*batch, in, out]``, as they are written."""
    u = update_of(path, f)
    change = change.reshape(len(u.a), u.a.shape[1], -1).astype(np.float64)
    size = float(np.linalg.norm(change))
    rest = change - u.scale * (u.a.astype(np.float64) @ u.b.astype(np.float64))
    error = float(np.linalg.norm(rest)) / size
    row = {"path": path, "shape": list(shape), "rank": u.rank, "norm": size}
    return row | {"kept": 1 - error**2, "error": error}


def _of_folder(
    tree: TorchTree, base: Checkpoint, tuned: Checkpoint, args: argparse.Namespace, show: Show
) -> tuple[LoraParams, list[dict[str, Any]]]:
    """Extract from two models' files, one pair of tensors at a time; in their names."""
    wanted = _wanted(tree, args.targets)
    factors: dict[str, Entry] = {}
    full: dict[str, Any] = {}
    rows, left = [], []
    with show.progress("extracting") as progress:
        for k, (path, name) in enumerate(tree.names.items()):
            before, after = (np.asarray(m.tensors[name].read()) for m in (base, tuned))
            progress(k + 1, len(tree.names))
            if np.array_equal(before, after):
                continue
            if name not in wanted:
                left.append(name)
                if args.rest == "full":
                    full[path] = _full(name, after)
                continue
            delta = after.astype(np.float32) - before.astype(np.float32)
            factors[path], matrix = _truncated(name, delta, tree.layout[path], args)
            rows.append(_row(name, delta.shape, matrix, factors[path]))
    check_rest(left, args.rest)
    if not factors:
        raise ValueError(
            f"{base.path} and {tuned.path} are equal: there is nothing to extract"
            if not left
            else f"no linear layer changed, but {', '.join(left[:5])}: there is no LoRA of that"
        )
    return LoraParams(tree.leaves, Adapter(factors, full)), rows


def _truncated(
    name: str, delta: np.ndarray, letters: str, args: argparse.Namespace
) -> tuple[Factors, np.ndarray]:
    """Make the factors of a change; and the change as a matrix, ``[in, out]``."""
    is_io = letters == "io"
    matrix = delta if is_io else delta.reshape(len(delta), -1).T
    part = truncated(jnp.asarray(matrix), args.rank, args.energy, args.alpha, name)
    a = part.a if is_io else part.a.reshape(*delta.shape[1:], part.rank)
    return Factors(a, part.b, jnp.asarray(part.scale, jnp.float32), letters), matrix


def _full(name: str, x: np.ndarray) -> Any:
    if reason := not_trainable(x):
        raise ValueError(f"{name!r} changed, and cannot train fully: {reason}")
    return jnp.asarray(x, jnp.float32)


def _tree_of(base: Checkpoint) -> TorchTree:
    """Return the tree of a model.

    Raises:
        ValueError: some layers may be stored transposed, and no configuration tells.
    """
    source = source_of(base)
    tree = TorchTree.of(source)
    tree.check_axes(source, tree.doubtful)
    return tree


def _wanted(tree: TorchTree, targets: str | None) -> Mapping[str, Any]:
    """Choose the names of the weights that get factors if they changed."""
    weights = {tree.names[path]: weight for path, weight in tree.layout.weights.items()}
    blocked = {name: w.why_not for name, w in weights.items() if w.why_not is not None}
    others = {
        name
        for name, w in weights.items()
        if is_head(as_path(name)) or w.kind == "embedding" or len(w.shape) > 2
    }
    return select(targets or "all-linear", weights, blocked, "targets", others)
