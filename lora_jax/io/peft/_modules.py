"""An adapter of ours as PEFT's tensors and configuration."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Factors, Rows
from lora_jax._adapter.norms import squared_norm
from lora_jax._adapter.params import LoraParams
from lora_jax._weights.quantized import plain_array
from lora_jax._weights.ranges import Range, part_of
from lora_jax.io._record import to_host
from lora_jax.io._torch import Kind, Map, Place
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import PREFIX, TIED, TOKENS, Piece, joined, to_peft, wrapped

Modules = dict[str, tuple[Kind, str, Piece]]  # the kind, the layout within, and the factors


def to_files(
    lora_params: LoraParams,
    places: Map,
    parameter_order: tuple[str, ...],
    *,
    rslora: bool,
    **more: Any,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors by name, and the configuration; ``more`` goes into that as it is."""
    modules, tensors, tokens = _modules(lora_params, places)
    if not modules:
        raise ValueError(
            "peft.save: no weight has factors, and PEFT has no adapter without. Save the "
            "parameters themselves"
        )
    parameters = {name for name, (kind, *_) in modules.items() if kind == "Parameter"}
    for name, (kind, letters, piece) in modules.items():
        prefix = wrapped(name, parameters, parameter_order) if kind == "Parameter" else name
        for suffix, x in to_peft(piece, letters, kind).items():
            tensors[f"{prefix}.{suffix}"] = x
    whole, bias, of_whole = _trained_whole(lora_params, places, modules)
    tensors |= of_whole
    config = configs.write(
        {name: (piece.rank, piece.scale) for name, (_, _, piece) in modules.items()},
        parameters,
        places.modules(),
        all_named=places.all_named,
        rslora=rslora,
        bias=bias,
        fan_in_fan_out=any(kind == "Conv1D" for kind, *_ in modules.values()),
        modules_to_save=sorted(whole) or None,
        trainable_token_indices=tokens or None,
        use_dora=_is_dora(modules),
        **more,
    )
    return {PREFIX + name: x for name, x in tensors.items()}, config


def _modules(
    lora_params: LoraParams, places: Map
) -> tuple[Modules, dict[str, np.ndarray], dict[str, list[int]]]:
    """The factors by module; and the rows of tables that train, as tensors and as numbers."""
    pieces: dict[str, list[tuple[Place, Piece]]] = {}
    tensors: dict[str, np.ndarray] = {}
    tokens: dict[str, list[int]] = {}
    about: dict[str, tuple[Kind, str]] = {}
    leaves = places.leaves
    for key, f in lora_params.adapter.factors.items():
        path, ranges = part_of(key, leaves)
        if f.residual:
            raise ValueError(
                f"peft.save: {key!r} belongs to what its initializer left of the base, and PEFT "
                "would add it to the model's own weights. To write it as plain LoRA on those, say "
                "initial= and params=, as for lora_jax.algebra.to_plain"
            )
        if isinstance(f, Rows):
            (place,) = places.of(path)
            tokens[place.module] = list(f.ids)
            tensors[f"{place.module}.{TOKENS}"] = _new_rows(f, leaves[path])
            continue
        letters = places.within(path, f.layout)
        kind = places.kind(path, letters)
        if places.is_tied(path):
            raise ValueError(TIED.format(verb="save", path=path))
        if kind == "Parameter" and f.magnitude is not None:
            raise ValueError(f"peft.save: {key!r} has DoRA magnitudes: PEFT has none of parameters")
        for place, piece in _by_place(key, f, ranges, places.of(path)):
            about[place.module] = kind, letters
            pieces.setdefault(place.module, []).append((place, piece))
    modules: Modules = {}
    for name, parts in pieces.items():
        kind, letters = about[name]
        place = parts[0][0]
        norm = np.zeros(0)
        if any(piece.magnitude is not None for _, piece in parts):
            norm = np.sqrt(squared_norm(jnp.asarray(places.array(place)), letters))
        piece = joined([piece for _, piece in parts], letters, place.shape, norm)
        modules[name] = kind, letters, piece
    return modules, tensors, tokens


def _by_place(
    key: str, f: Factors, ranges: tuple[Range, ...], places: list[Place]
) -> Iterator[tuple[Place, Piece]]:
    """The factors of every place that they are of, as NumPy has them."""
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


def _new_rows(f: Rows, table: Any) -> np.ndarray:
    """Return the new rows themselves: what PEFT calls a delta replaces them."""
    table, ids = plain_array(table), jnp.asarray(f.ids)
    by_row = np.asarray(table[ids] if f.layout == "io" else table[:, ids].T)
    return by_row.astype(np.float32) + np.float32(f.scale) * np.asarray(f.b, np.float32)


def _is_dora(modules: Modules) -> bool:
    with_it = [name for name, (_, _, piece) in modules.items() if piece.magnitude is not None]
    if with_it and len(with_it) < len(modules):
        without = sorted(modules.keys() - set(with_it))
        raise ValueError(
            f"peft.save: {with_it[0]!r} has a DoRA magnitude and {without[0]!r} has not: PEFT has "
            "DoRA of all modules or of none"
        )
    return bool(with_it)


def _trained_whole(
    lora_params: LoraParams, places: Map, modules: Modules
) -> tuple[list[str], str, dict[str, np.ndarray]]:
    """The modules to save, whose biases train besides, and the tensors of both."""
    full = lora_params.adapter.full
    at = {path: places.of(path) for path in full}
    for path in full:
        if not places.is_module(path):
            raise ValueError(
                f"peft.save: {path!r} trains whole, and is no weight or bias of a module by its "
                "name: PEFT saves whole modules. If it is the weight of one, say "
                f"kinds={{{path!r}: 'Linear'}}"
            )
    for path in full:
        if places.is_tied(path):
            raise ValueError(TIED.format(verb="save", path=path))
    whole = [p.module for found in at.values() for p in found if p.suffix == "weight"]
    biases = [p.module for found in at.values() for p in found if p.suffix == "bias"]
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
    alone = set(biases) - set(saved)
    bias = "none" if not alone else "lora_only" if alone <= modules.keys() else "all"
    for name in places.all_modules() if bias != "none" else ():
        place = places.find(name, "bias")
        if place and name not in saved and (bias == "all" or name in modules):
            inner = ".base_layer" if name in modules else ""
            tensors[f"{name}{inner}.bias"] = trained(place)
    return whole, bias, tensors
