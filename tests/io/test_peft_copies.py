"""The copies that PEFT's wrappers write: of resized vocabularies, and of saved heads."""

import numpy as np
import pytest
import safetensors.numpy

from lora_jax.io import hf, peft

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

WORDS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
WORDS |= {"intermediate_size": 24, "vocab_size": 40, "initializer_range": 0.2}
IDS = np.random.default_rng(0).integers(1, 40, (3, 9))

Q, TABLE, HEAD = "q_proj", "embed_tokens", "lm_head"
FORMS = {
    "layers": {"target_modules": [Q]},
    "adapted": {"target_modules": [Q, TABLE, HEAD]},
    "adapted head": {"target_modules": [Q, HEAD]},
    "adapted, tied": {"target_modules": [Q, TABLE], "ensure_weight_tying": True},
    "saved": {"target_modules": [Q], "modules_to_save": [TABLE, HEAD]},
    "saved table": {"target_modules": [Q], "modules_to_save": [TABLE]},
    "saved head": {"target_modules": [Q], "modules_to_save": [HEAD]},
    "saved, tied": {
        "target_modules": [Q],
        "modules_to_save": [TABLE],
        "ensure_weight_tying": True,
    },
    "rows": {"target_modules": [Q], "trainable_token_indices": [3, 41]},
    "rows of both": {
        "target_modules": [Q],
        "trainable_token_indices": {TABLE: [3, 41], HEAD: [3, 41]},
    },
}


def logits(model):
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.numpy()


def trained(model, folder, **options):
    """Train an adapter in PEFT, as far as a test does; return the model as PEFT loads it."""
    torch = pytest.importorskip("torch")

    there = pytest.importorskip("peft")
    model.save_pretrained(folder / "base")
    model.name_or_path = model.config._name_or_path = str(folder / "first")
    adapted = there.get_peft_model(model, there.LoraConfig(r=2, **options))
    for x in adapted.parameters():
        if x.requires_grad:
            x.data += 0.3 * torch.randn_like(x)
    adapted.save_pretrained(folder / "adapter")
    base = type(model).from_pretrained(folder / "base")
    return there.PeftModel.from_pretrained(base, folder / "adapter")


def check_merged(folder, expected):
    """The merged model is PEFT's, with the tensors of its class and no others."""
    hf.merge(folder / "base", folder / "adapter", folder / "out")
    cls = type(expected.get_base_model())
    merged, info = cls.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info.values())
    assert np.abs(logits(merged) - logits(expected)).max() < 2e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_adapters_of_a_resized_model(is_tied, form, tmp_path):
    """They fit the resized base; on another the error says so, and its remedy works."""
    torch = pytest.importorskip("torch")

    transformers = pytest.importorskip("transformers")
    there = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**WORDS, num_key_value_heads=2, tie_word_embeddings=is_tied)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "first")
    model.resize_token_embeddings(48)
    expected = trained(model, tmp_path, **FORMS[form])
    names = safetensors.numpy.load_file(tmp_path / "adapter" / peft.TENSORS).keys()
    assert any("embed_tokens" in name or "lm_head.base_layer" in name for name in names)
    check_merged(tmp_path, expected)
    with pytest.raises(ValueError, match=r"of a vocabulary of 48 tokens, and here it has 40") as e:
        hf.merge(tmp_path / "first", tmp_path / "adapter", tmp_path / "not")
    assert not (tmp_path / "not").exists()
    assert "model.resize_token_embeddings(48); then PeftModel.from_pretrained" in str(e.value)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "first")
    model.resize_token_embeddings(48)  # with new random rows
    adapted = there.PeftModel.from_pretrained(model, tmp_path / "adapter")
    again = logits(adapted)
    adapted.unload().save_pretrained(tmp_path / "own")
    (tmp_path / "out").rename(tmp_path / "before")
    config = None
    if is_tied and form in ("saved", "saved table", "saved head"):  # the head is another one now
        with pytest.raises(ValueError, match=r"they differ: .* pass config={'tie_word_emb"):
            hf.merge(tmp_path / "own", tmp_path / "adapter", tmp_path / "out")
        config = {"tie_word_embeddings": False}
    hf.merge(tmp_path / "own", tmp_path / "adapter", tmp_path / "out", config=config)
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert np.abs(logits(merged) - again).max() < 2e-5


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_heads_of_one_and_of_several_layers(name, bias, tmp_path):
    torch = pytest.importorskip("torch")

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = WORDS | {"num_labels": 3}
    if name == "DistilBert":
        sizes = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 4}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    target = "q_lin" if name == "DistilBert" else "query"
    expected = trained(model, tmp_path, target_modules=[target], bias=bias, task_type="SEQ_CLS")
    check_merged(tmp_path, expected)
