"""Folders that are there as a whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_at_once(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``folder`` if the block succeeds, and is removed if not.

    What stood at ``folder`` stays untouched until then, and is replaced. An interruption leaves
    nothing under that name that was not finished.
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
