"""The places of a leaf in another model: one for each tensor there, with the part that it is."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

from lora_jax._weights.axes import role_axes
from lora_jax._weights.ranges import index_of, overlap, part_shape, resolve

LAYER, EXPERT = "{layer}", "{expert}"

# The name of a module; of the modules along an axis; or of the modules of ranges.
Template: TypeAlias = str | Sequence[str] | Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """One tensor of the other model, and the part of our leaf that it is.

    Attributes:
        path: the path of our leaf.
        index: the numbers of that part, along the axes that have one tensor for each entry.
        module: the name of the module there; for a Parameter, that of the parameter.
        suffix: ``"weight"`` or ``"bias"``.
        shape: the shape of the part.
        axes: the axes of ``index``, in the leaf: first those of ``{layer}`` and ``{expert}``.
        at: the index of the part in the leaf.
    """

    path: str
    index: tuple[int, ...]
    module: str
    suffix: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    at: tuple[Any, ...] = ()

    def within(self, letters: str) -> str:
        """Return the letters of a layout that are the part's own."""
        return "".join(x for axis, x in enumerate(letters) if axis not in self.axes)


def places_of(
    path: str, shape: Sequence[int], template: Template, suffix: str, letters: str | None
) -> Iterator[Place]:
    """List the places of a leaf.

    Args:
        path: the path of the leaf.
        shape: the shape of the leaf.
        template: the names of the modules.
        suffix: ``"weight"`` or ``"bias"``.
        letters: the layout of the leaf, if it is known.

    Raises:
        ValueError: a name numbers axes that the leaf has not, or names are missing.
    """
    names = [template] if isinstance(template, str) else [*_names(template)]
    marks = [mark for mark in (LAYER, EXPERT) if any(mark in name for name in names)]
    batch = role_axes(letters, "b") if letters else range(len(shape))
    if len(batch) < len(marks):
        raise ValueError(f"names: {names[0]!r} numbers axes that {path!r}, {shape}, has not")
    axes = tuple(batch[: len(marks)])
    if isinstance(template, str):
        yield from _numbered(path, shape, template, suffix, dict(zip(axes, marks, strict=True)))
    elif isinstance(template, Mapping):
        parts = {text: _ranges(text, path, shape) for text in template}
        _check_parts(path, shape, parts)
        for text, name in template.items():
            marked = dict(zip(axes, marks, strict=True))
            yield from _numbered(path, shape, name, suffix, marked, parts[text])
    else:
        left = [axis for axis in range(len(shape)) if axis not in axes]
        if not left or shape[left[0]] != len(names):
            raise ValueError(
                f"names: {len(names)} names for {path!r}, {tuple(shape)}: expected one for each "
                f"entry of the axis in front{' after those that are numbered' if axes else ''}"
            )
        for k, name in enumerate(names):
            marked: dict[int, Any] = dict(zip(axes, marks, strict=True)) | {left[0]: k}
            yield from _numbered(path, shape, name, suffix, marked)


def _names(template: Sequence[str] | Mapping[str, str]) -> Sequence[str]:
    return [*template.values()] if isinstance(template, Mapping) else template


def _ranges(text: str, path: str, shape: Sequence[int]) -> Any:
    """Parse ranges of a weight; a bias has those of the axes that are divided."""
    parts = text.split(",")
    if len(parts) > len(shape):
        parts = [part for part in parts if part.strip() != ":"]
    return resolve(",".join(parts), path, shape)


def _check_parts(path: str, shape: Sequence[int], parts: Mapping[str, Any]) -> None:
    """Raise unless ranges are all of a leaf, and none is of two."""
    for one, other in itertools.combinations(parts, 2):
        if overlap(parts[one], parts[other]):
            raise ValueError(f"names: the ranges [{one}] and [{other}] of {path!r} overlap")
    covered = sum(prod(part_shape(shape, ranges)) for ranges in parts.values())
    if covered < prod(shape):
        raise ValueError(
            f"names: the ranges {[*parts]} of {path!r}, {tuple(shape)}, are not all of it: give "
            "every part a name"
        )


def _numbered(
    path: str,
    shape: Sequence[int],
    name: str,
    suffix: str,
    marked: Mapping[int, Any],
    ranges: Any = (),
) -> Iterator[Place]:
    """List the places of the entries of some axes, each with its number in the name."""
    own = part_shape(shape, ranges)
    if taken := [r.axis for r in ranges if r.axis in marked]:
        raise ValueError(f"names: {name!r} numbers axis {taken[0]} of {path!r}, and divides it")
    sizes = [range(shape[axis]) if isinstance(x, str) else (x,) for axis, x in marked.items()]
    for index in itertools.product(*sizes):
        at: list[Any] = [*index_of(ranges, len(shape))]
        full = name
        for (axis, mark), k in zip(marked.items(), index, strict=True):
            at[axis] = k
            full = full.replace(mark, str(k)) if isinstance(mark, str) else full
        inner = tuple(size for axis, size in enumerate(own) if axis not in marked)
        yield Place(path, tuple(index), full, suffix, inner, tuple(marked), tuple(at))
