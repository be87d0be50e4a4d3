"""``input_moments``: what the adapted weights read, summed up."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._layout import factor_shapes
from lora_jax._params import Adapter, LoraParams, check
from lora_jax._ranges import entry
from lora_jax._transform._context import Context
from lora_jax._transform._lora import run_lora
from lora_jax.init._target import Target


def input_moments(fn: Callable[..., Any], lora_params: LoraParams, *args: Any) -> dict[str, Any]:
    """Return ``sum x x^T`` over all that each adapted weight reads in ``fn(params, *args)``.

    One forward and one backward pass, with ``[in, in]`` numbers a weight. Add up the results of
    several batches by ``jax.tree.map(jnp.add, moments, more)``.

    Args:
        fn: a function whose first argument is parameters.
        lora_params: which weights, and their layouts; the factors do not matter.
        *args: a batch: further arguments of ``fn``.

    Returns:
        ``{path: [*batch, in, in]}`` in float32, by the keys of ``lora_params.adapter.factors``.
        Lookups, and uses that read a weight from behind, as tied heads do, do not count.

    Raises:
        TypeError: ``lora_params`` is not a LoraParams.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> lora_params = lora_jax.lorafy({"query": {"kernel": jnp.ones((2, 3))}}, rank=1)
        >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> lora_jax.input_moments(lambda p, x: x @ p["query"]["kernel"], lora_params, x)
        {'query/kernel': Array([[2., 2.],
               [2., 4.]], dtype=float32)}
    """
    if not isinstance(lora_params, LoraParams):
        raise TypeError(
            f"input_moments: lora_params is {type(lora_params).__name__}, expected a LoraParams, "
            "such as lorafy(params, ...) returns: it says which weights"
        )
    leaves, identities, shapes = check(lora_params), {}, {}
    for name, f in lora_params.adapter.factors.items():
        path, ranges = entry(name, leaves)
        target = Target(name, leaves[path], ranges, f.layout, 1, 1.0, 1)
        n = target.inputs
        shapes[name] = (*target.batch, n, n)
        a_shape, b_shape = factor_shapes(f.layout, target.shape, n)
        a = jnp.broadcast_to(jnp.eye(n), shapes[name]).reshape(a_shape)
        identities[name] = replace(
            f, a=a, b=jnp.zeros(b_shape), scale=jnp.float32(1), magnitude=None, norm=None, frozen=()
        )

    @jax.jit
    def gradients(identities, base, args):
        def total(identities):
            probe = LoraParams(base, Adapter(identities))
            outputs = run_lora(Context("error", observe=_observe), fn, (probe, *args), {})
            floats = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.floating)]
            return sum((y.astype(jnp.float32).sum() for y in floats), jnp.float32(0))

        return jax.grad(total)(identities)

    found = gradients(identities, lora_params.base, args)
    return {name: f.a.reshape(shapes[name]) for name, f in found.items()}


def _observe(product: Callable[..., jax.Array], x: jax.Array, a: jax.Array) -> jax.Array:
    """``product(x, a)``, bilinear, where the gradient of ``a`` is made to be ``x (x a)^T``.

    With the identity for ``a`` that is ``x x^T``; autodiff adds it up over loops and uses.
    """

    @jax.custom_vjp
    def observed(x, a):
        return product(x, a)

    def forward(x, a):
        y = product(x, a)
        return y, (x, a, y)

    def backward(residuals, cotangent):
        x, a, y = residuals
        _, vjp = jax.vjp(product, x, a)
        return vjp(cotangent)[0], vjp(y)[1]

    observed.defvjp(forward, backward)
    return observed(x, a)
