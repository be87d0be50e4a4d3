"""``lora(fn)``: the same function, over split parameters."""

import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import numpy as np
from jax import lax

from lora_jax import _jax
from lora_jax._layout import role_axes
from lora_jax._params import LoraParams, check
from lora_jax._paths import flatten
from lora_jax._transform import _control, _dot, _move  # noqa: F401  (their rules register)
from lora_jax._transform._interpret import evaluate
from lora_jax._transform._rules import MATERIALIZE, Context, OnMaterialize
from lora_jax._transform._value import Delta, LoraArray


def lora(fn: Callable[..., Any], *, on_materialize: OnMaterialize = "error") -> Callable[..., Any]:
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

    Args:
        fn: a pure function of arrays in pytrees.
        on_materialize: what to do where a weight goes through an operation without a low-rank
            rule, so that the whole sum must be built: ``"error"``, ``"warn"`` or ``"allow"``.

    Raises:
        TypeError: ``fn`` is not callable.
        ValueError: at the call: no LoraParams among the arguments, an adapter that does not fit
            its base, adapted weights that ``fn`` does not use, or uses against their layout.
        NotImplementedError: at the call: a weight would have to be materialized.

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

    @functools.wraps(fn)
    def lora_fn(*args, **kwargs):
        nodes, outer = jax.tree.flatten((args, kwargs), is_leaf=_is_lora)
        if not any(_is_lora(node) for node in nodes):
            raise ValueError(
                "lora(fn) was called without a LoraParams among its arguments. Pass what "
                "lora_jax.lorafy returned; for the base model, call the function itself"
            )
        values: list[Any] = []  # one for each array leaf: an array or a LoraArray
        places: list[Any] = []  # for each node, how to rebuild it from the values
        for i, node in enumerate(nodes):
            leaves = _enter(node, i) if _is_lora(node) else [node]
            tree = jax.tree.structure(node.base if _is_lora(node) else 0)
            places.append((tree, [None if _is_array(x) else (x,) for x in leaves]))
            values += [x for x in leaves if _is_array(x)]

        def flat_fn(*arrays):
            rest = iter(arrays)
            rebuilt = [
                jax.tree.unflatten(tree, [next(rest) if s is None else s[0] for s in static])
                for tree, static in places
            ]
            args, kwargs = jax.tree.unflatten(outer, rebuilt)
            return fn(*args, **kwargs)

        arrays = [v.w if isinstance(v, LoraArray) else v for v in values]
        ctx = Context(on_materialize)
        with jax.disable_jit(False):  # else loops would be unrolled into slices of the weights
            jaxpr, whole, consts, out = _jax.trace(flat_fn, arrays)
            results = evaluate(ctx, jaxpr, [*consts, *values])
        results = [
            ctx.materialize(v, "is returned by the function") if isinstance(v, LoraArray) else v
            for v in results
        ]

        def every_use():
            # A gradient for the input alone may need a weight's transpose only: the forward use,
            # which tells its layout, is in the part that no output needs.
            seen = Context("allow")
            jax.eval_shape(lambda values: evaluate(seen, whole, [*consts, *values]), values)
            return seen

        invars = iter(_jax.read_inputs(jaxpr)[len(consts) :])
        for i, (node, (_, static)) in enumerate(zip(nodes, places, strict=True)):
            is_read = [s is None and next(invars) for s in static]
            if _is_lora(node):
                paths = flatten(node.base)[0]
                read = {path for path, r in zip(paths, is_read, strict=True) if r}
                _check_used(ctx, i, node, read)
                if _misread(ctx, i, node) and (wrong := _misread(every_use(), i, node)):
                    raise ValueError("\n".join(wrong))
        return jax.tree.unflatten(out, results)

    return lora_fn


def _is_lora(x: Any) -> bool:
    return isinstance(x, LoraParams)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | LoraArray)


def _enter(lora_params: LoraParams, owner: int) -> list[Any]:
    """The base's leaves as they enter the function, in order: frozen, adapted or trained whole."""
    leaves = check(lora_params)
    factors, full = lora_params.adapter.factors, lora_params.adapter.full
    entered = []
    for path, leaf in leaves.items():
        if path in full:
            leaf = full[path].astype(leaf.dtype)
        elif isinstance(leaf, jax.Array):
            leaf = lax.stop_gradient(leaf)
        if path in factors:
            origins = tuple((i,) for i in range(leaf.ndim))
            leaf = LoraArray(leaf, (Delta.of(factors[path]),), path, owner, origins)
        entered.append(leaf)
    return entered


def _check_used(ctx: Context, owner: int, lora_params: LoraParams, read: set[str]) -> None:
    """Raise if no leaf of the adapter is used; ``read`` are the paths that any equation reads."""
    adapter = lora_params.adapter
    used = {use.path for use in ctx.uses if use.owner == owner}
    if not used and not read.intersection(adapter.full):
        paths = [*adapter.factors, *adapter.full]
        raise ValueError(
            f"lora(fn): the function uses none of the {len(paths)} adapted leaves: "
            f"{', '.join(paths[:5])}{', ...' if len(paths) > 5 else ''}. Training would change "
            "nothing. Are these another model's parameters, or do the weights come in by a "
            "closure? They must come in as arguments"
        )


def _misread(ctx: Context, owner: int, lora_params: LoraParams) -> list[str]:
    """A message for each weight that is used only against its layout."""
    leaves, messages = check(lora_params), []
    for path, f in lora_params.adapter.factors.items():
        shape = tuple(leaves[path].shape)
        big = {i for i, size in enumerate(shape) if size != 1}
        inputs, batch = (big.intersection(role_axes(f.layout, role)) for role in "ib")
        uses = ctx.uses_of(owner, path)
        if not uses or any(use.primitive == MATERIALIZE for use in uses):
            continue  # what was read there is not known
        if not any((big & use.contracted) - batch == inputs for use in uses):
            use = uses[0]
            seen = "".join(
                letter if i not in big else use.role(i) for i, letter in enumerate(f.layout)
            )
            messages.append(
                f"the weight {path!r} of shape {shape} has layout {f.layout!r}, but "
                f"{use.primitive!r} at {use.source} uses it as one of layout {seen!r}: a would "
                "not read the input, nor b write the output. Build the adapter with "
                f"lorafy(..., layout={{{path!r}: {seen!r}}})"
            )
    return messages
