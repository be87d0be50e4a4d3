"""Log the metrics of a training: printed lines, a CSV file, TensorBoard."""

import csv
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lora_jax.recipes.lm.startup import Startup

AHEAD = 2  # steps that the devices have to do while the host waits for the metrics of an older one
COLUMNS = ("step", "loss", "grad_norm", "rate", "validation", "tokens_per_second", "mfu")

# FLOP/s per JAX device, for dense matrix products in bfloat16, by the beginning of the device kind;
# the first match counts. A TPU7x has two devices per chip. Other devices have no MFU.
PEAK = {
    "TPU v4 lite": 137e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
}


class Log:
    """The metrics of a run: fetched from the devices as steps end, written by one process.

    The host waits for a step only when ``AHEAD`` later ones are queued, so that the devices never
    wait for the host. ``metrics.csv`` has a row per step. A resumed run continues the file: a step
    that is done again, as its process was killed, is written once.

    ``tokens_per_second`` is an average since the last printed step: the tokens of the steps after
    it, over the time between the arrivals of its metrics and of the newest. The first step,
    validation and checkpoints do not count.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        *,
        tokens: int,
        flops: float,
        rate: Callable[[int], Any],
        tensorboard: bool = False,
        startup: Startup | None = None,
    ):
        """Open the log of a run.

        Args:
            folder: the folder to write to.
            start: the step that the run continues from.
            tokens: tokens per step.
            flops: FLOPs per token, on all devices together.
            rate: the learning rate as a function of the step.
            tensorboard: whether to write events for TensorBoard, too, with ``tensorboardX``.
            startup: the clock that the first step stops; it is printed then.
        """
        self.tokens, self.flops, self.rate = tokens, flops, jax.jit(rate)
        self.startup = startup
        self.is_writer = jax.process_index() == 0
        self.console = Console(soft_wrap=True, highlight=False, quiet=not self.is_writer)
        self._pending: deque[tuple[int, Mapping[str, Any], bool]] = deque()
        self._rows: list[dict[str, Any]] = []  # steps that arrived and are not written
        self._begin: float | None = None  # when the first step arrived, then the last printed one
        self._arrived, self._count = 0.0, 0  # the last arrival, and steps since ``_begin``
        self._file: Any = None
        self._events: Any = None
        if self.is_writer:
            if tensorboard:
                self._events = event_writer()(str(folder / "tensorboard"), purge_step=start + 1)
            self._file = _continued(folder / "metrics.csv", start)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._file, self._events):
            if file is not None:
                file.close()

    def say(self, text: str) -> None:
        """Print a line, on one process only."""
        self.console.print(text, markup=False)

    def add(self, step: int, metrics: Mapping[str, jax.Array], is_shown: bool = False) -> None:
        """Add the metrics of a step, and fetch those of older steps that ended.

        It waits for the oldest step if ``AHEAD`` later ones are queued.

        Args:
            step: the number of the step.
            metrics: what the step returned; nothing waits for it here.
            is_shown: whether to write and print when the step arrives.

        Raises:
            ValueError: a loss or a gradient of an older step is not finite.
        """
        # Queued here: later the devices would compute the rate after the steps that follow.
        metrics = {**metrics, "rate": self.rate(step - 1)}
        for x in metrics.values():
            x.copy_to_host_async()
        self._pending.append((step, metrics, is_shown))
        while len(self._pending) > AHEAD or (len(self._pending) > 1 and self._is_ready()):
            if self._fetch():
                self._show()

    def flush(self, step: int, validation: Any = None) -> None:
        """Wait for all steps, write them, and print the last.

        Args:
            step: the last step.
            validation: the validation loss, which may be still to be computed; its time does not
                count.

        Raises:
            ValueError: a loss or a gradient is not finite.
        """
        while self._pending:
            if self._fetch() and self._pending:
                self._show()
        self._rows = self._rows or [{"step": step}]
        if validation is not None:
            self._rows[-1]["validation"] = float(validation)
        self._show()

    def restart(self) -> None:
        """Restart the clock, after work that is not a step."""
        self._begin, self._count = time.perf_counter(), 0

    def _is_ready(self) -> bool:
        """Return whether the oldest step ended."""
        return all(x.is_ready() for x in self._pending[0][1].values())

    def _fetch(self) -> bool:
        """Wait for the oldest step; return whether to show it."""
        step, metrics, is_shown = self._pending.popleft()
        row = {"step": step} | jax.device_get(metrics)
        self._arrived = time.perf_counter()
        for name in row.keys() & {"loss", "grad_norm"}:
            if not math.isfinite(row[name]):
                raise ValueError(
                    f"step {step}: {name} is {row[name]}. Pass a lower --rate, now "
                    f"{float(row['rate']):.3g} at this step, or --clip 1"
                )
        self._rows.append(row)
        if self._begin is None:
            self._begin = self._arrived
            if self.startup is not None:
                self.startup.end("first step")
                self.say(str(self.startup))
        else:
            self._count += 1
        return is_shown

    def _show(self) -> None:
        """Write the rows that arrived, and print the last."""
        rows, self._rows = self._rows, []
        if self._count and self._begin is not None:
            speed = self._count * self.tokens / (self._arrived - self._begin)
            rows[-1] |= {"tokens_per_second": speed, "mfu": speed * self.flops / peak()}
            self._begin, self._count = self._arrived, 0
        if self.is_writer:
            self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        row: dict[str, Any] = {}
        for found in rows:
            row = {name: float(x) for name, x in found.items() if not math.isnan(x)}
            row["step"] = int(row["step"])
            self._file.write(",".join(str(row.get(name, "")) for name in COLUMNS) + "\n")
            for name in row.keys() - {"step"} if self._events else ():
                self._events.add_scalar(name, row[name], row["step"])
        self._file.flush()
        words = [f"step {row['step']:5d}"]
        words += [f"{name} {row[name]:.4f}" for name in ("loss", "validation") if name in row]
        if "tokens_per_second" in row:
            words.append(f"{row['tokens_per_second']:,.0f} tokens/s")
            words.append(f"MFU {row['mfu']:.1%}" if "mfu" in row else "MFU -")
        self.say("  ".join(words))


def flops_per_token(model: Any, lora_params: Any, length: int) -> float:
    """Count the FLOPs of training per token, from the shapes.

    A weight counts two forward and two backward, without the two of its gradient, which a frozen
    base does not have. An entry of A or B counts six. The two products of attention count half, as
    they are causal. Recomputation to save memory does not count.
    """
    leaves = jax.tree_util.tree_leaves_with_path(lora_params.base)
    names = ("kernel", "embedding") if model.tie_word_embeddings else ("kernel",)
    weights = sum(
        x.size for path, x in leaves if jax.tree_util.keystr(path[-1:], simple=True) in names
    )
    factors = sum(f.size for f in lora_params.adapter.factors.values())
    heads = model.num_hidden_layers * model.num_attention_heads * model.head_dim
    return 4 * weights + 6 * factors + 6 * heads * length


def peak() -> float:
    """Return the FLOP/s of all devices together; NaN if unknown, as for CPUs."""
    kind = jax.devices()[0].device_kind
    return jax.device_count() * next((x for k, x in PEAK.items() if kind.startswith(k)), math.nan)


def event_writer() -> Any:
    """Return the class that writes events for TensorBoard.

    Raises:
        ValueError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("--tensorboard: tensorboardX is missing: pip install it") from error
    return SummaryWriter


def _continued(path: Path, start: int) -> Any:
    """Open the file after the row of step ``start``; drop what a killed process wrote later."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        kept = [row for row in rows if row and len(row) == len(COLUMNS) and int(row[0]) <= start]
    partial = path.with_suffix(".partial")
    lines = [",".join(row) for row in (COLUMNS, *(kept if start else ()))]
    partial.write_text("\n".join(lines) + "\n")
    os.replace(partial, path)
    return path.open("a")
