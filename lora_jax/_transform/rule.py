"""The rule table: what becomes of a primitive with an adapted weight among its operands."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lora_jax._transform.context import Context
from lora_jax._transform.lora_array import LoraArray


class Rule(NamedTuple):
    """Tell how to evaluate a primitive if a :class:`LoraArray` is among its operands.

    Attributes:
        apply: ``(ctx, eqn, values) -> list of outputs``; or NotImplemented: then the weights are
            materialized.
        reads: ``(eqn, values) -> operands`` that come as plain arrays: rows of a table. Where no
            rule applies, all that a lookup has read do.
        folds: whether operands may have merged axes of different roles (``unfolded``).
    """

    apply: Callable[[Context, Any, list[Any]], Any]
    reads: Callable[[Any, list[Any]], Sequence[int]]
    folds: bool


def looked_up(eqn: Any, values: list[Any]) -> list[int]:
    """Return the operands that a lookup has read."""
    return [k for k, v in enumerate(values) if isinstance(v, LoraArray) and v.is_lookup]


def first_looked_up(eqn: Any, values: list[Any]) -> list[int]:
    """Return the first operand if a lookup has read it."""
    return looked_up(eqn, values[:1])


RULES: dict[str, Rule] = {}


def rule(*primitives: str, reads: Any = lambda eqn, values: (), folds: bool = False):
    """Register a rule for these primitives: see :class:`Rule`."""

    def register(apply):
        RULES.update(dict.fromkeys(primitives, Rule(apply, reads, folds)))
        return apply

    return register
