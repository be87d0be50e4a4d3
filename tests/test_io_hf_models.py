"""Folders of transformers in, through Flax, and out again merged."""

import jax
import numpy as np
import pytest
from helpers import assert_close

import lora_jax
from lora_jax.io import hf
from lora_jax.io import peft as our_peft

pytestmark = [
    pytest.mark.peer,
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore"),  # those of transformers and PEFT
]

IDS = np.random.default_rng(0).integers(2, 40, (2, 9))
PIXELS = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("float32")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "initializer_range": 0.2,
}
WORDS = SIZES | {"vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 1}
IMAGE = SIZES | {"image_size": 8, "patch_size": 4}
GROUPED = WORDS | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
CONV1D = {"layout": {".*c_(attn|proj|fc)/kernel": "oi"}, "kinds": {".*/c_.*": "Conv1D"}}

# The name of the configuration, of the model and its sizes; what to adapt there, and options here.
MODELS = {
    "BERT": ("Bert", "ForMaskedLM", WORDS, ["query", "value"], {}),
    "RoBERTa": ("Roberta", "ForSequenceClassification", WORDS, ["query", "dense"], {}),
    "GPT-2": ("GPT2", "LMHeadModel", GPT2, ["c_attn", "c_fc"], CONV1D),
    "Llama": ("Llama", "ForCausalLM", GROUPED, ["q_proj", "down_proj"], {}),
    "Llama, tied": (
        "Llama",
        "ForCausalLM",
        GROUPED | {"tie_word_embeddings": True},
        ["q_proj", "down_proj"],
        {},
    ),
    "Mistral": ("Mistral", "ForCausalLM", GROUPED, ["v_proj", "o_proj"], {}),
    "Gemma": ("Gemma", "ForCausalLM", GROUPED | {"head_dim": 4}, ["q_proj", "up_proj"], {}),
    "ViT": ("ViT", "ForImageClassification", IMAGE, ["query", "projection"], {}),
    "DINOv2": ("Dinov2", "ForImageClassification", IMAGE, ["query", "fc1"], {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_in_and_goes_out_merged(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    family, kind, sizes, targets, options = MODELS[name]
    torch.manual_seed(0)
    there = getattr(transformers, family + kind)
    model = there(getattr(transformers, f"{family}Config")(**sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    inputs = {"pixel_values": PIXELS} if family in ("ViT", "Dinov2") else {"input_ids": IDS}

    def outputs(model):
        return model(**{k: torch.tensor(x) for k, x in inputs.items()}).logits.detach().numpy()

    twin = getattr(transformers, f"Flax{family}{kind}")(model.config, _do_init=False)
    like = jax.eval_shape(lambda: twin.init_weights(jax.random.key(0), twin.input_shape))

    def fn(params, inputs):
        return twin(**inputs, params=params).logits

    if not options:
        options = {"layout": lora_jax.layout_of(fn, like, inputs)}
    tied = {"tied": {"lm_head.weight": "model.embed_tokens.weight"}}
    params = hf.load(tmp_path / "model", like, **options, **tied)
    assert_close(np.asarray(fn(params, inputs)), outputs(model), 1e-5)

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    adapted = peft.get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = outputs(adapted)
    lora_params = our_peft.load(tmp_path / "adapter", params, **options)
    assert_close(np.asarray(lora_jax.lora(fn)(lora_params, inputs)), expected, 1e-5)

    more = {"source": tmp_path / "model", **options, **tied}
    hf.save(tmp_path / "out", lora_params, shard_size=20_000, **more)
    hf.merge(tmp_path / "model", tmp_path / "adapter", tmp_path / "files", shard_size=20_000)
    for folder in ("out", "files"):
        again, info = there.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_close(outputs(again.eval()), expected, 1e-5)
