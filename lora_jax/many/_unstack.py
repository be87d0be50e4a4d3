"""Take a stack apart, and remove what :func:`stack` filled in."""

import functools
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.checks import check_single, with_adapter
from lora_jax._adapter.factors import Entry, Rows, is_concrete
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._weights.axes import is_array

Stack = TypeVar("Stack", LoraParams, Adapter)


def unstack(stacked: Stack, *, trim: bool = True) -> list[Stack]:
    """Split a stack into its adapters, and trim zeros: the inverse of :func:`stack`.

    ``trim`` removes the last entries of a rank, down to rank 1, where both ``a`` and ``b`` are
    zero, and targets whose factors and scale are zero. A fresh adapter, with only ``b`` zero, stays
    as it was. Leaves that were filled in for another adapter's ``full`` stay, as they may have
    trained. So do DoRA targets whose magnitude is no longer the base's norm, or whose norms are not
    stored.

    Args:
        stacked: from :func:`stack`, perhaps trained.
        trim: whether to remove what is zero, which depends on values.

    Returns:
        A list of LoraParams over the same base, or of Adapters.

    Raises:
        TypeError: ``stacked`` is neither a LoraParams nor an Adapter.
        ValueError: ``stacked`` is not a stack; or, with ``trim``, it is traced.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((4, 4))}}
        >>> both = lora_jax.many.stack([lora_jax.lorafy(params, rank) for rank in (1, 3)])
        >>> [f.rank for x in lora_jax.many.unstack(both) for f in x.adapter.factors.values()]
        [1, 3]
    """
    _, adapter = stack_of(stacked, "unstack")
    if trim and not all(map(is_concrete, jax.tree.leaves(adapter))):
        raise ValueError(
            "unstack: the stack is traced, and only its values tell what is padding: pass "
            "unstack(..., trim=False), or call it outside of jit"
        )
    leaves, tree = jax.tree.flatten(adapter)
    by_leaf = [jnp.unstack(x) for x in leaves]
    members = [jax.tree.unflatten(tree, xs) for xs in zip(*by_leaf, strict=True)]
    if trim:
        with jax.ensure_compile_time_eval():  # the values are concrete, even inside a trace
            used = jax.device_get({key: _used(f) for key, f in adapter.factors.items()})
        members = [_trimmed(member, n, used) for n, member in enumerate(members)]
    return [with_adapter(stacked, member) for member in members]


def stack_of(stacked: Any, verb: str) -> tuple[int, Adapter]:
    """Return the number of members of a stack, and its adapter.

    Raises:
        TypeError: ``stacked`` is neither a LoraParams nor an Adapter.
        ValueError: it is not a stack, or does not fit its base.
    """
    adapter = stacked.adapter if isinstance(stacked, LoraParams) else stacked
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"{verb}: stacked is {type(adapter).__name__}, expected what lora_jax.many.stack "
            "returns"
        )
    for key, f in adapter.factors.items():
        if not (is_array(f.scale) and len(f.scale.shape) == 1):
            seen = f"of shape {jnp.shape(f.scale)}" if is_array(f.scale) else repr(f.scale)
            raise ValueError(
                f"{verb}: this is no stack: scale of {key!r} is {seen}, expected an array [N]. "
                "lora_jax.many.stack([one, two]) makes one; lora_jax.combine puts the halves of "
                "lora_jax.split together"
            )
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(adapter)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"{verb}: this is no stack: its arrays have leading axes {sorted(sizes)}, expected one "
            "size N for all"
        )
    member = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), adapter)
    check_single(with_adapter(stacked, member), f"{verb}: a member of the stack")
    return next(iter(sizes))[0], adapter


def _used(f: Entry) -> tuple[Any, Any]:
    """Find which entries of the rank are not zero, and whether the update does anything.

    Returns:
        Flags ``[members, rank]`` and ``[members]``.
    """
    rank_axes = {"a": -1, "b": f.layout.count("b") + 1}
    factors = [jnp.moveaxis(x, rank_axes[k], 1) for k, x in f.arrays().items() if k in rank_axes]
    nonzero = [(x != 0).reshape(*x.shape[:2], -1).any(-1) for x in factors]
    entries = functools.reduce(jnp.logical_or, nonzero)
    acts = entries.any(-1) | (f.scale != 0)
    if f.magnitude is not None:
        start = jnp.sqrt(f.norm).astype(f.magnitude.dtype) if f.norm is not None else jnp.nan
        acts |= (f.magnitude != start).reshape(len(acts), -1).any(-1)
    return entries, acts


def _trimmed(member: Adapter, n: int, used: dict[str, tuple[Any, Any]]) -> Adapter:
    """Remove what is zero from member ``n`` of a stack."""
    factors = {}
    for key, f in member.factors.items():
        entries, acts = used[key]
        if not acts[n]:
            continue
        if not isinstance(f, Rows):
            r = 1 + int(np.flatnonzero(entries[n]).max(initial=0))
            axis = f.layout.count("b")
            f = replace(f, a=f.a[..., :r], b=jax.lax.slice_in_dim(f.b, 0, r, axis=axis))
        factors[key] = f
    return replace(member, factors=factors)
