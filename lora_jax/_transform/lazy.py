"""``Lazy``: a weight that is made from others where it is used, and never kept.

A quantized leaf enters the function as one. What moves it is put off; what reads it makes it, moves
it and reads it inside one ``jax.checkpoint``, so that of a use nothing is left for the backward
pass but the quantized arrays, and the backward pass makes the weight again.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _jax
from lora_jax._weights.quantized import dequantize_array

# What gives a weight again: put off until it is read.
_MOVES = frozenset(
    "neg mul div add sub add_any transpose convert_element_type reduce_precision copy copy_p "
    "sharding_constraint name reshard stop_gradient reshape squeeze broadcast_in_dim slice "
    "dynamic_slice concatenate stack pad rev tile gather".split()
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays",),
    meta_fields=("make", "shape", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """An array that ``make(arrays)`` makes.

    Attributes:
        arrays: what it is made of.
        make: how.
        shape: of the array.
        dtype: of the array.
    """

    arrays: Any
    make: Callable[[Any], jax.Array]
    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, quantized: Any) -> "Lazy":
        """A quantized leaf, as the array it stands for."""
        return cls(quantized, _frozen, tuple(quantized.shape), jnp.dtype(quantized.dtype))

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def aval(self) -> jax.ShapeDtypeStruct:
        """What it is, without being it."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def front(self) -> Any:
        """The arrays with one entry of the first axis for each step; None if they have no such."""
        if self.make is not _frozen:
            return None
        arrays, tree = jax.tree.flatten(self.arrays)
        if any(x.shape[:1] not in (self.shape[:1], (1,)) for x in arrays):
            return None
        arrays = [jnp.broadcast_to(x, (*self.shape[:1], *x.shape[1:])) for x in arrays]
        return jax.tree.unflatten(tree, arrays)


def _frozen(quantized: Any) -> jax.Array:
    """The array; inside a checkpoint older JAX would take gradients of all that enters it."""
    return dequantize_array(jax.tree.map(lax.stop_gradient, quantized))


def force(w: Any) -> Any:
    """The array itself."""
    return w.make(w.arrays) if isinstance(w, Lazy) else w


def moved(w: Any, move: Callable[[jax.Array], jax.Array]) -> Any:
    """``move(w)``, put off if ``w`` is."""
    if not isinstance(w, Lazy):
        return move(w)
    out = jax.eval_shape(move, w.aval)
    return Lazy(w.arrays, lambda arrays: move(w.make(arrays)), out.shape, out.dtype)


def bind(eqn: Any, values: list[Any]) -> list[Any]:
    """Evaluate an equation of which some operands may be :class:`Lazy`."""
    if not any(isinstance(v, Lazy) for v in values):
        return _jax.bind(eqn, values)

    def run(operands):
        operands = lax.optimization_barrier(operands)  # not made before the others are there
        return _jax.bind(eqn, [force(v) for v in operands])

    if eqn.primitive.name not in _MOVES:
        return jax.checkpoint(run)(values)
    (out,) = (var.aval for var in eqn.outvars)
    makers, arrays = zip(
        *((v.make, v.arrays) if isinstance(v, Lazy) else (None, v) for v in values), strict=True
    )

    def make(arrays):
        pairs = zip(makers, arrays, strict=True)
        return _jax.bind(eqn, [x if f is None else f(x) for f, x in pairs])[0]

    return [Lazy(arrays, make, tuple(out.shape), out.dtype)]
