"""Folders of transformers in, through Flax, and out again merged."""

import importlib
import re

import jax
import numpy as np
import pytest
from helpers import assert_close

import lora_jax
from lora_jax.io import hf
from lora_jax.io import peft as our_peft
from lora_jax.io._torch import Map, module_path
from lora_jax.recipes.models import llama

pytestmark = [
    pytest.mark.peer,
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore"),  # those of transformers and PEFT
]

DEEP = {"depth": 32}  # two layers, a dozen sums each
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
TIED = GROUPED | {"tie_word_embeddings": True}
WINDOW = GROUPED | {"sliding_window": 3}
CLIP = {
    "text_config": WORDS | {"eos_token_id": 39},
    "vision_config": IMAGE,
    "projection_dim": 12,
    "initializer_factor": 5.0,
}

# The name of the configuration, of the model and its sizes; what to adapt; the model here, if it is
# not that of transformers.
MODELS = {
    "BERT": ("Bert", "ForMaskedLM", WORDS, ["query", "value"], None),
    "RoBERTa": ("Roberta", "ForSequenceClassification", WORDS, ["query", "dense"], None),
    "XLM-R": ("XLMRoberta", "ForMaskedLM", WORDS, ["query", "dense"], None),
    "GPT-2": ("GPT2", "LMHeadModel", GPT2, ["c_attn", "c_fc"], None),
    "Llama": ("Llama", "ForCausalLM", GROUPED, ["q_proj", "down_proj"], None),
    "Llama, tied": ("Llama", "ForCausalLM", TIED, ["q_proj", "down_proj"], None),
    "Mistral": ("Mistral", "ForCausalLM", GROUPED, ["v_proj", "o_proj"], None),
    "Gemma": ("Gemma", "ForCausalLM", GROUPED | {"head_dim": 4}, ["q_proj", "up_proj"], None),
    "ViT": ("ViT", "ForImageClassification", IMAGE, ["query", "projection"], None),
    "DINOv2": ("Dinov2", "ForImageClassification", IMAGE, ["query", "fc1"], None),
    "CLIP": ("CLIP", "Model", CLIP, ["q_proj", "fc1", "visual_projection"], None),
    "Llama, ours": ("Llama", "ForCausalLM", GROUPED, ["q_proj", "down_proj"], {}),
    "Llama, biases": (
        "Llama",
        "ForCausalLM",
        GROUPED | {"attention_bias": True, "mlp_bias": True, "rope_theta": 500.0},
        ["q_proj", "down_proj"],
        {},
    ),
    "Mistral, ours": ("Mistral", "ForCausalLM", WINDOW, ["v_proj", "o_proj"], {}),
    "Qwen2": ("Qwen2", "ForCausalLM", TIED, ["q_proj", "gate_proj"], {}),
    "Qwen2, scanned": (
        "Qwen2",
        "ForCausalLM",
        GROUPED,
        ["q_proj", "up_proj"],
        {"scan_layers": True},
    ),
    "Qwen3": ("Qwen3", "ForCausalLM", GROUPED | {"head_dim": 6}, ["k_proj", "o_proj"], {}),
    "Qwen3, scanned": (
        "Qwen3",
        "ForCausalLM",
        TIED | {"head_dim": 4, "attention_bias": True},
        ["k_proj", "o_proj"],
        {"scan_layers": True},
    ),
}


def twin_of(family, kind, config, changes, inputs):
    """The function here, and the shapes of its parameters."""
    if changes is not None:
        model = llama.from_config(config.to_dict(), **changes)

        def fn(params, inputs):
            return model.apply({"params": params}, inputs["input_ids"])

        return fn, jax.eval_shape(model.init, jax.random.key(0), inputs["input_ids"])["params"]
    import transformers

    model = getattr(transformers, f"Flax{family}{kind}")(config, _do_init=False)

    def fn(params, inputs):
        found = model(**inputs, params=params)
        return found.logits if "logits" in found else found.logits_per_image

    shape = model.input_shape if hasattr(model, "input_shape") else None
    return fn, jax.eval_shape(lambda: model.init_weights(jax.random.key(0), shape))


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_in_and_goes_out_merged(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    family, kind, sizes, targets, changes = MODELS[name]
    torch.manual_seed(0)
    there = getattr(transformers, family + kind)
    model = there(getattr(transformers, f"{family}Config")(**sizes)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "model")
    inputs = {"pixel_values": PIXELS} if family in ("ViT", "Dinov2", "CLIP") else {}
    inputs |= {} if family in ("ViT", "Dinov2") else {"input_ids": IDS}

    def outputs(model):
        found = model(**{k: torch.tensor(x) for k, x in inputs.items()})
        found = found.logits if "logits" in found else found.logits_per_image
        return found.detach().numpy()

    fn, like = twin_of(family, kind, model.config, changes, inputs)
    layout = lora_jax.layout_of(fn, like, inputs)
    params = hf.load(tmp_path / "model", like, layout=layout)
    assert_close(np.asarray(fn(params, inputs)), outputs(model), **DEEP)
    options = {"layout": layout, "names": hf.FAMILIES[model.config.model_type].names}
    options["kinds"] = hf.FAMILIES[model.config.model_type].kinds

    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    adapted = peft.get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = outputs(adapted)
    lora_params = our_peft.load(tmp_path / "adapter", params, **options)
    assert_close(np.asarray(lora_jax.lora(fn)(lora_params, inputs)), expected, **DEEP)

    more = {"source": tmp_path / "model", "layout": layout}
    hf.save(tmp_path / "out", lora_params, shard_size=20_000, **more)
    hf.merge(tmp_path / "model", tmp_path / "adapter", tmp_path / "files", shard_size=20_000)
    for folder in ("out", "files"):
        again, info = there.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_close(outputs(again.eval()), expected, **DEEP)


@pytest.mark.parametrize("targets", [["c_proj", "query"], ["query", "c_attn", "c_fc", "q_attn"]])
def test_a_transposed_decoder_inside_another_model(targets, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    sizes = GPT2 | {"add_cross_attention": True}
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(transformers.ViTConfig(**IMAGE)),
        decoder=transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)),
    ).eval()
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "adapter")
    hf.merge(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    merged = adapted.merge_and_unload().state_dict()
    there = transformers.VisionEncoderDecoderModel.from_pretrained(tmp_path / "out").state_dict()
    for name, x in merged.items():
        assert_close(there[name].numpy(), x.numpy())


# Their modules are below another root, which no Flax model has.
ROOTS = ("LlamaForQuestion", "Qwen2ForQuestion", "Qwen3ForQuestion", "T5ForSequence", "T5ForToken")


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_families_have_all_modules_of_their_models(family):
    """Of every model that transformers makes of this type, whatever its head."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    tables = [table for name, table in vars(auto).items() if re.match("MODEL_.*_NAMES", name)]
    kinds = {kind for table in tables for kind in [table.get(family)] if isinstance(kind, str)}
    kinds = {kind for kind in kinds if not kind.startswith(ROOTS)}
    names = Map({}, hf.FAMILIES[family].names)
    assert kinds
    for kind in sorted(kinds):
        there = getattr(transformers, kind)
        with torch.device("meta"):
            model = there(transformers.AutoConfig.for_model(family))
        for name, _ in model.named_parameters(remove_duplicate=False):
            module = module_path(name.replace(".", "/"))[0]
            found, own = names.named(module), module.replace("/", ".")
            assert found in (own, f"{there.base_model_prefix}.{own}"), (kind, name)


OPT = {"vocab_size": 40, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24}
OPT |= {"num_hidden_layers": 2, "num_attention_heads": 4}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
VISION = {"depth": 2, "embed_dim": 16, "num_heads": 4, "hidden_size": 16, "patch_size": 4}
# The family, the model and its sizes, what to adapt, and the part that is saved bare.
BARE = {
    "BERT": ("Bert", "ForSequenceClassification", WORDS, ["query", "dense"], "bert"),
    "RoBERTa": ("Roberta", "ForTokenClassification", WORDS, ["query", "dense"], "roberta"),
    "GPT-2": ("GPT2", "LMHeadModel", GPT2, ["c_attn", "c_proj"], "transformer"),
    "OPT": ("OPT", "ForCausalLM", OPT, ["q_proj", "fc1"], "model"),
    "Llama": ("Llama", "ForCausalLM", GROUPED, ["q_proj", "down_proj"], "model"),
    "ViT": ("ViT", "ForImageClassification", IMAGE, ["query"], "vit"),
}


def adapter_of(peft, torch, model, targets, folder):
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def assert_state(found, expected, base):
    """Compare two states; the one that is expected is not that of the base."""
    assert any((base[name] != x).any() for name, x in expected.items())
    for name, x in expected.items():
        assert_close(found[name].numpy(), x.numpy())


@pytest.mark.parametrize("is_bare", [True, False])
@pytest.mark.parametrize("name", BARE)
def test_bare_models_and_adapters_of_models_with_heads(name, is_bare, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    family, kind, sizes, targets, part = BARE[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, family + kind)(config)
    inner = getattr(model, part)
    (inner if is_bare else model).save_pretrained(tmp_path / "model")
    base = {name: x.clone() for name, x in inner.state_dict().items()}
    merged = adapter_of(peft, torch, model if is_bare else inner, targets, tmp_path / "adapter")
    hf.merge(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    expected = (getattr(merged, part) if is_bare else merged).state_dict()
    again = type(inner).from_pretrained(tmp_path / "out")
    assert_state(again.state_dict(), expected, base)


@pytest.mark.parametrize("name", ["Llava", "Qwen2VL", "Gemma3"])
def test_models_of_pictures_and_text(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    text, image, more = GROUPED | {"head_dim": 4}, IMAGE, {}
    if name == "Llava":
        text, image = text | {"model_type": "llama"}, image | {"model_type": "clip_vision_model"}
        more = {"image_token_index": 39}
    elif name == "Qwen2VL":
        text, image = GROUPED | MROPE, VISION | {"mlp_ratio": 2}
    else:
        more = {"mm_tokens_per_image": 4}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=image, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.save_pretrained(tmp_path / "model")
    base = {name: x.clone() for name, x in model.state_dict().items()}
    names = [name.rpartition(".")[2] for name, _ in model.named_modules()]
    targets = sorted({"q_proj", "fc1", "qkv", "linear_1"} & set(names))
    merged = adapter_of(peft, torch, model, targets, tmp_path / "adapter")
    hf.merge(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert_state(again.state_dict(), merged.state_dict(), base)
