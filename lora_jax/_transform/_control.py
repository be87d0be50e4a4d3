"""Control flow: sub-jaxprs are rebuilt around the low-rank paths, not inlined."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _jax
from lora_jax._transform._interpret import evaluate
from lora_jax._transform._rules import Context, rule
from lora_jax._transform._value import Delta, LoraArray


@rule("jit")
def jit(ctx: Context, eqn, values):
    """The same jitted function, under its name, over the split weights."""
    return _rebuild(ctx, eqn, values, eqn.params["jaxpr"], _jax.rebind_jit)


@rule("checkpoint", "remat2", "remat")
def remat(ctx: Context, eqn, values):
    """The same region with the same policy: what it saved before it saves now."""
    return _rebuild(ctx, eqn, values, eqn.params["jaxpr"], _jax.rebind_remat)


def _rebuild(ctx: Context, eqn, values, jaxpr, rebind):
    in_trees = [jax.tree.structure(v) for v in values]
    widths = [tree.num_leaves for tree in in_trees]
    out_trees: list[Any] = []

    def body(*args):
        rest = iter(args)
        inputs = [
            jax.tree.unflatten(t, [next(rest) for _ in range(n)])
            for t, n in zip(in_trees, widths, strict=True)
        ]
        outputs = evaluate(ctx, jaxpr, inputs)
        out_trees[:] = [jax.tree.structure(v) for v in outputs]
        return [jax.tree.leaves(v) for v in outputs]

    rest = iter(rebind(eqn, body, jax.tree.leaves(values), widths))
    return [jax.tree.unflatten(t, [next(rest) for _ in range(t.num_leaves)]) for t in out_trees]


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
        out = jax.eval_shape(step, init)
        keeps = [_signature(v) == _signature(new) for v, new in zip(init, out, strict=True)]
        changed = [isinstance(v, LoraArray) and not k for v, k in zip(init, keeps, strict=True)]
        if not any(changed):
            break
        init = [ctx.materialize(v, why) if c else v for v, c in zip(init, changed, strict=True)]

    def stable(carry):
        return [
            ctx.materialize(v, why)
            if isinstance(v, LoraArray) and not isinstance(old, LoraArray)
            else v
            for v, old in zip(step(carry), init, strict=True)
        ]

    return init, stable


@rule("while")
def while_loop(ctx: Context, eqn, values):
    """Constants are closed over by condition and body."""
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    init, step = _stable_carry(
        ctx,
        eqn,
        values[n_cond + n_body :],
        lambda carry: evaluate(ctx, eqn.params["body_jaxpr"], [*body_consts, *carry]),
    )

    def cond(carry):
        return evaluate(ctx, eqn.params["cond_jaxpr"], [*cond_consts, *carry])[0]

    return lax.while_loop(cond, step, init)


class _Leaves(Exception):  # noqa: N818  (not an error: it ends a trace)
    """A branch returns an adapted weight."""


@rule("cond")
def cond(ctx: Context, eqn, values):
    """Every branch over the split weights; their results must have one type."""
    index, *operands = values
    depth = len(ctx.eqns)

    def branches(finish):
        return [
            lambda *args, jaxpr=jaxpr: finish(evaluate(ctx, jaxpr, args))
            for jaxpr in eqn.params["branches"]
        ]

    def plain(outputs):
        if any(isinstance(v, LoraArray) for v in outputs):
            raise _Leaves
        return outputs

    try:
        return lax.switch(index, branches(plain), *operands)
    except _Leaves:
        del ctx.eqns[depth:]

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
    consts, init = values[:n_consts], values[n_consts : n_consts + n_carry]
    split = [_split_leading(v) for v in values[n_consts + n_carry :]]
    moving, rebuild = [m for m, _ in split], [f for _, f in split]

    def body(carry, xs):
        xs = [f(x) for f, x in zip(rebuild, xs, strict=True)]
        return evaluate(ctx, eqn.params["jaxpr"], [*consts, *carry, *xs])

    def step(carry):
        return body(carry, [jax.tree.map(lambda x: x[0], m) for m in moving])[:n_carry]

    init, _ = _stable_carry(ctx, eqn, init, step)

    def stable_body(carry, xs):
        outputs = body(carry, xs)
        why = "leaves the body of 'scan' in another form than it came"
        outputs = [
            v
            if not isinstance(v, LoraArray) or (i < n_carry and isinstance(carry[i], LoraArray))
            else ctx.materialize(v, why)
            for i, v in enumerate(outputs)
        ]
        return outputs[:n_carry], outputs[n_carry:]

    params = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(stable_body, init, moving, **params)
    return [*carry, *ys]


def _split_leading(v: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What of ``v`` moves along its first axis, and how to put one step of it together.

    A factor that has the axis moves with it; one that has not is the same in every step.
    """
    if not isinstance(v, LoraArray):
        return v, lambda x: x

    def front(x, labels):
        if 0 not in labels:
            return None, labels
        axis = labels.index(0)
        rest = labels[:axis] + labels[axis + 1 :]
        return jnp.moveaxis(x, axis, 0), rest

    split = [(front(d.a, d.a_labels), front(d.b, d.b_labels)) for d in v.deltas]
    moving = (v.w, [(a, b) for (a, _), (b, _) in split])
    shift = {i: i - 1 for i in range(1, len(v.shape))}

    def rebuild(parts):
        w, factors = parts
        deltas = [
            Delta(
                d.a if a is None else a, d.b if b is None else b, d.scale, a_labels, b_labels
            ).relabel(shift)
            for d, (a, b), ((_, a_labels), (_, b_labels)) in zip(
                v.deltas, factors, split, strict=True
            )
        ]
        return dataclasses.replace(v, w=w, deltas=tuple(deltas), origins=v.origins[1:])

    return moving, rebuild
