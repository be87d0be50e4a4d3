"""Families of models: how Hugging Face's files name and store what is at our paths.

A family covers the Flax models of ``transformers`` (``model/layers/0/self_attn/q_proj``), modules
that are numbered in Linen's way (``layers_0``), and stacked ones (``layers/self_attn/q_proj`` with
the layers in front).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax.io._torch import Map, Names, as_name, as_path
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
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}

FLAG = "tie_word_embeddings"  # of a configuration: whether the head is the table


@dataclasses.dataclass(frozen=True)
class Family:
    r"""The map from the paths of a kind of model to tensor names in Hugging Face's files.

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
        parts: whether that flag alone parts the head and the table: T5 scales what a tied head
            reads.
        ignore: a regular expression of tensors that may be left over, as buffers always may.
        layout: the layouts of our weights, as in ``lorafy``, if their names do not tell.
    """

    names: Names = None
    kinds: Mapping[str, str] | None = None
    prefix: str = ""
    tied: Mapping[str, str] | None = None
    tied_head: Mapping[str, str] | None = None
    ties_head: bool = True
    parts: bool = True
    ignore: str | None = None
    layout: Mapping[str, str] | None = None


def _named(root: str, stack: str, modules: tuple[str, str, str]) -> dict[str, str]:
    """Name the modules of a layer, those beside the layers, and those beside the root."""
    layer, others, heads = modules
    return numbered(root, stack, layer) | beside(root, others) | alone(heads)


def _encoder(root: str, tied: str = "") -> Family:
    """Make the family of BERT or a descendant, whose head ``tied`` may decode by the table."""
    names = _named(root, "encoder/layer", ENCODERS[root])
    if not tied:
        return Family(names, prefix=f"{root}.")
    return dataclasses.replace(_masked(root, f"{tied}.decoder", f"{tied}.bias"), names=names)


def _decoder(*, ties_head: bool) -> Family:
    """Make the family of Llama or a descendant."""
    names = _named("model", "layers", DECODER)
    return dataclasses.replace(_causal("model", "embed_tokens", ties_head=ties_head), names=names)


def _causal(root: str, table: str, head: str = "lm_head", *, ties_head: bool = True) -> Family:
    """Make a family of which only the ties are known: those of a decoder."""
    tied = {f"{head}.weight": f"{root}.{table}.weight"}
    return Family(prefix=f"{root}.", tied_head=tied, ties_head=ties_head)


def _masked(root: str, head: str, bias: str = "") -> Family:
    """Make a family of which only the ties are known: those of an encoder."""
    tied = {f"{head}.weight": f"{root}.embeddings.word_embeddings.weight"}
    also = {f"{head}.bias": bias} if bias else None
    return Family(prefix=f"{root}.", tied=also, tied_head=tied)


def _bart(prefix: str = "model.") -> Family:
    """Make a family of which only the ties are known: those of BART or a descendant."""
    names = f"{prefix}encoder.embed_tokens", f"{prefix}decoder.embed_tokens", "lm_head"
    tied = {f"{name}.weight": f"{prefix}shared.weight" for name in names}
    return Family(prefix=prefix, tied_head=tied)


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
    parts=False,
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

# The same, of models whose ties alone are known: these are no families to load by name.
_TIED: dict[str, Family] = {
    "albert": _masked("albert", "predictions.decoder", "predictions.bias"),
    "bart": _bart(),
    "bloom": _causal("transformer", "word_embeddings"),
    "camembert": _ROBERTA,
    "cohere": _causal("model", "embed_tokens"),
    "deberta": _DEBERTA,
    "distilbert": _masked("distilbert", "vocab_projector"),
    "electra": _masked("electra", "generator_lm_head"),
    "falcon": _causal("transformer", "word_embeddings"),
    "gemma2": _decoder(ties_head=True),
    "gemma3_text": _decoder(ties_head=True),
    "gpt_bigcode": _causal("transformer", "wte"),
    "gpt_neo": _causal("transformer", "wte"),
    "gpt_neox": _causal("gpt_neox", "embed_in", "embed_out", ties_head=False),
    "gpt_oss": _decoder(ties_head=False),
    "gptj": _causal("transformer", "wte", ties_head=False),
    "llama4_text": _decoder(ties_head=False),
    "mbart": _bart(),
    "mixtral": _decoder(ties_head=False),
    "mt5": dataclasses.replace(_T5, ties_head=False),
    "opt": _causal("model", "decoder.embed_tokens"),
    "phi": _decoder(ties_head=False),
    "phi3": _decoder(ties_head=False),
    "qwen2_5_vl": _decoder(ties_head=False),
    "qwen2_moe": _decoder(ties_head=False),
    "qwen2_vl": _decoder(ties_head=False),
    "qwen3_moe": _decoder(ties_head=False),
    "smollm3": _decoder(ties_head=True),
    "starcoder2": _causal("model", "embed_tokens"),
    "trocr": _causal("model", "decoder.embed_tokens", "output_projection"),
    "whisper": _causal("model", "decoder.embed_tokens", "proj_out"),
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
        usual = _TIED.get(kind, Family()) if changes.get("names") is not None else None
        family = FAMILIES.get(kind, usual)
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
    own = flag_of(config)
    is_tied = family.ties_head if own is None else own
    return family if is_tied else dataclasses.replace(family, tied_head=None)


def inner_config(config: Mapping[str, Any] | None) -> tuple[str, Mapping[str, Any]] | None:
    """Return the configuration of the part of a model that writes text, and its key.

    None: there is none inside. That part's flag is the one that counts.
    """
    found = ((key, (config or {}).get(key)) for key in ("decoder", "generator", "text_config"))
    return next(((key, value) for key, value in found if isinstance(value, Mapping)), None)


def flag_of(config: Mapping[str, Any] | None) -> bool | None:
    """Return whether a configuration ties the head; None if it leaves that to the class."""
    inner = inner_config(config)
    return (inner[1] if inner else config or {}).get(FLAG)


def ties_in(family: Family) -> dict[str, str]:
    """Return the tensors that share their numbers with another, the head included."""
    return {**(family.tied_head or {}), **(family.tied or {})}


class Known(NamedTuple):
    """The ties that are known of a model.

    Attributes:
        key: the key of the configuration inside that they are of; empty for that of the model.
        family: its family.
        is_tied: whether the head is tied.
    """

    key: str
    family: Family
    is_tied: bool


def ties_family(config: Mapping[str, Any] | None) -> Known | None:
    """Return the family that knows the ties of a model; None if nothing is known of them."""
    for key, own in (("", config or {}), inner_config(config) or ("", {})):
        kind = str(own.get("model_type"))
        if (family := FAMILIES.get(kind) or _TIED.get(kind)) is not None:
            return Known(key, family, _for_config(family, config).tied_head is not None)
    return None


def lacked_prefix(modules: Iterable[str]) -> str | None:
    """Return the prefix that modules of a known family lack, by their paths in the files."""
    modules = list(modules)
    for family in (*FAMILIES.values(), *_TIED.values()):
        if family.prefix and family.names is not None:
            known, start = Map({}, family.names), as_path(family.prefix)
            within = [known.named(start + module) is not None for module in modules]
            heads = [known.named(module) is not None for module in modules]
            is_whole = any(module.startswith(start) for module in modules)
            is_known = all(one or two for one, two in zip(within, heads, strict=True))
            if any(within) and is_known and not is_whole:
                return family.prefix
    return None
