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
    Layouts,
    check_layout,
    conventional,
    factor_shapes,
    is_array,
    is_embedding,
    is_head,
    max_rank,
    not_trainable,
    role_shape,
    why_not,
)
from lora_jax._params import Adapter, Factors, LoraParams, wide
from lora_jax._paths import PyTree, flatten, nearest
from lora_jax._ranges import entry, overlap, part_shape
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

    so that the adapted model starts as the base model. (A lookup reads one row, so for embedding
    tables ``A ~ N(0, 1)``.) Pure: the same factors to the bit in
    every process, eager or under ``jit``, and different ones for every path. The base holds the
    very same arrays as ``params``, in the same containers.

    A selector (``targets``, ``exclude``, ``full``) is a regular expression matched in full
    against paths such as ``layers_0/attn/query/kernel``; ``"all-linear"`` (every weight that can
    take a LoRA, but for embeddings, the output head by its usual names, and, by a discovered
    layout, vectors stored ``[n, 1]``); a callable ``(path, leaf) -> bool``; or
    a list of those. Where they overlap, ``exclude`` wins over ``full``, and ``full`` over
    ``targets``. A target may be a part of a weight, a range after a regular expression, such as
    the query columns of a fused kernel: ``".*c_attn/kernel[:, 0:768]"``; the rest stays as it is.

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
        layout: what :func:`layout_of` found for the function, which then needs no names; or
            ``{pattern: letters}``, one letter an axis (``b`` batch, ``i`` in, ``o`` out), for
            weights whose axes Flax's conventions do not tell.
        key: a PRNG key; None is ``jax.random.key(0)``.
        dtype: of the factors; a float32 master serves a base of any dtype.

    Returns:
        ``LoraParams(base, adapter)``: ``a`` has shape ``[*batch, *in, rank]``, ``b``
        ``[*batch, rank, *out]``.

    Raises:
        ValueError: a pattern selects nothing, a rank or alpha is out of range, an axis layout is
            ambiguous or of another model, or two targets are one array or overlap.
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
        raise TypeError(
            f"layout={layout!r}: expected a mapping such as {{'.*/kernel': 'io'}}, or what "
            "lora_jax.layout_of returned"
        )
    _check_same_model(layout, leaves)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype!r}: factors need a real floating type such as float32")
    check_patterns(layout, "layout", leaves)

    chosen, whole = _choose(leaves, targets, exclude, full, layout)
    parts = {name: entry(name, leaves) for name in chosen}
    check_patterns(rank, "rank", {path for path, _ in parts.values()})
    check_patterns(alpha, "alpha", {path for path, _ in parts.values()})
    _check_distinct(parts, leaves)
    key = jax.random.key(0) if key is None else key
    factors = {}
    for name, answer in chosen.items():
        path, ranges = parts[name]
        leaf, shape = leaves[path], part_shape(leaves[path].shape, ranges)
        letters = lookup(layout, path, "layout") or conventional(path, leaf, leaves)
        letters = check_layout(letters, path, len(shape))
        r = lookup(rank, path, "rank") if answer is True else answer
        r = _check_rank(r, name, letters, shape)
        scale = _check_alpha(lookup(alpha, path, "alpha"), name) / r
        a_shape, b_shape = factor_shapes(letters, shape, r)
        fan_in = 1 if _is_table(path, layout) else math.prod(role_shape(letters, shape, "i"))
        factors[name] = Factors(
            a=gaussian(fold_in_path(key, name), a_shape, fan_in, dtype),
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
    if isinstance(layout, Layouts):
        blocked |= {p: w.why_not for p, w in layout.weights.items() if w.why_not and p in leaves}
    blocked |= fixed | dict.fromkeys(whole, f"trained whole, {full=}")
    if targets is None:
        chosen = {p: x for p, x in select_query_value(leaves).items() if p not in blocked}
    else:
        not_linear = {
            path
            for path, leaf in leaves.items()
            if is_head(path) or _is_table(path, layout) or _is_vector(path, leaf, layout)
        }
        chosen = select(targets, leaves, blocked, "targets", not_linear)
    if not chosen and not whole:
        raise ValueError(
            f"lorafy: nothing to train: targets={targets!r}, exclude={exclude!r}, full={full!r} "
            f"leave no leaf. Leaves: {nearest('', leaves)}"
        )
    order = {path: i for i, path in enumerate(leaves)}

    def place(name):
        path, ranges = entry(name, leaves)
        return order[path], ranges

    return {name: chosen[name] for name in sorted(chosen, key=place)}, whole


def _is_table(path: str, layout: Mapping[str, str]) -> bool:
    """Whether a weight is looked up: by what the function does, if known, or else by its name."""
    if isinstance(layout, Layouts):
        return layout.weights[path].kind == "embedding"
    return is_embedding(path)


def _is_vector(path: str, leaf: Any, layout: Mapping[str, str]) -> bool:
    """Whether a weight is known to read or write one entry, as a bias stored ``[n, 1]`` does."""
    found = layout.get(path) if isinstance(layout, Layouts) else None
    return found is not None and max_rank(found, leaf.shape) == 1


def _check_same_model(layout: Mapping[str, str], leaves: Mapping[str, Any]) -> None:
    """Raise if the layout was found for other parameters."""
    if not isinstance(layout, Layouts):
        return
    found = {path: weight.shape for path, weight in layout.weights.items()}
    for path in [*found, *leaves]:
        here = tuple(leaves[path].shape) if path in leaves else None
        if found.get(path) != here:
            raise ValueError(
                f"layout: it was found for another model: {path!r} has shape {found.get(path)} "
                f"there and {here} in params (None: no such leaf). Pass the same tree to "
                "lora_jax.layout_of and to lorafy"
            )


def _check_distinct(parts: Mapping[str, tuple[str, Any]], leaves: Mapping[str, Any]) -> None:
    seen: dict[int, list[str]] = {}
    for name, (path, ranges) in parts.items():
        for other in seen.setdefault(id(leaves[path]), []):
            other_path, other_ranges = parts[other]
            if other_path != path:
                raise ValueError(
                    f"targets: {other_path!r} and {path!r} are one and the same array. Two "
                    "independent updates of a tied weight would untie it: "
                    f"exclude={path!r}, or copy the array"
                )
            if overlap(ranges, other_ranges):
                raise ValueError(
                    f"targets: {other!r} and {name!r} overlap: an entry of a weight has one "
                    "update. Give them disjoint ranges"
                )
        seen[id(leaves[path])].append(name)


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
