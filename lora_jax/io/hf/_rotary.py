"""Reorder queries and keys between the two conventions of rotary embeddings.

A rotary embedding turns pairs of a head's entries: neighbours, or the first half with the second.
The two conventions differ only in the order of the entries that a query and a key write, so the
weights of one can serve a model of the other. The files of Hugging Face have halves; GGUF files and
some Flax models have neighbours.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._weights.axes import role_axes
from lora_jax._weights.conventions import conventional
from lora_jax._weights.paths import PyTree, flatten, nearest
from lora_jax._weights.quantized import is_quantized
from lora_jax._weights.selector import lookup
from lora_jax.io._torch import module_path


def rotary_halves(
    params: PyTree, targets: str, head_dim: int, *, layout: Mapping[str, str] | None = None
) -> PyTree:
    """Reorder query and key weights from interleaved rotary pairs to half-split rotary.

    The pairs ``(0, 1), (2, 3), ...`` of every head become ``(0, d/2), (1, d/2 + 1), ...``. Use it,
    for example, before :func:`save` of a Flax model with interleaved pairs.

    Args:
        params: parameters, or a LoraParams, whose factors are reordered as well.
        targets: a regular expression of the weights and biases of queries and keys, and of the
            norms inside their heads.
        head_dim: the number of entries of a head.
        layout: of the weights, as in ``lorafy``.

    Returns:
        The same tree, reordered.

    Raises:
        ValueError: ``targets`` matches nothing, or leaves that do not consist of such heads.

    Example:
        >>> import jax.numpy as jnp
        >>> from lora_jax.io import hf
        >>> params = {"query": {"bias": jnp.array([0, 1, 2, 3, 10, 11, 12, 13])}}
        >>> hf.rotary_halves(params, "query/bias", head_dim=4)["query"]["bias"]
        Array([ 0,  2,  1,  3, 10, 12, 11, 13], dtype=int32)
    """
    return _reordered(params, targets, head_dim, (-1, 2), layout)


def rotary_pairs(
    params: PyTree, targets: str, head_dim: int, *, layout: Mapping[str, str] | None = None
) -> PyTree:
    """Reorder query and key weights from half-split rotary to interleaved pairs."""
    return _reordered(params, targets, head_dim, (2, -1), layout)


def _reordered(
    params: PyTree,
    targets: str,
    head_dim: int,
    pairs: tuple[int, int],
    layout: Mapping[str, str] | None,
) -> PyTree:
    """Reorder every head from pairs laid out as one shape to the transposed one."""
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: expected an even number")
    order = np.arange(head_dim).reshape(pairs).T.reshape(-1)
    lora_params = params if isinstance(params, LoraParams) else LoraParams(params, Adapter({}))
    if isinstance(lora_params.base, LoraParams):
        raise ValueError(
            "under this adapter is a frozen one: reorder LoraParams(base, adapter) of each of them"
        )
    leaves, parts = check(lora_params)
    _, tree = flatten(lora_params.base)
    chosen = {path for path in leaves if re.fullmatch(targets, path)}
    if not chosen:
        raise ValueError(
            f"targets={targets!r} matches no leaf. Nearest: {nearest(targets, leaves)}"
        )

    def leaf(path: str, x: Any) -> Any:
        if path not in chosen:
            return x
        if x.ndim < 2 or module_path(path, leaves)[1] == "bias":
            return _along(x, x.ndim - 1, path, order)
        letters = lookup(layout or {}, path, "layout") or conventional(path, x, leaves)
        return _along(x, role_axes(letters, "o")[-1], path, order)

    def factors(key: str, f: Factors) -> Factors:
        path, ranges = parts[key]
        if path not in chosen:
            return f
        if any(f.layout[r.axis] == "o" for r in ranges):
            raise ValueError(f"{key!r} is a part of the outputs of {path!r}: adapt all or none")
        of_outputs = {n: getattr(f, n) for n in ("b", "magnitude", "norm")}
        new = {
            n: _along(x, x.ndim - 1, path, order) for n, x in of_outputs.items() if x is not None
        }
        return dataclasses.replace(f, **new)

    base = jax.tree.unflatten(tree, [leaf(path, x) for path, x in leaves.items()])
    if not isinstance(params, LoraParams):
        return base
    adapter = lora_params.adapter
    full = {path: leaf(path, x) for path, x in adapter.full.items()}
    return LoraParams(base, Adapter({k: factors(k, f) for k, f in adapter.factors.items()}, full))


def _along(x: Any, axis: int, path: str, order: np.ndarray) -> Any:
    """Reorder the entries of every head along an axis."""
    if is_quantized(x):
        raise ValueError(f"{path!r} is quantized: reorder before lora_jax.quant.quantize")
    if x.shape[axis] % len(order):
        raise ValueError(
            f"{path!r} has shape {tuple(x.shape)}: its axis {axis} is not made of heads of "
            f"{len(order)}. If another axis is the output, pass layout="
        )
    heads = np.arange(x.shape[axis]).reshape(-1, len(order))
    return jnp.take(x, jnp.asarray(heads[:, order].reshape(-1)), axis=axis)
