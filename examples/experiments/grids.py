"""Train the members of a grid that have no row yet, and choose a learning rate among rows."""

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
from methods import Build, Setup
from results import KEYS, Results
from stacks import Member, Trainer


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
