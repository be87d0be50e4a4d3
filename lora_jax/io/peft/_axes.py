"""The factors of one module in PEFT's axes, and back.

With PEFT's names on the left, ``r`` the rank, and ours on the right::

    Linear, Conv1D   lora_A [r, in]              a [*in, r]
                     lora_B [out, r]             b [r, *out]
    Conv             lora_A [r, in, *window]     a [*window, in, r] or [in, *window, r]
                     lora_B [out, r, 1, ...]     b [r, out]
    Embedding        lora_embedding_A [r, rows]  a [rows, r]
                     lora_embedding_B [out, r]   b [r, *out]
    Parameter        lora_A [experts * r, in]    a [experts, *in, r]   (expert-major)
                     lora_B [out, r * experts]   b [experts, r, *out]  (rank-major)
    magnitudes       [out], Conv [1, out, 1, ...]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np

from lora_jax._weights.axes import role_axes, role_shape
from lora_jax._weights.ranges import Range
from lora_jax.io._torch import Kind, Place, channels_first

# What PEFT calls the tensors: what follows the name of the module that they belong to.
PREFIX = "base_model.model."
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
BIAS = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"
ROWS = "token_adapter.trainable_tokens_delta"

PARAMETER_ORDER = ("gate_up_proj", "down_proj")  # in which experts register their parameters

TIED = (
    "peft.{verb}: the table {path!r} is an output head as well, and in PEFT an adapter or a new "
    "table is of the lookups alone. Merge there, or adapt other weights"
)


@dataclass(frozen=True)
class Piece:
    """The factors of a module, or of a part of it, as NumPy has them.

    Attributes:
        key: the name of the factors, for messages.
        a: ``[*batch, *in, rank]``.
        b: ``[*batch, rank, *out]``.
        scale: a float32 number.
        magnitude: ``[*out]`` or None.
        ranges: the part of the module's weight, in our axes.
    """

    key: str
    a: np.ndarray
    b: np.ndarray
    scale: np.float32
    magnitude: np.ndarray | None = None
    ranges: tuple[Range, ...] = ()

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        return self.a.shape[-1]


class Part(NamedTuple):
    """The factors of one module and where they are: a leaf, or a part of one.

    Attributes:
        place: the module's.
        letters: the layout of its weight here.
        kind: the module's.
        piece: the factors.
    """

    place: Place
    letters: str
    kind: Kind
    piece: Piece


def joined(pieces: Sequence[Piece], letters: str, shape: Sequence[int], norm: np.ndarray) -> Piece:
    """Join parts of one weight into factors of all of it, whose rank is the sum of theirs.

    The columns of ``a`` stand beside each other, and ``b`` is zero where a part is not.

    Args:
        pieces: disjoint parts.
        letters: the layout of the weight.
        shape: the shape of the weight.
        norm: the norms of the weight's columns, ``[*out]``: the magnitudes where no part is.

    Raises:
        ValueError: a part of the inputs has magnitudes.
    """
    first = pieces[0]
    if len(pieces) == 1 and not first.ranges:
        return first
    scale = common_scale(pieces)
    padded = [_padded(piece, letters, shape) for piece in pieces]
    a = np.concatenate([piece.a for piece in padded], -1)
    b = np.concatenate(
        [piece.b * ratio(piece.scale, scale) for piece in padded], letters.count("b")
    )
    magnitude = None
    if any(piece.magnitude is not None for piece in pieces):
        magnitude = norm.copy()
        for piece in pieces:
            if any(letters[r.axis] != "o" for r in piece.ranges):
                raise ValueError(
                    f"{piece.key!r} has DoRA magnitudes and is a part of its inputs: PEFT has one "
                    "magnitude a column of the whole weight"
                )
            if piece.magnitude is not None:
                magnitude[_index(piece.ranges, letters, "o")] = piece.magnitude
    return Piece(first.key, a, b, scale, magnitude)


def common_scale(pieces: Sequence[Piece]) -> np.float32:
    """Choose a scale that the others can be a multiple of."""
    return next((piece.scale for piece in pieces if piece.scale), pieces[0].scale)


def ratio(scale: np.float32, common: np.float32) -> np.float32:
    """Return what factors are multiplied by, so that the common scale does for them."""
    return np.float32(1) if scale == common else scale / common


def _index(ranges: Sequence[Range], letters: str, role: str) -> tuple[slice, ...]:
    bounds = {r.axis: slice(r.start, r.stop) for r in ranges}
    return tuple(bounds.get(axis, slice(None)) for axis in role_axes(letters, role))


def _padded(piece: Piece, letters: str, shape: Sequence[int]) -> Piece:
    """Pad factors of a part with zeros to the full axes of the weight."""
    batch, inputs, outputs = (role_shape(letters, shape, role) for role in "bio")
    index = {role: _index(piece.ranges, letters, role) for role in "bio"}
    a = np.zeros([*batch, *inputs, piece.rank], piece.a.dtype)
    b = np.zeros([*batch, piece.rank, *outputs], piece.b.dtype)
    a[(*index["b"], *index["i"])] = piece.a
    b[(*index["b"], slice(None), *index["o"])] = piece.b
    return replace(piece, a=a, b=b, ranges=())


def to_peft(piece: Piece, letters: str, kind: Kind) -> dict[str, np.ndarray]:
    """Write the tensors of a module, by what follows its name."""
    a, b, rank = piece.a, piece.b, piece.rank
    if kind == "Parameter":
        experts = len(a)
        a = np.moveaxis(a.reshape(experts, -1, rank), -1, 1).reshape(experts * rank, -1)
        b = b.reshape(experts, rank, -1).transpose(2, 1, 0).reshape(-1, rank * experts)
    elif kind == "Conv":
        order = _order_of_a(letters)
        a = a.transpose([len(order), *order])
        b = b.T.reshape(b.shape[1], rank, *[1] * (len(order) - 1))
    else:
        a, b = a.reshape(-1, rank).T, b.reshape(rank, -1).T
    names = EMBEDDING if kind == "Embedding" else LINEAR
    tensors: dict[str, np.ndarray] = dict(zip(names, (a, b), strict=True))
    if piece.magnitude is not None:
        window = letters.count("i") - 1
        flat = piece.magnitude.reshape(-1)
        tensors[MAGNITUDE] = flat.reshape(1, -1, *[1] * window) if kind == "Conv" else flat
    return tensors


def from_peft(
    key: str,
    a: np.ndarray,
    b: np.ndarray,
    magnitude: np.ndarray | None,
    scale: np.float32,
    shape: Sequence[int],
    letters: str,
    kind: Kind,
) -> Piece:
    """Read the tensors of a module as factors of a weight of ours with this shape and layout.

    Raises:
        ValueError: their shapes are not those of such a module.
    """
    batch, inputs, outs = (role_shape(letters, shape, role) for role in "bio")
    outputs, experts = prod(outs), prod(batch)
    rank = a.shape[0] // experts if a.ndim else 0
    order = _order_of_a(letters)
    if kind == "Conv":
        window = [inputs[k] for k in order]
        expected = (rank, *window), (outputs, rank, *[1] * (len(order) - 1))
    else:
        expected = (rank * experts, prod(inputs)), (outputs, rank * experts)
    if not rank or (a.shape, b.shape) != expected:
        raise ValueError(
            f"{key!r}: lora_A has shape {a.shape} and lora_B {b.shape}, and a {kind} for the "
            f"weight of shape {tuple(shape)} (layout {letters!r}) has {expected[0]} and "
            f"{expected[1]}: it is another model's, or of a convolution in groups, which has no "
            "such factors here"
        )
    if kind == "Parameter":
        a = np.moveaxis(a.reshape(experts, rank, -1), 1, -1)
        b = b.reshape(-1, rank, experts).transpose(2, 1, 0)
    elif kind == "Conv":
        back = np.argsort(order)
        a = a.transpose([k + 1 for k in back] + [0])
        b = b.reshape(outputs, rank).T
    else:
        a, b = a.T, b.T
    a = a.reshape([*batch, *inputs, rank])
    b = b.reshape([*batch, rank, *outs])
    if magnitude is not None:
        if magnitude.size != outputs or outputs not in (*magnitude.shape, 1):
            raise ValueError(
                f"{key!r}: {MAGNITUDE} has shape {magnitude.shape}, expected one number for each "
                f"of the {outputs} outputs"
            )
        magnitude = magnitude.reshape(outs)
    return Piece(key, a, b, scale, magnitude)


def _order_of_a(letters: str) -> list[int]:
    """Order the input axes of a convolution, among themselves, channels first."""
    inputs = role_axes(letters, "i")
    return [inputs.index(k) for k in channels_first(letters)]


def wrapped(name: str, parameters: set[str], order: tuple[str, ...]) -> str:
    """Name the wrapper of a parameter, which is inside those of the parameters after it.

    Raises:
        ValueError: ``order`` does not contain all parameters of the module that are adapted.
    """
    module, _, own = name.rpartition(".")
    beside = [
        other.rpartition(".")[2] for other in parameters if other.rpartition(".")[0] == module
    ]
    if len(beside) > 1 and (unknown := [x for x in beside if x not in order]):
        raise ValueError(
            f"{sorted(beside)} of the module {module!r} are adapted, and PEFT nests them "
            f"in the order in which the module registers them, which for {unknown} is not known: "
            "say parameter_order=(..., ...)"
        )
    later = [x for x in beside if x != own and order.index(x) > order.index(own)]
    return module + ".base_layer" * len(later)
