"""PEFT's tensors and configuration as an adapter of ours.

One class, and so a longer file than others: what one kind of tensors says the next kind needs.
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Rows, wide
from lora_jax._adapter.norms import with_norms
from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._lorafy import lorafy
from lora_jax._weights.axes import role_shape
from lora_jax._weights.paths import PyTree, nearest
from lora_jax._weights.ranges import part_of
from lora_jax.algebra._plain import to_plain
from lora_jax.io._torch import Map, Place, from_torch, torch_shape
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import (
    EMBEDDING,
    MAGNITUDE,
    PREFIX,
    TIED,
    TOKENS,
    Piece,
    from_peft,
    wrapped,
)
from lora_jax.io.peft._stacked import stacked

_OF_FACTORS = (
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_B.bias",
    *(f".{name}" for name in (*EMBEDDING, MAGNITUDE, TOKENS)),
)


class Reader:
    """The tensors of a file, each taken once."""

    def __init__(
        self,
        where: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        places: Map,
        order: tuple[str, ...],
    ):
        self.where, self.config, self.places, self.order = where, config, places, order
        self.left: dict[str, np.ndarray] = {}
        for name, x in tensors.items():
            if not name.startswith(PREFIX):
                raise self.bad(
                    f"the tensor {name!r} does not begin with {PREFIX!r}: PEFT would load nothing "
                    "of it, and say so in a warning only"
                )
            self.left[name.removeprefix(PREFIX)] = x
        self.taken: set[str] = set()
        self.adapted: set[str] = set()  # the modules with factors
        self.redone: set[str] = set()  # the paths of which PEFT takes the start out of the base

    def bad(self, what: str) -> ValueError:
        """An error of this file."""
        return ValueError(f"{self.where}: {what}")

    def read(self, params: PyTree) -> LoraParams:
        """All of it, on the parameters it is for."""
        found = self.factors()
        full = self.trained_whole() | self.lora_biases()
        rows = self.rows()
        self.check_complete()
        factors: dict[str, Any] = {}
        for path, leaf in self.places.leaves.items():
            factors |= dict(stacked(path, found[path], leaf)) if path in found else {}
            factors |= {path: rows[path]} if path in rows else {}
        full = {path: full[path] for path in self.places.leaves if path in full}
        lora_params = LoraParams(params, Adapter(factors, full))
        check(lora_params)
        return with_norms(self._plain(lora_params, params))

    def factors(self) -> dict[str, list[tuple[Place, str, Piece]]]:
        """The factors by leaf, with their places and layouts within."""
        found: dict[str, list[tuple[Place, str, Piece]]] = {}
        parameters = self._parameters()
        for name in list(self.left):
            for suffix in (".lora_A.weight", f".{EMBEDDING[0]}"):
                if name.endswith(suffix):
                    module = name.removesuffix(suffix)
                    own = parameters.get(module, module) if suffix == ".lora_A.weight" else module
                    place, letters, piece = self._module(name, module, own)
                    found.setdefault(place.path, []).append((place, letters, piece))
        for path, parts in found.items():
            ranks = {piece.rank for *_, piece in parts}
            if len(ranks) > 1 and path in self.redone and self.is_redone:
                raise self.bad(
                    f"the layers of {path!r} have ranks {sorted(ranks)}, and are stacked here: the "
                    f"initializer {self.config['init_lora_weights']!r} cannot be repeated for them"
                )
        return found

    def _module(self, name: str, module: str, own: str) -> tuple[Place, str, Piece]:
        """The factors that a module has, of itself or of its parameter ``own``."""
        place = self.places.find(own)
        if place is None:
            raise self.bad(
                f"adapts a module {own!r}, which the parameters have not. Nearest: "
                f"{self.places.nearest(own)}. If it has another name here, say names="
            )
        letters = self.places.letters(place.path)
        kind = self.places.kind(place.path, letters)
        is_table = name.endswith(EMBEDDING[0])
        if is_table != (kind == "Embedding") or (own != module) != (kind == "Parameter"):
            raise self.bad(f"{name!r} is of another kind of module than a {kind}: say kinds=")
        a = self.take(name)
        b = self.take(f"{module}.{EMBEDDING[1] if is_table else 'lora_B.weight'}")
        magnitude = self.take(f"{module}.{MAGNITUDE}") if self.config.get("use_dora") else None
        if kind == "Parameter":
            a, b = self._experts(a, b, place, letters)
        scale = configs.scale_of(self.config, own)
        piece = from_peft(own, a, b, magnitude, scale, place.shape, letters, kind)
        if piece.rank != (rank := configs.rank_of(self.config, own)):
            raise self.bad(
                f"the factors of {own!r} have rank {piece.rank}, and its configuration says {rank}"
            )
        if own == module and not configs.is_target(self.config, own):
            raise self.bad(
                f"has factors for {own!r}, which its configuration does not adapt, so that PEFT "
                f"would drop them: target_modules={self.config.get('target_modules')!r}"
            )
        if self.places.is_tied(place.path):
            raise self.bad(TIED.format(verb="load", path=place.path))
        if kind != "Parameter":
            self._check_table(module, place)
        if kind in ("Linear", "Conv1D"):
            self.redone.add(place.path)
        self.adapted.add(own)
        return place, letters, piece

    def take(self, name: str) -> np.ndarray:
        """A tensor that must be there, in float32."""
        if name not in self.left:
            raise self.bad(f"the tensor {PREFIX + name!r} is missing")
        self.taken.add(name)
        x = self.left.pop(name)
        return x.astype(wide(x.dtype))

    def _parameters(self) -> dict[str, str]:
        """The parameters that are adapted, by the name of their wrapper."""
        targets = self.config.get("target_parameters") or []
        known = [name for name in self.places.modules() if configs.matches(targets, name)]
        unknown = [t for t in targets if not any(configs.matches([t], name) for name in known)]
        if unknown:
            raise self.bad(
                f"adapts the parameters {unknown}, which are not here. Nearest: "
                f"{self.places.nearest(unknown[0])}"
            )
        return {wrapped(name, set(known), self.order): name for name in known}

    def _experts(self, a, b, place: Place, letters: str):
        """The factors of experts as PEFT writes them now: before 0.19 it took the axes in order."""
        version = re.match(r"(\d+)\.(\d+)", self.config["peft_version"])
        if version is None:
            raise self.bad(
                "adapts parameters of experts and does not say peft_version, by which their axes "
                "are told apart"
            )
        if (int(version[1]), int(version[2])) >= (0, 19):
            return a, b
        inputs, outputs = (prod(role_shape(letters, place.shape, r)) for r in "io")
        experts = place.shape[letters.index("b")]
        if inputs == outputs:
            raise self.bad(
                f"was written by PEFT {self.config['peft_version']}, which took the axes of "
                f"parameters in order, and {place.module!r} is square: which axis is which cannot "
                "be told. Load and save it with PEFT 0.19 or later"
            )
        if a.ndim != 2 or (a.shape[1], b.shape[0]) != (outputs, inputs) or a.shape[0] % experts:
            return a, b  # as it is now, or from_peft says what is wrong
        rank = a.shape[0] // experts  # the factor that reads is the one that wrote
        first = a.reshape(experts, rank, outputs)
        then = b.reshape(inputs, rank, experts)
        return (
            then.transpose(2, 1, 0).reshape(experts * rank, inputs),
            first.transpose(2, 1, 0).reshape(outputs, rank * experts),
        )

    def _check_table(self, module: str, place: Place) -> None:
        """PEFT saves the whole table beside its factors: it must be the one that we have."""
        name = f"{module}.base_layer.weight"
        if name not in self.left:
            return
        if not self._is_ours(self.take(name), place):
            raise self.bad(
                f"brings a weight of {module!r} that is not the one in params: its rows were added "
                "to or trained. Put it into params first"
            )

    def _is_ours(self, theirs: np.ndarray, place: Place) -> bool:
        """Whether a whole tensor is the base's own, rounded as that is."""
        ours = self.places.tensor(place)
        dtype = self.places.leaves[place.path].dtype
        return theirs.shape == ours.shape and np.array_equal(
            theirs.astype(dtype).astype(np.float32), ours
        )

    def trained_whole(self) -> dict[str, Any]:
        """The leaves that train whole, by path."""
        parts: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
        self._drop_copies()
        for name in sorted(self.left):
            if name.endswith(_OF_FACTORS):
                continue
            module, _, suffix = name.rpartition(".")
            owner = module.removesuffix(".base_layer")
            place = self.places.find(owner, suffix)
            if place is None:
                raise self._left_over(name)
            is_trained = self._is_saved(owner) or self._is_bias(owner, module, suffix)
            x, (letters, kind) = self.take(name), self.places.form(place)
            if x.shape != (expected := torch_shape(place.shape, letters, kind)):
                raise self.bad(f"{name!r} has shape {x.shape}, expected {expected}")
            if not is_trained:
                if not self._is_ours(x, place):
                    raise self._left_over(name)
                continue  # the base's own, saved beside
            if self.places.is_tied(place.path):
                raise self.bad(TIED.format(verb="load", path=place.path))
            part = from_torch(x, place.shape, letters, kind)
            parts.setdefault(place.path, {})[place.index] = part
        return {path: self._whole(path, of_leaf) for path, of_leaf in parts.items()}

    def _is_saved(self, module: str) -> bool:
        return configs.is_saved(self.config.get("modules_to_save"), module)

    def _is_bias(self, owner: str, module: str, suffix: str) -> bool:
        """Whether PEFT trains this tensor as a bias; those of adapted modules are within."""
        if suffix != "bias" or self.config["bias"] == "none":
            return False
        is_adapted = owner in self.adapted
        return (owner != module) == is_adapted and (is_adapted or self.config["bias"] == "all")

    def _drop_copies(self) -> None:
        """With ``bias="all"`` PEFT saves the biases of whole modules three times: two to leave."""
        for name in list(self.left) if self.config["bias"] == "all" else ():
            owner, _, wrapper = name.removesuffix(".bias").rpartition(".")
            if wrapper not in ("original_module", "modules_to_save") or not name.endswith(".bias"):
                continue
            if f"{owner}.bias" in self.left:
                x = self.take(name)
                if wrapper == "modules_to_save" and (x != self.left[f"{owner}.bias"]).any():
                    raise self.bad(f"has two different biases for {owner!r}")

    def _left_over(self, name: str) -> ValueError:
        return self.bad(
            f"the tensor {PREFIX + name!r} has no place here: its configuration does not "
            "speak of it, or the parameters have no such module. Nearest: "
            f"{self.places.nearest(name.rpartition('.')[0])}"
        )

    def _whole(self, path: str, parts: Mapping[tuple[int, ...], np.ndarray]) -> Any:
        """A leaf of which these parts are there; the base has the rest."""
        places = self.places.of(path)
        stacked = [parts.get(p.index) for p in places]
        rest = [
            self.places.array(p) if x is None else x for p, x in zip(places, stacked, strict=True)
        ]
        leaf = self.places.leaves[path]
        return jnp.asarray(np.stack(rest).reshape(leaf.shape), wide(leaf.dtype))

    def lora_biases(self) -> dict[str, Any]:
        """Biases that PEFT adds beside its factors: the model's own and theirs, as one."""
        names = [name for name in self.left if name.endswith(".lora_B.bias")]
        full: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
        for name in names if self.config.get("lora_bias") else ():
            module = name.removesuffix(".lora_B.bias")
            place = self.places.find(module, "bias")
            if place is None or self.config["bias"] != "none":
                raise self.bad(
                    f"{name!r} adds to a bias of {module!r}, which is not here or trains as well"
                )
            update = configs.scale_of(self.config, module) * self.take(name)
            part = self.places.array(place).astype(np.float32)
            full.setdefault(place.path, {})[place.index] = part + update.reshape(part.shape)
        return {path: self._whole(path, parts) for path, parts in full.items()}

    def rows(self) -> dict[str, Rows]:
        """Read the table rows that train, by the path of their table."""
        said = self.config.get("trainable_token_indices") or {}
        rows = {}
        for name in [name for name in self.left if name.endswith(f".{TOKENS}")]:
            module = name.removesuffix(f".{TOKENS}")
            place = self.places.find(module)
            if place is None or place.index or len(place.shape) != 2:
                raise self.bad(f"rows of {module!r} train, and there is no such table here")
            found: Any = said
            if isinstance(said, dict):
                found = next((v for k, v in said.items() if module.endswith(k)), None)
            ids = found if isinstance(found, list) else []
            new, table = self.take(name), self.places.tensor(place)
            are_rows = ids and all(type(k) is int and 0 <= k < len(table) for k in ids)
            if not are_rows or len(set(ids)) != len(ids) or new.shape != (len(ids), table.shape[1]):
                raise self.bad(
                    f"{name!r} has shape {new.shape}, for a table of shape {table.shape}, and "
                    f"trainable_token_indices are {found!r:.60}"
                )
            order = sorted(range(len(ids)), key=lambda k: ids[k])
            ids = [ids[k] for k in order]
            b = jnp.asarray((new[order] - table[ids]).astype(np.float32))
            layout = self.places.letters(place.path)
            rows[place.path] = Rows(b, jnp.ones(()), layout, tuple(ids), len(table))
        return rows

    def check_complete(self) -> None:
        """Raise if tensors are left over, or modules are adapted that have none."""
        if self.left:
            raise self._left_over(next(iter(sorted(self.left))))
        for name in self._wanted():
            if name not in self.taken:
                raise self.bad(f"the tensor {PREFIX + name!r} is missing")
        targets = self.config.get("target_modules")
        if targets in (None, "all-linear"):
            return
        for name in self.places.modules():
            place = self.places.find(name)
            is_weight = place is not None and len(place.shape) > 1 and not self._is_saved(name)
            if is_weight and name not in self.adapted and configs.is_target(self.config, name):
                raise self.bad(
                    f"its configuration adapts {name!r}, and the tensors of its factors are missing"
                )
        if isinstance(targets, list):
            unmet = [t for t in targets if not any(configs.matches([t], x) for x in self.adapted)]
            if unmet:
                raise self.bad(
                    f"adapts the modules {unmet}; it has no tensors of them, nor are they here. "
                    f"Nearest: {nearest(unmet[0], self.places.modules())}"
                )

    def _wanted(self) -> Iterator[str]:
        """The tensors that must be there besides the factors."""
        config = self.config
        for module in self.places.all_modules():
            has_bias = self.places.find(module, "bias") is not None
            if self._is_saved(module):
                suffixes = ("weight", "bias") if has_bias else ("weight",)
                yield from (f"{module}.{s}" for s in suffixes if self.places.find(module, s))
            elif has_bias and module in self.adapted and config["bias"] != "none":
                yield f"{module}.base_layer.bias"
            elif has_bias and config["bias"] == "all":
                yield f"{module}.bias"
        said = config.get("trainable_token_indices") or {}
        trained = {name.removesuffix(f".{TOKENS}") for name in self.taken if name.endswith(TOKENS)}
        for key in said if isinstance(said, dict) else [""] if said else []:
            if not any(module.endswith(key) for module in trained):
                yield f"{key or '...'}.{TOKENS}"
        if config.get("lora_bias"):
            factors = (name for name in list(self.taken) if name.endswith(".lora_B.weight"))
            yield from (f"{name.removesuffix('.weight')}.bias" for name in factors)

    @property
    def is_redone(self) -> bool:
        """Whether PEFT takes the start of the factors out of the base when it loads them."""
        return bool(self.redone) and self.config["init_lora_weights"] in configs.REDONE

    def _plain(self, lora_params: LoraParams, params: PyTree) -> LoraParams:
        """On ``params`` as they are, where PEFT would change them when it loads the adapter."""
        init = self.config["init_lora_weights"]
        if init not in configs.REDONE:
            return lora_params
        factors = lora_params.adapter.factors
        paths = {key: part_of(key, self.places.leaves) for key in factors}
        redone = {key: path for key, (path, _) in paths.items() if path in self.redone}
        if parts := [key for key in redone if paths[key][1]]:
            raise self.bad(
                f"init_lora_weights={init!r} of a part of a stack, {parts[0]!r}, cannot be repeated"
            )
        options = {
            re.escape(path): (f.rank, float(f.scale) * f.rank, f.layout)
            for path, f in ((path, factors[key]) for key, path in redone.items())
        }
        rank, alpha, layout = ({path: x[k] for path, x in options.items()} for k in range(3))
        initial = lorafy(params, rank, alpha=alpha, targets=list(rank), layout=layout, init=init)
        trained = LoraParams(initial.base, Adapter({key: factors[key] for key in redone}))
        plain = to_plain(trained, initial, params).adapter.factors
        return LoraParams(params, Adapter(factors | plain, lora_params.adapter.full))
