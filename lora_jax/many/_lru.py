"""Assign slots to named adapters: which are loaded, which are in use, which is evicted next."""

import dataclasses
import itertools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from lora_jax._weights.paths import nearest


class Stats(NamedTuple):
    """The counts of what a bank has done.

    Attributes:
        hits: how often an acquired adapter was in a slot.
        misses: how often it had to be loaded.
        evictions: how often another one was evicted for it.
        dropped: how many adapters were dropped for lack of room in the host's memory.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    dropped: int = 0


@dataclasses.dataclass(eq=False)
class Entry:
    """A named adapter: its host arrays, last use, slot (None: not loaded), and number of users."""

    member: Any
    used: int
    slot: int | None = None
    pins: int = 0


class Lru:
    """Entries by name, some of them in slots; the least recently used idle one is evicted first.

    Args:
        slots: the number of slots.
        host: the largest number of entries; None: no limit.
        load: ``load(member, slot)`` puts a member into a slot; None for a member empties the slot.
            If it raises, nothing changes.
    """

    def __init__(self, slots: int, host: int | None, load: Callable[[Any, int], None]):
        self.entries: dict[str, Entry] = {}
        self.slots: list[str | None] = [None] * slots
        self.stats = Stats()
        self._host, self._load = host, load
        self._clock = itertools.count()

    def entry(self, name: str, verb: str) -> Entry:
        """Return the entry of a name; ``verb`` is the caller, for the message."""
        if name not in self.entries:
            raise KeyError(
                f"AdapterBank.{verb}: there is no adapter {name!r}: add it. Nearest: "
                f"{nearest(str(name), self.entries)}"
            )
        return self.entries[name]

    def add(self, name: str, member: Any, *, replace: bool) -> None:
        """Add a member by name; with ``replace``, exchange that of this name, in its slot, too."""
        old = self.entries.get(name)
        if old is None:
            if self._host is not None and len(self.entries) >= self._host:
                idle = [key for key, entry in self.entries.items() if not entry.pins]
                self._forget(min(idle, key=lambda key: self.entries[key].used))
                self._count(dropped=1)
            self.entries[name] = Entry(member, next(self._clock))
            return
        if not replace:
            raise ValueError(
                f"AdapterBank.add: there is an adapter {name!r}: remove it, pass another name, or "
                "replace it, add(..., replace=True)"
            )
        self._check_idle(name, "add")
        if old.slot is not None:
            self._load(member, old.slot)
        old.member = member

    def remove(self, name: str) -> None:
        """Remove an entry, and empty its slot."""
        self._check_idle(name, "remove")
        self._forget(name)

    def acquire(self, names: Collection[str], verb: str) -> dict[str, int]:
        """Give every name a slot and one more use, or raise; return the slots by name."""
        wanted = {name: self.entry(name, verb) for name in names}
        missing = [name for name, entry in wanted.items() if entry.slot is None]
        free = {  # the last use by slot
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
                "a bank with more slots="
            )
        for name, slot in zip(missing, sorted(free, key=free.__getitem__), strict=False):
            self._load(wanted[name].member, slot)
            old, self.slots[slot], wanted[name].slot = self.slots[slot], name, slot
            if old is not None:
                self.entries[old].slot = None
            self._count(misses=1, evictions=int(old is not None))
        for entry in wanted.values():
            entry.pins += 1
        self._count(hits=len(wanted) - len(missing))
        return {name: slot for name, e in wanted.items() if (slot := e.slot) is not None}

    def release(self, *names: str) -> None:
        """Undo one use of each name; raise at the end if one of them is not in use."""
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
                f"AdapterBank.{verb}: {name!r} is in use, {pins} times: release it first. Until "
                "then, new requests may use another adapter, added by another name"
            )

    def _forget(self, name: str) -> None:
        slot = self.entries[name].slot
        if slot is not None:
            self._load(None, slot)
            self.slots[slot] = None
        del self.entries[name]

    def _count(self, **more: int) -> None:
        counts = {key: getattr(self.stats, key) + n for key, n in more.items()}
        self.stats = self.stats._replace(**counts)
