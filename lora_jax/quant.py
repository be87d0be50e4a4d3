"""Quantize a base to few bits, and measure the error."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lora_jax._weights.axes import role_axes
from lora_jax._weights.choose import choose
from lora_jax._weights.paths import PyTree, arrays_in, flatten, not_parameters
from lora_jax._weights.quantized import (
    dequantize_array,
    is_coarse,
    is_quantized,
    quantize_array,
    relative_error,
)
from lora_jax._weights.selector import Selector, check_patterns, letters_of

__all__ = ["dequantize", "quantization_error", "quantize"]

_BLOCKS = {"nf4": 64, "int4": 64, "int8": None, "fp8": None}
_QTYPES = {"nf4": "nf4", "int4": "int4", "int8": "int8", "fp8": "float8_e4m3fn"}


def quantize(
    params: PyTree,
    qtype: str = "nf4",
    *,
    targets: Selector = "all-linear",
    exclude: Selector = None,
    layout: Mapping[str, str] | None = None,
    block: int | None = None,
) -> PyTree:
    """Replace weights by quantized ones, for a base that does not train.

    The result goes wherever parameters go: into ``lorafy``, and from there into ``lora(fn)``, which
    dequantizes each weight where it is used, in the forward and again in the backward pass, and
    keeps none of them::

        x dequantize(W) + scale * (x a) b

    Args:
        params: any pytree of arrays.
        qtype: ``"nf4"`` (4-bit NormalFloat), ``"int4"``, ``"int8"`` or ``"fp8"`` (e4m3).
        targets: as in :func:`lorafy`; by default every dense, convolution and expert kernel.
        exclude: as in :func:`lorafy`.
        layout: as in :func:`lorafy`.
        block: how many inputs of an output share a step, rounded down to a divisor of their number;
            None is 64 for four bits, and all inputs for eight.

    Returns:
        ``params`` with a ``qwix.QArray`` for each target. nf4 in blocks of 64, with scales in the
        weights' bfloat16 (float32), takes 4.25 (4.5) bits per weight.

    Raises:
        ImportError: qwix is not installed.
        ValueError: ``qtype`` or ``block`` is unknown; a pattern selects nothing; or a target is a
            part of a weight, or quantized already.

    References:
        Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv:2305.14314.
    """
    leaves = arrays_in(params)
    layout = layout or {}
    check_patterns(layout, "layout", leaves)
    others = not_parameters(params)
    chosen, _ = choose(leaves, targets, exclude=exclude, layout=layout, others=others)
    new: dict[str, Any] = {}
    for key, (path, ranges), _ in chosen:
        if ranges:
            raise ValueError(f"quantize: {key!r}: only entire weights can be quantized")
        if is_quantized(leaves[path]):
            raise ValueError(f"quantize: {path!r} is quantized already: pass exclude={path!r}")
        letters = letters_of(path, leaves, layout)
        new[path] = quantize_array(
            leaves[path], *tiles_of(leaves[path].shape, letters, qtype, block, path)
        )
    every, tree = flatten(params)
    return jax.tree.unflatten(tree, [new.get(path, x) for path, x in every.items()])


def tiles_of(
    shape: Sequence[int], layout: str, qtype: str, block: int | None, path: str
) -> tuple[str, dict[int, int]]:
    """Return qwix's name of a type, and by axis how many entries share a step."""
    if qtype not in _QTYPES:
        raise ValueError(f"quantize: qtype={qtype!r}: expected one of {sorted(_QTYPES)}")
    if block is not None and block < 2:
        raise ValueError(f"quantize: block={block!r}: expected at least 2 inputs, or None")
    inputs, size = role_axes(layout, "i"), block or _BLOCKS[qtype]
    if size is None:
        return _QTYPES[qtype], {axis: shape[axis] for axis in inputs}
    # The blocks are along the last input axis; the other axes are channels.
    return _QTYPES[qtype], {inputs[-1]: _tile(shape[inputs[-1]], size, path)}


def _tile(size: int, block: int, path: str) -> int:
    """Return the largest divisor of ``size`` up to ``block``."""
    tile = max(k for k in range(1, min(size, block) + 1) if size % k == 0)
    if 4 * tile < min(size, block):
        raise ValueError(
            f"quantize: {path!r} has an input axis of {size}, whose largest divisor up to "
            f"block={block} is {tile}: the scales would take more than they save. Pass another "
            f"block, or leave the weight out: exclude={path!r}"
        )
    return tile


def quantization_error(params: PyTree, exact: PyTree) -> dict[str, float]:
    """Measure the error of quantization by path: ``|W_q - W| / |W|``.

    Args:
        params: parameters with quantized weights, from :func:`quantize` or
            ``merge(..., quantized="requantize")``.
        exact: the same parameters unquantized, from before ``quantize`` or from
            ``merge(..., quantized="dequantize")``.

    Returns:
        ``{path: error}`` for the quantized leaves, and those of float8.

    Raises:
        ValueError: the two trees differ.
    """
    ours, theirs = flatten(params)[0], flatten(exact)[0]
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"quantization_error: the trees differ in {sorted(ours.keys() ^ theirs.keys())[:5]}"
        )
    return {path: relative_error(x, theirs[path]) for path, x in ours.items() if is_coarse(x)}


def dequantize(params: PyTree) -> PyTree:
    """Replace quantized arrays by plain ones, in the dtype of their scales; float8 by bfloat16."""
    return jax.tree.map(
        lambda x: dequantize_array(x) if is_coarse(x) else x, params, is_leaf=is_quantized
    )
