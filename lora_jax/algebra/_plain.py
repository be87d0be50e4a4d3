"""``to_plain``: move an adapter from a base that its initializer changed to the original base."""

from dataclasses import replace

import jax.numpy as jnp

from lora_jax._adapter.factors import Entry, Rows, form_of
from lora_jax._adapter.norms import with_norms
from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._weights.paths import PyTree


def to_plain(lora_params: LoraParams, initial: LoraParams, params: PyTree) -> LoraParams:
    """Convert an adapter of PiSSA or OLoRA, which change the base, to plain LoRA on the original.

    PiSSA and similar initializers start from ``W - s a0 b0`` and ``a0, b0``. So, at twice the
    rank::

        (W - s a0 b0) + s a b  =  W + s [a, a0] [b; -b0]

    Args:
        lora_params: the adapter after training.
        initial: the adapter before training: what ``lorafy`` returned, or returns again for the
            same arguments.
        params: the parameters that were passed to ``lorafy``.

    Returns:
        ``LoraParams(params, adapter)`` of rank ``2 rank``, which computes the same function.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``initial`` is not the start of ``lora_params``, or ``params`` do not fit.

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
        if form_of(f) != form_of(first):
            raise ValueError(
                f"to_plain: {name!r} has other factors in initial: {form_of(first)} and not "
                f"{form_of(f)}"
            )
        factors[name] = _doubled(f, first)
    return with_norms(LoraParams(params, Adapter(factors, lora_params.adapter.full)))


def _doubled(f: Entry, first: Entry) -> Entry:
    """Subtract the initial factors: ``[a, a0]`` and ``[b; -b0]``; rows by their values."""
    b_axis = f.layout.count("b")  # the axis of the rank
    ratio = jnp.asarray(first.scale) / jnp.asarray(f.scale)  # 1, unless the scale was changed
    b0 = (-ratio * first.b).astype(f.b.dtype)
    if isinstance(f, Rows):
        return replace(f, b=f.b + b0)
    return replace(
        f,
        a=jnp.concatenate([f.a, first.a], -1),
        b=jnp.concatenate([f.b, b0], b_axis),
        residual=False,
    )
