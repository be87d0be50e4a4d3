"""Define fixtures for the tests of the commands; conftest registers this module as a plugin."""

import json
import os
import re
import shutil

import jax
import pytest


@pytest.fixture(scope="session")
def written_files(tmp_path_factory):
    """Write all files once, and return their folder."""
    import cli_files

    folder = tmp_path_factory.mktemp("written")
    with jax.numpy_dtype_promotion("strict"):
        cli_files.write_all(folder)
    return folder


@pytest.fixture
def here(written_files, tmp_path, monkeypatch):
    """Copy the files to a temporary folder, and change into it."""
    shutil.copytree(written_files, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def cli(here, capsys):
    """Run a command, check its status and its empty stderr, and return its stdout."""

    def run(*words, status=0):
        code = _main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, err) == (status, ""), err
        return json.loads(out) if "--json" in words else out

    return run


@pytest.fixture
def refused(here, capsys):
    """Run a command that must fail with one line and write no file."""

    def run(*words, match):
        before = sorted(p.name for p in here.iterdir())
        code = _main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert err.startswith(f"lora-jax {words[0]}: ")
        assert re.search(match, err), err
        assert sorted(p.name for p in here.iterdir()) == before

    return run


@pytest.fixture
def screen():
    """Make terminals of a given width that record their output."""
    console = pytest.importorskip(
        "rich.console", reason="rich, a dependency of Flax, is not installed"
    )
    with open(os.devnull, "w") as nowhere:
        options = {"record": True, "file": nowhere, "force_terminal": True, "highlight": False}
        yield lambda width: console.Console(width=width, **options)


def _main(words):
    from lora_jax.cli import main

    return main(words)
