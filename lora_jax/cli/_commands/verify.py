"""``verify``: tell whether an adapter is for a model."""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.params import LoraParams, check
from lora_jax.cli._options import layout_in, names_and_kinds, order_in
from lora_jax.cli._read.base import (
    UnknownBaseError,
    adapted_leaves,
    fitted_leaves,
    leaves_of,
    new_heads,
    recorded_leaves,
    source_of,
)
from lora_jax.cli._read.forms import AdapterFile, Checkpoint
from lora_jax.cli._read.path import open_adapter, open_checkpoint, open_path
from lora_jax.cli._show import Show
from lora_jax.io import _record as records
from lora_jax.io._tensor import Tensor
from lora_jax.io._torch import Map, as_path
from lora_jax.io.hf._families import FAMILIES, Family
from lora_jax.io.hf._merge import Change
from lora_jax.io.hf._names import TensorNames
from lora_jax.io.hf._source import UnknownModelError
from lora_jax.io.hf._ties import Ties
from lora_jax.io.hf._tree import TorchTree, is_torch
from lora_jax.io.peft._read import read


def run(args: argparse.Namespace, show: Show) -> int:
    """Run the command: 0 if it is, 1 if not."""
    order, layout = order_in(args), layout_in(args)
    model, found = open_path(args.model, order), open_path(args.adapter, order)
    if isinstance(model, AdapterFile) and isinstance(found, Checkpoint):  # the other order
        model, found = found, model
    else:
        model, found = open_checkpoint(args.model), open_adapter(args.adapter, order)
    names, kinds = names_and_kinds(args)
    options = {"names": names, "kinds": kinds}
    try:
        reason, fits = _seen(found, model, options, layout), True
    except (UnknownBaseError, UnknownModelError):
        raise
    except ValueError as error:
        reason, fits = " ".join(str(error).split()), False
    named = found.folder and found.folder.config.get("base_model_name_or_path")
    show.line(f"{'yes' if fits else 'no'}: {reason}")
    if named:
        show.line(f"its configuration names the base {named}")
    document = {"fits": fits, "reason": reason, "format": found.format, "base": found.base}
    show.document(document | {"adapter": str(found.path), "model": str(model.path)})
    return 0 if fits else 1


def _seen(found: AdapterFile, model: Checkpoint, options: Mapping[str, Any], layout: Any) -> str:
    """Look at an adapter and a model, and say what was found to be right.

    Raises:
        ValueError: the adapter is another model's, and why.
    """
    if found.folder is not None:
        if model.format == "orbax":
            read(found.folder, Map(leaves_of(model), **options))
        else:
            Change(found.folder, source_of(model), 1.0, options.get("names"), layout)
        entries = len(found.updates) + len(found.full)
        return f"each of its {entries} entries has its place, of the right shape"
    return check_native(found, native_leaves(found, model, options), model)


def native_leaves(
    found: AdapterFile, model: Checkpoint, options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Find the leaves of the base of an adapter of ours in a model, in its paths and axes.

    Raises:
        ValueError: they are not there, or have other shapes.
    """
    assert found.native is not None
    if model.format == "orbax":
        return leaves_of(model)
    if not found.native[1]["base"] and is_torch(found.native[0]):
        keys = [*found.updates, *found.full]
        return fitted_leaves(leaves_of(model), keys, source_of(model), found.full)
    return _leaves_in(found, model, options)


def check_native(found: AdapterFile, leaves: Mapping[str, Any], model: Checkpoint) -> str:
    """Compare an adapter of ours with the leaves of a model, each read when it is asked for.

    Raises:
        ValueError: the adapter is another model's, and why.
    """
    assert found.native is not None
    adapter, record = found.native
    base, where = record["base"], str(found.path)
    check(LoraParams(leaves, adapter), dict(leaves))
    if base is None:
        return f"its {len(adapter.factors) + len(adapter.full)} entries fit; it has no record"
    structs = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype))
        for path, x in leaves.items()
        if path in base["leaves"] or path not in model.others
    }
    records.check_base({"leaves": base["leaves"], "content": {}}, structs, where)
    for path, known in base["content"].items():
        if (content := records.content_of(jnp.asarray(np.asarray(leaves[path])))) != known:
            raise ValueError(
                f"{where} was trained on other weights: {path!r} has the contents {content} in "
                f"{model.path}, expected {known}"
            )
    known = len(base["content"])
    seen = f"and the contents of {known} of them" if known else "contents are not recorded"
    return f"the names and shapes of all {len(base['leaves'])} leaves are its base's, {seen}"


def _leaves_in(
    found: AdapterFile, model: Checkpoint, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Find the leaves of an adapter's base in the files of a model, by their names there.

    Raises:
        ValueError: they are not there, or have other shapes.
    """
    assert found.native is not None
    adapter, record = found.native
    wanted = recorded_leaves(found) or adapted_leaves(adapter, full=True)
    source = source_of(model)
    known = FAMILIES.get((source.config or {}).get("model_type", ""), Family())
    if is_torch(adapter):
        ties = Ties.of(source).names  # the record may list a head that the files leave out
        known = Family(**TorchTree.known(wanted, adapter).options(), tied=ties)
    else:
        layout = {re.escape(p): f.layout for p, f in adapter.factors.items() if p in wanted}
        known = dataclasses.replace(known, layout=layout or None)
    given = {name: x for name, x in options.items() if x is not None}
    names = TensorNames(wanted, dataclasses.replace(known, **given), source, None)
    new, leaves = new_heads(adapter.full), {}
    for path in list(wanted):
        try:
            leaves[path] = names.leaf(path)
        except ValueError:
            if path not in new or any(as_path(n).endswith(path) for n in source.tensors):
                raise
            leaves[path] = new[path]
            del wanted[path]
    if "kinds" not in given:
        adapted = {as_path(n) for p in wanted if p in adapter.factors for _, n in names.parts(p)}
        TorchTree.of(source).check_axes(source, adapted)
    if record["base"] is not None:
        names.left_over(name for path in wanted for _, name in names.parts(path))
    return leaves
