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
                     or, of a matrix, as Linear, whatever is read
    magnitudes       [out], Conv [1, out, 1, ...]
"""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import numpy as np

from lora_jax._weights.axes import role_axes, role_shape
from lora_jax._weights.ranges import Range
from lora_jax.io._kinds import Kind, channels_first
from lora_jax.io._places import Place

# What PEFT calls the tensors: what follows the name of the module that they belong to.
PREFIX = "base_model.model."
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
BIAS = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"
ROWS = "token_adapter.trainable_tokens_delta"

PARAMETER_ORDER = ("gate_up_proj", "down_proj")  # in which experts register their parameters

TIED = (
    "peft.{verb}: the table {path!r} is an output head as well, or may be: tied. In PEFT an "
    "adapter or a new table is of the lookups alone. {way}; if it is no head, pass "
    "layout=lora_jax.layout_of(...), which tells"
)


@dataclass(frozen=True)
class Part:
    """The factors of a module, or of a part of its weight, as NumPy has them.

    Attributes:
        place: the place of the module's weight.
        letters: the layout of that here.
        kind: the kind of the module.
        key: the name of the factors, for messages.
        a: ``[*batch, *in, rank]``.
        b: ``[*batch, rank, *out]``.
        scale: a float32 number.
        magnitude: ``[*out]`` or None.
        ranges: the part of the weight, in our axes.
    """

    place: Place
    letters: str
    kind: Kind
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


def to_peft(part: Part) -> dict[str, np.ndarray]:
    """Write the tensors of a module, by what follows its name."""
    a, b, rank, kind = part.a, part.b, part.rank, part.kind
    if kind == "Parameter" and part.letters == "io":  # PEFT takes a matrix as [out, in]
        a, b = b.T, a.T
    if kind == "Parameter" and len(part.letters) > 2:
        experts = len(a)
        a = np.moveaxis(a.reshape(experts, -1, rank), -1, 1).reshape(experts * rank, -1)
        b = b.reshape(experts, rank, -1).transpose(2, 1, 0).reshape(-1, rank * experts)
    elif kind == "Conv":
        order = _order_of_a(part.letters)
        a = a.transpose([len(order), *order])
        b = b.T.reshape(b.shape[1], rank, *[1] * (len(order) - 1))
    else:
        a, b = a.reshape(-1, rank).T, b.reshape(rank, -1).T
    names = EMBEDDING if kind == "Embedding" else LINEAR
    tensors: dict[str, np.ndarray] = dict(zip(names, (a, b), strict=True))
    if part.magnitude is not None:
        window = part.letters.count("i") - 1
        flat = part.magnitude.reshape(-1)
        tensors[MAGNITUDE] = flat.reshape(1, -1, *[1] * window) if kind == "Conv" else flat
    return tensors


def from_peft(
    place: Place,
    letters: str,
    kind: Kind,
    a: np.ndarray,
    b: np.ndarray,
    scale: np.float32,
    magnitude: np.ndarray | None,
) -> Part:
    """Read the tensors of a module as factors of a weight of ours."""
    key, shape = place.module, place.shape
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
            f"weight of shape {shape} (layout {letters!r}) has {expected[0]} and "
            f"{expected[1]}: it is another model's, or of a convolution in groups, which has no "
            "such factors here"
        )
    if batch:
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
    return Part(place, letters, kind, key, a, b, scale, magnitude)


def _order_of_a(letters: str) -> list[int]:
    """Order the input axes of a convolution, among themselves, channels first."""
    inputs = role_axes(letters, "i")
    return [inputs.index(k) for k in channels_first(letters)]


def wrappers(names: Collection[str], order: tuple[str, ...]) -> dict[str, str]:
    """Name the wrapper of every parameter: it is inside those of the later ones of its module."""
    found = {}
    for name in names:
        module, _, own = name.rpartition(".")
        beside = sorted(x.rpartition(".")[2] for x in names if x.rpartition(".")[0] == module)
        if len(beside) > 1 and (unknown := [x for x in beside if x not in order]):
            raise ValueError(
                f"{beside} of the module {module!r} are adapted, and PEFT nests them in the order "
                f"in which the module registers them, which for {unknown} is not known: pass "
                "parameter_order=(..., ...)"
            )
        later = [x for x in beside if x != own and order.index(x) > order.index(own)]
        found[name] = module + ".base_layer" * len(later)
    return found
