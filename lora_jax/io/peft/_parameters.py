"""The factors of parameters: PEFT's ``target_parameters``, tensors that it adapts by their names.

PEFT takes the axes of a parameter in the order in which they are stored::

    [out, in]            lora_A [r, in]             lora_B [out, r]
    [experts, out, in]   lora_A [experts * r, in]   lora_B [out, r * experts]

Some modules store ``[..., in, out]``. The ``lora_A`` of their parameters has the axis that is
written, and ``lora_B`` the one that is read; but not if the module's ``is_transposed`` is true
(gpt-oss since transformers 5), nor for experts if PEFT is older than 0.19.
"""

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from lora_jax._weights.axes import role_shape
from lora_jax.io._places import Place
from lora_jax.io._torch import Map
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import LINEAR, wrappers
from lora_jax.io.peft._folder import Folder

_WEIGHT = ".weight"


def parameters_among(folder: Folder, modules: Collection[str]) -> dict[str, str]:
    """Find the wrapper of every adapted parameter, by the name of the parameter.

    A parameter is one of the modules that are here, or the weight of one.
    """
    names = [*modules, *(name + _WEIGHT for name in modules)]
    return wrappers(configs.target_parameters(folder.config, names), folder.order)


def find_parameter(places: Map, name: str) -> Place | None:
    """Find the place of a parameter: its own, or that of the module that it is the weight of."""
    return places.find(name) or places.find(name.removesuffix(_WEIGHT))


def takes_axes_in_order(folder: Folder) -> bool:
    """Return whether PEFT took the axes of experts as ``[experts, in, out]``: before 0.19.

    Raises:
        ValueError: the adapter does not tell.
    """
    version = re.match(r"(\d+)\.(\d+)", folder.config.get("peft_version", ""))
    if version is None:
        raise folder.error(
            "adapts parameters of experts and does not give peft_version, by which their axes are "
            "told apart"
        )
    return (int(version[1]), int(version[2])) < (0, 19)


@dataclass(frozen=True)
class _Parameter:
    """A parameter, and how its factors would have to read it here."""

    name: str
    wrapper: str
    place: Place
    letters: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The number of experts, and of what each reads and writes."""
        experts, inputs, outputs = (
            prod(role_shape(self.letters, self.place.shape, role)) for role in "bio"
        )
        return experts, inputs, outputs

    def is_turned(self, tensors: Mapping[str, np.ndarray]) -> bool | None:
        """Return whether ``lora_A`` has what is written here; None for a square one."""
        _, inputs, outputs = self.sizes
        a, b = (tensors[f"{self.wrapper}.{role}"] for role in LINEAR)
        fits = a.ndim == b.ndim == 2 and (a.shape[1], b.shape[0]) == (outputs, inputs)
        return None if inputs == outputs else fits

    def turned(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Exchange the factors: the one that reads is the one that wrote."""
        names = [f"{self.wrapper}.{role}" for role in LINEAR]
        a, b = (tensors[name] for name in names)
        experts, inputs, outputs = self.sizes
        rank = len(a) // experts
        if a.shape != (experts * rank, outputs) or b.shape != (inputs, rank * experts):
            return {}  # as they are: the error of their shapes names both
        first = b.reshape(inputs, rank, experts).transpose(2, 1, 0)
        then = a.reshape(experts, rank, outputs).transpose(2, 1, 0)
        found = first.reshape(-1, inputs), then.reshape(outputs, -1)
        return dict(zip(names, found, strict=True))


def with_reading_first(folder: Folder, places: Map) -> Folder:
    """Exchange the factors of parameters whose ``lora_A`` has the axis that is written here.

    Shapes tell. A square parameter is like the others of its module; alone it is what PEFT wrote
    for experts, and if it has two axes it is stored as :func:`lora_jax.io.hf.load` would read it.

    Raises:
        ValueError: nothing tells it of square experts.
    """
    wanted = []
    for name, wrapper in parameters_among(folder, places.modules()).items():
        place = find_parameter(places, name)
        if place is not None and all(f"{wrapper}.{role}" in folder.tensors for role in LINEAR):
            wanted.append(_Parameter(name, wrapper, place, places.letters(place.path)))
    shown = {own.name: own.is_turned(folder.tensors) for own in wanted}
    tensors = dict(folder.tensors)
    for own in wanted:
        is_turned = shown[own.name]
        if is_turned is None:
            module = own.name.rpartition(".")[0]
            beside = {shown[x] for x in shown if x.rpartition(".")[0] == module} - {None}
            is_turned = beside == {True} if beside else _is_turned_alone(folder, own, places)
        tensors |= own.turned(tensors) if is_turned else {}
    return replace(folder, tensors=tensors)


def _is_turned_alone(folder: Folder, own: _Parameter, places: Map) -> bool:
    """Return whether the factors of a square parameter are exchanged that has none beside it."""
    if "b" in own.letters:
        if takes_axes_in_order(folder):
            raise folder.error(
                f"was written by PEFT {folder.config['peft_version']}, which took the axes of "
                f"parameters in order, and {own.name!r} is square: which axis is which cannot be "
                "told. Load and save it with PEFT 0.19 or later"
            )
        warnings.warn(
            f"{folder.where}: {own.name!r} is square, and nothing beside it tells which axis "
            "lora_A has: it is taken for the one that is read, as of models in transformers 5. Of "
            "gpt-oss in transformers 4 it is the other: merge it by hf.merge(..., layout=...)",
            stacklevel=6,
        )
        return False
    kind = places.kind(own.place.path, own.letters)
    if kind == "Parameter" or not places.is_module(own.place.path):
        return own.letters[0] == "i"
    return kind in ("Conv1D", "Embedding")
