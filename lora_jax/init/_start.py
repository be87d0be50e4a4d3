"""Run initializers, and turn their matrices into the factors of a weight."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lora_jax._adapter.factors import Entry, is_concrete
from lora_jax._weights.axes import factor_shapes
from lora_jax._weights.quantized import is_quantized
from lora_jax._weights.target import Initializer, Target
from lora_jax.init._random import gaussian, kaiming_uniform, orthogonal
from lora_jax.init._svd import olora, pissa

NAMES: Mapping[str, Initializer] = {
    "gaussian": gaussian,
    "kaiming_uniform": kaiming_uniform,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}


def resolve_init(init: str | Initializer) -> Initializer:
    """Look up an initializer by name; return ``init`` itself if it is a function."""
    if callable(init):
        return init
    if init not in NAMES:
        raise ValueError(
            f"init={init!r}: expected one of {sorted(NAMES)}, or a function (key, target) -> "
            "(a, b), such as those of lora_jax.init"
        )
    return NAMES[init]


def start(
    init: Initializer, key: jax.Array, target: Target, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array, Any]:
    """Run an initializer.

    Returns:
        ``a`` and ``b`` in the shapes of the factors, and the leaf that goes into the base, or None
        if the weight stays unchanged.

    Raises:
        TypeError: the initializer did not return a tuple of two or three.
        ValueError: the matrices have wrong shapes.
    """
    name = _name(init)
    made = init(key, target)
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise TypeError(
            f"init={name}: it returned {type(made).__name__} for {target.path!r}, expected a tuple "
            "(a, b), or (a, b, weight) where scale * a b is not zero"
        )
    a, b, *rest = made
    expected = (
        (*target.batch, target.inputs, target.rank),
        (*target.batch, target.rank, target.outputs),
    )
    if (jnp.shape(a), jnp.shape(b)) != expected:
        raise ValueError(
            f"init={name}: for {target.path!r} it returned a {jnp.shape(a)} and b {jnp.shape(b)}, "
            f"expected a [*batch, in, rank] = {expected[0]} and b [*batch, rank, out] = "
            f"{expected[1]}"
        )
    shapes = factor_shapes(target.layout, target.shape, target.rank)
    a, b = (jnp.asarray(x, dtype).reshape(shape) for x, shape in zip((a, b), shapes, strict=True))
    if rest and is_quantized(rest[0]):
        return a, b, rest[0]
    return a, b, target.leaf_with(rest[0]) if rest else None


def check_started(init: Initializer, path: str, f: Entry) -> None:
    """Raise unless factors can train; traced factors are not checked.

    Raises:
        ValueError: both factors are zero, or something that comes from the weight is not finite.
    """
    if not (is_concrete(f.a) and is_concrete(f.b)):
        return
    a, b = (_on_host(x) for x in (f.a, f.b))
    if not b.any() and not a.any():
        raise ValueError(
            f"init={_name(init)}: both factors of {path!r} are zero, so neither would ever have a "
            "gradient: make one of them random"
        )
    if f.residual and not all((abs(x) < math.inf).all() for x in (a, b)):
        raise ValueError(
            f"init={_name(init)}: the factors of {path!r} are not finite. Does the weight have "
            "NaNs or infinities?"
        )
    if f.magnitude is not None:
        magnitude = _on_host(f.magnitude)
        bad = ~((magnitude > 0) & (magnitude < math.inf))
        if count := int(bad.sum()):
            first = ""
            if f.magnitude.is_fully_addressable:
                first = (
                    f", the first at {np.argwhere(np.asarray(bad))[0].tolist()} of [*batch, *out]"
                )
            raise ValueError(
                f"dora=True: {count} columns of {path!r} are zero or not finite{first}: they have "
                f"no direction. Leave the weight out: exclude={path!r}"
            )


def _on_host(x: jax.Array) -> Any:
    """View an array on CPUs as NumPy, which compiles nothing; return others unchanged."""
    there = x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())
    return np.asarray(x) if there else x


def _name(init: Initializer) -> str:
    return getattr(init, "__name__", None) or repr(init)
