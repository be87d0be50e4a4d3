"""``Record``: the uses of adapted weights that a run has seen, and the costs of their updates."""

from dataclasses import dataclass, field
from typing import Any

from lora_jax._transform.origin import Leaf
from lora_jax._transform.use import Use

Snapshot = tuple[int, dict[Leaf, int], set[Any]]


@dataclass
class Record:
    """Collect what a run has seen.

    Attributes:
        uses: every use so far.
        flops: the floating-point operations of the low-rank paths, by weight.
        entered: the bodies whose uses are recorded: JAX may trace a body several times.
    """

    uses: list[Use] = field(default_factory=list)
    flops: dict[Leaf, int] = field(default_factory=dict)
    entered: set[Any] = field(default_factory=set)

    def add(self, use: Use) -> None:
        """Record a use, unless the last one is of the same weight in the same place."""
        last = self.uses[-1] if self.uses else None
        if last and last.leaf == use.leaf and last.eqns[-1:] == use.eqns[-1:]:
            if (last.contracted, last.free) == (use.contracted, use.free):
                return  # another range of the same weight
        self.uses.append(use)

    def spend(self, leaf: Leaf, flops: int) -> None:
        """Record a cost."""
        self.flops[leaf] = self.flops.get(leaf, 0) + flops

    def snapshot(self) -> Snapshot:
        """Return the present state, for :meth:`rollback`."""
        return len(self.uses), dict(self.flops), set(self.entered)

    def rollback(self, snapshot: Snapshot) -> None:
        """Forget what was recorded since the snapshot."""
        count, self.flops, self.entered = snapshot
        del self.uses[count:]

    def uses_of(self, leaf: Leaf) -> list[Use]:
        """Return the uses of one weight."""
        return [use for use in self.uses if use.leaf == leaf]

    @property
    def materialized(self) -> list[Use]:
        """The uses that had to build their weight: each reason once."""
        return list({(use.leaf, use.reason): use for use in self.uses if use.why}.values())
