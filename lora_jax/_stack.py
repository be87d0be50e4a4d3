"""Stacks of adapters over one base: every array of the adapter has a leading axis, of adapters.

A stack goes through ``jax.vmap`` with ``in_axes=LoraParams(base=None, adapter=0)``. Whatever an
adapter lacks beside others is zeros in ``a`` *and* in ``b``: a saddle, where no gradient is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._layout import is_array
from lora_jax._params import Adapter, Factors, LoraParams, is_concrete
from lora_jax._paths import PyTree, flatten
from lora_jax._ranges import rows_of
from lora_jax._rows import (
    Slot,
    Slots,
    check_parts,
    check_same_base,
    check_single,
    fitted,
    with_adapter,
)

Stack = TypeVar("Stack", LoraParams, Adapter)


def stack(adapters: Sequence[Stack], rank: int | None = None) -> Stack:
    """Stack adapters of one base, of any ranks, alphas and targets.

    Every array of the adapter gets a leading axis, one row an adapter, in the order given::

        a [N, *batch, *in, r]    b [N, *batch, r, *out]    scale [N]

    and ``jax.vmap(lora_jax.lora(fn), in_axes=(LoraParams(base=None, adapter=0), ...))`` runs all of
    them in one program, in which a weight of the base meets the inputs of all in one product.

    Ranks are filled up with zeros in both factors, and a target that an adapter lacks has zero
    factors and scale 0. Such an entry never has a gradient, so whatever moves entries by their
    gradients (SGD, Adam, AdamW, Lion, clipping by the global norm) leaves it zero, and training the
    stack is training each on its own; a mean over entries, such as Adafactor's, counts the zeros.
    What cannot be zero is as the base has it and trains along: leaves that others train whole,
    and the magnitudes of others' DoRA.

    Args:
        adapters: LoraParams over the very same arrays; or Adapters, all of one base.
        rank: of all factors, so that adapters up to it can come in later by :func:`replace_at`;
            None: at each weight the largest there. Rows that train on their own keep theirs.

    Returns:
        A LoraParams of that base, or an Adapter. Traced adapters cannot be refused for NaNs
        or infinities: such a one has factors of zero and scales of NaN, so that its own results
        are NaN, and no product over all rows can carry that to another. The rest of it stays.

    Raises:
        TypeError: these are no adapters, or of both kinds.
        ValueError: there are none; they differ in base, layout, dtype, or what is static; parts of
            a weight overlap; ``rank`` is too small; values are not finite; or what an adapter lacks
            cannot be filled in without the base.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((3, 2))}, "value": {"kernel": jnp.ones((3, 2))}}
        >>> first = lora_jax.lorafy(params, rank=2)
        >>> second = lora_jax.lorafy(params, rank=1, targets="value/kernel")
        >>> both = lora_jax.stack([first, second])
        >>> both.adapter.factors["query/kernel"].a.shape
        (2, 3, 2)
        >>> apply = lora_jax.lora(lambda p, x: (x @ p["query"]["kernel"], x @ p["value"]["kernel"]))
        >>> axes = lora_jax.LoraParams(base=None, adapter=0)
        >>> queries, values = jax.vmap(apply, in_axes=(axes, None))(both, jnp.ones((1, 3)))
        >>> values.shape
        (2, 1, 2)
    """
    if isinstance(adapters, LoraParams | Adapter | str) or not isinstance(adapters, Iterable):
        raise TypeError(
            f"stack: adapters is {type(adapters).__name__}, expected a sequence: stack([one, two])"
        )
    adapters = list(adapters)
    if not adapters:
        raise ValueError("stack: there are no adapters: expected at least one")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int | np.integer)):
        raise TypeError(f"stack: rank={rank!r}: expected an int, or None")
    first = adapters[0]
    singles: dict[str, Adapter] = {}
    for n, x in enumerate(adapters):
        singles[f"adapters[{n}]"] = check_single(x, f"stack: adapters[{n}]")
        if type(x) is not type(first):
            raise TypeError(
                f"stack: adapters[0] is {type(first).__name__} and adapters[{n}] "
                f"{type(x).__name__}: pass LoraParams only, or Adapters only"
            )
    base, leaves = None, None
    if isinstance(first, LoraParams):
        base, leaves = first.base, flatten(first.base)[0]
        is_residual = any(f.residual for x in singles.values() for f in x.factors.values())
        for n, x in enumerate(adapters):
            names = f"stack: adapters[0] and adapters[{n}]"
            check_same_base(base, _base(x), names, is_residual)
    check_parts([*singles.values()], [*singles], leaves)
    full: dict[str, tuple[str, Any]] = {}
    for name, x in singles.items():
        for path, leaf in x.full.items():
            full.setdefault(path, (name, leaf))
    slots = Slots(_slots(singles, rank, leaves is not None), full, base, leaves)
    rows = [fitted(x, f"stack: {name}", slots) for name, x in singles.items()]
    return with_adapter(first, jax.tree.map(lambda *rows: jnp.stack(rows), *rows))


def unstack(stacked: Stack, *, trim: bool = True) -> list[Stack]:
    """Take a stack apart: the inverse of :func:`stack`, up to what was filled in.

    With ``trim`` the last entries of a rank where both ``a`` and ``b`` are zero are taken away,
    down to rank 1, and so are targets whose factors and scale are zero. A fresh adapter, with only
    ``b`` zero, is as it was. Leaves that were filled in for another adapter's ``full`` stay, as
    they may have trained; and so does a DoRA target whose magnitude is not the base's norm any
    more, or whose norms are not stored.

    Args:
        stacked: from :func:`stack`, perhaps trained.
        trim: whether to take away what is zero; that looks at values.

    Returns:
        A list of LoraParams over the same base, or of Adapters.

    Raises:
        TypeError: ``stacked`` is neither.
        ValueError: it is no stack; or, with ``trim``, it is traced.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((4, 4))}}
        >>> both = lora_jax.stack([lora_jax.lorafy(params, rank) for rank in (1, 3)])
        >>> [f.rank for x in lora_jax.unstack(both) for f in x.adapter.factors.values()]
        [1, 3]
    """
    _, adapter = _rows_of(stacked, "unstack")
    if trim and not all(map(is_concrete, jax.tree.leaves(adapter))):
        raise ValueError(
            "unstack: the stack is traced, and what is padding is told by its values: "
            "unstack(..., trim=False), or outside of jit"
        )
    leaves, tree = jax.tree.flatten(adapter)
    columns = [jnp.unstack(x) for x in leaves]
    rows = [jax.tree.unflatten(tree, row) for row in zip(*columns, strict=True)]
    if trim:
        with jax.ensure_compile_time_eval():  # the values are there, also inside of a trace
            used = jax.device_get({key: _used(f) for key, f in adapter.factors.items()})
        rows = [_trimmed(row, n, used) for n, row in enumerate(rows)]
    return [with_adapter(stacked, row) for row in rows]


def replace_at(stacked: Stack, i: Any, adapter: LoraParams | Adapter) -> Stack:
    """Return the stack with another adapter in row ``i``, padded to the stack's rank.

    The shapes stay, and so does the program: under ``jax.jit``, with ``i`` an array, one compiled
    function replaces any row by any adapter of the same shapes, and whatever runs on the stack is
    not compiled anew. Pass Adapters there (``stacked.adapter``), and donate the stack::

        put = jax.jit(lora_jax.replace_at, donate_argnums=0)

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
        >>> both = lora_jax.stack([lora_jax.lorafy(params, rank) for rank in (1, 3)])
        >>> both = lora_jax.replace_at(both, 0, lora_jax.lorafy(params, 2, alpha=6))
        >>> both.adapter.factors["query/kernel"].scale
        Array([3.       , 5.3333335], dtype=float32)
    """
    size, rows = _rows_of(stacked, "replace_at")
    index = _row(i, size)
    base, leaves = None, None
    if isinstance(stacked, LoraParams):
        base, leaves = stacked.base, flatten(stacked.base)[0]
        if isinstance(adapter, Adapter):
            adapter = LoraParams(base, adapter)
    elif isinstance(adapter, LoraParams):
        raise TypeError(
            "replace_at: the stack is an Adapter and adapter a LoraParams: pass its .adapter"
        )
    single = check_single(adapter, "replace_at: adapter")
    if isinstance(adapter, LoraParams):
        is_residual = any(f.residual for f in single.factors.values())
        check_same_base(base, adapter.base, "replace_at: adapter and the stack", is_residual)
    for kind in ("factors", "full"):
        more = getattr(single, kind).keys() - getattr(rows, kind).keys()
        if more:
            raise ValueError(
                f"replace_at: the stack has nothing in {kind} for {', '.join(sorted(more))}, which "
                "the adapter has. Stack them anew: stack([*unstack(stacked), adapter])"
            )

    def like(_, x):
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    slots = Slots(
        {key: Slot("the stack", f.mapped(like), f.rank) for key, f in rows.factors.items()},
        {path: ("the stack", like("full", x)) for path, x in rows.full.items()},
        base,
        leaves,
    )
    row = fitted(single, "replace_at: adapter", slots)
    put = lambda rows, x: jnp.asarray(rows).at[index].set(x, mode="drop")  # noqa: E731
    return with_adapter(stacked, jax.tree.map(put, rows, row))


def take(tree: PyTree, indices: Any) -> PyTree:
    """Return some rows of a stack and of all that goes along with it, such as moments.

    ``x[indices]`` of every leaf, but for the bases of LoraParams, which have no rows. So successive
    halving is ``trainable, frozen, opt_state = take((trainable, frozen, opt_state), best)``.

    Args:
        tree: any tree whose leaves have a leading axis of adapters, with LoraParams inside.
        indices: a vector of integers, from 0, in any order, perhaps repeated. Those that are
            traced cannot be refused: out of range they give NaN, or the least integer.

    Raises:
        TypeError: ``indices`` are not integers.
        ValueError: ``indices`` are no vector, or the leaves have no rows, or not equally many.
        IndexError: an index is out of range; negative ones are.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((4, 4))}}
        >>> many = lora_jax.stack([lora_jax.lorafy(params, rank) for rank in (1, 2, 3)])
        >>> lora_jax.take(many, [2, 0]).adapter.factors["query/kernel"].scale
        Array([ 5.3333335, 16.       ], dtype=float32)
    """
    is_lora = lambda x: isinstance(x, LoraParams)  # noqa: E731
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
        one = lambda x: x[index]  # noqa: E731
    else:
        index = _in_range(index, size)
        one = lambda x: jnp.asarray(x).at[index].get(mode="fill")  # noqa: E731
    taken = [
        replace(x, adapter=jax.tree.map(one, x.adapter)) if is_lora(x) else one(x) for x in nodes
    ]
    return jax.tree.unflatten(treedef, taken)


def _slots(singles: dict[str, Adapter], rank: int | None, has_base: bool) -> dict[str, Slot]:
    """All keys of any adapter: as the first has it that has it, with the largest rank."""
    enough = any if has_base else all  # norms that are missing are found, or else at every call
    slots: dict[str, Slot] = {}
    for key in dict.fromkeys(key for x in singles.values() for key in x.factors):
        has = {name: x.factors[key] for name, x in singles.items() if key in x.factors}
        (owner, f), *_ = has.items()
        largest = max(has, key=lambda name: has[name].rank)
        r = has[largest].rank
        if rank is not None and rows_of(key) is None:
            if rank < r:
                raise ValueError(
                    f"stack: rank={rank}, and {largest} has rank {r} at {key!r}: expected at least "
                    f"the largest; or shrink it, lora_jax.resize(adapter, {rank})"
                )
            r = int(rank)
        norms = [f.norm for f in has.values()]
        norm = next(filter(is_array, norms)) if enough(map(is_array, norms)) else None
        slots[key] = Slot(owner, replace(f, norm=norm), r)
    return slots


def _rows_of(stacked: Any, verb: str) -> tuple[int, Adapter]:
    """How many rows a stack has, and its adapter.

    Raises:
        TypeError: it is neither a LoraParams nor an Adapter.
        ValueError: it is no stack, or of another base.
    """
    adapter = stacked.adapter if isinstance(stacked, LoraParams) else stacked
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"{verb}: stacked is {type(adapter).__name__}, expected what lora_jax.stack returns"
        )
    for key, f in adapter.factors.items():
        if not (is_array(f.scale) and len(f.scale.shape) == 1):
            seen = f"of shape {jnp.shape(f.scale)}" if is_array(f.scale) else repr(f.scale)
            raise ValueError(
                f"{verb}: this is no stack: scale of {key!r} is {seen}, expected an array [N]. "
                "lora_jax.stack([one, two]) makes one; halves of lora_jax.split are put together "
                "by lora_jax.combine"
            )
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(adapter)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"{verb}: this is no stack: its arrays have leading axes {sorted(sizes)}, expected one "
            "size N for all"
        )
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), adapter)
    check_single(with_adapter(stacked, row), f"{verb}: a row of the stack")
    return next(iter(sizes))[0], adapter


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


def _used(f: Factors) -> tuple[Any, Any]:
    """Of every row: which entries of the rank are not zero, and whether it does anything."""
    n = f.layout.count("b")
    a, b = jnp.moveaxis(f.a, -1, 1), jnp.moveaxis(f.b, n + 1, 1)
    entries = [(x != 0).reshape(*x.shape[:2], -1).any(-1) for x in (a, b)]
    entries = entries[0] | entries[1]  # [N, r]
    acts = entries.any(-1) | (f.scale != 0)
    if f.magnitude is not None:
        start = jnp.sqrt(f.norm).astype(f.magnitude.dtype) if f.norm is not None else jnp.nan
        acts |= (f.magnitude != start).reshape(len(acts), -1).any(-1)
    return entries, acts


def _trimmed(row: Adapter, n: int, used: dict[str, tuple[Any, Any]]) -> Adapter:
    factors = {}
    for key, f in row.factors.items():
        entries, acts = used[key]
        if not acts[n]:
            continue
        if rows_of(key) is None:
            r = 1 + int(np.flatnonzero(entries[n]).max(initial=0))
            axis = f.layout.count("b")
            f = replace(f, a=f.a[..., :r], b=jax.lax.slice_in_dim(f.b, 0, r, axis=axis))
        factors[key] = f
    return replace(row, factors=factors)


def _base(x: LoraParams | Adapter) -> PyTree:
    return x.base if isinstance(x, LoraParams) else None
