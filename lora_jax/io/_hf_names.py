"""Which tensor of a model's files is which leaf, or which part of one."""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import numpy as np

from lora_jax._paths import nearest
from lora_jax.io._families import BUFFERS, Family
from lora_jax.io._hf_source import Source
from lora_jax.io._torch import Map, Place, from_torch, to_torch, torch_shape


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
            for found in (name, (self._family.tied or {}).get(name, name)):
                for own in (found, found.removeprefix(self._family.prefix)):
                    if own in self.tensors:
                        return own
        raise ValueError(
            f"{self.where} has no tensor {place.module}.{place.suffix} for {place.path!r}. "
            f"Nearest: {nearest(full, self.tensors)}. If it has another name there, say names=; if "
            "it is another one as well, tied=; if it is to stay as it is here, such as a new head, "
            "new="
        )

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

    def check_left_over(self, used: Iterable[str]) -> None:
        """Raise where tensors of the files have no place, and the family does not say they may.

        Raises:
            ValueError: there are some.
        """
        left = sorted(self.tensors.keys() - set(used))
        may = [BUFFERS, *([self._family.ignore] if self._family.ignore else [])]
        left = [name for name in left if not any(re.fullmatch(p, name) for p in may)]
        if left:
            raise ValueError(
                f"{self.where}: {len(left)} tensors have no place in the parameters, such as "
                f"{left[:5]}. If the model does without, say ignore=, a pattern of their names"
            )
