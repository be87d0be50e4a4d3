"""The tensors of a model's files that are one in the model: a head that is the table as well."""

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace

import numpy as np

from lora_jax.io._tensor import Tensor
from lora_jax.io._torch import TABLE as TABLE_MODULE
from lora_jax.io.hf._families import FLAG, Known, flag_of, ties_family
from lora_jax.io.hf._source import Source
from lora_jax.io.peft._config import HEADED

# Heads and tables by their names, in models that are not known.
HEAD = r"(.*\.)?(lm_head|embed_out|output|output_projection|decoder|vocab_projector)\.weight"
TABLE = rf"{TABLE_MODULE.pattern}\.weight"


@dataclass(frozen=True)
class Ties:
    """Hold the tied tensors of a model: what its configuration, its class and its files tell.

    Attributes:
        groups: the names of each tensor that has several, the table's first.
        stored: the names that are in the files.
        always: the names that share their numbers whatever the configuration sets.
        why: why the names cannot get numbers of their own; None if they can.
        prefix: the prefix that names in the files lack, and need beside a head.
        is_set: whether the configuration ties a head.
        known: whether the configuration tells which tensors are tied.
    """

    groups: tuple[tuple[str, ...], ...] = ()
    stored: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()
    why: str | None = None
    prefix: str = ""
    is_set: bool = True
    known: bool = True

    @classmethod
    def of(cls, source: Source, flag: bool | None = None) -> "Ties":
        """Find the ties of a model, as its configuration sets them, or a ``flag`` in its place."""
        stored = frozenset(source.tensors)
        kinds = (source.config or {}).get("architectures") or []
        has_head = not kinds or any(HEADED.fullmatch(str(kind)) for kind in kinds)
        if (known := _known(source)) is None:
            flag = flag_of(source.config) if flag is None else flag
            groups = () if flag is False else tuple(_alike(source.tensors))
            return cls(groups, stored, known=flag is False or bool(groups) or not has_head)
        family, is_tied = known.family, known.is_tied if flag is None else flag
        heads, tied = (family.tied_head or {}) if is_tied else {}, family.tied or {}
        prefix = family.prefix
        is_bare = bool(prefix) and not any(f".{prefix}" in f".{name}" for name in stored)
        by_root: dict[str, list[str]] = {}
        for name, other in {**heads, **tied}.items():
            if has_head or name.startswith(prefix) or name in tied:
                by_root.setdefault(other, []).append(name)
        groups, always = [], set()
        for root, names in by_root.items():
            own = [name.removeprefix(prefix) if is_bare else name for name in [root, *names]]
            own = _in_files(own, stored)
            always |= {x for x in own if any(f".{x}".endswith(f".{name}") for name in tied)}
            if len(own) > 1:
                groups.append(tuple(own))
        why = None if family.parts else "its model scales what a tied head reads, and no other"
        prefix = prefix if is_bare else ""
        return cls(tuple(groups), stored, frozenset(always), why, prefix, bool(heads))

    @property
    def names(self) -> dict[str, str]:
        """The other names of tensors that are stored, by these names."""
        firsts = [(next(filter(self.stored.__contains__, group)), group) for group in self.groups]
        return {name: first for first, group in firsts for name in group if name != first}

    @property
    def tables(self) -> dict[str, str]:
        """The module of the table, by that of each head that is tied to it."""
        end = ".weight"
        return {
            name.removesuffix(end): table.removesuffix(end)
            for table, *names in self.groups
            for name in names
            if self.is_set and name.endswith(end)
        }

    def missing(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that the files leave out, as they are stored under another name."""
        return {name: tensors[to] for name, to in self.names.items() if name not in tensors}

    def outside(self, name: str, names: Mapping[str, str] | None = None) -> str:
        """Return the name to write a tensor under, beside a head of its own.

        ``names`` are those that are known of tensors. The others of the files, and their tables,
        get the prefix.
        """
        heads = {name for _, *names in self.groups for name in names}
        if name in heads and not re.fullmatch(TABLE, name):
            return name
        is_inside = name in self.stored or any(name in group for group in self.groups)
        return (names or {}).get(name, self.prefix + name if is_inside else name)


def _in_files(names: list[str], stored: Set[str]) -> list[str]:
    """Return tied names, the root's first, as they are in files: none if no name is.

    All may be below another module. A class may lack one of the stacks that a table is of, and the
    root then.
    """
    root = names[0]
    starts = {x.removesuffix(root) for x in stored if x.endswith(f".{root}")}
    if not stored & set(names) and len(starts) == 1:
        names = [start + name for start in starts for name in names]
    stacks = {x: re.match(r"(.*\.)?(encoder|decoder)\.(?=embed_tokens\.)", x) for x in names}
    gone = {
        x
        for x, stack in stacks.items()
        if stack and not any(y.startswith(stack[0]) and y != x for y in stored)
    }
    gone |= {names[0]} - stored if gone else set()
    return [x for x in names if x not in gone] if stored & set(names) else []


def tables_in_peft(source: Source) -> dict[str, str]:
    """Return the module of the table, by that of each head to which PEFT ties its adapters.

    In a model of parts PEFT asks the configuration of the whole, not the one that ties the head,
    and it knows no ties of an encoder and a decoder.
    """
    known = _known(source)
    if known is None or not known.key:
        return Ties.of(source).tables
    is_tied = known.key == "text_config" and (source.config or {}).get(FLAG, True)
    return Ties.of(source, flag=True).tables if is_tied else {}


def _known(source: Source) -> Known | None:
    """Return what is known of a model's ties, by the names in its files.

    A part of a model has the names of its own class, after those of the part: all of them, or
    (``model.language_model.embed_tokens``, ``lm_head``) those of the model inside that has no head.
    """
    known = ties_family(source.config)
    if known is None or not known.key:
        return known
    family, within = known.family, "" if known.key == "text_config" else f"{known.key}."
    prefix, heads, tied = family.prefix, family.tied_head or {}, family.tied or {}
    rests = {root.removeprefix(prefix) for root in heads.values()}
    starts = {
        name.removesuffix(rest)
        for name in source.tensors
        for rest in rests
        if f".{name}".endswith(f".{rest}") and name.startswith(within)
    }
    if len(starts) != 1:
        return None
    (start,) = starts
    outer = start.removesuffix(prefix) if start.endswith(prefix) else None

    def named(name: str) -> str:
        if outer is not None:
            return outer + name
        if not name.startswith(prefix):
            return name
        return prefix + start.removeprefix(prefix) + name.removeprefix(prefix)

    def all_named(names: Mapping[str, str]) -> dict[str, str]:
        return {named(name): named(other) for name, other in names.items()}

    prefix_there = prefix if outer is None else outer + prefix
    placed = replace(family, prefix=prefix_there, tied=all_named(tied), tied_head=all_named(heads))
    return known._replace(family=placed)


def _alike(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Find tables and heads, by their names, with equal numbers."""
    for table, head in _pairs(tensors):
        if np.array_equal(tensors[table].read(), tensors[head].read()):
            yield table, head


def _pairs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pair tables with heads of the same shape."""
    for table in filter(re.compile(TABLE).fullmatch, tensors):
        for head in filter(re.compile(HEAD).fullmatch, tensors):
            if tensors[table].shape == tensors[head].shape:
                yield table, head


def has_own_head(tensors: Mapping[str, Tensor], table: str) -> bool:
    """Return whether a head of a table's shape is stored beside it."""
    return table in (own for own, _ in _pairs(tensors))
