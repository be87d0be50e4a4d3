"""``evaluate``: run a jaxpr on arrays and ``LoraArray``s."""

from collections.abc import Sequence
from typing import Any

from lora_jax import _jax
from lora_jax._transform.context import Context
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.rule import RULES, Rule


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

    def read(atom):
        return _jax.literal(atom) if isinstance(atom, _jax.Literal) else env[atom]

    last_use = _last_uses(jaxpr)
    for i, eqn in enumerate(jaxpr.eqns):
        rule = RULES.get(eqn.primitive.name)
        _read_lookups(ctx, eqn, range(len(eqn.invars)) if rule is None else rule.reads, env)
        values = [None if isinstance(atom, _jax.Literal) else env[atom] for atom in eqn.invars]
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


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    """Return the last equation that reads each variable, of those that are no outputs."""
    last_use = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last_use.update((atom, i) for atom in eqn.invars if not isinstance(atom, _jax.Literal))
    for atom in jaxpr.outvars:
        if not isinstance(atom, _jax.Literal):
            last_use.pop(atom, None)
    return last_use


def _read_lookups(ctx: Context, eqn: Any, operands: Sequence[int], env: dict[Any, Any]) -> None:
    """Read operands that are rows of a lookup as plain arrays, once for all their uses."""
    for k in operands:
        atom = eqn.invars[k]
        v = None if isinstance(atom, _jax.Literal) else env[atom]
        if isinstance(v, LoraArray) and v.is_lookup:
            ctx.eqns.append(eqn)
            env[atom] = ctx.read(v)
            ctx.eqns.pop()


def _apply(ctx: Context, rule: Rule | None, eqn: Any, values: list[Any]) -> list[Any]:
    """Evaluate an equation by its rule, if it has one for these values, or on built weights."""
    outputs = NotImplemented
    if rule is not None and not rule.folds:
        values = [v.settled() if isinstance(v, LoraArray) else v for v in values]
    if rule is not None and (rule.folds or not any(map(_is_folded, values))):
        outputs = rule.apply(ctx, eqn, values)
    if outputs is not NotImplemented:
        return outputs
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
