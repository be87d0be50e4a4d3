"""``layout_of``: what a function does with its weights, by the rules of ``lora``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import Factors
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._transform.call import Call
from lora_jax._transform.delta import Delta
from lora_jax._transform.lora import rehearse
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.origin import Leaf
from lora_jax._transform.use import Use
from lora_jax._weights.axes import factor_shapes, is_array, not_trainable
from lora_jax._weights.layouts import Layouts, Weight
from lora_jax._weights.paths import flatten

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
            kind=kind_of(uses[path]) if letters else None,
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


def kind_of(uses: list[Use]) -> str:
    use = _primary(uses)
    return _KINDS.get(use.primitive if use else "", "dot")


def _unused(uses: list[Use]) -> str:
    built = [use for use in uses if use.why]
    if built:
        return built[0].reason
    if uses:
        return f"no use of it both reads and writes: {uses[0].primitive}, at {uses[0].source}"
    return "not used by the function"
