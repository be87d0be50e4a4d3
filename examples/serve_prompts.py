"""Read the prompts of ``serve_many.py`` from a file, or make them up."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

PROMPTS = (
    "The capital of Italy is",
    "Once upon a time, there was a",
    "Water boils when",
    "To be, or not to be, that is",
    "The three primary colors are",
    "A good recipe for bread starts with",
    "The largest planet of the solar system is",
    "Dear Sir or Madam,",
    "In mathematics, a matrix is",
    "The opposite of hot is",
)


class Prompt(NamedTuple):
    """A prompt as text; ``where`` names its origin in messages."""

    text: str
    adapter: str | None
    max_new: int
    where: str


def read_prompts(path: Path, max_new: int) -> Iterator[Prompt]:
    """Read a file with one JSON object per line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not such an object; the message names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: no such file")
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path}: not UTF-8 text: {error}; save it as UTF-8") from error
    if not any(map(str.strip, lines)):
        raise ValueError(f"--prompts {path}: the file contains no prompts")
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"--prompts {path}, line {n}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        known = {"prompt": (str,), "adapter": (str, type(None)), "max_new": (int,)}
        if not isinstance(row, dict) or "prompt" not in row or row.keys() - known.keys():
            raise ValueError(
                f'{where}: expected one object per line, {{"prompt": "...", "adapter": "...", '
                f'"max_new": 16}}, got {line.strip()[:60]}'
            )
        for key, value in row.items():
            if type(value) not in known[key]:
                raise ValueError(
                    f"{where}, key {key!r}: expected {known[key][0].__name__}, got {value!r}"
                )
        prompt = Prompt(row["prompt"], row.get("adapter"), row.get("max_new", max_new), where)
        if prompt.max_new < 1:
            raise ValueError(f"{where}, key 'max_new': expected at least 1, got {prompt.max_new}")
        yield prompt


def make_prompts(names: Sequence[str], requests: int, max_new: int, seed: int) -> Iterator[Prompt]:
    """Repeat the prompts of this file, every eighth for the base.

    Some adapters are drawn more often than others, as in practice.
    """
    # RandomState: NumPy guarantees that its stream never changes.
    weights = 1 / np.arange(1, len(names) + 1)
    chosen = np.random.RandomState(seed).choice(len(names), requests, p=weights / weights.sum())
    for k, n in enumerate(chosen):
        adapter = None if k % 8 == 7 else names[int(n)]
        yield Prompt(PROMPTS[k % len(PROMPTS)], adapter, max_new, f"prompt {k}")


def check_names(prompts: Sequence[Prompt], names: Sequence[str]) -> None:
    """Raise an error if a prompt names an unknown adapter."""
    for prompt in prompts:
        if prompt.adapter is not None and prompt.adapter not in names:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(
                f"{prompt.where}: there is no adapter {prompt.adapter!r} among {known}: pass "
                f"--adapter {prompt.adapter}=PATH"
            )
