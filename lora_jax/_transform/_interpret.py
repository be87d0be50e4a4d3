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
        return atom.val if isinstance(atom, _jax.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        values = [read(atom) for atom in eqn.invars]
        if not any(isinstance(v, LoraArray) for v in values):
            outputs = _jax.bind(eqn, values)
        else:
            apply = RULES.get(eqn.primitive.name)
            with eqn.ctx.manager:
                outputs = NotImplemented if apply is None else apply(ctx, eqn, values)
                if outputs is NotImplemented:
                    outputs = ctx.materialize_all(eqn, values)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
