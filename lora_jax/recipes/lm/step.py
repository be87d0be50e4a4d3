"""One step of training, on a mesh or by ``pmap``; and the validation loss.

The base is an input of the step and never an output. Its gradients are those of the adapter.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.recipes.lm.data import IGNORED, Rows
from lora_jax.recipes.lm.mesh import ROWS

Apply = Callable[..., jax.Array]  # of parameters and ids[rows, length] to logits


class State(NamedTuple):
    """What a step changes."""

    trainable: lora_jax.Adapter
    opt_state: Any


def summed_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The cross-entropy in nats, summed over the targets that are not ignored."""
    logits = logits.astype(jnp.float32)
    # A choice by comparison, as no token is IGNORED: a lookup would move logits that are spread.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    chosen = jnp.where(is_target, logits, 0.0).sum(-1)
    losses = jax.nn.logsumexp(logits, -1) - chosen
    return jnp.where(targets == IGNORED, 0.0, losses).sum()


def make_step(
    apply: Apply, tx: optax.GradientTransformation, seed: int | None, axis: str | None = None
):
    """The step: of a state, the frozen half, rows ``[parts, rows, length]`` and its number.

    Gradients of the parts are added up before the optimizer sees them, each divided by the number
    of targets in all of them: the result is that of one large batch.

    Args:
        apply: ``lora_jax.lora`` of the model.
        tx: any Optax optimizer; it sees the adapter and nothing else.
        seed: of the dropout; None for no dropout.
        axis: of the ``pmap`` around it; None without.

    Returns:
        A function that returns the new state, and the metrics.
    """
    over_devices = functools.partial(jax.lax.psum, axis_name=axis) if axis else lambda tree: tree

    def loss_of(lora_params, rows, count, part):
        noise = {}
        if seed is not None:
            key = functools.reduce(jax.random.fold_in, part, jax.random.key(seed))
            noise = {"lora_key": key}
        return summed_loss(apply(lora_params, rows.ids, **noise), rows.targets) / count

    def step(state: State, frozen: lora_jax.LoraParams, batch: Rows, number: jax.Array):
        lora_params = lora_jax.combine(state.trainable, frozen)
        count = over_devices((batch.targets != IGNORED).sum()).astype(jnp.float32)
        device = jax.lax.axis_index(axis) if axis else 0

        def add(total, part):
            rows, k = part
            numbers = (number, k, device)
            found = lora_jax.value_and_grad(loss_of)(lora_params, rows, count, numbers)
            return jax.tree.map(jnp.add, total, found), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
        parts = jnp.arange(len(batch.ids))
        loss, grads = over_devices(jax.lax.scan(add, zero, (batch, parts))[0])
        old: Any = state.trainable
        updates, opt_state = tx.update(grads, state.opt_state, old)
        trainable: Any = optax.apply_updates(old, updates)
        return State(trainable, opt_state), {"loss": loss, "grad_norm": optax.global_norm(grads)}

    return step


def on_mesh(step: Callable[..., Any], mesh: Mesh, places: State, parts: int):
    """The step compiled for a mesh, and what brings a batch there: each process its own rows."""
    stepped = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    return stepped, functools.partial(spread, mesh=mesh, parts=parts)


def spread(rows: Rows, mesh: Mesh, parts: int) -> Rows:
    """Rows as ``[parts, rows, length]`` on a mesh."""
    shape = (parts, len(rows.ids) // parts, rows.ids.shape[1])
    place = NamedSharding(mesh, P(None, ROWS))
    arrays = (x.reshape(shape) for x in rows)
    return Rows(*(jax.make_array_from_callback(shape, place, x.__getitem__) for x in arrays))


def on_pmap(step: Callable[..., Any], mesh: Mesh, parts: int):
    """The same by ``jax.pmap``: base and state whole on every device."""
    devices = list(mesh.devices.flat)
    own = [k for k, d in enumerate(devices) if d.process_index == jax.process_index()]
    whole = NamedSharding(mesh, P())
    options = {"in_axes": (None, None, 0, None), "out_axes": None, "donate_argnums": 0}
    mapped = jax.pmap(step, axis_name="data", **options)

    def put(rows: Rows) -> Rows:
        shape = (parts, len(devices), -1, rows.ids.shape[1])
        return Rows(*(x.reshape(shape).swapaxes(0, 1)[own] for x in rows))

    def of_all(x: jax.Array) -> jax.Array:
        """An array of all processes, of which pmap returns the part of this one."""
        pieces = [piece.data for piece in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, whole, pieces)

    return lambda *args: jax.tree.map(of_all, mapped(*args)), put


def make_validation(apply: Apply, rows: Rows, size: int, mesh: Mesh):
    """A function of both halves that returns the mean loss over the rows, in batches of a size."""
    short = -len(rows.ids) % size
    ids = np.pad(rows.ids, ((0, short), (0, 0)))
    targets = np.pad(rows.targets, ((0, short), (0, 0)), constant_values=IGNORED)
    batches = spread(Rows(ids, targets), mesh, len(ids) // size)

    @jax.jit
    def mean_loss(trainable, frozen, batches):
        lora_params = lora_jax.combine(trainable, frozen)

        def add(total, rows):
            return total + summed_loss(apply(lora_params, rows.ids), rows.targets), None

        return jax.lax.scan(add, jnp.zeros(()), batches)[0] / (batches.targets != IGNORED).sum()

    return lambda trainable, frozen: float(mean_loss(trainable, frozen, batches))
