"""Show a weight to initializers as a matrix: ``Target``, and the type of an initializer."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lora_jax._weights.axes import matrix_of, role_shape, roles_in_order
from lora_jax._weights.quantized import is_quantized
from lora_jax._weights.ranges import Part


@dataclasses.dataclass(frozen=True)
class Target:
    """A leaf, or a part of one, that gets factors, as an initializer sees it.

    Attributes:
        path: the key of its factors, such as ``layers_0/attn/query/kernel``.
        leaf: the array that holds it.
        part: the path of that array, and the ranges of the weight in it.
        layout: one letter per axis.
        rank: the rank of the factors.
        scale: the number that the product of the factors is multiplied by.
        fan_in: the number of inputs that make one output; 1 for a lookup.
    """

    path: str
    leaf: Any
    part: Part
    layout: str
    rank: int = 1
    scale: float = 1.0
    fan_in: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, in its own axes."""
        return self.part.shape(self.leaf.shape)

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the batch axes; each entry is a separate matrix."""
        return role_shape(self.layout, self.shape, "b")

    @property
    def inputs(self) -> int:
        """The number of inputs: the product of the input axes' sizes."""
        return math.prod(role_shape(self.layout, self.shape, "i"))

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return math.prod(role_shape(self.layout, self.shape, "o"))

    def matrix(self) -> jax.Array:
        """Return the weight as float32 ``[*batch, in, out]``.

        Raises:
            ValueError: it is quantized.
        """
        if is_quantized(self.leaf):
            raise ValueError(
                f"{self.path!r} is quantized, and this initializer takes its factors out of the "
                "weight: quantize afterwards, lora_jax.quant.quantize(lora_params.base, ...); or "
                "use init=lora_jax.init.loftq(...) on the plain weights"
            )
        return self.as_matrix(self.leaf[self.index])

    def as_matrix(self, x: jax.Array) -> jax.Array:
        """Reshape an array with the weight's axes to float32 ``[*batch, in, out]``."""
        return matrix_of(jnp.asarray(x, jnp.float32), self.layout)

    def leaf_with(self, matrix: jax.Array) -> jax.Array:
        """Return the entire leaf with this weight replaced by ``matrix[*batch, in, out]``."""
        order = roles_in_order(self.layout)
        back = sorted(range(len(self.shape)), key=lambda i: order[i])
        weight = matrix.reshape([self.shape[i] for i in order]).transpose(back)
        weight = weight.astype(self.leaf.dtype)
        return jnp.asarray(self.leaf).at[self.index].set(weight) if self.part.ranges else weight

    @property
    def index(self) -> tuple[slice, ...]:
        """The index that selects the weight from the leaf."""
        return self.part.slices(len(self.layout))


# (key, target) -> a [*batch, in, rank], b [*batch, rank, out], and, if scale * a b is not zero,
# the remainder of the weight, [*batch, in, out].
Initializer: TypeAlias = Callable[[jax.Array, Target], tuple[jax.Array, ...]]


def fold_in_path(key: jax.Array, path: str) -> jax.Array:
    """Derive a PRNG key from a path: a different one for every path, equal in every process.

    ``hash()`` would differ between processes; a SHA-256 does not.
    """
    digest = hashlib.sha256(path.encode()).digest()
    for word in (digest[:4], digest[4:8]):
        key = jax.random.fold_in(key, int.from_bytes(word, "big"))
    return key
