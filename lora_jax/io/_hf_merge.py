"""``merge``: adapters of PEFT into the files of a model, a tensor at a time."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax._layout import role_axes
from lora_jax._params import Factors
from lora_jax.io import _shards as shards
from lora_jax.io import peft
from lora_jax.io._files import read_json
from lora_jax.io._hf_write import dtype_of, narrowed, write
from lora_jax.io._torch import Map

# The models whose dense layers are Conv1D, stored [in, out].
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CHUNK = 2**22  # entries of a weight that are in float32 at a time


def merge(
    source: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Mapping[str | os.PathLike[str], float],
    folder: str | os.PathLike[str],
    *,
    dtype: Any = None,
    shard_size: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Merge adapters of PEFT into a model's files, without loading the model.

    For every adapted tensor, in float32, some rows at a time, rounded once::

        W' = W + sum_k weight_k * scale_k * B_k A_k

    Only one tensor is in memory at a time. No network is built: any model will do.

    Args:
        source: the folder of the model.
        adapters: the folder of an adapter, or several with a weight each.
        folder: to write, in one that exists.
        dtype: of the floating tensors; None leaves each as it is.
        shard_size: in bytes, of a file.
        overwrite: whether a model that was written before may be replaced.

    Raises:
        OSError: a file is missing, or cannot be read or written.
        ValueError: an adapter is of another model, or cannot be merged exactly; or finite numbers
            would be infinite in ``dtype``.
    """
    tensors = shards.tensors_in(source)
    config = Path(source) / "config.json"
    kind = read_json(config).get("model_type", "") if config.exists() else ""
    weights = adapters if isinstance(adapters, Mapping) else {adapters: 1.0}
    changes = [
        _Change(os.fspath(path), tensors, weight, is_conv1d=kind in _CONV1D)
        for path, weight in weights.items()
    ]
    if len(changes) > 1 or any(change.weight != 1 for change in changes):
        for change in changes:
            change.check_adds()
    specs = {name: (t.shape, dtype_of(t.dtype, dtype)) for name, t in tensors.items()}

    def make(name: str) -> np.ndarray:
        w = tensors[name].read()
        for change in changes:
            w = change.apply(name, w)
        return narrowed(w, specs[name][1], name)

    write(folder, specs, make, source, dtype, shard_size, overwrite)


class _Change:
    """What an adapter does to the tensors of a model, by their names."""

    def __init__(self, path: str, tensors: Mapping[str, Any], weight: float, *, is_conv1d: bool):
        self.path, self.weight = path, weight
        leaves = {_path(name): tensor for name, tensor in tensors.items()}
        names = {_path(name): name for name in tensors}
        layout, kinds = peft.forms_of(path, leaves, is_conv1d=is_conv1d)
        places = Map(leaves, None, kinds, layout)
        reader = peft.reader(path, places)
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

    def apply(self, name: str, w: np.ndarray) -> np.ndarray:
        """A tensor with the adapter merged."""
        if name in self.full:
            return self.full[name].reshape(w.shape).astype(w.dtype)
        if name in self.rows:
            f: Factors = self.rows[name]
            ids = np.asarray(f.a).argmax(0)
            w[ids] = (w[ids].astype(np.float32) + np.asarray(f.b)).astype(w.dtype)
        if name in self.pieces:
            letters, piece = self.pieces[name]
            scale = np.float32(self.weight) * piece.scale
            if letters[0] == "b":
                for k in range(len(w)):
                    _add(w[k], letters[1:], piece.a[k], piece.b[k], scale, None)
            else:
                _add(w, letters, piece.a, piece.b, scale, piece.magnitude)
        return w


def _path(name: str) -> str:
    """A tensor's name as a path of ours: ``h.0.mlp.c_fc.weight`` as ``h/0/mlp/c_fc/weight``."""
    return name.replace(".", "/")


def _add(
    w: np.ndarray, letters: str, a: np.ndarray, b: np.ndarray, scale: Any, magnitude: Any
) -> None:
    """Add ``scale * a b`` in place, some rows at a time; with a magnitude, DoRA's columns."""
    rank = a.shape[-1]
    rows_write = letters[0] == "o"
    count = len(role_axes(letters, letters[0]))
    matrix = w.reshape(int(np.prod(w.shape[:count])), -1)  # a view: w is contiguous
    inputs, outputs = a.reshape(-1, rank), b.reshape(rank, -1) * scale
    step = max(1, _CHUNK // matrix.shape[1])
    chunks = [slice(k, k + step) for k in range(0, len(matrix), step)]

    def summed(rows: slice) -> np.ndarray:
        update = outputs[:, rows].T @ inputs.T if rows_write else inputs[rows] @ outputs
        return matrix[rows].astype(np.float32) + update

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
