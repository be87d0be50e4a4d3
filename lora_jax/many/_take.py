"""Replace a member of a stack, or keep some of its members."""

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
    """Return the stack with another adapter as member ``i``, padded to the stack's rank.

    The shapes stay the same. Under ``jax.jit``, with ``i`` an array, one compiled function replaces
    any member by any adapter of the same shapes, and no program that runs on the stack is compiled
    again. Pass Adapters to it (``stacked.adapter``), and donate the stack::

        replace = jax.jit(lora_jax.many.replace_at, donate_argnums=0)

    Args:
        stacked: from :func:`stack`.
        i: the number of the member, from 0. A write to a traced number that is out of range is
            dropped: a traced index cannot raise.
        adapter: an Adapter; or, if the stack is a LoraParams, a LoraParams over its base. Missing
            entries are filled in, and NaNs are treated, as by :func:`stack`.


    Raises:
        TypeError: an argument has the wrong type.
        IndexError: ``i`` is negative or too large.
        ValueError: the adapter does not fit into the stack; the message gives a remedy.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((4, 4))}}
        >>> both = lora_jax.many.stack([lora_jax.lorafy(params, rank) for rank in (1, 3)])
        >>> both = lora_jax.many.replace_at(both, 0, lora_jax.lorafy(params, 2, alpha=6))
        >>> both.adapter.factors["query/kernel"].scale
        Array([3.       , 5.3333335], dtype=float32)
    """
    size, members = stack_of(stacked, "replace_at")
    index = _member_index(i, size)
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
        check_same_base("replace_at: adapter and the stack", adapter, LoraParams(base, members))
    for kind in ("factors", "full"):
        more = getattr(single, kind).keys() - getattr(members, kind).keys()
        if more:
            raise ValueError(
                f"replace_at: the stack has nothing in {kind} for {', '.join(sorted(more))}, which "
                "the adapter has. Make a new stack: stack([*unstack(stacked), adapter])"
            )

    def drop_axis(_, x):
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    schema = Schema(
        {key: Wanted("the stack", f.map(drop_axis), f.rank) for key, f in members.factors.items()},
        {path: ("the stack", drop_axis("full", x)) for path, x in members.full.items()},
        base,
    )
    member = fit(single, "replace_at: adapter", schema, blank(schema))
    write = lambda members, x: jnp.asarray(members).at[index].set(x, mode="drop")  # noqa: E731
    return with_adapter(stacked, jax.tree.map(write, members, member))


def take(tree: PyTree, indices: Any) -> PyTree:
    """Select members of a stack by index, and the same members of its optimizer state.

    It is ``x[indices]`` of every leaf, except for the bases of LoraParams, which have no axis of
    members. So ``trainable, frozen, opt_state = take((trainable, frozen, opt_state), best)`` is
    successive halving.

    Args:
        tree: any tree whose leaves have a leading axis of members, with LoraParams inside.
        indices: a vector of integers, from 0, in any order, perhaps repeated. Traced ones cannot be
            refused: out of range they give NaN, the least integer, or the largest unsigned one.


    Raises:
        TypeError: ``indices`` are not integers.
        ValueError: ``indices`` are not a vector, or are empty; or the leaves have no axis of
            members, or axes of different sizes.
        IndexError: an index is negative or too large.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((4, 4))}}
        >>> many = lora_jax.many.stack([lora_jax.lorafy(params, rank) for rank in (1, 2, 3)])
        >>> lora_jax.many.take(many, [2, 0]).adapter.factors["query/kernel"].scale
        Array([ 5.3333335, 16.       ], dtype=float32)
    """
    nodes, treedef = jax.tree.flatten(tree, is_leaf=is_lora)
    stacked = [x.adapter if is_lora(x) else x for x in nodes]
    sizes: dict[int, str] = {}
    for keys, x in jax.tree_util.tree_leaves_with_path(stacked):
        name = f"leaf {keys[0].idx}{jax.tree_util.keystr(keys[1:])}"
        if not jnp.ndim(x):
            raise ValueError(
                f"take: {name} is a scalar, and has no axis of members. An optimizer's state has "
                "one if jax.vmap(tx.init) made it"
            )
        sizes.setdefault(jnp.shape(x)[0], name)
    if len(sizes) != 1:
        raise ValueError(
            f"take: expected leaves with equally many members, got {sizes or 'no leaves'}"
        )
    (size,) = sizes
    index = indices if isinstance(indices, jax.Array) else np.asarray(indices)
    if not index.size:
        raise ValueError("take: indices are empty, and a stack has at least one member")
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(
            f"take: indices have dtype {index.dtype}, expected integers; for a mask, pass "
            "numpy.flatnonzero(mask)"
        )
    if index.ndim != 1:
        raise ValueError(f"take: indices have shape {index.shape}, expected a vector")
    if is_concrete(index):
        bad = [int(k) for k in np.asarray(index) if not 0 <= k < size]
        if bad:
            raise IndexError(
                f"take: index {bad[0]} is out of range: the members are 0 to {size - 1}"
            )
        index = np.asarray(index, np.int32)  # the number of members may not fit into int8
        pick = lambda x: x[index]  # noqa: E731
    else:
        index = _in_range(index, size)
        pick = lambda x: jnp.asarray(x).at[index].get(mode="fill")  # noqa: E731
    taken = [
        replace(x, adapter=jax.tree.map(pick, x.adapter)) if is_lora(x) else pick(x) for x in nodes
    ]
    return jax.tree.unflatten(treedef, taken)


def _member_index(i: Any, size: int) -> Any:
    """Check the number of a member; replace a traced one out of range by ``size``, to be dropped.

    Raises:
        TypeError: ``i`` is not an integer.
        IndexError: ``i`` is out of range.
    """
    dtype = getattr(i, "dtype", int if type(i) is int else object)
    if getattr(i, "shape", ()) or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"replace_at: i={i!r}: expected an integer")
    if not is_concrete(i):
        return _in_range(i, size)
    if not 0 <= int(i) < size:
        raise IndexError(f"replace_at: i={int(i)}: the stack has members 0 to {size - 1}")
    return int(i)


def _in_range(index: Any, size: int) -> jax.Array:
    """Replace indices out of range by ``size``, which is no member's."""
    index = index.astype(jnp.int32) if index.dtype.itemsize < 4 else index
    return jnp.where((index >= 0) & (index < size), index, size)
