"""``layout_of`` and ``report``: what a function does with its weights, by the rules of ``lora``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._layout import Layouts, Weight, factor_shapes, is_array, not_trainable, table
from lora_jax._params import Adapter, Factors, LoraParams, count_line
from lora_jax._paths import flatten
from lora_jax._ranges import entry
from lora_jax._transform._call import Call
from lora_jax._transform._context import Context
from lora_jax._transform._lora import materialized, rehearse
from lora_jax._transform._past import Leaf
from lora_jax._transform._use import Use
from lora_jax._transform._value import Delta, LoraArray

_KINDS = {"conv_general_dilated": "conv", "gather": "embedding", "ragged_dot_general": "ragged"}


def layout_of(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Layouts:
    """Find out which weights of ``fn`` can take a LoRA, and which of their axes are read.

    Traces ``fn(params, *args, **kwargs)`` once, on shapes alone, and follows every weight through
    it by the very rules of :func:`lora`: ``x @ w`` reads the axis it sums over and writes the
    other, whatever ``w`` is called, and however it was reshaped, transposed or sliced before.
    A lookup reads the rows' axis. What has several uses has the layout of a lookup, if one is
    among them, or of the first use. A weight that would have to be materialized anywhere cannot
    take a LoRA.

    Args:
        fn: a function whose first argument is ``params``.
        params: the tree that ``lorafy`` will be given, with or without a top-level ``"params"``;
            arrays, or ``jax.ShapeDtypeStruct``s.
        *args: further arguments of ``fn``; shapes will do.
        **kwargs: as ``args``.

    Returns:
        A mapping from paths to letters, such as ``"ioo"``, for ``lorafy(params, layout=...)``.
        Printed, it is a table of all weights; ``.weights`` has their :class:`Weight`.

    Raises:
        TypeError: ``params`` is a LoraParams.
        ValueError: ``params`` has no arrays.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"emb": jnp.ones((9, 4)), "w": jnp.ones((6, 4)), "b": jnp.ones(6)}
        >>> fn = lambda p, ids: p["emb"][ids] @ p["w"].T + p["b"]
        >>> layouts = lora_jax.layout_of(fn, params, jnp.zeros(3, int))
        >>> dict(layouts)
        {'emb': 'io', 'w': 'oi'}
        >>> print(layouts)
        path  shape  kind       layout  uses
        ------------------------------------
        b     6      -          -       1-D: a LoRA needs an input and an output axis
        emb   9x4    embedding  io      1
        w     6x4    dot        oi      1
    """
    if isinstance(params, LoraParams):
        raise TypeError("layout_of: params is a LoraParams; pass its .base")
    leaves = {path: leaf for path, leaf in flatten(params)[0].items() if is_array(leaf)}
    if not leaves:
        raise ValueError(f"layout_of: params has no arrays (got {type(params).__name__})")
    reasons = {path: _why_not(leaf) for path, leaf in leaves.items()}
    wrapped = LoraParams(params, Adapter({}))

    def probe(lora_params, owner, leaves):
        return {
            path: LoraArray(leaf, (Delta.probe(Leaf(owner, path), len(leaf.shape)),))
            if path in reasons and reasons[path] is None
            else leaf
            for path, leaf in leaves.items()
        }

    call = Call.of((wrapped, *args), kwargs, probe)
    jaxpr, _, consts, _ = call.trace(fn)
    seen, found = rehearse(jaxpr, [*consts, *call.values]), {}
    uses = {path: seen.uses_of(Leaf(0, path)) for path in leaves}
    for path, leaf in leaves.items():
        if reasons[path] is None:
            found[path] = _layout(uses[path], leaf.shape)
            reasons[path] = None if found[path] else _unused(uses[path])
    found = {path: letters for path, letters in found.items() if letters}

    def adapt(lora_params, owner, leaves):
        """With factors of these layouts, what would ``lora`` do?"""
        entered = dict(leaves)
        for path, letters in found.items():
            shape = leaves[path].shape
            a, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in factor_shapes(letters, shape, 2))
            factors = Factors(a, b, jax.ShapeDtypeStruct((), jnp.float32), letters)
            delta = Delta.of(factors, Leaf(owner, path))
            entered[path] = LoraArray(leaves[path], (delta,))
        return entered

    adapted = Call.of((wrapped, *args), kwargs, adapt).values
    real = rehearse(jaxpr, [*consts, *adapted])
    for path in found:
        built = [use for use in real.uses_of(Leaf(0, path)) if use.why]
        if built:
            reasons[path] = built[0].reason
    weights = {}
    for path, leaf in leaves.items():
        letters = found.get(path) if reasons[path] is None else None
        weights[path] = Weight(
            shape=tuple(leaf.shape),
            dtype=leaf.dtype,
            layout=letters,
            kind=_kind(uses[path]) if letters else None,
            uses=tuple(
                f"{use.primitive} at {use.source}"
                for use in uses[path]
                if letters is None or not use.why
            ),
            why_not=reasons[path],
        )
    return Layouts(weights)


def _why_not(leaf: Any) -> str | None:
    if reason := not_trainable(leaf):
        return reason
    if len(leaf.shape) < 2:
        return f"{len(leaf.shape)}-D: a LoRA needs an input and an output axis"
    return f"empty, shape {tuple(leaf.shape)}" if 0 in leaf.shape else None


def _primary(uses: list[Use]) -> Use | None:
    """The use that tells the layout: a lookup, or the first that reads and writes."""
    clean = [use for use in uses if use.tells and not use.contracted & use.free]
    return next((use for use in clean if use.primitive == "gather"), clean[0] if clean else None)


def _layout(uses: list[Use], shape: tuple[int, ...]) -> str | None:
    told = [use for use in uses if use.contracted or use.free]
    use = _primary(uses) or next((use for use in told if not use.contracted & use.free), None)
    if use is None:
        return None
    letters = [use.role(axis) for axis in range(len(shape))]
    for letter in "oi":  # one unit, or one input: an axis of size 1, which products do not show
        if letter not in letters:
            ones = [axis for axis, size in enumerate(shape) if size == 1]
            if not ones:
                return None
            letters[ones[-1]] = letter
    return "".join(letters)


def _kind(uses: list[Use]) -> str:
    use = _primary(uses)
    return _KINDS.get(use.primitive if use else "", "dot")


def _unused(uses: list[Use]) -> str:
    built = [use for use in uses if use.why]
    if built:
        return built[0].reason
    if uses:
        return f"no use of it both reads and writes: {uses[0].primitive}, at {uses[0].source}"
    return "not used by the function"


@dataclass(frozen=True)
class Report:
    """What a function does with its adapted weights. Printed, it is a table.

    Attributes:
        rows: a row for each entry of each adapter: its path, shape, kind, layout, number of uses,
            rank, parameters, extra FLOPs a call, and a note: what is built, or that it is unused.
        materialized: the weights that have to be built, with what for, and where.
        unused: the entries that the function never uses.
        total: the counts of trainable and all parameters, a line for each LoraParams.
    """

    rows: tuple[Mapping[str, Any], ...]
    materialized: tuple[str, ...]
    unused: tuple[str, ...]
    total: tuple[str, ...]

    def __str__(self) -> str:
        names = ("path", "shape", "kind", "layout", "uses", "rank", "parameters", "extra FLOPs")
        cells = [
            tuple(
                f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in names
            )
            for row in self.rows
        ]
        lines = [table([names, *cells], right=4)]
        lines += [f"materialized: {line}" for line in self.materialized]
        lines += [f"never used: {path}" for path in self.unused]
        return "\n".join([*lines, *self.total])


def report(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Report what ``lora(fn)(*args, **kwargs)`` would do with every adapted weight.

    Traces on shapes alone; nothing is computed, and nothing is an error: materializations and
    weights that are never used are rows of the report.

    Args:
        fn: a function as for :func:`lora`.
        *args: its arguments, with a LoraParams wherever it takes parameters; shapes will do.
        **kwargs: as ``args``.

    Returns:
        A :class:`Report`. FLOPs are of the low-rank paths of one forward call; the body of a
        ``scan`` counts as often as it runs, that of a ``while`` loop once.

    Raises:
        ValueError: no LoraParams is among the arguments, or an adapter does not fit its base.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((8, 6))}, "value": {"kernel": jnp.ones((8, 6))}}
        >>> lora_params = lora_jax.lorafy(params, rank=2)
        >>> print(lora_jax.report(lambda p, x: x @ p["query"]["kernel"], lora_params, jnp.ones((5, 8))))
        path          shape  kind  layout  uses  rank  parameters  extra FLOPs
        ----------------------------------------------------------------------
        query/kernel  8x6    dot   io         1     2          28          280
        value/kernel  8x6    -     io         0     2          28            0
        never used: value/kernel
        trainable params: 56 || all params: 152 || trainable%: 36.8
    """  # noqa: E501
    call = Call.of(args, kwargs)
    jaxpr, _, consts, _ = call.trace(fn)
    ctx = rehearse(jaxpr, [*consts, *call.values])
    rows = [row for owner in call.lora_params for row in _rows(ctx, call, owner)]
    built = [f"{use.leaf.path!r} {use.form} {use.reason}" for use in materialized(ctx)]
    unused = tuple(row["path"] for row in rows if not row["uses"])
    total = tuple(count_line(lora_params) for lora_params in call.lora_params.values())
    return Report(tuple(rows), tuple(built), unused, total)


def _rows(ctx: Context, call: Call, owner: int):
    leaves = call.leaves[owner]
    for key, f in call.lora_params[owner].adapter.factors.items():
        path, _ = entry(key, leaves)
        uses = ctx.uses_of(Leaf(owner, path))
        yield {
            "path": key,
            "shape": "x".join(map(str, leaves[path].shape)),
            "kind": _kind(uses) if uses else "-",
            "layout": f.layout,
            "uses": len(uses),
            "rank": int(f.rank),
            "parameters": int(f.a.size + f.b.size),
            "extra FLOPs": int(ctx.flops.get(Leaf(owner, path), 0)),
        }
