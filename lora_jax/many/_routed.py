"""``lora_routed(fn)``: the same function, with every input routed to adapters of a stack."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from lora_jax._adapter.params import Adapter, LoraParams
from lora_jax._transform.call import enter
from lora_jax._transform.context import Policy
from lora_jax._transform.labelled import Axis, Labelled
from lora_jax._transform.lora import check_function, marked, run_lora
from lora_jax._transform.pick import Router
from lora_jax._weights.axes import role_axes
from lora_jax._weights.numbers import is_int


def lora_routed(
    fn: Callable[..., Any], *, top_k: int = 2, temperature: float = 1.0
) -> Callable[..., Any]:
    """Transform ``fn`` to mix a stack's adapters for each token and weight, by routing vectors.

    The returned function takes the arguments of ``fn``, with a LoraParams whose adapter is a stack,
    and ``lora_router``, a direction ``v[n]`` per adapter, as :func:`arrow` finds them. Where ``x``
    meets an adapted weight it computes::

        x W + sum_n g[n] scale[n] (x a[n]) b[n],   g = softmax of the top_k |x v[n]| / temperature

    Every input reads the factors of all adapters, so the cost is that of one adapter of the sum of
    their ranks. A mixture depends on the input: it cannot be merged, nor serve a weight that is not
    multiplied by an input, as in lookups and convolutions.

    Args:
        fn: a pure function of arrays in pytrees.
        top_k: how many adapters an input is routed to, at most; those that tie with the last as
            well.
        temperature: the larger, the more alike their shares.

    Raises:
        TypeError: ``fn`` is not callable; or, at the call, the router is no mapping.
        ValueError: an option is out of range, or ``fn`` has an argument ``lora_router``. At the
            call: the adapter is no stack, has DoRA magnitudes or full leaves; the router is of
            other weights; or as :func:`lora`.
        NotImplementedError: at the call: a weight is used otherwise than by a product with inputs.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((3, 2))}}
        >>> stacked = lora_jax.many.stack([lora_jax.lorafy(params, rank=1) for _ in range(3)])
        >>> apply = lora_jax.many.lora_routed(lambda p, x: x @ p["query"]["kernel"])
        >>> apply(stacked, jnp.ones((1, 3)), lora_router=lora_jax.many.arrow(stacked))
        Array([[3., 3.]], dtype=float32)

    References:
        Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs,
        arXiv:2405.11157, section 4.
    """
    check_function(fn, "lora_routed", "lora_router", "error")
    if not is_int(top_k) or top_k < 1:
        raise ValueError(f"lora_routed: top_k={top_k!r}: expected an integer >= 1")
    if not temperature > 0:
        raise ValueError(f"lora_routed: temperature={temperature!r}: expected a number > 0")

    @functools.wraps(fn)
    def routed_fn(*args, lora_router, **kwargs):
        def routed(lora_params: LoraParams, owner: int, leaves: dict[str, Any]) -> dict[str, Any]:
            _check(lora_params, lora_router)
            routers = {}
            for key, f in lora_params.adapter.factors.items():
                axes = (*role_axes(f.layout, "b"), *role_axes(f.layout, "i"), Axis.MEMBER)
                directions = Labelled(lora_router[key], axes)
                routers[key] = Router(directions, top_k, float(temperature))
            return enter(lora_params, owner, leaves, pick=routers)

        return run_lora(Policy("error"), fn, args, kwargs, routed)

    return marked(routed_fn)


def _check(lora_params: LoraParams, router: Any) -> None:
    adapter = lora_params.adapter
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"lora_routed: LoraParams.adapter is {type(adapter).__name__}, expected an Adapter "
            "that is a stack, such as lora_jax.many.stack([...]) returns"
        )
    if not isinstance(router, Mapping):
        raise TypeError(
            f"lora_router is {type(router).__name__}, expected directions by the key of every "
            "weight, such as lora_jax.many.arrow(stacked) returns"
        )
    if adapter.full:
        raise ValueError(
            f"lora_routed: {next(iter(adapter.full))!r} is a full leaf, and a mixture of full "
            "leaves would have to be built for every input. Route adapters without full="
        )
    if router.keys() != adapter.factors.keys():
        wrong = sorted(router.keys() ^ adapter.factors.keys())
        raise ValueError(
            f"lora_router is of other weights than the stack: {wrong[0]!r} is in one of them only. "
            "Compute it from this stack: lora_jax.many.arrow(stacked)"
        )
    for key, f in adapter.factors.items():
        if f.magnitude is not None:
            raise ValueError(
                f"lora_routed: {key!r} has DoRA magnitudes, which would have to normalize another "
                "mixture for every input. Route plain LoRA"
            )
        expected = (*jnp.shape(f.a)[1:-1], *jnp.shape(f.scale))
        if jnp.ndim(f.scale) != 1 or jnp.shape(router[key]) != expected:
            raise ValueError(
                f"lora_routed: at {key!r} the router has shape {jnp.shape(router[key])} and scale "
                f"{jnp.shape(f.scale)}, expected a stack's, [adapters], and directions [*batch, "
                "*in, adapters], such as lora_jax.many.arrow(stacked) returns"
            )
