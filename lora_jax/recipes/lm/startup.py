"""Measure how long a training takes to start."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from lora_jax.recipes.lm import memory
from lora_jax.recipes.lm.step import PmapStep


class Startup:
    """The time from the creation of this object to the end of the first step, part by part.

    Attributes:
        seconds: the seconds of each part, by name.
        total: the seconds until the first step ended, with what is in no part; None before.
        is_cached: whether the step's program came from JAX's compilation cache.
        remat: what the step's backward pass keeps, a name of ``recipes.remat``.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self.seconds: dict[str, float] = {}
        self.total: float | None = None
        self.is_cached = False
        self.remat = ""
        self._begin = self._last = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        begin = time.perf_counter()
        yield
        self._last = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + self._last - begin

    def end(self, name: str) -> None:
        """Add the time since the last part as the last one, and stop the clock."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self.total = now - self._begin

    def __str__(self) -> str:
        """Return a line such as ``ready in 31.2 s, --remat dots: read 8.1, compiled 20.0``."""
        notes = {"compiled": " from the cache"} if self.is_cached else {}
        parts = ", ".join(
            f"{name} {s:.1f}{notes.get(name, '')}" for name, s in self.seconds.items()
        )
        total = sum(self.seconds.values()) if self.total is None else self.total
        kept = f", --remat {self.remat}" if self.remat else ""
        return f"ready in {total:.1f} s{kept}: {parts}"


def compile_step(steps: Mapping[str, Any], startup: Startup, *args: Any) -> Callable[..., Any]:
    """Trace and compile a step for these arguments, as parts of a startup.

    Args:
        steps: steps by what the backward pass keeps, the fastest first: the first whose program
            fits into the devices' memory counts, or else the last.
        startup: gets the times, and the name of the step.
        *args: the arguments of a step.

    Returns:
        The compiled program, a ``jax.stages.Compiled``. The step itself for ``pmap``, which finds
        its program in JAX's memory: only ``pmap`` turns arrays of a process into those of all.
    """
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    *_, last = steps.values()
    limit = memory.limit() if len(steps) > 1 else None
    for startup.remat, step in steps.items():
        hits.clear()
        with startup.part("traced"):
            lowered = step.lower(*args)
        jax.monitoring.register_event_listener(listen)
        try:
            with startup.part("compiled"):
                program = lowered.compile()
        finally:
            jax.monitoring.unregister_event_listener(listen)
        startup.is_cached = bool(hits)
        if step is last or limit is None or memory.needed(program) <= limit:
            return step if isinstance(step, PmapStep) else program
    raise AssertionError("the last step counts")
