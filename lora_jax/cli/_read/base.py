"""The leaves of the model that an adapter is for, as far as they are known."""

import functools
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Factors
from lora_jax._adapter.params import Adapter
from lora_jax._weights.axes import factor_shapes
from lora_jax._weights.layouts import Layouts, Weight
from lora_jax._weights.ranges import rows_of, split_range
from lora_jax.cli._read.forms import AdapterFile, Checkpoint
from lora_jax.cli._read.path import open_path
from lora_jax.io._tensor import Tensor
from lora_jax.io._torch import Kind

CONV1D = r".*/(c_attn|c_proj|c_fc|q_attn)/weight"  # GPT-2's layers that are stored transposed


class Absent(Tensor):
    """A leaf whose path, shape and dtype are known, but not its entries."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: Any):
        super().__init__(shape, dtype, functools.partial(_needed, path))


def _needed(path: str) -> NoReturn:
    raise ValueError(
        f"this needs what is in the base's {path!r}: say --like, the model's folder or an "
        "Orbax checkpoint of its parameters"
    )


def leaves_like(path: str) -> dict[str, Any]:
    """The leaves of a model, or of the base that an adapter has recorded.

    Raises:
        ValueError: the adapter has not.
    """
    found = open_path(path)
    if isinstance(found, Checkpoint):
        return leaves_of(found)
    if (recorded := recorded_leaves(found)) is None:
        raise ValueError(
            f"--like {path}: it is an adapter without a record of its base; expected a model, or "
            "an adapter of lora_jax that was saved as a LoraParams"
        )
    return recorded


def leaves_of(model: Checkpoint) -> dict[str, Any]:
    """The tensors of a model by paths: dots are slashes."""
    if model.format == "orbax":
        return dict(model.tensors)
    return {name.replace(".", "/"): tensor for name, tensor in model.tensors.items()}


def recorded_leaves(found: AdapterFile) -> dict[str, Any] | None:
    """The leaves of the base of an adapter of ours, if it says them."""
    record = found.native and found.native[1]["base"]
    if not record:
        return None
    said = record["leaves"].items()
    return {path: Absent(path, tuple(shape), jnp.dtype(dtype)) for path, (dtype, *shape) in said}


class UnknownBaseError(ValueError):
    """An adapter does not say what its base is like, and that matters."""


def adapted_leaves(adapter: Adapter, *, whole: bool = False) -> dict[str, Any]:
    """The leaves that an adapter is of, as itself tells; with ``whole``, those trained whole too.

    Raises:
        UnknownBaseError: it does not.
    """
    parts = [key for key in adapter.factors if rows_of(key) or split_range(key)[1] is not None]
    parts += [] if whole else adapter.full
    if parts:
        raise UnknownBaseError(
            f"the adapter has no record of its base, and without {parts[0]!r} means nothing here: "
            "say --like, the model's folder, an Orbax checkpoint of its parameters, or another "
            "adapter of it; or save it as a LoraParams"
        )
    found = {path: Absent(path, shape_of(f), f.a.dtype) for path, f in adapter.factors.items()}
    return found | {path: Absent(path, x.shape, x.dtype) for path, x in adapter.full.items()}


def shape_of(f: Factors) -> tuple[int, ...]:
    """The shape of the weight that factors are of."""
    batch, inputs = f.layout.count("b"), f.layout.count("i")
    sizes = {
        "b": iter(f.a.shape[:batch]),
        "i": iter(f.a.shape[batch : batch + inputs]),
        "o": iter(f.b.shape[batch + 1 :]),
    }
    shape = tuple(next(sizes[letter]) for letter in f.layout)
    assert factor_shapes(f.layout, shape, f.rank) == (tuple(f.a.shape), tuple(f.b.shape))
    return shape


def with_stand_ins(leaves: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The leaves as ``peft.save`` takes them.

    Absent weights with DoRA are zeros: their norms are of no use where all of them is adapted.
    Tables with rows are arrays, not to be read when they are asked for.
    """
    found = dict(leaves)
    for key, f in adapter.factors.items():
        table = key.partition("[[")[0]
        if f.magnitude is not None and isinstance(found.get(key), Absent):
            found[key] = np.broadcast_to(np.zeros((), np.float32), found[key].shape)
        elif rows_of(key) and table in found:
            found[table] = jnp.asarray(np.asarray(found[table]))
    return found


def is_torch(adapter: Adapter) -> bool:
    """Whether weights are as PyTorch keeps them, ``[out, in]`` under the name ``weight``."""
    return any(
        path.endswith("/weight") and f.layout in ("oi", "oii", "oiii", "oiiii")
        for path, f in adapter.factors.items()
    )


def torch_forms(
    leaves: Mapping[str, Any], letters: Mapping[str, str], kinds: Mapping[str, str]
) -> tuple[Layouts, dict[str, str]]:
    """Layouts and kinds of leaves as PyTorch keeps them.

    Args:
        leaves: by path.
        letters: of those that are known.
        kinds: of those that are known.
    """
    weights, found = {}, {re.escape(path): kind for path, kind in kinds.items()}
    for path, leaf in leaves.items():
        own = letters.get(path)
        if own is None and len(leaf.shape) > 1:
            own = "o" + "i" * (len(leaf.shape) - 1)
        kind: Kind | None = None
        if own is not None and path.endswith("/weight") and path not in kinds:
            is_conv1d = re.fullmatch(CONV1D, path) is not None
            kind = "Linear" if own == "oi" else "Conv1D" if is_conv1d else "Embedding"
            kind = "Conv" if own.startswith("oii") else kind
            found[re.escape(path)] = kind
        use = "embedding" if kinds.get(path, kind) == "Embedding" else "dot"
        weights[path] = Weight(tuple(leaf.shape), leaf.dtype, own, use, (), None)
    return Layouts(weights), found
