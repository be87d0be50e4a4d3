"""All that depends on the JAX version: the only import of ``jax.extend``.

Seen on jax 0.10.2, 0.11.2 and 0.12.0.
"""

import importlib.util
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import eval_jaxpr
from jax.extend import core

Literal = core.Literal
_DEBUG_INFO = core.DebugInfo("lora_jax", "one equation", None, None)


def literal(atom: core.Literal) -> np.ndarray:
    """The value of a literal as an array of its type, which a Python number would not keep."""
    return np.asarray(atom.val, getattr(atom.aval, "dtype", None))


def is_drop(var: Any) -> bool:
    """Whether an output variable is never read."""
    return isinstance(var, core.DropVar)


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation on plain arrays; one value an outvar, None where it is dropped.

    As a jaxpr of one equation, so that JAX itself binds it: contexts, name stacks and the rules
    of custom derivatives are then its own, whatever the version.
    """
    invars, args = [], []
    for atom, value in zip(eqn.invars, values, strict=True):
        if not isinstance(atom, Literal) and atom not in invars:
            invars.append(atom)
            args.append(value)
    outvars = [v for v in eqn.outvars if not is_drop(v)]
    jaxpr = core.Jaxpr((), invars, outvars, [eqn], eqn.effects, _DEBUG_INFO)
    results = iter(eval_jaxpr(jaxpr, (), *args))
    return [None if is_drop(v) else next(results) for v in eqn.outvars]


def read_inputs(closed: Any) -> list[bool]:
    """For each input of a jaxpr, whether anything reads it."""
    jaxpr = closed.jaxpr
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}
    read.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
    return [v in read for v in jaxpr.invars]


def scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carries."""
    if "ft_in" in eqn.params:  # jax >= 0.11
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def rebind_jit(
    eqn: core.JaxprEqn,
    body: Callable[..., list[Any]],
    args: Sequence[Any],
    in_widths: Sequence[int],
) -> list[Any]:
    """Bind a ``jit`` equation again around another body: name and options are kept.

    Operand ``i`` of the equation has become ``in_widths[i]`` operands. ``body`` gives its outputs
    as a list of lists: output ``j`` of the equation has become as many values as list ``j`` has.
    """
    out_widths: list[int] = []

    def flat_body(*args):
        groups = body(*args)
        out_widths[:] = [len(group) for group in groups]
        return [x for group in groups for x in group]

    jaxpr = jax.make_jaxpr(flat_body)(*args)
    params = dict(eqn.params, jaxpr=jaxpr)
    for name, widths in (
        ("in_shardings", in_widths),
        ("in_layouts", in_widths),
        ("donated_invars", in_widths),
        ("out_shardings", out_widths),
        ("out_layouts", out_widths),
    ):
        repeated = zip(params[name], widths, strict=True)
        params[name] = tuple(x for x, width in repeated for _ in range(width))
    return eqn.primitive.bind(*args, **params)


def rebind_remat(
    eqn: core.JaxprEqn,
    body: Callable[..., list[Any]],
    args: Sequence[Any],
    in_widths: Sequence[int],
) -> list[Any]:
    """Bind a ``checkpoint`` equation again around another body: policy and region are kept."""
    closed = jax.make_jaxpr(lambda *args: [x for group in body(*args) for x in group])(*args)
    jaxpr = closed.jaxpr  # a region takes its constants as operands
    invars = [*jaxpr.constvars, *jaxpr.invars]
    region = core.Jaxpr((), invars, jaxpr.outvars, jaxpr.eqns, jaxpr.effects, _DEBUG_INFO)
    params = dict(eqn.params, jaxpr=region)
    if isinstance(params["prevent_cse"], tuple):  # one flag an operand
        repeated = zip(params["prevent_cse"], in_widths, strict=True)
        flags = [x for x, width in repeated for _ in range(width)]
        params["prevent_cse"] = (*[False] * len(closed.consts), *flags)
    return eqn.primitive.bind(*closed.consts, *args, **params)


def _folder(package: str) -> str:
    spec = importlib.util.find_spec(package)
    return os.path.dirname(str(spec and spec.origin)) + os.sep


_OWN = os.path.dirname(__file__) + os.sep
_JAX, *_OTHERS = (_folder(package) for package in ("jax", "flax", "optax"))


def source_line(eqn: core.JaxprEqn) -> str | None:
    """Where in the user's code an equation was traced: ``model.py:41 (Mlp.__call__): y = ...``.

    The innermost frame outside JAX, Flax and this package; failing that, the innermost one of
    Flax; None where JAX alone is to be seen, as inside its own jitted functions.
    """
    trace = eqn.source_info.traceback
    frames = [] if trace is None else traceback.extract_tb(trace.as_python_traceback())
    frames = [frame for frame in frames if not frame.filename.startswith((_JAX, _OWN))]
    users = [frame for frame in frames if not frame.filename.startswith(tuple(_OTHERS))]
    if not frames:
        return None
    frame = (users or frames)[-1]
    return f"{frame.filename}:{frame.lineno} ({frame.name})" + (
        f": {frame.line}" if frame.line else ""
    )
