"""Define the containers Adapter and LoraParams, immutable pytrees, and check that they fit.

Nothing is checked on construction, so that prefix trees such as ``LoraParams(None, 0)`` build;
``lora`` and ``merge`` call :func:`check`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any, NamedTuple, Self, TypeGuard

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import Entry, Rows, is_concrete
from lora_jax._weights.axes import factor_shapes, is_array, role_shape
from lora_jax._weights.layouts import table
from lora_jax._weights.paths import PyTree, flatten, nearest, parameters_in
from lora_jax._weights.ranges import Part, overlap, part_of

OPERATORS: dict[str, Callable[..., Any]] = {}  # filled by ``sums``, which needs these classes


class _Arithmetic:
    """The operators ``x + y``, ``x - y``, ``-x``, ``c * x``, ``x / c``, which act on updates."""

    __array_ufunc__ = None  # NumPy's numbers leave ``c * x`` to this class

    def __add__(self, other: Any) -> Self:
        return OPERATORS["add"](self, other)

    def __mul__(self, number: Any) -> Self:
        return OPERATORS["times"](self, number)

    __radd__, __rmul__ = __add__, __mul__  # sum() starts with 0

    def __neg__(self) -> Self:
        return -1 * self

    def __sub__(self, other: Any) -> Self:
        return self + -other

    def __truediv__(self, number: Any) -> Self:
        return OPERATORS["over"](self, number)


@partial(jax.tree_util.register_dataclass, data_fields=("factors", "full"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class Adapter(_Arithmetic):
    """The trainable part of a LoraParams: factors by weight, and leaves that train fully.

    Arithmetic acts on the update ``dW = scale * a b``: ``0.7 * math + 0.3 * code - toxic`` is the
    adapter of exactly ``0.7 dW_math + 0.3 dW_code - dW_toxic``. Its rank is the sum of their ranks;
    ``lora_jax.algebra.resize`` reduces it. An adapter adds nothing to a weight that it does not
    adapt. To add up full leaves, use :class:`LoraParams` of one base. DoRA has no sums.

    Attributes:
        factors: :class:`Factors` by the path of their weight, such as
            ``layers_0/attn/query/kernel``, or of a part of one: ``c_attn/kernel[:, 0:768]``; and
            :class:`Rows` by the path of their table.
        full: fully trained leaves, by path; float32 masters.
    """

    factors: dict[str, Entry]
    full: dict[str, Any] = dataclasses.field(default_factory=dict)

    def map(self, f: Callable[[str, str, Any], Any]) -> "Adapter":
        """Return the adapter with ``f(key, field, x)`` for each array; a full leaf is "full"."""
        factors = {
            key: x.map(lambda field, y, key=key: f(key, field, y))
            for key, x in self.factors.items()
        }
        return Adapter(factors, {path: f(path, "full", x) for path, x in self.full.items()})

    def arrays(self) -> dict[tuple[str, str], Any]:
        """Return all arrays by ``(key, field)``; the field of a fully trained leaf is "full"."""
        found = {
            (key, field): x for key, f in self.factors.items() for field, x in f.arrays().items()
        }
        return found | {(path, "full"): x for path, x in self.full.items()}


_NO_PARAMETERS = (
    "a LoraParams is no tree of parameters, but two, .base and .adapter. A function of parameters "
    "takes it through lora_jax.lora: lora_jax.lora(model.apply)({'params': lora_params}, x), and "
    "not model.apply({'params': lora_params}, x)"
)


@partial(jax.tree_util.register_dataclass, data_fields=("base", "adapter"), meta_fields=())
@dataclasses.dataclass(frozen=True, eq=False)
class LoraParams(_Arithmetic):
    """Parameters split into a frozen base and a trainable adapter. Made by ``lorafy``.

    It unpacks: ``base, adapter = lora_params``. The base is the given tree, with the same arrays:
    the original function on it is the model without LoRA. It may be a LoraParams itself, which is
    frozen then: the updates of both add up.

    LoraParams of one base add up as their adapters do; full leaves add up by their differences
    from the base.

    Attributes:
        base: the frozen parameters.
        adapter: an :class:`Adapter`.
    """

    base: PyTree
    adapter: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.base, self.adapter))

    def __getitem__(self, key: Any) -> Any:
        raise TypeError(f"LoraParams[{key!r}]: {_NO_PARAMETERS}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"LoraParams.{name}: {_NO_PARAMETERS}")

    def __repr__(self) -> str:
        if not isinstance(self.adapter, Adapter) or not isinstance(self.adapter.factors, dict):
            return f"LoraParams(base={self.base!r}, adapter={self.adapter!r})"
        try:
            counts = count_line(self)
        except (AttributeError, TypeError):  # a tree of labels or specs
            return f"LoraParams(base={self.base!r}, adapter={self.adapter!r})"
        return (
            f"LoraParams({len(self.adapter.factors)} adapted weights, "
            f"{len(self.adapter.full)} full leaves; {counts})"
        )

    def summary(self) -> str:
        """Format a table of what trains: path, shape, layout, rank, scale and parameters.

        The last line is the total, in PEFT's format.
        """
        rows = [("path", "shape", "layout", "rank", "scale", "parameters")]
        leaves, parts = check(self)
        for path, f in self.adapter.factors.items():
            shape = "x".join(map(str, parts[path].shape(leaves[parts[path].path].shape)))
            scale = f"{f.scale:g}" if jnp.ndim(f.scale) == 0 and is_concrete(f.scale) else "-"
            size = f"{f.size:,}"
            rows.append((path, shape, f.layout, str(f.rank), scale, size))
        for path, leaf in self.adapter.full.items():
            shape = "x".join(map(str, leaf.shape))
            rows.append((path, shape, "-", "full", "-", f"{leaf.size:,}"))
        text = table(rows, right=3)
        return "\n".join([text, text.split("\n")[1], count_line(self)])


def without_adapters(base: PyTree) -> PyTree:
    """Return the parameters under a base's frozen adapters, if it has any."""
    while isinstance(base, LoraParams):
        base = base.base
    return base


def adapters_under(lora_params: LoraParams) -> list[Adapter]:
    """Return the frozen adapters of the base, the last one first."""
    found, base = [], lora_params.base
    while isinstance(base, LoraParams):
        found.append(base.adapter)
        base = base.base
    return found


def count_line(lora_params: LoraParams) -> str:
    """Format ``trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.236``."""
    adapter = lora_params.adapter
    factors = adapter.factors.values()
    trainable = sum(f.size for f in factors) + sum(leaf.size for leaf in adapter.full.values())
    added = sum(x.size for f in factors for name, x in f.arrays().items() if name in f.TRAINABLE)
    base = parameters_in(without_adapters(lora_params)).values()
    total = added + sum(prod(x.shape) for x in base)
    return (
        f"trainable params: {trainable:,} || all params: {total:,} || "
        f"trainable%: {100 * trainable / max(total, 1):.3g}"
    )


def is_lora(x: Any) -> TypeGuard[LoraParams]:
    """Return whether ``x`` is a LoraParams."""
    return isinstance(x, LoraParams)


def adapter_of(x: Any) -> Any:
    """Return the adapter of a LoraParams, and anything else as it is."""
    return x.adapter if is_lora(x) else x


class Checked(NamedTuple):
    """Hold what :func:`check` found: the base's leaves by path, each entry's part by key."""

    leaves: dict[str, Any]
    parts: dict[str, Part]


def check(lora_params: LoraParams, leaves: dict[str, Any] | None = None) -> Checked:
    """Raise unless the adapter fits the base; return the leaves and the parts of the entries."""
    base, adapter = lora_params
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"LoraParams.adapter is {type(adapter).__name__}, expected an Adapter: build it with "
            "lora_jax.lorafy(params, ...)"
        )
    leaves = flatten(without_adapters(base))[0] if leaves is None else leaves
    parts = {key: part_of(key, leaves) for key in adapter.factors}
    by_path: dict[str, list[str]] = {}
    for key in dict.fromkeys((*adapter.factors, *adapter.full)):
        path = parts[key].path if key in parts else key
        if path not in leaves:
            raise ValueError(
                f"the adapter has an entry for {key!r}, and the base has no such leaf: this "
                f"adapter was made for another model. Nearest in the base: {nearest(key, leaves)}"
            )
        if key in parts:
            _check_factors(key, adapter.factors[key], parts[key].shape(leaves[path].shape))
            for other in by_path.setdefault(path, []):
                if overlap(parts[key].ranges, parts[other].ranges):
                    raise ValueError(
                        f"adapter.factors: {other!r} and {key!r} overlap: an entry of a weight has "
                        "one update. Give them disjoint ranges"
                    )
            by_path[path].append(key)
    for path, leaf in adapter.full.items():
        if jnp.shape(leaf) != leaves[path].shape:
            raise ValueError(
                f"adapter.full[{path!r}] has shape {jnp.shape(leaf)}, the base's leaf has shape "
                f"{leaves[path].shape}: this adapter was made for another model"
            )
        if path in by_path:
            raise ValueError(f"{path!r} is both in adapter.factors and in adapter.full: keep one")
    if isinstance(base, LoraParams):
        _check_under(adapter, parts, check(base, leaves).parts, base)
    return Checked(leaves, parts)


def _check_under(
    adapter: Adapter, parts: dict[str, Part], under: dict[str, Part], base: LoraParams
) -> None:
    """Raise unless the updates of an adapter and of a frozen one under it simply add up."""
    remedy = "Merge the frozen adapter first: lora_jax.lorafy(lora_jax.merge(lora_params), ...)"
    for key, f in adapter.factors.items():
        for other, part in under.items():
            if part.path != parts[key].path:
                continue
            for name, entry in ((key, f), (other, base.adapter.factors[other])):
                if entry.magnitude is not None or entry.residual:
                    kind = "DoRA" if entry.magnitude is not None else "an initializer's residual"
                    raise ValueError(
                        f"{name!r} is of {kind}, and two adapters of {part.path!r}, one of them "
                        f"frozen, add up only as plain LoRA. {remedy}"
                    )
    changed = {part.path for part in under.values()} | base.adapter.full.keys()
    if both := sorted(changed & adapter.full.keys()):
        raise ValueError(
            f"adapter.full[{both[0]!r}] would replace what the frozen adapter made of that leaf. "
            f"{remedy}"
        )


def _check_factors(path: str, f: Entry, shape: tuple[int, ...]) -> None:
    for name in f.FIELDS:
        is_number = name == "scale" and isinstance(f.scale, int | float)
        is_absent = getattr(f, name) is None and name in ("magnitude", "norm")
        if not (is_array(getattr(f, name)) or is_number or is_absent):
            raise TypeError(
                f"adapter.factors[{path!r}].{name} is {type(getattr(f, name)).__name__}, expected "
                "an array. After lora_jax.split, put the two halves together again with "
                "lora_jax.combine"
            )
    if jnp.ndim(f.scale) != 0:
        raise ValueError(
            f"adapter.factors[{path!r}].scale has shape {jnp.shape(f.scale)}, expected a 0-d "
            "array. This is a stack of adapters: give each row of a batch its own by "
            "lora_jax.many.lora_rows, call all by jax.vmap with in_axes=LoraParams(base=None, "
            "adapter=0), or take them apart by lora_jax.many.unstack"
        )
    if unknown := set(f.frozen) - set(f.TRAINABLE):
        raise ValueError(
            f"adapter.factors[{path!r}].frozen names {sorted(unknown)}: expected some of 'a', 'b' "
            "and 'magnitude'"
        )
    if isinstance(f, Rows):
        _check_rows(path, f, shape)
        return
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


def _check_rows(path: str, f: Rows, shape: tuple[int, ...]) -> None:
    is_table = len(f.layout) == len(shape) and f.layout.count("i") == 1 and "b" not in f.layout
    expected = factor_shapes(f.layout, shape, f.rank)[1] if is_table else None
    if not is_table or f.weight_shape != shape or f.b.shape != expected:
        wanted = f"b {expected} for a table of {shape}" if expected else "a table with one 'i' axis"
        raise ValueError(
            f"the rows of {path!r} do not fit its weight of shape {shape} (layout {f.layout!r}): b "
            f"has shape {f.b.shape} for {f.rank} of {f.vocabulary} rows, expected {wanted}. This "
            "adapter was made for another model, or is a stack that wants jax.vmap"
        )
    if list(f.ids) != sorted({*f.ids}) or not 0 <= f.ids[0] <= f.ids[-1] < f.vocabulary:
        raise ValueError(
            f"adapter.factors[{path!r}].ids is {f.ids}: expected ascending numbers from 0 to "
            f"{f.vocabulary - 1}"
        )
