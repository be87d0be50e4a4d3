"""The evaluator: a jaxpr on arrays and ``LoraArray``s."""

from collections.abc import Sequence
from typing import Any

from lora_jax import _jax
from lora_jax._transform._rules import RULES, Context
from lora_jax._transform._value import LoraArray


def evaluate(ctx: Context, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr whose inputs may be adapted weights.

    An equation that none enters is JAX's to evaluate; one that has a rule is evaluated by it;
    any other is a materialization.

    Args:
        ctx: the run.
        jaxpr: closed, or open without constants.
        args: one value an input: an array or a :class:`LoraArray`.
    """
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    env: dict[Any, Any] = {}
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        return _jax.literal(atom) if isinstance(atom, _jax.Literal) else env[atom]

    last_use = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last_use.update((atom, i) for atom in eqn.invars if not isinstance(atom, _jax.Literal))
    for atom in jaxpr.outvars:
        if not isinstance(atom, _jax.Literal):
            last_use.pop(atom, None)

    for i, eqn in enumerate(jaxpr.eqns):
        values = [None if isinstance(atom, _jax.Literal) else env[atom] for atom in eqn.invars]
        if not any(isinstance(v, LoraArray) for v in values):
            outputs = _jax.bind(eqn, values)
        else:
            apply = RULES.get(eqn.primitive.name)
            values = [read(atom) for atom in eqn.invars]
            ctx.eqns.append(eqn)
            with eqn.ctx.manager:
                outputs = NotImplemented if apply is None else apply(ctx, eqn, values)
                if outputs is NotImplemented:
                    outputs = ctx.materialize_all(values)
            ctx.eqns.pop()
        env.update(zip(eqn.outvars, outputs, strict=True))
        for atom in eqn.invars:  # run eagerly, what nobody reads again would stay in memory
            if not isinstance(atom, _jax.Literal) and last_use.get(atom) == i:
                env.pop(atom, None)
    return [read(atom) for atom in jaxpr.outvars]
