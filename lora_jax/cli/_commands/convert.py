"""``convert``: an adapter in another format, without the model; or a model."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax.cli._commands import convert_model as whole
from lora_jax.cli._options import DTYPES, FORMATS, add_names, names_and_kinds, writing
from lora_jax.cli._read.base import (
    Absent,
    adapted_leaves,
    is_torch,
    leaves_like,
    recorded_leaves,
    torch_forms,
    with_stand_ins,
)
from lora_jax.cli._read.forms import AdapterFile, Checkpoint, size_of
from lora_jax.cli._read.path import open_path
from lora_jax.cli._show import Show, size
from lora_jax.io import _files as files
from lora_jax.io import orbax, peft, safetensors
from lora_jax.io._torch import Map
from lora_jax.io.hf._families import CONV1D as CONV1D_MODELS
from lora_jax.io.hf._source import open_source
from lora_jax.io.orbax._adapter import write_adapter
from lora_jax.io.peft._axes import TOKENS
from lora_jax.io.peft._config import TENSORS
from lora_jax.io.peft._load import open_reader
from lora_jax.io.peft._stacked import stacked
from lora_jax.io.peft._torch_tree import forms_of

EXAMPLE = "adapter adapter.safetensors --to safetensors"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    add_names(parser)
    add = parser.add_argument
    add("path", metavar="IN", help="adapter or model of any format")
    add("out", metavar="OUT", help="file or folder to write")
    add("--to", choices=(*FORMATS, "hf"), required=True, help="of a model hf or orbax")
    add("--like", metavar="PATH", help="model or adapter with the tree of paths")
    add("--base-model", metavar="NAME", help="for PEFT's configuration")
    add("--for-vllm", action="store_true", help="refuse what vLLM would")
    add("--dtype", choices=DTYPES, help="of a model's floating tensors")
    add("--overwrite", action="store_true", help="replace what is there")


def run(args: argparse.Namespace, show: Show) -> int:
    """The command."""
    found = open_path(args.path)
    if isinstance(found, Checkpoint):
        return whole.run(found, args, show, *names_and_kinds(args))
    if args.to == "hf" or args.dtype:
        option = "--dtype" if args.dtype else "--to hf"
        raise ValueError(f"{option} is for models, and {args.path} is an adapter: merge it")
    if args.to == found.format:
        raise ValueError(f"{args.path} is in the format {args.to} already")
    if args.to != "peft" and (args.for_vllm or args.base_model):
        option = "--for-vllm" if args.for_vllm else "--base-model"
        raise ValueError(f"{option} goes with --to peft, and this is --to {args.to}")
    if found.native is None and args.names and not args.like:
        raise ValueError(
            f"--names is of the paths in --like PATH; without, those of {args.path} are its own "
            "names with slashes"
        )
    names, kinds = names_and_kinds(args)
    with writing(args.out, overwrite=args.overwrite) as out:
        if args.to == "peft":
            to_peft(
                found,
                out,
                like=args.like,
                names=names,
                kinds=kinds,
                base_model=args.base_model,
                for_vllm=args.for_vllm,
                overwrite=args.overwrite,
            )
        elif found.native is not None:
            _from_native(found, out, args.to, show, overwrite=args.overwrite)
        else:
            _from_peft(found, out, args, names, kinds)
    entries = len(found.updates) + len(found.whole)
    show.line(f"{out}: {entries} entries, {size(size_of(out))}, as {args.to}")
    show.document(
        {
            "path": str(out),
            "format": args.to,
            "from": found.format,
            "entries": entries,
            "bytes": size_of(out),
        }
    )
    return 0


def to_peft(
    found: AdapterFile,
    out: Path,
    *,
    like: str | None = None,
    names: Any = None,
    kinds: Mapping[str, str] | None = None,
    **options: Any,
) -> None:
    """Write an adapter of ours as PEFT's folder, of the leaves that are known of its base."""
    assert found.native is not None
    adapter, more = found.native[0], {}
    leaves = leaves_like(like) if like else recorded_leaves(found)
    named = names
    if leaves is None:
        leaves, rest = adapted_leaves(adapter), "(leaves that are not known)"
        leaves[rest] = Absent(rest, (), jnp.dtype("float32"))
        named = _but(rest, leaves, names)
    if is_torch(adapter) or (like and _is_folder(like)):
        letters = {path: f.layout for path, f in adapter.factors.items()}
        layout, own = torch_forms(leaves, letters, {})
        kinds, more = {**(kinds or {}), **own}, {"layout": layout}
    base = with_stand_ins(leaves, adapter)
    peft.save(out, LoraParams(base, adapter), names=named, kinds=kinds, **more, **options)


def _is_folder(path: str) -> bool:
    found = open_path(path)
    return isinstance(found, Checkpoint) and found.format != "orbax"


def _but(rest: str, leaves: Mapping[str, Any], names: Any) -> Any:
    """Names of all leaves but that which stands for those that nobody knows."""
    known = Map({path: x for path, x in leaves.items() if path != rest}, names)

    def named(module: str) -> str | None:
        return None if module == rest else known._named(module)

    return named


def _from_native(found: AdapterFile, out: Path, to: str, show: Show, *, overwrite: bool) -> None:
    """Convert between our own formats, with the record as it is."""
    assert found.native is not None
    if to == "safetensors":
        safetensors.write(out, *found.native, overwrite=overwrite)
        return
    if about := safetensors.about(found.path):
        show.note(f"Orbax checkpoints have no room for words, which were {about!r}")
    write_adapter(out, *found.native)


def _from_peft(found: AdapterFile, out: Path, args: argparse.Namespace, names, kinds) -> None:
    layout = None
    if args.like is None:
        leaves, layout, own = _own_leaves(found)
        kinds = {**(kinds or {}), **own}
    elif _is_folder(args.like):
        source = open_source(args.like)
        leaves = {name.replace(".", "/"): x for name, x in source.tensors.items()}
        is_conv1d = (source.config or {}).get("model_type") in CONV1D_MODELS
        layout, own = forms_of(args.path, leaves, is_conv1d=is_conv1d)
        kinds = {**(kinds or {}), **own}
    else:
        leaves = leaves_like(args.like)
    adapter = read_peft(found, Map(leaves, names, kinds, layout))
    of_base = adapter if args.like is None else LoraParams(leaves, adapter)
    if args.to == "orbax":
        orbax.save(out, of_base)
    else:
        safetensors.save(out, of_base, overwrite=args.overwrite)


def read_peft(found: AdapterFile, places: Map) -> Adapter:
    """All of an adapter of PEFT's at these places, in the dtype that it has.

    Raises:
        ValueError: something of it has no place, or is a change of what is in the base.
    """
    reader = open_reader(found.path, places)
    dtypes = {x.dtype for x in reader.left.values()}
    factors: dict[str, Factors] = {}
    for path, parts in reader.factors().items():
        factors |= dict(stacked(path, parts, places.leaves[path]))
    full = reader.trained_whole() | reader.lora_biases()
    for rows in reader.rows().values():
        factors |= rows
    reader.check_complete()
    if reader.is_redone:
        raise ValueError(
            f"{found.path}: init_lora_weights={found.config['init_lora_weights']!r} changes the "
            "base when PEFT loads it, so that its factors mean nothing without: load it with the "
            "model, lora_jax.io.peft.load, which makes it a plain LoRA"
        )
    own = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    factors = {path: f.mapped(lambda name, x: _as(x, own, name)) for path, f in factors.items()}
    order = {path: k for k, path in enumerate(places.leaves)}
    ordered = sorted(factors, key=lambda key: order.get(key.partition("[")[0], 0))
    return Adapter({key: factors[key] for key in ordered}, full)


def _as(x: Any, dtype: np.dtype, name: str) -> Any:
    """In the dtype of the file, where that says the same."""
    narrow = np.asarray(x).astype(dtype)
    is_same = name != "scale" and np.array_equal(narrow.astype(x.dtype), np.asarray(x))
    return jnp.asarray(narrow) if is_same else x


def _own_leaves(found: AdapterFile) -> tuple[dict[str, Any], Any, dict[str, str]]:
    """Leaves as PyTorch keeps them, with slashes for dots, as far as the adapter tells of them."""
    leaves: dict[str, Any] = {}
    letters: dict[str, str] = {}
    kinds: dict[str, str] = {}
    dtype = np.dtype(np.float32)
    with files.open_tensors(found.path / TENSORS) as file:
        shapes = {n.removeprefix("base_model.model."): shape for n, shape in file.shapes.items()}
    for name in shapes:
        if TOKENS in name or name.endswith(".lora_B.bias"):
            raise ValueError(
                f"{found.path}: {name!r} is known together with the base's only: say --like, the "
                "model's folder"
            )
    for module, u in found.updates.items():
        path = module.replace(".", "/") + ("" if u.kind == "Parameter" else "/weight")
        *batch, inputs, outputs = u.shape
        if u.kind == "Conv":
            of_a = shapes[f"{module}.lora_A.weight"]
            shape, letters[path] = (outputs, *of_a[1:]), "o" + "i" * (len(of_a) - 1)
        elif u.kind == "Linear":
            is_conv1d = found.config.get("fan_in_fan_out") is True
            letters[path] = "io" if is_conv1d else "oi"
            shape = (inputs, outputs) if is_conv1d else (outputs, inputs)
            kinds[path] = "Conv1D" if is_conv1d else "Linear"
        else:
            shape, letters[path] = (*batch, inputs, outputs), "b" * len(batch) + "io"
        if u.kind != "Linear":
            kinds[path] = u.kind
        leaves[path] = Absent(path, tuple(shape), dtype)
    for name, x in found.whole.items():
        path = name.replace(".", "/")
        leaves[path] = Absent(path, x.shape, dtype)
    layout, own = torch_forms(leaves, letters, kinds)
    return leaves, layout, own
