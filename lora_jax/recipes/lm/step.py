"""Make the training step, for a mesh or for ``pmap``, and the validation loss.

The base is an input of the step and never an output. Gradients are those of the adapter.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
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

Loss = Callable[..., jax.Array]  # (parameters, ids [rows, length], targets) -> summed nats


class State(NamedTuple):
    """The state that a step changes."""

    trainable: lora_jax.Adapter
    opt_state: Any


def make_step(
    loss: Loss, tx: optax.GradientTransformation, seed: int | None, axis: str | None = None
):
    """Make the step, a function of a state, the frozen half, a batch, and the step's number.

    A batch is ``[parts, rows, length]``. The optimizer sees the sum of the parts' gradients, each
    divided by the number of targets in all parts: the result is that of one large batch.

    Args:
        loss: ``lora_jax.lora`` of the model's loss.
        tx: any Optax optimizer; it sees the adapter and nothing else.
        seed: the seed of the dropout; None for no dropout.
        axis: the axis name of the ``pmap`` around the step; None without one.

    Returns:
        A function that returns the new state and the metrics.
    """
    add_devices = functools.partial(jax.lax.psum, axis_name=axis) if axis else lambda tree: tree

    def compute_loss(lora_params, rows, count, part):
        noise = {}
        if seed is not None:
            key = functools.reduce(jax.random.fold_in, part, jax.random.key(seed))
            noise = {"lora_key": key}
        return loss(lora_params, rows.ids, rows.targets, **noise) / count

    def step(state: State, frozen: lora_jax.LoraParams, batch: Rows, number: jax.Array):
        lora_params = lora_jax.combine(state.trainable, frozen)
        count = add_devices((batch.targets != IGNORED).sum()).astype(jnp.float32)
        device = jax.lax.axis_index(axis) if axis else 0

        def add(total, part):
            rows, k = part
            numbers = (number, k, device)
            both = lora_jax.value_and_grad(compute_loss)(lora_params, rows, count, numbers)
            return jax.tree.map(jnp.add, total, both), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
        parts = jnp.arange(len(batch.ids))
        mean, grads = add_devices(jax.lax.scan(add, zero, (batch, parts))[0])
        old: Any = state.trainable
        updates, opt_state = tx.update(grads, state.opt_state, old)
        trainable: Any = optax.apply_updates(old, updates)
        return State(trainable, opt_state), {"loss": mean, "grad_norm": optax.tree.norm(grads)}

    return step


def compile_for_mesh(step: Callable[..., Any], mesh: Mesh, places: State, parts: int):
    """Return the step for a mesh, and a function that places each process's rows on it."""
    stepped = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    return stepped, functools.partial(spread, mesh=mesh, parts=parts)


def spread(rows: Rows, mesh: Mesh, parts: int) -> Rows:
    """Spread rows over a mesh, as ``[parts, rows, length]``."""
    shape = (parts, len(rows.ids) // parts, rows.ids.shape[1])
    place = NamedSharding(mesh, P(None, ROWS))
    arrays = (x.reshape(shape) for x in rows)
    return Rows(*(jax.make_array_from_callback(shape, place, x.__getitem__) for x in arrays))


@dataclass(frozen=True)
class PmapStep:
    """A step by ``jax.pmap`` that returns arrays of all processes.

    Attributes:
        mapped: the step under ``pmap``, which returns this process's part.
        replicated: the sharding of all arrays that it returns.
    """

    mapped: Any
    replicated: NamedSharding

    def __call__(self, *args: Any) -> Any:
        """Run the step."""
        return jax.tree.map(self._join_processes, self.mapped(*args))

    def lower(self, *args: Any) -> Any:
        """Trace the step."""
        return self.mapped.lower(*args)

    def _join_processes(self, x: jax.Array) -> jax.Array:
        pieces = [piece.data for piece in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, self.replicated, pieces)


def compile_for_pmap(step: Callable[..., Any], mesh: Mesh, parts: int):
    """Return the same for ``jax.pmap``, where base and state are replicated."""
    devices = list(mesh.devices.flat)
    local = [k for k, d in enumerate(devices) if d.process_index == jax.process_index()]
    options = {"in_axes": (None, None, 0, None), "out_axes": None, "donate_argnums": 0}
    mapped = jax.pmap(step, axis_name="data", **options)

    def place(rows: Rows) -> Rows:
        shape = (parts, len(devices), -1, rows.ids.shape[1])
        return Rows(*(x.reshape(shape).swapaxes(0, 1)[local] for x in rows))

    return PmapStep(mapped, NamedSharding(mesh, P())), place


def make_validation(loss: Loss, rows: Rows, size: int, mesh: Mesh):
    """Return a function of both halves: the mean loss over the rows, in batches of ``size``.

    Nothing waits for the loss that it returns.
    """
    short = -len(rows.ids) % size
    ids = np.pad(rows.ids, ((0, short), (0, 0)))
    targets = np.pad(rows.targets, ((0, short), (0, 0)), constant_values=IGNORED)
    batches = spread(Rows(ids, targets), mesh, len(ids) // size)

    @jax.jit
    def mean_loss(trainable, frozen, batches):
        lora_params = lora_jax.combine(trainable, frozen)

        def add(total, rows):
            return total + loss(lora_params, rows.ids, rows.targets), None

        return jax.lax.scan(add, jnp.zeros(()), batches)[0] / (batches.targets != IGNORED).sum()

    return lambda trainable, frozen: mean_loss(trainable, frozen, batches)
