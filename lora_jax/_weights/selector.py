"""Select leaves by path, with the selector language.

A selector is a regular expression matched in full against the path, ``"all-linear"``, a
callable ``(path, leaf) -> bool | int``, or a list of those. A target may be a part of a weight: a
regular expression with a range after it, ``.*c_attn/kernel[:, 0:768]``.
"""

import re
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax._weights.axes import check_layout
from lora_jax._weights.conventions import conventional
from lora_jax._weights.layouts import Layouts
from lora_jax._weights.paths import nearest
from lora_jax._weights.ranges import resolve, spell, split_range

Selector = str | re.Pattern[str] | Callable[[str, Any], bool | int] | Iterable[Any] | None


def _compile(pattern: str | re.Pattern[str], argument: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{argument}={pattern!r} is not a regular expression: {error}. Patterns are matched "
            "in full against paths such as 'layers_0/attn/query/kernel'"
        ) from error


def select(
    selector: Selector,
    leaves: Mapping[str, Any],
    blocked: Mapping[str, str],
    argument: str,
    not_linear: Container[str] = (),
) -> dict[str, bool | int]:
    """Return the selected paths, each with the selector's answer: True, or a rank.

    A path that was selected with a range keeps it.

    Args:
        selector: the user's argument.
        leaves: every leaf by path.
        blocked: the leaves that may not be selected, each with the reason.
        argument: the name of the argument, for messages.
        not_linear: what ``"all-linear"`` leaves out.

    Raises:
        ValueError: a pattern selects nothing; the message lists what it matched, why that is
            blocked, and the nearest paths.
        TypeError: the selector is of no known kind.
    """
    if isinstance(selector, str | re.Pattern):
        return _select_pattern(selector, leaves, blocked, argument, not_linear)
    if callable(selector):
        return _select_callable(selector, leaves, blocked, argument)
    if not isinstance(selector, Iterable) or isinstance(selector, Mapping):
        raise TypeError(
            f"{argument}={selector!r}: expected a regular expression, 'all-linear', a callable "
            "(path, leaf) -> bool, or a list of those"
        )
    chosen: dict[str, bool | int] = {}
    for part in selector:
        chosen = select(part, leaves, blocked, argument, not_linear) | chosen
    return chosen


def _select_pattern(
    pattern: str | re.Pattern[str],
    leaves: Mapping[str, Any],
    blocked: Mapping[str, str],
    argument: str,
    not_linear: Container[str],
) -> dict[str, bool | int]:
    ranges = None
    if pattern == "all-linear":
        matched = [p for p in leaves if p not in not_linear]
    else:
        bare, ranges = split_range(pattern) if isinstance(pattern, str) else (pattern, None)
        if ranges is not None and argument != "targets":
            raise ValueError(f"{argument}={pattern!r}: only targets may be parts of weights")
        regex = _compile(bare, argument)
        matched = [p for p in leaves if regex.fullmatch(p)]
    free = [p for p in matched if p not in blocked]
    if not free:
        reasons = "".join(f"\n  {p}: {blocked[p]}" for p in matched[:8])
        if len(matched) > 8:
            reasons += f"\n  ... and {len(matched) - 8} more"
        met = f"It matches only{reasons}" if matched else "It matches no path at all."
        able = [p for p in leaves if p not in blocked]
        raise ValueError(
            f"{argument}={pattern!r} selects nothing. {met}\nPatterns are matched in full; the "
            f"nearest paths that could be selected: {nearest(str(pattern), able)}"
        )
    if ranges is not None:
        shapes = {path: tuple(leaves[path].shape) for path in free}
        free = [spell(p, resolve(ranges, p, shape), len(shape)) for p, shape in shapes.items()]
    return dict[str, bool | int].fromkeys(free, True)


def _select_callable(
    function: Callable[[str, Any], bool | int],
    leaves: Mapping[str, Any],
    blocked: Mapping[str, str],
    argument: str,
) -> dict[str, bool | int]:
    chosen = {}
    for path, leaf in leaves.items():
        answer = function(path, leaf) if path not in blocked else False
        answer = answer.item() if isinstance(answer, np.bool_ | np.integer) else answer
        if not isinstance(answer, bool | int):
            raise TypeError(
                f"{argument}: the callable returned {answer!r} for {path!r}; expected a bool or "
                "a rank"
            )
        if answer:
            chosen[path] = answer
    if not chosen:
        able = [p for p in leaves if p not in blocked]
        raise ValueError(
            f"{argument}: the callable chose none of the {len(able)} leaves it was offered: "
            f"{nearest('', able)}"
        )
    return chosen


def lookup(value: Any, path: str, argument: str, default: Any = None) -> Any:
    """Return the setting for a path: ``value``, or that of a mapping's first matching pattern."""
    if isinstance(value, Layouts):
        return value.get(path, default)
    if not isinstance(value, Mapping):
        return value
    for pattern, setting in value.items():
        if _compile(pattern, argument).fullmatch(path):
            return setting
    return default


def check_patterns(value: Any, argument: str, paths: Iterable[str]) -> None:
    """Raise if a mapping has a pattern that matches no path."""
    paths = list(paths)
    is_patterns = isinstance(value, Mapping) and not isinstance(value, Layouts)
    for pattern in value if is_patterns else ():
        if not any(_compile(pattern, argument).fullmatch(path) for path in paths):
            raise ValueError(
                f"{argument}={{{pattern!r}: ...}} matches none of the {len(paths)} paths it could "
                f"apply to. Nearest: {nearest(pattern, paths)}"
            )


def letters_of(path: str, leaves: Mapping[str, Any], layout: Mapping[str, str]) -> str:
    """Return the layout of a weight: as given, or by convention."""
    letters = lookup(layout, path, "layout") or conventional(path, leaves[path], leaves)
    return check_layout(letters, path, len(leaves[path].shape))
