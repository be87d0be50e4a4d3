"""Read layouts: which axes of a weight are inputs and which are outputs.

A layout is a string with one letter per axis of the weight ``W``:

* ``i``: an input axis, contracted with the activations. Only ``a`` has it.
* ``o``: an output axis. Only ``b`` has it.
* ``b``: a batch axis: stacked layers, experts. Both have it, so each entry has its own factors.

``"io"`` is a dense kernel, ``"oi"`` one stored transposed, ``"ioo"`` an attention query kernel
``[embed, heads, head_dim]``, ``"bio"`` dense kernels stacked by ``nn.scan``.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp


def check_layout(layout: str, name: str, ndim: int | None = None) -> str:
    """Return ``layout``, or raise unless it has one letter per axis, inputs and outputs."""
    if not isinstance(layout, str) or not re.fullmatch("[bio]+", layout):
        raise ValueError(
            f"layout={layout!r} for {name}: expected one letter per axis, 'b' (batch), 'i' (input) "
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
    """Return the axes of the weight with this role: ``role_axes("bio", "i") == (1,)``."""
    return tuple(i for i, letter in enumerate(layout) if letter == role)


def role_shape(layout: str, shape: Sequence[int], role: str) -> tuple[int, ...]:
    """Return the sizes of the axes with this role."""
    return tuple(shape[i] for i in role_axes(layout, role))


def roles_in_order(layout: str) -> tuple[int, ...]:
    """Return the axes by role: batch, inputs, outputs."""
    return tuple(i for role in "bio" for i in role_axes(layout, role))


def matrix_of(x: Any, layout: str) -> Any:
    """Reshape an array with the weight's axes to ``[*batch, in, out]``."""
    batch, inputs, outputs = (role_shape(layout, x.shape, role) for role in "bio")
    order = roles_in_order(layout)
    return x.transpose(order).reshape(*batch, math.prod(inputs), math.prod(outputs))


def factor_shapes(
    layout: str, shape: Sequence[int], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of ``a`` and ``b``: ``[*batch, *in, rank]``, ``[*batch, rank, *out]``.

    >>> factor_shapes("ioo", (64, 4, 16), 8)
    ((64, 8), (8, 4, 16))
    """
    batch, inputs, outputs = (role_shape(layout, shape, role) for role in "bio")
    return (*batch, *inputs, rank), (*batch, rank, *outputs)


def max_rank(layout: str, shape: Sequence[int]) -> int:
    """Return ``min(in, out)``: at this rank a LoRA can express any update."""
    return min(math.prod(role_shape(layout, shape, role)) for role in "io")


def is_array(leaf: Any) -> bool:
    """Return whether a leaf has a shape and a dtype: array, tracer or ShapeDtypeStruct."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def not_trainable(leaf: Any) -> str | None:
    """Return why no gradient step can move this leaf; None if one can."""
    if not is_array(leaf):
        return f"not an array but {type(leaf).__name__}"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"dtype {leaf.dtype}, not a real floating type"
    return None
