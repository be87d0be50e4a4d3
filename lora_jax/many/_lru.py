"""Names in slots: who is where, who is in use, and who makes way. No arrays."""

import dataclasses
import itertools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from lora_jax._weights.paths import nearest


class Stats(NamedTuple):
    """What a bank has done.

    Attributes:
        hits: how often an adapter that was wanted was in a slot.
        misses: how often it had to be loaded.
        evictions: how often another one made way for it.
        dropped: how many adapters the host's memory had no room for any more.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    dropped: int = 0


@dataclasses.dataclass(eq=False)
class Entry:
    """What has a name: what a slot is to hold; when its last use ended; its slot, if any; users."""

    row: Any
    used: int
    slot: int | None = None
    pins: int = 0


class Lru:
    """Entries by name, some of them in slots; of those not in use, the least recently used goes.

    Args:
        slots: how many there are.
        host: how many entries there may be; None: any number.
        put: called with a row and a slot; what raises there leaves all as it was. ``None`` for a
            row empties the slot.
    """

    def __init__(self, slots: int, host: int | None, put: Callable[[Any, int], None]):
        self.entries: dict[str, Entry] = {}
        self.slots: list[str | None] = [None] * slots
        self.stats = Stats()
        self._host, self._put = host, put
        self._clock = itertools.count()

    def entry(self, name: str, verb: str) -> Entry:
        """The entry of a name; ``verb`` is for the message."""
        if name not in self.entries:
            raise KeyError(
                f"AdapterBank.{verb}: there is no adapter {name!r}: add it. Nearest: "
                f"{nearest(str(name), self.entries)}"
            )
        return self.entries[name]

    def add(self, name: str, row: Any, *, replace: bool) -> None:
        """Give a name a row; where it has one, and a slot, the new one goes there."""
        old = self.entries.get(name)
        if old is None:
            if self._host is not None and len(self.entries) >= self._host:
                idle = [key for key, entry in self.entries.items() if not entry.pins]
                self._forget(min(idle, key=lambda key: self.entries[key].used))
                self._count(dropped=1)
            self.entries[name] = Entry(row, next(self._clock))
            return
        if not replace:
            raise ValueError(
                f"AdapterBank.add: there is an adapter {name!r}: remove it, give another "
                "name, or replace it by add(..., replace=True)"
            )
        self._check_idle(name, "add")
        if old.slot is not None:
            self._put(row, old.slot)
        old.row = row

    def remove(self, name: str) -> None:
        """Forget a name, and empty its slot."""
        self._check_idle(name, "remove")
        self._forget(name)

    def acquire(self, names: Collection[str], verb: str) -> dict[str, int]:
        """The slots of all these names, each of them once in use more; or none of them."""
        wanted = {name: self.entry(name, verb) for name in names}
        missing = [name for name, entry in wanted.items() if entry.slot is None]
        free = {  # since when
            slot: -1 if name is None else self.entries[name].used
            for slot, name in enumerate(self.slots)
            if name is None or not (name in wanted or self.entries[name].pins)
        }
        if len(missing) > len(free):
            others = {name: self.entries[name].pins for name in self.slots if name is not None}
            in_use = ", ".join(f"{name!r} ({pins})" for name, pins in others.items() if pins)
            raise RuntimeError(
                f"AdapterBank.{verb}: {', '.join(map(repr, missing))} would need {len(missing)} "
                f"more of {len(self.slots)} slots, and {len(free)} are free. In use, and how "
                f"often: {in_use or 'none'}. Release some, mix fewer adapters in a batch, or make "
                "a bank of more slots="
            )
        for name, slot in zip(missing, sorted(free, key=free.__getitem__), strict=False):
            self._put(wanted[name].row, slot)
            old, self.slots[slot], wanted[name].slot = self.slots[slot], name, slot
            if old is not None:
                self.entries[old].slot = None
            self._count(misses=1, evictions=int(old is not None))
        for entry in wanted.values():
            entry.pins += 1
        self._count(hits=len(wanted) - len(missing))
        return {name: slot for name, e in wanted.items() if (slot := e.slot) is not None}

    def release(self, *names: str) -> None:
        """Take back one use of each, also of those behind one that is not in use."""
        entries = {name: self.entry(name, "release") for name in names}
        idle = [name for name, entry in entries.items() if not entry.pins]
        for entry in entries.values():
            if entry.pins:
                entry.pins -= 1
                entry.used = next(self._clock)
        if idle:
            raise ValueError(
                f"AdapterBank.release: {idle[0]!r} is not in use: each acquire is released once"
            )

    def _check_idle(self, name: str, verb: str) -> None:
        if pins := self.entry(name, verb).pins:
            raise RuntimeError(
                f"AdapterBank.{verb}: {name!r} is in use, {pins} times: release it first. What "
                "comes meanwhile may use another one, added by another name"
            )

    def _forget(self, name: str) -> None:
        slot = self.entries[name].slot
        if slot is not None:
            self._put(None, slot)
            self.slots[slot] = None
        del self.entries[name]

    def _count(self, **more: int) -> None:
        counts = {key: getattr(self.stats, key) + n for key, n in more.items()}
        self.stats = self.stats._replace(**counts)
