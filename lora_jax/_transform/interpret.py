"""The evaluator: a jaxpr on arrays and ``LoraArray``s."""

from collections.abc import Sequence
from typing import Any

from lora_jax import _jax
from lora_jax._transform.context import Context
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.regroup import settle
from lora_jax._transform.rule import RULES


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
        rule = RULES.get(eqn.primitive.name)
        for k in range(len(values)) if rule is None else rule.reads:
            if isinstance(values[k], LoraArray):
                atom = eqn.invars[k]
                if isinstance(env[atom], LoraArray) and env[atom].is_lookup:
                    ctx.eqns.append(eqn)
                    env[atom] = ctx.read(env[atom])  # once, however often it is used
                    ctx.eqns.pop()
                values[k] = env[atom]
        if not any(isinstance(v, LoraArray) for v in values):
            outputs = _jax.bind(eqn, values)
            if eqn.primitive.name == "broadcast_in_dim" and values[0] is not None:
                ctx.broadcasts[eqn.outvars[0]] = values[0], eqn.params
        else:
            values = [read(atom) for atom in eqn.invars]
            ctx.eqns.append(eqn)
            with eqn.ctx.manager:
                outputs = _apply(ctx, rule, eqn, values)
            ctx.eqns.pop()
        env.update(zip(eqn.outvars, outputs, strict=True))
        for atom in eqn.invars:  # run eagerly, what nobody reads again would stay in memory
            if not isinstance(atom, _jax.Literal) and last_use.get(atom) == i:
                env.pop(atom, None)
                ctx.broadcasts.pop(atom, None)
    return [read(atom) for atom in jaxpr.outvars]


def _apply(ctx: Context, rule: Any, eqn: Any, values: list[Any]) -> list[Any]:
    is_folded = any(isinstance(v, LoraArray) and v.unfolded is not None for v in values)
    outputs = NotImplemented
    if is_folded and rule is not None and not rule.folds:
        values = [settle(v) for v in values]
        is_folded = any(isinstance(v, LoraArray) and v.unfolded is not None for v in values)
    if rule is not None and (rule.folds or not is_folded):
        outputs = rule.apply(ctx, eqn, values)
    if outputs is not NotImplemented:
        return outputs
    why = _why(rule, eqn, values)
    plain = [ctx.materialize(v, why) if isinstance(v, LoraArray) else v for v in values]
    return bind(eqn, plain)


def _why(rule: Any, eqn: Any, values: Sequence[Any]) -> str:
    """What an equation that no rule can evaluate wants the whole weight for."""
    name = eqn.primitive.name
    if name.startswith(("custom_jvp", "custom_vjp")):
        return f"enters a function with a custom derivative ({name!r}), whose rule must be kept"
    if any(isinstance(v, LoraArray) and v.unfolded for v in values):
        return f"was reshaped across its input and output axes, and so reaches {name!r}"
    if rule is not None:
        return f"reaches {name!r} in a form that has no low-rank rule"
    return f"reaches {name!r}, which has no low-rank rule"
