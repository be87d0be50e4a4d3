"""Keep the results of an experiment: a CSV that grows by rows, and a JSON that describes it."""

import csv
import hashlib
import io
import json
import os
import platform
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

import lora_jax

ROUNDING = "weights rounded to float16, computed with in float32"
KEYS = ("task", "method", "setting", "seed")
Key = tuple[str, str, str, int]

_ROOT = Path(__file__).resolve().parents[2]
_MEASURED = (
    "trained_parameters",
    "validation_accuracy",
    "test_accuracy",
    "seconds_per_step",
    "peak_bytes",
    "optimizer_bytes",
    "file_bytes",
)


class Results:
    """The rows of an experiment, on disk as they come; rows that exist are not computed again.

    A row is a dict with the keys ``task, method, setting, seed`` and further columns. ``FILE.csv``
    has the rows, ``FILE.json`` what all of them share: settings, code, inputs, hardware, versions.

    Args:
        path: the CSV file. An existing one is continued.
        settings: the settings that every row shares.
        inputs: the digests of the model and of each task; tasks may be added later. Or a text.
        columns: the columns beside the keys.

    Raises:
        ValueError: the file was written by other code, with other settings, inputs, hardware or
            versions, or it is not a file of this class.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str] | str,
        columns: Sequence[str] = _MEASURED,
    ) -> None:
        self.path, self.columns = path, (*KEYS, *columns)
        self._rows: dict[Key, dict[str, Any]] = {}
        shared = identity(settings, inputs)
        sidecar = path.with_suffix(".json")
        commands = []
        if path.exists() or sidecar.exists():
            commands, more = self._check(sidecar, shared)
            shared["inputs"] = more | shared["inputs"]
        path.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python", *map(_short, sys.argv)])
        commands = [*commands, *([command] if command not in commands else [])]
        with written_file(sidecar) as file:
            text = json.dumps({"commands": commands, **shared}, indent=2)
            file.write(f"{text}\n".encode())
        if path.exists():
            self._read()
        else:
            self._write(",".join(self.columns) + "\n")

    def _check(self, sidecar: Path, shared: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
        """Return commands and inputs so far; raise if the rows do not fit to this run."""
        remedy = f"Pass another --out, or remove {self.path.name} and {sidecar.name}"
        try:
            found = json.loads(sidecar.read_text("utf-8"))
            commands, inputs = found.pop("commands"), found["inputs"]
            known = {name: x for name, x in inputs.items() if name in shared["inputs"]}
            added = {name: x for name, x in shared["inputs"].items() if name not in inputs}
            found["inputs"] = known | added
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{self.path}: without a {sidecar.name} of this experiment it cannot be continued "
                f"({type(error).__name__}). {remedy}"
            ) from error
        for name in {**found, **shared}:
            if found.get(name) != json.loads(json.dumps(shared.get(name))):
                raise ValueError(
                    f"{self.path}: its rows have {name} {found.get(name)}, and this run has "
                    f"{shared.get(name)}: they do not mix. {remedy}"
                )
        return commands, inputs

    def _read(self) -> None:
        text = self.path.read_text("utf-8")
        whole = text[: text.rfind("\n") + 1]
        lines = list(csv.reader(io.StringIO(whole)))
        if not lines or tuple(lines[0]) != self.columns:
            raise ValueError(
                f"{self.path}: its columns are {lines[0] if lines else 'none'}, expected "
                f"{', '.join(self.columns)}. Pass another --out, or remove the file"
            )
        for number, line in enumerate(lines[1:], 2):
            if len(line) != len(self.columns):
                raise ValueError(
                    f"{self.path}, line {number}: {len(line)} fields, expected "
                    f"{len(self.columns)}. Remove the line: its row is computed again"
                )
            row = {c: _value(c, x) for c, x in zip(self.columns, line, strict=True)}
            self._rows[_key(row)] = row
        if whole != text:  # the last row was cut by an interruption: it is computed again
            with written_file(self.path) as file:
                file.write(whole.encode())

    def _write(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order of the file."""
        return list(self._rows.values())

    def get(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the rows with these values, such as ``get(task="movie", seed=0)``."""
        return [row for row in self.rows if all(row[k] == v for k, v in wanted.items())]

    def missing(self, keys: Iterable[Key]) -> list[Key]:
        """Return those keys ``(task, method, setting, seed)`` that have no row yet."""
        return [key for key in keys if key not in self._rows]

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows to the end of the file.

        Raises:
            ValueError: a row has other columns, or its key exists.
        """
        rows = [dict(row) for row in rows]
        for row in rows:
            if set(row) != set(self.columns):
                wrong = sorted(set(row) ^ set(self.columns))
                raise ValueError(f"append: {wrong} are missing or unexpected among the columns")
            if _key(row) in self._rows:
                raise ValueError(f"append: there is a row {_key(row)} in {self.path}")
        out = io.StringIO()
        csv.DictWriter(out, self.columns, lineterminator="\n").writerows(rows)
        self._write(out.getvalue())
        self._rows |= {_key(row): row for row in rows}


def identity(settings: Mapping[str, Any], inputs: Mapping[str, str] | str) -> dict[str, Any]:
    """Return what all rows of one file share."""
    device = jax.devices()[0]
    return {
        "settings": dict(settings),
        "inputs": {"all": inputs} if isinstance(inputs, str) else dict(inputs),
        "rounding": ROUNDING,
        "precision": str(jax.config.jax_default_matmul_precision or "default of the device"),
        "code": code_digest(),
        "hardware": f"{device.device_kind}, {os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "lora_jax": lora_jax.__version__,
        },
    }


def _short(argument: str) -> str:
    """Return a path below the repository relative to it, and the name of another absolute one."""
    path = Path(argument)
    if path.resolve().is_relative_to(_ROOT):
        return str(path.resolve().relative_to(_ROOT)) if path.exists() else argument
    return path.name if path.is_absolute() else argument


def code_digest() -> str:
    """Return a digest of the source of the package and of the examples."""
    digest = hashlib.sha256()
    for path in sorted([*_ROOT.glob("lora_jax/**/*.py"), *_ROOT.glob("examples/**/*.py")]):
        digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def written_file(path: Path) -> Iterator[Any]:
    """Yield a binary file that becomes ``path`` if the block succeeds, and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _key(row: Mapping[str, Any]) -> Key:
    return row["task"], row["method"], row["setting"], row["seed"]


def _value(column: str, text: str) -> Any:
    """Read a field: text for names, an int for the seed, else a number; None if it is empty."""
    if column in KEYS[:3]:
        return text
    if text == "":
        return None
    try:
        return int(text)
    except ValueError:
        return float(text) if column != "seed" else int(text)
