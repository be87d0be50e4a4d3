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
MATERIALIZE = "materialize"  # the primitive of a Use that built the whole weight


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
        eqns: the equation that reads it, inside those it is part of, outermost first.
    """

    owner: int
    path: str
    primitive: str
    contracted: frozenset[int]
    free: frozenset[int]
    eqns: tuple[Any, ...]

    @property
    def source(self) -> str:
        """The line of the user's code: that of the innermost equation which has one."""
        return next(filter(None, map(_jax.source_line, reversed(self.eqns))), "an unknown line")

    def role(self, axis: int) -> str:
        """The letter of the leaf's axis in this use: scanned and matched ones are batch axes."""
        return "i" if axis in self.contracted else "o" if axis in self.free else "b"


@dataclass
class Context:
    """One run of ``lora(fn)``: its policy, and what it has seen of the adapted weights.

    Attributes:
        on_materialize: the policy.
        uses: every use so far.
        eqns: the equations under evaluation, outermost first.
        warned: the materializations that a warning was given for.
    """

    on_materialize: OnMaterialize
    uses: list[Use] = field(default_factory=list)
    eqns: list[Any] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    def use(self, v: LoraArray, contracted: Sequence[int], batch: Sequence[int]) -> None:
        """Record that the present equation reads ``v``, summing over its axes ``contracted``."""
        free = [i for i in range(len(v.shape)) if i not in contracted and i not in batch]
        axes = [frozenset(k for i in group for k in v.origins[i]) for group in (contracted, free)]
        name = self.eqns[-1].primitive.name
        self.uses.append(Use(v.owner, v.path, name, *axes, eqns=tuple(self.eqns)))

    def uses_of(self, owner: int, path: str) -> list[Use]:
        """The recorded uses of one weight."""
        return [use for use in self.uses if (use.owner, use.path) == (owner, path)]

    def materialize(self, v: LoraArray, why: str) -> Any:
        """``W + scale * a b`` itself, if the policy allows it.

        Raises:
            NotImplementedError: it does not.
        """
        use = Use(v.owner, v.path, MATERIALIZE, frozenset(), frozenset(), tuple(self.eqns))
        self.uses.append(use)
        if self.on_materialize != "allow":
            message = (
                f"lora: the weight {v.path!r} {v.w.dtype}{list(v.shape)} {why}"
                f"{f', at {use.source}' if use.eqns else ''}\n"
                "There the whole W + (alpha / rank) A B would have to be built. Either keep it "
                f"out: lorafy(..., exclude={v.path!r}); or allow it, at the cost of its memory: "
                "lora(fn, on_materialize='allow') (or 'warn')."
            )
            if self.on_materialize == "error":
                raise NotImplementedError(message)
            if message not in self.warned:
                warnings.warn(message, stacklevel=2)
            self.warned.add(message)
        return v.dense()

    def materialize_all(self, values: Sequence[Any]) -> list[Any]:
        """The outputs of the present equation, which has no rule, on materialized weights."""
        eqn = self.eqns[-1]
        name = eqn.primitive.name
        why = f"reaches {name!r}, which has no low-rank rule"
        if name.startswith(("custom_jvp", "custom_vjp")):
            why = f"enters a function with a custom derivative ({name!r}), whose rule must be kept"
        plain = [self.materialize(v, why) if isinstance(v, LoraArray) else v for v in values]
        return _jax.bind(eqn, plain)
