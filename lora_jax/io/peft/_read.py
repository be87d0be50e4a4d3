"""Read an adapter in one pass: every tensor has a place in a tree, or an error says why not."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax._adapter.params import Adapter
from lora_jax._weights.paths import nearest
from lora_jax.io._torch import Map
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import (
    BIAS,
    EMBEDDING,
    LINEAR,
    MAGNITUDE,
    PARAMETER_ORDER,
    ROWS,
    Part,
)
from lora_jax.io.peft._factors import read_factors
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._full import left_over, read_full
from lora_jax.io.peft._rows import TableRows, read_rows
from lora_jax.io.peft._stacked import stacked


@dataclass(frozen=True)
class Contents:
    """All that an adapter holds, by the paths of the leaves.

    Attributes:
        factors: those of the modules that are a leaf, or parts of one.
        full: the full leaves.
        rows: the rows of tables that train.
        redone: the leaves whose factors start from the base, as PiSSA's: PEFT repeats that, and
            changes the base, when it loads them.
    """

    factors: Mapping[str, list[Part]]
    full: Mapping[str, Any]
    rows: Mapping[str, TableRows]
    redone: frozenset[str]

    def adapter(self, leaves: Mapping[str, Any]) -> Adapter:
        """Make an adapter of ours, in the order of the leaves."""
        factors = {}
        for path, leaf in leaves.items():
            if path in self.factors:
                factors |= dict(stacked(path, self.factors[path], leaf))
            if path in self.rows:
                key, f = self.rows[path].entry(path)
                factors[key] = f
        return Adapter(factors, {path: self.full[path] for path in leaves if path in self.full})


def read(folder: Folder, places: Map, order: tuple[str, ...] = PARAMETER_ORDER) -> Contents:
    """Read all of an adapter.

    Args:
        folder: the adapter.
        places: those of the parameters it is for.
        order: the order in which modules register their parameters.

    Raises:
        ValueError: a tensor has no place or does not fit it, or is missing.
    """
    parts = read_factors(folder, places, order)
    full = read_full(folder, places, parts)
    rows = read_rows(folder, places)
    _check_complete(folder, places, parts)
    factors: dict[str, list[Part]] = {}
    for part in parts.values():
        factors.setdefault(part.place.path, []).append(part)
    return Contents(factors, full, rows, _redone(folder, factors))


def _redone(folder: Folder, factors: Mapping[str, list[Part]]) -> frozenset[str]:
    """Find the leaves whose factors PEFT takes out of the base when it loads them.

    Raises:
        ValueError: layers of one leaf have different ranks, so that no one start is theirs.
    """
    if (init := folder.config["init_lora_weights"]) not in configs.REDONE:
        return frozenset()
    found = [path for path, parts in factors.items() if parts[0].kind in ("Linear", "Conv1D")]
    for path in found:
        ranks = {part.piece.rank for part in factors[path]}
        if len(ranks) > 1:
            raise folder.error(
                f"the layers of {path!r} have ranks {sorted(ranks)}, and are stacked here: the "
                f"initializer {init!r} cannot be repeated for them"
            )
    return frozenset(found)


def _check_complete(folder: Folder, places: Map, adapted: Collection[str]) -> None:
    """Raise if factors are left over, tensors are missing, or targets have no factors."""
    if left := sorted(_left(folder)):
        raise left_over(folder, places, left[0])
    for name in _wanted(folder, places, adapted):
        folder.array(name)
    targets = folder.config.get("target_modules")
    if targets in (None, "all-linear"):
        return
    saved = folder.config.get("modules_to_save")
    for name in places.modules():
        place = places.find(name)
        is_weight = place is not None and len(place.shape) > 1 and not configs.is_saved(saved, name)
        if is_weight and name not in adapted and configs.is_target(folder.config, name):
            raise folder.error(
                f"its configuration adapts {name!r}, and the tensors of its factors are missing"
            )
    if isinstance(targets, list):
        unmet = [t for t in targets if not any(configs.matches([t], x) for x in adapted)]
        if unmet:
            raise folder.error(
                f"adapts the modules {unmet}; it has no tensors of them, nor are they here. "
                f"Nearest: {nearest(unmet[0], places.modules())}"
            )


def _left(folder: Folder) -> Iterator[str]:
    """List the tensors beside factors that belong to none, or of which nothing speaks."""
    for module, tensors in folder.modules.items():
        pairs = [pair for pair in (LINEAR, EMBEDDING) if pair[0] in tensors]
        used = {ROWS, *(name for pair in pairs for name in pair)}
        used |= {MAGNITUDE} if pairs and folder.config.get("use_dora") else set()
        used |= {BIAS} if folder.config.get("lora_bias") else set()
        yield from (f"{module}.{role}" for role in tensors.keys() - used)


def _wanted(folder: Folder, places: Map, adapted: Collection[str]) -> Iterator[str]:
    """List the tensors that must be there besides the factors."""
    config = folder.config
    for module in places.all_modules():
        has_bias = places.find(module, "bias") is not None
        if configs.is_saved(config.get("modules_to_save"), module):
            suffixes = ("weight", "bias") if has_bias else ("weight",)
            yield from (f"{module}.{s}" for s in suffixes if places.find(module, s))
        elif has_bias and module in adapted and config["bias"] != "none":
            yield f"{module}.base_layer.bias"
        elif has_bias and config["bias"] == "all":
            yield f"{module}.bias"
    said = config.get("trainable_token_indices") or {}
    trained = [module for module, tensors in folder.modules.items() if ROWS in tensors]
    for key in said if isinstance(said, dict) else [""] if said else []:
        if not any(module.endswith(key) for module in trained):
            yield f"{key or '...'}.{ROWS}"
    if config.get("lora_bias"):
        with_factors = (m for m, tensors in folder.modules.items() if LINEAR[1] in tensors)
        yield from (f"{module}.{BIAS}" for module in with_factors)
