"""Families of models: how Hugging Face's files name and store what is at our paths.

A family covers the Flax models of ``transformers`` (``model/layers/0/self_attn/q_proj``), modules
that are numbered in Linen's way (``layers_0``), and stacked ones (``layers/self_attn/q_proj`` with
the layers in front).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.io._torch import Names, as_name
from lora_jax.io.hf._modules import (
    CLIP_BESIDE,
    CLIP_LAYER,
    DECODER,
    ENCODERS,
    GPT2,
    T5_LAYER,
    alone,
    beside,
    expanded,
    numbered,
)

# The tensors that files of many models hold beside their weights, and that code makes anew.
BUFFERS = r"(.*\.)?position_ids|(.*\.)?rotary_emb\.inv_freq|(.*\.)?h\.\d+\.attn\.(masked_)?bias"

# The dense layers that are stored [in, out], by path, and the models that have such layers.
CONV1D = r".*/(c_attn|c_proj|c_fc|q_attn)/\w+"
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


@dataclasses.dataclass(frozen=True)
class Family:
    r"""The names and axes that the parameters of a kind of model have in Hugging Face's files.

    Attributes:
        names: the name of a module there, by the path of it here: patterns to templates, such as
            ``{r"h_(\d+)/(.+)": r"transformer.h.\1.\2"}``, as in :func:`lora_jax.io.peft.save`.
            None: the paths with dots.
        kinds: the kinds of the modules there, as in :func:`lora_jax.io.peft.save`.
        prefix: the prefix that names lack in files of the model without a head: ``"model."``.
        tied: the tensors that share their numbers with another: ``{name: name of the other}``.
            They may be missing; if they are there, they must be equal to the other.
        tied_head: the same for an output head, if the configuration sets ``tie_word_embeddings``.
        ties_head: the default of ``tie_word_embeddings``.
        ignore: a regular expression of tensors that may be left over, as buffers always may.
        layout: the layouts of our weights, as in ``lorafy``, if their names do not tell.
    """

    names: Names = None
    kinds: Mapping[str, str] | None = None
    prefix: str = ""
    tied: Mapping[str, str] | None = None
    tied_head: Mapping[str, str] | None = None
    ties_head: bool = True
    ignore: str | None = None
    layout: Mapping[str, str] | None = None


def _named(root: str, stack: str, modules: tuple[str, str, str]) -> dict[str, str]:
    """Name the modules of a layer, those beside the layers, and those beside the root."""
    layer, others, heads = modules
    return numbered(root, stack, layer) | beside(root, others) | alone(heads)


def _encoder(root: str, tied: str = "") -> Family:
    """Make the family of BERT or a descendant, whose head ``tied`` may decode by the table."""
    names = _named(root, "encoder/layer", ENCODERS[root])
    head = {
        f"{tied}.decoder.weight": f"{root}.embeddings.word_embeddings.weight",
        f"{tied}.decoder.bias": f"{tied}.bias",
    }
    return Family(names, prefix=f"{root}.", tied_head=head if tied else None)


def _decoder(*, ties_head: bool) -> Family:
    """Make the family of Llama or a descendant."""
    names = _named("model", "layers", DECODER)
    head = {"lm_head.weight": "model.embed_tokens.weight"}
    return Family(names, prefix="model.", tied_head=head, ties_head=ties_head)


_BERT = _encoder("bert", "cls.predictions")

_ROBERTA = _encoder("roberta", "lm_head")

_DEBERTA = _encoder("deberta", "cls.predictions")

_T5 = Family(
    {
        rf"{side}/block[/_](\d+)/layer[/_](\d+)/{module}": (
            rf"{side}.block.\1.layer.\2.{as_name(module)}"
        )
        for side in ("encoder", "decoder")
        for module in expanded(T5_LAYER)
    }
    | alone(
        "{encoder,decoder}/{final_layer_norm,embed_tokens} shared lm_head classifier qa_outputs"
    )
    | alone("classification_head/{dense,out_proj}"),
    tied={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    tied_head={"lm_head.weight": "shared.weight"},
    ignore=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)

_GPT2 = Family(
    _named("transformer", "h", GPT2),
    kinds={CONV1D: "Conv1D"},
    prefix="transformer.",
    tied_head={"lm_head.weight": "transformer.wte.weight"},
)

_CLIP = Family(
    numbered("", "text_model/encoder/layers", CLIP_LAYER)
    | numbered("", "vision_model/encoder/layers", CLIP_LAYER)
    | alone(CLIP_BESIDE)
)

#: By the ``model_type`` of ``config.json``. Yours: ``hf.FAMILIES["mine"] = hf.Family({...})``.
FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "clip": _CLIP,
    "deberta-v2": _DEBERTA,
    "dinov2": _encoder("dinov2"),
    "gemma": _decoder(ties_head=True),
    "gpt2": _GPT2,
    "llama": _decoder(ties_head=False),
    "mistral": _decoder(ties_head=False),
    "qwen2": _decoder(ties_head=False),
    "qwen3": _decoder(ties_head=False),
    "roberta": _ROBERTA,
    "t5": _T5,
    "vit": _encoder("vit"),
    "xlm-roberta": _ROBERTA,
}


def family_of(
    config: Mapping[str, Any] | None, where: str, family: str | Family | None, **changes: Any
) -> Family:
    """Return the family of a model: the one given, or the one that its configuration names.

    Args:
        config: the configuration, or None.
        where: the model, for messages.
        family: a family, or the name of one.
        changes: fields to change, unless they are None.

    Raises:
        ValueError: it is not known, and nothing tells how the tensors are named.
    """
    known = f"known are {', '.join(sorted(FAMILIES))}"
    yours = "names={pattern of paths here: name there}, or family=hf.Family(), for paths with dots"
    if not (family is None or isinstance(family, str | Family)):
        raise TypeError(f"family={family!r}: expected an hf.Family or the name of one")
    kind = str((config or {}).get("model_type"))
    if isinstance(family, str):
        if family not in FAMILIES:
            raise ValueError(f"family={family!r}: {known}. For another pass {yours}")
        family = FAMILIES[family]
    elif family is None:
        family = FAMILIES.get(kind, Family() if changes.get("names") is not None else None)
    if family is None and config is None:
        raise ValueError(
            f"{where} holds no config.json, whose model_type tells how tensors are named: pass "
            f"family=, {known}; or {yours}"
        )
    if family is None:
        raise ValueError(
            f"{where}: model_type {kind!r} of config.json is no family that is known; {known}. Say "
            f"{yours}; or make it known: hf.FAMILIES[{kind!r}] = hf.Family(names={{...}})"
        )
    family = _for_config(family, config)
    return dataclasses.replace(family, **{k: v for k, v in changes.items() if v is not None})


def _for_config(family: Family, config: Mapping[str, Any] | None) -> Family:
    """Return the family of one model: without the head's ties if it has none."""
    is_tied = (config or {}).get("tie_word_embeddings", family.ties_head)
    return family if is_tied else dataclasses.replace(family, tied_head=None)


def ties_in(family: Family) -> dict[str, str]:
    """Return the tensors that share their numbers with another, the head included."""
    return {**(family.tied_head or {}), **(family.tied or {})}


def ties_of(config: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the ties of the model of a configuration; none if its family is not known."""
    family = FAMILIES.get(str((config or {}).get("model_type")), Family())
    return ties_in(_for_config(family, config))
