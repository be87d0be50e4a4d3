"""The containers: Factors, Adapter, LoraParams. Immutable pytrees that validate nothing.

Nothing is checked on construction, so that prefix trees such as ``LoraParams(None, 0)`` build;
``lora`` and ``merge`` call :func:`check`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.core import Tracer

from lora_jax._layout import factor_shapes, is_array, role_shape, table
from lora_jax._paths import PyTree, flatten, nearest
from lora_jax._ranges import entry, overlap, part_shape


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


class _Arithmetic:
    """``x + y``, ``x - y``, ``-x``, ``c * x``, ``x / c``: of the updates, not of the factors."""

    __array_ufunc__ = None  # NumPy's numbers leave ``c * x`` to us

    def __add__(self, other: Any) -> Self:
        from lora_jax._arithmetic import add  # which is made of what is below

        return add(self, other)

    def __mul__(self, number: Any) -> Self:
        from lora_jax._arithmetic import times

        return times(self, number)

    __radd__, __rmul__ = __add__, __mul__  # sum() begins with 0

    def __neg__(self) -> Self:
        return -1 * self

    def __sub__(self, other: Any) -> Self:
        return self + -other

    def __truediv__(self, number: Any) -> Self:
        from lora_jax._arithmetic import over

        return over(self, number)


@partial(jax.tree_util.register_dataclass, data_fields=("factors", "full"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter(_Arithmetic):
    """All that training changes: what you save, stack, average and send.

    It adds up as its update ``dW = scale * a b`` does: ``0.7 * math + 0.3 * code - toxic`` is the
    adapter of ``0.7 dW_math + 0.3 dW_code - dW_toxic``, exactly, of the sum of their ranks;
    ``lora_jax.resize`` makes it smaller. A weight that one of them does not adapt gets nothing
    from it. With leaves trained whole, add up :class:`LoraParams` of one base. DoRA does not add
    up.

    Attributes:
        factors: :class:`Factors` by the path of their weight, such as
            ``layers_0/attn/query/kernel``, or of a part of one: ``c_attn/kernel[:, 0:768]``.
        full: leaves that are trained whole, by path; float32 masters.
    """

    factors: dict[str, Factors]
    full: dict[str, Any] = dataclasses.field(default_factory=dict)


@partial(jax.tree_util.register_dataclass, data_fields=("base", "adapter"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class LoraParams(_Arithmetic):
    """Parameters split into a frozen base and a trainable adapter. Made by ``lorafy``.

    It unpacks: ``base, adapter = lora_params``. The base is the tree that was given, with the
    very same arrays: calling the unadapted function on it is calling the model without LoRA.

    Those of the very same base add up as their adapters do, leaves trained whole by what they
    differ from the base.

    Attributes:
        base: the frozen parameters.
        adapter: an :class:`Adapter`.
    """

    base: PyTree
    adapter: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.base, self.adapter))

    def __repr__(self) -> str:
        if not isinstance(self.adapter, Adapter) or not isinstance(self.adapter.factors, dict):
            return f"LoraParams(base={self.base!r}, adapter={self.adapter!r})"
        try:
            counts = count_line(self)
        except (AttributeError, TypeError):  # a tree of labels, of specs, ...
            return f"LoraParams(base={self.base!r}, adapter={self.adapter!r})"
        return (
            f"LoraParams({len(self.adapter.factors)} adapted weights, "
            f"{len(self.adapter.full)} trained whole; {counts})"
        )

    def summary(self) -> str:
        """A table of what trains: path, shape, layout, rank, scale, and parameters.

        The last line is the total, as PEFT prints it.
        """
        rows = [("path", "shape", "layout", "rank", "scale", "parameters")]
        leaves = check(self)
        for path, f in self.adapter.factors.items():
            weight, ranges = entry(path, leaves)
            shape = "x".join(map(str, part_shape(leaves[weight].shape, ranges)))
            scale = f"{f.scale:g}" if jnp.ndim(f.scale) == 0 and is_concrete(f.scale) else "-"
            size = f"{f.size:,}"
            rows.append((path, shape, f.layout, str(f.rank), scale, size))
        for path, leaf in self.adapter.full.items():
            shape = "x".join(map(str, leaf.shape))
            rows.append((path, shape, "-", "full", "-", f"{leaf.size:,}"))
        text = table(rows, right=3)
        return "\n".join([text, text.split("\n")[1], count_line(self)])


def wide(dtype: Any) -> Any:
    """The dtype to add up in: at least float32, whatever the promotion mode says."""
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize >= 4
    return dtype if is_wide else jnp.float32


def is_concrete(x: Any) -> bool:
    """Whether ``x`` is an array with a value, not a tracer or an abstract shape."""
    return not isinstance(x, Tracer) and not isinstance(x, jax.ShapeDtypeStruct)


def count_line(lora_params: LoraParams) -> str:
    """``trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.236``."""
    adapter = lora_params.adapter
    factors = adapter.factors.values()
    trainable = sum(f.size for f in factors) + sum(leaf.size for leaf in adapter.full.values())
    added = sum(x.size for f in factors for x in (f.a, f.b, f.magnitude) if x is not None)
    base = flatten(lora_params.base)[0].values()
    total = added + sum(prod(x.shape) for x in base if is_array(x))
    return (
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / max(total, 1):.3g}"
    )


def check(lora_params: LoraParams, leaves: dict[str, Any] | None = None) -> dict[str, Any]:
    """Raise unless the adapter fits the base; return the base's leaves by path."""
    base, adapter = lora_params
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"LoraParams.adapter is {type(adapter).__name__}, expected an Adapter: build it with "
            "lora_jax.lorafy(params, ...)"
        )
    leaves = flatten(base)[0] if leaves is None else leaves
    parts: dict[str, list[Any]] = {}
    for key in dict.fromkeys((*adapter.factors, *adapter.full)):
        path, ranges = entry(key, leaves)
        if path not in leaves:
            raise ValueError(
                f"the adapter has an entry for {key!r}, and the base has no such leaf: this "
                f"adapter was made for another model. Nearest in the base: {nearest(key, leaves)}"
            )
        if key in adapter.factors:
            _check_factors(key, adapter.factors[key], part_shape(leaves[path].shape, ranges))
            for other, other_ranges in parts.setdefault(path, []):
                if overlap(ranges, other_ranges):
                    raise ValueError(
                        f"adapter.factors: {other!r} and {key!r} overlap: an entry of a weight has "
                        "one update. Give them disjoint ranges"
                    )
            parts[path].append((key, ranges))
    for path, leaf in adapter.full.items():
        if jnp.shape(leaf) != leaves[path].shape:
            raise ValueError(
                f"adapter.full[{path!r}] has shape {jnp.shape(leaf)}, the base's leaf has shape "
                f"{leaves[path].shape}: this adapter was made for another model"
            )
        if path in parts:
            raise ValueError(f"{path!r} is both in adapter.factors and in adapter.full: keep one")
    return leaves


def _check_factors(path: str, f: Factors, shape: tuple[int, ...]) -> None:
    for name in ("a", "b", "scale"):
        is_number = name == "scale" and isinstance(f.scale, int | float)
        if not is_array(getattr(f, name)) and not is_number:
            raise TypeError(
                f"adapter.factors[{path!r}].{name} is {type(getattr(f, name)).__name__}, expected "
                "an array. After lora_jax.split, put the two halves together again with "
                "lora_jax.combine"
            )
    if jnp.ndim(f.scale) != 0:
        raise ValueError(
            f"adapter.factors[{path!r}].scale has shape {jnp.shape(f.scale)}, expected a 0-d "
            "array. Of a stack of adapters, give each row of a batch its own by "
            "lora_jax.lora_rows, call all by jax.vmap with in_axes=LoraParams(base=None, "
            "adapter=0), or take them apart by lora_jax.unstack"
        )
    if unknown := set(f.frozen) - {"a", "b", "magnitude"}:
        raise ValueError(
            f"adapter.factors[{path!r}].frozen names {sorted(unknown)}: expected some of 'a', 'b' "
            "and 'magnitude'"
        )
    expected = None
    if len(f.layout) == len(shape):
        expected = factor_shapes(f.layout, shape, f.a.shape[-1] if f.a.ndim else 0)
    if expected != (f.a.shape, f.b.shape):
        wanted = f"a {expected[0]} and b {expected[1]}" if expected else "another layout"
        raise ValueError(
            f"the factors of {path!r} do not fit its weight of shape {shape} (layout "
            f"{f.layout!r}): a has shape {f.a.shape} and b {f.b.shape}, expected {wanted}. This "
            "adapter was made for another model, or is a stack that wants jax.vmap"
        )
    norms = tuple(size for role in "bo" for size in role_shape(f.layout, shape, role))
    for name in ("magnitude", "norm"):
        x = getattr(f, name)
        if x is not None and jnp.shape(x) != norms:
            raise ValueError(
                f"adapter.factors[{path!r}].{name} has shape {jnp.shape(x)}, expected [*batch, "
                f"*out] = {norms} for a weight of shape {shape} (layout {f.layout!r})"
            )
