"""``lora_rows(fn)``: the same function, with an adapter per batch row."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import is_concrete
from lora_jax._adapter.params import Adapter, LoraParams, is_lora
from lora_jax._transform.call import enter, is_traced
from lora_jax._transform.context import OnMaterialize, Policy
from lora_jax._transform.lora import check_function, marked, run_lora
from lora_jax._transform.pick import Slot

_WANTS = "such as lora_jax.many.stack([...]) returns"


def lora_rows(
    fn: Callable[..., Any],
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    on_materialize: OnMaterialize = "error",
) -> Callable[..., Any]:
    """Transform ``fn`` so that each batch row uses its own adapter of a stack.

    The returned function takes the arguments of ``fn``, with a LoraParams whose adapter is a stack,
    and ``lora_ids``, the number of a member per batch row. For row ``n`` it computes::

        x[n] W + scale[lora_ids[n]] * (x[n] a[lora_ids[n]]) b[lora_ids[n]]

    and for rows of id -1 the base alone. The rows meet ``W`` in one product; each row's factors are
    gathered where they are used, a layer at a time. ``fn`` sees one row at a time, as a batch of
    one, so the result of a row cannot depend on the others. Compiled once, it serves any mix of
    adapters, and other adapters in their places.

    Args:
        fn: a pure function of arrays in pytrees, of any batch size.
        in_axes: the axis of the rows in each argument, as in ``jax.vmap``: a number for all
            arguments, or one number or tree of numbers per argument; None for arguments that all
            rows share. Arguments by name have it first. An entry for a LoraParams is ignored.
        out_axes: the axis of the rows in the results.
        on_materialize: as in :func:`lora`.

    Raises:
        TypeError: ``fn`` is not callable, or ``lora_ids`` are not integers.
        ValueError: ``fn`` has an argument ``lora_ids``. At the call: the adapter is no stack; an
            array has another number of rows; a result has no axis of rows; or as :func:`lora`.
        IndexError: at the call: an id is neither -1 nor a member's. If ids are traced, such a row
            has NaN wherever its adapter would have changed something.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> one = lora_jax.lorafy({"query": {"kernel": jnp.ones((3, 2))}}, rank=1)
        >>> stacked = lora_jax.many.stack([one, one])
        >>> apply = lora_jax.many.lora_rows(lambda p, x: x @ p["query"]["kernel"])
        >>> apply(stacked, jnp.ones((2, 3)), lora_ids=jnp.array([1, -1]))
        Array([[3., 3.],
               [3., 3.]], dtype=float32)

    References:
        Chen et al., Punica: Multi-Tenant LoRA Serving, arXiv:2310.18547.
    """
    check_function(fn, "lora_rows", "lora_ids", on_materialize)

    @functools.wraps(fn)
    def rows_fn(*args, lora_ids, **kwargs):
        axes = in_axes if isinstance(in_axes, tuple | list) else (in_axes,) * len(args)
        if len(axes) != len(args):
            raise ValueError(
                f"lora_rows: in_axes has {len(axes)} entries for {len(args)} arguments"
            )
        axes = jax.tree.map(lambda x: None if is_lora(x) else x, axes, is_leaf=is_lora)
        found, tree = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_lora)
        leaves = [x for _, x in found]
        flat = _spread((tuple(axes), dict.fromkeys(kwargs, 0)), (args, kwargs))
        ids = _check_ids(lora_ids, leaves)
        mapped = {i: axis for i, axis in enumerate(flat) if axis is not None}
        _check_rows(
            {jax.tree_util.keystr(found[i][0][1:]): (leaves[i], mapped[i]) for i in mapped},
            ids.shape[0],
        )

        def one(slot, arrays):
            own = {i: jnp.expand_dims(x, mapped[i]) for i, x in arrays.items()}
            own_args, own_kwargs = tree.unflatten([own.get(i, x) for i, x in enumerate(leaves)])
            member = functools.partial(enter, pick=Slot(slot))
            found = run_lora(Policy(on_materialize), fn, own_args, own_kwargs, member)
            return _squeezed(found, out_axes)

        arrays = {i: leaves[i] for i in mapped}
        return jax.vmap(one, in_axes=(0, mapped), out_axes=out_axes)(ids, arrays)

    return marked(rows_fn)


def _is_axis(x: Any) -> bool:
    return x is None or isinstance(x, int)


def _spread(axes: Any, tree: Any) -> list[int | None]:
    """Return the axis of the rows for each leaf, given a prefix of the tree; None without rows."""

    def axis_of(axis: int | None, part: Any) -> Any:
        leaves = jax.tree.leaves(part, is_leaf=is_lora)
        return [axis if is_traced(x) and not is_lora(x) else None for x in leaves]

    found = jax.tree.map(axis_of, axes, tree, is_leaf=_is_axis)
    return jax.tree.leaves(found, is_leaf=_is_axis)


def _check_ids(ids: Any, leaves: list[Any]) -> jax.Array:
    """Check the ids and the stack; return the ids in int32, -2 for those that do not exist."""
    if not any(map(is_lora, leaves)):
        raise ValueError(
            f"lora_rows: there is no LoraParams among the arguments. Pass a stack, {_WANTS}"
        )
    counts = {k: x for node in leaves if is_lora(node) for k, x in _counts(node).items()}
    if () in counts.values() or len(set(counts.values())) > 1:
        shown = ", ".join(f"{k!r}: {c[0] if c else 'none'}" for k, c in list(counts.items())[:5])
        raise ValueError(
            f"lora_rows: expected a stack of adapters, {_WANTS}: all entries with one number of "
            f"adapters in front. They have {shown}"
        )
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    count = min(counts.values(), default=(2**31 - 1,))[0]
    if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim != 1:
        raise TypeError(
            f"lora_ids has dtype {ids.dtype} and shape {ids.shape}, expected integers [rows]: "
            "the number of each row's adapter in the stack, -1 for none"
        )
    if is_concrete(ids) and (wrong := [k for k in np.asarray(ids).tolist() if not -1 <= k < count]):
        raise IndexError(
            f"lora_ids has {wrong[0]}, expected -1, for the base alone, to {count - 1}: the "
            f"stack has {count} adapters"
        )
    # in int32: -1 and the number of adapters may not fit into the dtype of the ids
    ids = jnp.asarray(ids)
    known = jnp.iinfo(ids.dtype)
    is_there = (ids >= 0) & (ids <= min(count - 1, known.max))
    is_none = ids == -1 if known.min < 0 else jnp.zeros_like(is_there)
    other = jnp.where(is_none, jnp.int32(-1), jnp.int32(-2))
    return jnp.where(is_there, ids.astype(jnp.int32), other)


def _counts(lora_params: LoraParams) -> dict[str, tuple[int, ...]]:
    """Return the number of adapters by each entry of a stack, ``()`` where it has none."""
    adapter = lora_params.adapter
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"lora_rows: LoraParams.adapter is {type(adapter).__name__}, expected an Adapter that "
            f"is a stack, {_WANTS}"
        )
    counts = {key: jnp.shape(f.scale) for key, f in adapter.factors.items()}
    return counts | {path: jnp.shape(x)[:1] for path, x in adapter.full.items()}


def _check_rows(mapped: dict[str, tuple[Any, int]], count: int) -> None:
    for name, (x, axis) in mapped.items():
        shape = jnp.shape(x)
        if not -len(shape) <= axis < len(shape) or shape[axis] != count:
            raise ValueError(
                f"lora_rows: argument {name} has shape {shape}, expected {count} rows along axis "
                f"{axis}, one for each of lora_ids. Give the axis by in_axes=, None for arguments "
                "that all rows share: pass those by position, as arguments by name have rows"
            )


def _squeezed(found: Any, out_axes: Any) -> Any:
    """Drop the axis of the rows from the results of a batch of one."""

    def squeeze(axis: int | None, part: Any) -> Any:
        return part if axis is None else jax.tree.map(lambda x: one(axis, x), part)

    def one(axis: int, x: jax.Array) -> jax.Array:
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != 1:
            raise ValueError(
                f"lora_rows: for one row the function returns an array of shape {x.shape}, which "
                f"has no axis {axis} of size 1. Return results with an axis for the rows, and give "
                "it by out_axes="
            )
        return jnp.squeeze(x, axis)

    return jax.tree.map(squeeze, out_axes, found, is_leaf=_is_axis)
