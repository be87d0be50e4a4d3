"""Write an adapter as PEFT does."""

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._adapter.factors import Rows
from lora_jax._adapter.norms import squared_norm
from lora_jax._adapter.params import Adapter, LoraParams, check
from lora_jax._weights.paths import PyTree
from lora_jax._weights.ranges import part_of
from lora_jax.algebra._plain import to_plain
from lora_jax.io import _files as files
from lora_jax.io._state import left_out
from lora_jax.io._torch import Map, Names
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._axes import PARAMETER_ORDER, PREFIX, ROWS, TIED, Part, to_peft, wrappers
from lora_jax.io.peft._config import CONFIG, TENSORS, refused_by_vllm
from lora_jax.io.peft._factors import written_factors
from lora_jax.io.peft._full import written_full
from lora_jax.io.peft._join import joined
from lora_jax.io.peft._rows import written_rows
from lora_jax.io.peft._uniform import uniform as made_uniform

_WAY = (
    "Merge it, lora_jax.merge, and save the model, hf.save; or adapt other weights. If the model "
    "there has no head for tokens, pass task_type=, such as 'SEQ_CLS' or 'FEATURE_EXTRACTION'"
)
_OURS = (TENSORS, CONFIG, "README.md")


def save(
    path: str | os.PathLike[str],
    lora_params: LoraParams,
    *,
    initial: LoraParams | None = None,
    params: PyTree = None,
    names: Names = None,
    kinds: Mapping[str, str] | None = None,
    layout: Mapping[str, str] | None = None,
    base_model: str | os.PathLike[str] | None = None,
    task_type: str | None = None,
    rslora: bool = False,
    parameter_order: tuple[str, ...] = PARAMETER_ORDER,
    uniform: bool = False,
    for_vllm: bool = False,
    overwrite: bool = False,
) -> None:
    r"""Write an adapter as a folder that PEFT and vLLM read.

    ``PeftModel.from_pretrained(model, path)`` of the PyTorch model with the same weights then
    computes what ``lora(fn)`` computes here.

    Args:
        path: the folder to write, in one that exists.
        lora_params: the adapter and its base. Full leaves and rows of tables go where PEFT keeps
            them: biases, ``modules_to_save``, ``trainable_token_indices``.
        initial: the LoraParams before training, if the initializer changed the base (PiSSA, OLoRA,
            LoftQ, ...). Plain LoRA of twice the rank, on ``params``, is then written.
        params: the parameters that ``lorafy`` was given, with ``initial``.
        names: the name of a module there, by the path of it here: ``{pattern: template}``, such as
            ``{r"layers_(\d+)/attn/query": r"model.layers.\1.self_attn.q_proj"}``, or a function.
            Patterns are regular expressions, matched in full; the first one counts. In a template
            ``{layer}`` is replaced by the number of the layer, for leaves that have the layers
            stacked, and ``{expert}`` likewise. A list of templates names the modules along the
            axis in front, such as ``{"kv_einsum": ["k_proj", "v_proj"]}``; patterns with ranges
            name parts of a weight, ``{"qkv[:, 0:768]": "q_proj", "qkv[:, 768:]": "kv_proj"}``.
            None: the path with dots for slashes.
        kinds: ``{pattern of the leaf: kind}``, for leaves whose axes leave a doubt. A kind is
            ``"Linear"``, ``"Conv1D"`` (GPT-2's), ``"Conv"``, ``"Embedding"`` or ``"Parameter"``
            (experts, or a matrix, that a module has as parameters of their own).
        layout: as in ``lorafy``, for full leaves; a layout from ``layout_of`` knows the kinds too.
            The first ``b`` is the axis of ``{layer}``; vectors of layers along another axis than
            the first have a layout as well, ``{".*scale": "ob"}``.
        base_model: the name or folder of the model, for the configuration.
        task_type: such as ``"CAUSAL_LM"``, for the configuration.
        rslora: whether the configuration sets ``use_rslora``; the function is the same.
        parameter_order: the order in which modules there register their parameters, for modules
            of which several are adapted.
        uniform: whether all modules get one rank, the largest, by zeros, and scale 1, their own
            being in B. llama.cpp and SGLang read one rank and one scale for all modules: other
            adapters load there, and are scaled wrong.
        for_vllm: whether to refuse what vLLM would.
        overwrite: whether an existing adapter may be replaced.

    Raises:
        TypeError: ``lora_params`` is not a LoraParams.
        ValueError: something in it has no name, no form in PEFT, or no exact one.
        OSError: it cannot be written; FileExistsError without ``overwrite``.

    References:
        PEFT 0.21 and vLLM 0.33; the formats were checked by running them.
    """
    if not isinstance(lora_params, LoraParams):
        raise TypeError(f"peft.save: expected a LoraParams, got {type(lora_params).__name__}")
    if isinstance(lora_params.base, LoraParams):
        raise ValueError(
            "peft.save: under this adapter is a frozen one, and PEFT activates both. Save each in "
            "a folder of its own: peft.save(one, lora_params.base), peft.save(other, "
            "LoraParams(lora_params.base.base, lora_params.adapter)); or save the model, "
            "hf.save(folder, lora_params)"
        )
    if (initial is None) != (params is None):
        raise ValueError("peft.save: initial and params go together: one of them is None")
    if uniform and rslora:
        raise ValueError(
            "peft.save: uniform=True has one scale, which readers that know one take for "
            "alpha / rank, and rslora=True divides by its root: leave out one of the two. The "
            "function is the same"
        )
    if initial is not None:
        lora_params = to_plain(lora_params, initial, params)
    adapter, leaves = lora_params.adapter, check(lora_params).leaves
    places = places_of(adapter, leaves, names, kinds, layout)
    if found := left_out(lora_params.base, lora_params.adapter.full):
        warnings.warn(
            f"peft.save: {found}. PEFT's files have no room for them: save them by "
            "lora_jax.io.safetensors or orbax, which take state=; a base of parameters alone, as "
            "of nnx.split(model, nnx.Param, ...), does not warn",
            stacklevel=2,
        )
    check_has_factors(adapter)
    has_head = configs.has_head({"task_type": task_type})
    if (table := tied_table(adapter, places, has_head)) is not None:
        raise ValueError(TIED.format(verb="save", path=table, way=_WAY))
    tensors, config = files_of(
        adapter,
        places,
        parameter_order,
        uniform=uniform,
        rslora=rslora,
        base_model=base_model,
        task_type=task_type,
    )
    write(path, tensors, config, for_vllm=for_vllm, overwrite=overwrite)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    *,
    for_vllm: bool,
    overwrite: bool,
) -> None:
    """Write the files of an adapter: all of them, or none."""
    if for_vllm and (refused := refused_by_vllm(config, tensors)):
        raise ValueError("peft.save: vLLM would refuse this adapter: " + "; ".join(refused))
    with files.written_aside(path, overwrite=overwrite, owns=_OURS) as partial:
        partial.mkdir()
        files.write_tensors(partial / TENSORS, tensors, {"format": "pt"})
        files.write_json(partial / CONFIG, config)
        if (card := Path(path) / "README.md").exists():
            shutil.copyfile(card, partial / card.name)  # of the adapter that is replaced


def places_of(
    adapter: Adapter,
    leaves: Mapping[str, Any],
    names: Names = None,
    kinds: Mapping[str, str] | None = None,
    layout: Mapping[str, str] | None = None,
) -> Map:
    """Find the places of all leaves; those that are adapted have the layouts of their factors."""
    factors = adapter.factors.items()
    own = {part_of(k, leaves).path: f.layout for k, f in factors if not isinstance(f, Rows)}
    return Map(leaves, names, kinds, layout, own)


def check_has_factors(adapter: Adapter) -> None:
    """Raise unless a weight has factors."""
    if all(isinstance(f, Rows) for f in adapter.factors.values()):
        raise ValueError(
            "peft.save: no weight has factors, and PEFT has no adapter without. Save the "
            "parameters themselves"
        )


def tied_table(adapter: Adapter, places: Map, has_head: bool | None) -> str | None:
    """Find an adapted table that is, or may be, a head as well; but for rows: PEFT ties those."""
    found = [
        part_of(k, places.leaves).path
        for k, f in adapter.factors.items()
        if not isinstance(f, Rows)
    ]
    found += adapter.full
    return next((path for path in found if places.is_tied(path, has_head)), None)


def files_of(
    adapter: Adapter,
    places: Map,
    order: tuple[str, ...] = PARAMETER_ORDER,
    *,
    uniform: bool = False,
    rslora: bool = False,
    base_model: str | os.PathLike[str] | None = None,
    task_type: str | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Make the tensors by name, and the configuration; the settings are those of :func:`save`."""
    modules, rows = _modules(adapter, places)
    modules = made_uniform(modules) if uniform else modules
    own = {name: _named(part, places) for name, part in modules.items()}
    parameters = [own[name] for name, part in modules.items() if part.kind == "Parameter"]
    wrapper = wrappers(parameters, order)
    tensors = {f"{module}.{ROWS}": new for module, (_, new) in rows.items()}
    for name, part in modules.items():
        for role, x in to_peft(part).items():
            tensors[f"{wrapper.get(own[name], name)}.{role}"] = x
    turned = next((part for part in modules.values() if part.kind == "Conv1D"), None)
    if turned and parameters:
        raise ValueError(
            f"peft.save: {turned.key!r} is of a Conv1D and {parameters[0]!r} is a Parameter, and "
            "PEFT takes no adapter of both. Write the first as a parameter, too: its name with "
            f"'.weight' in names=, and kinds={{{turned.place.path!r}: 'Parameter'}}"
        )
    saved, bias, full = written_full(adapter.full, places, modules)
    tensors |= full
    config = configs.write(
        {own[name]: (part.rank, part.scale) for name, part in modules.items()},
        parameters,
        places.modules(),
        all_named=places.all_named,
        bias=bias,
        fan_in_fan_out=turned is not None,
        modules_to_save=saved or None,
        trainable_token_indices={module: ids for module, (ids, _) in rows.items()} or None,
        use_dora=_is_dora(modules),
        rslora=rslora,
        base_model_name_or_path=base_model and os.fspath(base_model),
        task_type=task_type,
    )
    return {PREFIX + name: x for name, x in tensors.items()}, config


def _modules(
    adapter: Adapter, places: Map
) -> tuple[dict[str, Part], dict[str, tuple[list[int], np.ndarray]]]:
    """Write the factors of every module, and the rows of every table: their numbers, and them."""
    parts: dict[str, list[Part]] = {}
    rows = {}
    for key, f in adapter.factors.items():
        path, ranges = part_of(key, places.leaves)
        if f.residual:
            raise ValueError(
                f"peft.save: {key!r} belongs to what its initializer left of the base, and PEFT "
                "would add it to the model's own weights. To write it as plain LoRA on those, pass "
                "initial= and params=, as for lora_jax.algebra.to_plain"
            )
        if isinstance(f, Rows):
            module, new = written_rows(f, path, places)
            rows[module] = list(f.ids), new
            continue
        for part in written_factors(key, f, path, ranges, places):
            parts.setdefault(part.place.module, []).append(part)
    return {name: joined(found, _norm(found, places)) for name, found in parts.items()}, rows


def _named(part: Part, places: Map) -> str:
    """Name what PEFT adapts: a module, or a parameter."""
    return places.parameter(part.place) if part.kind == "Parameter" else part.place.module


def _norm(parts: list[Part], places: Map) -> np.ndarray:
    """Find the norms of the columns of a module's weight, if magnitudes need them."""
    if all(part.magnitude is None for part in parts):
        return np.zeros(0)
    weight = jnp.asarray(places.array(parts[0].place))
    return np.asarray(np.sqrt(squared_norm(weight, parts[0].letters)))


def _is_dora(modules: Mapping[str, Part]) -> bool:
    with_it = [name for name, part in modules.items() if part.magnitude is not None]
    if with_it and len(with_it) < len(modules):
        without = sorted(modules.keys() - set(with_it))
        raise ValueError(
            f"peft.save: {with_it[0]!r} has a DoRA magnitude and {without[0]!r} has not: PEFT has "
            "DoRA of all modules or of none"
        )
    return bool(with_it)
