"""``lorafy``: split a parameter tree into a frozen base and trainable factors."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax._adapter.factors import Factors, master
from lora_jax._adapter.norms import squared_norm
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._adapter.place import make_sharded
from lora_jax._weights.axes import check_layout, is_array, role_shape
from lora_jax._weights.choose import Bias, choose
from lora_jax._weights.conventions import is_table
from lora_jax._weights.paths import PyTree, flatten
from lora_jax._weights.plan import (
    check_alpha,
    check_distinct,
    check_rank,
    check_same_model,
    tables_of,
)
from lora_jax._weights.quantized import dequantize_array, is_quantized
from lora_jax._weights.ranges import entry, part_shape, rows_of
from lora_jax._weights.selector import Selector, check_patterns, letters_of, lookup
from lora_jax._weights.target import Initializer, Target, fold_in_path
from lora_jax.init._start import check_started, resolve_init, start


def lorafy(
    params: PyTree,
    rank: int | Mapping[str, int] = 8,
    *,
    alpha: float | Mapping[str, float] = 16.0,
    rslora: bool = False,
    targets: Selector = None,
    exclude: Selector = None,
    layers: Iterable[int] | None = None,
    full: Selector = None,
    bias: Bias = "none",
    rows: Mapping[str, Iterable[int]] | None = None,
    dora: bool = False,
    freeze: Collection[str] = (),
    layout: Mapping[str, str] | None = None,
    init: str | Initializer = "gaussian",
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
        rslora: scale by ``alpha / sqrt(rank)`` instead, so that updates of high rank learn as fast
            as those of a low one.
        targets: which weights get factors; None: query and value projections, by the field's
            names for them. A callable may return a rank. ``[]`` is legal where ``full`` is given.
        exclude: leaves to keep from ``targets`` and ``full``.
        layers: which layers' targets to take, by number, from the end if negative: by the numbers
            in their paths, or along the layer axis of stacked weights. Targets that are of no
            layer are left out.
        full: leaves to train whole (heads, biases, norms): copied to float32 masters.
        bias: ``"all"`` trains every bias, too, ``"lora_only"`` those beside adapted weights.
        rows: rows of tables that train on their own, such as those of new tokens:
            ``{pattern: ids}``. Each takes the memory of a column of its table.
        dora: train the norms of the weights' columns apart from their directions, as
            ``m (W + scale B A) / |W + scale B A|``.
        freeze: what of the factors does not train: ``"a"``, as LoRA-FA has it, or ``"b"``.
        layout: what :func:`layout_of` found for the function, which then needs no names; or
            ``{pattern: letters}``, one letter an axis (``b`` batch, ``i`` in, ``o`` out), for
            weights whose axes Flax's conventions do not tell.
        init: how factors start: a name (``"gaussian"``, ``"kaiming_uniform"``, ``"orthogonal"``,
            ``"pissa"``, ``"olora"``) or a function, such as those of :mod:`lora_jax.init`. One
            whose first update is not zero takes it out of the base.
        key: a PRNG key; None is ``jax.random.key(0)``.
        dtype: of the factors; a float32 master serves a base of any dtype.

    Returns:
        ``LoraParams(base, adapter)``: ``a`` has shape ``[*batch, *in, rank]``, ``b``
        ``[*batch, rank, *out]``, DoRA's magnitude ``[*batch, *out]``.

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
        Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA,
        arXiv:2312.03732. Liu et al., DoRA, arXiv:2402.09353. Zhang et al., LoRA-FA,
        arXiv:2308.03303.
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
    check_same_model(layout, leaves)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype!r}: factors need a real floating type such as float32")
    check_patterns(layout, "layout", leaves)

    if isinstance(freeze, str) or not set(freeze) < {"a", "b", "magnitude"}:
        raise ValueError(
            f"freeze={freeze!r}: expected a collection such as ('a',), of 'a', 'b' and "
            "'magnitude', not of all of them"
        )
    init = resolve_init(init)

    tables = tables_of(rows or {}, leaves, layout)
    chosen, whole = choose(
        leaves, targets, exclude, full, bias, layers, layout, may_be_empty=bool(tables)
    )
    parts = {name: entry(name, leaves) for name in chosen}
    check_patterns(rank, "rank", {path for path, _ in parts.values()})
    check_patterns(alpha, "alpha", {path for path, _ in parts.values()})
    check_distinct(parts | {name: (path, ()) for name, path in tables.items()}, leaves)
    targets = []
    for name, answer in chosen.items():
        path, ranges = parts[name]
        shape = part_shape(leaves[path].shape, ranges)
        letters = check_layout(letters_of(path, leaves, layout), path, len(shape))
        r = lookup(rank, path, "rank") if answer is True else answer
        r = check_rank(r, name, letters, shape)
        scale = check_alpha(lookup(alpha, path, "alpha"), name) / (math.sqrt(r) if rslora else r)
        fan_in = 1 if is_table(path, layout) else math.prod(role_shape(letters, shape, "i"))
        targets.append((path, Target(name, leaves[path], ranges, letters, r, scale, fan_in)))

    def made(leaves: dict[str, Any], key: jax.Array) -> tuple[dict[str, Any], Adapter]:
        """The leaves that an initializer changes, and the adapter."""
        factors, new = {}, {}
        for path, target in targets:
            target = dataclasses.replace(target, leaf=new.get(path, leaves[path]))
            a, b, rest = start(init, fold_in_path(key, target.path), target, dtype)
            if rest is not None:
                new[path] = rest
            magnitude, norm = _norms(target, new.get(path, target.leaf)) if dora else (None, None)
            factors[target.path] = Factors(
                a,
                b,
                jnp.asarray(target.scale, jnp.float32),
                target.layout,
                magnitude,
                norm,
                frozen=tuple(sorted(freeze)),
                residual=rest is not None,
            )
        for name, (path, letters) in rows_in.items():
            factors[name] = _row_factors(name, leaves[path], letters, dtype)
        return new, Adapter(factors, {path: master(leaves[path]) for path in whole})

    rows_in = {name: (path, letters_of(path, leaves, layout)) for name, path in tables.items()}
    touched = dict.fromkeys([*(path for path, _ in targets), *tables.values(), *whole])
    key = jax.random.key(0) if key is None else key
    new, adapter = make_sharded(made, {path: leaves[path] for path in touched}, key)
    for _, target in targets:
        check_started(init, target.path, adapter.factors[target.path])
    if new:
        every, tree = flatten(params)
        params = jax.tree.unflatten(tree, [new.get(path, x) for path, x in every.items()])
    return LoraParams(params, adapter)


def _row_factors(name: str, leaf: Any, letters: str, dtype: DTypeLike) -> Factors:
    """``W + E b``, where the columns of ``E`` pick the rows: ``b`` is what is added to them."""
    ids = rows_of(name) or ()
    (size,) = role_shape(letters, leaf.shape, "i")
    a = jax.nn.one_hot(jnp.array(ids), size, dtype=dtype).T
    b = jnp.zeros((len(ids), *role_shape(letters, leaf.shape, "o")), dtype)
    return Factors(a, b, jnp.ones((), jnp.float32), letters, frozen=("a",))


def _norms(target: Target, base: jax.Array) -> tuple[jax.Array, jax.Array]:
    """DoRA's magnitude: the norms of the weight's columns; and those of the base, squared."""
    index = target.index
    plain = [dequantize_array(x) if is_quantized(x) else x for x in (target.leaf, base)]
    squared = [squared_norm(x[index], target.layout) for x in plain]
    return jnp.sqrt(squared[0]), squared[1]
