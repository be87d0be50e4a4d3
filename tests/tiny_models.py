"""Build tiny models of transformers with random weights."""

import numpy as np
import pytest

WORDS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
}
GROUPED = WORDS | {"num_key_value_heads": 1}
WIDE = GROUPED | {"head_dim": 8}
GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
GPT |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SIDES = ("encoder", "decoder")
BOTH = {"d_model": 16, "vocab_size": 40, "max_position_embeddings": 32}
BOTH |= {f"{side}_layers": 1 for side in SIDES} | {f"{side}_ffn_dim": 24 for side in SIDES}
BOTH |= {f"{side}_attention_heads": 2 for side in SIDES}
OPT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24}
NEO = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 32}
DISTIL = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
NARROW = WORDS | {"embedding_size": 12}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
QWEN_MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 12}
QWEN_MOE |= {"shared_expert_intermediate_size": 12}

# By the type of the model.
SIZES = {
    "albert": NARROW,
    "bart": BOTH,
    "bert": WORDS,
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 1},
    "deberta": WORDS | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": WORDS | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "distilbert": DISTIL,
    "electra": NARROW,
    "gemma": WIDE,
    "gemma2": WIDE,
    "gemma3_text": WIDE,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": NEO | {"attention_types": [[["global"], 1]]},
    "gpt_neox": WORDS,
    "gpt_oss": WIDE | EXPERTS,
    "gptj": GPT | {"rotary_dim": 4},
    "llama": GROUPED,
    "llama4_text": WIDE | EXPERTS | {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 2},
    "mistral": GROUPED,
    "mixtral": GROUPED | EXPERTS,
    "opt": OPT | {"word_embed_proj_dim": 16, "max_position_embeddings": 32},
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen2_moe": GROUPED | QWEN_MOE,
    "qwen3": WIDE,
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1]},
    "roberta": WORDS,
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    | {"decoder_start_token_id": 0},
    "vit": WORDS | {"image_size": 8, "patch_size": 4},
}
IDS = [[3, 4, 5, 6, 7, 8, 9, 2, 1], [9, 3, 8, 4, 7, 5, 6, 2, 1]]  # with one end of each model


def tiny(kind, **options):
    """Build a model of a class of transformers."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    cls = getattr(transformers, kind)
    sizes = {"vocab_size": 40, "num_labels": 2 if "Question" in kind else 3} | SIZES[
        cls.config_class.model_type
    ]
    torch.manual_seed(0)
    model = cls(cls.config_class(**(sizes | options))).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def logits(model):
    """Run a model, and collect all of its logits."""
    torch = pytest.importorskip("torch")
    ids, config = torch.tensor(IDS), model.config
    if config.model_type in ("resnet", "vit", "vision-encoder-decoder"):
        size = getattr(getattr(config, "encoder", config), "image_size", 32)
        pixels = np.random.default_rng(0).normal(size=(2, 3, size, size)).astype("float32")
        inputs = {"pixel_values": torch.tensor(pixels)}
    else:
        inputs = {"input_ids": ids}
    own = getattr(model, "get_base_model", lambda: model)()  # PEFT's have other names
    if config.is_encoder_decoder and "ForSequence" not in type(own).__name__:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        found = model.eval()(**inputs)
    return np.concatenate([x.numpy().ravel() for k, x in found.items() if k.endswith("logits")])
