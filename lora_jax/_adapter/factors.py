"""The entries of an adapter: ``Factors`` of a weight, and ``Rows`` of a table."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from lora_jax._weights.axes import is_array


class _Entry:
    """The fields of an entry that hold arrays, and which of them train.

    Attributes:
        FIELDS: the names of the fields that hold arrays.
        TRAINABLE: the names of those that may train.
    """

    FIELDS: ClassVar[tuple[str, ...]]
    TRAINABLE: ClassVar[tuple[str, ...]]

    @property
    def trainable(self) -> tuple[str, ...]:
        """The names of the fields that train."""
        entry: Any = self
        own = (name for name in self.TRAINABLE if name not in entry.frozen)
        return tuple(name for name in own if name != "magnitude" or entry.magnitude is not None)

    @property
    def size(self) -> int:
        """The number of trainable numbers."""
        return sum(getattr(self, name).size for name in self.trainable)

    def arrays(self) -> dict[str, Any]:
        """Return the fields that are not None, by name."""
        fields = {name: getattr(self, name) for name in self.FIELDS}
        return {name: x for name, x in fields.items() if x is not None}

    def map(self, f: Callable[[str, Any], Any]) -> Self:
        """Return the entry with ``f(name, field)`` for every field that is not None."""
        entry: Any = self
        return dataclasses.replace(entry, **{name: f(name, x) for name, x in self.arrays().items()})

    def __repr__(self) -> str:
        entry: Any = self
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(entry)
            if getattr(self, field.name) is not field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("a", "b", "scale", "magnitude", "norm"),
    meta_fields=("layout", "frozen", "residual"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Factors(_Entry):
    """The low-rank update of one weight: ``scale * sum_r a[*batch, *in, r] b[*batch, r, *out]``.

    Attributes:
        a: ``[*batch, *in, rank]``, reads the input; random at the start.
        b: ``[*batch, rank, *out]``, writes the output; zero at the start.
        scale: ``alpha / rank``, a 0-d array: frozen, and data, so that changing it recompiles
            nothing.
        layout: one letter per axis of the weight: ``b`` batch, ``i`` in, ``o`` out.
        magnitude: DoRA's, ``[*batch, *out]``: the trainable norms of the columns; None without.
        norm: DoRA's, ``[*batch, *out]``: the squared norms of the base's columns, frozen. They
            belong to one base; None computes them at every call.
        frozen: the names of those of ``a``, ``b`` and ``magnitude`` that do not train.
        residual: whether the base's weight is what the initializer left of it, as PiSSA does: on
            any other base the factors mean nothing.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("a", "b", "scale", "magnitude", "norm")
    TRAINABLE: ClassVar[tuple[str, ...]] = ("a", "b", "magnitude")

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
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight; () if ``a`` and ``b`` do not fit the layout."""
        n = self.layout.count("b")
        a, b = (tuple(x.shape) if is_array(x) else () for x in (self.a, self.b))
        return _weight_shape(self.layout, {"b": a[:n], "i": a[n:-1], "o": b[n + 1 :]})


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("b", "scale"),
    meta_fields=("layout", "ids", "vocabulary"),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Rows(_Entry):
    """The update of some rows of a table, such as those of new tokens: ``W[ids] += scale * b``.

    These are factors whose ``a`` picks the rows, so that it is not stored.

    Attributes:
        b: ``[rows, *out]``, the update of each row; zero at the start.
        scale: a 0-d array, frozen.
        layout: one letter per axis of the table: one ``i``, the others ``o``.
        ids: the rows, ascending.
        vocabulary: the number of rows of the table.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("b", "scale")
    TRAINABLE: ClassVar[tuple[str, ...]] = ("b",)
    magnitude: ClassVar[None] = None
    norm: ClassVar[None] = None
    frozen: ClassVar[tuple[str, ...]] = ()
    residual: ClassVar[bool] = False

    b: Any
    scale: Any
    layout: str
    ids: tuple[int, ...]
    vocabulary: int

    @property
    def rank(self) -> int:
        """The number of rows."""
        return len(self.ids)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the table; () if ``b`` does not fit the layout."""
        b = tuple(self.b.shape) if is_array(self.b) else ()
        return _weight_shape(self.layout, {"b": (), "i": (self.vocabulary,), "o": b[1:]})

    @property
    def a(self) -> Any:
        """The one-hot matrix ``[vocabulary, rows]``: 1 where the table row is ``ids[k]``."""
        shape = (self.vocabulary, self.rank)
        members = self.b.shape[: len(self.b.shape) - 1 - self.layout.count("o")]
        if isinstance(self.b, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((*members, *shape), self.b.dtype)
        if isinstance(self.b, Tracer):  # a constant of this size does not belong into a program
            picked = lax.broadcasted_iota(np.int32, shape, 0) == np.array([self.ids], np.int32)
            picked = picked.astype(self.b.dtype)
            return jnp.broadcast_to(picked, (*members, *shape)) if members else picked
        picked = np.zeros(shape, self.b.dtype)
        picked[list(self.ids), range(self.rank)] = 1
        picked = np.broadcast_to(picked, (*members, *shape))
        return picked if isinstance(self.b, np.ndarray) else jnp.asarray(picked)

    def factors(self) -> Factors:
        """Return the same update as dense factors."""
        return Factors(self.a, self.b, self.scale, self.layout, frozen=("a",))


Entry: TypeAlias = Factors | Rows


def form_of(f: Entry) -> tuple[Any, ...]:
    """Return the layout, the weight's shape, the rank, and the ids of table rows."""
    return f.layout, f.weight_shape, f.rank, f.ids if isinstance(f, Rows) else ()


def wide(dtype: Any) -> Any:
    """Return the dtype to add up in: at least float32, whatever the promotion mode is."""
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 4
    return dtype if is_wide else jnp.float32


def is_concrete(x: Any) -> bool:
    """Return whether ``x`` has a value: it is neither a tracer nor an abstract shape."""
    return not isinstance(x, Tracer) and not isinstance(x, jax.ShapeDtypeStruct)


def master(leaf: Any) -> jax.Array:
    """Copy a leaf to train, in at least float32. Donating the copy spares the base."""
    return jnp.array(leaf, dtype=wide(leaf.dtype), copy=True)


def _weight_shape(layout: str, sizes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Order the sizes of the batch, input and output axes by the layout; () if they do not fit."""
    if any(layout.count(role) != len(sizes[role]) for role in "bio"):
        return ()
    left = {role: iter(sizes[role]) for role in "bio"}
    return tuple(next(left[letter]) for letter in layout)
