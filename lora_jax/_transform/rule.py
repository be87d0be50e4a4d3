"""The rule table: what becomes of a primitive with an adapted weight among its operands."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lora_jax._transform.context import Context


class Rule(NamedTuple):
    """Tell how to evaluate a primitive if a :class:`LoraArray` is among its operands.

    Attributes:
        apply: ``(ctx, eqn, values) -> list of outputs``; or NotImplemented: then the weights are
            materialized.
        reads: the operands that come as plain arrays if they are rows of a lookup.
        folds: whether operands may have merged axes of different roles (``unfolded``).
    """

    apply: Callable[[Context, Any, list[Any]], Any]
    reads: tuple[int, ...]
    folds: bool


RULES: dict[str, Rule] = {}


def rule(*primitives: str, reads: tuple[int, ...] = (), folds: bool = False):
    """Register a rule for these primitives: see :class:`Rule`."""

    def register(apply):
        RULES.update(dict.fromkeys(primitives, Rule(apply, reads, folds)))
        return apply

    return register
