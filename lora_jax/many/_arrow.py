"""``arrow``: find the input direction that each adapter of a stack amplifies most."""

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import Entry
from lora_jax._adapter.lowrank import LowRank
from lora_jax._adapter.params import Adapter, LoraParams


def arrow(stacked: LoraParams | Adapter) -> dict[str, jax.Array]:
    """Compute a routing vector per weight and member for :func:`lora_routed` (Arrow).

    A direction is the input that the update amplifies most, its first left singular vector::

        v = argmax |x a b|,  |x| = 1

    It comes from the factors alone, without training or data. A member whose update of a weight is
    zero or not finite has a direction of zeros, and nothing is routed to it.

    Args:
        stacked: from :func:`stack`.

    Returns:
        A dict of ``[*batch, *in, adapters]`` in float32 for each weight. Directions have norm 1
        over the inputs; their sign is arbitrary.

    Raises:
        TypeError: ``stacked`` is neither a LoraParams nor an Adapter.
        ValueError: ``stacked`` is not a stack.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> a, b = jnp.array([[1.0], [0.0]]), jnp.array([[2.0, 0.0]])
        >>> one = lora_jax.Adapter({"w": lora_jax.Factors(a, b, jnp.ones(()), "io")})
        >>> other = lora_jax.Adapter({"w": lora_jax.Factors(a[::-1], b, jnp.ones(()), "io")})
        >>> abs(lora_jax.many.arrow(lora_jax.many.stack([one, other]))["w"])
        Array([[1., 0.],
               [0., 1.]], dtype=float32)

    References:
        Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs,
        arXiv:2405.11157, section 4.
    """
    adapter = stacked.adapter if isinstance(stacked, LoraParams) else stacked
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"arrow: stacked is {type(stacked).__name__}, expected what lora_jax.many.stack returns"
        )
    for key, f in adapter.factors.items():
        if jnp.ndim(f.scale) != 1:
            raise ValueError(
                f"arrow: this is no stack: scale of {key!r} has shape {jnp.shape(f.scale)}, "
                "expected [adapters]. lora_jax.many.stack([one, two]) makes one"
            )
    return {key: jax.vmap(_direction, out_axes=-1)(f) for key, f in adapter.factors.items()}


def _direction(f: Entry) -> jax.Array:
    """Return the direction of one member: ``[*batch, *in]``."""
    u, s, _ = LowRank.of(f).svd(1, right=False)  # [*batch, in, 1], [*batch, 1]
    acts = (s != 0) & jnp.isfinite(s)
    return jnp.where(acts, u[..., 0], 0).reshape(f.a.shape[:-1]).astype(jnp.float32)
