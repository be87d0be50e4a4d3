"""``to_plain``: an adapter of a changed base as one of the base as it was."""

from dataclasses import replace

import jax.numpy as jnp

from lora_jax._adapter.factors import Factors
from lora_jax._adapter.norms import with_norms
from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._weights.paths import PyTree


def to_plain(lora_params: LoraParams, initial: LoraParams, params: PyTree) -> LoraParams:
    """Turn an adapter whose initializer changed the base into plain LoRA on the base as it was.

    PiSSA and its like start from ``W - s a0 b0`` and ``a0, b0``. So, at twice the rank::

        (W - s a0 b0) + s a b  =  W + s [a, a0] [b; -b0]

    Args:
        lora_params: after training.
        initial: before training: what ``lorafy`` returned, or returns again for the same
            arguments.
        params: the parameters that ``lorafy`` was given.

    Returns:
        ``LoraParams(params, adapter)`` of rank ``2 rank``, and of the same function.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the two are not of one adapter, or not of ``params``.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jax.random.normal(jax.random.key(0), (4, 3))}}
        >>> initial = lora_jax.lorafy(params, rank=1, init="pissa")
        >>> plain = lora_jax.algebra.to_plain(initial, initial, params)
        >>> plain.adapter.factors["query/kernel"].rank
        2

    References:
        PEFT, ``path_initial_model_for_weight_conversion``.
    """
    for name, x in (("lora_params", lora_params), ("initial", initial)):
        if not isinstance(x, LoraParams):
            raise TypeError(f"to_plain: {name} is {type(x).__name__}, expected a LoraParams")
    now, then = lora_params.adapter.factors, initial.adapter.factors
    if now.keys() != then.keys():
        raise ValueError(
            f"to_plain: the two adapters differ in {sorted(now.keys() ^ then.keys())[:5]}: initial "
            "is not the start of lora_params"
        )
    check(LoraParams(params, initial.adapter))
    check(lora_params)
    factors = {}
    for name, f in now.items():
        first = then[name]
        if f.a.shape != first.a.shape or f.layout != first.layout:
            raise ValueError(f"to_plain: {name!r} has other factors in initial: {first.a.shape}")
        factors[name] = _doubled(f, first)
    return with_norms(LoraParams(params, Adapter(factors, lora_params.adapter.full)))


def _doubled(f: Factors, first: Factors) -> Factors:
    b_axis = f.layout.count("b")  # of the rank
    ratio = jnp.asarray(first.scale) / jnp.asarray(f.scale)  # 1, unless it was changed
    b0 = (-ratio * first.b).astype(f.b.dtype)
    return replace(
        f,
        a=jnp.concatenate([f.a, first.a], -1),
        b=jnp.concatenate([f.b, b0], b_axis),
        residual=False,
    )
