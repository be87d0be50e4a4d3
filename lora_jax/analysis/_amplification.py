"""``amplification``: compare an update with what the weight has in the same directions."""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from lora_jax._adapter.lowrank import SVD, matmul, svd
from lora_jax._weights.numbers import check_int
from lora_jax._weights.selector import Selector
from lora_jax._weights.target import fold_in_path
from lora_jax.analysis._changes import Change, changes, check_values, no_map, norm

Directions = Literal["update", "weight", "random"]


class Amplification(NamedTuple):
    """Norms of one weight ``W``, of its update ``dW``, and of ``W`` in chosen directions.

    Attributes:
        update: ``|dW|_F``, ``[*batch]``.
        weight: ``|W|_F``, ``[*batch]``.
        projected: ``|U^T W V|_F``, ``[*batch]``.
    """

    update: jax.Array
    weight: jax.Array
    projected: jax.Array

    @property
    def factor(self) -> jax.Array:
        """The amplification factor, ``|dW|_F / |U^T W V|_F``: ``[*batch]``."""
        return self.update / self.projected


def amplification(
    x: Any,
    *,
    rank: int | None = None,
    directions: Directions = "update",
    key: jax.Array | None = None,
    targets: Selector = ".*",
) -> dict[str, Amplification]:
    """Measure how much an update amplifies its directions, which the weight has but weakly.

    ``U`` and ``V`` hold the first ``rank`` singular vectors of ``dW`` on the side of the inputs and
    on that of the outputs. The factor is ::

        |dW|_F / |U^T W V|_F

    In the paper it is about 21 at rank 4: the update is large where the weight is small. For the
    comparison there, ``directions="weight"`` takes the first singular vectors of ``W`` itself, and
    ``"random"`` takes random orthonormal ones.

    Directions in which ``dW`` is zero do not count: its rank may be lower than that of its factors.

    Args:
        x: a LoraParams.
        rank: the number of directions; None: the rank of the factors.
        directions: whose directions ``U`` and ``V`` are.
        key: a PRNG key for random directions; each weight draws its own.
        targets: which entries, as in :func:`spectra`.

    Returns:
        A dict of :class:`Amplification` for each entry that is a linear map: no vectors, and no
        table rows.

    Raises:
        TypeError: ``x`` is no LoraParams; or ``key`` and ``directions`` do not go together.
        ValueError: an update is zero (a traced one gives NaNs); ``rank`` is beyond that of an
            update, or missing for a full leaf; an argument is out of range; or as in
            :func:`spectra`.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> base = {"w": jnp.diag(jnp.array([10.0, 0.5]))}
        >>> f = lora_jax.Factors(jnp.array([[0.0], [1.0]]), jnp.array([[0.0, 2.0]]), 1.0, "io")
        >>> x = lora_jax.LoraParams(base, lora_jax.Adapter({"w": f}))
        >>> lora_jax.analysis.amplification(x)["w"].factor
        Array(4., dtype=float32)

    References:
        Hu et al., LoRA, arXiv:2106.09685, section 7.3 and table 7.
    """
    if directions not in get_args(Directions):
        raise ValueError(
            f"amplification: directions={directions!r}: expected one of {get_args(Directions)}"
        )
    if (key is not None) != (directions == "random"):
        raise TypeError(
            f"amplification: directions={directions!r} and key={key!r}: expected a PRNG key, such "
            "as jax.random.key(0), for directions='random' alone"
        )
    if rank is not None:
        check_int(rank, "amplification: rank", 1)
    found = {}
    for name, change in changes("amplification", x, targets, no_map, base=True):
        found[name] = _measured(name, change, _rank_of(name, change, rank), directions, key)
    return found


def _rank_of(name: str, change: Change, rank: int | None) -> int:
    """Return the number of directions of a weight."""
    largest = min(change.weight.shape[-2:])
    if change.rank is not None:
        largest = min(largest, change.rank)
    elif rank is None:
        raise ValueError(
            f"amplification: {name!r} is a full leaf, and has no rank: pass rank=, the number of "
            f"directions, up to {largest}"
        )
    if rank is not None and rank > largest:
        raise ValueError(
            f"amplification: rank={rank}: the update of {name!r} has {largest} directions: pass "
            f"rank={largest} or less"
        )
    return largest if rank is None else int(rank)


def _measured(
    name: str, change: Change, rank: int, directions: Directions, key: jax.Array | None
) -> Amplification:
    own, w = change.svd(), change.weight
    size = jnp.sqrt(jnp.square(own.s).sum(-1))
    check_values(
        f"amplification: the update of {name!r} is zero{{where}}, and has no directions: train it "
        "first, or leave it out by targets=",
        size == 0,
    )
    parts = own.truncated(rank)
    if directions == "weight":
        parts = svd(w, rank)
    elif directions == "random":
        assert key is not None
        parts = _random(fold_in_path(key, name), w, rank)
    projected = matmul(matmul(parts.u.mT, w), parts.vt.mT)  # [*batch, rank, rank]
    if directions == "update":
        smallest = jnp.asarray(max(w.shape[-2:]) * jnp.finfo(w.dtype).eps, own.s.dtype)
        counts = (parts.s > smallest * own.s[..., :1]).astype(w.dtype)
        projected = projected * counts[..., :, None] * counts[..., None, :]
    return Amplification(size, norm(w), norm(projected))


def _random(key: jax.Array, w: jax.Array, rank: int) -> SVD:
    """Draw orthonormal directions on both sides."""
    *batch, inputs, outputs = w.shape
    u, v = (
        jnp.linalg.qr(jax.random.normal(k, (*batch, n, rank), w.dtype))[0]
        for k, n in zip(jax.random.split(key), (inputs, outputs), strict=True)
    )
    return SVD(u, jnp.ones((*batch, rank), w.dtype), v.mT)
