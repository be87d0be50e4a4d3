"""Define two neutral forms for the contents of files: updates, or tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax._adapter.factors import Entry, Rows
from lora_jax._adapter.lowrank import LowRank, as_matrix
from lora_jax._adapter.params import Adapter
from lora_jax.io._tensor import Tensor
from lora_jax.io.peft._folder import Folder


@dataclass(frozen=True)
class Update:
    """``scale * a b``, which an adapter adds to a weight, or to each of a stack of weights.

    Attributes:
        path: the name of the weight in the file.
        kind: the kind of the module in files of PEFT; the layout's letters in others.
        a: ``[layers, in, rank]``.
        b: ``[layers, rank, out]``.
        scale: multiplies the product.
        alpha: ``scale * rank``, or for rsLoRA ``scale * sqrt(rank)``.
        batch: the sizes of the batch axes, whose product is ``layers``.
        magnitude: DoRA's magnitude, or None.
        trainable: the number of trainable parameters.
    """

    path: str
    kind: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    alpha: float
    batch: tuple[int, ...] = ()
    magnitude: np.ndarray | None = None
    trainable: int = 0

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        return self.a.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """``[*batch, in, out]``."""
        return (*self.batch, self.a.shape[1], self.b.shape[2])

    @property
    def low_rank(self) -> LowRank:
        """The update in float64."""
        return LowRank(self.a.astype(np.float64), self.b.astype(np.float64), self.scale)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter in a file or folder of any format.

    Attributes:
        path: the file or folder; for a training run, the folder of the step.
        format: ``"safetensors"``, ``"orbax"`` or ``"peft"``.
        updates: the low-rank updates, by path.
        full: the full leaves, and the table rows that PEFT replaces: arrays by path.
        base: a description of its base.
        native: the adapter and its record; None for PEFT's formats.
        folder: PEFT's files; None for other formats.
        note: what was chosen if there was more, and whether the base is a changed one.
        state: the leaves of the model's state beside it, by path.
    """

    path: Path
    format: str
    updates: Mapping[str, Update]
    full: Mapping[str, np.ndarray]
    base: str
    native: tuple[Adapter, Any] | None = None
    folder: Folder | None = None
    note: str = ""
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return size_of(self.path)

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        full = sum(x.size for x in self.full.values())
        return full + sum(u.trainable for u in self.updates.values())


@dataclass(frozen=True)
class Checkpoint:
    """A model: tensors that have a shape and a dtype, and return their array by ``read()``.

    Attributes:
        path: the file or folder.
        format: ``"huggingface"``, ``"safetensors"``, ``"gguf"`` or ``"orbax"``.
        tensors: the tensors by name.
        others: the tensors that are known to be no parameters, each described.
    """

    path: Path
    format: str
    tensors: Mapping[str, Tensor]
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return size_of(self.path)


def size_of(path: Path) -> int:
    """Return the number of bytes of a file, or of all files in a folder."""
    found = [path] if path.is_file() else path.rglob("*")
    return sum(p.stat().st_size for p in found if p.is_file())


def update_of(key: str, f: Entry) -> Update:
    """Convert factors to the neutral form."""
    a, b = (as_matrix(np.asarray(getattr(f, name)), f.layout, name) for name in "ab")
    batch, scale = a.shape[:-2], float(f.scale)
    return Update(
        key,
        "rows" if isinstance(f, Rows) else f.layout,
        a.reshape(prod(batch), *a.shape[-2:]),
        b.reshape(prod(batch), *b.shape[-2:]),
        scale,
        scale * f.rank,
        batch,
        None if f.magnitude is None else np.asarray(f.magnitude),
        f.size,
    )


def natural(path: str) -> list[Any]:
    """Return a sort key that orders the numbers in a path as numbers."""
    return [(int(x), "") if x.isdecimal() else (-1, x) for x in re.split(r"(\d+)", path)]
