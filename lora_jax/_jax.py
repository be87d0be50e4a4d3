"""Hide the differences between JAX versions; no other file imports ``jax.extend``.

Tested on jax 0.10.2, 0.11.2 and 0.12.0.
"""

import functools
import importlib.util
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer, eval_jaxpr
from jax.extend import core
from jax.interpreters import partial_eval
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Literal = core.Literal
_DEBUG_INFO = core.DebugInfo("lora_jax", "one equation", None, None)


def literal(atom: core.Literal) -> jax.Array:
    """Return the value of a literal as an array of its dtype, weakly typed if the literal is."""
    weak = getattr(atom.aval, "weak_type", False)
    return jnp.asarray(atom.val, None if weak else getattr(atom.aval, "dtype", None))


def is_drop(var: Any) -> bool:
    """Return whether an output variable is never read."""
    return isinstance(var, core.DropVar)


def bind(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation on plain arrays; return one value per outvar, None if it is dropped.

    JAX itself binds the equation, as a jaxpr of one. So it handles contexts, name stacks and the
    rules of custom derivatives, whatever the version.
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


def trace(fn: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, Any, list[Any], Any]:
    """Trace ``fn`` to a jaxpr.

    Returns:
        The jaxpr without equations that no output needs (NNX returns a scanned layer's parameters
        as outputs of the scan, which nobody reads); the complete jaxpr; the constants, which are
        the first inputs of both; and the structure of ``fn``'s output.
    """
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    complete = _open(closed)
    live, _ = partial_eval.dce_jaxpr(complete, [True] * len(complete.outvars), instantiate=True)
    return live, complete, list(closed.consts), jax.tree.structure(out)


def _open(closed: Any) -> core.Jaxpr:
    """Return a jaxpr whose first inputs are the constants."""
    jaxpr = closed.jaxpr
    invars = [*jaxpr.constvars, *jaxpr.invars]
    return core.Jaxpr((), invars, jaxpr.outvars, jaxpr.eqns, jaxpr.effects, _DEBUG_INFO)


def read_inputs(jaxpr: core.Jaxpr) -> list[bool]:
    """Return, for each input of a jaxpr, whether anything reads it."""
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}
    read.update(v for v in jaxpr.outvars if not isinstance(v, Literal))
    return [v in read for v in jaxpr.invars]


def name_stack(eqn: core.JaxprEqn) -> str:
    """Return the user's named scopes around an equation, as ``jax.named_scope`` takes them."""
    return str(eqn.source_info.name_stack)


def scan_counts(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Return how many of a scan's operands are constants, and how many are carries."""
    if "ft_in" in eqn.params:  # jax >= 0.11
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def rebind_jit(
    eqn: core.JaxprEqn,
    closed: Any,
    args: Sequence[Any],
    in_widths: Sequence[int],
    out_widths: Sequence[int],
) -> list[Any]:
    """Bind a ``jit`` equation again around another jaxpr, with its name and options.

    Operand ``i`` of the equation has become ``in_widths[i]`` operands. The first is the original
    one and keeps a requested sharding or layout; the others keep the ones that they arrive with.
    Output ``j`` has become ``out_widths[j]`` outputs.
    """
    params = dict(eqn.params, jaxpr=closed)
    for name, widths, unset in (
        ("in_shardings", in_widths, _unspecified()),
        ("in_layouts", in_widths, None),
        ("donated_invars", in_widths, False),
        ("out_shardings", out_widths, _unspecified()),
        ("out_layouts", out_widths, None),
    ):
        params[name] = tuple(
            x if i == 0 else unset
            for x, width in zip(params[name], widths, strict=True)
            for i in range(width)
        )
    return eqn.primitive.bind(*args, **params)


@functools.cache
def _unspecified() -> Any:
    """Return JAX's mark for a sharding that nobody requested."""
    (eqn,) = jax.make_jaxpr(jax.jit(lambda x: x))(0).eqns
    return eqn.params["in_shardings"][0]


def rebind_remat(
    eqn: core.JaxprEqn,
    closed: Any,
    args: Sequence[Any],
    in_widths: Sequence[int],
    out_widths: Sequence[int],
) -> list[Any]:
    """Bind a ``checkpoint`` equation again around another jaxpr, with its policy and region."""
    params = dict(eqn.params, jaxpr=_open(closed))  # a region takes its constants as operands
    if isinstance(params["prevent_cse"], tuple):  # one flag per operand
        repeated = zip(params["prevent_cse"], in_widths, strict=True)
        flags = [x for x, width in repeated for _ in range(width)]
        params["prevent_cse"] = (*[False] * len(closed.consts), *flags)
    return eqn.primitive.bind(*closed.consts, *args, **params)


def rebind_shard_map(
    eqn: core.JaxprEqn, body: Callable[..., list[Any]], args: Sequence[Any], in_specs: Any
) -> list[Any]:
    """Bind a ``shard_map`` equation again around another body; ``args`` have ``in_specs``."""
    params = eqn.params
    axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    mapped = jax.shard_map(
        lambda *args: tuple(body(*args)),
        mesh=params["mesh"],
        in_specs=tuple(in_specs),
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=axes,
    )
    return list(mapped(*args))


def explicit_spec(x: Any) -> list[Any] | None:
    """Return the spec of an array on a mesh of Explicit axes, for every axis; None without one."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in (sharding.mesh.axis_types or ()):
        return None
    return [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]


def reshard(x: jax.Array, spec: Sequence[Any]) -> jax.Array:
    """Spread an array of a program with Explicit axes over them in another way."""
    return jax.sharding.reshard(x, explicit_sharding(x, spec))


def replicated(x: jax.Array) -> jax.Array:
    """Replicate an array over a mesh of Explicit axes, along which QR and SVD cannot run."""
    spec = explicit_spec(x)
    return x if spec is None or not any(spec) else reshard(x, [None] * x.ndim)


def explicit_sharding(x: jax.Array, spec: Sequence[Any]) -> NamedSharding:
    """Return a sharding on the mesh of ``x``, whether ``x`` is traced or not."""
    own = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    mesh: Any = getattr(own, "mesh", None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def to_mesh_of(eqn: core.JaxprEqn, x: jax.Array) -> jax.Array:
    """Replicate an array on the mesh of a ``reshard`` that changes the kinds of the mesh's axes."""
    mesh = eqn.params["dst_sharding"].mesh
    if jax.typeof(x).sharding.mesh.axis_types == mesh.axis_types:
        return x
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * x.ndim))
    return eqn.primitive.bind(x, **dict(eqn.params, dst_sharding=sharding))


def _folder(package: str) -> str:
    spec = importlib.util.find_spec(package)
    return os.path.dirname(str(spec and spec.origin)) + os.sep


_OWN = os.path.dirname(__file__) + os.sep
_JAX, *_OTHERS = (_folder(package) for package in ("jax", "flax", "optax"))


def source_frame(eqn: core.JaxprEqn) -> traceback.FrameSummary | None:
    """Return the frame of the user's code in which an equation was traced.

    It is the innermost frame outside JAX, Flax, Optax and this package, or else the innermost one
    of Flax or Optax; None if there are frames of JAX only, as inside its own jitted functions.
    """
    trace = eqn.source_info.traceback
    frames = [] if trace is None else traceback.extract_tb(trace.as_python_traceback())
    frames = [frame for frame in frames if not frame.filename.startswith((_JAX, _OWN))]
    users = [frame for frame in frames if not frame.filename.startswith(tuple(_OTHERS))]
    return (users or frames)[-1] if frames else None
