"""An adapter of ours as PEFT's tensors and configuration."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._adapter.norms import squared_norm
from lora_jax._adapter.params import LoraParams
from lora_jax._weights.ranges import Range, entry
from lora_jax.io._record import to_host
from lora_jax.io._torch import Map, Place
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import PREFIX, TIED, Part, Piece, joined, to_peft, wrapped
from lora_jax.io.peft._rows import is_rows, written_rows

Modules = dict[str, Part]  # by the name of the module, or of the parameter


def to_files(
    lora_params: LoraParams,
    places: Map,
    parameter_order: tuple[str, ...],
    *,
    rslora: bool,
    **more: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Write the tensors by name, and the configuration; ``more`` goes into that as it is.

    Raises:
        ValueError: something has no name, no form in PEFT, or no exact one.
    """
    modules, tensors, tokens = _modules(lora_params, places)
    if not modules:
        raise ValueError(
            "peft.save: no weight has factors, and PEFT has no adapter without. Save the "
            "parameters themselves"
        )
    parameters = {name for name, part in modules.items() if part.kind == "Parameter"}
    for name, part in modules.items():
        prefix = wrapped(name, parameters, parameter_order) if name in parameters else name
        for suffix, x in to_peft(part.piece, part.letters, part.kind).items():
            tensors[f"{prefix}.{suffix}"] = x
    saved, bias, of_full = _full(lora_params, places, modules)
    tensors |= of_full
    config = configs.write(
        {name: (part.piece.rank, part.piece.scale) for name, part in modules.items()},
        parameters,
        places.modules(),
        all_named=places.all_named,
        rslora=rslora,
        bias=bias,
        fan_in_fan_out=any(part.kind == "Conv1D" for part in modules.values()),
        modules_to_save=sorted(saved) or None,
        trainable_token_indices=tokens or None,
        use_dora=_is_dora(modules),
        **more,
    )
    return {PREFIX + name: x for name, x in tensors.items()}, config


def _modules(
    lora_params: LoraParams, places: Map
) -> tuple[Modules, dict[str, np.ndarray], dict[str, list[int]]]:
    """Find the factors of every module; and the rows of tables that train: tensors and numbers."""
    parts: dict[str, list[Part]] = {}
    tensors: dict[str, np.ndarray] = {}
    tokens: dict[str, list[int]] = {}
    for key, f in lora_params.adapter.factors.items():
        path, ranges = entry(key, places.leaves)
        if f.residual:
            raise ValueError(
                f"peft.save: {key!r} belongs to what its initializer left of the base, and PEFT "
                "would add it to the model's own weights. To write it as plain LoRA on those, say "
                "initial= and params=, as for lora_jax.algebra.to_plain"
            )
        if is_rows(key, path):
            module, tokens_of, new = written_rows(key, f, path, places)
            tensors |= new
            tokens[module] = tokens_of
            continue
        for part in _parts(key, f, path, ranges, places):
            parts.setdefault(part.place.module, []).append(part)
    return {name: _joined(found, places) for name, found in parts.items()}, tensors, tokens


def _parts(
    key: str, f: Factors, path: str, ranges: tuple[Range, ...], places: Map
) -> Iterator[Part]:
    """Take factors apart by the modules that they are of.

    Raises:
        ValueError: PEFT has no such factors of such a module.
    """
    letters = places.within(path, f.layout)
    kind = places.kind(path, letters)
    if places.is_tied(path):
        raise ValueError(TIED.format(verb="save", path=path))
    if kind == "Parameter" and f.magnitude is not None:
        raise ValueError(f"peft.save: {key!r} has DoRA magnitudes: PEFT has none of parameters")
    for place, piece in _by_place(key, f, ranges, places.of(path)):
        yield Part(place, letters, kind, piece)


def _by_place(
    key: str, f: Factors, ranges: tuple[Range, ...], places: list[Place]
) -> Iterator[tuple[Place, Piece]]:
    """Take the factors of every place out of those of a leaf, as NumPy has them."""
    arrays = to_host({"a": f.a, "b": f.b})
    magnitude = None if f.magnitude is None else np.asarray(f.magnitude)
    outer = len(places[0].index)
    bounds = {r.axis: r for r in ranges}
    inner = tuple(r._replace(axis=r.axis - outer) for r in ranges if r.axis >= outer)
    for place in places:
        index = []
        for axis, k in enumerate(place.index):
            r = bounds.get(axis)
            if r is not None and not r.start <= k < r.stop:
                break
            index.append(k - (r.start if r is not None else 0))
        else:
            at = tuple(index)
            a, b = arrays["a"][at], arrays["b"][at]
            own = None if magnitude is None else magnitude[at]
            yield place, Piece(key, a, b, np.float32(f.scale), own, inner)


def _joined(parts: list[Part], places: Map) -> Part:
    """Join the factors of one module."""
    place, letters, kind, _ = parts[0]
    pieces, norm = [part.piece for part in parts], np.zeros(0)
    if any(piece.magnitude is not None for piece in pieces):
        norm = np.sqrt(squared_norm(jnp.asarray(places.array(place)), letters))
    return Part(place, letters, kind, joined(pieces, letters, place.shape, norm))


def _is_dora(modules: Modules) -> bool:
    with_it = [name for name, part in modules.items() if part.piece.magnitude is not None]
    if with_it and len(with_it) < len(modules):
        without = sorted(modules.keys() - set(with_it))
        raise ValueError(
            f"peft.save: {with_it[0]!r} has a DoRA magnitude and {without[0]!r} has not: PEFT has "
            "DoRA of all modules or of none"
        )
    return bool(with_it)


def _full(
    lora_params: LoraParams, places: Map, modules: Modules
) -> tuple[list[str], str, dict[str, np.ndarray]]:
    """Find the modules to save, whose biases train besides, and the tensors of both.

    Raises:
        ValueError: a full leaf is no part of a module, is tied, or has factors as well.
    """
    full = lora_params.adapter.full
    _check_full(full, places)
    found = [place for path in full for place in places.of(path)]
    whole = [place.module for place in found if place.suffix == "weight"]
    # PEFT saves every module whose name ends so, and all of each: what did not train is the base's.
    saved = [name for name in places.all_modules() if configs.is_saved(whole, name)]
    if both := sorted(set(saved) & modules.keys()):
        raise ValueError(
            f"peft.save: the module {both[0]!r} would train whole and have factors as well: it is "
            f"one of {whole}, or its name ends like theirs"
        )
    tensors = {}

    def trained(place: Place) -> np.ndarray:
        return places.tensor(place, full if place.path in full else None)

    for name in saved:
        for suffix in ("weight", "bias"):
            if place := places.find(name, suffix):
                tensors[f"{name}.{suffix}"] = trained(place)
    alone = {place.module for place in found if place.suffix == "bias"} - set(saved)
    bias = "none" if not alone else "lora_only" if alone <= modules.keys() else "all"
    for name in places.all_modules() if bias != "none" else ():
        place = places.find(name, "bias")
        if place and name not in saved and (bias == "all" or name in modules):
            inner = ".base_layer" if name in modules else ""
            tensors[f"{name}{inner}.bias"] = trained(place)
    return whole, bias, tensors


def _check_full(full: dict[str, Any], places: Map) -> None:
    """Raise unless every full leaf has a name there, is of a module, and is no tied table."""
    for path in full:
        places.of(path)
        if not places.is_module(path):
            raise ValueError(
                f"peft.save: {path!r} trains whole, and is no weight or bias of a module by its "
                "name: PEFT saves whole modules. If it is the weight of one, say "
                f"kinds={{{path!r}: 'Linear'}}"
            )
        if places.is_tied(path):
            raise ValueError(TIED.format(verb="save", path=path))
