"""``convert``: write an adapter in another format, without the model; or a model."""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._weights.ranges import split_range
from lora_jax.cli._commands import convert_model
from lora_jax.cli._options import layout_in, names_and_kinds, order_in, writing
from lora_jax.cli._read.base import (
    Absent,
    adapted_leaves,
    fitted_leaves,
    full_names,
    has_head,
    leaves_like,
    recorded_leaves,
    source_like,
    with_stand_ins,
    with_tables,
)
from lora_jax.cli._read.forms import AdapterFile, Checkpoint
from lora_jax.cli._read.path import open_path
from lora_jax.cli._show import Show
from lora_jax.io import orbax, safetensors
from lora_jax.io._torch import Map, as_name, module_path
from lora_jax.io.hf._families import lacked_prefix
from lora_jax.io.hf._source import Source
from lora_jax.io.hf._tree import TorchTree, is_torch
from lora_jax.io.orbax._adapter import write_adapter
from lora_jax.io.peft._axes import BIAS, ROWS
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._read import read
from lora_jax.io.peft._save import check_has_factors, files_of, places_of, tied_table
from lora_jax.io.peft._save import write as write_peft
from lora_jax.io.peft._uniform import uniform_files
from lora_jax.io.peft._vocabulary import is_named_table


def run(args: argparse.Namespace, show: Show) -> int:
    """Run the command."""
    found = open_path(args.path, order_in(args))
    if isinstance(found, Checkpoint):
        return convert_model.run(found, args, show, *names_and_kinds(args))
    _check_options(found, args)
    names, kinds = names_and_kinds(args)
    with writing(args.out, overwrite=args.overwrite) as out:
        if args.to == "peft" and found.folder is not None:
            _made_uniform(found.folder, out, args)
        elif args.to == "peft":
            if found.state:
                shown = ", ".join(found.state)
                show.note(f"PEFT's format has no room for the model's state, which was {shown}")
            tensors, config = to_peft(
                found,
                like=args.like,
                names=names,
                kinds=kinds,
                task_type=args.task_type,
                base_model=args.base_model,
                uniform=args.uniform,
                order=order_in(args),
            )
            write_peft(out, tensors, config, for_vllm=args.for_vllm, overwrite=args.overwrite)
        elif found.native is not None:
            _from_native(found, out, args.to, show, overwrite=args.overwrite)
        else:
            _from_peft(found, out, args)
    entries = len(found.updates) + len(found.full)
    convert_model.report(out, args.to, found, show, entries=entries)
    if found.folder is not None and args.to != "peft" and not args.like:
        show.line(
            "its names and axes are those of PyTorch's files; others are those of --like PATH"
        )
    return 0


def _check_options(found: AdapterFile, args: argparse.Namespace) -> None:
    """Raise unless the options are for this adapter and go with each other."""
    if args.to == "hf" or args.dtype:
        option = "--dtype" if args.dtype else "--to hf"
        raise ValueError(f"{option} is for models, and {args.path} is an adapter: merge it")
    if args.to == found.format and not args.uniform:
        raise ValueError(f"{args.path} is in the format {args.to} already")
    of_peft = {"--uniform": args.uniform, "--for-vllm": args.for_vllm}
    of_peft |= {"--base-model": args.base_model, "--task-type": args.task_type}
    if args.to != "peft" and any(of_peft.values()):
        option = next(name for name, given in of_peft.items() if given)
        raise ValueError(f"{option} goes with --to peft, and this is --to {args.to}")
    if found.native is None and args.names and not args.like:
        raise ValueError(
            f"--names is of the paths in --like PATH; without, those of {args.path} are its own "
            "names with slashes"
        )


def to_peft(
    found: AdapterFile,
    *,
    like: str | None = None,
    names: Any = None,
    kinds: Mapping[str, str] | None = None,
    task_type: str | None = None,
    model: Source | None = None,
    **options: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Make the files that PEFT has of an adapter of ours, by the leaves known of its base.

    ``model`` is the one to merge it into: the files need not be such that PEFT loads them.
    """
    assert found.native is not None
    adapter, recorded = found.native[0], recorded_leaves(found)
    source = source_like(like) if like else None
    leaves = recorded if like is None else leaves_like(like)
    if leaves and source:
        leaves = fitted_leaves(leaves, [*found.updates, *found.full], source, found.full)
        names = full_names(source) if names is None else names
    if leaves is not None:
        check(LoraParams(None, adapter), dict(leaves))
    if model is None:
        check_has_factors(adapter)
        _check_tied(found, recorded or leaves, names, kinds, has_head(task_type, source))
        if like is None and names is None and recorded:
            _check_full_names(found)
    elif leaves and not source:
        leaves = with_tables(leaves, adapter, model, names, kinds)
    named = names
    if leaves is None:
        leaves, rest = adapted_leaves(adapter), "(leaves that are not known)"
        leaves[rest] = Absent(rest, (), jnp.dtype("float32"))
        named = _but(rest, leaves, names)
    more: dict[str, Any] = {"kinds": kinds}
    if source or is_torch(adapter):
        more = TorchTree.known(leaves, adapter).options(kinds)
    lora_params = LoraParams(with_stand_ins(leaves, adapter), adapter)
    places = places_of(adapter, check(lora_params).leaves, named, **more)
    return files_of(adapter, places, task_type=task_type, **options)


def _check_tied(
    found: AdapterFile,
    leaves: Mapping[str, Any] | None,
    names: Any,
    kinds: Mapping[str, str] | None,
    has_head: bool | None,
) -> None:
    """Raise if an adapted table is, or may be, a head as well.

    An adapter without a record, in PyTorch's names, is what PEFT's was.
    """
    assert found.native is not None
    adapter = found.native[0]
    if leaves is None and is_torch(adapter):
        return
    keys = {split_range(key)[0] for key in (*adapter.factors, *adapter.full)}
    tables = {re.escape(path): "Embedding" for path in keys if is_named_table(path)}
    leaves = leaves or adapted_leaves(adapter)
    places = places_of(adapter, leaves, names, {**(kinds or {}), **tables})
    if (table := tied_table(adapter, places, has_head)) is not None:
        raise ValueError(
            f"{found.path}: the table {table!r} is an output head as well, or may be: tied. In "
            "PEFT the adapter would be of the lookups alone. Merge it into the model, lora-jax "
            "merge; or pass --task-type, such as SEQ_CLS, if the model has no head for tokens"
        )


def _check_full_names(found: AdapterFile) -> None:
    """Raise if an adapter in PyTorch's names has those of files that may lack a prefix."""
    assert found.native is not None
    adapter = found.native[0]
    keys = [split_range(key)[0] for key in (*adapter.factors, *adapter.full)]
    if is_torch(adapter) and (prefix := lacked_prefix([module_path(key)[0] for key in keys])):
        raise ValueError(
            f"{found.path}: its names, such as {as_name(keys[0])!r}, are those of files that may "
            f"lack the prefix {prefix!r} of the model in PEFT: pass --like MODEL, whose "
            "config.json tells, or --names"
        )


def _but(rest: str, leaves: Mapping[str, Any], names: Any) -> Any:
    """Name all leaves but ``rest``, which stands for those that are not known."""
    known = Map({path: x for path, x in leaves.items() if path != rest}, names)

    def named(module: str) -> str | None:
        return None if module == rest else known.named(module)

    return named


def _from_native(found: AdapterFile, out: Path, to: str, show: Show, *, overwrite: bool) -> None:
    """Convert between our own formats: the record goes along as it is."""
    assert found.native is not None
    if to == "safetensors":
        safetensors.write(out, *found.native, found.state, overwrite=overwrite)
        return
    if about := safetensors.about(found.path):
        show.note(f"Orbax checkpoints have no room for words, which were {about!r}")
    write_adapter(out, *found.native, found.state)


def _made_uniform(folder: Folder, out: Path, args: argparse.Namespace) -> None:
    """Write an adapter of PEFT's with one rank and one scale, and all else as it is."""
    tensors, config = uniform_files(folder)
    if args.base_model:
        config["base_model_name_or_path"] = args.base_model
    if args.task_type:
        config["task_type"] = args.task_type
    write_peft(out, tensors, config, for_vllm=args.for_vllm, overwrite=args.overwrite)


def _from_peft(found: AdapterFile, out: Path, args: argparse.Namespace) -> None:
    assert found.folder is not None
    adapter, leaves = read_peft(found.folder, args)
    of_base = adapter if args.like is None else LoraParams(leaves, adapter)
    if args.to == "orbax":
        orbax.save(out, of_base)
    else:
        safetensors.save(out, of_base, overwrite=args.overwrite)


def read_peft(folder: Folder, args: argparse.Namespace) -> tuple[Adapter, Mapping[str, Any]]:
    """Read all of an adapter of PEFT's, in the dtype that it has; and the leaves that it is of.

    Raises:
        ValueError: something of it has no place, or is a change of what is in the base.
    """
    is_ours = args.like is not None and source_like(args.like) is None
    places = _places(folder, args)
    contents = read(folder, places, axes_known=not is_ours)
    if contents.redone:
        init = folder.config["init_lora_weights"]
        raise folder.error(
            f"init_lora_weights={init!r} changes the base when PEFT loads it, so that its factors "
            "mean nothing without: load it with the model, lora_jax.io.peft.load, which makes it a "
            "plain LoRA"
        )
    dtypes = {x.dtype for x in folder.tensors.values()}
    own = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    factors = contents.adapter(places.leaves).factors
    factors = {key: f.map(lambda name, x: _as(x, own, name)) for key, f in factors.items()}
    return Adapter(factors, dict(contents.full)), places.leaves


def _places(folder: Folder, args: argparse.Namespace) -> Map:
    """Find the places of an adapter's tensors: in ``--like``, or in the model that it tells of."""
    names, kinds = names_and_kinds(args)
    if args.like is None:
        return _own_tree(folder).places(names, kinds)
    if source := source_like(args.like):
        tree = TorchTree.of(source, folder, names, layout_in(args))
        if tree.pieces:
            raise folder.error(
                f"its experts are other tensors than those of --like {args.like}, such as "
                f"{next(iter(tree.pieces))!r}: convert it without --like, or merge it"
            )
        return tree.places(kinds=kinds)
    return Map(leaves_like(args.like), names, kinds)


def _own_tree(folder: Folder) -> TorchTree:
    """Return the tree of the leaves that an adapter tells of, of which nothing can be read.

    Raises:
        ValueError: it has rows or biases that are known together with the base's only.
    """
    for name in folder.tensors:
        if name.endswith((f".{ROWS}", f".{BIAS}")):
            raise folder.error(
                f"{name!r} is known together with the base's only: pass --like, the model's folder"
            )
    tree = TorchTree.own(folder)
    leaves = {path: Absent(path, x.shape, x.dtype) for path, x in tree.leaves.items()}
    return dataclasses.replace(tree, leaves=leaves)


def _as(x: Any, dtype: np.dtype, name: str) -> Any:
    """Return an array in the dtype of the file, unless that would change it."""
    narrow = np.asarray(x).astype(dtype)
    is_same = name != "scale" and np.array_equal(narrow.astype(x.dtype), np.asarray(x))
    return jnp.asarray(narrow) if is_same else x
