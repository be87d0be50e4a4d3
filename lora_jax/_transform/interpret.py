"""``evaluate``: run a jaxpr on arrays and ``LoraArray``s."""

from collections.abc import Sequence
from typing import Any

from lora_jax import _jax
from lora_jax._transform.context import Context
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.rule import RULES, Rule, looked_up


def evaluate(ctx: Context, jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """Compute the outputs of a jaxpr whose inputs may be adapted weights.

    JAX evaluates an equation without adapted weights; a rule evaluates one that has them; without
    a rule they are materialized.

    Args:
        ctx: the run.
        jaxpr: closed, or open without constants.
        args: one value per input: an array or a :class:`LoraArray`.
    """
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    env: dict[Any, Any] = {}
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    last_use = _last_uses(jaxpr)
    for i, eqn in enumerate(jaxpr.eqns):
        values = [None if isinstance(atom, _jax.Literal) else env[atom] for atom in eqn.invars]
        if any(isinstance(v, LoraArray) for v in values):
            ctx.eqns.append(eqn)
            with eqn.ctx.manager:
                outputs = _apply(ctx, eqn, env)
            ctx.eqns.pop()
        else:
            outputs = _jax.bind(eqn, values)
            if eqn.primitive.name == "broadcast_in_dim" and values[0] is not None:
                ctx.broadcasts[eqn.outvars[0]] = values[0], eqn.params
        env.update(zip(eqn.outvars, outputs, strict=True))
        for atom in eqn.invars:  # run eagerly, what nobody reads again would stay in memory
            if not isinstance(atom, _jax.Literal) and last_use.get(atom) == i:
                env.pop(atom, None)
                ctx.broadcasts.pop(atom, None)
    return _values(jaxpr.outvars, env)


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    """Return the last equation that reads each variable, of those that are no outputs."""
    last_use = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last_use.update((atom, i) for atom in eqn.invars if not isinstance(atom, _jax.Literal))
    for atom in jaxpr.outvars:
        if not isinstance(atom, _jax.Literal):
            last_use.pop(atom, None)
    return last_use


def _values(atoms: Sequence[Any], env: dict[Any, Any]) -> list[Any]:
    return [_jax.literal(x) if isinstance(x, _jax.Literal) else env[x] for x in atoms]


def _apply(ctx: Context, eqn: Any, env: dict[Any, Any]) -> list[Any]:
    """Evaluate an equation by its rule, if it has one for these values, or on built weights.

    Rows of a table become plain arrays once, for all equations that read them.
    """

    def read(operands: Sequence[int]) -> None:
        for k in operands:
            env[eqn.invars[k]] = ctx.read(env[eqn.invars[k]])

    def settled() -> list[Any]:
        values = _values(eqn.invars, env)
        if rule is None or rule.folds:
            return values
        return [v.settled() if isinstance(v, LoraArray) else v for v in values]

    rule = RULES.get(eqn.primitive.name)
    if rule is not None:
        read(rule.reads(eqn, settled()))
        values = settled()
        if not any(isinstance(v, LoraArray) for v in values):
            return _jax.bind(eqn, values)
        if rule.folds or not any(map(_is_folded, values)):
            outputs = rule.apply(ctx, eqn, values)
            if outputs is not NotImplemented:
                return outputs
    read(looked_up(eqn, _values(eqn.invars, env)))
    values = _values(eqn.invars, env)
    return bind(eqn, ctx.plain(values, _why(rule, eqn, values)))


def _is_folded(v: Any) -> bool:
    """Return whether axes of different roles are merged."""
    return isinstance(v, LoraArray) and v.unfolded is not None


def _why(rule: Rule | None, eqn: Any, values: Sequence[Any]) -> str:
    """Return why an equation that no rule can evaluate needs the built weight."""
    name = eqn.primitive.name
    if name.startswith(("custom_jvp", "custom_vjp")):
        return f"enters a function with a custom derivative ({name!r}), whose rule must be kept"
    if any(map(_is_folded, values)):
        return f"was reshaped across its input and output axes, and so reaches {name!r}"
    if rule is not None:
        return f"reaches {name!r} in a form that has no low-rank rule"
    return f"reaches {name!r}, which has no low-rank rule"
