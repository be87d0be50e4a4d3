"""What a training step costs by the compiler's counts, and what fifty of them give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import error

import lora_jax
from lora_jax.recipes.loss import summed_loss
from lora_jax.recipes.models import llama

pytestmark = pytest.mark.usefixtures("standard_promotion")

WIDTH, INNER, VOCAB, LAYERS, RANK, TOKENS, CHUNKS = 128, 256, 512, 2, 8, 256, 4
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = [(WIDTH, WIDTH)] * 2 + [(WIDTH, WIDTH // 2)] * 2 + [(WIDTH, INNER)] * 3


def test_a_step_costs_what_its_products_cost():
    """FLOPs per token; the loop over chunks of the loss counts as one turn."""
    ids = jax.ShapeDtypeStruct((2, TOKENS // 2), jnp.int32)

    def flops(adapt, **changes):
        fields = {"scan_layers": True, "unroll": LAYERS, "chunk": TOKENS // CHUNKS}
        model = llama.from_config(CONFIG, **fields, **changes)
        shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
        loss = lora_jax.lora(lambda p, i, t: model.apply({"params": p}, i, targets=t))
        step = jax.jit(lora_jax.value_and_grad(loss))
        found = step.lower(jax.eval_shape(adapt, shapes), ids, ids).compile().cost_analysis()
        return found["flops"] / TOKENS

    def adapted(params):
        return lora_jax.lorafy(params, RANK, targets=".*proj/kernel")

    def one_row(params):
        table = "embed_tokens/embedding"
        return lora_jax.lorafy(params, targets=[], rows={table: [0]}, layout={table: "io"})

    kernels = 2 * LAYERS * sum(a * b for a, b in SHAPES)
    factors = 2 * LAYERS * RANK * sum(a + b for a, b in SHAPES)
    ours = flops(adapted, frozen_head=True)
    assert 2 * kernels < ours < 1.35 * (2 * kernels + 3 * factors), "attention and norms besides"
    # Forth, back to x, and back to A and B. The floor also goes back through the first layer.
    assert ours - flops(one_row, frozen_head=True) < 3 * factors
    head = 2 * WIDTH * VOCAB / CHUNKS
    assert 0.95 * head < flops(adapted) - ours < 1.05 * head, "the logits are made again"
    again = flops(adapted, frozen_head=True, remat="full") - ours
    assert again < kernels + factors + 0.35 * kernels, "one forward pass, and attention"


@pytest.mark.long
def test_fifty_steps_are_those_of_the_plain_path():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 8, (50, 4, 33), np.int32)  # eight tokens: something to learn

    def trained(dtype, is_plain):
        """Return a function of batches: the losses of fifty steps from one start."""
        changes = {} if is_plain else {"remat": "dots", "unroll": LAYERS, "frozen_head": True}
        changes |= {"scan_layers": True, "chunk": 24, "attention": "xla", "dtype": dtype}
        model = llama.from_config(CONFIG, **changes)
        params = jax.jit(model.init)(jax.random.key(0), ids[0, :, :-1])["params"]
        base = jax.tree.map(lambda x: x.astype(dtype), params)
        start = lora_jax.lorafy(base, RANK, alpha=2 * RANK, targets=".*proj/kernel")
        trainable, frozen = lora_jax.split(start)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))

        @lora_jax.lora
        def loss(p, rows):
            x, y = rows[:, :-1], rows[:, 1:]
            if is_plain:
                return summed_loss(model.apply({"params": p}, x), y) / y.size
            return model.apply({"params": p}, x, targets=y) / y.size

        def step(state, rows):
            adapter, opt_state = state
            both = lora_jax.combine(adapter, frozen)
            value, grads = lora_jax.value_and_grad(loss)(both, rows)
            updates, opt_state = tx.update(grads, opt_state, adapter)
            return (optax.apply_updates(adapter, updates), opt_state), value

        run = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches)[1])
        return lambda batches: np.asarray(run((trainable, tx.init(trainable)), batches))

    plain = trained(jnp.float32, is_plain=True)(ids)
    assert plain[-5:].mean() < 0.6 * plain[0], "it learns"
    assert error(trained(jnp.float32, is_plain=False)(ids), plain) < 1e-5
    # In bfloat16, no further than the sums over the rows of a batch in other orders.
    orders = [ids[:, rng.permutation(4)] for _ in range(8)]
    rounded = [*map(trained(jnp.bfloat16, is_plain=True), orders)]
    found = [*map(trained(jnp.bfloat16, is_plain=False), orders)]
    apart = max(error(x, y) for x in rounded for y in rounded)
    assert np.median([error(x, y) for x, y in zip(found, rounded, strict=True)]) <= apart
