"""The rule table, and what happens where it has no rule: a reported materialization."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_jax import _jax
from lora_jax._transform._value import LoraArray

OnMaterialize = Literal["error", "warn", "allow"]
Rule = Callable[["Context", Any, list[Any]], Any]
RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Register a rule: ``(ctx, eqn, values) -> list of outputs``.

    It runs where a :class:`LoraArray` is among the values. It may return NotImplemented: the
    weights are then materialized.
    """

    def register(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, f))
        return f

    return register


@dataclass(frozen=True)
class Use:
    """One reading of an adapted weight.

    Attributes:
        owner: which of the LoraParams among the arguments.
        path: of the weight.
        primitive: that reads it.
        contracted: the axes of the weight's leaf that are summed over.
        free: the axes of the leaf that the result has, and the other operand has not.
        source: the line of the user's code.
    """

    owner: int
    path: str
    primitive: str
    contracted: frozenset[int]
    free: frozenset[int]
    source: str

    def role(self, axis: int) -> str:
        """The letter of the leaf's axis in this use: scanned and matched ones are batch axes."""
        return "i" if axis in self.contracted else "o" if axis in self.free else "b"


@dataclass
class Context:
    """One run of ``lora(fn)``: its policy, and what it has seen of the adapted weights."""

    on_materialize: OnMaterialize
    uses: list[Use] = field(default_factory=list)
    materialized: set[str] = field(default_factory=set)

    def use(self, eqn, v: LoraArray, contracted: Sequence[int], batch: Sequence[int]) -> None:
        """Record that ``eqn`` reads ``v``, summing over its axes ``contracted``."""
        free = [i for i in range(len(v.shape)) if i not in contracted and i not in batch]
        axes = [frozenset(k for i in group for k in v.origins[i]) for group in (contracted, free)]
        source = _jax.source_line(eqn)
        self.uses.append(Use(v.owner, v.path, eqn.primitive.name, *axes, source=source))

    def uses_of(self, owner: int, path: str) -> list[Use]:
        """The recorded uses of one weight."""
        return [use for use in self.uses if (use.owner, use.path) == (owner, path)]

    def materialize(self, v: LoraArray, why: str, source: str) -> Any:
        """``W + scale * a b`` itself, if the policy allows it.

        Raises:
            NotImplementedError: it does not.
        """
        message = (
            f"lora: the weight {v.path!r} {v.w.dtype}{list(v.shape)} {why}, at {source}\n"
            "There the whole W + (alpha / rank) A B would have to be built. Either keep it out: "
            f"lorafy(..., exclude={v.path!r}); or allow it, at the cost of its memory: "
            "lora(fn, on_materialize='allow') (or 'warn')."
        )
        if self.on_materialize == "error":
            raise NotImplementedError(message)
        if self.on_materialize == "warn" and message not in self.materialized:
            warnings.warn(message, stacklevel=2)
        self.materialized.add(message)
        self.uses.append(Use(v.owner, v.path, "materialize", frozenset(), frozenset(), source))
        return v.dense()

    def materialize_all(self, eqn, values: Sequence[Any]) -> list[Any]:
        """The outputs of an equation that has no rule, on materialized weights."""
        name = eqn.primitive.name
        why = f"reaches {name!r}, which has no low-rank rule"
        if name.startswith(("custom_jvp", "custom_vjp")):
            why = f"enters a function with a custom derivative ({name!r}), whose rule must be kept"
        source = _jax.source_line(eqn)
        plain = [
            self.materialize(v, why, source) if isinstance(v, LoraArray) else v for v in values
        ]
        return _jax.bind(eqn, plain)
