"""What files hold, in two neutral forms: updates, or tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._adapter.params import Adapter
from lora_jax._weights.ranges import rows_of
from lora_jax.io._tensor import Tensor


@dataclass(frozen=True)
class Update:
    """``scale * a b``, what an adapter adds to a weight, or to each of a stack of them.

    Attributes:
        path: of the weight, in the words of the file.
        kind: the module's, as PEFT has it, or the layout's letters, as we have it.
        a: ``[layers, in, rank]``.
        b: ``[layers, rank, out]``.
        scale: of their product.
        alpha: ``scale * rank``, or for rsLoRA ``scale * sqrt(rank)``.
        batch: the sizes of the batch axes, which ``layers`` is the product of.
        magnitude: of DoRA, or None.
        trainable: how many numbers train.
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
        """Of the factors."""
        return self.a.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """``[*batch, in, out]``."""
        return (*self.batch, self.a.shape[1], self.b.shape[2])


@dataclass(frozen=True)
class AdapterFile:
    """An adapter, wherever it lies.

    Attributes:
        path: of it; of a step, where that is.
        format: ``"safetensors"``, ``"orbax"`` or ``"peft"``.
        updates: low-rank ones, by path.
        whole: what is trained whole, or, of PEFT's rows, replaces: arrays by path.
        base: of which base it is, in words.
        native: the adapter and its record, unless it is PEFT's.
        config: PEFT's.
        note: what was chosen, where there was more; and whether the base is a changed one.
    """

    path: Path
    format: str
    updates: Mapping[str, Update]
    whole: Mapping[str, np.ndarray]
    base: str
    native: tuple[Adapter, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return size_of(self.path)

    @property
    def trainable(self) -> int:
        """How many numbers train."""
        whole = sum(x.size for x in self.whole.values())
        return whole + sum(u.trainable for u in self.updates.values())


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model, each read when asked for.

    Attributes:
        path: of it.
        format: ``"huggingface"``, ``"safetensors"``, ``"gguf"`` or ``"orbax"``.
        tensors: by name.
    """

    path: Path
    format: str
    tensors: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return size_of(self.path)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all in a folder."""
    found = [path] if path.is_file() else path.rglob("*")
    return sum(p.stat().st_size for p in found if p.is_file())


def update_of(key: str, f: Factors) -> Update:
    """Factors of ours in the neutral form."""
    batch, inputs = f.layout.count("b"), f.layout.count("i")
    a, b, scale = np.asarray(f.a), np.asarray(f.b), float(f.scale)
    sizes, layers = a.shape[:batch], prod(a.shape[:batch])
    return Update(
        key,
        "rows" if rows_of(key) else f.layout,
        a.reshape(layers, prod(a.shape[batch : batch + inputs]), f.rank),
        b.reshape(layers, f.rank, -1),
        scale,
        scale * f.rank,
        sizes,
        None if f.magnitude is None else np.asarray(f.magnitude),
        f.size,
    )


def natural(path: str) -> list[Any]:
    """A key to sort by: numbers in a path count as numbers."""
    return [(int(x), "") if x.isdecimal() else (-1, x) for x in re.split(r"(\d+)", path)]
