"""Match the leaves of a tree with the tensors of a model's files."""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._weights.paths import nearest
from lora_jax.io._kinds import from_torch, to_torch, torch_shape
from lora_jax.io._places import Place
from lora_jax.io._tensor import Tensor
from lora_jax.io._torch import Map, as_name, as_path, module_path
from lora_jax.io.hf._families import BUFFERS, Family, ties_in
from lora_jax.io.hf._quantized import check_plain
from lora_jax.io.hf._source import Source


class TensorNames:
    """Name the tensors of a source that leaves are stored in.

    Attributes:
        places: of the leaves.
        tensors: of the source.
        new: the paths of leaves that the files do not have.
    """

    def __init__(
        self, leaves: Mapping[str, Any], family: Family, source: Source | None, new: str | None
    ):
        if source is not None:
            check_plain(source)
        self.tensors: Mapping[str, Tensor] = source.tensors if source else {}
        names: Any = family.names
        if isinstance(names, Mapping):
            names = {**names, **_others(leaves, names, self.tensors)}
        self.places = Map(leaves, names, family.kinds, family.layout)
        self.where = source.where if source else ""
        self._family = family
        self._tied = ties_in(family)
        self.new = {path for path in leaves if new is not None and re.fullmatch(new, path)}
        if new is not None and not self.new:
            raise ValueError(f"new={new!r} matches no leaf. Nearest: {nearest(new, leaves)}")

    def name(self, place: Place) -> str:
        """Name the tensor of a place: as it is in the files, or as a new one will be written.

        Raises:
            ValueError: the files do not have it.
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
            f"Nearest: {nearest(full, self.tensors)}. If it has another name there, pass names=; "
            "if it equals another one, tied=; if it is to stay as it is here, such as a new head, "
            "new="
        )

    def _stored(self, name: str) -> str | None:
        """Find a name in the files, which may leave out the prefix."""
        for own in (name, name.removeprefix(self._family.prefix)):
            if own in self.tensors:
                return own
        return None

    def outside(self, name: str) -> str:
        """Choose the name to write a tensor of the source under: with its prefix, beside new ones.

        The files of a model without a head have no prefix.
        """
        prefix = self._family.prefix
        is_bare = prefix and not any(own.startswith(prefix) for own in self.tensors)
        return prefix + name if self.new and is_bare and name in self.tensors else name

    def parts(self, path: str) -> list[tuple[Place, str]]:
        """Name the tensors of a leaf."""
        return [(place, self.name(place)) for place in self.places.of(path)]

    def leaf(self, path: str, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Make a leaf of its tensors (or others in their place), read when it is asked for.

        Raises:
            ValueError: the files do not have a tensor, or have it in another shape.
        """
        leaf, parts = self.places.leaves[path], self.parts(path)
        for place, name in parts:
            self.check_shape(place, name)
            self._check_numbers(place, name)

        def read(tensors: Mapping[str, Tensor]) -> np.ndarray:
            arrays = {
                place.module: self.inward(tensors[name].read(), place, name)
                for place, name in parts
            }
            x = next(iter(arrays.values()))
            x = x.reshape(leaf.shape) if len(parts) == 1 else self.places.assembled(path, arrays)
            return x.astype(leaf.dtype, copy=False)

        return Tensor(leaf.shape, leaf.dtype, partial(read, tensors or self.tensors))

    def shape(self, place: Place, name: str) -> tuple[int, ...]:
        """Return the shape that the tensor of a place has there."""
        letters, kind = self._form(place, name)
        if letters is None:
            return place.shape
        if not letters:
            return (prod(place.shape),)
        return torch_shape(place.shape, letters, kind)

    def check_shape(self, place: Place, name: str) -> None:
        """Raise unless the tensor in the files has the shape of its place.

        Raises:
            ValueError: it has another.
        """
        if (found := self.tensors[name].shape) != (expected := self.shape(place, name)):
            raise ValueError(
                f"{self.where}: {name!r} has shape {found}, and {place.path!r} of shape "
                f"{place.shape} wants {expected}: this is another model, or the leaf's axes are "
                "not what its name implies: layout=lora_jax.layout_of(...) finds them"
            )

    def _check_numbers(self, place: Place, name: str) -> None:
        """Raise if integers that may be codes would be read as numbers."""
        stored, leaf = self.tensors[name].dtype, self.places.leaves[place.path]
        is_cast = jnp.issubdtype(stored, jnp.integer) and jnp.issubdtype(leaf.dtype, jnp.floating)
        if is_cast and len(place.shape) > 1:
            raise ValueError(
                f"{self.where}: {name!r} holds {stored}, and {place.path!r} is {leaf.dtype}: codes "
                "of a quantization are no numbers. If it is none, put a leaf of "
                f"{stored} there, and convert that"
            )

    def inward(self, x: np.ndarray, place: Place, name: str) -> np.ndarray:
        """Bring a tensor of the files into the axes of our leaf."""
        letters, kind = self._form(place, name)
        return x if letters is None else from_torch(x, place.shape, letters, kind)

    def outward(self, x: np.ndarray, place: Place, name: str) -> np.ndarray:
        """Bring a part of our leaf into the axes of the files."""
        letters, kind = self._form(place, name)
        return x if letters is None else to_torch(x, letters, kind)

    def _form(self, place: Place, name: str) -> tuple[Any, Any]:
        """Return the letters and the kind; None for a parameter of no module: its axes are ours."""
        is_own = name == place.module or place.module.endswith(f".{name}")
        return (None, None) if is_own else self.places.form(place)

    def left_over(self, used: Iterable[str]) -> dict[str, str]:
        """Find the tensors that no leaf uses, but that equal one in use, whose name is returned.

        Raises:
            ValueError: other tensors are not used, and the family does not allow it; or tied ones
                differ.
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
                    f"{self.where}: {name!r} is tied to {other!r}, and they differ: the model is "
                    "not tied, and the parameters have no place for both"
                )
        left = sorted(self.tensors.keys() - used - twins.keys())
        allowed = [BUFFERS, *([self._family.ignore] if self._family.ignore else [])]
        left = [name for name in left if not any(re.fullmatch(p, name) for p in allowed)]
        if left:
            raise ValueError(
                f"{self.where}: {len(left)} tensors have no place in the parameters, such as "
                f"{left[:5]}. If the model does without, pass ignore=, a pattern of their names"
            )
        return twins


def _others(
    leaves: Mapping[str, Any], names: Mapping[str, Any], tensors: Iterable[str]
) -> dict[str, str]:
    """Name the modules that a family does not have, and the files have by their very paths."""
    own = Map({}, names)
    stored = {module_path(as_path(name))[0] for name in tensors}
    modules = {module_path(path, leaves)[0] for path in leaves} & stored
    return {re.escape(m): as_name(m) for m in sorted(modules) if own.named(m) is None}
