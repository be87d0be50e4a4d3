"""``Use``: one reading of an adapted weight, and the message if the weight is built there."""

import warnings
from dataclasses import dataclass
from traceback import FrameSummary
from typing import Any

from lora_jax import _jax
from lora_jax._transform.origin import Leaf

_WARNED: dict[Any, Any] = {}  # the warnings that Python has shown
MATERIALIZE = "materialize"  # the primitive of a Use that built its weight


@dataclass(frozen=True)
class Use:
    """One reading of an adapted weight.

    Attributes:
        leaf: the weight.
        primitive: the primitive that reads it.
        contracted: the axes of the leaf that are summed over, or looked up.
        free: the axes of the leaf that the result has, and the other operand has not.
        eqns: the equation that reads it, after those it is part of, outermost first.
        why: why the weight was built; empty if it was not.
        form: the dtype and shape of the built weight.
    """

    leaf: Leaf
    primitive: str
    contracted: frozenset[int]
    free: frozenset[int]
    eqns: tuple[Any, ...]
    why: str = ""
    form: str = ""

    @property
    def frame(self) -> FrameSummary | None:
        """The line of the user's code, of the innermost equation that has one."""
        return next(filter(None, map(_jax.source_frame, reversed(self.eqns))), None)

    @property
    def source(self) -> str:
        """That line as text: ``model.py:41 (Mlp.__call__): y = ...``."""
        if (frame := self.frame) is None:
            return "an unknown line"
        text = f": {frame.line}" if frame.line else ""
        return f"{frame.filename}:{frame.lineno} ({frame.name}){text}"

    @property
    def has_roles(self) -> bool:
        """Return whether it shows which axes the weight reads, and which it writes."""
        return bool(self.contracted) and bool(self.free)

    @property
    def reason(self) -> str:
        """Why and where the weight was built."""
        return f"{self.why}, at {self.source}" if self.eqns else self.why

    @property
    def complaint(self) -> str:
        """The message about a weight that was built."""
        path = self.leaf.path
        return (
            f"lora: the weight {path!r} {self.form} {self.reason}\n"
            "There W + (alpha / rank) A B would have to be built. Either keep it "
            f"out: lorafy(..., exclude={path!r}); or allow it, at the cost of its memory: "
            "lora(fn, on_materialize='allow') (or 'warn')."
        )

    def warn(self) -> None:
        """Warn of a built weight, at the user's line."""
        frame = self.frame
        file, line = (frame.filename, frame.lineno) if frame else ("lora(fn)", 0)
        warnings.warn_explicit(self.complaint, UserWarning, file, line or 0, registry=_WARNED)

    def role(self, axis: int) -> str:
        """Return the letter of an axis of the leaf: ``"b"`` if it was scanned or matched."""
        return "i" if axis in self.contracted else "o" if axis in self.free else "b"
