"""Train LoRA data-parallel with ``jax.pmap``: a replicated base, one small all-reduce per step.

Run ``python examples/pmap_train.py``. Without an accelerator it makes eight virtual CPU devices.
Each device holds the base and a shard of the batch; only the adapter's gradient and the loss cross
devices. The script checks this in the compiled program.
"""

import functools
import math
import os
import re

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import lora_jax

VOCAB, LENGTH = 64, 32


class Block(nn.Module):
    """A pre-norm transformer block."""

    @nn.compact
    def __call__(self, x):
        """Map ``[batch, length, dim]`` to the same shape."""
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class LanguageModel(nn.Module):
    """Two blocks between an embedding and a head."""

    @nn.compact
    def __call__(self, tokens):
        """Map tokens ``[batch, length]`` to logits ``[batch, length, vocab]``."""
        x = nn.Embed(VOCAB, 64)(tokens) + nn.Embed(LENGTH, 64)(jnp.arange(tokens.shape[1]))
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(VOCAB, name="head")(nn.LayerNorm()(x))


def make_step(model, tx):
    """Build the pmapped step over ``(trainable, opt_state, frozen, tokens)``.

    ``frozen`` is an input with ``in_axes=None`` and never an output; ``trainable`` and the
    optimizer's state are equal on all devices before and after.
    """
    apply = lora_jax.lora(model.apply)

    def loss_fn(trainable, frozen, tokens):
        logits = apply({"params": lora_jax.combine(trainable, frozen)}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    @functools.partial(
        jax.pmap, axis_name="data", in_axes=(None, None, None, 0), out_axes=(None, None, None)
    )
    def step(trainable, opt_state, frozen, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(trainable, frozen, tokens)
        # Ravel into one vector: everything crosses in a single collective.
        flat, unravel = ravel_pytree((loss, grads))
        loss, grads = unravel(jax.lax.pmean(flat, "data"))
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    return step


def all_reduces(hlo: str) -> list[int]:
    """Return the bytes that each all-reduce of a compiled program moves.

    Args:
        hlo: the text of the compiled module.

    Returns:
        One size in bytes per all-reduce instruction, the sum over its operands.
    """
    size = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f64": 8, "pred": 1}
    found = re.findall(r"= (.*?) all-reduce(?:-start)?\(", hlo)
    return [
        sum(
            size[kind] * math.prod(int(n) for n in shape.split(",") if n)
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", types)
        )
        for types in found
    ]


def main(steps: int = 60) -> None:
    """Train on a made-up language, print the loss, and show the bytes that cross devices."""
    devices = jax.local_device_count()
    model = LanguageModel()
    params = model.init(jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32))["params"]
    # The head's bias is an example of a full leaf.
    lora_params = lora_jax.lorafy(params, rank=8, targets="all-linear", full="head/bias")
    print(lora_params)
    trainable, frozen = lora_jax.split(lora_params)
    tx = optax.adam(3e-3)
    opt_state = tx.init(trainable)
    step = make_step(model, tx)

    rng = np.random.default_rng(0)
    successor = rng.permutation(VOCAB)  # the token after each token

    def batch() -> jax.Array:
        tokens = [rng.integers(VOCAB, size=(devices, 8))]
        for _ in range(LENGTH - 1):
            tokens.append(successor[tokens[-1]])
        return jnp.asarray(np.stack(tokens, axis=-1))  # [devices, batch, length]

    for i in range(steps):
        trainable, opt_state, loss = step(trainable, opt_state, frozen, batch())
        if i % 20 == 0 or i == steps - 1:
            print(f"step {i:3d}  loss {float(loss):.3f}")

    compiled = step.lower(trainable, opt_state, frozen, batch()).compile()
    moved = all_reduces(compiled.as_text())
    adapter_bytes = sum(x.nbytes for x in jax.tree.leaves(trainable))
    base_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    print(
        f"{devices} devices; all-reduces per step: {len(moved)}, of {sum(moved):,} bytes "
        f"(adapter {adapter_bytes:,}, loss 4; none of the base's {base_bytes:,})"
    )
    assert len(moved) == 1
    assert adapter_bytes <= sum(moved) <= adapter_bytes + 64


if __name__ == "__main__":
    main()
