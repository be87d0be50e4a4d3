"""Choose what the backward pass keeps of a layer; the rest it computes again."""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

__all__ = ["NAMES", "candidates", "mark", "policy_of", "why_not_offload"]

NAMES = ("none", "dots", "attention", "full", "offload")
MARKS = {"projection", "attention", "layer"}


def mark(x: jax.Array, name: str) -> jax.Array:
    """Mark an activation: a ``projection``, the output of ``attention``, the input of a ``layer``.

    A policy of :func:`policy_of` keeps activations by these names.
    """
    if name not in MARKS:
        raise ValueError(f"mark={name!r}: expected one of {sorted(MARKS)}")
    return checkpoint_name(x, name)


def candidates(device: Any, is_loop: bool) -> tuple[str, ...]:
    """Return names to try until one fits, the fastest first, for layers in a loop or without one.

    In a loop, ``none`` writes and reads more than ``dots`` computes again.
    """
    first = ("dots", "attention") if is_loop else ("none", "dots")
    last = () if why_not_offload(device) else ("offload",)
    return (*first, "full", *last)


def why_not_offload(device: Any) -> str | None:
    """Return why a program for this device cannot use the host's memory; None if it can."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" in kinds:
        return None
    return f"{device.device_kind} has no memory 'pinned_host', only {kinds}."


def policy_of(name: str) -> Callable[..., Any] | None:
    """Return the ``policy`` of ``jax.checkpoint`` by its name; ``none`` has no checkpoint.

    Args:
        name: what is kept: the projections and attention (``"dots"``), attention alone
            (``"attention"``), only the layer's input (``"full"``), or that in the host's memory
            (``"offload"``).

    Raises:
        ValueError: ``name`` is another.
    """
    known = jax.checkpoint_policies
    if name == "dots":
        marked = known.save_only_these_names("projection", "attention")
        return known.save_from_both_policies(marked, _kernel)
    if name == "attention":
        return known.save_from_both_policies(known.save_only_these_names("attention"), _kernel)
    if name == "full":
        return None
    if name == "offload":
        return known.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["layer"],
            offload_src="device",
            offload_dst="pinned_host",
        )
    raise ValueError(f"remat={name!r}: expected one of {NAMES}")


def _kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep what a fused kernel of attention returns beside its output, for its backward pass."""
    return "dot_product_attention_fwd" in primitive.name
