"""Control flow: sub-jaxprs are rebuilt around the low-rank paths, not inlined."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lora_jax import _jax
from lora_jax._transform.context import Context
from lora_jax._transform.delta import Delta
from lora_jax._transform.interpret import evaluate
from lora_jax._transform.lazy import Lazy, force
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.rule import rule


def run(ctx: Context, jaxpr: Any, args: Any, finish: Any = lambda outputs: outputs) -> Any:
    """Evaluate a body: JAX may trace it several times, and what it does is recorded once."""
    with ctx.once((*map(id, ctx.eqns), id(jaxpr))):
        return finish(evaluate(ctx, jaxpr, args))


@rule("jit", folds=True)
def jit(ctx: Context, eqn, values):
    """The same jitted function, under its name, over the split weights."""
    return _rebuild(ctx, eqn, values, eqn.params["jaxpr"], _jax.rebind_jit)


@rule("checkpoint", "remat2", "remat", folds=True)
def remat(ctx: Context, eqn, values):
    """The same region with the same policy: what it saved before it saves now."""
    return _rebuild(ctx, eqn, values, eqn.params["jaxpr"], _jax.rebind_remat)


def _rebuild(ctx: Context, eqn, values, jaxpr, rebind):
    in_widths = [jax.tree.structure(v).num_leaves for v in values]

    def make(values):
        arrays, in_tree = jax.tree.flatten(values)
        out_trees = []

        def body(*args):
            outputs = evaluate(ctx, jaxpr, jax.tree.unflatten(in_tree, args))
            out_trees[:] = [jax.tree.structure(v) for v in outputs]
            return jax.tree.leaves(outputs)

        return jax.make_jaxpr(body)(*arrays), out_trees

    values = ctx.again(values)
    (closed, out_trees), named = ctx.body(jaxpr, values, make)
    out_widths = [tree.num_leaves for tree in out_trees]
    rest = iter(rebind(eqn, closed, jax.tree.leaves(values), in_widths, out_widths))
    return [
        named(jax.tree.unflatten(tree, [next(rest) for _ in range(width)]))
        for tree, width in zip(out_trees, out_widths, strict=True)
    ]


def _signature(v: Any) -> Any:
    leaves, tree = jax.tree.flatten(v)
    return tree, [(x.shape, x.dtype) for x in leaves]


def _stable_carry(
    ctx: Context, eqn, init: list[Any], step: Callable[[list[Any]], list[Any]]
) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """A carry whose type is the same before and after every step.

    An adapted weight may be carried where a step hands it on as it came; one that changes its
    form is materialized, before the loop or at the end of a step.
    """
    why = f"changes its form while it is carried through {eqn.primitive.name!r}"
    while any(isinstance(v, LoraArray) for v in init):
        with ctx.attempt(keep=False):
            out = jax.eval_shape(step, init)
        keeps = [_signature(v) == _signature(new) for v, new in zip(init, out, strict=True)]
        changed = [isinstance(v, LoraArray) and not k for v, k in zip(init, keeps, strict=True)]
        if not any(changed):
            break
        init = [ctx.materialize(v, why) if c else v for v, c in zip(init, changed, strict=True)]

    return init, lambda carry: _as_before(ctx, step(carry), init, why)


def _as_before(ctx: Context, values: list[Any], before: list[Any], why: str) -> list[Any]:
    """Values with every weight materialized that took the place of a plain array."""
    return [
        ctx.materialize(v, why)
        if isinstance(v, LoraArray) and not isinstance(old, LoraArray)
        else v
        for v, old in zip(values, before, strict=True)
    ]


@rule("while")
def while_loop(ctx: Context, eqn, values):
    """Constants are closed over by condition and body."""
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    counts = any(isinstance(v, LoraArray) and v.has_keys for v in values)

    def inside(name, consts, carry):
        count, carry = (carry[0], carry[1:]) if counts else (0, carry)
        outputs = run(ctx, eqn.params[name], ctx.again([*consts, *carry], count))
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
    """Every branch over the split weights; their results must have one type."""
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

    def joined(outputs):
        return [
            v if ok or not isinstance(v, LoraArray) else ctx.materialize(v, why)
            for v, ok in zip(outputs, same, strict=True)
        ]

    return lax.switch(index, branches(joined), *operands)


@rule("scan")
def scan(ctx: Context, eqn, values):
    """Stacked weights ride along as xs, closed-over ones as constants."""
    n_consts, n_carry = _jax.scan_counts(eqn)
    consts, carried = values[:n_consts], values[n_consts : n_consts + n_carry]
    inner = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    ends = inner.invars[n_consts:], inner.outvars[:n_carry]
    # A weight that every step hands on as it came is a constant.
    is_fixed = [
        isinstance(v, LoraArray) and i is o for v, i, o in zip(carried, *ends, strict=False)
    ]
    split = [_split_leading(v) for v in values[n_consts + n_carry :]]
    moving, rebuild = [m for m, _ in split], [f for _, f in split]

    def whole(carry):
        rest = iter(carry)
        return [v if f else next(rest) for v, f in zip(carried, is_fixed, strict=True)]

    counts = any(isinstance(v, LoraArray) and (v.has_keys or v.has_slots) for v in values)
    moving.append(jnp.arange(eqn.params["length"]) if counts else None)

    def body(carry, xs):
        *xs, count = xs
        xs = [f(x, count) for f, x in zip(rebuild, xs, strict=True)]
        inputs = ctx.again([*consts, *whole(carry), *xs], count)
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
        stacks = [_stack(ctx, v) for v in ys]
        together[:] = [f for _, f in stacks]
        return new, [x for x, _ in stacks]

    together: list[Any] = []
    params = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(stable_body, init, moving, **params)
    return [*whole(carry), *(f(y) for f, y in zip(together, ys, strict=True))]


def _stack(ctx: Context, v: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What a step of a scan puts out for ``v``, and how to put the stack of it together."""
    if isinstance(v, LoraArray) and v.unfolded is not None:
        v = ctx.materialize(v, "leaves the body of 'scan' with merged axes")
    if not isinstance(v, LoraArray):
        return v, lambda x: x
    # a step has a scale of its own, perhaps; it goes into b
    deltas = [
        d if d.is_probe else dataclasses.replace(d, b=d.b * d.scale.astype(d.b.dtype), scale=None)
        for d in (delta.picked() for delta in v.deltas)
    ]
    ndim = len(v.shape)

    def together(stacked):
        deltas = []
        for delta in stacked.deltas:
            delta = delta.move({i: i + 1 for i in range(ndim)}, ndim + 1)
            if not delta.is_probe:
                delta = delta.map(lambda x, labels: (x, (0, *labels)))
                key = None if delta.key is None else delta.key[0]
                delta = dataclasses.replace(delta, scale=jnp.ones((), jnp.float32), key=key)
            deltas.append(delta)
        return LoraArray(stacked.w, tuple(deltas))

    return LoraArray(v.w, tuple(deltas)), together


def _split_leading(v: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """What of ``v`` moves along its first axis, and how to put a step of it together, by number.

    A factor that has the axis moves with it; one that has not is the same in every step.
    """
    if not isinstance(v, LoraArray):
        return v, lambda x, _: x

    def front(x, labels):
        axis = labels.index(0)
        return jnp.moveaxis(x, axis, 0), (0, *labels[:axis], *labels[axis + 1 :])

    deltas = [delta.whole([0], v.shape) for delta in v.deltas]
    deltas = [
        delta.stepping()
        if delta.slot is not None
        else delta.map(lambda x, labels: front(x, labels) if 0 in labels else (x, labels))
        for delta in deltas
    ]
    moving = [{name: d.part(name)[0] for name in d.parts if 0 in d.part(name)[1]} for d in deltas]

    w, remake = v.w, lambda w: w
    if isinstance(w, Lazy):
        w = force(w) if (front := w.front()) is None else front
        remake = (lambda w: w) if front is None else Lazy.of

    def rebuild(parts, count):
        w, steps = parts

        def step(delta, moved):
            if delta.slot is not None:
                moved = {"step": count}
            delta = dataclasses.replace(delta, **moved)
            delta = delta.map(lambda x, labels: (x, tuple(lab for lab in labels if lab != 0)))
            return delta.move({i: i - 1 for i in range(1, len(v.shape))}, len(v.shape) - 1)

        return LoraArray(remake(w), tuple(map(step, deltas, steps)))

    return (w, moving), rebuild


@rule("shard_map")
def shard_map(ctx: Context, eqn, values):
    """The same map: a factor is spread over devices along the axes of the weight that it has."""
    split = [_spread(v, spec) for v, spec in zip(values, eqn.params["in_specs"], strict=True)]
    values, specs = [v for v, _ in split], [spec for _, spec in split]

    def body(*args):
        outputs = run(ctx, eqn.params["jaxpr"], args)
        return [
            ctx.materialize(v, "leaves a 'shard_map'") if isinstance(v, LoraArray) else v
            for v in outputs
        ]

    return _jax.rebind_shard_map(eqn, body, values, specs)


def _spread(v: Any, spec: PartitionSpec) -> tuple[Any, Any]:
    """A value, and how it and its factors are spread, given how the weight is."""
    if not isinstance(v, LoraArray):
        return v, spec
    axes = [*spec, *[None] * (len(v.shape) - len(spec))]
    spread = [i for i, name in enumerate(axes) if name is not None]
    v = v.map(v.w, lambda delta: delta.picked().whole(spread, v.shape))

    def specs(delta: Delta) -> Delta:
        if delta.is_probe:
            return delta
        new = {
            name: PartitionSpec(*(None if i < 0 else axes[i] for i in delta.part(name)[1]))
            for name in delta.parts
        }
        key = None if delta.key is None else PartitionSpec()
        return dataclasses.replace(delta, **new, scale=PartitionSpec(), key=key)

    w = jax.tree.map(lambda x: spec if x.ndim == len(v.shape) else PartitionSpec(), v.w)
    return v, v.map(w, specs)
