"""Train many members at once: one program for every setting and seed of a method."""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from methods import Build, Built, Setup, trained_parameters
from results import KEYS, Results
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


class Trainer:
    """Train members in stacks of one width, with one compiled program per shape.

    Args:
        size: how long and how wide.
    """

    def __init__(self, size: Size) -> None:
        self.size = size
        self._programs: dict[Any, Any] = {}
        self._files: dict[Any, int] = {}

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
            chunk = list(members[start : start + width])
            filled = [*chunk, *[chunk[-1]] * (width - len(chunk))]
            if shape is not None:
                filled.append(Member(chunk[-1].rate, 0, shape))
            out += self._stack(name, setup, filled, test)[: len(chunk)]
        return out

    def _stack(
        self, name: str, setup: Setup, members: Sequence[Member], test: bool
    ) -> list[dict[str, Any]]:
        built = _build(setup, members)
        adapters = [each.lora_params for each in built]
        apply = lora_jax.lora(built[0].fn)
        trainable, frozen = lora_jax.split(lora_jax.many.stack(adapters))
        opt_state = with_rate(
            jax.vmap(built[0].tx.init)(trainable), [member.rate for member in members]
        )
        data, size = setup.task.train, self.size
        orders = [
            list(batches(len(data["labels"]), size.batch_size, size.steps, m.seed)) for m in members
        ]

        def batch(k: int) -> dict[str, np.ndarray]:
            rows = np.stack([order[k] for order in orders])  # [members, batch]
            return {column: x[rows] for column, x in data.items()}

        args = (trainable, opt_state, frozen, batch(0))
        step = self._program(
            (name, setup.task.classes),
            lambda: make_stack_step(make_step(apply, built[0].tx), size.together),
            args,
        )
        costs: dict[str, Any] = {
            "peak_bytes": _peak(step, args, size),
            "optimizer_bytes": nbytes(opt_state) // size.width,
        }
        warm, start = min(3, size.steps - 1), 0.0
        for k in range(size.steps):
            if k == warm:
                jax.block_until_ready(trainable)
                start = time.perf_counter()
            trainable, opt_state, _ = step(trainable, opt_state, frozen, batch(k))
        jax.block_until_ready(trainable)
        costs["seconds_per_step"] = (time.perf_counter() - start) / (size.steps - warm) / size.width
        stacked = lora_jax.combine(trainable, frozen)
        scores = [self._accuracies(name, setup, apply, stacked, setup.task.validation)]
        if test:
            scores += [self._accuracies(name, setup, apply, stacked, setup.task.test)]
        else:
            scores += [[None] * size.width]
        return [
            self._sizes(member, each, setup)
            | costs
            | {"validation_accuracy": validated, "test_accuracy": tested}
            for member, each, validated, tested in zip(members, adapters, *scores, strict=True)
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

    def _program(self, key: Any, make: Callable[[], Any], args: Any) -> Any:
        """Compile a program once per key and shapes of its arguments."""
        leaves, tree = jax.tree.flatten(args)
        key = (key, tree, tuple((x.shape, str(x.dtype)) for x in leaves))
        if key not in self._programs:
            self._programs[key] = make().lower(*args).compile()
        return self._programs[key]

    def _accuracies(
        self,
        name: str,
        setup: Setup,
        apply: Callable[..., jax.Array],
        stacked: lora_jax.LoraParams,
        tokens: Tokens,
    ) -> list[float]:
        """Return every member's accuracy; NaN if its logits are not finite."""

        def predict(stacked, ids, mask):
            def one(adapter):
                return apply(lora_jax.LoraParams(stacked.base, adapter), ids, mask)

            return jax.lax.map(one, stacked.adapter, batch_size=self.size.together)

        n, logits = len(tokens["ids"]), []
        for start in range(0, n, 100):
            rows = np.arange(start, start + 100) % n  # pad the last batch with the first rows
            args = (stacked, tokens["ids"][rows], tokens["mask"][rows])
            program = self._program(
                (name, setup.task.classes, "predict"), lambda: jax.jit(predict), args
            )
            logits.append(program(*args))
        each = np.concatenate([np.asarray(x) for x in logits], 1)[:, :n]  # [members, n, classes]
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
        if not _same(base, each.lora_params.base):
            raise ValueError(
                f"the base of seed {member.seed} differs from the first: its initializer takes "
                "something random out of the weights; train these members in different stacks"
            )
    return [
        each._replace(lora_params=lora_jax.LoraParams(base, each.lora_params.adapter))
        for each in built
    ]


def _same(base: Any, other: Any) -> bool:
    """Compare all leaves but new parameters, which train in full and differ by seed."""
    one, two = ({k: v for k, v in tree.items() if k != "new"} for tree in (base, other))
    return all(
        x is y or bool(jnp.array_equal(x, y))
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


def train_missing(
    results: Results,
    trainer: Trainer,
    setup: Setup,
    runs: Mapping[tuple[str, str, int], Member],
    *,
    name: str,
    test: bool,
    shape: Build | None = None,
) -> None:
    """Train those members that have no row yet, and write their rows.

    Args:
        results: the rows.
        trainer: trains.
        setup: the base and the task.
        runs: members by method, setting and seed.
        name: of the kind of method, as for :meth:`Trainer.train`.
        test: whether to test.
        shape: as for :meth:`Trainer.train`.
    """
    keys = {(setup.task.name, *key): member for key, member in runs.items()}
    missing = results.missing(keys)
    at_once = trainer.size.width - (shape is not None)
    for start in range(0, len(missing), at_once):
        chunk, begin = missing[start : start + at_once], time.perf_counter()
        members = [keys[key] for key in chunk]
        rows = trainer.train(name, setup, members, test=test, shape=shape)
        results.append(
            dict(zip(KEYS, key, strict=True)) | {c: row[c] for c in results.columns if c in row}
            for key, row in zip(chunk, rows, strict=True)
        )
        print(
            f"{setup.task.name}, {name}: {len(chunk)} {'tested' if test else 'to choose from'}, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )


def best_rate(results: Results, task: str, method: str, choice: Sequence[int]) -> float:
    """Return the rate with the highest mean accuracy on validation; the smaller of equal ones.

    A rate at which a seed diverged is not chosen.
    """
    scores: dict[float, list[float]] = {}
    for row in results.get(task=task, method=method):
        if row["seed"] in choice:
            rate = float(row["setting"].removeprefix("rate="))
            scores.setdefault(rate, []).append(row["validation_accuracy"])
    means = {rate: float(np.mean(each)) for rate, each in scores.items()}
    finite = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
    if not finite:
        raise ValueError(f"{task}, {method}: every rate of {sorted(scores)} has diverged")
    return max(sorted(finite), key=finite.__getitem__)
