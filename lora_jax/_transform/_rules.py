"""The rule table, and what happens where it has no rule: a reported materialization."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax

from lora_jax import _jax
from lora_jax._transform._value import Delta, Leaf, LoraArray

OnMaterialize = Literal["error", "warn", "allow"]


class Rule(NamedTuple):
    """How a primitive is evaluated where a :class:`LoraArray` is among its operands.

    Attributes:
        apply: ``(ctx, eqn, values) -> list of outputs``; or NotImplemented: the weights are then
            materialized.
        reads: whether operands that are rows of a lookup come as plain arrays.
        folds: whether operands come with axes of different roles merged.
    """

    apply: Callable[["Context", Any, list[Any]], Any]
    reads: bool
    folds: bool


RULES: dict[str, Rule] = {}
MATERIALIZE = "materialize"  # the primitive of a Use that built the whole weight


def rule(*primitives: str, reads: bool = False, folds: bool = False):
    """Register a rule for these primitives: see :class:`Rule`."""

    def register(apply):
        RULES.update(dict.fromkeys(primitives, Rule(apply, reads, folds)))
        return apply

    return register


@dataclass(frozen=True)
class Use:
    """One reading of an adapted weight.

    Attributes:
        leaf: the weight.
        primitive: that reads it.
        contracted: the axes of the weight's leaf that are summed over, or looked up.
        free: the axes of the leaf that the result has, and the other operand has not.
        eqns: the equation that reads it, inside those it is part of, outermost first.
        why: of a materialization, what for.
    """

    leaf: Leaf
    primitive: str
    contracted: frozenset[int]
    free: frozenset[int]
    eqns: tuple[Any, ...]
    why: str = ""

    @property
    def source(self) -> str:
        """The line of the user's code: that of the innermost equation which has one."""
        return next(filter(None, map(_jax.source_line, reversed(self.eqns))), "an unknown line")

    @property
    def tells(self) -> bool:
        """Whether it tells what the weight reads and what it writes."""
        return bool(self.contracted) and bool(self.free)

    def role(self, axis: int) -> str:
        """The letter of the leaf's axis in this use: scanned and matched ones are batch axes."""
        return "i" if axis in self.contracted else "o" if axis in self.free else "b"


@dataclass(frozen=True)
class Complaint:
    """A weight that would have to be built.

    Attributes:
        paths: of the weights it is made of, quoted.
        excluded: the same, for ``exclude=``.
        form: its dtype and shape there.
        why: what for.
        source: where.
    """

    paths: str
    excluded: tuple[str, ...]
    form: str
    why: str
    source: str

    def __str__(self) -> str:
        exclude = self.excluded[0] if len(self.excluded) == 1 else list(self.excluded)
        return (
            f"lora: the weight {self.paths} {self.form} {self.why}{self.source}\n"
            "There the whole W + (alpha / rank) A B would have to be built. Either keep it "
            f"out: lorafy(..., exclude={exclude!r}); or allow it, at the cost of its memory: "
            "lora(fn, on_materialize='allow') (or 'warn')."
        )


@dataclass
class Context:
    """One run of ``lora(fn)``: its policy, and what it has seen of the adapted weights.

    Attributes:
        on_materialize: the policy.
        uses: every use so far.
        flops: what the low-rank paths cost, in floating-point operations, by weight.
        eqns: the equations under evaluation, outermost first.
        times: how often the present equation is evaluated in a call, as far as that is known.
        complaints: the materializations so far.
        broadcasts: plain arrays made by a broadcast, by variable: with an axis of size 1 wherever
            they are constant.
        entered: the bodies whose uses are recorded.
    """

    on_materialize: OnMaterialize
    uses: list[Use] = field(default_factory=list)
    flops: dict[Leaf, int] = field(default_factory=dict)
    eqns: list[Any] = field(default_factory=list)
    times: int = 1
    complaints: list[Complaint] = field(default_factory=list)
    broadcasts: dict[Any, Any] = field(default_factory=dict)
    entered: set[Any] = field(default_factory=set)

    def use(self, v: LoraArray, contracted: Sequence[int], batch: Sequence[int]) -> None:
        """Record that the present equation reads ``v``, summing over its axes ``contracted``."""
        free = [i for i in range(len(v.shape)) if i not in contracted and i not in batch]
        for delta in v.deltas:
            groups = (contracted, free)
            axes = [frozenset(k for i in group for k in delta.origins[i]) for group in groups]
            self._record(delta, self.eqns[-1].primitive.name, axes[0], axes[1])

    def _record(
        self,
        delta: Delta,
        primitive: str,
        contracted: frozenset[int],
        free: frozenset[int],
        why: str = "",
    ) -> None:
        use = Use(delta.leaf, primitive, contracted, free, tuple(self.eqns), why)
        last = self.uses[-1] if self.uses else None
        if last and last.leaf == use.leaf and last.eqns[-1:] == use.eqns[-1:]:
            if (last.contracted, last.free) == (contracted, free):
                return  # another range of the same weight
        self.uses.append(use)

    def spend(self, delta: Delta, multiplications: int) -> None:
        """Record what a low-rank path costs."""
        cost = 2 * multiplications * self.times
        self.flops[delta.leaf] = self.flops.get(delta.leaf, 0) + cost

    def scope(self) -> Any:
        """A name for low-rank paths, inside the user's, for profiles and HLO dumps."""
        return jax.named_scope(f"{_jax.name_stack(self.eqns[-1])}/lora".lstrip("/"))

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """The body of a loop."""
        before = self.times
        self.times = before * times
        try:
            yield
        finally:
            self.times = before

    @contextlib.contextmanager
    def once(self, key: Any) -> Iterator[None]:
        """A block whose records are kept if it is the first of this key."""
        uses, flops = len(self.uses), dict(self.flops)
        is_new = key not in self.entered
        self.entered.add(key)
        try:
            yield
        finally:
            if not is_new:
                del self.uses[uses:]
                self.flops = flops

    @contextlib.contextmanager
    def attempt(self, keep: bool = True) -> Iterator[None]:
        """A block whose records are kept if it is left normally, and if ``keep``."""
        before = len(self.uses), dict(self.flops), set(self.entered), len(self.complaints)
        done, depth = False, len(self.eqns)
        try:
            yield
            done = True
        finally:
            if not (done and keep):
                del self.uses[before[0] :], self.complaints[before[3] :], self.eqns[depth:]
                self.flops, self.entered = before[1:3]

    def uses_of(self, leaf: Leaf) -> list[Use]:
        """The recorded uses of one weight."""
        return [use for use in self.uses if use.leaf == leaf]

    def unbroadcast(self, atom: Any, x: Any) -> Any:
        """An operand of the present equation, with an axis of size 1 where it is constant."""
        return x if isinstance(atom, _jax.Literal) else self.broadcasts.get(atom, x)

    def read(self, v: LoraArray) -> Any:
        """A weight that is read already, as a plain array."""
        for delta in v.deltas:
            axes = {k for group in delta.origins for k in group}
            written = {
                k for lab in {*delta.b_labels} - {*delta.a_labels} for k in delta.origins[lab]
            }
            read = (delta.read | delta.summed) - delta.batch - written
            name = "gather" if delta.read else "reduce_sum"
            self._record(delta, name, read, frozenset(axes - read))
            if not delta.is_probe:
                self.spend(delta, v.w.size * delta.b.shape[delta.b_labels.index(-1)])
        return v.dense()

    def materialize(self, v: LoraArray, why: str) -> Any:
        """``W + scale * a b`` itself, if the policy allows it; always, once ``v`` is read.

        Raises:
            NotImplementedError: it does not.
        """
        if v.is_read:
            return self.read(v)
        for delta in v.deltas:
            self._record(delta, MATERIALIZE, frozenset(), frozenset(), why)
        paths = tuple(leaf.path for leaf in v.leaves)
        source = f", at {self.uses[-1].source}" if self.eqns else ""
        form = f"{v.w.dtype}{list(v.shape)}"
        complaint = Complaint(" + ".join(map(repr, paths)), paths, form, why, source)
        if complaint not in self.complaints:
            self.complaints.append(complaint)
            if self.on_materialize == "error":
                raise NotImplementedError(str(complaint))
            if self.on_materialize == "warn":
                warnings.warn(str(complaint), stacklevel=2)
        return v.dense()

    def materialize_all(self, values: Sequence[Any]) -> list[Any]:
        """The outputs of the present equation, which has no rule, on materialized weights."""
        eqn = self.eqns[-1]
        name = eqn.primitive.name
        why = f"reaches {name!r}, which has no low-rank rule"
        if name.startswith(("custom_jvp", "custom_vjp")):
            why = f"enters a function with a custom derivative ({name!r}), whose rule must be kept"
        elif any(isinstance(v, LoraArray) and v.unfolded for v in values):
            why = f"was reshaped across its input and output axes, and so reaches {name!r}"
        elif name in RULES:
            why = f"reaches {name!r} in a form that has no low-rank rule"
        plain = [self.materialize(v, why) if isinstance(v, LoraArray) else v for v in values]
        return _jax.bind(eqn, plain)
