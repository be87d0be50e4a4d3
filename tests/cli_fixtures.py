"""The fixtures of the commands: files to work on, and commands to run. A plugin of conftest."""

import json
import os
import re
import shutil

import jax
import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The files, written once."""
    import cli_files

    folder = tmp_path_factory.mktemp("made")
    with jax.numpy_dtype_promotion("strict"):
        cli_files.write_all(folder)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of them to work in."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def cli(here, capsys):
    """Run a command: its status and stdout; nothing may be on stderr."""

    def run(*words, status=0):
        code = _main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, err) == (status, ""), err
        return json.loads(out) if "--json" in words else out

    return run


@pytest.fixture
def refused(here, capsys):
    """Run a command that must fail with one line, and leave nothing behind."""

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
    """A terminal of so many columns that remembers what it showed."""
    console = pytest.importorskip(
        "rich.console", reason="rich, which comes with Flax, is not there"
    )
    with open(os.devnull, "w") as nowhere:
        options = {"record": True, "file": nowhere, "force_terminal": True, "highlight": False}
        yield lambda width: console.Console(width=width, **options)


def _main(words):
    from lora_jax.cli import main

    return main(words)
