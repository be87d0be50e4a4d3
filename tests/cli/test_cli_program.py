"""The program: help, completion, errors, terminals, by the command line."""

import argparse
import errno
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from cli_files import run

import lora_jax
from lora_jax.cli import main
from lora_jax.cli._arguments import byte_count, count, share
from lora_jax.cli._parser import parser
from lora_jax.cli._show import Show, plain, size
from lora_jax.io.hf import _shards

COMMANDS = (
    *("inspect", "merge", "convert", "diff", "extract", "verify", "analyze"),
    "completion",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_the_help_runs(command, here, capsys):
    if command == "completion":
        pytest.importorskip("shtab", reason="shtab, of the extra cli, is not installed")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    example = re.search(r"example:\n  lora-jax (.*)\n", text)
    assert example
    assert main(example[1].split()) == (1 if command == "diff" else 0)
    assert capsys.readouterr().out


def test_completion_says_what_is_missing(refused, monkeypatch, cli):
    monkeypatch.setitem(sys.modules, "shtab", None)
    refused(
        "completion", "bash", match=r"shtab, which is not installed: pip install 'lora-jax\[cli\]'"
    )
    refused("completion", "fish", match="invalid choice: 'fish'")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands(shell, cli):
    pytest.importorskip("shtab", reason="shtab, of the extra cli, is not installed")
    text = cli("completion", shell)
    assert all(command in text for command in COMMANDS)
    assert cli("completion", shell, "--json")["script"].strip() == text.strip()
    assert cli("completion", shell, "--quiet") == ""


@pytest.mark.long
def test_a_process_says_no_more_than_it_is_to(here):
    done = run("inspect", "native")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"native: adapter in one file, \d.* kB\npath ", done.stdout)
    done = run("diff", "run", "native", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    json.loads(done.stdout)
    done = run("merge", "params", "adapter", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lora-jax merge: params holds neither model.safetensors")
    assert done.stderr.count("\n") == 1
    done = run("--version")
    assert done.stdout == f"lora-jax {lora_jax.__version__}\n"


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lora-jax {lora_jax.__version__}\n"


@pytest.mark.long
def test_a_reader_that_goes_away_hears_nothing(here):
    command = f"{sys.executable} -m lora_jax.cli inspect model | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_errors_of_ours_and_others(here, capsys, monkeypatch):
    assert main(["insect", "adapter"]) == 2
    assert capsys.readouterr().err.startswith("lora-jax insect: argument COMMAND: invalid choice")
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("lora-jax: the following arguments are required")
    assert main(["inspect", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    from lora_jax.cli._commands import inspect as _inspect

    def stops(error):
        def run(*_):
            raise error

        monkeypatch.setattr(_inspect, "run", run)
        return main(["inspect", "adapter"])

    assert stops(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""
    assert stops(BrokenPipeError()) == 141
    assert stops(KeyError("a name")) == 2
    assert capsys.readouterr().err == "lora-jax inspect: a name\n"
    assert stops(ValueError("two\n  lines")) == 2
    assert capsys.readouterr().err == "lora-jax inspect: two lines\n"
    assert stops(PermissionError(errno.EACCES, "Permission denied", "there")) == 2
    assert capsys.readouterr().err == "lora-jax inspect: there: Permission denied\n"
    assert stops(ValueError("inspect: pass base='a'")) == 2
    assert capsys.readouterr().err == "lora-jax inspect: pass --base a\n"
    assert stops(ValueError()) == 2
    assert capsys.readouterr().err == "lora-jax inspect: ValueError\n"
    with pytest.raises(RuntimeError, match="a bug"):
        stops(RuntimeError("a bug"))


def test_an_interrupted_merge_leaves_nothing(here, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_shards, "_write_one", interrupt)
    before = sorted(here.iterdir())
    assert main(["merge", "model", "adapter", "out"]) == 130
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_of_a_terminal_are_as_wide_as_it_is(width, here, screen):
    for words in (
        ("inspect", "adapter", "--base", "model"),
        ("inspect", "model"),
        ("diff", "adapter", "other"),
        ("diff", "model", "tuned"),
        ("analyze", "adapter", "--base", "model", "--with", "other"),
    ):
        console = screen(width)
        main(list(words), Show(console))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        found = [line for line in lines if line.startswith("model") and "proj" in line]
        assert len(found) == 4 + 2 * (words == ("inspect", "model"))  # no row is wrapped
        assert width < 120 or not any("…" in line for line in found)
    assert width > 60 or all("…" in line for line in found)


def test_progress_is_drawn_where_somebody_looks(here, screen):
    console = screen(100)
    assert main(["merge", "model", "adapter", "out"], Show(console)) == 0
    text = console.export_text()
    assert re.search(r"merging .*100%", text)
    assert "out: 4 of 10 tensors changed" in text


def test_numbers_of_json_are_numbers():
    found = plain({"a": np.float32(0.5), "b": [np.int64(2), float("nan")], "c": (None, "x", True)})
    assert found == {"a": 0.5, "b": [2, None], "c": [None, "x", True]}
    assert json.dumps(found)


def commands_of(top):
    (commands,) = (a for a in top._actions if hasattr(a, "choices") and a.choices)
    return commands.choices


def test_every_command_has_the_common_options():
    commands = commands_of(parser())
    assert tuple(commands) == COMMANDS
    for command in commands.values():
        assert {"--json", "--quiet", "--debug", "--help"} <= {*command._option_string_actions}
    assert size(0) == "0 bytes"


def test_every_argument_is_explained():
    for name, command in commands_of(parser()).items():
        assert all(action.help for action in command._actions), name
    listed = parser().format_help()
    assert all(re.search(rf"\b{command} +\w", listed) for command in COMMANDS)


def test_models_come_before_adapters_and_outputs_last():
    order = ["MODEL", "IN", "TUNED", "ADAPTER", "OUT"]
    for name, command in commands_of(parser()).items():
        places = [a.metavar for a in command._actions if not a.option_strings]
        places = [order.index(p) for p in places if p in order]
        assert places == sorted(places), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "a", "b", "--too", "peft"], "there is no --too: did you mean --to?"),
        (["merge", "--wieght=1", "a", "b", "c"], "there is no --wieght: did you mean --weight?"),
        (["merge", "a", "--overwite", "b", "c"], "there is no --overwite: did you mean --overw"),
        (["diff", "a", "b", "-x"], "there is no -x"),
        (["extract", "a", "b", "c", "--alpha", "x"], "argument --alpha: invalid float value: 'x'"),
        (["inspect"], "the following arguments are required: PATH"),
    ],
)
def test_a_wrong_flag_names_the_nearest_and_the_help_of_its_command(words, message, refused):
    refused(*words, match=f"{re.escape(message)}.*see lora-jax {words[0]} --help")


def test_flags_come_after_the_command(capsys):
    assert main(["--json", "inspect", "a"]) == 2
    expected = "lora-jax: there is no --json before the command (see lora-jax --help)\n"
    assert capsys.readouterr().err == expected


def test_help_is_there_without_jax():
    code = (
        "import sys; from lora_jax.cli._parser import parser; parser().format_help();"
        "print('jax' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False False\n", "")


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (count, "3", 3),
        (count, "0", "'0': expected an integer, at least 1"),
        (count, "-1", "expected an integer"),
        (share, "0.5", 0.5),
        (share, "-1", "'-1': expected a number, at least 0"),
        (share, "nan", "expected a number"),
        (byte_count, "5GB", 5 * 10**9),
        (byte_count, "1.5kib", 1536),
        (byte_count, "400", 400),
        (byte_count, "0", "'0': expected a size such as 5GB or 500MB"),
        (byte_count, "5XB", "expected a size"),
    ],
)
def test_types_of_arguments(parse, text, expected):
    if not isinstance(expected, str):
        assert parse(text) == expected
        return
    with pytest.raises(argparse.ArgumentTypeError, match=expected):
        parse(text)
