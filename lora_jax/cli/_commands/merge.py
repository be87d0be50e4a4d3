"""``merge``: add adapters of any format to a model's files."""

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

from lora_jax.cli._commands.convert import to_peft
from lora_jax.cli._options import layout_in, names_and_kinds, order_in, writing
from lora_jax.cli._read.base import recorded_leaves
from lora_jax.cli._read.forms import AdapterFile, size_of
from lora_jax.cli._read.match import canonical
from lora_jax.cli._read.path import open_adapter, open_checkpoint
from lora_jax.cli._show import Show, size
from lora_jax.io.hf._families import FAMILIES
from lora_jax.io.hf._merge import write_merged
from lora_jax.io.hf._source import Source, open_source
from lora_jax.io.hf._ties import Ties
from lora_jax.io.hf._tree import is_torch
from lora_jax.io.hf._write import Output
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._save import places_of
from lora_jax.io.peft._save import write as write_peft


def run(args: argparse.Namespace, show: Show) -> int:
    """Run the command."""
    weights = args.weight or [1.0] * len(args.adapters)
    if len(weights) != len(args.adapters):
        raise ValueError(
            f"{len(weights)} weights for {len(args.adapters)} adapters: pass --weight once for each"
        )
    if len({os.path.realpath(path) for path in args.adapters}) < len(args.adapters):
        raise ValueError("an adapter is there twice: add up its weights")
    given, kinds = names_and_kinds(args)
    names, layout, order = given, layout_in(args), order_in(args)
    open_checkpoint(args.model)  # it is no adapter
    source = open_source(args.model)
    family = FAMILIES.get((source.config or {}).get("model_type", ""))
    if names is None and family is not None:
        names, kinds = family.names, {**(family.kinds or {}), **(kinds or {})}
    opened = [open_adapter(path, order) for path in args.adapters]
    with (
        writing(args.out, overwrite=args.overwrite) as out,
        tempfile.TemporaryDirectory() as temporary,
        show.progress("merging", stays=True) as progress,
    ):
        adapters = []
        for k, (found, weight) in enumerate(zip(opened, weights, strict=True)):
            is_shared = found.format != "peft" and not _has_head(found, names, source)
            if found.state:
                show.note(f"{found.path}: the model's state is left out: {', '.join(found.state)}")
            if found.format != "peft":
                folder = Path(temporary) / str(k)
                like = args.like
                if like is None and found.native and is_torch(found.native[0]):
                    like = args.model  # it is in the model's own names
                more = {"kinds": kinds, "model": source, "order": order}
                files = to_peft(found, like=like, names=names, **more)
                write_peft(folder, *files, for_vllm=False, overwrite=False)
                found = open_adapter(folder, order)
            if is_shared and recorded_leaves(opened[k]) is None:
                _check_no_table(opened[k], found, source)
            opened_folder = Folder.open(found.path, order=order)
            opened_folder = dataclasses.replace(opened_folder, letters=_letters_of(opened[k]))
            adapters.append((opened_folder, weight, is_shared))
        output = Output(out, None, args.dtype, args.shard_size, args.overwrite, progress)
        changed = write_merged(source, adapters, output, given, layout)
    written = sorted(out.glob("*.safetensors"))
    total = len(source.tensors)
    show.line(
        f"{out}: {len(changed)} of {total} tensors changed; {len(written)} "
        f"file{'s' * (len(written) != 1)} of weights, {size(size_of(out))} in all"
    )
    show.document(
        {
            "path": str(out),
            "adapters": [
                {"path": path, "format": found.format, "weight": weight}
                for path, found, weight in zip(args.adapters, opened, weights, strict=True)
            ],
            "tensors": total,
            "tensors_changed": len(changed),
            "files": [file.name for file in written],
            "bytes": size_of(out),
        }
    )
    return 0


def _letters_of(found: AdapterFile) -> str | None:
    """Return the layout of the experts of an adapter of ours, if they have one."""
    if found.native is None:
        return None
    layouts = [f.layout for f in found.native[0].factors.values() if "b" in f.layout]
    letters = {"b" + layout.replace("b", "") for layout in layouts}
    return letters.pop() if letters in ({"bio"}, {"boi"}) else None


def _has_head(found: AdapterFile, names: Any, source: Source) -> bool:
    """Return whether the parameters of an adapter of ours had a head beside the table."""
    leaves = recorded_leaves(found)
    if leaves is None or found.native is None:
        return False
    places = places_of(found.native[0], leaves, names)
    return any(places.find(head) for head in Ties.of(source).tables)


def _check_no_table(found: AdapterFile, written: AdapterFile, source: Source) -> None:
    """Raise if an adapter without a record changes a tied table: alone, or as the head as well."""
    changed = _changed(written)
    for head, table in Ties.of(source).tables.items():
        if table in changed:
            raise ValueError(
                f"{found.path}: {head!r} is tied to {table!r} in {source.where}, and without a "
                "record of its base the adapter does not tell whether it is of both: save it as a "
                "LoraParams, or merge the folder of PEFT that it came from"
            )


def _changed(found: AdapterFile) -> set[str]:
    """Find the tensors that an adapter of PEFT's changes, by their names without an ending."""
    others = (name.removesuffix(" (rows)").replace(".lora_B.bias", ".bias") for name in found.full)
    return {canonical(path) for path in [*found.updates, *others]}
