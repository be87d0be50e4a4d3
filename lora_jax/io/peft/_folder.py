"""The files of an adapter, checked as far as they can be without the model."""

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import wide
from lora_jax.io import _files as files
from lora_jax.io._places import Place
from lora_jax.io._torch import Map
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import (
    BIAS,
    EMBEDDING,
    LINEAR,
    MAGNITUDE,
    PARAMETER_ORDER,
    PREFIX,
    ROWS,
    TIED,
)
from lora_jax.io.peft._config import CONFIG, TENSORS
from lora_jax.io.peft._config import check as check_config

_WRAPPERS = r"(\.(base_layer|original_module|modules_to_save|token_adapter))+$"
_COPIED = re.compile(r"(.+)\.(original_module|modules_to_save)\.(.+)")
COUNT = "num_batches_tracked"  # of BatchNorm, an integer
_ONLY_TRAINING = ".lora_velora_embed"  # what VeLoRA compresses its inputs by; outputs are LoRA's
_ROLES = (*LINEAR, *EMBEDDING, BIAS, MAGNITUDE, ROWS)


@dataclass(frozen=True)
class Folder:
    """An adapter as PEFT keeps it: a configuration, and tensors.

    Attributes:
        where: the folder, for messages.
        config: the configuration, with PEFT's defaults.
        tensors: the arrays by name, without the prefix that all names have.
        order: the order in which modules register their parameters.
        letters: the layout of its experts that are square, if who wrote the adapter knows it.
    """

    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    order: tuple[str, ...] = PARAMETER_ORDER
    letters: str | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        finite: bool = True,
        order: tuple[str, ...] = PARAMETER_ORDER,
    ) -> "Folder":
        """Read both files.

        Raises:
            OSError: a file is missing or cannot be read.
            ValueError: a file is damaged, or asks for what cannot be read exactly.
        """
        where = Path(path)
        config = check_config(files.read_json(_config_in(where)), str(where / CONFIG))
        with files.open_tensors(where / TENSORS) as file:
            tensors = {name: _widened(x) for name, x in file.items()}
        for name, x in tensors.items():
            _check_tensor(name, x, where, finite=finite)
        found: dict[str, np.ndarray] = {}
        for name, x in tensors.items():
            own = _known_as(name.removeprefix(PREFIX))
            if own in found:
                raise ValueError(f"{where} has {own!r} twice, once with .weight behind it")
            if not (config.get("velora_config") and own.endswith(_ONLY_TRAINING)):
                found[own] = x
        return cls(str(where), config, found, order)

    @functools.cached_property
    def modules(self) -> dict[str, dict[str, np.ndarray]]:
        """The tensors of factors by the module that they wrap, and by what follows its name."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, x in self.tensors.items():
            for role in _ROLES:
                if name.endswith(f".{role}"):
                    found.setdefault(name.removesuffix(f".{role}"), {})[role] = x
        return found

    @functools.cached_property
    def others(self) -> dict[str, np.ndarray]:
        """The other tensors by name: biases, modules to save, and copies of the base's."""
        marks = tuple(f".{role}" for role in _ROLES)
        found = {name: x for name, x in self.tensors.items() if not name.endswith(marks)}
        return {name: x for name, x in found.items() if not self._is_copy(name)}

    def _is_copy(self, name: str) -> bool:
        """Return whether a tensor is what a wrapper of a saved module holds besides what is loaded.

        PEFT writes these for biases that train (``bias="all"``), and for a resized vocabulary.
        """
        if not (match := _COPIED.fullmatch(name)):
            return False
        owner, wrapper, inner = match.groups()
        own = (f"{owner}.{x}" for x in (inner, inner.partition(".")[2]))  # or the adapter's name
        first = next((x for x in own if x in self.tensors), None)
        if first is None:
            return False
        if wrapper == "modules_to_save" and not np.array_equal(
            self.tensors[name], self.tensors[first]
        ):
            raise self.error(f"has two different tensors of {first!r}: the other is {name!r}")
        return True

    @functools.cached_property
    def named(self) -> list[str]:
        """The names of all modules that it has tensors of."""
        names = [*self.modules, *(name.rpartition(".")[0] for name in self.others)]
        return list(dict.fromkeys(re.sub(_WRAPPERS, "", name) for name in names))

    def array(self, name: str) -> np.ndarray:
        """Return a tensor that must be there, in float32 at least."""
        if name not in self.tensors:
            raise self.error(f"the tensor {PREFIX + name!r} is missing")
        x = self.tensors[name]
        return x.astype(wide(x.dtype))

    def error(self, what: str) -> ValueError:
        """Make an error that names the folder."""
        return ValueError(f"{self.where}: {what}")

    def check_tied(self, places: Map, place: Place) -> None:
        """Raise if an adapter of lookups alone is of a table that is, or may be, a head as well."""
        is_tied = places.is_tied(place.path, configs.has_head(self.config))
        if is_tied and not configs.ties_adapters(self.config, place.module):
            way = "lora_jax.io.hf.merge adds it to the model's files, and writes the head apart"
            raise self.error(TIED.format(verb="load", path=place.path, way=way))

    def left_over(self, name: str, places: Map) -> ValueError:
        """Make the error for a tensor that has no place."""
        return self.error(
            f"the tensor {PREFIX + name!r} has no place here: its configuration does not mention "
            "it, or the parameters have no such module. Nearest: "
            f"{places.nearest(name.rpartition('.')[0])}"
        )


def _known_as(name: str) -> str:
    """Return the name that PEFT gives a tensor now: older versions wrote magnitudes as modules."""
    return name.removesuffix(".weight") if name.endswith(f".{MAGNITUDE}.weight") else name


def _widened(x: np.ndarray) -> np.ndarray:
    """Return numbers of 8 bits in float32, as PEFT loads them."""
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize == 1
    return x.astype(np.float32) if is_narrow else x


def _check_tensor(name: str, x: np.ndarray, where: Path, *, finite: bool) -> None:
    if 0 in x.shape:
        raise ValueError(
            f"{where}: {name!r} is empty, shape {x.shape}: DeepSpeed's ZeRO-3 leaves tensors so "
            "that were not gathered before they were saved. Save the adapter again with "
            "stage3_gather_16bit_weights_on_model_save"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) and not name.endswith(f".{COUNT}"):
        raise ValueError(f"{where}: {name!r} is of type {x.dtype}, expected floating numbers")
    if finite and not np.isfinite(x.astype(np.float32)).all():
        raise ValueError(
            f"{where}: {name!r} has values that are not finite. To load it all the same: "
            "finite=False"
        )
    if not name.startswith(PREFIX):
        raise ValueError(
            f"{where}: the tensor {name!r} does not begin with {PREFIX!r}: PEFT would load nothing "
            "of it, and tell so in a warning only"
        )


def _config_in(folder: Path) -> Path:
    """Find the configuration, with the tensors beside it."""
    for name in (CONFIG, TENSORS):
        if (folder / name).exists():
            continue
        if name == TENSORS and (folder / "adapter_model.bin").exists():
            raise ValueError(
                f"{folder} holds adapter_model.bin, a pickle, which could run anything when it is "
                "read. In PEFT: PeftModel.from_pretrained(...).save_pretrained(folder) writes "
                f"{TENSORS}"
            )
        if parts := sorted(p.name for p in folder.glob("adapter_model-*-of-*.safetensors")):
            raise ValueError(
                f"{folder} holds an adapter in several files, {', '.join(parts[:2])}, ..., which "
                f"PEFT does not read: join them into one, {TENSORS}, by load_file and save_file of "
                "safetensors"
            )
        if (folder / "adapters.safetensors").exists():
            raise ValueError(
                f"{folder} holds adapters.safetensors, an adapter of MLX: its lora_a and lora_b "
                "are PEFT's lora_A.weight and lora_B.weight transposed, under names that begin "
                f"with {PREFIX!r}. Write them so to {TENSORS}, and a configuration with lora_alpha "
                "scale * rank"
            )
        inside = [p.parent.name for p in folder.glob(f"*/{CONFIG}")] if folder.is_dir() else []
        hint = (
            f": an adapter with a name of its own is in a folder within: {inside}" if inside else ""
        )
        raise FileNotFoundError(f"{folder} holds no {name}{hint}")
    return folder / CONFIG
