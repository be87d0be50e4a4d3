"""Spell messages of the library for the command line: its arguments as flags."""

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
from typing import Any

# What commands call: their arguments are meant by ``name=`` in a message.
_CALLED = {
    "lora_jax.io.hf": ("load", "merge", "save"),
    "lora_jax.io.peft": ("load", "save"),
    "lora_jax.io.safetensors": ("load", "save"),
    "lora_jax.algebra": ("extract",),
}
_CALL = re.compile(r"[\w.]+\((?:[^()]|\([^()]*\))*\)")  # Python that is shown as such
_ARGUMENT = re.compile(r"(?<![\w.=])([a-z]\w+)=(?!=)")


def spelled(text: str, parser: argparse.ArgumentParser) -> str:
    """Write a message with a command's flags for the arguments of functions.

    ``pass names={'a': 'b'}`` becomes ``pass --names '{"a": "b"}'``, and ``overwrite=True``
    ``--overwrite``. Arguments that the command has no flag for are named as those of Python. Calls
    such as ``lora_jax.layout_of(fn, params)`` stay as they are.
    """
    flags = {name.lstrip("-").replace("-", "_"): name for name in parser._option_string_actions}
    python, parts, done = [], [], 0
    calls = [match.span() for match in _CALL.finditer(text)]
    for match in _ARGUMENT.finditer(text):
        start, end = match.span()
        name = match[1]
        if start < done or any(a <= start < b for a, b in calls):
            continue
        if name not in flags:
            python += [] if name in python else [name]
            continue
        value, length = _value(text[end:])
        parts += [text[done:start], _flag(flags[name], parser, value)]
        done = end + length
    owner = {name: where for name in python if (where := _owner(name))}
    spelled = "".join([*parts, text[done:]])
    if not owner:
        return spelled
    listed = " and ".join(f"{name}= of {where}" for name, where in owner.items())
    return f"{spelled} (in Python: {listed})"


def _flag(flag: str, parser: argparse.ArgumentParser, value: Any) -> str:
    is_switch = parser._option_string_actions[flag].nargs == 0
    if value is None or (is_switch and value is True):
        return flag if value is None or is_switch else f"{flag} "
    return f"{flag} {shlex.quote(json.dumps(value)) if isinstance(value, dict) else value}"


def _value(text: str) -> tuple[Any, int]:
    """Read the Python value that a text begins with, and its length; None, 0 without one."""
    ends = [match.end() for match in re.finditer(r"""['"}\])]|[\w.]+""", text)]
    for end in ends if re.match(r"""['"{\[(\dTF-]""", text) else ():
        try:
            value = ast.literal_eval(text[:end])
        except (SyntaxError, ValueError):
            continue
        return (text[:end] if "..." in text[:end] else value), end
    return None, 0


def _owner(name: str) -> str | None:
    """Return the function that has an argument of this name, of those that commands call."""
    for module, functions in _CALLED.items():
        for function in functions:
            called = getattr(importlib.import_module(module), function)
            if name in inspect.signature(called).parameters:
                return f"{module}.{function}"
    return None
