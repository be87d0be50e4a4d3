"""Which axes of a weight are read and which are written.

A layout is a string with one letter an axis of the weight ``W``:

* ``i``: an input axis, contracted with the activations. Only ``a`` has it.
* ``o``: an output axis. Only ``b`` has it.
* ``b``: a batch axis: stacked layers, experts. Both have it, so each entry has its own factors.

``"io"`` is a dense kernel, ``"oi"`` one stored transposed, ``"ioo"`` an attention query kernel
``[embed, heads, head_dim]``, ``"bio"`` dense kernels stacked by ``nn.scan``.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

# The names under which Flax, and most published models, keep attention projections.
QUERY_VALUE = frozenset(
    "query value q_proj v_proj q v wq wv to_q to_v q_lin v_lin query_proj value_proj".split()
)
_READS = QUERY_VALUE | frozenset("key k_proj k wk to_k k_lin key_proj".split())
_WRITES = frozenset("out o_proj out_proj o wo to_out out_lin".split())

_VECTORS = frozenset("bias scale b beta gamma offset mean var".split())
_EMBEDDING = re.compile(r"(.*_)?(embed|embedding|embeddings|embedder|emb|wte|wpe)")
_HEAD = frozenset(
    "lm_head head classifier score logits logits_dense output_layer unembed unembedding".split()
)


def check_layout(layout: str, name: str, ndim: int | None = None) -> str:
    """Return ``layout``, or raise if it is not one letter an axis with inputs and outputs."""
    if not isinstance(layout, str) or not re.fullmatch("[bio]+", layout):
        raise ValueError(
            f"layout={layout!r} for {name}: expected one letter an axis, 'b' (batch), 'i' (input) "
            "or 'o' (output), such as 'io' for a dense kernel [in, out]"
        )
    if "i" not in layout or "o" not in layout:
        raise ValueError(
            f"layout={layout!r} for {name}: a LoRA needs at least one 'i' and one 'o' axis"
        )
    if ndim is not None and len(layout) != ndim:
        raise ValueError(
            f"layout={layout!r} for {name}: {len(layout)} letters for a weight of {ndim} axes"
        )
    return layout


def role_axes(layout: str, role: str) -> tuple[int, ...]:
    """The axes of the weight with this role: ``role_axes("bio", "i") == (1,)``."""
    return tuple(i for i, letter in enumerate(layout) if letter == role)


def role_shape(layout: str, shape: Sequence[int], role: str) -> tuple[int, ...]:
    """The sizes of the axes with this role."""
    return tuple(shape[i] for i in role_axes(layout, role))


def factor_shapes(
    layout: str, shape: Sequence[int], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of ``a`` and ``b``: ``[*batch, *in, rank]`` and ``[*batch, rank, *out]``.

    >>> factor_shapes("ioo", (64, 4, 16), 8)
    ((64, 8), (8, 4, 16))
    """
    batch, inputs, outputs = (role_shape(layout, shape, role) for role in "bio")
    return (*batch, *inputs, rank), (*batch, rank, *outputs)


def max_rank(layout: str, shape: Sequence[int]) -> int:
    """``min(in, out)``: at this rank a LoRA can express any update."""
    return min(math.prod(role_shape(layout, shape, role)) for role in "io")


def is_embedding(path: str) -> bool:
    """Whether the path names a lookup table; a ``kernel`` is dense, whatever its module's name."""
    names = path.lower().split("/")[-2:]
    return names[-1] != "kernel" and any(_EMBEDDING.fullmatch(name) for name in names)


def is_head(path: str) -> bool:
    """Whether the path names an output head by one of its usual names."""
    return any(name in _HEAD for name in path.lower().split("/"))


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype: an array, a tracer, or a ShapeDtypeStruct."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def not_trainable(leaf: Any) -> str | None:
    """Why no gradient step can move this leaf; None if one can."""
    if not is_array(leaf):
        return f"not an array but {type(leaf).__name__}"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"dtype {leaf.dtype}, not a real floating type"
    return None


def why_not(path: str, leaf: Any) -> str | None:
    """Why this leaf cannot take a LoRA; None if it can."""
    if reason := not_trainable(leaf):
        return reason
    if path.split("/")[-1] in _VECTORS:
        return "a bias, a norm or a statistic: train it whole with full="
    if len(leaf.shape) < 2:
        return f"{len(leaf.shape)}-D: a LoRA needs an input and an output axis"
    if 0 in leaf.shape:
        return f"empty, shape {tuple(leaf.shape)}"
    return None


def _stacked(path: str, shape: Sequence[int], leaves: Mapping[str, Any]) -> bool | None:
    """Whether ``nn.scan`` has put a layer axis in front; None if the tree does not tell.

    Biases and norm scales are vectors by nature: where they have two axes, the first one is
    the layers'. The innermost module that holds one decides; failing that, so does a kernel of
    two axes. Attention biases ``[heads, head_dim]`` tell nothing, and nor does the root of the
    tree, where scanned modules stand beside others.
    """
    parts = path.split("/")
    for depth in range(len(parts) - 1, 0 if len(parts) > 2 else -1, -1):
        prefix = "/".join([*parts[:depth], ""])
        near = {p: x.shape for p, x in leaves.items() if p.startswith(prefix) and is_array(x)}
        vectors = [
            s
            for p, s in near.items()
            if p.split("/")[-1] in _VECTORS and len(s) in (1, 2) and not _READS & set(p.split("/"))
        ]
        if any(len(s) == 1 for s in vectors):
            return False
        if vectors and all(s and s[0] == shape[0] for s in near.values()):
            return True  # every leaf of a stack has the layers in front
        if any(len(s) == 2 and p.endswith("/kernel") for p, s in near.items()):
            return False
    return None


def conventional(path: str, leaf: Any, leaves: Mapping[str, Any]) -> str:
    """The layout of a leaf by Flax's conventions for names and axes.

    Two axes are ``[in, out]``. Three axes under ``query``, ``key``, ``value`` (``q_proj``, ...)
    are ``[in, heads, head_dim]``, under ``out`` (``o_proj``, ...) ``[heads, head_dim, out]``. A
    layer axis stacked in front by ``nn.scan`` is told from the biases and norms beside it.

    Raises:
        ValueError: the conventions do not say; the message names the ``layout=`` to pass.
    """
    shape, names = tuple(leaf.shape), set(path.split("/"))
    if len(shape) == 2:
        return "io"
    stacked = _stacked(path, shape, leaves)
    kernel_axes = len(shape) - bool(stacked)
    attention = "ioo" if names & _READS else "iio" if names & _WRITES else None
    if kernel_axes == 2:
        return "bio"
    if kernel_axes == 3 and attention and stacked is not None:
        return "b" * stacked + attention
    if len(shape) == 3:
        choices = "'bio' (stacked [layers, in, out]), 'ioo' ([in, heads, head_dim]), 'iio'"
    else:
        choices = "such as 'iiio' for a convolution, 'bioo' for stacked attention kernels"
    if attention and kernel_axes == len(attention):
        choices += f"; {attention!r} if it is an attention kernel of one layer"
    raise ValueError(
        f"{path}: the axes of its shape {shape} are ambiguous by Flax's naming conventions. Say "
        f"which are inputs, outputs and batch, one letter an axis: layout={{{path!r}: ...}} with "
        f"{choices}; or let the function say: layout=lora_jax.layout_of(fn, params, *args); or "
        f"leave it out: exclude={path!r}"
    )


@dataclass(frozen=True)
class Weight:
    """What a function does with one weight, as ``layout_of`` saw it.

    Attributes:
        shape: of the weight.
        dtype: of the weight.
        layout: its letters, one an axis; None if it cannot take a LoRA.
        kind: ``"dot"``, ``"conv"``, ``"embedding"`` or ``"ragged"``; None as ``layout``.
        uses: what reads it, and where: ``"dot_general at model.py:41 (Mlp.__call__): y = ..."``.
        why_not: why it cannot take a LoRA; None if it can.
    """

    shape: tuple[int, ...]
    dtype: Any
    layout: str | None
    kind: str | None
    uses: tuple[str, ...]
    why_not: str | None


class Layouts(Mapping[str, str]):
    """The layouts of a function's weights by path, for ``lorafy(params, layout=...)``.

    A mapping from the path of every weight that can take a LoRA to its letters. Printed, it is a
    table of all weights, with the reasons of those that cannot.

    Attributes:
        weights: :class:`Weight` by path, of every leaf.
    """

    def __init__(self, weights: Mapping[str, Weight]):
        self.weights = dict(weights)

    def __getitem__(self, path: str) -> str:
        letters = self.weights[path].layout
        if letters is None:
            raise KeyError(path)
        return letters

    def __iter__(self) -> Iterator[str]:
        return (path for path, weight in self.weights.items() if weight.layout is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        rows = [("path", "shape", "kind", "layout", "uses")]
        for path, w in self.weights.items():
            shape = "x".join(map(str, w.shape)) or "()"
            said = str(len(w.uses)) if w.why_not is None else w.why_not
            rows.append((path, shape, w.kind or "-", w.layout or "-", said))
        return table(rows)


def table(rows: Sequence[Sequence[str]], right: int = 99) -> str:
    """Rows of cells under a header, in columns; those from ``right`` on are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i >= right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
