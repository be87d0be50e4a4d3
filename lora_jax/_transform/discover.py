"""``layout_of``: find out what a function does with its weights, by the rules of ``lora``."""

import functools
from collections.abc import Callable, Mapping
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
from lora_jax._transform.probe import Probe
from lora_jax._transform.use import Use
from lora_jax._weights.axes import factor_shapes, not_trainable
from lora_jax._weights.conventions import why_not
from lora_jax._weights.layouts import Layouts, Weight
from lora_jax._weights.paths import checked_arrays, not_parameters

_KINDS = {"conv_general_dilated": "conv", "gather": "embedding", "ragged_dot_general": "ragged"}


def layout_of(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Layouts:
    """Trace ``fn`` to find the weights that can take a LoRA, and their input and output axes.

    Traces ``fn(params, *args, **kwargs)`` once, on shapes alone, and follows every weight through
    it by the rules of :func:`lora`: ``x @ w`` reads the axis it sums over and writes the other,
    whatever the name of ``w``, and however it was reshaped, transposed or sliced before. A lookup
    reads the axis of the table's rows. A weight with several uses has the layout of a lookup, if
    there is one, or of the first use. A weight that would have to be materialized anywhere cannot
    take a LoRA.

    Args:
        fn: a function whose first argument is ``params``.
        params: the tree that ``lorafy`` will get, with or without a top-level ``"params"``; arrays
            or ``jax.ShapeDtypeStruct``s.
        *args: further arguments of ``fn``, arrays or shapes.
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
    leaves = checked_arrays(params, "layout_of")
    reasons: dict[str, str | None] = {path: _why_not(leaf) for path, leaf in leaves.items()}
    reasons |= not_parameters(params)
    wrapped = LoraParams(params, Adapter({}))

    call = Call.of((wrapped, *args), kwargs, functools.partial(_with_probes, reasons))
    jaxpr, _, consts, _ = call.trace(fn)
    seen, found = rehearse(jaxpr, [*consts, *call.values]), {}
    uses = {path: seen.uses_of(Leaf(0, path)) for path in leaves}
    for path, leaf in leaves.items():
        if reasons[path] is None:
            if letters := _layout(uses[path], leaf.shape):
                found[path] = letters
            else:
                reasons[path] = why_not(path, leaf) or _unused(uses[path])

    # With factors of these layouts, what would ``lora`` do?
    adapted = Call.of((wrapped, *args), kwargs, functools.partial(_with_factors, found)).values
    record = rehearse(jaxpr, [*consts, *adapted])
    for path in found:
        built = [use for use in record.uses_of(Leaf(0, path)) if use.why]
        if built:
            reasons[path] = built[0].reason
    return Layouts(
        {
            path: _weight(leaf, found.get(path), uses[path], reasons[path])
            for path, leaf in leaves.items()
        }
    )


def _with_probes(
    reasons: Mapping[str, str | None], lora_params: LoraParams, owner: int, leaves: dict[str, Any]
) -> dict[str, Any]:
    """Give a probe to each leaf that has no reason against a LoRA."""
    return {
        path: LoraArray(leaf, (Probe.of(Leaf(owner, path), len(leaf.shape)),))
        if path in reasons and reasons[path] is None
        else leaf
        for path, leaf in leaves.items()
    }


def _with_factors(
    layouts: Mapping[str, str], lora_params: LoraParams, owner: int, leaves: dict[str, Any]
) -> dict[str, Any]:
    """Give factors of rank 2 to each leaf that has a layout, as shapes."""
    entered = dict(leaves)
    for path, letters in layouts.items():
        shapes = factor_shapes(letters, leaves[path].shape, 2)
        a, b = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        factors = Factors(a, b, jax.ShapeDtypeStruct((), jnp.float32), letters)
        entered[path] = LoraArray(leaves[path], (Delta.of(factors, Leaf(owner, path), ()),))
    return entered


def _weight(leaf: Any, letters: str | None, uses: list[Use], reason: str | None) -> Weight:
    """Return what was found out about a leaf; without a layout if there is a reason against it."""
    letters = letters if reason is None else None
    return Weight(
        shape=tuple(leaf.shape),
        dtype=leaf.dtype,
        layout=letters,
        kind=kind_of(uses) if letters else None,
        uses=tuple(
            f"{use.primitive} at {use.source}" for use in uses if letters is None or not use.why
        ),
        why_not=reason,
    )


def _why_not(leaf: Any) -> str | None:
    """Return why a leaf cannot take a LoRA, whatever its uses."""
    if reason := not_trainable(leaf):
        return reason
    if len(leaf.shape) < 2:
        return f"{len(leaf.shape)}-D: a LoRA needs an input and an output axis"
    return f"empty, shape {tuple(leaf.shape)}" if 0 in leaf.shape else None


def _primary(uses: list[Use]) -> Use | None:
    """Return the use that shows the layout: a lookup, or the first that reads and writes."""
    clean = [use for use in uses if use.has_roles and not use.contracted & use.free]
    return next((use for use in clean if use.primitive == "gather"), clean[0] if clean else None)


def _layout(uses: list[Use], shape: tuple[int, ...]) -> str | None:
    """Infer a layout from uses; None if no use reads some axes and writes others."""
    some = [use for use in uses if use.contracted or use.free]
    use = _primary(uses) or next((use for use in some if not use.contracted & use.free), None)
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
    """Return the kind of a weight: ``"dot"``, ``"conv"``, ``"embedding"`` or ``"ragged"``."""
    use = _primary(uses)
    return _KINDS.get(use.primitive if use else "", "dot")


def _unused(uses: list[Use]) -> str:
    """Return why a layout cannot be inferred from uses."""
    built = [use for use in uses if use.why]
    if built:
        return built[0].reason
    if uses:
        return f"no use of it both reads and writes: {uses[0].primitive}, at {uses[0].source}"
    return "not used by the function"
