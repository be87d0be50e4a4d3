"""``convert`` of models: GGUF and Orbax into a Hugging Face folder, and that into Orbax."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax.cli._options import writing
from lora_jax.cli._read.base import leaves_of
from lora_jax.cli._read.forms import AdapterFile, Checkpoint, size_of
from lora_jax.cli._read.path import open_checkpoint
from lora_jax.cli._show import Show, size
from lora_jax.io import hf, orbax
from lora_jax.io.hf._families import family_of
from lora_jax.io.hf._save import write as write_hf
from lora_jax.io.hf._shards import tensors_in
from lora_jax.io.hf._source import open_source
from lora_jax.io.hf._write import Output


def run(
    found: Checkpoint, args: argparse.Namespace, show: Show, names: Any, kinds: Mapping | None
) -> int:
    """Run the command for a model."""
    if args.to not in ("hf", "orbax") or args.to == found.format:
        raise ValueError(
            f"{args.path} is a model, in the format {found.format}: expected --to hf, or from "
            "there --to orbax; --to peft and safetensors are for adapters"
        )
    if found.format == "safetensors":
        raise ValueError(f"{args.path} is one file of tensors: give the folder of the model")
    with (
        writing(args.out, overwrite=args.overwrite) as out,
        show.progress("converting", stays=True) as progress,
    ):
        if args.to == "orbax":
            params = _loaded(found, args, names, kinds, progress)
            orbax.save_params(out, unflatten_dict(params, sep="/"))
        elif found.format == "orbax":
            output = Output(out, None, args.dtype, 5 * 10**9, args.overwrite, progress)
            _write(found, output, args.like, names, kinds)
        else:
            hf.merge(
                found.path, {}, out, dtype=args.dtype, overwrite=args.overwrite, progress=progress
            )
    written = len(tensors_in(out)) if args.to == "hf" else len(found.tensors)
    report(out, args.to, found, show, tensors=written)
    return 0


def report(out: Path, to: str, found: AdapterFile | Checkpoint, show: Show, **counts: int) -> None:
    """Tell what was written: its format and its size, and how many entries or tensors."""
    counted = ", ".join(f"{count} {name}" for name, count in counts.items())
    show.line(f"{out}: {counted}, {size(size_of(out))}, as {to}")
    document = {"path": str(out), "format": to, "from": found.format}
    show.document(document | counts | {"bytes": size_of(out)})


def _write(found: Checkpoint, output: Output, like: str | None, names: Any, kinds: Any) -> None:
    """Write the parameters of an Orbax checkpoint as a model, beside the files of ``--like``."""
    source = None if like is None else open_source(like)
    family = None if source else hf.Family()
    known = family_of(source and source.config, str(like), family, names=names, kinds=kinds)
    params = {path: np.asarray(x) for path, x in found.tensors.items()}
    write_hf(output, LoraParams(params, Adapter({})), found.others, known, source)


def _loaded(
    found: Checkpoint, args: argparse.Namespace, names: Any, kinds: Any, progress: Any
) -> dict[str, Any]:
    """Return the parameters by path: by those of ``--like``, or by the names there."""
    if args.dtype is not None:
        raise ValueError("--dtype goes with --to hf: parameters have the dtypes of --like")
    if args.like is None:
        if names is not None:
            raise ValueError("--names is of the paths in --like, an Orbax checkpoint of parameters")
        return {path: np.asarray(x) for path, x in leaves_of(found).items()}
    like = {
        path: jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)
        for path, x in open_checkpoint(args.like).tensors.items()
    }
    return hf.load(found.path, like, names=names, kinds=kinds, progress=progress)
