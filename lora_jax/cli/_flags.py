"""Spell messages of the library for the command line: its arguments as flags."""

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex

# What commands call: their arguments are meant by ``name=`` in a message.
_CALLED = {
    "lora_jax.io.hf": ("load", "merge", "save"),
    "lora_jax.io.peft": ("load", "save"),
    "lora_jax.io.safetensors": ("load", "save"),
    "lora_jax.algebra": ("extract",),
}
_CALL = re.compile(r"[\w.]+\((?:[^()]|\([^()]*\))*\)")  # Python that is shown as such
_ARGUMENT = re.compile(r"(?<![\w.=-])([a-z]\w+)=(?!=)")


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
        name, (value, length) = match[1], _value(text[end:])
        if start < done or any(a <= start < b for a, b in calls):
            continue
        if name not in flags or (not length and text[end : end + 1].isalpha()):  # or an expression
            python += [] if name in python else [name]
            continue
        parts += [text[done:start], _flag(flags[name], parser, value)]
        done = end + length
    owner = {name: where for name in python if (where := _owner(name))}
    spelled = "".join([*parts, text[done:]])
    if not owner:
        return spelled
    listed = " and ".join(f"{name}= of {where}" for name, where in owner.items())
    return f"{spelled} (in Python: {listed})"


def _flag(flag: str, parser: argparse.ArgumentParser, value: str) -> str:
    is_switch = parser._option_string_actions[flag].nargs == 0
    return flag if not value or (is_switch and value == "True") else f"{flag} {value}"


def _value(text: str) -> tuple[str, int]:
    """Spell the Python value that a text begins with for a shell; and its length, 0 without one."""
    ends = [match.end() for match in re.finditer(r"""['"}\])]|[\w.]+""", text)]
    for end in ends if re.match(r"""['"{\[(\dTF-]""", text) else ():
        try:
            value = ast.literal_eval(text[:end])
        except (SyntaxError, ValueError):
            continue
        if isinstance(value, tuple):  # names with commas between them, A,B where they are not known
            names = [chr(65 + k) if name is ... else str(name) for k, name in enumerate(value)]
            return shlex.quote(",".join(names)), end
        if "..." in text[:end]:  # not a value, but the form of one
            return text[:end], end
        return shlex.quote(json.dumps(value) if isinstance(value, dict) else str(value)), end
    return "", 0


def _owner(name: str) -> str | None:
    """Return the function that has an argument of this name, of those that commands call."""
    for module, functions in _CALLED.items():
        for function in functions:
            called = getattr(importlib.import_module(module), function)
            if name in inspect.signature(called).parameters:
                return f"{module}.{function}"
    return None
