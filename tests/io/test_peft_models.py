"""Adapters to PEFT and back, around tiny random models of transformers, and small modules.

(a) PEFT writes, we read: the outputs agree, and the merged weights. (b) We write, PEFT reads, with
no key missing and none left over: the outputs agree. (c) From there both train ten steps.
"""

import dataclasses
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, from_torch
from jax import lax

import lora_jax
from lora_jax._weights.paths import flatten
from lora_jax.io import hf, safetensors
from lora_jax.io import peft as our_peft
from lora_jax.io._torch import Map
from lora_jax.io.peft import _config

pytestmark = [
    pytest.mark.peer,
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore"),  # those of transformers and PEFT
]

DEEP = {"depth": 32}  # two layers, a dozen sums each
IDS = np.random.default_rng(0).integers(1, 40, (3, 9))  # 0 pads in BERT: PyTorch never trains it
PIXELS = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("float32")


@dataclasses.dataclass
class Model:
    """A model in PyTorch, the same as a function of parameters, and its inputs there and here."""

    torch: object
    params: dict
    fn: object
    inputs: dict
    options: dict = dataclasses.field(default_factory=dict)


def transformer(name, folder):
    """A tiny random model of transformers, and its Flax twin with the same weights."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"initializer_range": 0.2}
    kinds = {
        "Llama": (
            "LlamaConfig",
            "LlamaForCausalLM",
            sizes | {"vocab_size": 40, "intermediate_size": 24, "num_key_value_heads": 2},
        ),
        "GPT-2": (
            "GPT2Config",
            "GPT2LMHeadModel",
            {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
            | {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2},
        ),
        "BERT": (
            "BertConfig",
            "BertForSequenceClassification",
            sizes | {"vocab_size": 40, "intermediate_size": 24, "num_labels": 3},
        ),
        "RoBERTa": (
            "RobertaConfig",
            "RobertaForSequenceClassification",
            sizes | {"vocab_size": 40, "intermediate_size": 24, "num_labels": 3},
        ),
        "ViT": (
            "ViTConfig",
            "ViTForImageClassification",
            sizes | {"intermediate_size": 24, "image_size": 8, "patch_size": 4, "num_labels": 3},
        ),
    }
    config, kind, options = kinds[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    model.save_pretrained(folder, safe_serialization=False)
    flax = getattr(transformers, f"Flax{kind}").from_pretrained(folder, from_pt=True)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    if name == "ViT":
        inputs = {"pixel_values": PIXELS}
    else:
        inputs = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}

    def fn(p, x):
        return flax(**x, params=p).logits

    options = {"layout": lora_jax.layout_of(fn, flax.params, inputs)} if name == "ViT" else {}
    return Model(model, flax.params, fn, inputs, options)


def small(name):
    """A small module around one layer of a kind."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    nn = torch.nn

    class Net(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return x

    rng = np.random.default_rng(0)
    if name.startswith("Conv"):
        n = int(name[-2])
        torch_net = Net(getattr(nn, f"Conv{n}d")(4, 6, 3, padding=1))
        axes = (*range(2, 2 + n), 1, 0)
        spec = "NC" + "DHW"[3 - n :], "DHW"[3 - n :] + "IO", "NC" + "DHW"[3 - n :]

        def fn(p, x):
            p = p["layers"]["0"]
            y = lax.conv_general_dilated(x["x"], p["kernel"], (1,) * n, "SAME", None, None, spec)
            return jnp.tanh(y + p["bias"].reshape(1, -1, *[1] * n))

        params = {
            "layers": {
                "0": {
                    "kernel": from_torch(torch_net.layers[0].weight.permute(axes)),
                    "bias": from_torch(torch_net.layers[0].bias),
                }
            }
        }
        options = {"kinds": {".*kernel": "Conv"}, "layout": {".*kernel": "i" * (n + 1) + "o"}}
        x = rng.normal(size=(2, 4, *[5] * n)).astype("float32")
        return Model(torch_net, params, fn, {"x": x}, options)

    if name == "experts":

        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6))  # [experts, out, in]
                self.down_proj = nn.Parameter(torch.randn(3, 6, 5))

            def forward(self, x):
                gate, up = torch.einsum("ni,eoi->eno", x, self.gate_up_proj).chunk(2, -1)
                return torch.einsum("eni,eoi->no", torch.tanh(gate) * up, self.down_proj)

        def mixture(p, x):
            p = p["layers"]["0"]
            y = jnp.einsum("ni,eoi->eno", x["x"], p["gate_up_proj"])
            gate, up = jnp.split(y, 2, -1)
            y = jnp.einsum("eni,eoi->no", jnp.tanh(gate) * up, p["down_proj"])
            return jnp.tanh(y)

        net = Net(Experts())
        params = {name: from_torch(x) for name, x in net.layers[0].named_parameters()}
        x = rng.normal(size=(5, 6)).astype("float32")
        options = {"layout": {".*_proj": "boi"}}
        return Model(net, {"layers": {"0": params}}, mixture, {"x": x}, options)

    assert name == "stacked layers"
    net = Net(*(nn.Linear(6, 6) for _ in range(4)))
    params = {
        "layers": {
            "kernel": jnp.stack([from_torch(layer.weight.T) for layer in net.layers]),
            "bias": jnp.stack([from_torch(layer.bias) for layer in net.layers]),
        }
    }

    def scanned(p, x):
        def step(x, layer):
            return jnp.tanh(x @ layer["kernel"] + layer["bias"]), None

        return lax.scan(step, x["x"], p["layers"])[0]

    x = rng.normal(size=(5, 6)).astype("float32")
    options = {"names": {"layers": "layers.{layer}"}, "layout": {".*kernel": "bio"}}
    return Model(net, params, scanned, {"x": x}, options)


def moved(model, seed=1):
    """Every trained number moved at random: no factor is zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * noise)
    return model


def outputs(model, inputs):
    import torch

    out = model(**{name: torch.tensor(x) for name, x in inputs.items()})
    return getattr(out, "logits", out)


def opened(base, folder):
    """An adapter of ours around a model, opened as PEFT does; nothing missing, nothing left."""
    import peft
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        model = peft.get_peft_model(base, config)
        result = set_peft_model_state_dict(model, load_peft_weights(folder))
    assert not result.unexpected_keys
    loaded = load_peft_weights(folder)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name in result.missing_keys if ".default" in name or name in trained]
    assert not missing
    for name, p in peft.get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if "modules_to_save" not in name and "original_module" not in name:
            assert np.array_equal(p.detach().numpy(), loaded[name].numpy()), name
    return model.eval()


def losses_there(model, inputs, labels, steps=10, rate=0.05):
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.SGD(trained, lr=rate)
    losses = []
    for _ in range(steps):
        tx.zero_grad()
        logits = outputs(model, inputs).reshape(len(labels), -1)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
        loss.backward()
        tx.step()
        losses.append(float(loss.detach()))
    return losses


def losses_here(lora_params, model, labels, steps=10, rate=0.05):
    apply = lora_jax.lora(model.fn)

    @jax.jit
    def step(lora_params, state):
        def loss(p):
            logits = apply(p, model.inputs).reshape(len(labels), -1)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, grads = lora_jax.value_and_grad(loss)(lora_params)
        trainable, frozen = lora_jax.split(lora_params)
        updates, state = tx.update(grads, state, trainable)
        return value, lora_jax.combine(optax.apply_updates(trainable, updates), frozen), state

    tx = optax.sgd(rate)
    state, losses = tx.init(lora_jax.split(lora_params)[0]), []
    for _ in range(steps):
        value, lora_params, state = step(lora_params, state)
        losses.append(float(value))
    return losses


LLAMA = ["q_proj", "v_proj", "o_proj", "down_proj"]
CASES = {
    "Llama, patterns": (
        "Llama",
        {"target_modules": LLAMA}
        | {"rank_pattern": {"v_proj": 2, "layers.1.self_attn.q_proj": 3}}
        | {"alpha_pattern": {"o_proj": 5}},
        {},
    ),
    "Llama, rsLoRA and the embedding": (
        "Llama",
        {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
        {},
    ),
    "Llama, DoRA and the head": (
        "Llama",
        {"target_modules": LLAMA, "use_dora": True, "modules_to_save": ["lm_head", "norm"]},
        {},
    ),
    "Llama, rows": (
        "Llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 3]}},
        {},
    ),
    "Llama, rows of the head": (
        "Llama",
        {"target_modules": ["q_proj"]}
        | {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [2, 39]}},
        {},
    ),
    "Llama, the head adapted": ("Llama", {"target_modules": ["q_proj", "lm_head"]}, {}),
    "Llama, all-linear but some": (
        "Llama",
        {"target_modules": "all-linear", "exclude_modules": ["down_proj", "layers.1.mlp.up_proj"]},
        {},
    ),
    "Llama, names of other models as well": (
        "Llama",
        {"target_modules": ["q_proj", "query_key_value", "c_attn"], "ensure_weight_tying": True},
        {},
    ),
    "RoBERTa, all-linear": (
        "RoBERTa",
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {},
    ),
    "RoBERTa, a head of two layers": (
        "RoBERTa",
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        {},
    ),
    "GPT-2": (
        "GPT-2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
        {"layout": {".*c_(attn|proj|fc)/kernel": "oi"}, "kinds": {".*/c_.*": "Conv1D"}},
    ),
    "GPT-2, DoRA and rsLoRA": (
        "GPT-2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True}
        | {"use_dora": True, "use_rslora": True},
        {"layout": {".*c_(attn|proj|fc)/kernel": "oi"}, "kinds": {".*/c_.*": "Conv1D"}},
    ),
    "BERT, their biases": ("BERT", {"target_modules": ["query", "value"], "bias": "lora_only"}, {}),
    "BERT, all biases and the head": (
        "BERT",
        {"target_modules": ["query", "dense"], "bias": "all", "modules_to_save": ["classifier"]},
        {},
    ),
    "BERT, embeddings": (
        "BERT",
        {"target_modules": ["word_embeddings", "position_embeddings", "key"]},
        {},
    ),
    "BERT, DoRA of an embedding": (
        "BERT",
        {"target_modules": ["word_embeddings", "key"], "use_dora": True},
        {},
    ),
    "ViT": (
        "ViT",
        {"target_modules": ["query", "projection"], "modules_to_save": ["classifier"]},
        {},
    ),
    "ViT, DoRA": ("ViT", {"target_modules": ["query", "projection"], "use_dora": True}, {}),
    "Conv1d": ("Conv1d", {"target_modules": ["layers.0"]}, {}),
    "Conv2d, DoRA": ("Conv2d", {"target_modules": ["layers.0"], "use_dora": True}, {}),
    "Conv3d": ("Conv3d", {"target_modules": ["layers.0"], "bias": "lora_only"}, {}),
    "BERT, PiSSA": (
        "BERT",
        {"target_modules": ["query", "word_embeddings"], "init_lora_weights": "pissa"},
        {},
    ),
    "Llama, OLoRA and rsLoRA": (
        "Llama",
        {"target_modules": LLAMA, "init_lora_weights": "olora", "use_rslora": True},
        {},
    ),
    "BERT, biases of the factors": ("BERT", {"target_modules": ["query"], "lora_bias": True}, {}),
    "experts": (
        "experts",
        {"target_modules": [], "target_parameters": ["0.gate_up_proj", "0.down_proj"]}
        | {"rank_pattern": {"0.down_proj": 2}},
        {},
    ),
    "experts, one of their parameters": (
        "experts",
        {"target_modules": [], "target_parameters": ["0.down_proj"]},
        {},
    ),
    "stacked layers": ("stacked layers", {"target_modules": r"layers\.\d"}, {}),
    "some of stacked layers": (
        "stacked layers",
        {"target_modules": ["layers.0", "layers.1", "layers.3"], "rank_pattern": {"layers.1": 2}}
        | {"bias": "lora_only"},
        {},
    ),
    "stacked layers, DoRA": (
        "stacked layers",
        {"target_modules": ["layers.1", "layers.2"], "use_dora": True},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_adapters_go_to_peft_and_back(name, tmp_path):
    peft = pytest.importorskip("peft")

    kind, config, options = CASES[name]

    def fresh(folder):  # PyTorch maps the file into memory: a folder for each
        is_small = kind.startswith(("Conv", "stacked", "experts"))
        return small(kind) if is_small else transformer(kind, tmp_path / folder)

    model = fresh("model")
    options = model.options | options
    config = peft.LoraConfig(r=4, lora_alpha=6, **config)
    theirs = moved(peft.get_peft_model(model.torch, config)).eval()
    expected = outputs(theirs, model.inputs).detach().numpy()
    theirs.save_pretrained(tmp_path / "theirs")

    lora_params = our_peft.load(tmp_path / "theirs", model.params, **options)
    apply = lora_jax.lora(model.fn)
    base = model.fn(model.params, model.inputs)
    assert np.abs(expected - base).max() > 1e-2
    assert_close(apply(lora_params, model.inputs), expected, **DEEP)

    # theirs has the name of its class, which has no head for tokens
    task = "FEATURE_EXTRACTION" if "word_embeddings" in config.target_modules else None
    our_peft.save(tmp_path / "ours", lora_params, task_type=task, **options)
    again = our_peft.load(tmp_path / "ours", model.params, **options)
    assert_close(apply(again, model.inputs), expected, **DEEP)
    back = opened(fresh("fresh").torch, tmp_path / "ours")
    assert_close(outputs(back, model.inputs).detach().numpy(), expected, **DEEP)

    if not name.startswith(("some", "Llama, rows")):  # PEFT trains whole rows; we, of some ranks
        labels = np.arange(len(expected)) % 3
        there = losses_there(back, model.inputs, labels)
        here = losses_here(again, model, labels)
        assert abs(there[0] - there[-1]) > 1e-3
        close = {"dtype": np.float32, "depth": 320}  # ten steps
        assert_close(np.array(here), np.array(there), **close)

    merged = theirs.merge_and_unload().state_dict()
    places = Map(flatten(lora_jax.merge(lora_params))[0], **options)
    compared, sums = 0, {"depth": 64} if "PiSSA" in name or "OLoRA" in name else {}
    for path in places.places:
        for place in places.of(path):
            if (own := f"{place.module}.{place.suffix}") in merged:  # the tokens of a ViT are not
                assert_close(places.tensor(place), merged[own].detach().numpy(), **sums)
                compared += 1
    assert compared > len(places.places) - 3


@pytest.mark.parametrize("form", ["adapted", "saved"])
def test_an_adapter_that_peft_ties_is_the_table_s(form, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "files")
    targets = ["q_proj"] + ["embed_tokens"] * (form == "adapted")
    more = {"modules_to_save": ["embed_tokens"]} if form == "saved" else {}
    config = peft.LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True, **more)
    theirs = moved(peft.get_peft_model(model, config)).eval()
    expected = theirs(torch.tensor(IDS)).logits.detach().numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    hf.merge(tmp_path / "files", tmp_path / "theirs", tmp_path / "merged")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(again(torch.tensor(IDS)).logits.detach().numpy(), expected, **DEEP)


def test_every_key_of_peft_is_known():
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= {*_config._KNOWN, *_config._HARMLESS, *_config._VARIANTS}


def test_the_adapter_of_the_demo_gives_the_same_labels_in_peft(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    examples = str(Path(__file__).parents[2] / "examples")
    sys.path.append(examples)
    try:
        import bert
        import data
        import finetune_sentiment
    finally:
        sys.path.remove(examples)

    class Classifier(torch.nn.Module):  # as examples/bert.py
        def __init__(self, folder):
            super().__init__()
            self.bert = transformers.BertModel.from_pretrained(folder)
            self.classifier = torch.nn.Linear(self.bert.config.hidden_size, 2)

        def forward(self, ids, mask):
            x = self.bert(ids, attention_mask=mask).last_hidden_state
            return self.classifier((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    finetune_sentiment.main(["--quick", "--out", str(tmp_path / "demo")])
    folder = data.minilm()
    model, params = bert.load(folder, 2)
    texts = data.movie_reviews().test.texts[:200]
    tokens = bert.encode(bert.load_tokenizer(folder, finetune_sentiment.LENGTH), texts)

    def logits(params, tokens):
        return model.apply({"params": params}, tokens["ids"], tokens["mask"])

    lora_params = safetensors.load(tmp_path / "demo" / "adapter.safetensors", params)
    expected = np.asarray(lora_jax.lora(logits)(lora_params, tokens))
    there = opened(Classifier(folder).eval(), tmp_path / "demo" / "peft")
    with torch.no_grad():
        found = there(torch.tensor(tokens["ids"]), torch.tensor(tokens["mask"]).long()).numpy()
    assert len({*expected.argmax(-1)}) == 2
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    assert_close(found, expected, length=512, depth=128)  # twelve layers or six, a dozen sums each
