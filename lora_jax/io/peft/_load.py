"""Read an adapter that PEFT wrote."""

import os
import re
from collections.abc import Mapping

import jax

from lora_jax._adapter.norms import with_norms
from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._lorafy import lorafy
from lora_jax._weights.paths import PyTree, flatten, not_parameters
from lora_jax._weights.ranges import part_of
from lora_jax.algebra._plain import to_plain
from lora_jax.io._torch import Map, Names
from lora_jax.io.peft._axes import PARAMETER_ORDER
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._read import read
from lora_jax.io.peft._tied import with_own_heads


def load(
    path: str | os.PathLike[str],
    params: PyTree,
    *,
    names: Names = None,
    kinds: Mapping[str, str] | None = None,
    layout: Mapping[str, str] | None = None,
    parameter_order: tuple[str, ...] = PARAMETER_ORDER,
    finite: bool = True,
) -> LoraParams:
    """Read an adapter that PEFT wrote.

    Every tensor of it must have its place in ``params``, and every module that its configuration
    adapts must have its tensors. Adapters whose initializer changed the base (PiSSA, OLoRA), which
    PEFT repeats when it loads them, come as plain LoRA of twice the rank.

    Args:
        path: the folder.
        params: the parameters of the same model.
        names: as in :func:`save`.
        kinds: as in :func:`save`.
        layout: as in ``lorafy``.
        parameter_order: as in :func:`save`.
        finite: whether to refuse values that are not.

    Returns:
        A LoraParams of ``params``, with float32 factors. Layers that are stacked here have one
        rank, the largest of theirs: where it was less, the factors are zero. What trained with a
        module and is no parameter here, as the running statistics of a norm, is put into the base.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged, or asks for what cannot be read exactly; tensors are
            missing, left over, or of shapes that do not fit.
    """
    if isinstance(params, LoraParams):
        raise TypeError(
            "peft.load: params is a LoraParams, expected its base, the plain parameters"
        )
    folder = Folder.open(path, finite=finite, order=parameter_order)
    places = Map(flatten(params)[0], names, kinds, layout)
    contents = read(with_own_heads(folder, places), places)
    lora_params = _with_statistics(params, contents.adapter(places.leaves))
    check(lora_params)
    if contents.redone:
        lora_params = _plain(folder, lora_params, contents.redone, places)
    return with_norms(lora_params)


def _with_statistics(params: PyTree, adapter: Adapter) -> LoraParams:
    """Put those full leaves into the base that are no parameters, and must not train."""
    others = not_parameters(params).keys() & adapter.full.keys()
    if not others:
        return LoraParams(params, adapter)
    leaves, tree = flatten(params)
    new = {path: adapter.full[path].astype(leaves[path].dtype) for path in others}
    base = jax.tree.unflatten(tree, [new.get(path, x) for path, x in leaves.items()])
    full = {path: x for path, x in adapter.full.items() if path not in others}
    return LoraParams(base, Adapter(adapter.factors, full))


def _plain(
    folder: Folder, lora_params: LoraParams, redone: frozenset[str], places: Map
) -> LoraParams:
    """Make factors that start from the base plain ones, on the base as it is.

    Raises:
        ValueError: they are of a part of a stack, whose start cannot be repeated.
    """
    init = folder.config["init_lora_weights"]
    params, factors = lora_params.base, lora_params.adapter.factors
    parts = {key: part_of(key, places.leaves) for key in factors}
    keys = {key: part.path for key, part in parts.items() if part.path in redone}
    if ranged := [key for key in keys if parts[key].ranges]:
        raise folder.error(
            f"init_lora_weights={init!r} of a part of a stack, {ranged[0]!r}, cannot be repeated"
        )
    options = {
        re.escape(path): (f.rank, float(f.scale) * f.rank, f.layout)
        for path, f in ((path, factors[key]) for key, path in keys.items())
    }
    rank, alpha, layout = ({path: x[k] for path, x in options.items()} for k in range(3))
    initial = lorafy(params, rank, alpha=alpha, targets=list(rank), layout=layout, init=init)
    trained = LoraParams(initial.base, Adapter({key: factors[key] for key in keys}))
    plain = to_plain(trained, initial, params).adapter.factors
    return LoraParams(params, Adapter(factors | plain, lora_params.adapter.full))
