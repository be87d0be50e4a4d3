"""``extract``: turn what fine-tuning changed into a LoRA of the base."""

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax._adapter.factors import Factors, master
from lora_jax._adapter.lowrank import LowRank, svd
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._jax import replicated
from lora_jax._weights.axes import factor_shapes, not_trainable
from lora_jax._weights.choose import choose
from lora_jax._weights.numbers import check_int, check_positive
from lora_jax._weights.paths import PyTree, arrays_in, nearest, not_parameters
from lora_jax._weights.quantized import plain_array
from lora_jax._weights.selector import Selector, check_patterns, letters_of, lookup
from lora_jax._weights.target import Target

Rest = Literal["error", "ignore", "full"]


def extract(
    base: PyTree,
    tuned: PyTree,
    rank: int | Mapping[str, int] | None = None,
    *,
    energy: float | None = None,
    alpha: float | None = None,
    targets: Selector = "all-linear",
    exclude: Selector = None,
    layout: Mapping[str, str] | None = None,
    rest: Rest = "error",
    dtype: DTypeLike = jnp.float32,
) -> LoraParams:
    """Find the LoRA of ``base`` that comes nearest to ``tuned``.

    The factors hold the largest ``rank`` singular values of the change, for each batch entry
    (layer, expert) separately::

        tuned - base = U S V^T
        a = U sqrt(S / scale),  b = sqrt(S / scale) V^T,  scale = alpha / rank

    No matrix of that rank is nearer in the Frobenius norm. Weights that did not change get no
    factors. The function reads values, so it does not run under ``jit``.

    Args:
        base: the parameters before fine-tuning.
        tuned: the parameters after it, a tree of the same paths and shapes.
        rank: the rank of the factors, or ``{pattern: rank}``. A weight with fewer inputs or outputs
            gets that number as its rank, and is exact.
        energy: an alternative to ``rank``: the share of the sum of squared singular values to keep.
            Each weight gets the smallest rank that keeps it, in every layer of a stacked weight.
        alpha: scales the update by ``alpha / rank``; None: by 1.
        targets: the weights that get factors, as in :func:`lorafy`.
        exclude: as in :func:`lorafy`.
        layout: as in :func:`lorafy`.
        rest: what to do with other leaves that changed (biases, norms, embeddings): ``"error"``,
            ``"ignore"``, or ``"full"``, which makes them full leaves.
        dtype: the dtype of the factors.

    Returns:
        A LoraParams over ``base``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the trees belong to different models, are equal, or are not finite; a leaf
            changed that is no target; or an argument is out of range.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> base = {"query": {"kernel": jnp.zeros((3, 2))}}
        >>> tuned = {"query": {"kernel": jnp.ones((3, 2))}}
        >>> lora_params = lora_jax.algebra.extract(base, tuned, rank=1)
        >>> float(jnp.abs(lora_jax.merge(lora_params)["query"]["kernel"] - 1).max()) < 1e-6
        True

    References:
        Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
    """
    check_options(rank, energy, alpha, rest)
    leaves, after = arrays_in(base), arrays_in(tuned)
    _check_same(leaves, after)
    changed = {path: _changed(leaves[path], after[path]) for path in leaves}
    if not any(where.any() for where in changed.values()):
        raise ValueError("extract: base and tuned are equal: there is nothing to extract")
    layout = {} if layout is None else layout
    others = not_parameters(base)
    chosen = choose(leaves, targets, exclude=exclude, layout=layout, others=others)[0]
    check_patterns(rank, "rank", {weight.part.path for weight in chosen})
    factors: dict[str, Any] = {}
    adapted = set()
    for key, part, answer in chosen:
        path = part.path
        if not changed[path].any():
            continue
        letters = letters_of(path, leaves, layout)
        wanted = lookup(rank, path, "rank") if answer is True else answer
        if energy is None and wanted is None:
            raise ValueError(f"rank: no pattern of the mapping matches {path!r}; end with '.*'")
        before, now = (Target(key, plain_array(x[path]), part, letters) for x in (leaves, after))
        if not changed[path][now.index].any():
            continue
        part = truncated(now.matrix() - before.matrix(), wanted, energy, alpha, key)
        shapes = factor_shapes(letters, now.shape, part.rank)
        pairs = zip((part.a, part.b), shapes, strict=True)
        a, b = (jnp.asarray(x, dtype).reshape(shape) for x, shape in pairs)
        factors[key] = Factors(a, b, jnp.asarray(part.scale, jnp.float32), letters)
        changed[path][now.index] = False
        adapted.add(path)
    left = [path for path, where in changed.items() if where.any()]
    check_rest(left, rest)
    left = left if rest == "full" else []
    if state := {path: others[path] for path in left if path in others}:
        raise ValueError(
            f"extract: rest='full': {', '.join(f'{p!r} ({what})' for p, what in state.items())} "
            "changed, and only parameters train fully. Give the parameters of both models alone, "
            "such as nnx.state(model, nnx.Param), and save the rest by save(..., state=...)"
        )
    full = {path: _full(path, after[path], adapted, targets) for path in left}
    return LoraParams(base, Adapter(factors, full))


def _full(path: str, leaf: Any, adapted: Collection[str], targets: Any) -> jax.Array:
    """Make a changed leaf a full leaf, or raise if it cannot be one."""
    if reason := not_trainable(leaf):
        raise ValueError(f"extract: {path!r} changed, and cannot train fully: {reason}")
    if path in adapted:
        raise ValueError(
            f"extract: {path!r} changed outside the part in targets={targets!r}, and cannot "
            "train fully as well: take the entire weight, or rest='ignore'"
        )
    return master(plain_array(leaf))


def truncated(
    delta: jax.Array, rank: int | None, energy: float | None, alpha: float | None, name: str
) -> LowRank:
    """Find the nearest product to ``delta`` that has this rank, or keeps this energy.

    Args:
        delta: ``[*batch, in, out]``.
        rank: the rank, at most ``min(in, out)``.
        energy: the share of the energy, if ``rank`` is None.
        alpha: as in :func:`extract`.
        name: the name of the weight, for messages.

    Raises:
        ValueError: ``delta`` is not finite.
    """
    if not jnp.isfinite(delta).all():
        raise ValueError(f"extract: {name!r} is not finite in base or tuned")
    parts = svd(replicated(delta)).truncated(rank, energy)
    scale = 1.0 if alpha is None else alpha / parts.s.shape[-1]
    return LowRank(*parts.balanced(scale), scale)


def check_options(rank: Any, energy: Any, alpha: Any, rest: str) -> None:
    """Raise unless the options fit together."""
    if (rank is None) == (energy is None):
        raise ValueError(f"extract: {rank=} and {energy=}: expected one of the two")
    for r in rank.values() if isinstance(rank, Mapping) else [rank]:
        if energy is None:
            check_int(r, "extract: rank", 1)
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"extract: {energy=}: expected a share, above 0 and up to 1")
    if alpha is not None:
        check_positive(alpha, "extract: alpha")
    if rest not in get_args(Rest):
        raise ValueError(f"extract: {rest=}: expected one of {get_args(Rest)}")


def check_rest(left: list[str], rest: str) -> None:
    """Raise if leaves changed that are no targets, unless ``rest`` allows it."""
    if left and rest == "error":
        shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
        raise ValueError(
            f"extract: {len(left)} tensors changed that are no targets: {shown}. To leave them as "
            "they are in the base: rest='ignore'; to take them in full: rest='full'"
        )


def _changed(before: Any, after: Any) -> np.ndarray:
    """Return which entries differ."""
    return np.asarray(np.asarray(plain_array(before)) != np.asarray(plain_array(after)))


def _check_same(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> None:
    if not base:
        raise ValueError("extract: base has no arrays")
    for path in [*base, *tuned]:
        if path not in base or path not in tuned:
            has, other = ("tuned", base) if path not in base else ("base", tuned)
            raise ValueError(
                f"extract: only {has} has a leaf {path!r}: these are two models. Nearest in the "
                f"other: {nearest(path, other)}"
            )
        if tuple(base[path].shape) != tuple(tuned[path].shape):
            raise ValueError(
                f"extract: {path!r} has shape {tuple(base[path].shape)} in base and "
                f"{tuple(tuned[path].shape)} in tuned: these are two models"
            )
