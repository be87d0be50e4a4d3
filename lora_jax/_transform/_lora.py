"""``lora(fn)``: the same function, over split parameters."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import _jax
from lora_jax._layout import is_array, role_axes
from lora_jax._params import Adapter, LoraParams, check
from lora_jax._paths import flatten
from lora_jax._quantized import is_quantized
from lora_jax._ranges import entry, rows_of
from lora_jax._transform import (  # noqa: F401  (their rules register)
    _arith,
    _control,
    _conv,
    _dot,
    _gather,
    _move,
    _ragged,
    _reshape,
    _slice,
)
from lora_jax._transform._context import Context, OnMaterialize
from lora_jax._transform._dora import enter
from lora_jax._transform._interpret import evaluate
from lora_jax._transform._lazy import Lazy
from lora_jax._transform._past import Leaf
from lora_jax._transform._use import Use
from lora_jax._transform._value import LoraArray
from lora_jax.init._target import fold_in_path


def lora(
    fn: Callable[..., Any], *, on_materialize: OnMaterialize = "error", dropout: float = 0.0
) -> Callable[..., Any]:
    """Return ``fn`` over split parameters.

    The returned function takes what ``fn`` takes, with a ``LoraParams`` wherever ``fn`` takes
    parameters: as an argument, or anywhere inside one. Wherever a target weight ``W`` is used it
    computes::

        x W + scale * (x a) b

    and never builds ``W + scale * a b``. It composes with ``jit``, ``vmap``, ``grad``,
    ``checkpoint``, ``scan``, ``pmap`` and ``shard_map``, inside and outside. No gradient is
    computed for the base or for ``scale``: derivatives with respect to them are zeros.

    Arrays among the arguments are traced; every other leaf (``True``, ``"mean"``, a callable,
    ``method=...``) reaches ``fn`` as it is. Each call traces ``fn``: wrap it in ``jax.jit``.

    With ``dropout``, what the adapters read is dropped, where the call has a ``lora_key``::

        x W + scale * (drop(x) a) b

    It differs from weight to weight, use to use and step to step of a loop; of a lookup, whole
    rows are dropped. Without ``lora_key`` nothing is: to evaluate, leave it out.

    Args:
        fn: a pure function of arrays in pytrees.
        dropout: the share of the adapters' inputs to drop, at calls with ``lora_key=``, a PRNG
            key. A new one for every call: ``jax.debug_key_reuse`` finds those used twice.
        on_materialize: what to do where a weight goes through an operation without a low-rank
            rule, so that the whole sum must be built: ``"error"``, ``"warn"`` or ``"allow"``.

    Raises:
        TypeError: ``fn`` is not callable.
        ValueError: ``dropout`` is no share, or ``fn`` has an argument ``lora_key`` of its own. At
            the call: ``lora_key`` without ``dropout``, no LoraParams among the arguments, an
            adapter that does not fit its base, adapted weights that ``fn`` does not use, or uses
            against their layout.
        NotImplementedError: at the call: weights would have to be materialized; the message names
            them all.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((3, 3))}}
        >>> lora_params = lora_jax.lorafy(params, rank=2)
        >>> lora_jax.lora(lambda p, x: x @ p["query"]["kernel"])(lora_params, jnp.ones((1, 3)))
        Array([[3., 3., 3.]], dtype=float32)
    """
    if not callable(fn):
        raise TypeError(f"lora: expected a function, got {type(fn).__name__} {fn!r}")
    if on_materialize not in get_args(OnMaterialize):
        raise ValueError(
            f"on_materialize={on_materialize!r}: expected one of {get_args(OnMaterialize)}"
        )

    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r}: expected a share, 0 <= dropout < 1")
    if "lora_key" in _parameters(fn):
        raise ValueError(
            "lora: the function has an argument 'lora_key', which the adapted function keeps for "
            "the key of its dropout. Rename it: lambda ..., key: fn(..., lora_key=key)"
        )

    @functools.wraps(fn)
    def lora_fn(*args, lora_key=None, **kwargs):
        key = None if lora_key is None else _dropout_key(lora_key, dropout)
        return run_lora(Context(on_materialize, dropout), fn, args, kwargs, key)

    return lora_fn


def run_lora(
    ctx: Context, fn: Callable[..., Any], args: Any, kwargs: Any, key: jax.Array | None = None
) -> Any:
    """One call of the adapted function, as ``ctx`` says."""
    call = Call.of(args, kwargs, functools.partial(_enter, key=key))
    jaxpr, whole, consts, out = call.trace(fn)
    values = [*consts, *call.values]
    try:
        with jax.disable_jit(False):  # else loops would be unrolled into slices of the weights
            results = leave(ctx, jaxpr, values)
    except NotImplementedError:
        if not ctx.refused:
            raise
        raise NotImplementedError(_complaints(rehearse(jaxpr, values))) from None

    read = _jax.read_inputs(jaxpr)[len(consts) :]
    for owner, node in call.lora_params.items():
        leaves = call.leaves[owner]
        _check_used(ctx, owner, node.adapter, leaves, call.paths_read(owner, read), consts)
        # A gradient for the input alone may need a weight's transpose only: the forward use,
        # which tells its layout, is in the part that no output needs.
        if _misread(ctx, owner, node.adapter, leaves):
            wrong = _misread(rehearse(whole, values), owner, node.adapter, leaves)
            if wrong:
                raise ValueError("\n".join(wrong))
    return jax.tree.unflatten(out, results)


def _parameters(fn: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(fn).parameters
    except (TypeError, ValueError):  # of a builtin
        return ()


def _dropout_key(key: Any, dropout: float) -> jax.Array:
    if not dropout:
        raise ValueError(
            "lora_key is given, and nothing is dropped: wrap the function with "
            "lora(fn, dropout=...), or leave the key out"
        )
    if not isinstance(key, jax.Array):
        raise TypeError(
            f"lora_key is {type(key).__name__}, expected a key such as jax.random.key(0)"
        )
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape:
        raise ValueError(
            f"lora_key has shape {key.shape}, expected one key; for one an example call through "
            "jax.vmap"
        )
    (key,) = jax.random.split(key, 1)  # the key is used up
    return key


@dataclass
class Call:
    """The arguments of one call, flattened.

    Attributes:
        structure: of the arguments, with every LoraParams as a leaf.
        places: for each such leaf, its structure, and for each leaf inside None where it is an
            array, or a tuple of it.
        values: one for each array: an array or a :class:`LoraArray`.
        lora_params: the LoraParams, by position among the leaves.
        leaves: of their bases, by path.
    """

    structure: Any
    places: list[tuple[Any, list[Any]]]
    values: list[Any]
    lora_params: dict[int, LoraParams]
    leaves: dict[int, dict[str, Any]]

    @classmethod
    def of(
        cls,
        args: Any,
        kwargs: Any,
        enter: Callable[[LoraParams, int, dict[str, Any]], Mapping[str, Any]] | None = None,
    ) -> "Call":
        """Flatten; ``enter`` gives the leaves of a LoraParams' base by path, as they enter."""
        nodes, structure = jax.tree.flatten((args, kwargs), is_leaf=_is_lora)
        lora_params = {i: node for i, node in enumerate(nodes) if _is_lora(node)}
        found = {i: flatten(node.base)[0] for i, node in lora_params.items()}
        call = cls(structure, [], [], lora_params, found)
        if not call.lora_params:
            raise ValueError(
                "lora(fn) was called without a LoraParams among its arguments. Pass what "
                "lora_jax.lorafy returned; for the base model, call the function itself"
            )
        for i, node in enumerate(nodes):
            is_lora = i in lora_params
            leaves = (enter or _enter)(node, i, found[i]).values() if is_lora else [node]
            leaves = list(map(_put_off, leaves))
            tree = flatten(node.base)[1] if is_lora else jax.tree.structure(0)
            call.places.append((tree, [None if is_traced(x) else (x,) for x in leaves]))
            call.values += [x for x in leaves if is_traced(x)]
        return call

    def trace(self, fn: Callable[..., Any]) -> Any:
        """The jaxpr of ``fn`` on the frozen arrays: see ``_jax.trace``."""

        def flat_fn(*arrays):
            rest = iter(arrays)
            rebuilt = [
                jax.tree.unflatten(tree, [next(rest) if s is None else s[0] for s in static])
                for tree, static in self.places
            ]
            args, kwargs = jax.tree.unflatten(self.structure, rebuilt)
            return fn(*args, **kwargs)

        arrays = [v.w if isinstance(v, LoraArray) else v for v in self.values]
        arrays = [x.aval if isinstance(x, Lazy) else x for x in arrays]
        with jax.disable_jit(False):
            return _jax.trace(flat_fn, arrays)

    def paths_read(self, owner: int, read: Sequence[bool]) -> set[str]:
        """The paths of a LoraParams that are read, given that for every array."""
        flags = iter(read)
        by_node = [[s is None and next(flags) for s in static] for _, static in self.places]
        return {path for path, r in zip(self.leaves[owner], by_node[owner], strict=True) if r}


def leave(ctx: Context, jaxpr: Any, values: list[Any]) -> list[Any]:
    """The outputs of the whole function, as plain arrays."""
    return [
        ctx.materialize(v, "is returned by the function") if isinstance(v, LoraArray) else v
        for v in evaluate(ctx, jaxpr, values)
    ]


def rehearse(jaxpr: Any, values: list[Any]) -> Context:
    """Evaluate on shapes alone, allowing everything; what was seen."""
    ctx = Context("allow")
    with jax.disable_jit(False):
        jax.eval_shape(lambda values: leave(ctx, jaxpr, values), values)
    return ctx


def _is_lora(x: Any) -> bool:
    return isinstance(x, LoraParams)


def is_traced(x: Any) -> bool:
    """Whether an argument's leaf is traced, rather than handed on as it is."""
    kinds = jax.Array | np.ndarray | np.generic | LoraArray | jax.ShapeDtypeStruct
    return isinstance(x, kinds)


def _enter(
    lora_params: LoraParams, owner: int, leaves: dict[str, Any], key: Any = None
) -> dict[str, Any]:
    """The base's leaves as they enter the function: frozen, adapted or trained whole."""
    check(lora_params, leaves)
    factors, full = lora_params.adapter.factors, lora_params.adapter.full
    entered = {}
    for path, leaf in leaves.items():
        if path in full:
            leaf = _cast(full[path], leaf.dtype)
        elif isinstance(leaf, jax.Array):
            leaf = lax.stop_gradient(leaf)
        elif is_quantized(leaf):
            leaf = Lazy.of(jax.tree.map(lax.stop_gradient, leaf))
        entered[path] = leaf
    for name, f in factors.items():
        path, ranges = entry(name, leaves)
        leaf = entered[path]
        deltas = leaf.deltas if isinstance(leaf, LoraArray) else ()
        w = leaf.w if isinstance(leaf, LoraArray) else leaf
        if f.frozen:
            f = f.mapped(lambda n, x, f=f: lax.stop_gradient(x) if n in f.frozen else x)
        delta = enter(f, Leaf(owner, path), ranges, w)
        if key is not None and rows_of(name) is None:  # rows that train whole are never dropped
            delta = replace(delta, key=fold_in_path(key, f"{owner}/{name}"))
        entered[path] = LoraArray(w, (*deltas, delta))
    return entered


def _put_off(x: Any) -> Any:
    """A quantized leaf as a weight, adapted or not, that is made where it is used."""
    if isinstance(x, LoraArray):
        return replace(x, w=Lazy.of(x.w)) if is_quantized(x.w) else x
    x = Lazy.of(x) if is_quantized(x) else x
    return LoraArray(x, ()) if isinstance(x, Lazy) else x


def _cast(x: Any, dtype: Any) -> Any:
    is_shape = isinstance(x, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(x.shape, dtype) if is_shape else x.astype(dtype)


def _complaints(ctx: Context) -> str:
    """One message for all the weights that would have to be built."""
    first, *rest = materialized(ctx)
    message = [first.complaint]
    if rest:
        shown = [f"  {use.leaf.path!r} {use.form} {use.reason}" for use in rest[:20]]
        shown += [f"  ... and {len(rest) - 20} more"] if len(rest) > 20 else []
        paths = list(dict.fromkeys(use.leaf.path for use in (first, *rest)))
        message += ["So would others:", *shown]
        message += [f"To keep all of them out: lorafy(..., exclude={paths!r})"]
    return "\n".join(message)


def materialized(ctx: Context) -> list[Use]:
    """The weights that had to be built: each reason once."""
    return list({(use.leaf, use.reason): use for use in ctx.uses if use.why}.values())


def _check_used(
    ctx: Context,
    owner: int,
    adapter: Adapter,
    leaves: Mapping[str, Any],
    read: set[str],
    consts: Sequence[Any],
) -> None:
    """Raise if no leaf of the adapter is used; ``read`` are the paths that any equation reads."""
    used = {use.leaf.path for use in ctx.uses if use.leaf.owner == owner}
    if used or read.intersection(adapter.full):
        return
    paths = [*adapter.factors, *adapter.full]
    held = {id(const) for const in consts}
    closed = [path for path, leaf in leaves.items() if is_array(leaf) and id(leaf) in held]
    hint = (
        f"It holds {closed[0]!r} itself as a constant, in a closure. Weights must come in as "
        "arguments"
        if closed
        else "Are these another model's parameters, or do the weights come in by a closure? They "
        "must come in as arguments"
    )
    raise ValueError(
        f"lora(fn): the function uses none of the {len(paths)} adapted leaves: "
        f"{', '.join(paths[:5])}{', ...' if len(paths) > 5 else ''}. Training would change "
        f"nothing. {hint}"
    )


def _misread(ctx: Context, owner: int, adapter: Adapter, leaves: Mapping[str, Any]) -> list[str]:
    """A message for each weight that is used only against its layout."""
    messages = []
    for key, f in adapter.factors.items():
        path, _ = entry(key, leaves)
        shape = tuple(leaves[path].shape)
        big = {i for i, size in enumerate(shape) if size != 1}
        inputs, batch, outputs = (big.intersection(role_axes(f.layout, r)) for r in "ibo")
        uses = [use for use in ctx.uses_of(Leaf(owner, path)) if use.why or use.tells]
        if not (uses and inputs and outputs) or any(use.why for use in uses):
            continue  # what is read is not known, or makes no difference
        if not any((big & use.contracted) - batch == inputs for use in uses):
            use = uses[0]
            seen = "".join(
                letter if i not in big else use.role(i) for i, letter in enumerate(f.layout)
            )
            messages.append(
                f"the weight {path!r} of shape {shape} has layout {f.layout!r}, but "
                f"{use.primitive!r} at {use.source} uses it as one of layout {seen!r}: a would "
                "not read the input, nor b write the output. Build the adapter with "
                f"lorafy(..., layout={{{path!r}: {seen!r}}}), or with layout=lora_jax.layout_of("
                "fn, params, *args)"
            )
    return messages
