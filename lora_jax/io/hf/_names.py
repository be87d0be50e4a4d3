"""Which tensor of a model's files is which leaf, or which part of one."""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import numpy as np

from lora_jax._weights.paths import nearest
from lora_jax.io._torch import Map, Place, from_torch, to_torch, torch_shape
from lora_jax.io.hf._families import BUFFERS, Family, ties_in
from lora_jax.io.hf._source import Source


class Names:
    """The leaves of a tree and the tensors of a source.

    Attributes:
        places: of the leaves there.
        new: the paths of leaves that the files have not.
    """

    def __init__(
        self, leaves: Mapping[str, Any], family: Family, source: Source | None, new: str | None
    ):
        self.places = Map(leaves, family.names, family.kinds, family.layout)
        self.tensors = source.tensors if source else {}
        self.where = source.where if source else ""
        self._family = family
        self._tied = ties_in(family)
        self.new = {path for path in leaves if new is not None and re.fullmatch(new, path)}
        if new is not None and not self.new:
            raise ValueError(f"new={new!r} matches no leaf. Nearest: {nearest(new, leaves)}")

    def name(self, place: Place) -> str:
        """The name of a tensor in the files, or, of what is new or without files, to be.

        Raises:
            ValueError: there is none.
        """
        is_module = self.places.is_module(place.path)
        full = f"{place.module}.{place.suffix}" if is_module else place.module
        if place.path in self.new or not self.where:
            return full
        for name in (f"{place.module}.{place.suffix}", place.module):
            for found in (name, self._tied.get(name, name)):
                if own := self._stored(found):
                    return own
        raise ValueError(
            f"{self.where} has no tensor {place.module}.{place.suffix} for {place.path!r}. "
            f"Nearest: {nearest(full, self.tensors)}. If it has another name there, say names=; if "
            "it is another one as well, tied=; if it is to stay as it is here, such as a new head, "
            "new="
        )

    def _stored(self, name: str) -> str | None:
        """The name in the files, which may do without the prefix."""
        for own in (name, name.removeprefix(self._family.prefix)):
            if own in self.tensors:
                return own
        return None

    def outside(self, name: str) -> str:
        """The name to write a tensor of the source under: with its prefix, beside what is new.

        Files of a model without a head have none before their names.
        """
        prefix = self._family.prefix
        is_bare = prefix and not any(own.startswith(prefix) for own in self.tensors)
        return prefix + name if self.new and is_bare and name in self.tensors else name

    def shape(self, place: Place, name: str) -> tuple[int, ...]:
        """The shape of the tensor of this name."""
        letters, kind = self._form(place, name)
        if letters is None:
            return place.shape
        if not letters:
            return (prod(place.shape),)
        return torch_shape(place.shape, letters, kind)

    def check_shape(self, place: Place, name: str) -> None:
        """Raise unless the tensor in the files has the shape of its place.

        Raises:
            ValueError: it has not.
        """
        if (found := self.tensors[name].shape) != (expected := self.shape(place, name)):
            raise ValueError(
                f"{self.where}: {name!r} has shape {found}, and {place.path!r} of shape "
                f"{place.shape} wants {expected}: this is another model, or the leaf's axes are "
                "not what its name says: layout=lora_jax.layout_of(...) finds them"
            )

    def inward(self, x: np.ndarray, place: Place, name: str) -> np.ndarray:
        """A tensor in the axes of our leaf."""
        letters, kind = self._form(place, name)
        return x if letters is None else from_torch(x, place.shape, letters, kind)

    def outward(self, x: np.ndarray, place: Place, name: str) -> np.ndarray:
        """The reverse."""
        letters, kind = self._form(place, name)
        return x if letters is None else to_torch(x, letters, kind)

    def _form(self, place: Place, name: str) -> tuple[Any, Any]:
        """The letters and the kind; None for a parameter of its own, whose axes are the same."""
        is_own = name == place.module or place.module.endswith(f".{name}")
        return (None, None) if is_own else self.places.form(place)

    def left_over(self, used: Iterable[str]) -> dict[str, str]:
        """Tensors of the files that have no place, and are tied to one that has.

        Raises:
            ValueError: there are others, and the family does not say that there may be; or tied
                ones are not the same.
        """
        twins: dict[str, str] = {}
        used = set(used)
        for tied, to in self._tied.items():
            name, other = self._stored(tied), self._stored(to)
            if name is None or name in used or other is None or other not in used:
                continue
            twins[name] = other
            one, two = self.tensors[name], self.tensors[other]
            if one.shape != two.shape or not np.array_equal(one.read(), two.read()):
                raise ValueError(
                    f"{self.where}: {name!r} is to be {other!r} as well, and they differ: the "
                    "model is not tied, and the parameters have no place for both"
                )
        left = sorted(self.tensors.keys() - used - twins.keys())
        may = [BUFFERS, *([self._family.ignore] if self._family.ignore else [])]
        left = [name for name in left if not any(re.fullmatch(p, name) for p in may)]
        if left:
            raise ValueError(
                f"{self.where}: {len(left)} tensors have no place in the parameters, such as "
                f"{left[:5]}. If the model does without, say ignore=, a pattern of their names"
            )
        return twins
