"""Load what the experiments train on: MiniLM in float16 values, and tokenized tasks, or a pack.

The weights are rounded to float16 and computed with in float32. So a CPU that downloads them and a
GPU that gets them in a file of half the size use the same numbers.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

sys.path.append(str(Path(__file__).resolve().parents[1]))

import bert
import data
from results import ROUNDING, written_file
from training import Tokens

__all__ = [
    "LENGTH",
    "ROUNDING",
    "TASKS",
    "Inputs",
    "Task",
    "cut",
    "half",
    "inputs_of",
    "load",
    "pack",
    "read",
    "write",
]


LENGTH = 48  # tokens per sentence
TASKS = ("movie", "amazon", "topics", "nyt", "tweets")


@dataclass(frozen=True)
class Task:
    """A tokenized task: ``ids`` and ``mask`` ``[n, length]``, and ``labels`` ``[n]``."""

    name: str
    classes: int
    train: Tokens
    validation: Tokens
    test: Tokens


@dataclass(frozen=True)
class Inputs:
    """The encoder, its parameters, and the tasks by name.

    Attributes:
        encoder: the Flax module.
        params: its parameters: float32 arrays of float16 values, of NumPy.
        tasks: the tasks.
        digest: a digest of the model and of each task, the same if downloaded or packed.
    """

    encoder: Any
    params: dict[str, Any]
    tasks: dict[str, Task]
    digest: dict[str, str]


def load(names: Iterable[str], packed: Path | None = None, wordnet: Path | None = None) -> Inputs:
    """Load the encoder and the named tasks, from a pack or from the packages.

    Args:
        names: the tasks, of ``TASKS``.
        packed: a file that :func:`pack` wrote; None downloads.
        wordnet: the folder of WordNet's ``data.noun``; None is Debian's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is no such task, or ``packed`` is another file.
    """
    names = list(names)
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"task {unknown[0]!r}: expected one of {', '.join(TASKS)}")
    arrays = read(names, packed, lambda: _download(names, wordnet))
    encoder = bert.Encoder(**json.loads(arrays["config"].tobytes()))
    return inputs_of(encoder, arrays, names)


def read(
    names: Sequence[str], packed: Path | None, download: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return arrays by name from a pack, or else from the packages."""
    if packed:
        return _read_pack(packed, names)
    try:
        return download()
    except OSError as error:
        remedy = "or pass --packed FILE, which examples/experiments/pack.py wrote elsewhere"
        raise type(error)(f"{error}; {remedy}") from error


def inputs_of(encoder: Any, arrays: Mapping[str, np.ndarray], names: Iterable[str]) -> Inputs:
    """Make inputs of arrays by name."""
    flat = {k.removeprefix("model/"): v for k, v in arrays.items() if k.startswith("model/")}
    params = unflatten_dict({k: v.astype(np.float32) for k, v in flat.items()}, sep="/")
    tasks = {name: _task(name, arrays) for name in names}
    digest = {name: _digest(arrays, f"{name}/") for name in ["model", *names]}
    return Inputs(encoder, params, tasks, digest)


def pack(path: Path, wordnet: Path | None = None) -> int:
    """Write the encoder and all tasks to a file that :func:`load` reads; return its bytes."""
    return write(path, _download(TASKS, wordnet))


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> int:
    """Write arrays to a file that :func:`read` reads; return its bytes."""
    with written_file(path) as file:
        np.savez_compressed(file, **{k: _narrow(k, v) for k, v in arrays.items()})
    return path.stat().st_size


def cut(tokens: Tokens, length: int, n: int) -> Tokens:
    """Keep the first tokens of the first sentences."""
    short = {name: tokens[name][:n, :length] for name in ("ids", "mask")}
    return short | {"labels": tokens["labels"][:n]}


def _download(names: Iterable[str], wordnet: Path | None) -> dict[str, np.ndarray]:
    """Return all arrays by the names that they have in a pack."""
    splits = {}
    for name in names:
        if name == "topics":
            splits[name] = data.wordnet_topics(wordnet)
        else:
            splits[name] = data.movie_reviews() if name == "movie" else data.other_sentiment(name)
    folder = data.minilm()
    tokenizer = bert.load_tokenizer(folder, LENGTH)
    model, params = bert.load(folder, num_labels=2)
    fields = [f for f in bert.Encoder.__dataclass_fields__ if f not in ("name", "parent")]
    config = json.dumps({field: getattr(model.encoder, field) for field in fields}, sort_keys=True)
    arrays = {"config": np.frombuffer(config.encode(), np.uint8)}
    for path, leaf in sorted(flatten_dict(params["encoder"], sep="/").items()):
        arrays[f"model/{path}"] = half(path, leaf)
    for name, parts in splits.items():
        arrays[f"{name}/classes"] = np.array(len(parts.labels), np.int32)
        for split in ("train", "validation", "test"):
            part = getattr(parts, split)
            columns = bert.encode(tokenizer, part.texts) | {"labels": part.labels}
            arrays |= {f"{name}/{split}/{column}": x for column, x in columns.items()}
    return arrays


def half(name: str, x: Any) -> np.ndarray:
    """Round weights to float16; raise if one is too large."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(x, np.float32).astype(np.float16)
    if not np.isfinite(rounded).all():
        largest = np.abs(np.asarray(x)).max()
        raise ValueError(f"{name}: {largest} does not fit into float16, expected at most 65504")
    return rounded


def _narrow(name: str, x: np.ndarray) -> np.ndarray:
    """Store integers in 16 bits; raise if they do not fit."""
    if x.dtype != np.int32:
        return x
    if x.min() < 0 or x.max() > np.iinfo(np.uint16).max:
        raise ValueError(f"{name}: values from {x.min()} to {x.max()} do not fit into 16 bits")
    return x.astype(np.uint16)


def _read_pack(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    remedy = "write it with: python examples/experiments/pack.py FILE.npz"
    if not path.is_file():
        raise FileNotFoundError(f"--packed {path}: no such file; {remedy}")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files if _is_used(k, names)}
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"--packed {path}: not a pack ({error}); {remedy}") from error
    except Exception as error:  # zipfile.BadZipFile, zlib.error
        raise ValueError(f"--packed {path}: damaged ({error}); {remedy}") from error
    needed = ["config", *(f"{name}/test/labels" for name in names)]
    if missing := [name for name in needed if name not in arrays]:
        raise ValueError(f"--packed {path}: it has no {missing[0]!r}; {remedy}")
    return {k: x.astype(np.int32) if x.dtype == np.uint16 else x for k, x in arrays.items()}


def _is_used(key: str, names: Iterable[str]) -> bool:
    return key.partition("/")[0] in {"config", "model", *names}


def _task(name: str, arrays: Mapping[str, np.ndarray]) -> Task:
    splits = {
        split: {c: arrays[f"{name}/{split}/{c}"] for c in ("ids", "mask", "labels")}
        for split in ("train", "validation", "test")
    }
    return Task(name, int(arrays[f"{name}/classes"]), **splits)


def _digest(arrays: Mapping[str, np.ndarray], prefix: str) -> str:
    digest = hashlib.sha256()
    for name, x in sorted((k, x) for k, x in arrays.items() if k.startswith(prefix)):
        digest.update(f"{name} {x.dtype} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()[:16]
