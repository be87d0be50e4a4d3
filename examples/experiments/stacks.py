"""Train many members at once: one program for every setting and seed of a method."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from methods import Build, Built, Setup, trained_parameters
from sweeping import make_stack_step, with_rate
from tasks import Task, cut
from training import Tokens, accuracy, batches, make_step, nbytes

import lora_jax
from lora_jax.io import safetensors


@dataclass(frozen=True)
class Size:
    """How long and how wide to train.

    Attributes:
        steps: the number of steps.
        batch_size: sentences per step and member.
        length: tokens per sentence.
        held_out: at most so many sentences to validate, and to test.
        width: members of a stack. Smaller stacks are filled up, so that the program is the same.
        together: members computed at a time, which the memory limits; it divides ``width``.
    """

    steps: int
    batch_size: int
    length: int
    held_out: int | None
    width: int
    together: int

    def task(self, task: Task) -> Task:
        """Cut a task to this size."""
        parts = {
            name: cut(getattr(task, name), self.length, n)
            for name, n in (
                ("train", None),
                ("validation", self.held_out),
                ("test", self.held_out),
            )
        }
        return replace(task, **parts)


@dataclass(frozen=True)
class Member:
    """One member of a stack.

    Attributes:
        rate: the highest learning rate.
        seed: draws the start, and the order of the batches.
        build: the method.
    """

    rate: float
    seed: int
    build: Build


class Started(NamedTuple):
    """A stack before its first step.

    Attributes:
        apply: the function of one member.
        tx: the optimizer of one member.
        adapters: the members, apart.
        args: ``(trainable, opt_state, frozen, batch)`` of the stack's first step.
        orders: the rows of each step's batch, for every member.
    """

    apply: Callable[..., jax.Array]
    tx: Any
    adapters: list[lora_jax.LoraParams]
    args: tuple[Any, ...]
    orders: list[list[np.ndarray]]


class Trainer:
    """Train members in stacks of one width, with one compiled program per shape.

    Args:
        size: how long and how wide.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self._programs: dict[Any, Future[Any]] = {}
        self._prepared: set[tuple[str, int]] = set()
        self._files: dict[Any, int] = {}
        self._pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2))

    def prepare(self, name: str, setup: Setup, build: Build, shape: Build | None = None) -> None:
        """Begin to compile the programs of a kind of method once, and do not wait for them."""
        if (name, setup.task.classes) in self._prepared:
            return
        self._prepared.add((name, setup.task.classes))
        started = self._start(setup, self._filled([Member(0.0, 0, build)], shape))
        self._step(name, setup, started)
        trainable, _, frozen, _ = started.args
        self._predict(name, setup, started.apply, lora_jax.combine(trainable, frozen))

    def train(
        self,
        name: str,
        setup: Setup,
        members: Sequence[Member],
        *,
        test: bool,
        shape: Build | None = None,
    ) -> list[dict[str, Any]]:
        """Train members of equal functions and optimizers; return measured columns for each.

        Args:
            name: of the kind of method; members of one kind share a program.
            setup: the base and the task.
            members: the members.
            test: whether to measure the accuracy on the test sentences.
            shape: an adapter that joins every stack, whose weights and ranks contain those of all
                members: so all stacks have one shape. None if all members have equal shapes.
        """
        out: list[dict[str, Any]] = []
        width = self.size.width - (shape is not None)
        for start in range(0, len(members), width):
            chunk = members[start : start + width]
            out += self._stack(name, setup, self._filled(chunk, shape), test)[: len(chunk)]
        return out

    def _filled(self, chunk: Sequence[Member], shape: Build | None) -> list[Member]:
        last = [Member(chunk[-1].rate, 0, shape)] if shape is not None else []
        return [*chunk, *[chunk[-1]] * (self.size.width - len(chunk) - len(last)), *last]

    def _start(self, setup: Setup, members: Sequence[Member]) -> Started:
        built = _build(setup, members)
        adapters = [each.lora_params for each in built]
        trainable, frozen = lora_jax.split(lora_jax.many.stack(adapters))
        tx = built[0].tx
        opt_state = with_rate(jax.vmap(tx.init)(trainable), [member.rate for member in members])
        n, size = len(setup.task.train["labels"]), self.size
        orders = [list(batches(n, size.batch_size, size.steps, m.seed)) for m in members]
        args = (trainable, opt_state, frozen, _batch(setup, orders, 0))
        return Started(lora_jax.lora(built[0].fn), tx, adapters, args, orders)

    def _stack(
        self, name: str, setup: Setup, members: Sequence[Member], test: bool
    ) -> list[dict[str, Any]]:
        started, size = self._start(setup, members), self.size
        step = self._step(name, setup, started).result()
        trainable, opt_state, frozen, _ = started.args
        costs: dict[str, Any] = {
            "peak_bytes": _peak(step, started.args, size),
            "optimizer_bytes": nbytes(opt_state) // size.width,
        }
        warm, begin = min(3, size.steps - 1), 0.0
        for k in range(size.steps):
            if k == warm:
                jax.block_until_ready(trainable)
                begin = time.perf_counter()
            batch = _batch(setup, started.orders, k)
            trainable, opt_state, _ = step(trainable, opt_state, frozen, batch)
        jax.block_until_ready(trainable)
        costs["seconds_per_step"] = (time.perf_counter() - begin) / (size.steps - warm) / size.width
        stacked = lora_jax.combine(trainable, frozen)
        predict = self._predict(name, setup, started.apply, stacked).result()
        scores = [_accuracies(predict, stacked, setup.task.validation)]
        scores += [
            _accuracies(predict, stacked, setup.task.test) if test else [None] * len(members)
        ]
        return [
            self._sizes(member, each, setup)
            | costs
            | {"validation_accuracy": validated, "test_accuracy": tested}
            for member, each, validated, tested in zip(
                members, started.adapters, *scores, strict=True
            )
        ]

    def _sizes(
        self, member: Member, lora_params: lora_jax.LoraParams, setup: Setup
    ) -> dict[str, int]:
        """Return how many numbers train, and the bytes of their file."""
        key = member.build, setup.task.classes
        if key not in self._files:
            self._files[key] = file_bytes(lora_params)
        return {
            "trained_parameters": trained_parameters(lora_params),
            "file_bytes": self._files[key],
        }

    def _step(self, name: str, setup: Setup, started: Started) -> "Future[Any]":
        def make():
            return make_stack_step(make_step(started.apply, started.tx), self.size.together)

        return self._program((name, setup.task.classes), make, started.args)

    def _predict(
        self, name: str, setup: Setup, apply: Callable[..., Any], stacked: lora_jax.LoraParams
    ) -> "Future[Any]":
        def predict(stacked, ids, mask):
            def one(adapter):
                return apply(lora_jax.LoraParams(stacked.base, adapter), ids, mask)

            return jax.lax.map(one, stacked.adapter, batch_size=self.size.together)

        key = (name, setup.task.classes, "predict")
        rows = _rows(setup.task.test, 0)
        args = (stacked, setup.task.test["ids"][rows], setup.task.test["mask"][rows])
        return self._program(key, lambda: jax.jit(predict), args)

    def _program(self, key: Any, make: Callable[[], Any], args: Any) -> "Future[Any]":
        """Compile a program once per key and shapes of its arguments, in another thread."""
        leaves, tree = jax.tree.flatten(args)
        key = (key, tree, tuple((x.shape, str(x.dtype)) for x in leaves))
        if key not in self._programs:
            self._programs[key] = self._pool.submit(make().lower(*args).compile)
        return self._programs[key]


def _batch(setup: Setup, orders: Sequence[Sequence[np.ndarray]], k: int) -> dict[str, np.ndarray]:
    """Return the batch of a step: ``[members, batch, ...]``."""
    rows = np.stack([order[k] for order in orders])  # [members, batch]
    return {column: x[rows] for column, x in setup.task.train.items()}


def _rows(tokens: Tokens, start: int) -> np.ndarray:
    """Return a hundred rows; the first ones follow the last."""
    return np.arange(start, start + 100) % len(tokens["ids"])


def _accuracies(
    predict: Callable[..., jax.Array], stacked: lora_jax.LoraParams, tokens: Tokens
) -> list[float]:
    """Return every member's accuracy; NaN if its logits are not finite."""
    n, logits = len(tokens["ids"]), []
    for start in range(0, n, 100):
        rows = _rows(tokens, start)
        logits.append(np.asarray(predict(stacked, tokens["ids"][rows], tokens["mask"][rows])))
    each = np.concatenate(logits, 1)[:, :n]  # [members, n, classes]
    finite = np.isfinite(each).all((1, 2))
    return [
        round(accuracy(one, tokens["labels"]), 6) if fine else float("nan")
        for one, fine in zip(each, finite, strict=True)
    ]


def _build(setup: Setup, members: Sequence[Member]) -> list[Built]:
    """Build members over one base; raise if an initializer made different ones."""
    made: dict[Any, Built] = {}
    for member in members:
        key = member.build, member.seed
        if key not in made:
            made[key] = member.build(setup, jax.random.key(member.seed))
    built = [made[member.build, member.seed] for member in members]
    base = built[0].lora_params.base
    for each, member in zip(built, members, strict=True):
        if not _close(base, each.lora_params.base):
            raise ValueError(
                f"the base of seed {member.seed} differs from the first: its initializer takes "
                "something random out of the weights; train these members in different stacks"
            )
    return [
        each._replace(lora_params=lora_jax.LoraParams(base, each.lora_params.adapter))
        for each in built
    ]


def _close(base: Any, other: Any) -> bool:
    """Compare all leaves up to rounding but new parameters, which train in full."""
    one, two = ({k: v for k, v in tree.items() if k != "new"} for tree in (base, other))
    return all(
        x is y or bool(jnp.allclose(x, y, rtol=0, atol=1e-5 * float(jnp.abs(x).max())))
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


def _peak(program: Any, args: Any, size: Size) -> int:
    """Return the bytes that one member needs: arguments, results and temporary arrays.

    The base counts once, and not at all where every leaf of it trains.
    """
    analysis = program.memory_analysis()
    own = nbytes((args[0], args[1], args[3]))  # the rest is the base
    shared = max(0, analysis.argument_size_in_bytes - own)
    results = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    temporary = analysis.temp_size_in_bytes / size.together
    return round(shared + (own + results) / size.width + temporary)


def file_bytes(lora_params: lora_jax.LoraParams) -> int:
    """Return the size of the file that one member is saved to."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter.safetensors")
        safetensors.save(path, lora_params)
        return path.stat().st_size


def together(width: int) -> int:
    """Return how many members to compute at a time: all on an accelerator, one on a CPU."""
    return 1 if jax.devices()[0].platform == "cpu" else width
