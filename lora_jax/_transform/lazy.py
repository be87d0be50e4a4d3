"""``Lazy``: a weight that is built from other arrays where it is used, and never kept.

A quantized leaf enters the function as one. Equations that move it are put off. An equation that
reads it builds, moves and reads it inside one ``jax.checkpoint``: the quantized arrays are all that
a use leaves for the backward pass, which builds the weight again.
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

# The primitives that make a weight of a weight: put off until it is read.
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
    """The array ``make(arrays)``, not built yet.

    Attributes:
        arrays: the arrays it is built from.
        make: builds it.
        shape: its shape.
        dtype: its dtype.
    """

    arrays: Any
    make: Callable[[Any], jax.Array]
    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, quantized: Any) -> "Lazy":
        """Return the array that a quantized leaf stands for."""
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
        """Its shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    def front(self) -> Any:
        """Return arrays with one entry per entry of the first axis; None if there are none."""
        if self.make is not _frozen:
            return None
        arrays, tree = jax.tree.flatten(self.arrays)
        if any(x.shape[:1] not in (self.shape[:1], (1,)) for x in arrays):
            return None
        arrays = [jnp.broadcast_to(x, (*self.shape[:1], *x.shape[1:])) for x in arrays]
        return jax.tree.unflatten(tree, arrays)


def _frozen(quantized: Any) -> jax.Array:
    """Build the array; older JAX would take gradients of all that enters a checkpoint."""
    return dequantize_array(jax.tree.map(lax.stop_gradient, quantized))


def force(w: Any) -> Any:
    """Build the array, if it is not one."""
    return w.make(w.arrays) if isinstance(w, Lazy) else w


def moved(w: Any, move: Callable[[jax.Array], jax.Array]) -> Any:
    """Return ``move(w)``, put off if ``w`` is."""
    if not isinstance(w, Lazy):
        return move(w)
    out = jax.eval_shape(move, w.aval)
    return Lazy(w.arrays, lambda arrays: move(w.make(arrays)), out.shape, out.dtype)


def bind(eqn: Any, values: list[Any]) -> list[Any]:
    """Evaluate an equation whose operands may be :class:`Lazy`."""
    if not any(isinstance(v, Lazy) for v in values):
        return _jax.bind(eqn, values)

    def run(operands):
        operands = lax.optimization_barrier(operands)  # not built before the others are
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
