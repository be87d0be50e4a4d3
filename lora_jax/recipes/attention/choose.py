"""Choose the kernel of attention for the platform, the shapes and the mesh."""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding

from lora_jax.recipes.attention.cudnn import by_cudnn, one_by_cudnn, why_not_cudnn
from lora_jax.recipes.attention.positions import check_segments
from lora_jax.recipes.attention.splash import by_splash, device_of, why_not_here, why_not_splash
from lora_jax.recipes.attention.xla import by_mask, by_xla, is_explicit

NAMES = ("auto", "cudnn", "splash", "xla")
SHORT = 512  # shorter rows are XLA's on TPUs


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int | None = None,
    segments: jax.Array | None = None,
    name: str = "auto",
    spread: NamedSharding | None = None,
) -> jax.Array:
    """Return causal attention, ``softmax(Q K^T / sqrt(head_dim)) V``.

    No array of length times length exists for long rows: cuDNN's flash attention on GPUs and JAX's
    splash attention on TPUs form none, and XLA's forms the scores of a block of queries at a time,
    also in the backward pass. A program of this process for another platform than its GPUs' gets
    XLA's.

    Args:
        query: ``[batch, length, heads, head_dim]``.
        key: the same, with a divisor of the number of heads.
        value: as ``key``.
        window: how many tokens each one sees, itself among them; None for all before it.
        segments: integers ``[batch, length]``; a token sees none with another number in its row.
        name: ``"auto"`` takes cuDNN's and splash attention where they can; ``"cudnn"``,
            ``"splash"`` and ``"xla"`` are those.
        spread: the sharding of ``[batch, length, width]`` on the mesh of the program, which splash
            attention needs: the compiler cannot partition its kernel. None inside of ``jax.pmap``
            and ``jax.shard_map``, and for a program of one device; ``"auto"`` takes that kernel for
            such a program if the process has one TPU.

    Raises:
        ValueError: ``name`` is another, or that kernel cannot.
    """
    if name not in NAMES:
        raise ValueError(f"attention={name!r}: expected one of {NAMES}")
    if segments is not None:
        check_segments(segments, query.shape[:2])
    args = query, key, value, segments
    kernels = {
        "cudnn": functools.partial(by_cudnn, window=window),
        "splash": functools.partial(by_splash, window=window, spread=spread),
        "xla": functools.partial(by_xla, window=window),
    }
    why_not = functools.partial(_why_not, *args, window, spread)
    if name in ("cudnn", "splash") and (reason := why_not(name)):
        raise ValueError(f"attention={name!r}: {reason} Pass 'auto', or 'xla'")
    if name != "auto":
        return kernels[name](*args)
    branches = {} if why_not("cudnn") else {"cuda": kernels["cudnn"]}
    if query.shape[1] >= SHORT and device_of(spread) and not why_not("splash"):
        branches["tpu"] = kernels["splash"]
    if not branches:
        return kernels["xla"](*args)
    # checkpointed: what the backward pass needs is the union over the platforms
    default = jax.checkpoint(kernels["xla"])
    return jax.lax.platform_dependent(*args, **branches, default=default)


def _why_not(
    query: Any, key: Any, _: Any, segments: Any, window: Any, spread: Any, name: str
) -> Any:
    """Return why the kernel of this name cannot; None if it can."""
    if is_explicit(query):
        return "it has no rules for the Explicit axes of a mesh."
    if name == "cudnn":
        return why_not_cudnn(query.shape, key.shape, query.dtype, window, segments is not None)
    return why_not_splash(query.shape, query.dtype, spread) or why_not_here(query)


def attend_cached(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    window: int | None = None,
    name: str = "auto",
) -> jax.Array:
    """Return the attention of tokens to a cache that contains them and those before them.

    One token a row attends by cuDNN where it can, unless ``name`` is ``"xla"``; all else by XLA,
    many tokens in blocks, as in :func:`attend`.

    Args:
        query: ``[batch, length, heads, head_dim]``.
        keys: ``[batch, size, key_value_heads, head_dim]``, from position 0 on.
        values: as ``keys``.
        positions: those of the queries, consecutive in each row, ``[batch, length]``.
        window: as in :func:`attend`.
        name: as in :func:`attend`.
    """
    size = keys.shape[1]
    xla = functools.partial(by_mask, window=window)
    is_one = query.shape[1] == 1 and (window is None or window >= size) and not is_explicit(query)
    if name == "xla" or not is_one or why_not_cudnn(query.shape, keys.shape, query.dtype):
        return xla(query, keys, values, positions)

    args = query, keys, values, positions
    return jax.lax.platform_dependent(*args, cuda=one_by_cudnn, default=jax.checkpoint(xla))
