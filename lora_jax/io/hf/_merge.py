"""Merge adapters of PEFT into the files of a model, a tensor at a time."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._weights.axes import role_axes
from lora_jax.io._tensor import Progress, Tensor
from lora_jax.io._torch import Names, as_name
from lora_jax.io.hf._apart import are_apart, as_configured, untied
from lora_jax.io.hf._families import flag_of
from lora_jax.io.hf._quantized import is_narrow
from lora_jax.io.hf._source import Source, no_config, open_source
from lora_jax.io.hf._ties import Ties, tables_in_peft
from lora_jax.io.hf._tree import TorchTree
from lora_jax.io.hf._write import Output, dtype_of, narrowed, write_model
from lora_jax.io.peft._axes import PARAMETER_ORDER, Part
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._read import read
from lora_jax.io.peft._tied import with_heads

_CHUNK = 2**22  # entries of a weight that are in float32 at a time


def merge(
    source: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Mapping[str | os.PathLike[str], float],
    folder: str | os.PathLike[str],
    *,
    names: Names = None,
    layout: Mapping[str, str] | None = None,
    parameter_order: tuple[str, ...] = PARAMETER_ORDER,
    dtype: Any = None,
    shard_size: int = 5 * 10**9,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress = None,
) -> None:
    """Merge adapters of PEFT into a model's files, without loading the model.

    For every adapted tensor, in float32, some rows at a time, rounded once::

        W' = W + sum_k weight_k * scale_k * B_k A_k

    Only one tensor is in memory at a time. No network is built: any model will do.

    Args:
        source: the folder of the model, or a GGUF file, whose quantized weights are written in
            float32, or ``dtype``.
        adapters: the folder of an adapter, or several with a weight each; ``{}`` writes the model
            as it is, such as that of a GGUF file.
        folder: the folder to write, in one that exists. The configurations, tokenizer, license and
            own code of the model are copied; no other files are.
        names: the names of modules in the adapters, by their paths in the model's files
            (``encoder/layer/0/output/dense``), as in :func:`lora_jax.io.peft.save`. Those that it
            does not name are the same but for a prefix (``bert.``, ``_orig_mod.``) that one of the
            two lacks, or for what transformers 4.52 and 5 renamed. Experts that one of the two
            stacks are found, too.
        layout: the axes of square experts whose files do not tell them, by patterns of their paths
            in the model's files: ``"bio"`` if ``lora_A`` has the second axis, ``"boi"`` if it has
            the last.
        parameter_order: as in :func:`lora_jax.io.peft.save`.
        dtype: the dtype of the floating tensors; None leaves each as it is.
        shard_size: the largest size of a file, in bytes.
        config: changes of ``config.json``.
        overwrite: whether a model that was written before may be replaced.
        progress: called with the bytes that are written, and their total.

    Raises:
        OSError: a file is missing, or cannot be read or written.
        ValueError: the model is quantized; an adapter is of another model, or cannot be merged
            exactly; or finite numbers would be infinite in ``dtype``.
    """
    opened = open_source(source)
    weights = adapters if isinstance(adapters, Mapping) else {adapters: 1.0}
    opened_adapters = [
        (Folder.open(path, order=parameter_order), weight, False)
        for path, weight in weights.items()
    ]
    output = Output(folder, config, dtype, shard_size, overwrite, progress)
    write_merged(opened, opened_adapters, output, names, layout)


def write_merged(
    source: Source,
    adapters: Iterable[tuple[Folder, float, bool]],
    output: Output,
    names: Names = None,
    layout: Mapping[str, str] | None = None,
) -> set[str]:
    """Write a model with adapters merged.

    Args:
        source: the model.
        adapters: each with its weight, and whether it is of parameters that have a table and its
            head as one.
        output: the folder to write.
        names: as in :func:`merge`.
        layout: as in :func:`merge`.

    Returns:
        The names of the tensors that changed.

    Raises:
        ValueError: adapters cannot be summed, or the model cannot have tied tensors apart.
    """
    if source.config is None:
        raise no_config(source.where, "dense layers are")
    changes = _changes(source, adapters, names, layout)
    ties = TorchTree.of(source).ties
    new = {name: x for change in changes for name, x in change.new.items()}
    tensors = dict(source.tensors) | ties.missing(source.tensors) | new

    def merged(name: str, wanted: np.dtype) -> np.ndarray:
        w = tensors[name].read()
        updates = [own for change in changes for own in change.updates.get(name, ())]
        replaced = [change for change in changes if change.replaces(name)]
        if w.dtype != wanted and (updates or replaced):
            w = w.astype(np.float32)
        for change in replaced:
            change.replace(name, w)
        for index, parts in _by_index(updates):
            _add(w[index], parts)
        return narrowed(w, wanted, name)

    written = {}
    changed = {name for name in tensors if any(change.changes(name) for change in changes)}
    for name, tensor in tensors.items():
        wanted = dtype_of(tensor.dtype, output.dtype)
        if jnp.issubdtype(wanted, jnp.integer) and len(tensor.shape) > 1 and name in changed:
            raise ValueError(
                f"{source.where}: {name!r} holds {wanted}, to which no update can be added: codes "
                "of a quantization, or an index. Take the model in full precision"
            )
        if is_narrow(wanted) and name in changed:
            raise ValueError(
                f"{source.where}: {name!r} is {tensor.dtype}, and {wanted} would round most of an "
                "update away: write bfloat16, dtype='bfloat16'"
            )
        written[name] = Tensor(tensor.shape, wanted, partial(merged, name, wanted))
    names = {old: own for change in changes if change.new for old, own in change.names.items()}
    if is_apart := are_apart(source, changed, written, output.config):
        apart = [name for name in written if name not in ties.always - ties.stored]
        names = {name: ties.outside(name, names) for name in apart}
        output = output._replace(config=untied(source.config or {}, output.config))
    else:
        names = {name: names.get(name, name) for name in (*source.tensors, *new)}
    written = {own: written[name] for name, own in names.items()}
    if not is_apart and flag_of(output.config) is not None:
        written, config = as_configured(written, source, output.config)
        output = output._replace(config=config)
    write_model(output, written, source)
    return changed


def _changes(
    source: Source,
    adapters: Iterable[tuple[Folder, float, bool]],
    names: Names,
    layout: Mapping[str, str] | None,
) -> list["Change"]:
    """Read adapters; raise unless several of them, or weighted ones, only add."""
    changes = [
        Change(folder, source, weight, names, layout, is_shared=one)
        for folder, weight, one in adapters
    ]
    if len(changes) > 1 or any(change.weight != 1 for change in changes):
        for change in changes:
            change.check_adds()
    return changes


class Change:
    """The changes that an adapter makes to the tensors of a model, by their names.

    ``is_shared``: the adapter is of parameters that have a table and its head as one.

    Attributes:
        weight: what its updates are multiplied by.
        updates: the factors that are added to a tensor: all of it, or the part at an index.
        new: the tensors of a head that the model has not.
        names: the adapter's names of all tensors, which those of a model without its head need
            beside one.
    """

    def __init__(
        self,
        adapter: Folder,
        source: Source,
        weight: float,
        names: Names = None,
        layout: Mapping[str, str] | None = None,
        *,
        is_shared: bool = False,
    ):
        self.where, self.weight = adapter.where, weight
        tree = TorchTree.of(source, adapter, names, layout)
        named = tree.named  # the adapter may have another prefix
        tables = Ties.of(source).tables if is_shared else tables_in_peft(source)
        tables = {named(head): named(table) for head, table in tables.items()}
        adapter = with_heads(adapter, tables, always=is_shared)
        tree = TorchTree.of(source, adapter, names, layout)
        contents = read(adapter, tree.places(), axes_known=True)
        if contents.redone:
            raise adapter.error(
                "its initializer changed the base, which merging cannot repeat: make it a plain "
                "LoRA first, by path_initial_model_for_weight_conversion in PEFT, or by peft.load "
                "and peft.save here"
            )
        known = source.tensors.keys() | Ties.of(source).missing(source.tensors).keys()
        self.new = {
            name: tree.leaves[path] for path, name in tree.names.items() if name not in known
        }
        self.names = tree.own_names()
        self.updates: dict[str, list[tuple[Any, Part]]] = {}
        for path, (part,) in contents.factors.items():
            part = replace(part, scale=np.float32(weight) * part.scale)
            for piece in tree.stored(path):
                own = self.updates.setdefault(piece.name, [])
                own.append((piece.index, piece.cut(part)))
        self._full: dict[str, np.ndarray] = {}
        for path, x in contents.full.items():
            for piece in tree.stored(path):
                if piece.index:
                    raise adapter.error(
                        f"trains all of {as_name(path)!r}, which is a part of {piece.name!r} in "
                        f"{source.where}. Merge the adapter in PEFT: model.merge_and_unload()"
                    )
                self._full[piece.name] = np.asarray(x)[piece.own]
        self._rows = {tree.names[path]: rows for path, rows in contents.rows.items()}
        for group in tree.ties.groups:
            own = next((self._full[name] for name in group[::-1] if name in self._full), None)
            if own is not None and group[0].endswith(".bias"):  # that of the head, two names
                self._full |= dict.fromkeys(group, own)

    def check_adds(self) -> None:
        """Raise unless all it does is to add to weights."""
        parts = (part for own in self.updates.values() for _, part in own)
        is_dora = any(part.magnitude is not None for part in parts)
        if self._full or self._rows or is_dora:
            raise ValueError(
                f"{self.where}: its DoRA, biases, rows or whole modules replace what is there, and "
                "can neither be weighted nor summed: merge it alone, with weight 1"
            )

    def changes(self, name: str) -> bool:
        """Return whether any entry of a tensor changes."""
        return self.replaces(name) or name in self.updates

    def replaces(self, name: str) -> bool:
        """Return whether entries of a tensor are new."""
        return name in self._full or name in self._rows

    def replace(self, name: str, w: np.ndarray) -> None:
        """Put the new entries in."""
        if name in self._full:
            w[...] = self._full[name].reshape(w.shape).astype(w.dtype)
        else:
            rows = self._rows[name]
            ids = list(rows.ids)
            w[ids] = (w[ids].astype(np.float32) + np.asarray(rows.b)).astype(w.dtype)


def _by_index(updates: Iterable[tuple[Any, Part]]) -> Iterable[tuple[Any, list[Part]]]:
    """Group the updates of the same part of a tensor, to be rounded once."""
    found: dict[str, tuple[Any, list[Part]]] = {}
    for index, part in updates:
        found.setdefault(repr(index), (index, []))[1].append(part)
    return found.values()


def _add(w: np.ndarray, parts: list[Part]) -> None:
    """Add ``scale * a b`` of each in place, some rows at a time; with a magnitude, as DoRA does."""
    letters = parts[0].letters
    if letters[0] == "b":
        for k in range(len(w)):
            _add(w[k], [replace(p, letters=p.letters[1:], a=p.a[k], b=p.b[k]) for p in parts])
        return
    rows_write = letters[0] == "o"
    matrix = w.reshape(prod(w.shape[: len(role_axes(letters, letters[0]))]), -1)  # a view
    factors = [(p.a.reshape(-1, p.rank), p.b.reshape(p.rank, -1) * p.scale) for p in parts]
    step = max(1, _CHUNK // matrix.shape[1])
    chunks = [slice(k, k + step) for k in range(0, len(matrix), step)]

    def summed(rows: slice) -> np.ndarray:
        x = matrix[rows].astype(np.float32)
        for a, b in factors:
            x += b[:, rows].T @ a.T if rows_write else a[rows] @ b
        return x

    if (magnitude := parts[0].magnitude) is None:
        for rows in chunks:
            matrix[rows] = summed(rows).astype(w.dtype)
        return
    gain = magnitude.reshape(-1).astype(np.float32)
    if not rows_write:
        gain = gain / np.sqrt(sum((summed(rows) ** 2).sum(0) for rows in chunks))
    for rows in chunks:
        x = summed(rows)
        own = (gain[rows] / np.linalg.norm(x, axis=1))[:, None] if rows_write else gain[None]
        matrix[rows] = (x * own).astype(w.dtype)
