"""Write an output folder completely or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = "results.json"


@contextmanager
def written_at_once(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``folder`` if the block succeeds, and is removed if not.

    An existing ``folder`` stays untouched until then, and is replaced. An interruption leaves no
    unfinished folder of that name.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            old = temporary.with_name(f"{temporary.name}-old")
            os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(out: Path, made_by: str, *inputs: Path | None) -> None:
    """Raise unless ``out`` can be created, or an earlier run made it and it contains no input."""
    for path in inputs:
        if path and path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out {out}: the input {path} lies in it; pass another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(f"--out {out}: cannot write to {out.parent}; pass another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        found = json.loads((out / RESULTS).read_text("utf-8"))
        ours = set(found["files"]) if found["made_by"] == made_by else set()
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if not ours:
        raise FileExistsError(f"--out {out}: not made by an earlier run; pass another --out")
    if more := sorted({path.name for path in out.iterdir()} - ours):
        raise FileExistsError(
            f"--out {out}: {more[0]} in it is not from an earlier run, and would be lost; pass "
            "another --out, or move it"
        )


def write_results(folder: Path, made_by: str, results: dict[str, Any]) -> None:
    """Write results.json last: it lists the files, and :func:`check_output` reads it."""
    files = sorted([*(path.name for path in folder.iterdir()), RESULTS])
    results = {"made_by": made_by, "files": files, **results}
    text = json.dumps(results, indent=2, default=str, allow_nan=False)
    (folder / RESULTS).write_text(f"{text}\n", "utf-8")
