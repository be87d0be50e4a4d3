"""``change_per_layer``: the relative size of every update, ordered by module and layer."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._weights.layers import layer_numbers
from lora_jax._weights.selector import Selector
from lora_jax.analysis._changes import changes, norm


def change_per_layer(x: Any, *, targets: Selector = ".*") -> dict[str, jax.Array]:
    """Measure how much every weight changed, relative to its size.

    ::

        |dW|_F / |W|_F

    Args:
        x: a LoraParams. For two checkpoints, pass
            ``lora_jax.algebra.extract(before, after, energy=1.0, rest="full")``.
        targets: which entries, as in :func:`spectra`; vectors count here.

    Returns:
        A dict of ``[*batch]``, ordered by module, and within one by layer: all queries, then all
        values. The change of table rows is relative to the entire table, that of a part to the
        part. It is infinite where a zero weight changed, and 0 where nothing changed.

    Raises:
        TypeError: ``x`` is no LoraParams.
        ValueError: as in :func:`spectra`.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> base = {f"layer_{k}": {"q": {"kernel": jnp.ones((2, 2))}} for k in range(2)}
        >>> x = lora_jax.lorafy(base, rank=1, full="layer_1.*", targets="layer_0.*")
        >>> lora_jax.analysis.change_per_layer(x)
        {'layer_0/q/kernel': Array(0., dtype=float32), 'layer_1/q/kernel': Array(0., dtype=float32)}
    """
    found = {}
    for key, change in changes("change_per_layer", x, targets, lambda *_: None, base=True):
        moved, size = change.norm(), norm(change.weight)
        found[key] = jnp.where(moved == 0, jnp.zeros_like(moved), moved / size)
    return {key: found[key] for key in module_of(found)}


def module_of(keys: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Return the module and the layer of each key: modules as they come, layers ascending.

    >>> module_of(["layers_10/q", "layers_2/q", "head/w"])
    {'layers_2/q': ('layers_*/q', 2), 'layers_10/q': ('layers_*/q', 10), 'head/w': ('head/w', None)}
    """
    by_path = {key.replace(".", "/"): key for key in keys}  # names in PyTorch's files have dots
    found: dict[str, tuple[str, int | None]] = {key: (key, None) for key in by_path.values()}
    for path, number in layer_numbers(by_path).items():
        key = by_path[path]
        stem = key[: len(number.module)].rstrip("0123456789")
        found[key] = (f"{stem}*{key[len(number.module) :]}", number.value)
    order = list(dict.fromkeys(module for module, _ in found.values()))
    rank = {module: k for k, module in enumerate(order)}
    return dict(sorted(found.items(), key=lambda item: (rank[item[1][0]], item[1][1] or 0)))
