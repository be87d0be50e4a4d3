"""Merge an adapter into the base, take it out again, or exchange it for another."""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax._adapter.factors import Entry, Factors, is_concrete, wide
from lora_jax._adapter.params import (
    Adapter,
    LoraParams,
    adapters_under,
    check,
    without_adapters,
)
from lora_jax._adapter.updates import check_linear
from lora_jax._transform.dora import delta_of
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.origin import Leaf
from lora_jax._weights.axes import role_axes
from lora_jax._weights.paths import PyTree, flatten
from lora_jax._weights.quantized import dequantize_array, is_coarse, is_quantized, requantize
from lora_jax._weights.ranges import Range, index_of, overlap, part_of

Update = tuple[Entry, tuple[Range, ...]]


def merge(
    lora_params: LoraParams,
    *,
    donate: bool = False,
    quantized: Literal["refuse", "dequantize", "requantize"] = "refuse",
) -> PyTree:
    """Fuse the adapter into the base: plain parameters, at no extra cost to use.

    Every adapted weight becomes::

        W' = W + scale * a b          (with DoRA, m (W + scale * a b) / |W + scale * a b|)

    The product and the sum are in the wider of float32 and ``W``'s dtype, and are rounded once to
    ``W``'s dtype. The computation is jitted. It needs the memory of one such product at a time,
    for stacked layers that of one layer. All other leaves are the base's own arrays.

    Args:
        lora_params: from ``lorafy``.
        donate: whether the merged weights take the memory of the adapted ones. The base's arrays
            are deleted then, except those that stand at several places of it.
        quantized: what to do with adapted weights that are quantized, or of 8 bits or fewer, such
            as float8. ``"refuse"`` raises; ``"dequantize"`` returns plain arrays, of float8 in
            bfloat16; ``"requantize"`` rounds the merged weights as before, so that what is smaller
            than their steps is lost, which :func:`quantization_error` measures.

    Returns:
        A tree with the structure, shapes, dtypes and shardings of the base.

    Raises:
        TypeError: ``lora_params`` is not a LoraParams; perhaps it is merged already.
        ValueError: the adapter does not fit the base, or an adapted weight is quantized.
        OverflowError: a merged weight is infinite in the dtype of the base; traced, it is not seen.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
        >>> lora_jax.merge(lora_jax.lorafy(params, rank=1))
        {'query': {'kernel': Array([[1., 1.],
               [1., 1.],
               [1., 1.]], dtype=float32)}}
    """
    if not isinstance(lora_params, LoraParams):
        raise TypeError(
            f"merge: expected a LoraParams, got {type(lora_params).__name__}: these parameters "
            "are plain, perhaps merged already"
        )
    if quantized not in ("refuse", "dequantize", "requantize"):
        raise ValueError(
            f"merge: quantized={quantized!r}: expected 'refuse', 'dequantize' or 'requantize'"
        )
    leaves = check(lora_params).leaves
    full: dict[str, Any] = {}
    updates: dict[str, list[Update]] = {}
    for adapter in (*reversed(adapters_under(lora_params)), lora_params.adapter):
        full |= adapter.full
        for key, f in adapter.factors.items():
            part = part_of(key, leaves)
            updates.setdefault(part.path, []).append((f, part.ranges))
    ids = [id(leaf) for leaf in leaves.values()]
    merged = []
    for path, leaf in leaves.items():
        own = updates.get(path, [])
        if own and is_coarse(leaf) and quantized == "refuse":
            kind = "quantized" if is_quantized(leaf) else str(leaf.dtype)
            raise ValueError(
                f"merge: {path!r} is {kind}, and its merged values do not fit its steps. Pass "
                "quantized='dequantize' for plain arrays, or 'requantize' to round them again; "
                "lora_jax.quant.quantization_error measures the loss"
            )
        is_ours = donate and path not in full and ids.count(id(leaf)) == 1
        if path in full:
            full[path] = _rounded(path, full[path], leaf)
        start = full.get(path, leaf)
        if own:
            start = _with_updates(
                path, start, own, is_plain=quantized == "dequantize", donate=is_ours
            )
        merged.append(start)
    return jax.tree.unflatten(flatten(without_adapters(lora_params))[1], merged)


def _with_updates(
    path: str, leaf: Any, updates: list[Update], *, is_plain: bool, donate: bool
) -> Any:
    """Add updates to a leaf, rounding once; a coarse one becomes plain with ``is_plain``."""
    if is_quantized(leaf):
        plain = _add(dequantize_array(leaf), updates, donate=True)
        return plain if is_plain else requantize(plain, leaf)
    if is_coarse(leaf) and is_plain:
        return _add(dequantize_array(leaf), updates, donate=True)
    if _is_short(leaf.dtype):  # it may not hold the sum
        return _rounded(path, _add(leaf.astype(jnp.float32), updates, donate=True), leaf)
    return _add(leaf, updates, donate=donate)


def _is_short(dtype: Any) -> bool:
    """Return whether numbers of usual size are beyond a dtype: float16 ends at 65504."""
    return jnp.dtype(dtype) == jnp.float16 or jnp.finfo(dtype).bits <= 8


def _rounded(path: str, x: jax.Array, like: Any) -> jax.Array:
    """Round to the dtype of a leaf, or raise if that cannot hold a number that is concrete."""
    new = x.astype(like.dtype)
    if not (jnp.issubdtype(new.dtype, jnp.floating) and _is_short(new.dtype) and is_concrete(x)):
        return new
    largest = float(jnp.finfo(new.dtype).max)
    count = int((jnp.isfinite(x) & (~jnp.isfinite(new) | (abs(x) > 1.1 * largest))).sum())
    if count:
        raise OverflowError(
            f"merge: {count} entries of {path!r} are infinite in {new.dtype}, whose largest number "
            f"is {largest:g}. Merge into a wider base: "
            "jax.tree.map(lambda x: x.astype('bfloat16'), base)"
        )
    return new


def unmerge(params: PyTree, adapter: Adapter, *, donate: bool = False) -> PyTree:
    """Take an adapter out of merged parameters: ``W = W' - scale * a b``.

    The result is exact up to one rounding in the dtype of ``W'``. To undo a merge exactly, keep the
    base, ``lora_params.base``.

    Args:
        params: merged parameters.
        adapter: the adapter that was merged.
        donate: whether the result takes the memory of the merged weights.

    Returns:
        Plain parameters; ``LoraParams(unmerge(params, adapter), adapter)`` is the split form.

    Raises:
        TypeError: ``params`` is a LoraParams, or ``adapter`` is not an Adapter.
        ValueError: the adapter does not fit; it has full leaves or DoRA, whose originals are lost;
            or a weight is quantized.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> lora_params = lora_jax.lorafy({"query": {"kernel": jnp.ones((3, 2))}}, rank=1)
        >>> params = lora_jax.merge(lora_params)
        >>> bool((lora_jax.unmerge(params, lora_params.adapter)["query"]["kernel"] == 1).all())
        True
    """
    if isinstance(params, LoraParams):
        raise TypeError("unmerge: params is a LoraParams: nothing is merged, its .base is plain")
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"unmerge: adapter is {type(adapter).__name__}, expected an Adapter such as "
            "lora_params.adapter"
        )
    _check_not_quantized("unmerge", params, adapter)
    if adapter.full:
        raise ValueError(
            f"unmerge: the adapter has full leaves ({', '.join(adapter.full)}), and merging "
            "replaced the originals. Keep the base, lora_params.base, to undo exactly"
        )
    if dora := [path for path, f in adapter.factors.items() if f.magnitude is not None]:
        raise ValueError(
            f"unmerge: {dora[0]!r} has a DoRA magnitude, and merging normalized the columns, whose "
            "norms are lost. Keep the base, lora_params.base, to undo exactly"
        )
    factors = {
        path: dataclasses.replace(f, scale=-jnp.asarray(f.scale))
        for path, f in adapter.factors.items()
    }
    return merge(LoraParams(params, Adapter(factors)), donate=donate)


def switch(params: PyTree, old: Adapter, new: Adapter, *, donate: bool = False) -> PyTree:
    """Replace the merged adapter by another: ``W' = (W - s_old a_old b_old) + s_new a_new b_new``.

    Both sums are in the wider of float32 and ``W``'s dtype, and both are rounded to ``W``'s dtype.
    The first rounding returns to the base's value, so a switch takes back most of the rounding
    error of the switch before. A single rounding of ``W - BA + B'A'`` would keep that error, and
    it would add up. After 1,000 switches around four adapters, whose updates are a tenth of the
    weight, the relative error is 0.009 in bfloat16 (0.23 with a single rounding; 0.002 after one
    merge), and 3e-6 in float32.

    Keep the base if there is room for it: ``merge(LoraParams(base, new))`` needs the memory of
    both and does not drift. Otherwise switch in float32, or only a few times. If adapters
    alternate all the time, use ``lora(fn)``, which merges none.

    Args:
        params: merged parameters.
        old: the adapter that is merged in them.
        new: the adapter to merge instead; it may change other weights.
        donate: whether the new weights take the memory of the ones that change.

    Returns:
        Plain parameters with the structure, shapes, dtypes and shardings of ``params``.

    Raises:
        TypeError: ``params`` is a LoraParams, or an adapter is not an Adapter.
        ValueError: an adapter does not fit, or cannot be taken out again: it has full leaves or
            DoRA, or belongs to the residual base that its initializer left.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> x = lora_jax.Adapter(
        ...     {"w": lora_jax.Factors(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, "io")}
        ... )
        >>> params = lora_jax.merge(lora_jax.LoraParams({"w": jnp.zeros((2, 2))}, x))
        >>> lora_jax.switch(params, x, 3 * x)
        {'w': Array([[3., 3.],
               [3., 3.]], dtype=float32)}
    """
    if isinstance(params, LoraParams):
        raise TypeError("switch: params is a LoraParams: nothing is merged, replace its .adapter")
    for name, adapter in (("old", old), ("new", new)):
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"switch: {name} is {type(adapter).__name__}, expected an Adapter such as "
                "lora_params.adapter"
            )
        if adapter.full:
            raise ValueError(
                f"switch: {name} has full leaves ({', '.join(adapter.full)}), and merging replaces "
                "the originals. Keep the base: merge(LoraParams(base, new))"
            )
        _check_not_quantized("switch", params, adapter)
        for key, f in adapter.factors.items():
            check_linear("switch", key, f)
    before, after = (check(LoraParams(params, x)).parts for x in (old, new))
    plain = unmerge(params, old, donate=donate)
    # The rounding in between must stay: within one program, XLA would remove the two casts.
    plain = jax.tree.map(lambda x: x if is_concrete(x) else lax.optimization_barrier(x), plain)
    ours = {part.path for part in before.values()}
    again, others = {}, {}
    for key, f in new.factors.items():
        (again if after[key].path in ours else others)[key] = f
    # This overwrites what unmerge made; under vmap that is not ours to donate.
    is_own = all(map(is_concrete, jax.tree.leaves((plain, again))))
    result = merge(LoraParams(plain, Adapter(again)), donate=is_own)
    return merge(LoraParams(result, Adapter(others)), donate=donate)


def _check_not_quantized(verb: str, params: PyTree, adapter: Adapter) -> None:
    leaves = flatten(params)[0]
    for path in (part_of(key, leaves).path for key in adapter.factors):
        if is_coarse(leaves.get(path)):
            raise ValueError(
                f"{verb}: {path!r} is quantized, or of 8 bits, and would be rounded again each "
                "time: pass plain parameters, lora_jax.quant.dequantize(params), or keep the base "
                "and merge from it"
            )


def _add(w: Any, updates: list[Update], *, donate: bool) -> jax.Array:
    sharding = getattr(w, "sharding", None) if is_concrete(w) else None
    if not isinstance(sharding, NamedSharding):
        sharding = None

    # A loop over the layers keeps one product in memory. Over an axis that is spread over devices,
    # it would gather that axis.
    def is_looped(factors):
        batch = role_axes(factors.layout, "b")
        return bool(batch) and not (
            sharding and any(sharding.spec[i] for i in batch if i < len(sharding.spec))
        )

    static = tuple((is_looped(factors), ranges) for factors, ranges in updates)
    return _jitted(sharding, donate)(w, [factors for factors, _ in updates], static)


@functools.lru_cache(maxsize=256)
def _jitted(sharding: NamedSharding | None, donate: bool):
    return jax.jit(
        _merged_parts,
        static_argnames="static",
        donate_argnums=(0,) if donate else (),
        out_shardings=sharding,
    )


def _merged_parts(w: jax.Array, factors: list[Factors], static: Any) -> jax.Array:
    """Add updates, in at least float32 between those that overlap; round once."""
    dtype, ranges = w.dtype, [ranges for _, ranges in static]
    if any(overlap(x, y) for x, y in itertools.combinations(ranges, 2)):
        w = w.astype(wide(dtype))
    for f, (loop, ranges) in zip(factors, static, strict=True):
        if not ranges:
            w = _merged(w, f, loop)
            continue
        slices = index_of(ranges, w.ndim)
        start = [s.start or 0 for s in slices]
        stop = [s.stop or size for s, size in zip(slices, w.shape, strict=True)]
        part = _merged(lax.slice(w, start, stop), f, loop)
        w = lax.dynamic_update_slice(w, part, start)
    return w.astype(dtype)


def _merged(w: jax.Array, factors: Factors, loop: bool) -> jax.Array:
    """Return ``W + scale * a b``, times its gain; with ``loop``, one batch index at a time."""
    if not loop:
        return LoraArray(w, (delta_of(factors, Leaf(0, ""), (), w),)).dense()
    axes = role_axes(factors.layout, "b")
    sizes = [w.shape[i] for i in axes]
    inner = [1 if i in axes else size for i, size in enumerate(w.shape)]

    def body(k, w):
        index = jnp.unravel_index(k, sizes)
        start = [jnp.zeros_like(k)] * w.ndim
        for axis, i in zip(axes, index, strict=True):
            start[axis] = i
        piece = lax.dynamic_slice(w, start, inner)

        def slice_at_index(name, x):
            if name == "scale":
                return x
            zeros = [jnp.zeros_like(k)] * (x.ndim - len(axes))
            return lax.dynamic_slice(x, [*index, *zeros], [*[1] * len(axes), *x.shape[len(axes) :]])

        piece = _merged(piece, factors.map(slice_at_index), loop=False)
        return lax.dynamic_update_slice(w, piece, start)

    return lax.fori_loop(0, math.prod(sizes), body, w)
