"""``merge``: adapters of PEFT into the files of a model, a tensor at a time."""

import os
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any, TypeAlias

import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._weights.axes import role_axes
from lora_jax.io._tensor import Progress, Tensor
from lora_jax.io._torch import Map
from lora_jax.io.hf._families import CONV1D, ties_of
from lora_jax.io.hf._source import CONFIG, open_source
from lora_jax.io.hf._write import dtype_of, narrowed, write_model
from lora_jax.io.peft._load import open_reader
from lora_jax.io.peft._torch_tree import forms_of

_CHUNK = 2**22  # entries of a weight that are in float32 at a time
Update: TypeAlias = tuple[str, np.ndarray, np.ndarray, Any, Any]  # letters, a, b, scale, magnitude


def merge(
    source: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Mapping[str | os.PathLike[str], float],
    folder: str | os.PathLike[str],
    *,
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
        folder: to write, in one that exists.
        dtype: of the floating tensors; None leaves each as it is.
        shard_size: in bytes, of a file.
        config: changes of ``config.json``.
        overwrite: whether a model that was written before may be replaced.
        progress: called with the bytes that are written, and their total.

    Raises:
        OSError: a file is missing, or cannot be read or written.
        ValueError: an adapter is of another model, or cannot be merged exactly; or finite numbers
            would be infinite in ``dtype``.
    """
    opened = open_source(source)
    tensors = opened.tensors
    if opened.config is None:
        raise ValueError(
            f"{source} holds no {CONFIG}, whose model_type tells whether dense layers are stored "
            "transposed, as GPT-2's are"
        )
    kind = opened.config.get("model_type")
    weights = adapters if isinstance(adapters, Mapping) else {adapters: 1.0}
    changes = [
        Change(os.fspath(path), tensors, weight, is_conv1d=kind in CONV1D)
        for path, weight in weights.items()
    ]
    if len(changes) > 1 or any(change.weight != 1 for change in changes):
        for change in changes:
            change.check_adds()
    for name, other in ties_of(opened.config).items():
        changed = {n for n in (name, other) if any(change.changes(n) for change in changes)}
        if len(changed) == 1 and {name, other} <= tensors.keys():
            raise ValueError(
                f"{source}: {name!r} is {other!r} as well, both are stored, and of these the "
                f"adapter changes {changed.pop()!r} only: which of the two holds is not said"
            )

    def merged(name: str, wanted: np.dtype) -> np.ndarray:
        w = tensors[name].read()
        updates = [update for change in changes for update in change.updates(name)]
        replaced = [change for change in changes if change.replaces(name)]
        if w.dtype != wanted and (updates or replaced):
            w = w.astype(np.float32)
        for change in replaced:
            change.replace(name, w)
        if updates:
            _add(w, updates)
        return narrowed(w, wanted, name)

    written = {}
    for name, tensor in tensors.items():
        wanted = dtype_of(tensor.dtype, dtype)
        written[name] = Tensor(tensor.shape, wanted, partial(merged, name, wanted))
    write_model(
        folder,
        written,
        source=opened,
        config=config,
        dtype=dtype,
        shard_size=shard_size,
        overwrite=overwrite,
        progress=progress,
    )


class Change:
    """What an adapter does to the tensors of a model, by their names."""

    def __init__(self, path: str, tensors: Mapping[str, Any], weight: float, *, is_conv1d: bool):
        self.path, self.weight = path, weight
        leaves = {_path(name): tensor for name, tensor in tensors.items()}
        names = {_path(name): name for name in tensors}
        layout, kinds = forms_of(path, leaves, is_conv1d=is_conv1d)
        places = Map(leaves, None, kinds, layout)
        reader = open_reader(path, places)
        found = reader.factors()
        self.pieces = {names[p]: (letters, piece) for p, [(_, letters, piece)] in found.items()}
        self.full = {names[p]: np.asarray(x) for p, x in reader.trained_whole().items()}
        self.full |= {names[p]: np.asarray(x) for p, x in reader.lora_biases().items()}
        self.rows = {names[p]: f for p, of_rows in reader.rows().items() for f in of_rows.values()}
        reader.check_complete()
        if reader.is_redone:
            raise ValueError(
                f"{path}: its initializer changed the base, which merging cannot repeat: make it a "
                "plain LoRA first, by path_initial_model_for_weight_conversion in PEFT, or by "
                "peft.load and peft.save here"
            )

    def check_adds(self) -> None:
        """Raise unless all it does is to add to weights."""
        is_dora = any(piece.magnitude is not None for _, piece in self.pieces.values())
        if self.full or self.rows or is_dora:
            raise ValueError(
                f"{self.path}: its DoRA, biases, rows or whole modules replace what is there, and "
                "can neither be weighted nor summed: merge it alone, with weight 1"
            )

    def changes(self, name: str) -> bool:
        """Whether anything of a tensor is."""
        return self.replaces(name) or name in self.pieces

    def replaces(self, name: str) -> bool:
        """Whether entries of a tensor are new."""
        return name in self.full or name in self.rows

    def replace(self, name: str, w: np.ndarray) -> None:
        """Put them in."""
        if name in self.full:
            w[...] = self.full[name].reshape(w.shape).astype(w.dtype)
        else:
            f: Factors = self.rows[name]
            ids = np.asarray(f.a).argmax(0)
            w[ids] = (w[ids].astype(np.float32) + np.asarray(f.b)).astype(w.dtype)

    def updates(self, name: str) -> list[Update]:
        """What is added to a tensor."""
        if name not in self.pieces:
            return []
        letters, piece = self.pieces[name]
        return [(letters, piece.a, piece.b, np.float32(self.weight) * piece.scale, piece.magnitude)]


def _path(name: str) -> str:
    """A tensor's name as a path of ours: ``h.0.mlp.c_fc.weight`` as ``h/0/mlp/c_fc/weight``."""
    return name.replace(".", "/")


def _add(w: np.ndarray, updates: list[Update]) -> None:
    """Add ``scale * a b`` of each in place, some rows at a time; with a magnitude, as DoRA does."""
    letters, *_, magnitude = updates[0]
    if letters[0] == "b":
        for k in range(len(w)):
            _add(w[k], [(own[1:], a[k], b[k], scale, m) for own, a, b, scale, m in updates])
        return
    rows_write = letters[0] == "o"
    matrix = w.reshape(prod(w.shape[: len(role_axes(letters, letters[0]))]), -1)  # a view
    factors = [
        (a.reshape(-1, a.shape[-1]), b.reshape(a.shape[-1], -1) * scale)
        for _, a, b, scale, _ in updates
    ]
    step = max(1, _CHUNK // matrix.shape[1])
    chunks = [slice(k, k + step) for k in range(0, len(matrix), step)]

    def summed(rows: slice) -> np.ndarray:
        x = matrix[rows].astype(np.float32)
        for a, b in factors:
            x += b[:, rows].T @ a.T if rows_write else a[rows] @ b
        return x

    if magnitude is None:
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
