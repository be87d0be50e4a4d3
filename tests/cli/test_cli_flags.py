"""Messages of the library on the command line: arguments are spelled as flags that exist."""

import ast
import re
from pathlib import Path

import pytest
from test_cli_program import commands_of

import lora_jax
from lora_jax.cli._flags import spelled
from lora_jax.cli._parser import parser

COMMANDS = commands_of(parser())


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("merge", "pass overwrite=True, or", "pass --overwrite, or"),
        ("merge", "as names={'a/b': 'c'}, or", """as --names '{"a/b": "c"}', or"""),
        ("merge", "pass names=; if", "pass --names; if"),
        ("merge", "pass family=, one of", "pass --family, one of"),
        ("merge", "write bfloat16, dtype='bfloat16'", "write bfloat16, --dtype bfloat16"),
        ("extract", "energy=1.5: expected", "--energy 1.5: expected"),
        ("extract", "rest='ignore'", "--rest ignore"),
        ("convert", "pass kinds={...: 'Conv1D'}, and", "pass --kinds {...: 'Conv1D'}, and"),
        ("merge", "pass parameter_order=(..., ...)", "pass --parameter-order A,B"),
        ("merge", "parameter_order=('a', 'b'): no", "--parameter-order a,b: no"),
        ("merge", "layout={'a/b': 'bio'}", """--layout '{"a/b": "bio"}'"""),
        ("merge", "layout=f(...)", "layout=f(...) (in Python: layout= of lora_jax.io.hf.load)"),
        ("inspect", "finite=False", "finite=False (in Python: finite= of lora_jax.io.peft.load)"),
        ("verify", "names=, tied=", "--names, tied= (in Python: tied= of lora_jax.io.hf.load)"),
        ("merge", "f.x(targets=1, rank=(2)) as it is", "f.x(targets=1, rank=(2)) as it is"),
        ("merge", "model: bias='x', a == b, x.names=2", "model: bias='x', a == b, x.names=2"),
    ],
)
def test_arguments_are_spelled_as_flags(command, text, expected):
    assert spelled(text, COMMANDS[command]) == expected


def messages():
    """Find the texts of the library's messages, with braces for what is filled in."""
    for path in Path(lora_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.exc is not None:
                for text in ast.walk(node.exc):
                    if isinstance(text, ast.JoinedStr):
                        parts = (getattr(x, "value", "{}") for x in text.values)
                        yield "".join(x if isinstance(x, str) else "'x'" for x in parts)
                    elif isinstance(text, ast.Constant) and isinstance(text.value, str):
                        yield text.value


def test_every_flag_that_a_message_names_exists():
    for text in (text for text in messages() if "=" in text):
        for command, known in COMMANDS.items():
            named = set(re.findall(r"--[a-z-]+", spelled(text, known)))
            named -= set(re.findall(r"--[a-z-]+", text))
            assert named <= {*known._option_string_actions}, (command, text)
