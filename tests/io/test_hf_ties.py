"""Tied models of transformers: adapters of the table and the head are merged as PEFT runs them."""

import json

import numpy as np
import pytest
from tiny_models import GPT, GROUPED, SIZES, WIDE, WORDS, logits, tiny

from lora_jax.io import hf
from lora_jax.io.hf._families import FLAG, ties_family
from lora_jax.io.hf._source import open_source
from lora_jax.io.hf._ties import Ties

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

# The class; the table, the head, and a layer.
CAUSAL = ("embed_tokens", "lm_head", "q_proj")
MASKED = ("word_embeddings", "decoder", "query")
MODELS = {
    "albert": ("AlbertForMaskedLM", MASKED),
    "bart": ("BartForConditionalGeneration", ("shared", "lm_head", "q_proj")),
    "bert": ("BertForMaskedLM", MASKED),
    "bloom": ("BloomForCausalLM", ("word_embeddings", "lm_head", "dense")),
    "deberta": ("DebertaForMaskedLM", ("word_embeddings", "decoder", "in_proj")),
    "deberta-v2": ("DebertaV2ForMaskedLM", ("word_embeddings", "decoder", "query_proj")),
    "distilbert": (
        "DistilBertForMaskedLM",
        ("word_embeddings", "vocab_projector", "q_lin"),
    ),
    "electra": ("ElectraForMaskedLM", ("word_embeddings", "generator_lm_head", "query")),
    "gemma": ("GemmaForCausalLM", CAUSAL),
    "gemma2": ("Gemma2ForCausalLM", CAUSAL),
    "gemma3_text": ("Gemma3ForCausalLM", CAUSAL),
    "gpt2": ("GPT2LMHeadModel", ("wte", "lm_head", "c_attn")),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", ("wte", "lm_head", "c_attn")),
    "gpt_neo": ("GPTNeoForCausalLM", ("wte", "lm_head", "q_proj")),
    "gpt_neox": ("GPTNeoXForCausalLM", ("embed_in", "embed_out", "query_key_value")),
    "gpt_oss": ("GptOssForCausalLM", CAUSAL),
    "gptj": ("GPTJForCausalLM", ("wte", "lm_head", "q_proj")),
    "llama": ("LlamaForCausalLM", CAUSAL),
    "llama4_text": ("Llama4ForCausalLM", CAUSAL),
    "mistral": ("MistralForCausalLM", CAUSAL),
    "mixtral": ("MixtralForCausalLM", CAUSAL),
    "opt": ("OPTForCausalLM", CAUSAL),
    "phi3": ("Phi3ForCausalLM", ("embed_tokens", "lm_head", "qkv_proj")),
    "qwen2": ("Qwen2ForCausalLM", CAUSAL),
    "qwen2_moe": ("Qwen2MoeForCausalLM", CAUSAL),
    "qwen3": ("Qwen3ForCausalLM", CAUSAL),
    "roberta": ("RobertaForMaskedLM", MASKED),
    "t5": ("T5ForConditionalGeneration", ("shared", "lm_head", "q")),
}
OWN = (
    "qwen2_vl",
    "qwen2_5_vl",
    "trocr",
    "albert",
    "mt5",
    "mbart",
    "cohere",
    "smollm3",
    "camembert",
    "xlm-roberta",
)


def adapters(table, head, layer):
    """The configurations of adapters of the table, of the head and of both, by name."""
    rows = {"target_modules": [layer]}
    found = {
        "table": {"target_modules": [table]},
        "head": {"target_modules": [head]},
        "both, biases": {"target_modules": [table, head], "bias": "all"},
        "DoRA": {"target_modules": [table], "use_dora": True},
        "tied": {"target_modules": [table], "ensure_weight_tying": True},
        "tied regex": {"target_modules": f".*{table}", "ensure_weight_tying": True},
        "full tied": rows | {"modules_to_save": [table], "ensure_weight_tying": True},
        "tied head": {"target_modules": [head, layer], "ensure_weight_tying": True},
        "full tied head": rows | {"modules_to_save": [head], "ensure_weight_tying": True},
        "table, full head, biases": {"target_modules": [table], "bias": "all"}
        | {"modules_to_save": [head]},
        "rows, biases": rows | {"trainable_token_indices": [3, 1], "bias": "all"},
    }
    for name, modules in (("table", [table]), ("head", [head]), ("both", [table, head])):
        found[f"full {name}"] = rows | {"modules_to_save": modules}
        found[f"rows of {name}"] = rows | {
            "trainable_token_indices": {key: [3, 1] for key in modules}
        }
    found["other rows"] = rows | {"trainable_token_indices": {table: [1, 3], head: [2]}}
    return found


def made(name, folder, **options):
    """A model with random weights, saved."""
    model = tiny(MODELS[name][0], **options)
    model.save_pretrained(folder)
    return model


def stored_twice(model, folder):
    """Store every name of every tensor."""
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {name: x.clone() for name, x in model.state_dict().items()}
    safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


FORMS = [(name, form) for name in MODELS for form in ("tied", "twice", "untied")]
FORMS.remove(("bart", "untied"))  # transformers saves such a model without its encoder's table


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_adapters_of_tied_tensors_are_merged_as_peft_runs_them(name, form, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    wrong = []
    for k, (case, options) in enumerate(adapters(*MODELS[name][1]).items()):
        base, adapter, out = (tmp_path / f"{k} {x}" for x in ("base", "adapter", "out"))
        model = made(name, base, tie_word_embeddings=form != "untied")
        if form == "twice":
            stored_twice(model, base)
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        adapted.save_pretrained(adapter)
        if case in LISTS and form != "untied" and name in FORGOTTEN:
            with pytest.raises(
                ValueError, match=rf"PEFT would drop .* to {LISTS[case]} in adapter"
            ):
                hf.merge(base, adapter, out)
            assert not out.exists()
            if name in ("bart", "gptj", "t5"):  # PEFT cannot run these again, or lost a bias
                continue
            config = json.loads((adapter / "adapter_config.json").read_text())
            config[LISTS[case]].append("lm_head")
            (adapter / "adapter_config.json").write_text(json.dumps(config))
        again = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), adapter)
        if "rows" in case and name in BIASED:  # PEFT leaves out the head's bias beside rows
            for module in again.modules():
                if isinstance(module, torch.nn.Linear) and module.out_features == 40:
                    module.bias.data.zero_()
        if name == "t5" and case not in KEPT[form]:
            with pytest.raises(ValueError, match=r"is tied to 'shared\.weight', and the two"):
                hf.merge(base, adapter, out)
            assert not out.exists()
            continue
        hf.merge(base, adapter, out)
        merged, info = type(model).from_pretrained(out, output_loading_info=True)
        if "rows" in case and name in BIASED:
            for module in merged.modules():
                if isinstance(module, torch.nn.Linear) and module.out_features == 40:
                    module.bias.data.zero_()
        error = np.abs(logits(again) - logits(merged)).max()
        if error > 1e-5 or info["missing_keys"] or info["unexpected_keys"]:
            wrong.append((case, float(error), info))
    assert not wrong


# PEFT ties what is called embed_tokens or lm_head, and writes the name of the table for both.
LISTS = {"tied head": "target_modules", "full tied head": "modules_to_save"}
FORGOTTEN = ("bart", "bloom", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "t5")
KEPT = {
    "untied": ("head", "full head", "rows of head", "tied head", "full tied head")
}  # of T5, whose stacks share the table
KEPT |= dict.fromkeys(("tied", "twice"), ("rows of table", "rows of both", "rows, biases"))
BIASED = ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "gptj", "roberta")


@pytest.mark.parametrize("name", [*MODELS, *OWN])
def test_the_default_of_the_flag_is_that_of_the_class(name):
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[name]()
    known = ties_family({"model_type": name})
    tied = ties_family({"model_type": name, FLAG: True})
    assert known is not None
    assert tied is not None
    assert known.is_tied == config.tie_word_embeddings
    assert tied.is_tied


@pytest.mark.parametrize("name", MODELS)
def test_the_ties_are_those_of_the_class(name, tmp_path):
    model = made(name, tmp_path, tie_word_embeddings=True)
    pointers = {}
    for key, x in model.state_dict().items():
        pointers.setdefault(x.data_ptr(), []).append(key)
    expected = {tuple(sorted(keys)) for keys in pointers.values() if len(keys) > 1}
    ties = Ties.of(open_source(tmp_path))
    assert {tuple(sorted(group)) for group in ties.groups} == expected
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {FLAG: False}))
    assert not Ties.of(open_source(tmp_path)).tables


VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"intermediate_size": 24, "image_size": 16, "patch_size": 8}
CROSS = {"add_cross_attention": True, "is_decoder": True}
TROCR = {
    "vocab_size": 40,
    "d_model": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
}
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
LLAMA4 = SIZES["llama4_text"]
SEEN4 = VISION | {"vision_output_dim": 16, "intermediate_size": 64}
SEEN4 |= {"projector_input_dim": 16, "projector_output_dim": 16}
# The class; the key of what writes text, its configuration and sizes; and those of what sees.
INSIDE = {
    "gpt2": ("VisionEncoderDecoderModel", "decoder", "GPT2Config", GPT | CROSS, VISION),
    "bert": ("VisionEncoderDecoderModel", "decoder", "BertConfig", WORDS | CROSS, VISION),
    "trocr": ("VisionEncoderDecoderModel", "decoder", "TrOCRConfig", TROCR | CROSS, VISION),
    "words": ("EncoderDecoderModel", "decoder", "BertConfig", WORDS | CROSS, WORDS),
    "llava": ("LlavaForConditionalGeneration", "text_config", "LlamaConfig", GROUPED, VISION),
    "gemma3": ("Gemma3ForConditionalGeneration", "text_config", "Gemma3TextConfig", WIDE, VISION),
    "llama4": ("Llama4ForConditionalGeneration", "text_config", "Llama4TextConfig", LLAMA4, SEEN4),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", "text_config", None, GROUPED | ROPE, {}),
}


def made_of_parts(name, folder, **options):
    """A model of two parts with random weights, saved."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    kind, key, text, sizes, seen = INSIDE[name]
    own = sizes | options if text is None else getattr(transformers, text)(**(sizes | options))
    cls = getattr(transformers, kind)
    if key == "decoder":
        encoder = {"ViTConfig": VISION, "BertConfig": WORDS}
        which = "BertConfig" if kind == "EncoderDecoderModel" else "ViTConfig"
        first = getattr(transformers, which)(**encoder[which])
        config = cls.config_class.from_encoder_decoder_configs(first, own)
    else:
        see = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16} if not seen else seen
        if name == "llava":
            see = transformers.CLIPVisionConfig(**see | {"num_hidden_layers": 2})
        config = cls.config_class(text_config=own, vision_config=see)
    torch.manual_seed(0)
    model = cls(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", INSIDE)
def test_the_ties_of_a_part_are_those_of_its_class(name, is_tied, tmp_path):
    """By the names in the files, which transformers may have renamed: the reloaded model tells."""
    model = made_of_parts(name, tmp_path / "base", tie_word_embeddings=is_tied)
    ties = Ties.of(open_source(tmp_path / "base"))
    pointers = {}
    for key, x in model.state_dict().items():
        pointers.setdefault(x.data_ptr(), []).append(key)
    expected = [keys for keys in pointers.values() if len(keys) > 1]
    assert ties.known
    assert len(ties.groups) == len(expected)
    assert bool(ties.tables) == is_tied
    if not is_tied:
        return
    table, *heads = max(ties.groups, key=lambda group: group[0].endswith(".weight"))
    hf.merge(tmp_path / "base", {}, tmp_path / "out", config={FLAG: False})
    again, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    writer = again.decoder if INSIDE[name][1] == "decoder" else again
    found = writer.get_input_embeddings().weight, writer.get_output_embeddings().weight
    assert found[0].data_ptr() != found[1].data_ptr()
    assert (found[0] == found[1]).all()
    stored = open_source(tmp_path / "out").tensors
    assert {table, *heads} <= stored.keys()


PARTS = {
    "gpt2": ("wte", "lm_head", "c_fc"),
    "trocr": ("embed_tokens", "output_projection", "fc1"),
    "llava": ("embed_tokens", "lm_head", "o_proj"),
}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_adapters_of_a_part_are_merged_as_peft_runs_them(name, is_tied, tmp_path):
    """It takes the whole for tied or not, whatever the part is."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    for k, options in enumerate(adapters(*PARTS[name]).values()):
        base, adapter, out = (tmp_path / f"{k} {x}" for x in ("base", "adapter", "out"))
        model = made_of_parts(name, base, tie_word_embeddings=is_tied)
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        adapted.save_pretrained(adapter)
        again = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), adapter)
        hf.merge(base, adapter, out)
        merged, info = type(model).from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"]
        assert np.abs(logits(again) - logits(merged)).max() < 1e-5, options
