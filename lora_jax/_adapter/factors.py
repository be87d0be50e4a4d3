"""The factors of one weight."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lora_jax._weights.axes import is_array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("a", "b", "scale", "magnitude", "norm"),
    meta_fields=("layout", "frozen", "residual"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Factors:
    """The low-rank update of one weight: ``scale * sum_r a[*batch, *in, r] b[*batch, r, *out]``.

    Attributes:
        a: ``[*batch, *in, rank]``, reads the input; random at the start.
        b: ``[*batch, rank, *out]``, writes the output; zero at the start.
        scale: ``alpha / rank``, a 0-d array: frozen, and data, so that changing it recompiles
            nothing.
        layout: one letter an axis of the weight: ``b`` batch, ``i`` in, ``o`` out.
        magnitude: of DoRA, ``[*batch, *out]``: the norms of the columns, which train on their
            own; None without.
        norm: of DoRA, ``[*batch, *out]``: the squared norms of the base's columns, frozen. Of
            another base they are others: None has them found at every call.
        frozen: the names of those of ``a``, ``b`` and ``magnitude`` that do not train.
        residual: whether the base's weight is what the initializer left of it, as of PiSSA: on
            any other base the factors mean nothing.
    """

    a: Any
    b: Any
    scale: Any
    layout: str
    magnitude: Any = None
    norm: Any = None
    frozen: tuple[str, ...] = ()
    residual: bool = False

    @property
    def rank(self) -> int:
        """The rank: the size of ``a``'s last axis."""
        return self.a.shape[-1]

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of the fields that train."""
        has = ("a", "b") if self.magnitude is None else ("a", "b", "magnitude")
        return tuple(name for name in has if name not in self.frozen)

    @property
    def size(self) -> int:
        """How many numbers train."""
        return sum(getattr(self, name).size for name in self.trainable)

    def mapped(self, f: Callable[[str, Any], Any]) -> "Factors":
        """The factors with ``f(name, field)`` for every field that holds something."""
        fields = {name: getattr(self, name) for name in ("a", "b", "scale", "magnitude", "norm")}
        new = {name: f(name, x) for name, x in fields.items() if x is not None}
        return dataclasses.replace(self, **new)

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not field.default
        ]
        return f"Factors({', '.join(shown)})"


def wide(dtype: Any) -> Any:
    """The dtype to add up in: at least float32, whatever the promotion mode says."""
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 4
    return dtype if is_wide else jnp.float32


def is_concrete(x: Any) -> bool:
    """Whether ``x`` is an array with a value, not a tracer or an abstract shape."""
    return not isinstance(x, Tracer) and not isinstance(x, jax.ShapeDtypeStruct)


def master(leaf: Any) -> jax.Array:
    """A copy to train whole, at least float32: a copy, so that donating it spares the base."""
    return jnp.array(leaf, dtype=wide(leaf.dtype), copy=True)


def weight_shape(f: Factors) -> tuple[int, ...]:
    """The shape of the weight that factors are of; () if there is none."""
    n = f.layout.count("b")
    a, b = (tuple(x.shape) if is_array(x) else () for x in (f.a, f.b))
    sizes = {"b": a[:n], "i": a[n:-1], "o": b[n + 1 :]}
    if any(f.layout.count(role) != len(sizes[role]) for role in "bio"):
        return ()
    left = {role: iter(sizes[role]) for role in "bio"}
    return tuple(next(left[letter]) for letter in f.layout)
