"""The kinds of modules in PyTorch, and the axes of their weights.

Modules do not keep their weights as Flax does; each kind has axes of its own::

    Linear     [out, in]            Conv        [out, in, *window]
    Conv1D     [in, out]            Embedding   [rows, out]
    Parameter  [experts, ...] or a matrix, a parameter of a module rather than the weight of one
"""

from math import prod
from typing import Literal

import numpy as np

from lora_jax._weights.axes import role_axes, role_shape

Kind = Literal["Linear", "Conv1D", "Conv", "Embedding", "Parameter"]


def to_torch(x: np.ndarray, letters: str, kind: Kind) -> np.ndarray:
    """Put a weight into the axes of its module; a vector stays one, a parameter has ours."""
    if not letters:
        return x.reshape(-1)
    if kind == "Parameter":
        return x
    if kind == "Conv":
        return x.transpose([letters.index("o"), *channels_first(letters)])
    sizes = [prod(role_shape(letters, x.shape, role)) for role in "io"]
    matrix = x.transpose(_inputs_first(letters)).reshape(sizes)  # [in, out]
    return matrix.T if kind == "Linear" else matrix


def from_torch(x: np.ndarray, shape: tuple[int, ...], letters: str, kind: Kind) -> np.ndarray:
    """Put a weight of a module into our axes, which have this shape: undo :func:`to_torch`."""
    if not letters or kind == "Parameter":
        return x.reshape(shape)
    if kind == "Conv":
        order = [letters.index("o"), *channels_first(letters)]
    else:
        order = _inputs_first(letters)
        x = x.T if kind == "Linear" else x
    return x.reshape([shape[k] for k in order]).transpose(np.argsort(order))


def torch_shape(shape: tuple[int, ...], letters: str, kind: Kind) -> tuple[int, ...]:
    """Return the shape of a weight of ours in the axes of its module."""
    return to_torch(np.broadcast_to(np.zeros(()), shape), letters, kind).shape


def _inputs_first(letters: str) -> list[int]:
    return [*role_axes(letters, "i"), *role_axes(letters, "o")]


def channels_first(letters: str) -> list[int]:
    """Order the input axes, channels before the window: Flax has them last, PyTorch first."""
    inputs = list(role_axes(letters, "i"))
    return inputs if letters[0] == "o" else [inputs[-1], *inputs[:-1]]
