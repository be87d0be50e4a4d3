"""``lorafy``: split a parameter tree into a frozen base and trainable factors."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax._adapter.factors import Entry, Factors, Rows, master
from lora_jax._adapter.norms import squared_norm
from lora_jax._adapter.params import Adapter, LoraParams, check, without_adapters
from lora_jax._adapter.place import Made, Recipe, make_sharded
from lora_jax._weights.axes import role_shape
from lora_jax._weights.choose import Bias
from lora_jax._weights.paths import PyTree, checked_arrays, flatten, not_parameters
from lora_jax._weights.plan import Plan, make_plan
from lora_jax._weights.quantized import plain_array
from lora_jax._weights.selector import Selector
from lora_jax._weights.target import Initializer, Target, fold_in_path
from lora_jax.init._start import NAMES, check_started, resolve_init, start


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

    so that the adapted model starts as the base model. (A lookup reads one table row, so for
    embedding tables ``A ~ N(0, 1)``.) The function is pure: it returns the same factors to the bit
    in every process, eager or under ``jit``, and different factors for every path. The base holds
    the very same arrays as ``params``, in the same containers.

    A selector (``targets``, ``exclude``, ``full``) is a regular expression matched in full
    against paths such as ``layers_0/attn/query/kernel``; ``"all-linear"`` (every weight that can
    take a LoRA, except embeddings, the output head by its usual names, and, if the layout was
    discovered, vectors stored ``[n, 1]``); a callable ``(path, leaf) -> bool``; or a list of those.
    ``exclude`` wins over ``full``, and ``full`` wins over ``targets``. A target may be a part of a
    weight: a range after a regular expression, such as the query columns of a fused kernel,
    ``".*c_attn/kernel[:, 0:768]"``. The rest of the weight stays frozen.

    Args:
        params: any pytree of arrays: nested dicts, FrozenDicts, lists, dataclasses, boxed Linen
            metadata, ``nnx.State``; with or without a top-level ``"params"``. Only parameters
            train: an ``nnx.Param`` among variables of NNX, the collection ``params`` of Linen's.
        rank: the rank of the update, from 1 to ``min(in, out)``; or ``{pattern: rank}``. The first
            pattern that matches a path counts.
        alpha: the update is scaled by ``alpha / rank``; a number, or ``{pattern: alpha}``.
        rslora: scale by ``alpha / sqrt(rank)`` instead, so that updates of high rank learn as fast
            as those of low rank.
        targets: the weights that get factors; None: query and value projections, by the field's
            names for them. A callable may return a rank. ``[]`` is valid if ``full`` is given.
        exclude: leaves that neither ``targets`` nor ``full`` may select.
        layers: the numbers of the layers to adapt, from the end if negative: by the numbers in
            their paths, or along the layer axis of stacked weights. Targets outside of layers are
            left out.
        full: leaves to train fully (heads, biases, norms): copied to float32 masters.
        bias: ``"all"`` trains every bias, too, ``"lora_only"`` those beside adapted weights.
        rows: table rows to train, such as those of new tokens: ``{pattern: ids}``. Only these rows
            are stored.
        dora: train the norms of the weights' columns apart from their directions, as
            ``m (W + scale B A) / |W + scale B A|``.
        freeze: the fields that do not train: ``"a"``, as in LoRA-FA, or ``"b"``.
        layout: the result of :func:`layout_of` for the function, which needs no names; or
            ``{pattern: letters}``, one letter per axis (``b`` batch, ``i`` in, ``o`` out), for
            weights whose axes do not follow from Flax's conventions.
        init: the start of the factors: a name (``"gaussian"``, ``"kaiming_uniform"``,
            ``"orthogonal"``, ``"pissa"``, ``"olora"``) or a function, such as those of
            :mod:`lora_jax.init`. If its first update is not zero, it is taken out of the base.
        key: a PRNG key; None is ``jax.random.key(0)``.
        dtype: the dtype of the factors; float32 masters suit a base of any dtype.

    Returns:
        ``LoraParams(base, adapter)``: ``a`` has shape ``[*batch, *in, rank]``, ``b``
        ``[*batch, rank, *out]``, DoRA's magnitude ``[*batch, *out]``.

    Raises:
        ValueError: a pattern selects nothing, a rank or alpha is out of range, a layout is
            ambiguous or belongs to another model, or two targets overlap or are one array.
        TypeError: an argument is of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
        >>> lora_params = lora_jax.lorafy(params, rank=4)
        >>> lora_params
        LoraParams(1 adapted weights, 0 full leaves; trainable params: 384 || all params: 2,464 || trainable%: 15.6)
        >>> lora_params.adapter.factors["query/kernel"].a.shape
        (64, 4)

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
        Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA,
        arXiv:2312.03732. Liu et al., DoRA, arXiv:2402.09353. Zhang et al., LoRA-FA,
        arXiv:2308.03303.
    """  # noqa: E501
    leaves = checked_arrays(without_adapters(params), "lorafy")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype!r}: factors need a real floating type such as float32")
    if isinstance(freeze, str) or not set(freeze) < {*Factors.TRAINABLE}:
        raise ValueError(
            f"freeze={freeze!r}: expected a collection such as ('a',), of 'a', 'b' and "
            "'magnitude', not of all of them"
        )
    init = resolve_init(init)
    plan = make_plan(
        leaves,
        rank,
        alpha,
        rslora=rslora,
        targets=targets,
        exclude=exclude,
        layers=layers,
        full=full,
        bias=bias,
        rows=rows,
        layout=layout,
        others=not_parameters(without_adapters(params)),
    )
    key = jax.random.key(0) if key is None else key
    options = (init, dora, tuple(sorted(freeze)), jnp.dtype(dtype))
    recipes = {path: _recipe(path, plan, leaves[path], options) for path in plan.paths}
    keys: dict[str, list[Any]] = {path: [] for path in recipes}
    for target in plan.targets:
        keys[target.part.path].append(fold_in_path(key, target.path))
    new, adapter = make_sharded(recipes, leaves, keys)
    order = [*(target.path for target in plan.targets), *plan.tables]
    adapter = Adapter({name: adapter.factors[name] for name in order}, adapter.full)
    for target in plan.targets:
        check_started(init, target.path, adapter.factors[target.path])
    if new and isinstance(params, LoraParams):
        raise ValueError(
            f"lorafy: this initializer changes the base, and on {next(iter(new))!r} there may be a "
            "frozen adapter. Merge it first: lora_jax.lorafy(lora_jax.merge(lora_params), ...)"
        )
    if new:
        every, tree = flatten(params)
        params = jax.tree.unflatten(tree, [new.get(path, x) for path, x in every.items()])
    lora_params = LoraParams(params, adapter)
    if isinstance(params, LoraParams):
        check(lora_params)
    return lora_params


class _Settings(NamedTuple):
    """Tell what is made of one leaf.

    Attributes:
        targets: the weights in it, without the leaf.
        rows: its layout, the ids of trained rows, and its number of rows; None without.
        is_full: whether it trains fully.
        init, dora, freeze, dtype: as in :func:`lorafy`.
    """

    targets: tuple[Target, ...]
    rows: tuple[str, tuple[int, ...], int] | None
    is_full: bool
    init: Initializer
    dora: bool
    freeze: tuple[str, ...]
    dtype: Any


def _recipe(path: str, plan: Plan, leaf: Any, options: tuple[Any, ...]) -> Recipe:
    """Return how to make what the plan says of one leaf."""
    own = [target for target in plan.targets if target.part.path == path]
    rows = None
    if path in plan.tables:
        table = plan.tables[path]
        (size,) = role_shape(table.layout, leaf.shape, "i")
        rows = (table.layout, table.ids, size)
    bare = tuple(dataclasses.replace(target, leaf=None) for target in own)
    settings, shared = _Settings(bare, rows, path in plan.full, *options), None
    if settings.init in NAMES.values():  # they read no paths
        bare = (dataclasses.replace(t, path="", part=t.part._replace(path="")) for t in bare)
        shared = settings._replace(targets=tuple(bare))
    names = [target.path for target in own] + [path] * (rows is not None)
    return Recipe(_make, settings, shared, tuple(names))


def _make(settings: _Settings, leaf: Any, keys: list[jax.Array]) -> Made:
    """Make the entries of one leaf, and the leaf if an initializer changes it."""
    entries: list[Entry] = []
    now = leaf
    for target, key in zip(settings.targets, keys, strict=True):
        target = dataclasses.replace(target, leaf=now)
        a, b, rest = start(settings.init, key, target, settings.dtype)
        now = now if rest is None else rest
        magnitude, norm = _norms(target, now) if settings.dora else (None, None)
        entries.append(
            Factors(
                a,
                b,
                jnp.asarray(target.scale, jnp.float32),
                target.layout,
                magnitude,
                norm,
                frozen=settings.freeze,
                residual=rest is not None,
            )
        )
    if settings.rows is not None:
        layout, ids, size = settings.rows
        b = jnp.zeros((len(ids), *role_shape(layout, leaf.shape, "o")), settings.dtype)
        entries.append(Rows(b, jnp.ones((), jnp.float32), layout, ids, size))
    return Made(None if now is leaf else now, entries, master(leaf) if settings.is_full else None)


def _norms(target: Target, base: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return DoRA's magnitude, the norms of the weight's columns, and the base's, squared."""
    squared = [
        squared_norm(plain_array(x)[target.index], target.layout) for x in (target.leaf, base)
    ]
    return jnp.sqrt(squared[0]), squared[1]
