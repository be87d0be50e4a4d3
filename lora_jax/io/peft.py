"""Adapters as PEFT writes and reads them: a folder with a configuration and a safetensors file.

Only this module and its ``_peft_*`` parts know PEFT's names and axes.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._convert import to_plain
from lora_jax._layout import Layouts, Weight
from lora_jax._params import LoraParams, check
from lora_jax._paths import PyTree, flatten
from lora_jax.io import _files as files
from lora_jax.io._peft_config import check as check_config
from lora_jax.io._peft_config import is_target_parameter, refused_by_vllm
from lora_jax.io._peft_layers import EMBEDDING, PREFIX, TOKENS, wrapped
from lora_jax.io._peft_read import Reader
from lora_jax.io._peft_write import to_files
from lora_jax.io._torch import Map, Names, module_path

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PARAMETER_ORDER = ("gate_up_proj", "down_proj")  # in which experts register their parameters
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
    for_vllm: bool = False,
    overwrite: bool = False,
) -> None:
    r"""Write an adapter as a folder that PEFT and vLLM read.

    ``PeftModel.from_pretrained(model, path)`` of the PyTorch model with the same weights then
    computes what ``lora(fn)`` computes here.

    Args:
        path: of the folder, in one that exists.
        lora_params: what to write. What trains whole goes where PEFT keeps it: biases, whole
            modules (``modules_to_save``), rows of tables.
        initial: where the initializer changed the base (PiSSA, OLoRA, LoftQ, ...), the LoraParams
            before training: what is written is then plain LoRA, of twice the rank, on ``params``.
        params: the parameters that ``lorafy`` was given, with ``initial``.
        names: the name of a module there, by the path of it here: ``{pattern: template}``, such as
            ``{r"layers_(\d+)/attn/query": r"model.layers.\1.self_attn.q_proj"}``, or a function.
            Patterns are regular expressions, matched in full; the first one counts. In a template
            ``{layer}`` stands for the number of a layer, of leaves that have the layers stacked in
            front, and ``{expert}`` likewise. None: the path with dots for slashes.
        kinds: where the axes leave a doubt, ``{pattern of the leaf: kind}``, of ``"Linear"``,
            ``"Conv1D"`` (GPT-2's), ``"Conv"``, ``"Embedding"`` and ``"Parameter"`` (experts).
        layout: as in ``lorafy``, for leaves that train whole; that of ``layout_of`` knows the
            kinds as well.
        base_model: the name or folder of the model, for the configuration.
        task_type: such as ``"CAUSAL_LM"``, for the configuration.
        rslora: whether the configuration is to say ``use_rslora``; the function is the same.
        parameter_order: the order in which modules there register their parameters, where several
            of one module are adapted.
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
    if (initial is None) != (params is None):
        raise ValueError("peft.save: initial and params go together: one of them is None")
    if initial is not None:
        lora_params = to_plain(lora_params, initial, params)
    places = Map(check(lora_params), names, kinds, layout)
    tensors, config = to_files(
        lora_params,
        places,
        parameter_order,
        rslora=rslora,
        base_model_name_or_path=base_model and os.fspath(base_model),
        task_type=task_type,
    )
    if for_vllm and (refused := refused_by_vllm(config, tensors)):
        raise ValueError("peft.save: vLLM would refuse this adapter: " + "; ".join(refused))
    with files.written_aside(path, overwrite=overwrite, owns=_OURS) as partial:
        partial.mkdir()
        files.write_tensors(partial / TENSORS, tensors, {"format": "pt"})
        files.write_json(partial / CONFIG, config)
        if (card := Path(path) / "README.md").exists():
            shutil.copyfile(card, partial / card.name)  # of the adapter that is replaced


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
        path: of the folder.
        params: the parameters of the same model.
        names: as in :func:`save`.
        kinds: as in :func:`save`.
        layout: as in ``lorafy``.
        parameter_order: as in :func:`save`.
        finite: whether to refuse values that are not.

    Returns:
        A LoraParams of ``params``, with float32 factors. Layers that are stacked here have one
        rank, the largest of theirs: where it was less, the factors are zero.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged, or asks for what cannot be read exactly; tensors are
            missing, left over, or of shapes that do not fit.
    """
    if isinstance(params, LoraParams):
        raise TypeError(
            "peft.load: params is a LoraParams, expected its base, the plain parameters"
        )
    places = Map(flatten(params)[0], names, kinds, layout)
    return reader(path, places, parameter_order, finite=finite).read(params)


def reader(
    path: str | os.PathLike[str],
    places: Map,
    parameter_order: tuple[str, ...] = PARAMETER_ORDER,
    *,
    finite: bool = True,
) -> Reader:
    """The files of an adapter, checked as far as they can be alone."""
    folder = Path(path)
    config = check_config(files.read_json(_config(folder)), str(folder / CONFIG))
    with files.open_tensors(folder / TENSORS) as file:
        tensors = dict(file)
    for name, x in tensors.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{folder}: {name!r} is of type {x.dtype}, expected floating numbers")
        if finite and not np.isfinite(x.astype(np.float32)).all():
            raise ValueError(
                f"{folder}: {name!r} has values that are not finite. To load it all the same: "
                "finite=False"
            )
    return Reader(str(folder), config, tensors, places, parameter_order)


def forms_of(
    path: str | os.PathLike[str], leaves: Mapping[str, Any], *, is_conv1d: bool
) -> tuple[Layouts, dict[str, str]]:
    """The layouts and kinds of PyTorch's own tensors, by paths, as an adapter's files tell them."""
    folder = Path(path)
    config = check_config(files.read_json(_config(folder)), str(folder / CONFIG))
    with files.open_tensors(folder / TENSORS) as file:
        shapes = {name.removeprefix(PREFIX): shape for name, shape in file.shapes.items()}
    marks = (f".{EMBEDDING[0]}", f".{TOKENS}")
    tables = {name.removesuffix(mark) for name in shapes for mark in marks if name.endswith(mark)}
    modules = {module_path(own)[0].replace("/", ".") for own in leaves}
    parameters = {name for name in modules if is_target_parameter(config, name)}
    weights, kinds = {}, {".*/(c_attn|c_proj|c_fc|q_attn)/weight": "Conv1D"} if is_conv1d else {}
    for own, leaf in leaves.items():
        module, letters, kind = module_path(own)[0].replace("/", "."), None, "dot"
        if module in tables:
            letters, kind = "io", "embedding"
        elif module in parameters and len(leaf.shape) == 3:
            wrapper = wrapped(module, parameters, PARAMETER_ORDER)
            letters, kind = _letters_of_experts(module, leaf.shape, wrapper, shapes), "ragged"
        elif len(leaf.shape) == 2:
            letters = "io" if any(re.fullmatch(k, own) for k in kinds) else "oi"
        elif len(leaf.shape) > 2:
            letters, kind = "o" + "i" * (len(leaf.shape) - 1), "conv"
        weights[own] = Weight(tuple(leaf.shape), leaf.dtype, letters, kind, (), None)
    return Layouts(weights), kinds


def _letters_of_experts(
    name: str, shape: tuple[int, ...], wrapper: str, shapes: Mapping[str, Any]
) -> str:
    """Which of the two axes is read: that which ``lora_A`` has."""
    of_a, of_b = (shapes.get(f"{wrapper}.lora_{factor}.weight", ()) for factor in "AB")
    fits = [
        letters
        for letters, (inputs, outputs) in (("boi", shape[:0:-1]), ("bio", shape[1:]))
        if (of_a[1:], of_b[:1]) == ((inputs,), (outputs,))
    ]
    if len(fits) != 1:
        raise ValueError(
            f"the parameter {name!r} of shape {shape} is square, or its factors do not fit it: "
            "which of its axes is read cannot be told. Load the adapter with peft.load and layout="
        )
    return fits[0]


def _config(folder: Path) -> Path:
    for name in (CONFIG, TENSORS):
        if (folder / name).exists():
            continue
        if name == TENSORS and (folder / "adapter_model.bin").exists():
            raise ValueError(
                f"{folder} holds adapter_model.bin, a pickle, which could run anything when it is "
                "read. In PEFT: PeftModel.from_pretrained(...).save_pretrained(folder) writes "
                f"{TENSORS}"
            )
        inside = [p.parent.name for p in folder.glob(f"*/{CONFIG}")] if folder.is_dir() else []
        hint = (
            f": an adapter with a name of its own is in a folder within: {inside}" if inside else ""
        )
        raise FileNotFoundError(f"{folder} holds no {name}{hint}")
    return folder / CONFIG
