"""Infer from names: embeddings, heads, biases, and axes by Flax's conventions."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax._weights.axes import is_array, not_trainable
from lora_jax._weights.layouts import Layouts

# The names under which Flax, and most published models, keep attention projections.
QUERY_VALUE = frozenset(
    "query value q_proj v_proj q v wq wv to_q to_v q_lin v_lin query_proj value_proj".split()
)

READS = QUERY_VALUE | frozenset("key k_proj k wk to_k k_lin key_proj".split())
WRITES = frozenset("out o_proj out_proj o wo to_out out_lin".split())
VECTORS = frozenset("bias scale b beta gamma offset mean var".split())
_EMBEDDING = re.compile(r"(.*_)?(embed|embedding|embeddings|embedder|emb|wte|wpe)")

_HEAD = frozenset(
    "lm_head head classifier score logits logits_dense output_layer unembed unembedding "
    "embed_out".split()
)


def is_embedding(path: str) -> bool:
    """Return whether the path names a lookup table; a ``kernel`` is dense in any module."""
    names = path.lower().split("/")[-2:]
    return names[-1] != "kernel" and any(_EMBEDDING.fullmatch(name) for name in names)


def is_head(path: str) -> bool:
    """Return whether the path names an output head by one of its usual names."""
    return any(name in _HEAD for name in path.lower().split("/"))


def why_not(path: str, leaf: Any) -> str | None:
    """Return why this leaf cannot take a LoRA; None if it can."""
    if reason := not_trainable(leaf):
        return reason
    if path.split("/")[-1] in ("lora_a", "lora_b"):
        return "a factor of another LoRA, such as nnx.LoRALinear's"
    if path.split("/")[-1] in VECTORS:
        return "a bias, a norm or a statistic: train it fully, with full="
    if len(leaf.shape) < 2:
        return f"{len(leaf.shape)}-D: a LoRA needs an input and an output axis"
    if 0 in leaf.shape:
        return f"empty, shape {tuple(leaf.shape)}"
    return None


def _stacked(path: str, shape: Sequence[int], leaves: Mapping[str, Any]) -> bool | None:
    """Return whether ``nn.scan`` put a layer axis in front; None if the tree cannot tell.

    Biases and norm scales are vectors: if they have two axes, the first one is the layer axis.
    The innermost module with a bias or norm decides; without one, a kernel of two axes does.
    Attention biases ``[heads, head_dim]`` decide nothing, and neither does the root of the tree,
    where scanned modules and others are siblings.
    """
    parts = path.split("/")
    own: Any = leaves.get("/".join([*parts[:-1], "bias"]))
    if is_array(own) and READS.intersection(parts):  # [layers, *out] or [*out] of [.., in, *out]
        in_stack, alone = (*shape[:1], *shape[2:]), tuple(shape[1:])
        if tuple(own.shape) in (in_stack, alone) and in_stack != alone:
            return tuple(own.shape) == in_stack
    for depth in range(len(parts) - 1, 0 if len(parts) > 2 else -1, -1):
        prefix = "/".join([*parts[:depth], ""])
        near = {p: x.shape for p, x in leaves.items() if p.startswith(prefix) and is_array(x)}
        vectors = [
            s
            for p, s in near.items()
            if p.split("/")[-1] in VECTORS and len(s) in (1, 2) and not READS & set(p.split("/"))
        ]
        if any(len(s) == 1 for s in vectors):
            return False
        if vectors and all(s and s[0] == shape[0] for s in near.values()):
            return True  # every leaf of a stack has the layers in front
        if any(len(s) == 2 and p.endswith("/kernel") for p, s in near.items()):
            return False
    return None


def conventional(path: str, leaf: Any, leaves: Mapping[str, Any]) -> str:
    """Infer the layout of a leaf from Flax's conventions for names and axes.

    Two axes are ``[in, out]``. Three axes under ``query``, ``key``, ``value`` (``q_proj``, ...)
    are ``[in, heads, head_dim]``, under ``out`` (``o_proj``, ...) ``[heads, head_dim, out]``. A
    layer axis stacked in front by ``nn.scan`` is inferred from the biases and norms beside it.

    Raises:
        ValueError: the conventions are ambiguous; the message names the ``layout=`` to pass.
    """
    shape, names = tuple(leaf.shape), set(path.split("/"))
    if len(shape) == 2:
        return "io"
    stacked = _stacked(path, shape, leaves)
    kernel_axes = len(shape) - bool(stacked)
    attention = "ioo" if names & READS else "iio" if names & WRITES else None
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
        f"{choices}; or ask the function: layout=lora_jax.layout_of(fn, params, *args); or "
        f"leave it out: exclude={path!r}"
    )


def is_bias(path: str) -> bool:
    """Return whether the path names a bias."""
    return path.split("/")[-1] in ("bias", "b", "beta")


def is_table(path: str, layout: Mapping[str, str]) -> bool:
    """Return whether a weight is looked up: by its use if that is known, else by its name."""
    if isinstance(layout, Layouts):
        return layout.weights[path].kind == "embedding"
    return is_embedding(path)
