"""Turn an adapter into arrays under flat names and a record of the rest in JSON, and back.

The record describes how the arrays make an adapter, and its base: the names, shapes and dtypes of
all leaves and, where it matters, checksums of their contents.
"""

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.checks import check_single
from lora_jax._adapter.factors import Factors, Rows
from lora_jax._adapter.norms import with_norms
from lora_jax._adapter.params import Adapter, LoraParams, adapters_under, check, without_adapters
from lora_jax._weights.axes import factor_shapes
from lora_jax._weights.paths import (
    PyTree,
    arrays_in,
    nearest,
    not_parameters,
    parameters_in,
    random_in,
)
from lora_jax._weights.quantized import plain_array
from lora_jax._weights.ranges import split_range
from lora_jax.io import _state as states
from lora_jax.io._checksum import checksum

_OLD_ROWS = re.compile(r"(?P<path>.*)\[\[(?P<ids>\d+(, \d+)*)\]\]")  # a key of version 1


def parts_of(adapter_or_params: Adapter | LoraParams, verb: str) -> tuple[Adapter, PyTree | None]:
    """Return the adapter, and the base if there is one.

    Raises:
        TypeError: the argument is neither a LoraParams nor an Adapter.
        ValueError: the adapter does not fit the base, or needs one.
    """
    if isinstance(adapter_or_params, LoraParams):
        check(adapter_or_params)
        return adapter_or_params.adapter, adapter_or_params.base
    if not isinstance(adapter_or_params, Adapter):
        raise TypeError(
            f"{verb}: expected a LoraParams or an Adapter, got {type(adapter_or_params).__name__}"
        )
    check_single(adapter_or_params, f"{verb}: the adapter")
    if residual := [key for key, f in adapter_or_params.factors.items() if f.residual]:
        raise ValueError(
            f"{verb}: {residual[0]!r} belongs to what its initializer left of the base, which must "
            "be known: pass the LoraParams; or turn it into plain LoRA by lora_jax.algebra.to_plain"
        )
    return adapter_or_params, None


def arrays_of(adapter: Adapter) -> dict[str, Any]:
    """Name the arrays of an adapter: ``layers_0/query/kernel.a``, and ``head/bias.full``."""
    found = {
        f"{key}.{field}": jnp.asarray(x)
        for (key, field), x in adapter.arrays().items()
        if field != "norm"  # it belongs to the base, and is computed again
    }
    for name, x in found.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"the adapter's {name!r} is of type {x.dtype}, expected floating numbers"
            )
    return found


def record_of(
    adapter: Adapter, base: PyTree | None, state: Mapping[str, Any], *, content: bool
) -> dict[str, Any]:
    """Describe all that the arrays do not tell, for JSON.

    Args:
        adapter: the adapter.
        base: its base, or None.
        state: the leaves of the state beside it, by path.
        content: whether to record a checksum of every leaf of the base. Leaves that an
            initializer changed have one in any case.
    """
    factors = {
        key: {
            "layout": f.layout,
            "rank": int(f.rank),
            "frozen": list(f.frozen),
            "residual": f.residual,
            "dora": f.magnitude is not None,
        }
        for key, f in adapter.factors.items()
        if isinstance(f, Factors)
    }
    rows = {
        path: {"layout": f.layout, "ids": list(f.ids), "vocabulary": f.vocabulary}
        for path, f in adapter.factors.items()
        if isinstance(f, Rows)
    }
    changed = {split_range(key)[0] for key, f in adapter.factors.items() if f.residual}
    return {
        "format": "lora_jax",
        "version": 3 if state else 2 if rows else 1,
        "factors": factors,
        **({"rows": rows} if rows or state else {}),
        **({"state": states.notes_of(state)} if state else {}),
        "full": list(adapter.full),
        "base": None if base is None else _base_record(base, changed, content=content),
    }


def _base_record(base: PyTree, changed: Collection[str], *, content: bool) -> dict[str, Any]:
    leaves = parameters_in(without_adapters(base))
    shown = [path for path in leaves if content or path in changed]
    return {
        "leaves": {path: [str(x.dtype), *map(int, x.shape)] for path, x in leaves.items()},
        "content": {path: content_of(leaves[path]) for path in shown},
        **({"under": under} if (under := _under(base)) else {}),
    }


def _under(base: PyTree) -> list[dict[str, str]]:
    """Return the contents of the frozen adapters on a base, the last one first."""
    found = adapters_under(LoraParams(base, None))
    return [{name: checksum(x) for name, x in arrays_of(adapter).items()} for adapter in found]


def content_of(x: Any) -> str:
    return checksum(plain_array(x))


def check_base(record: Any, params: PyTree, where: str) -> None:
    """Raise unless ``params`` are the parameters that an adapter was trained on.

    Raises:
        ValueError: a leaf that is adapted is not there or has another shape, others are, or the
            contents differ where they are known.
    """
    if record is None:
        return
    leaves = arrays_in(without_adapters(params))
    if (known := record.get("under", [])) and known != _under(params):
        raise ValueError(
            f"{where} is of an adapter that was trained on top of another, frozen one, which "
            "params has not. Load that one first: load(path, load(path_of_the_first, params))"
        )
    others = not_parameters(without_adapters(params)).keys()
    # Earlier records have all leaves of the base.
    others |= random_in({path: dtype for path, (dtype, *_) in record["leaves"].items()}).keys()
    wanted = {path: known for path, known in record["leaves"].items() if path not in others}
    for path, (_, *shape) in wanted.items():
        if path not in leaves:
            raise ValueError(
                f"{where} is an adapter of another model: its base had a leaf {path!r}. Nearest "
                f"here: {nearest(path, leaves)}"
            )
        if tuple(shape) != tuple(leaves[path].shape):
            raise ValueError(
                f"{where} is an adapter of another model: there {path!r} has shape {tuple(shape)}, "
                f"here {tuple(leaves[path].shape)}"
            )
    if more := leaves.keys() - wanted.keys() - others:
        raise ValueError(
            f"{where} is an adapter of another model, without the leaves {sorted(more)[:5]}"
        )
    for path, known in record["content"].items():
        if path not in others and (found := content_of(leaves[path])) != known:
            raise ValueError(
                f"{where} was trained on other weights: {path!r} has the contents {found}, "
                f"expected {known}. An initializer such as PiSSA changes the base: pass that one, "
                "or turn the adapter into plain LoRA by lora_jax.algebra.to_plain before it is "
                "saved"
            )
    for path, (dtype, *_) in wanted.items():
        if dtype != str(leaves[path].dtype) and path not in record["content"]:
            warnings.warn(
                f"{where} was trained on a base of another precision: {path!r} was {dtype} and is "
                f"{leaves[path].dtype} here",
                stacklevel=4,
            )
            break


def _stored(entry: Mapping[str, Any]) -> list[str]:
    """Return the fields of an entry that are stored; the norm belongs to the base."""
    left_out = {"norm"} if entry["dora"] else {"norm", "magnitude"}
    return [name for name in Factors.FIELDS if name not in left_out]


def names_in(record: Any) -> list[str]:
    """Return the names of the arrays that a record lists."""
    names = [f"{path}.{name}" for path in record.get("rows", ()) for name in Rows.FIELDS]
    for key, entry in record["factors"].items():
        names += [f"{key}.{name}" for name in _stored(entry)]
    return names + [f"{path}.full" for path in record["full"]]


def adapter_of(
    record: Any, arrays: Mapping[str, Any], where: str, *, finite: bool = True
) -> Adapter:
    """The adapter that arrays and a checked record make.

    Raises:
        ValueError: arrays are missing, too many, of shapes that do not fit, or not finite.
    """
    wanted = names_in(record)
    if sorted(wanted) != sorted(arrays):
        missing, extra = set(wanted) - set(arrays), set(arrays) - set(wanted)
        raise ValueError(
            f"{where}: the arrays are not those of its record: without {sorted(missing)[:5]}, and "
            f"with {sorted(extra)[:5]}"
        )
    for name in wanted:
        x = arrays[name]
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{where}: {name!r} is of type {x.dtype}, expected floating numbers")
        if finite and not jnp.isfinite(x).all():
            raise ValueError(
                f"{where}: {name!r} has values that are not finite. To load it all the same: "
                "finite=False"
            )
    entries: dict[str, Any] = {}
    for key, entry in record["factors"].items():
        fields = {name: arrays[f"{key}.{name}"] for name in _stored(entry)}
        a, b, scale = (fields[name] for name in ("a", "b", "scale"))
        _check_shapes(key, a, b, scale, entry, where)
        if (old := _OLD_ROWS.fullmatch(key)) and entry["layout"].count("i") == 1:
            entries[old["path"]] = _rows_of_version_1(key, a, b, scale, entry["layout"], where)
            continue
        about = {"frozen": tuple(entry["frozen"]), "residual": entry["residual"]}
        entries[key] = Factors(**fields, layout=entry["layout"], **about)
    for path, entry in record.get("rows", {}).items():
        b, scale = arrays[f"{path}.b"], arrays[f"{path}.scale"]
        f = Rows(b, scale, entry["layout"], tuple(entry["ids"]), entry["vocabulary"])
        if not f.weight_shape or b.shape[0] != f.rank or scale.shape != ():
            raise ValueError(
                f"{where}: the rows of {path!r} have shapes b {tuple(b.shape)} and scale "
                f"{tuple(scale.shape)}, which do not fit {f.rank} rows and layout {f.layout!r}"
            )
        entries[path] = f
    return Adapter(entries, {path: arrays[f"{path}.full"] for path in record["full"]})


def _rows_of_version_1(key: str, a: Any, b: Any, scale: Any, layout: str, where: str) -> Rows:
    """Read table rows as version 1 stored them: ids in the key, and a dense one-hot ``a``."""
    ids = tuple(map(int, _OLD_ROWS.fullmatch(key)["ids"].split(", ")))  # pyright: ignore
    rows = Rows(b, scale, layout, ids, a.shape[0])
    if a.ndim != 2 or max(ids) >= len(a) or not np.array_equal(a, rows.a):
        raise ValueError(f"{where}: the factors of {key!r} are not those of these rows")
    return rows


def _check_shapes(key: str, a: Any, b: Any, scale: Any, entry: Any, where: str) -> None:
    letters, rank = entry["layout"], entry["rank"]
    batch, inputs, outputs = (letters.count(role) for role in "bio")
    sizes = {"b": a.shape[:batch], "i": a.shape[batch:-1], "o": b.shape[batch + 1 :]}
    counts = tuple(len(sizes[role]) for role in "bio")
    expected = None
    if counts == (batch, inputs, outputs) and scale.shape == ():
        left = {role: iter(n) for role, n in sizes.items()}
        expected = factor_shapes(letters, [next(left[letter]) for letter in letters], rank)
    if expected != (tuple(a.shape), tuple(b.shape)):
        raise ValueError(
            f"{where}: the factors of {key!r} have shapes a {tuple(a.shape)}, b {tuple(b.shape)} "
            f"and scale {tuple(scale.shape)}, which do not fit rank {rank} and layout {letters!r}"
        )


def on_base(adapter: Adapter, record: Any, params: PyTree | None, where: str) -> Any:
    """Return the adapter, or a LoraParams of the parameters once they are found to be its base."""
    if params is None:
        return adapter
    if isinstance(params, LoraParams) and not (record["base"] or {}).get("under"):
        raise TypeError(
            f"{where}: params is a LoraParams, expected its base, the plain parameters, on which "
            "this adapter was trained. To put it on top of another adapter all the same: "
            "LoraParams(lora_params, load(path))"
        )
    theirs = [path for path in (*adapter.factors, *adapter.full) if path.endswith("/weight")]
    if theirs and not {*theirs} & arrays_in(params).keys():
        raise ValueError(
            f"{where} has names and axes of PyTorch, such as {theirs[0]!r}. Load PEFT's folder by "
            "peft.load(folder, params), or convert it --like PATH that orbax.save_params wrote"
        )
    check_base(record["base"], params, where)
    lora_params = LoraParams(params, adapter)
    check(lora_params)
    return with_norms(lora_params)


def to_host(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Copy arrays from any devices to the host's memory.

    Raises:
        ValueError: an array is spread over several processes.
    """
    found = {}
    for name, x in arrays.items():
        if not getattr(x, "is_fully_addressable", True):
            raise ValueError(
                f"{name!r} is spread over several processes, and one file is written by one: "
                "replicate it first, or save with lora_jax.io.orbax"
            )
        found[name] = np.asarray(x)
    return found
