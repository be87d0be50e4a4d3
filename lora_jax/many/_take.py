"""Rows of a stack: put another adapter into one, or keep some."""

from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.checks import check_same_base, check_single, with_adapter
from lora_jax._adapter.factors import is_concrete
from lora_jax._adapter.params import Adapter, LoraParams, is_lora
from lora_jax._weights.paths import PyTree
from lora_jax.many._fit import Schema, Wanted, blank, fit
from lora_jax.many._unstack import stack_of

Stack = TypeVar("Stack", LoraParams, Adapter)


def replace_at(stacked: Stack, i: Any, adapter: LoraParams | Adapter) -> Stack:
    """Return the stack with another adapter in row ``i``, padded to the stack's rank.

    The shapes stay, and so does the program: under ``jax.jit``, with ``i`` an array, one compiled
    function replaces any row by any adapter of the same shapes, and whatever runs on the stack is
    not compiled anew. Pass Adapters there (``stacked.adapter``), and donate the stack::

        put = jax.jit(lora_jax.many.replace_at, donate_argnums=0)

    Args:
        stacked: from :func:`stack`.
        i: the row, from 0. A traced one that is out of range writes nothing, as nobody can raise
            there: no row is touched.
        adapter: an Adapter; or, where the stack is a LoraParams, a LoraParams over its base. What
            it lacks is filled in as :func:`stack` does it, and NaNs are treated as there.

    Raises:
        TypeError: an argument is of the wrong kind.
        IndexError: ``i`` is out of range; negative ones are.
        ValueError: the adapter does not fit into the stack; the message says how it might.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((4, 4))}}
        >>> both = lora_jax.many.stack([lora_jax.lorafy(params, rank) for rank in (1, 3)])
        >>> both = lora_jax.many.replace_at(both, 0, lora_jax.lorafy(params, 2, alpha=6))
        >>> both.adapter.factors["query/kernel"].scale
        Array([3.       , 5.3333335], dtype=float32)
    """
    size, rows = stack_of(stacked, "replace_at")
    index = _row(i, size)
    base = None
    if is_lora(stacked):
        base = stacked.base
        if isinstance(adapter, Adapter):
            adapter = LoraParams(base, adapter)
    elif isinstance(adapter, LoraParams):
        raise TypeError(
            "replace_at: the stack is an Adapter and adapter a LoraParams: pass its .adapter"
        )
    single = check_single(adapter, "replace_at: adapter")
    if isinstance(adapter, LoraParams):
        check_same_base("replace_at: adapter and the stack", adapter, LoraParams(base, rows))
    for kind in ("factors", "full"):
        more = getattr(single, kind).keys() - getattr(rows, kind).keys()
        if more:
            raise ValueError(
                f"replace_at: the stack has nothing in {kind} for {', '.join(sorted(more))}, which "
                "the adapter has. Stack them anew: stack([*unstack(stacked), adapter])"
            )

    def like(_, x):
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    schema = Schema(
        {key: Wanted("the stack", f.map(like), f.rank) for key, f in rows.factors.items()},
        {path: ("the stack", like("full", x)) for path, x in rows.full.items()},
        base,
    )
    row = fit(single, "replace_at: adapter", schema, blank(schema))
    put = lambda rows, x: jnp.asarray(rows).at[index].set(x, mode="drop")  # noqa: E731
    return with_adapter(stacked, jax.tree.map(put, rows, row))


def take(tree: PyTree, indices: Any) -> PyTree:
    """Return some rows of a stack and of all that goes along with it, such as moments.

    ``x[indices]`` of every leaf, but for the bases of LoraParams, which have no rows. So successive
    halving is ``trainable, frozen, opt_state = take((trainable, frozen, opt_state), best)``.

    Args:
        tree: any tree whose leaves have a leading axis of adapters, with LoraParams inside.
        indices: a vector of integers, from 0, in any order, perhaps repeated. Those that are
            traced cannot be refused: out of range they give NaN, or of integers the least, or of
            unsigned ones the largest.

    Raises:
        TypeError: ``indices`` are not integers.
        ValueError: ``indices`` are no vector, or none; or the leaves have no rows, or not equally
            many.
        IndexError: an index is out of range; negative ones are.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((4, 4))}}
        >>> many = lora_jax.many.stack([lora_jax.lorafy(params, rank) for rank in (1, 2, 3)])
        >>> lora_jax.many.take(many, [2, 0]).adapter.factors["query/kernel"].scale
        Array([ 5.3333335, 16.       ], dtype=float32)
    """
    nodes, treedef = jax.tree.flatten(tree, is_leaf=is_lora)
    rows = [x.adapter if is_lora(x) else x for x in nodes]
    sizes: dict[int, str] = {}
    for keys, x in jax.tree_util.tree_leaves_with_path(rows):
        name = f"leaf {keys[0].idx}{jax.tree_util.keystr(keys[1:])}"
        if not jnp.ndim(x):
            raise ValueError(
                f"take: {name} is a scalar, and has no rows. An optimizer's state has them if "
                "jax.vmap(tx.init) made it"
            )
        sizes.setdefault(jnp.shape(x)[0], name)
    if len(sizes) != 1:
        raise ValueError(f"take: expected leaves of equally many rows, got {sizes or 'no leaves'}")
    (size,) = sizes
    index = indices if isinstance(indices, jax.Array) else np.asarray(indices)
    if not index.size:
        raise ValueError("take: indices are empty, and a stack has at least one row")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"take: indices are of dtype {index.dtype}, expected integers; of a mask: "
            "numpy.flatnonzero(mask)"
        )
    if index.ndim != 1:
        raise ValueError(f"take: indices have shape {index.shape}, expected a vector")
    if is_concrete(index):
        bad = [int(k) for k in np.asarray(index) if not 0 <= k < size]
        if bad:
            raise IndexError(f"take: row {bad[0]} is out of range: there are 0 to {size - 1}")
        index = np.asarray(index, np.int32)  # an int8 has no place for the number of rows
        one = lambda x: x[index]  # noqa: E731
    else:
        index = _in_range(index, size)
        one = lambda x: jnp.asarray(x).at[index].get(mode="fill")  # noqa: E731
    taken = [
        replace(x, adapter=jax.tree.map(one, x.adapter)) if is_lora(x) else one(x) for x in nodes
    ]
    return jax.tree.unflatten(treedef, taken)


def _row(i: Any, size: int) -> Any:
    """An index of rows; ``size``, which is dropped, for a traced one that is out of range.

    Raises:
        TypeError: it is no integer.
        IndexError: it is out of range.
    """
    dtype = getattr(i, "dtype", int if type(i) is int else object)
    if getattr(i, "shape", ()) or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"replace_at: i={i!r}: expected an integer")
    if not is_concrete(i):
        return _in_range(i, size)
    if not 0 <= int(i) < size:
        raise IndexError(f"replace_at: i={int(i)}: the stack has rows 0 to {size - 1}")
    return int(i)


def _in_range(index: Any, size: int) -> jax.Array:
    """The indices, and ``size``, which no row has, for those that are out of range."""
    index = index.astype(jnp.int32) if index.dtype.itemsize < 4 else index
    return jnp.where((index >= 0) & (index < size), index, size)
