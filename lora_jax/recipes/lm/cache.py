"""Keep compiled programs in a folder, for the next start of the trainer."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from lora_jax.recipes.packages import cache_folder


@contextlib.contextmanager
def kept_programs(cache: str | None) -> Iterator[str | None]:
    """Keep the programs that JAX compiles in the block; yield a line about a default, or None.

    By default nothing is kept on a CPU: different CPUs may share a folder, and on some of them XLA
    warns of its own programs when it reads them again. Nothing is kept by several processes: they
    tune a program together, and could wait for one that found it in a folder of its own.

    Args:
        cache: ``--cache``: a folder; ``none``; None for JAX's own setting, or else the default.

    Raises:
        NotADirectoryError: a file has the name of the folder, or of one above it.
        PermissionError: the folder cannot be written.
        ValueError: the name is empty.
    """
    before, note = jax.config.jax_compilation_cache_dir, None
    if cache == "none":
        folder = None
    elif cache is not None:
        folder = _checked(cache)
    else:
        folder = before
        is_shared = jax.process_count() > 1
        if before is None and jax.default_backend() != "cpu" and not is_shared:
            try:
                folder = _checked(str(cache_folder() / "compiled"))
                note = f"compiled programs are kept in {folder}"
            except OSError as error:
                note = f"compiled programs are not kept: {error}"
    _set(folder)
    try:
        yield note
    finally:
        _set(before)


def _set(folder: str | None) -> None:
    if folder != jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # JAX reads the setting once


def _checked(cache: str) -> str:
    """Return the path of a folder that can be written, or made; make nothing."""
    remedy = "pass another --cache, or --cache none"
    if not cache:
        raise ValueError(f"--cache '': expected a folder, or none; {remedy}")
    if "://" in cache:  # a bucket
        return cache
    path = Path(cache).resolve()
    place = next(x for x in (path, *path.parents) if x.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"--cache {cache}: {place} is not a folder; {remedy}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"--cache {cache}: cannot write to {place}; {remedy}")
    return str(path)
