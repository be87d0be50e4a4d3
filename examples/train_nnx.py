"""Fine-tune an NNX model with BatchNorm and Dropout, and load it in another process.

Run ``python examples/train_nnx.py train FILE``, then the same with ``load``: the logits are equal.
"""

import sys

import jax
import optax
from flax import nnx

import lora_jax
from lora_jax.io import safetensors


class Net(nnx.Module):
    """A classifier of points."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 2, rngs=rngs)

    def __call__(self, x):
        """Return the logits."""
        x = self.dropout(nnx.relu(self.norm(self.first(x))))
        return self.head(nnx.relu(self.second(x)))


# The parameters, and the rest: running statistics and PRNG state. In earnest, of a trained model.
graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)


@lora_jax.lora
def forward(params, rest, x, train=False):
    """Return the logits and the new rest; never the parameters, which a call does not change."""
    model = nnx.merge(graph, params, rest)
    model.train() if train else model.eval()
    return model(x), nnx.state(model, nnx.Not(nnx.Param))


def loss_fn(lora_params, rest, x, y):
    """Return the loss and the new rest."""
    logits, rest = forward(lora_params, rest, x, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), rest


def batch(seed):
    """Draw points, and whether they are outside of a sphere."""
    x = jax.random.normal(jax.random.key(seed), (256, 8))
    return x, ((x**2).sum(axis=1) > 7.3).astype(int)


if sys.argv[1] == "train":
    lora_params = lora_jax.lorafy(params, targets="all-linear", full="head/.*")
    trainable, frozen = lora_jax.split(lora_params)  # only the adapter is trained state
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=20, decay_steps=200)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    opt_state, grad_fn = tx.init(trainable), lora_jax.value_and_grad(loss_fn, has_aux=True)

    @jax.jit
    def step(trainable, rest, opt_state, frozen, x, y):
        """Return what a step changes; the base goes in, and never comes out."""
        (_, rest), grads = grad_fn(lora_jax.combine(trainable, frozen), rest, x, y)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), rest, opt_state

    for k in range(200):
        trainable, rest, opt_state = step(trainable, rest, opt_state, frozen, *batch(k))
    safetensors.save(sys.argv[2], lora_jax.combine(trainable, frozen), state=rest)

lora_params, rest = safetensors.load(sys.argv[2], params, state=rest)
x, y = batch(200)
logits, _ = jax.jit(forward)(lora_params, rest, x)
print(f"accuracy {(logits.argmax(1) == y).mean():.2f}, first logits {logits[0].tolist()}")
model = nnx.merge(graph, lora_jax.merge(lora_params), rest)  # a plain model, without LoRA
model.eval()
print(f"merged: logits {abs(model(x) - logits).max():.0e} off")
