"""``arrow``: the direction of the input that each adapter of a stack answers to most."""

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import Entry, wide
from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._jax import whole
from lora_jax._weights.axes import role_axes


def arrow(stacked: LoraParams | Adapter) -> dict[str, jax.Array]:
    """Return what :func:`lora_routed` routes by: a direction for each weight and adapter.

    The one that the update stretches most, its leading singular vector on the side of the input::

        v = argmax |x a b|,  |x| = 1

    from the factors alone, without training and without data. An adapter that does nothing at a
    weight, or is not finite there, has a direction of zeros, and nothing is routed to it.

    Args:
        stacked: from :func:`stack`.

    Returns:
        ``[*batch, *in, adapters]`` in float32 by the key of every weight; of norm 1 over the
        inputs, of either sign.

    Raises:
        TypeError: ``stacked`` is neither a LoraParams nor an Adapter.
        ValueError: it is no stack.

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
    """Of one adapter: ``[*batch, *in]``."""
    n = len(role_axes(f.layout, "b"))
    a, b = whole(f.a), whole(f.b)
    a = a.astype(wide(f.a.dtype)).reshape(*f.a.shape[:n], -1, f.rank)
    b = b.astype(wide(f.b.dtype)).reshape(*f.b.shape[:n], f.rank, -1)
    q, r = jnp.linalg.qr(a)
    core = jnp.matmul(r, jnp.linalg.qr(b.mT, mode="r").mT, precision="highest")
    u, s, _ = jnp.linalg.svd(core, full_matrices=False)
    v = jnp.matmul(q, u[..., :1], precision="highest")[..., 0]
    norm = s[..., 0] * jnp.asarray(f.scale, s.dtype)
    does = (norm != 0) & jnp.isfinite(norm)
    return jnp.where(does[..., None], v, 0).reshape(f.a.shape[:-1]).astype(jnp.float32)
