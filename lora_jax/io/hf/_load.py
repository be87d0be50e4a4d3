"""Read a model into a tree of parameters."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import is_concrete
from lora_jax._weights.paths import PyTree, flatten, not_parameters
from lora_jax.io import _torch as torch_names
from lora_jax.io._tensor import Progress, counted
from lora_jax.io.hf._families import Family, family_of
from lora_jax.io.hf._names import TensorNames
from lora_jax.io.hf._rest import in_files
from lora_jax.io.hf._source import open_source


def load(
    folder: str | os.PathLike[str],
    like: PyTree,
    family: str | Family | None = None,
    *,
    names: torch_names.Names = None,
    kinds: Mapping[str, str] | None = None,
    layout: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    ignore: str | None = None,
    new: str | None = None,
    progress: Progress = None,
) -> PyTree:
    """Read the weights of a model into a tree of parameters, one tensor at a time.

    Args:
        folder: a folder with ``config.json`` and ``model.safetensors``, or several files and their
            index; or a GGUF file, whose quantized weights are dequantized (extra ``gguf``).
        like: a tree of arrays or ``jax.ShapeDtypeStruct``s, such as
            ``jax.eval_shape(model.init, ...)["params"]``, with the shapes and dtypes of the
            result. A leaf with a sharding is loaded with it. PRNG keys and their counters stay as
            they are here, and so does what else is no parameter, unless ``names`` names it.
        family: how the tensors are named: a name in :data:`FAMILIES`, or a :class:`Family`. None
            takes the ``model_type`` of ``config.json``.
        names: replaces the family's: the name of a module in the files, by its path here, as in
            :func:`lora_jax.io.peft.save`.
        kinds: replaces the family's, as in :func:`lora_jax.io.peft.save`.
        layout: replaces the family's, as in ``lorafy``, for leaves whose names do not tell their
            axes.
        tied: replaces the family's: for tensors that the files may leave out, the tensor that each
            equals, such as ``{"lm_head.weight": "model.embed_tokens.weight"}``.
        ignore: replaces the family's: a regular expression of tensors that may be left over.
        new: a regular expression of leaves that the files do not have, such as a head to be
            trained: they stay as they are in ``like``.
        progress: called with the bytes read so far, and their total.

    Returns:
        The parameters.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged; the model is quantized, or its family unknown; tensors are
            missing, left over, or of another shape.
        UserWarning: a leaf that is no parameter stays as it is, other than PRNG keys and counters.

    Example:
        >>> import jax.numpy as jnp, tempfile
        >>> from lora_jax.io import hf
        >>> params = {"query": {"kernel": jnp.arange(6.0).reshape(3, 2)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf.save(f"{folder}/model", params)
        ...     hf.load(f"{folder}/model", params, hf.Family())["query"]["kernel"].shape
        (3, 2)
    """
    source = open_source(folder)
    changes = {"names": names, "kinds": kinds, "layout": layout, "tied": tied, "ignore": ignore}
    known = family_of(source.config, source.where, family, **changes)
    leaves, tree = flatten(like)
    there = in_files(leaves, not_parameters(like), known, source, "hf.load", stacklevel=3)
    found = TensorNames(there, known, source, new)
    stored = [path for path in found.places.places if path not in found.new]
    used = [name for path in stored for _, name in found.parts(path)]
    total = sum(source.tensors[name].nbytes for name in used)
    tensors = counted({name: source.tensors[name] for name in used}, total, progress)
    wanted = {path: found.leaf(path, tensors) for path in stored}
    found.left_over(used)
    result = [
        _on_device(wanted[path].read(), leaf)
        if path in wanted
        else _kept(path, leaf, "new" if path in found.new else "like")
        for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(tree, result)


def _kept(path: str, leaf: Any, argument: str) -> Any:
    """Return a leaf that the files do not have; like must have its entries."""
    if not is_concrete(leaf):
        raise ValueError(
            f"{argument}: {path!r} is to stay as it is in like, which has its shape only: put an "
            "array there, such as model.init(...) makes"
        )
    return leaf


def _on_device(x: np.ndarray, leaf: Any) -> jax.Array:
    """Put an array where the leaf of like is."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        return jnp.asarray(x)
    if not sharding.is_fully_addressable:  # every process has read all of it: no need to compare
        return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    return jax.device_put(x, sharding)
