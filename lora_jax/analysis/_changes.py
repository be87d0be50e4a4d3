"""Read what training changed, weight by weight: as factors, or as a matrix where it must be one."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.checks import check_finite, check_single
from lora_jax._adapter.factors import Entry, Factors, Rows, is_concrete, wide
from lora_jax._adapter.lowrank import SVD, LowRank, matmul, svd
from lora_jax._adapter.params import Adapter, LoraParams, is_lora, without_adapters
from lora_jax._adapter.updates import check_linear, operands
from lora_jax._jax import replicated
from lora_jax._merge import merge
from lora_jax._weights.axes import matrix_of
from lora_jax._weights.conventions import VECTORS
from lora_jax._weights.paths import flatten, nearest
from lora_jax._weights.quantized import plain_array
from lora_jax._weights.ranges import part_of, split_range
from lora_jax._weights.selector import Selector, letters_of, select

FINITE = "load an earlier step, or leave it out by targets="


class Change(NamedTuple):
    """The change of one weight, ``dW``.

    Attributes:
        rank: the rank of the factors; None for a full leaf.
        update: the change as factors; or None.
        dense: the change as a matrix, ``[*batch, in, out]``: of DoRA, and of full leaves; or None.
        weight: the weight before it, ``[*batch, in, out]``; None unless it was asked for.
    """

    rank: int | None
    update: LowRank | None
    dense: Any = None
    weight: Any = None

    def svd(self, rank: int | None = None, *, vectors: bool = True) -> SVD:
        """Find the singular values, and with ``vectors`` the vectors on both sides."""
        if self.update is not None:
            return self.update.svd(rank, left=vectors, right=vectors)
        if vectors:
            return svd(self.dense, rank)
        return SVD(None, jnp.linalg.svd(self.dense, compute_uv=False)[..., :rank], None)

    def norm(self) -> jax.Array:
        """Return the Frobenius norm of every matrix: ``[*batch]``."""
        if self.update is None:
            return norm(self.dense)
        return jnp.sqrt(jnp.square(self.svd(vectors=False).s).sum(-1))

    def matrix(self) -> jax.Array:
        """Return the change as a matrix: ``[*batch, in, out]``."""
        if self.update is None:
            return self.dense
        x = self.update.folded()
        return matmul(x.a, x.b)


def changes(
    verb: str, x: Any, targets: Selector, blocked: Callable[[str, Any], str | None], *, base: bool
) -> Iterator[tuple[str, Change]]:
    """Iterate over the changes of the selected entries, one in memory at a time.

    Args:
        verb: the function that asks, for messages.
        x: an Adapter or a LoraParams.
        targets: a selector over the keys of the entries.
        blocked: returns why an entry is left out, or None.
        base: whether the weights are needed, too.

    Raises:
        TypeError: ``x`` is neither, or has no base where that is needed.
        ValueError: ``x`` is a stack, is not finite, or has no such entry or no such update.
    """
    adapter = check_single(x, f"{verb}: x")
    if base and not is_lora(x):
        raise TypeError(
            f"{verb}: x is an Adapter, and the weights are in its base: pass "
            "lora_jax.LoraParams(base, x)"
        )
    _check_base(verb, adapter, x)
    leaves = _leaves(x)
    entries = {**adapter.factors, **adapter.full}
    keys = _selected(
        verb, entries, targets, {k: why for k, f in entries.items() if (why := blocked(k, f))}
    )
    only = Adapter(
        *({k: f for k, f in d.items() if k in keys} for d in (adapter.factors, adapter.full))
    )
    check_finite(only, f"{verb}: x", FINITE)
    for key in keys:
        yield key, _change(verb, key, entries[key], leaves, base)


def no_matrix(key: str, f: Any) -> str | None:
    """Return why an entry is no matrix; None if it is one."""
    if isinstance(f, Factors | Rows):
        return None
    if f.ndim < 2 or key.split("/")[-1] in VECTORS:
        return "a vector, which has no singular values"
    try:
        letters_of(key, {key: f}, {})
    except ValueError:
        return (
            "a full leaf whose axes are ambiguous: lora_jax.algebra.extract(base, "
            "lora_jax.merge(lora_params), energy=1.0, rest='full', layout=...) makes factors of it"
        )
    return None


def no_map(key: str, f: Any) -> str | None:
    """Return why an entry is no linear map of inputs to outputs; None if it is one."""
    if isinstance(f, Rows):
        return "rows of a table: they are looked up, and have no leading inputs"
    return no_matrix(key, f)


def finite_operands(verb: str, xs: Sequence[Any]) -> list[Adapter]:
    """Return the adapters to compare, of one model and finite."""
    adapters = operands(verb, xs)
    for n, adapter in enumerate(adapters):
        check_finite(adapter, f"{verb}: operand {n}", "load an earlier step")
    return adapters


def norm(x: jax.Array) -> jax.Array:
    """Return the Frobenius norm of every matrix: ``[*batch]``."""
    return jnp.sqrt(jnp.square(x).sum((-2, -1)))


def check_values(message: str, is_wrong: jax.Array) -> None:
    """Raise if a value is wrong, and name the entries of the batch; traced ones pass."""
    if is_concrete(is_wrong) and (wrong := np.argwhere(np.asarray(is_wrong)).tolist()):
        where = f" (batch entries {wrong[:5]})" if wrong[0] else ""
        raise ValueError(message.format(where=where))


def _check_base(verb: str, adapter: Adapter, x: Any) -> None:
    """Raise if an update is not in the adapter alone."""
    if is_lora(x):
        return
    for key, f in adapter.factors.items():
        if f.magnitude is not None:
            raise TypeError(
                f"{verb}: {key!r} has a DoRA magnitude, and its update is the merged weight less "
                "the base's: pass lora_jax.LoraParams(base, x)"
            )
    if adapter.full:
        raise TypeError(
            f"{verb}: {next(iter(adapter.full))!r} is a full leaf, and its update is its "
            "difference from the base: pass lora_jax.LoraParams(base, x)"
        )


def _leaves(x: Any) -> Mapping[str, Any]:
    """Return the weights before the change, with the frozen adapters under it."""
    if not is_lora(x):
        return {}
    base = x.base
    if isinstance(base, LoraParams):
        base = merge(base, quantized="dequantize")
    return flatten(without_adapters(base))[0]


def _selected(
    verb: str, entries: Mapping[str, Any], targets: Selector, blocked: Mapping[str, str]
) -> list[str]:
    """Select keys, in the order of the entries."""
    if not entries:
        return []
    paths = {key: split_range(key)[0] for key in entries}
    by_path = {path: entries[key] for key, path in paths.items()}
    chosen: set[str] = set()
    is_one = isinstance(targets, str) or not isinstance(targets, Iterable)
    parts: Any = [targets] if is_one else targets
    for part in parts:
        if isinstance(part, str) and part in entries and part not in blocked:
            chosen.add(part)
        elif isinstance(part, str) and split_range(part)[1] is not None:
            raise ValueError(
                f"{verb}: targets={part!r}: the adapter has no entry for this part of a weight. "
                f"Nearest: {nearest(part, entries)}"
            )
        else:
            found = select(part, by_path, blocked, f"{verb}: targets")
            chosen |= {key for key, path in paths.items() if path in found}
    return [key for key in entries if key in chosen]


def _change(verb: str, key: str, f: Any, leaves: Mapping[str, Any], base: bool) -> Change:
    """Read one entry."""
    if not isinstance(f, Factors | Rows):
        return _full(key, f, leaves)
    if f.residual:
        check_linear(verb, key, f)
    is_dora = f.magnitude is not None
    w = _part(key, f, leaves) if base or is_dora else None
    weight = matrix_of(w, f.layout) if base else None
    if is_dora:
        merged = merge(LoraParams({"w": w}, Adapter({"w": f})))["w"]
        return Change(f.rank, None, matrix_of(merged - w, f.layout), weight)
    if isinstance(f, Rows):  # the columns of ``a`` are orthonormal, and need not be there
        b = f.b.reshape(f.rank, -1)
        b = jnp.asarray(b, wide(b.dtype))
        return Change(f.rank, LowRank(jnp.eye(f.rank, dtype=b.dtype), b, f.scale), None, weight)
    return Change(f.rank, LowRank.of(f), None, weight)


def _full(key: str, leaf: Any, leaves: Mapping[str, Any]) -> Change:
    before = _wide(leaves[key])
    d = jnp.asarray(leaf, before.dtype) - before
    if no_matrix(key, leaf):
        one = (1, math.prod(d.shape))
        return Change(None, None, d.reshape(one), before.reshape(one))
    layout = letters_of(key, leaves, {})
    return Change(None, None, matrix_of(d, layout), matrix_of(before, layout))


def _part(key: str, f: Entry, leaves: Mapping[str, Any]) -> jax.Array:
    part = part_of(key, leaves)
    return _wide(plain_array(leaves[part.path])[part.slices(len(f.layout))])


def _wide(x: Any) -> jax.Array:
    x = jnp.asarray(plain_array(x))
    return replicated(x.astype(wide(x.dtype)))
