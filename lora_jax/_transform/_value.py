"""``LoraArray``: what a weight is while ``lora(fn)`` runs: ``W`` and its low-rank deltas, apart.

Every axis of ``W`` has a label, its position. A delta's factors are arrays whose axes are
labelled: an axis of ``a`` or ``b`` belongs to the axis of ``W`` with its label, or is the rank
axis, ``R``. So a transpose of ``W`` renames labels and moves no data, and a batch axis is simply a
label that both factors have.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._layout import role_axes
from lora_jax._params import Factors, wide

R = -1
Labels = tuple[Any, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("a", "b", "scale"),
    meta_fields=("a_labels", "b_labels"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """``scale * sum_R a b``, with the labels of ``a``'s and ``b``'s axes."""

    a: jax.Array
    b: jax.Array
    scale: jax.Array
    a_labels: Labels
    b_labels: Labels

    @classmethod
    def of(cls, factors: Factors) -> "Delta":
        """The delta of a weight as it enters the function."""
        batch, inputs, outputs = (role_axes(factors.layout, role) for role in "bio")
        scale = lax.stop_gradient(jnp.asarray(factors.scale, jnp.float32))
        return cls(factors.a, factors.b, scale, (*batch, *inputs, R), (*batch, R, *outputs))

    def relabel(self, new: Mapping[int, Any], rank: Any = R) -> "Delta":
        """The delta under other labels, ``new[old]``; its rank axis is labelled ``rank``."""
        new = {**new, R: rank}
        a_labels = tuple(new[label] for label in self.a_labels)
        b_labels = tuple(new[label] for label in self.b_labels)
        return dataclasses.replace(self, a_labels=a_labels, b_labels=b_labels)

    def map(self, f: Callable[[jax.Array, Labels], tuple[jax.Array, Labels]]) -> "Delta":
        """The delta with each factor and its labels replaced by ``f`` of them."""
        a, a_labels = f(self.a, self.a_labels)
        b, b_labels = f(self.b, self.b_labels)
        return Delta(a, b, self.scale, a_labels, b_labels)

    def dense(self, ndim: int, dtype: Any) -> jax.Array:
        """``scale * a b`` as an array with ``W``'s axes: what this library exists to avoid."""
        a, b = self.a.astype(dtype), self.b.astype(dtype)
        out = tuple(range(ndim))
        product = contract(
            a, self.a_labels, b, self.b_labels, out, precision=lax.Precision.HIGHEST, dtype=dtype
        )
        return product * self.scale.astype(dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("w", "deltas"),
    meta_fields=("path", "owner", "origins"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class LoraArray:
    """A weight ``w`` with its deltas, at some point of its way through the function.

    Attributes:
        w: the frozen part.
        deltas: what is added to it.
        path: the leaf it came from.
        owner: which of the LoraParams among the arguments that leaf belongs to.
        origins: for each axis, the axes of that leaf that it is made of.
    """

    w: jax.Array
    deltas: tuple[Delta, ...]
    path: str
    owner: int
    origins: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.w.shape

    def dense(self) -> jax.Array:
        """``W`` plus its deltas, summed in at least float32, rounded once to ``W``'s dtype."""
        dtype = wide(self.w.dtype)
        total = self.w.astype(dtype)
        for delta in self.deltas:
            total += delta.dense(self.w.ndim, dtype)
        return total.astype(self.w.dtype)


def contract(
    x: jax.Array,
    x_labels: Sequence[Any],
    y: jax.Array,
    y_labels: Sequence[Any],
    out: Sequence[Any],
    *,
    precision: Any,
    dtype: Any,
) -> jax.Array:
    """An einsum over labels as one ``dot_general``: sums over every label not in ``out``.

    A label of ``out`` that neither operand has becomes an axis of size 1.
    """
    x, x_labels = _sum_alone(x, x_labels, (*y_labels, *out))
    y, y_labels = _sum_alone(y, y_labels, (*x_labels, *out))
    shared = [lab for lab in x_labels if lab in y_labels]
    batch = [lab for lab in shared if lab in out]
    summed = [lab for lab in shared if lab not in out]
    contracting = [x_labels.index(lab) for lab in summed], [y_labels.index(lab) for lab in summed]
    batching = [x_labels.index(lab) for lab in batch], [y_labels.index(lab) for lab in batch]
    result = lax.dot_general(
        x, y, (contracting, batching), precision=precision, preferred_element_type=dtype
    )
    labels = batch + [lab for lab in (*x_labels, *y_labels) if lab not in shared]
    missing = [i for i, lab in enumerate(out) if lab not in labels]
    order = [labels.index(lab) for lab in out if lab in labels]
    if order != sorted(order):
        result = lax.transpose(result, order)
    return lax.expand_dims(result, missing) if missing else result


def _sum_alone(x: jax.Array, labels: Sequence[Any], wanted: Sequence[Any]):
    """Sum over the axes whose label nobody wants."""
    alone = [i for i, lab in enumerate(labels) if lab not in wanted]
    return (x.sum(alone), [lab for lab in labels if lab in wanted]) if alone else (x, labels)
