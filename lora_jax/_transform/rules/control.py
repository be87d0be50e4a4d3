"""Control flow: inner jaxprs are rebuilt around the low-rank paths, not inlined."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax import _jax
from lora_jax._transform.context import Context
from lora_jax._transform.delta import AnyDelta
from lora_jax._transform.interpret import evaluate
from lora_jax._transform.labelled import Axis, Labelled
from lora_jax._transform.lazy import Lazy, force
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.one_hot import OneHot
from lora_jax._transform.rule import rule


def run(ctx: Context, jaxpr: Any, args: Any, finish: Any = lambda outputs: outputs) -> Any:
    """Evaluate a body, which JAX may trace several times, and record its uses once."""
    with ctx.once((*map(id, ctx.eqns), id(jaxpr))):
        return finish(evaluate(ctx, jaxpr, args))


@rule("jit", folds=True)
def jit(ctx: Context, eqn, values):
    """Rebuild a jitted function, under its name, over the split weights."""
    return _rebuild(ctx, eqn, values, eqn.params["jaxpr"], _jax.rebind_jit)


@rule("checkpoint", "remat2", "remat", folds=True)
def remat(ctx: Context, eqn, values):
    """Rebuild a region with its policy, which saves what it saved without updates."""
    return _rebuild(ctx, eqn, values, eqn.params["jaxpr"], _jax.rebind_remat)


def _rebuild(ctx: Context, eqn, values, jaxpr, rebind):
    """Bind an equation again, by ``rebind``, around its inner function over split weights."""
    in_widths = [jax.tree.structure(v).num_leaves for v in values]

    def make(values):
        arrays, in_tree = jax.tree.flatten(values)
        out_trees = []

        def body(*args):
            outputs = evaluate(ctx, jaxpr, jax.tree.unflatten(in_tree, args))
            out_trees[:] = [jax.tree.structure(v) for v in outputs]
            return jax.tree.leaves(outputs)

        return jax.make_jaxpr(body)(*arrays), out_trees

    values = ctx.dropout.again(values)
    (closed, out_trees), named = ctx.body(jaxpr, values, make)
    out_widths = [tree.num_leaves for tree in out_trees]
    rest = iter(rebind(eqn, closed, jax.tree.leaves(values), in_widths, out_widths))
    return [
        named(jax.tree.unflatten(tree, [next(rest) for _ in range(width)]))
        for tree, width in zip(out_trees, out_widths, strict=True)
    ]


def _signature(v: Any) -> Any:
    """Return the type of a value, which a carry keeps and branches share."""
    leaves, tree = jax.tree.flatten(v)
    return tree, [(x.shape, x.dtype) for x in leaves]


def _stable_carry(
    ctx: Context, eqn, init: list[Any], step: Callable[[list[Any]], list[Any]]
) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """Return a carry, and a step, whose type is the same before and after every step.

    An adapted weight may be carried if a step hands it on as it came; one that changes its form is
    materialized, before the loop or at the end of a step.
    """
    why = f"changes its form while it is carried through {eqn.primitive.name!r}"
    while any(isinstance(v, LoraArray) for v in init):
        with ctx.attempt(keep=False):
            out = jax.eval_shape(step, init)
        keeps = [_signature(v) == _signature(new) for v, new in zip(init, out, strict=True)]
        changed = [isinstance(v, LoraArray) and not k for v, k in zip(init, keeps, strict=True)]
        if not any(changed):
            break
        init = ctx.plain(init, why, changed)

    return init, lambda carry: _as_before(ctx, step(carry), init, why)


def _as_before(ctx: Context, values: list[Any], before: list[Any], why: str) -> list[Any]:
    """Materialize every weight that took the place of a plain array."""
    return ctx.plain(values, why, [not isinstance(old, LoraArray) for old in before])


@rule("while")
def while_loop(ctx: Context, eqn, values):
    """Rebuild condition and body, which close over their constants."""
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    counts = any(isinstance(v, LoraArray) and v.has_keys for v in values)

    def inside(name, consts, carry):
        count, carry = (carry[0], carry[1:]) if counts else (0, carry)
        outputs = run(ctx, eqn.params[name], ctx.dropout.again([*consts, *carry], count))
        return [count + 1, *outputs] if counts else outputs

    init, step = _stable_carry(
        ctx,
        eqn,
        [jnp.zeros((), jnp.int32)] * counts + values[n_cond + n_body :],
        lambda carry: inside("body_jaxpr", body_consts, carry),
    )
    outputs = lax.while_loop(lambda carry: inside("cond_jaxpr", cond_consts, carry)[-1], step, init)
    return outputs[counts:]


class _Leaves(Exception):  # noqa: N818  (not an error: it ends a trace)
    """A branch returns an adapted weight."""


@rule("cond", folds=True)
def cond(ctx: Context, eqn, values):
    """Rebuild every branch over the split weights; their results must have one type."""
    index, *operands = values

    def branches(finish):
        return [
            lambda *args, jaxpr=jaxpr: run(ctx, jaxpr, args, finish)
            for jaxpr in eqn.params["branches"]
        ]

    def plain(outputs):
        if any(isinstance(v, LoraArray) for v in outputs):
            raise _Leaves
        return outputs

    with contextlib.suppress(_Leaves), ctx.attempt():
        return lax.switch(index, branches(plain), *operands)

    with ctx.attempt(keep=False):
        shapes = [jax.eval_shape(f, *operands) for f in branches(lambda outputs: outputs)]
    same = [
        all(_signature(v) == _signature(column[0]) for v in column)
        for column in zip(*shapes, strict=True)
    ]
    why = "leaves the branches of 'cond' in different forms"

    joined = branches(lambda outputs: ctx.plain(outputs, why, [not ok for ok in same]))
    return lax.switch(index, joined, *operands)


@rule("scan")
def scan(ctx: Context, eqn, values):
    """Rebuild the body: stacked weights ride along as xs, closed-over ones as constants."""
    n_consts, n_carry = _jax.scan_counts(eqn)
    consts, carried = values[:n_consts], values[n_consts : n_consts + n_carry]
    is_fixed = _handed_on(eqn, carried, n_consts)
    split = [_split_leading(v) for v in values[n_consts + n_carry :]]
    moving, rebuild = [m for m, _ in split], [f for _, f in split]

    def with_fixed(carry):
        rest = iter(carry)
        return [v if f else next(rest) for v, f in zip(carried, is_fixed, strict=True)]

    counts = any(isinstance(v, LoraArray) and (v.has_keys or v.has_slots) for v in values)
    moving.append(jnp.arange(eqn.params["length"]) if counts else None)

    def body(carry, xs):
        *xs, count = xs
        xs = [f(x, count) for f, x in zip(rebuild, xs, strict=True)]
        inputs = ctx.dropout.again([*consts, *with_fixed(carry), *xs], count)
        with ctx.repeated(eqn.params["length"]):
            outputs = run(ctx, eqn.params["jaxpr"], inputs)
        new = [v for v, f in zip(outputs[:n_carry], is_fixed, strict=True) if not f]
        return new, outputs[n_carry:]

    def step(carry):
        return body(carry, [jax.tree.map(lambda x: x[0], m) for m in moving])[0]

    init = [v for v, f in zip(carried, is_fixed, strict=True) if not f]
    init, _ = _stable_carry(ctx, eqn, init, step)

    def stable_body(carry, xs):
        outputs, ys = body(carry, xs)
        why = "leaves the body of 'scan' in another form than it came"
        new = _as_before(ctx, outputs, carry, why)
        return new, [_unscaled(ctx, v) for v in ys]

    params = {name: eqn.params[name] for name in ("reverse", "unroll")}
    # of a symbolic length, which xs may have and length= may not
    length = None if jax.tree.leaves(moving) else eqn.params["length"]
    carry, ys = lax.scan(stable_body, init, moving, length=length, **params)
    stacked = (
        y.map(y.w, lambda delta: delta.stacked()) if isinstance(y, LoraArray) else y for y in ys
    )
    return [*with_fixed(carry), *stacked]


def _handed_on(eqn, carried: list[Any], n_consts: int) -> list[bool]:
    """Return which weights in a scan's carry every step hands on as they came: constants."""
    inner = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    ends = zip(carried, inner.invars[n_consts:], inner.outvars, strict=False)
    return [isinstance(v, LoraArray) and start is end for v, start, end in ends]


def _unscaled(ctx: Context, v: Any) -> Any:
    """Return an output of a scan's step without a scale of its own, ready to be stacked."""
    if not isinstance(v, LoraArray):
        return v
    if v.unfolded is not None:
        return ctx.materialize(v, "leaves the body of 'scan' with merged axes")
    return v.map(v.w, lambda delta: delta.picked().unscaled())


def _split_leading(v: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """Split a value into what moves along its first axis, and a function that builds a step of it.

    A factor that has the axis moves with it; one that has not is the same in every step. The
    function takes the step's part of what moves, and the step's number.
    """
    if not isinstance(v, LoraArray):
        return v, lambda x, _: x
    ndim = len(v.shape)
    deltas = [delta.padded([0], v.shape) for delta in v.deltas]
    deltas = [delta.leading() for delta in deltas]
    moving = [[x.array for x in delta.parts if 0 in x.labels] for delta in deltas]

    w, remake = v.w, lambda w: w
    if isinstance(w, Lazy):
        w = force(w) if (front := w.front()) is None else front
        remake = (lambda w: w) if front is None else Lazy.of

    def rebuild(moved, count):
        def step(delta: AnyDelta, arrays: list[jax.Array]) -> AnyDelta:
            rest = iter(arrays)
            delta = delta.map(lambda x: Labelled(next(rest), x.labels[1:]) if 0 in x.labels else x)
            return delta.at_step(count).moved({i: i - 1 for i in range(1, ndim)}, ndim - 1)

        w, arrays = moved
        return LoraArray(remake(w), tuple(map(step, deltas, arrays)))

    return (w, moving), rebuild


@rule("shard_map")
def shard_map(ctx: Context, eqn, values):
    """Rebuild the map: a factor is sharded along the axes of the weight that it has."""
    split = [_with_specs(v, spec) for v, spec in zip(values, eqn.params["in_specs"], strict=True)]
    values, specs = [v for v, _ in split], [spec for _, spec in split]

    def body(*args):
        return ctx.plain(run(ctx, eqn.params["jaxpr"], args), "leaves a 'shard_map'")

    return _jax.rebind_shard_map(eqn, body, values, specs)


def _with_specs(v: Any, spec: PartitionSpec) -> tuple[Any, Any]:
    """Return a value, and the specs of it and its factors, given that of the weight."""
    if not isinstance(v, LoraArray):
        return v, spec
    axes = [*spec, *[None] * (len(v.shape) - len(spec))]
    sharded = [i for i, name in enumerate(axes) if name is not None]
    v = v.map(v.w, lambda delta: delta.picked().padded(sharded, v.shape))

    def local(x: Labelled) -> Labelled:  # each device has rows of its own
        is_split = isinstance(x, OneHot) and set(x.labels).intersection(sharded)
        return Labelled(x.array, x.labels) if is_split else x

    v = v.map(v.w, lambda delta: delta.map(local))

    def spec_of(x: Labelled) -> Labelled:
        if isinstance(x, OneHot):
            return x
        names = (None if isinstance(i, Axis) else axes[i] for i in x.labels)
        return Labelled(PartitionSpec(*names), x.labels)

    def specs(delta: AnyDelta) -> AnyDelta:
        replicated = jax.tree.map(lambda _: PartitionSpec(), delta)
        return replicated.map(spec_of)

    w = jax.tree.map(lambda x: spec if x.ndim == len(v.shape) else PartitionSpec(), v.w)
    return v, v.map(w, specs)
