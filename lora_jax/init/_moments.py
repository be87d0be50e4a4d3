"""``input_moments``: second moments of the inputs that adapted weights read."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.factors import Factors
from lora_jax._adapter.params import Adapter, LoraParams, check, is_lora
from lora_jax._transform.call import is_traced
from lora_jax._transform.context import Policy
from lora_jax._transform.lora import run_lora
from lora_jax._weights.axes import factor_shapes
from lora_jax._weights.target import Target


def input_moments(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
    """Return ``sum x x^T`` over all inputs ``x`` of each adapted weight in a call of ``fn``.

    Takes one forward and one backward pass, with ``[in, in]`` numbers per weight. Add up the
    results of several batches by ``jax.tree.map(jnp.add, moments, more)``.

    Args:
        fn: a function as for :func:`lora`.
        *args: its arguments, with one LoraParams where it takes parameters. The LoraParams selects
            the weights and gives their layouts; its factors do not matter.
        **kwargs: as ``args``.

    Returns:
        ``{path: [*batch, in, in]}`` in float32, by the keys of ``lora_params.adapter.factors``.
        Lookups do not count, nor uses that contract a weight's output axes, as tied heads do.

    Raises:
        TypeError: the arguments do not contain exactly one LoraParams.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> lora_params = lora_jax.lorafy({"query": {"kernel": jnp.ones((2, 3))}}, rank=1)
        >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
        >>> lora_jax.init.input_moments(lambda p, x: x @ p["query"]["kernel"], lora_params, x)
        {'query/kernel': Array([[2., 2.],
               [2., 4.]], dtype=float32)}
    """
    nodes, tree = jax.tree.flatten((args, kwargs), is_leaf=is_lora)
    places = [i for i, node in enumerate(nodes) if is_lora(node)]
    if len(places) != 1:
        raise TypeError(
            f"input_moments: expected one LoraParams among the arguments, such as lorafy(params, "
            f"...) returns, got {len(places)}: it selects the weights"
        )
    lora_params = nodes[places[0]]
    leaves, parts = check(lora_params)
    identities, rest, shapes = {}, {}, {}
    for name, f in lora_params.adapter.factors.items():
        target = Target(name, leaves[parts[name].path], parts[name], f.layout)
        n = target.inputs
        shapes[name] = (*target.batch, n, n)
        a_shape, b_shape = factor_shapes(f.layout, target.shape, n)
        identities[name] = jnp.broadcast_to(jnp.eye(n), shapes[name]).reshape(a_shape)
        rest[name] = jnp.zeros(b_shape), jnp.float32(1), f.layout

    arrays = {i: node for i, node in enumerate(nodes) if is_traced(node)}

    def total(identities, base, arrays):
        factors: dict[str, Any] = {name: Factors(a, *rest[name]) for name, a in identities.items()}
        arrays[places[0]] = LoraParams(base, Adapter(factors))
        probed = jax.tree.unflatten(tree, [arrays.get(i, node) for i, node in enumerate(nodes)])
        outputs = run_lora(Policy("error", observe=_observe), fn, *probed)
        floats = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.floating)]
        return sum((y.astype(jnp.float32).sum() for y in floats), jnp.float32(0))

    found = jax.jit(jax.grad(total))(identities, lora_params.base, arrays)
    return {name: a.reshape(shapes[name]) for name, a in found.items()}


def _observe(product: Callable[..., jax.Array], x: jax.Array, a: jax.Array) -> jax.Array:
    """Return the bilinear ``product(x, a)``, with ``x (x a)^T`` for the gradient of ``a``.

    If ``a`` is the identity, that is ``x x^T``; autodiff adds it up over loops and uses.
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
