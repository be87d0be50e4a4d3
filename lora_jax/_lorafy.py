"""``lorafy``: split a parameter tree into a frozen base and trainable factors."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax._init import fold_in_path, gaussian
from lora_jax._layout import (
    check_layout,
    conventional,
    factor_shapes,
    is_array,
    max_rank,
    not_trainable,
    role_shape,
    why_not,
)
from lora_jax._params import Adapter, Factors, LoraParams, wide
from lora_jax._paths import PyTree, flatten, nearest
from lora_jax._select import Selector, check_patterns, lookup, select, select_query_value


def lorafy(
    params: PyTree,
    rank: int | Mapping[str, int] = 8,
    *,
    alpha: float | Mapping[str, float] = 16.0,
    targets: Selector = None,
    exclude: Selector = None,
    full: Selector = None,
    layout: Mapping[str, str] | None = None,
    key: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LoraParams:
    """Split ``params`` into a frozen base and trainable low-rank factors.

    For each target weight ``W[in, out]``::

        W x  becomes  W x + (alpha / rank) * B A x,   A ~ N(0, 1/in),  B = 0

    so that the adapted model starts as the base model. Pure: the same factors to the bit in
    every process, eager or under ``jit``, and different ones for every path. The base holds the
    very same arrays as ``params``, in the same containers.

    A selector (``targets``, ``exclude``, ``full``) is a regular expression matched in full
    against paths such as ``layers_0/attn/query/kernel``; ``"all-linear"`` (every weight that can
    take a LoRA, but for embeddings and the output head); a callable ``(path, leaf) -> bool``; or
    a list of those. Where they overlap, ``exclude`` wins over ``full``, and ``full`` over
    ``targets``.

    Args:
        params: any pytree of arrays: nested dicts, FrozenDicts, lists, dataclasses, boxed Linen
            metadata, ``nnx.State``; with or without a top-level ``"params"``.
        rank: the rank of the update, from 1 to ``min(in, out)``; or ``{pattern: rank}``, where
            the first pattern that matches a path counts.
        alpha: the update is scaled by ``alpha / rank``; a number, or ``{pattern: alpha}``.
        targets: which weights get factors; None: query and value projections, by the field's
            names for them. A callable may return a rank. ``[]`` is legal where ``full`` is given.
        exclude: leaves to keep from ``targets`` and ``full``.
        full: leaves to train whole (heads, biases, norms): copied to float32 masters.
        layout: ``{pattern: letters}``, one letter an axis (``b`` batch, ``i`` in, ``o`` out), for
            weights whose axes Flax's conventions do not tell.
        key: a PRNG key; None is ``jax.random.key(0)``.
        dtype: of the factors; a float32 master serves a base of any dtype.

    Returns:
        ``LoraParams(base, adapter)``: ``a`` has shape ``[*batch, *in, rank]``, ``b``
        ``[*batch, rank, *out]``.

    Raises:
        ValueError: a pattern selects nothing, a rank or alpha is out of range, an axis layout is
            ambiguous, or two targets are one array.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
        >>> lora_params = lora_jax.lorafy(params, rank=4)
        >>> lora_params
        LoraParams(1 adapted weights, 0 trained whole; trainable params: 384 || all params: 2,464 || trainable%: 15.6)
        >>> lora_params.adapter.factors["query/kernel"].a.shape
        (64, 4)

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """  # noqa: E501
    if isinstance(params, LoraParams):
        raise TypeError("lorafy: params is already a LoraParams; pass its .base to start anew")
    leaves = {path: x for path, x in flatten(params)[0].items() if is_array(x)}
    if not leaves:
        raise ValueError(f"lorafy: params has no arrays (got {type(params).__name__} {params!r})")
    layout = {} if layout is None else layout
    if not isinstance(layout, Mapping):
        raise TypeError(f"layout={layout!r}: expected a mapping such as {{'.*/kernel': 'io'}}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype!r}: factors need a real floating type such as float32")
    check_patterns(layout, "layout", leaves)

    chosen, whole = _choose(leaves, targets, exclude, full, layout)
    check_patterns(rank, "rank", chosen)
    check_patterns(alpha, "alpha", chosen)
    _check_distinct({path: leaves[path] for path in chosen})
    key = jax.random.key(0) if key is None else key
    factors = {}
    for path, answer in chosen.items():
        leaf = leaves[path]
        letters = lookup(layout, path, "layout") or conventional(path, leaf, leaves)
        letters = check_layout(letters, path, len(leaf.shape))
        r = lookup(rank, path, "rank") if answer is True else answer
        r = _check_rank(r, path, letters, leaf.shape)
        scale = _check_alpha(lookup(alpha, path, "alpha"), path) / r
        a_shape, b_shape = factor_shapes(letters, leaf.shape, r)
        fan_in = math.prod(role_shape(letters, leaf.shape, "i"))
        factors[path] = Factors(
            a=gaussian(fold_in_path(key, path), a_shape, fan_in, dtype),
            b=jnp.zeros(b_shape, dtype),
            scale=jnp.asarray(scale, jnp.float32),
            layout=letters,
        )
    return LoraParams(params, Adapter(factors, {path: master(leaves[path]) for path in whole}))


def master(leaf: Any) -> jax.Array:
    """A copy to train whole, at least float32: a copy, so that donating it spares the base."""
    return jnp.array(leaf, dtype=wide(leaf.dtype), copy=True)


def _choose(
    leaves: Mapping[str, Any],
    targets: Selector,
    exclude: Selector,
    full: Selector,
    layout: Mapping[str, str],
) -> tuple[dict[str, bool | int], list[str]]:
    """The paths to adapt, with the selector's answers, and the paths to train whole."""
    fixed = {path: reason for path, leaf in leaves.items() if (reason := not_trainable(leaf))}
    if exclude is not None:
        fixed |= dict.fromkeys(select(exclude, leaves, {}, "exclude"), f"{exclude=}")
    whole = [] if full is None else list(select(full, leaves, fixed, "full"))

    blocked = {
        path: reason
        for path, leaf in leaves.items()
        if (reason := why_not(path, leaf)) and not lookup(layout, path, "layout", "")
    }
    blocked |= fixed | dict.fromkeys(whole, f"trained whole, {full=}")
    if targets is None:
        chosen = {p: x for p, x in select_query_value(leaves).items() if p not in blocked}
    else:
        chosen = select(targets, leaves, blocked, "targets")
    if not chosen and not whole:
        raise ValueError(
            f"lorafy: nothing to train: targets={targets!r}, exclude={exclude!r}, full={full!r} "
            f"leave no leaf. Leaves: {nearest('', leaves)}"
        )
    return {path: chosen[path] for path in leaves if path in chosen}, whole


def _check_distinct(targets: Mapping[str, Any]) -> None:
    seen: dict[int, str] = {}
    for path, leaf in targets.items():
        if (first := seen.setdefault(id(leaf), path)) != path:
            raise ValueError(
                f"targets: {first!r} and {path!r} are one and the same array. Two independent "
                f"updates of a tied weight would untie it: exclude={path!r}, or copy the array"
            )


def _check_rank(rank: Any, path: str, layout: str, shape: tuple[int, ...]) -> int:
    if rank is None:
        raise ValueError(f"rank: no pattern of the mapping matches {path!r}; end with '.*'")
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"rank={rank!r} for {path!r}: expected an int")
    limit = max_rank(layout, shape)
    if not 1 <= rank <= limit:
        raise ValueError(
            f"rank={rank} for {path!r} of shape {shape} (layout {layout!r}): expected 1 to "
            f"min(in, out) = {limit}, at which a LoRA can express any update"
        )
    return int(rank)


def _check_alpha(alpha: Any, path: str) -> float:
    if alpha is None:
        raise ValueError(f"alpha: no pattern of the mapping matches {path!r}; end with '.*'")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | np.integer | np.floating):
        raise TypeError(f"alpha={alpha!r} for {path!r}: expected a number")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"alpha={alpha} for {path!r}: expected a finite number > 0, since the update is scaled "
            "by alpha / rank; to switch an adapter off, call the function on lora_params.base"
        )
    return float(alpha)
