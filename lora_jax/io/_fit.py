"""Fit the names of a model's files to those of an adapter.

Files of a model without its head lack the prefix that its modules have beside one
(``encoder.layer.0`` and ``bert.encoder.layer.0``), wrappers add one (``_orig_mod.``), and models of
pictures and text were renamed in transformers 4.52.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterator

from lora_jax.io._torch import Map, Names, as_name, as_path

COMPILED = "_orig_mod."  # what torch.compile puts in front of a module's name

_BESIDE = (
    "vision_tower|vision_model|image_tower|video_tower|multi_modal_projector|image_newline|"
    "vision_embed_tokens|vqmodel"
)
# The names of earlier versions of transformers (before 4.52, and 5) to those of today, and back;
# the first pattern counts.
_RENAMED = (
    {
        r"(language_model|text_model)\.model\.(.+)": r"model.\1.\2",
        r"(?:language_model|text_model)\.(lm_head.*)": r"\1",
        rf"((?:{_BESIDE})(?:\..+)?)": r"model.\1",
    },
    {
        r"model\.(language_model|text_model)\.(.+)": r"\1.model.\2",
        r"(lm_head.*)": r"language_model.\1",
        rf"model\.((?:{_BESIDE})(?:\..+)?)": r"\1",
    },
    {
        r"(visual\..+)": r"model.\1",
        r"model\.((?!language_model\.|visual\.).+)": r"model.language_model.\1",
    },
    {r"model\.(visual\..+)": r"\1", r"model\.language_model\.(.+)": r"model.\1"},
    {r"(.+)\.block_sparse_moe\.((?:gate|experts|shared_experts)(?:\..+)?)": r"\1.mlp.\2"},
    {r"(.+)\.mlp\.((?:gate|experts|shared_experts)(?:\..+)?)": r"\1.block_sparse_moe.\2"},
)
_Rename = Callable[[str], str]


def fitted(
    wanted: Collection[str], modules: Collection[str], where: str, names: Names = None
) -> dict[str, str]:
    """Name the modules of files as an adapter does, by their names in the files.

    Args:
        wanted: the modules that the adapter names.
        modules: the modules in the files.
        where: the files, for messages.
        names: the names of some of them, by their paths in the files; the others are found.

    Raises:
        ValueError: several modules of the files would do for one of the adapter.
    """
    own = Map({}, names) if names is not None else None
    given = {m: own.named(as_path(m)) for m in modules} if own else {}
    if parts := [m for m, name in given.items() if not isinstance(name, str | None)]:
        raise TypeError(
            f"names: {given[parts[0]]!r} for {as_path(parts[0])!r}, expected one name: it is one "
            f"module in {where}, and in the adapter"
        )
    given = {m: as_name(name) for m, name in given.items() if name is not None}
    clean = {m.replace(COMPILED, ""): m for m in wanted if m not in set(given.values())}
    free = [m for m in modules if m not in given]
    best = _best(clean, {m: m.replace(COMPILED, "") for m in free}, where)
    return {m: given[m] if m in given else clean.get(best[m], best[m]) for m in modules}


def _best(wanted: Collection[str], modules: dict[str, str], where: str) -> dict[str, str]:
    """Choose the renaming by which most of the modules that are wanted are there."""
    found = [(_met(wanted, modules), modules)]
    for rename in _renamings(wanted, modules.values()) if len(found[0][0]) < len(wanted) else ():
        names = {m: own if own in wanted else rename(own) for m, own in modules.items()}
        if len(set(names.values())) == len(names):
            found.append((_met(wanted, names), names))
    most = max(len(met) for met, _ in found)
    if len(found[0][0]) == most:
        return modules
    (first, names), *others = [(met, names) for met, names in found if len(met) == most]
    for other, _ in others:
        if differing := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
            name = differing[0]
            maybe = sorted(met[name] for met in (first, other) if name in met)
            raise ValueError(
                f"{where}: the adapter's {name!r} may be any of {maybe}: pass the one that it is, "
                f"as names={{{as_path(maybe[0])!r}: {name!r}}}, or a pattern for all of them"
            )
    return names


def _met(wanted: Collection[str], names: dict[str, str]) -> dict[str, str]:
    """Find the modules that are wanted, by their names in the files, or the first inside each."""
    known = _known(names)
    return {name: known[name] for name in wanted if name in known}


def _known(names: dict[str, str]) -> dict[str, str]:
    """Find the first module of every name, and of every name that others are inside of."""
    known: dict[str, str] = {}
    for module, name in names.items():
        known[name] = module
        while "." in name:
            name = name.rpartition(".")[0]
            known.setdefault(name, module)
    return known


def _renamings(wanted: Collection[str], modules: Collection[str]) -> Iterator[_Rename]:
    """List what the names in the files may lack, have besides, or have been renamed from."""
    known = _known({module: module for module in modules})
    ends: dict[str, set[str]] = {}
    for module in known:
        for k in _cuts(module):
            ends.setdefault(module[k:], set()).add(module[:k])
    less, more = set(), set()
    for name in (name for name in wanted if name not in known):
        more |= ends.get(name, set())
        less |= {name[:k] for k in _cuts(name) if name[k:] in known}
    yield from (functools.partial(str.__add__, start) for start in sorted(less))
    yield from (functools.partial(_without, start) for start in sorted(more))
    yield from (functools.partial(_renamed, patterns) for patterns in _RENAMED)


def _cuts(name: str) -> list[int]:
    return [k + 1 for k, letter in enumerate(name) if letter == "."]


def _without(start: str, name: str) -> str:
    return name.removeprefix(start)


def _renamed(patterns: dict[str, str], name: str) -> str:
    for pattern, template in patterns.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(template)
    return name
