"""Read adapters as updates of one model, and refuse those that have no sum.

An update is ``scale * a b``, or the difference of a full leaf from the base.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._adapter.checks import check_parts, check_same_base, check_single
from lora_jax._adapter.factors import Entry, Factors
from lora_jax._adapter.params import Adapter, LoraParams, adapter_of, without_adapters
from lora_jax._weights.paths import flatten


def operands(verb: str, xs: Sequence[Any]) -> list[Adapter]:
    """Return the adapters of the operands of ``verb``.

    Raises:
        TypeError: the operands are neither all Adapters nor all LoraParams.
        ValueError: an operand has no update to add, or they belong to different models.
    """
    if not xs:
        raise ValueError(f"{verb}: there are no adapters, expected at least one")
    adapters = [check_single(x, f"{verb}: operand {n}") for n, x in enumerate(xs)]
    if len({type(x) for x in xs}) > 1:
        raise TypeError(
            f"{verb}: Adapters and LoraParams together, expected one kind: LoraParams(base, x)"
        )
    if isinstance(xs[0], LoraParams):
        for n, x in enumerate(xs[1:], 1):
            check_same_base(f"{verb}: operands 0 and {n}", xs[0], x)
    for adapter in adapters:
        if adapter.full and not isinstance(xs[0], LoraParams):
            raise ValueError(
                f"{verb}: {next(iter(adapter.full))!r} is a full leaf, and its difference from the "
                "base is not in an Adapter: use the LoraParams, of the very same base"
            )
        for key, f in adapter.factors.items():
            check_linear(verb, key, f)
    _check_alike(verb, adapters)
    remedy = (
        "Extract both from their merged parameters: lora_jax.algebra.extract(base, merged, rank, "
        "rest='full')"
    )
    base = flatten(without_adapters(xs[0]))[0] if isinstance(xs[0], LoraParams) else None
    check_parts(verb, {f"operand {n}": x for n, x in enumerate(adapters)}, base, remedy)
    return adapters


def differences(x: Any) -> dict[str, jax.Array]:
    """Return the difference of each full leaf of a LoraParams from its base."""
    leaves = flatten(without_adapters(x))[0] if adapter_of(x).full else {}
    return {
        path: leaf - leaves[path].astype(leaf.dtype) for path, leaf in adapter_of(x).full.items()
    }


def by_key(adapters: Iterable[Adapter]) -> dict[str, dict[int, Entry]]:
    """Group the entries by key; each group maps the number of an adapter to its entry."""
    found: dict[str, dict[int, Entry]] = {}
    for k, adapter in enumerate(adapters):
        for key, f in adapter.factors.items():
            found.setdefault(key, {})[k] = f
    return found


def plain(fs: Sequence[Entry], a: Any, b: Any) -> Factors:
    """Make factors in place of ``fs``, with scale 1; frozen is what all of them freeze."""
    frozen = tuple(name for name in fs[0].frozen if all(name in f.frozen for f in fs))
    return Factors(a, b, jnp.ones((), jnp.float32), fs[0].layout, frozen=frozen)


def check_linear(verb: str, key: str, f: Entry) -> None:
    """Raise unless the update is ``scale * a b`` on the original base."""
    if f.magnitude is not None:
        raise ValueError(
            f"{verb}: {key!r} has a DoRA magnitude, and normalizing is not linear. As plain LoRA: "
            "lora_jax.algebra.extract(base, lora_jax.merge(lora_params), rank), with rest='full' "
            "if there are full leaves"
        )
    if f.residual:
        raise ValueError(
            f"{verb}: {key!r} belongs to what its initializer left of the base. As plain LoRA on "
            "the original base: lora_jax.algebra.to_plain"
        )


def _check_alike(verb: str, adapters: Sequence[Adapter]) -> None:
    """Raise unless all entries of a weight have one shape and layout."""
    for key, fs in by_key(adapters).items():
        forms = dict.fromkeys((f.layout, f.weight_shape) for f in fs.values())
        if len(forms) > 1:
            one, other, *_ = forms
            raise ValueError(
                f"{verb}: the adapters are of different models: {key!r} has shape {one[1]} (layout "
                f"{one[0]!r}) in one and {other[1]} (layout {other[0]!r}) in another"
            )
