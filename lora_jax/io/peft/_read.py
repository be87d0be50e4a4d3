"""Read an adapter in one pass: every tensor has a place in a tree, or an error says why not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax._adapter.factors import Entry, Rows
from lora_jax._adapter.params import Adapter
from lora_jax.io._torch import Map
from lora_jax.io.peft._axes import Part
from lora_jax.io.peft._config import REDONE
from lora_jax.io.peft._factors import check_factors, read_factors
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._full import read_full
from lora_jax.io.peft._join import stacked
from lora_jax.io.peft._parameters import with_reading_first
from lora_jax.io.peft._rows import read_rows
from lora_jax.io.peft._vocabulary import check_vocabulary


@dataclass(frozen=True)
class Contents:
    """All that an adapter holds, by the paths of the leaves.

    Attributes:
        factors: those of the modules that are a leaf, or parts of one.
        full: the full leaves.
        rows: the rows of tables that train.
        redone: the leaves whose factors start from the base, as PiSSA's: PEFT repeats that, and
            changes the base, when it loads them.
        layouts: the layouts of the leaves that have factors.
    """

    factors: Mapping[str, list[Part]]
    full: Mapping[str, Any]
    rows: Mapping[str, Rows]
    redone: frozenset[str]
    layouts: Mapping[str, str]

    def adapter(self, leaves: Mapping[str, Any]) -> Adapter:
        """Make an adapter of ours, in the order of the leaves."""
        factors: dict[str, Entry] = {}
        for path, leaf in leaves.items():
            if path in self.factors:
                layout, shape = self.layouts[path], tuple(leaf.shape)
                factors |= stacked(path, self.factors[path], layout, shape)
            factors |= {path: self.rows[path]} if path in self.rows else {}
        return Adapter(factors, {path: self.full[path] for path in leaves if path in self.full})


def read(folder: Folder, places: Map, *, axes_known: bool = False) -> Contents:
    """Read all of an adapter.

    Args:
        folder: the adapter.
        places: those of the parameters it is for.
        axes_known: whether these have the axes of parameters as ``lora_A`` reads them.

    Raises:
        ValueError: a tensor has no place or does not fit it, or is missing.
    """
    check_vocabulary(folder, places)
    folder = folder if axes_known else with_reading_first(folder, places)
    parts = read_factors(folder, places)
    full, rows = read_full(folder, places, parts), read_rows(folder, places)
    check_factors(folder, places, parts)
    factors: dict[str, list[Part]] = {}
    for part in parts.values():
        factors.setdefault(part.place.path, []).append(part)
    layouts = {path: places.layout(path) for path in factors}
    return Contents(factors, full, rows, _redone(folder, factors), layouts)


def _redone(folder: Folder, factors: Mapping[str, list[Part]]) -> frozenset[str]:
    """Find the leaves whose factors PEFT takes out of the base when it loads them."""
    if (init := folder.config["init_lora_weights"]) not in REDONE:
        return frozenset()
    found = [path for path, parts in factors.items() if parts[0].kind in ("Linear", "Conv1D")]
    for path in found:
        if len(ranks := {part.rank for part in factors[path]}) > 1:
            raise folder.error(
                f"the layers of {path!r} have ranks {sorted(ranks)}, and are stacked here: the "
                f"initializer {init!r} cannot be repeated for them"
            )
    return frozenset(found)
