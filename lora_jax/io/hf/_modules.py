"""The modules that models of a family have: every one is listed, and no other has a name."""

import itertools
import re
from collections.abc import Iterator

from lora_jax.io._places import LAYER
from lora_jax.io._torch import as_name

_HEADS = "classifier classifier/{dense,out_proj} qa_outputs"
_BERT = (
    "{attention,crossattention}/self/{query,key,value} "
    "{attention,crossattention}/output/{dense,LayerNorm} "
    "intermediate/dense output/{dense,LayerNorm}"
)
_VISION = "attention/attention/{query,key,value} attention/output/dense"
_PICTURES = "embeddings/{cls_token,mask_token,position_embeddings,patch_embeddings/projection}"
_WORDS = "embeddings/{word_embeddings,position_embeddings,token_type_embeddings,LayerNorm}"
_CLS = "cls/predictions cls/predictions/{bias,decoder,transform/dense,transform/LayerNorm}"

#: Modules of one layer, those beside the layers, and those beside the root, for each family.
#: Braces are alternatives.
ENCODERS = {
    "bert": (_BERT, f"{_WORDS} pooler/dense", f"{_CLS} cls/seq_relationship {_HEADS}"),
    "roberta": (
        _BERT,
        f"{_WORDS} pooler/dense",
        f"lm_head lm_head/{{bias,dense,layer_norm,decoder}} {_HEADS}",
    ),
    "deberta": (
        "attention/self/{query,key,value,pos_key,pos_query,pos,pos_q}_proj attention/self/in_proj "
        "attention/output/{dense,LayerNorm} intermediate/dense output/{dense,LayerNorm}",
        f"{_WORDS} embeddings/embed_proj "
        "encoder/{rel_embeddings,LayerNorm,conv/conv,conv/LayerNorm}",
        f"{_CLS} lm_predictions/lm_head lm_predictions/lm_head/{{bias,dense,LayerNorm}} "
        f"pooler/dense {_HEADS}",
    ),
    "vit": (
        f"{_VISION} intermediate/dense output/dense layernorm_{{before,after}}",
        f"{_PICTURES} layernorm pooler/dense",
        "classifier decoder/0",
    ),
    "dinov2": (
        f"{_VISION} norm{{1,2}} layer_scale{{1,2}}/lambda1 mlp/{{fc1,fc2,weights_in,weights_out}}",
        f"{_PICTURES} layernorm",
        "classifier",
    ),
}
DECODER = (
    "self_attn/{q,k,v,o}_proj self_attn/{q,k}_norm mlp/{gate,up,down}_proj "
    "{input,post_attention}_layernorm",
    "embed_tokens norm",
    "lm_head score qa_outputs",
)
GPT2 = (
    "{attn,crossattention}/{c_attn,c_proj,q_attn} mlp/{c_fc,c_proj} ln_{1,2,cross_attn}",
    "wte wpe ln_f",
    f"lm_head score multiple_choice_head/summary {_HEADS}",
)
T5_LAYER = (
    "{SelfAttention,EncDecAttention}/{q,k,v,o,relative_attention_bias} "
    "DenseReluDense/{wi,wi_0,wi_1,wo} layer_norm"
)
CLIP_LAYER = "self_attn/{q,k,v,out}_proj layer_norm{1,2} mlp/fc{1,2}"
CLIP_BESIDE = (
    "text_model/{embeddings/token_embedding,embeddings/position_embedding,final_layer_norm} "
    "vision_model/{embeddings/class_embedding,embeddings/patch_embedding} "
    "vision_model/{embeddings/position_embedding,pre_layrnorm,post_layernorm} "
    "{text,visual}_projection logit_scale classifier"
)


def expanded(modules: str) -> Iterator[str]:
    """Expand braces.

    >>> list(expanded("norm mlp/{up,down}_proj"))
    ['norm', 'mlp/up_proj', 'mlp/down_proj']
    """
    for words in modules.split():
        parts = [part.split(",") for part in re.split(r"[{}]", words)]
        yield from map("".join, itertools.product(*parts))


def numbered(root: str, stack: str, modules: str) -> dict[str, str]:
    """Name the modules of a stack of layers below a root, which paths here may lack."""
    above, found = f"(?:{root}/)?" if root else "", {}
    start = as_name(f"{root}/{stack}".lstrip("/"))
    for module in expanded(modules):
        found[rf"{above}{stack}[/_](\d+)/{module}"] = rf"{start}.\1.{as_name(module)}"
        found[f"{above}{stack}/{module}"] = f"{start}.{LAYER}.{as_name(module)}"
    return found


def beside(root: str, modules: str) -> dict[str, str]:
    """Name the other modules below a root, which paths here may lack."""
    return {rf"(?:{root}/)?{m}": as_name(f"{root}/{m}") for m in expanded(modules)}


def alone(modules: str) -> dict[str, str]:
    """Name modules that are below no root."""
    return {module: as_name(module) for module in expanded(modules)}
