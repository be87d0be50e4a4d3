"""The configurations of LoRA that PEFT has, over small modules and tiny models of transformers.

The oracle is PEFT: the adapter is saved with random numbers, loaded again, and merged there.
"""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, from_torch
from jax import lax
from tiny_models import logits, tiny

import lora_jax
from lora_jax.io import hf
from lora_jax.io import peft as our_peft
from lora_jax.io.hf._families import FLAG

pytestmark = [
    pytest.mark.peer,
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore"),  # those of transformers and PEFT
]

# The layers of small modules, in the order in which they are applied: name, kind and sizes.
HEAD = ("head", "Linear", (6, 5))
NETS = {
    "MLP": [("first", "Linear", (4, 6)), ("norm", "LayerNorm", (6,)), HEAD],
    "batch": [("first", "Linear", (4, 6)), ("norm", "BatchNorm1d", (6,)), HEAD],
    "table": [("table", "Embedding", (9, 6)), HEAD],
    "transposed": [("table", "Embedding", (9, 4)), ("dense", "Conv1D", (6, 4)), HEAD],
    "square": [("table", "Embedding", (9, 6)), ("dense", "Conv1D", (6, 6)), HEAD],
    "Conv1d": [("conv", "Conv1d", (4, 6, 3)), HEAD],
    "Conv2d": [("conv", "Conv2d", (4, 6, 3)), HEAD],
    "Conv3d": [("conv", "Conv3d", (4, 6, 3)), HEAD],
    "groups": [("conv", "Conv2d", (4, 6, 3, 1, 0, 1, 2)), HEAD],
    "attention": [("attention", "MultiheadAttention", (6, 2)), HEAD],
    "experts": [("experts", "Experts", (3, 5, 7)), HEAD],
    "deep": [(f"net.layers.{k}.{x}", "Linear", (6, 6)) for k in range(3) for x in ("up", "down")]
    + [HEAD],
}
WINDOWS = {"Conv1d": 1, "Conv2d": 2, "Conv3d": 3}  # and their axes
LAYERS = ["first", "head"]
BOTH = {"target_modules": LAYERS}
FIRST = {"target_modules": ["first"]}
CONV = {"target_modules": ["conv"]}
TABLE = {"target_modules": ["table"]}
DENSE = {"target_modules": ["dense"]}
UP = {"target_modules": ["up"]}
UP_OF_ALL, DOWN_OF_ALL = "experts.gate_up_proj", "experts.down_proj"
NO = {"target_modules": []}
PATTERNS = {"rank_pattern": {"first": 3}, "alpha_pattern": {"head": 5}}
SMALL = {
    "one layer": ("MLP", FIRST),
    "two layers": ("MLP", BOTH),
    "a regex": ("MLP", {"target_modules": "fir.*|head"}),
    "all-linear": ("MLP", {"target_modules": "all-linear"}),
    "all-linear but one": ("MLP", {"target_modules": "all-linear", "exclude_modules": ["head"]}),
    "excluded by regex": ("MLP", BOTH | {"exclude_modules": "h.*"}),
    "names of other modules too": ("MLP", {"target_modules": ["first", "query"]}),
    "a head saved": ("MLP", FIRST | {"modules_to_save": ["head"]}),
    "a norm and a head saved": ("MLP", FIRST | {"modules_to_save": ["norm", "head"]}),
    "saved and a target": ("MLP", BOTH | {"modules_to_save": ["head"]}),
    "statistics saved": ("batch", FIRST | {"modules_to_save": ["norm"]}),
    "own biases": ("MLP", FIRST | {"bias": "lora_only"}),
    "all biases": ("MLP", FIRST | {"bias": "all"}),
    "all biases, a head saved": ("MLP", FIRST | {"bias": "all", "modules_to_save": ["head"]}),
    "biases of the factors": ("MLP", BOTH | {"lora_bias": True}),
    "rsLoRA": ("MLP", BOTH | {"use_rslora": True}),
    "patterns": ("MLP", BOTH | PATTERNS),
    "patterns, rsLoRA": ("MLP", BOTH | PATTERNS | {"use_rslora": True}),
    "DoRA": ("MLP", BOTH | {"use_dora": True}),
    "DoRA, all biases": ("MLP", FIRST | {"use_dora": True, "bias": "all"}),
    "gaussian": ("MLP", BOTH | {"init_lora_weights": "gaussian"}),
    "orthogonal": ("MLP", BOTH | {"init_lora_weights": "orthogonal"}),
    "no initializer": ("MLP", BOTH | {"init_lora_weights": False}),
    "PiSSA": ("MLP", BOTH | {"init_lora_weights": "pissa"}),
    "PiSSA, iterated": ("MLP", BOTH | {"init_lora_weights": "pissa_niter_4"}),
    "OLoRA": ("MLP", BOTH | {"init_lora_weights": "olora"}),
    "VeLoRA": ("MLP", BOTH | {"velora_config": {"num_groups": 2, "init_type": "random"}}),
    "a parameter": ("MLP", NO | {"target_parameters": ["first.weight"]}),
    "a table": ("table", TABLE),
    "a table and a head": ("table", {"target_modules": ["table", "head"]}),
    "a table, DoRA": ("table", TABLE | {"use_dora": True}),
    "a table saved": ("table", {"target_modules": ["head"], "modules_to_save": ["table"]}),
    "rows": ("table", {"target_modules": ["head"], "trainable_token_indices": {"table": [7, 2]}}),
    "Conv1D": ("transposed", DENSE),
    "Conv1D, fan_in_fan_out": ("transposed", DENSE | {"fan_in_fan_out": True}),
    "Conv1D, DoRA": ("transposed", DENSE | {"fan_in_fan_out": True, "use_dora": True}),
    "Conv1D and a table": ("transposed", {"target_modules": ["table", "dense"]}),
    "a square Conv1D": ("square", DENSE | {"fan_in_fan_out": True}),
    "Conv1d": ("Conv1d", CONV),
    "Conv1d, DoRA": ("Conv1d", CONV | {"use_dora": True}),
    "Conv2d": ("Conv2d", {"target_modules": ["conv", "head"]}),
    "Conv2d, DoRA": ("Conv2d", CONV | {"use_dora": True, "bias": "lora_only"}),
    "Conv3d": ("Conv3d", CONV),
    "groups": ("groups", CONV),
    "groups, DoRA": ("groups", CONV | {"use_dora": True}),
    "attention": ("attention", {"target_modules": ["attention"]}),
    "attention, a head saved": (
        "attention",
        {"target_modules": ["attention"], "modules_to_save": ["head"]},
    ),
    "experts": ("experts", NO | {"target_parameters": [UP_OF_ALL, DOWN_OF_ALL]}),
    "one parameter of experts": ("experts", NO | {"target_parameters": [DOWN_OF_ALL]}),
    "experts and a head": (
        "experts",
        {"target_modules": ["head"], "target_parameters": [UP_OF_ALL, DOWN_OF_ALL]}
        | {"rank_pattern": {DOWN_OF_ALL: 3}},
    ),
    "some layers": ("deep", UP | {"layers_to_transform": [0, 2]}),
    "a layer by its pattern": ("deep", UP | {"layers_to_transform": 1, "layers_pattern": "layers"}),
    "patterns of layers": ("deep", UP | {"rank_pattern": {r"layers\.1\.up": 3}}),
}  # fmt: skip
# What is refused, and the words.
CHANGED = "its initializer changed the base, which merging cannot repeat"
REDONE = "init_lora_weights='pissa_niter_4' changes the base when PEFT loads it"
GROUPS = "or of a convolution in groups, which has no such factors here"  # nor does PEFT merge them
ATTENTION = "an nn.MultiheadAttention, whose factors are of several weights"
NOT_LOADED = {
    "PiSSA, iterated": REDONE,
    **dict.fromkeys(("groups", "groups, DoRA"), GROUPS),
    **dict.fromkeys(("attention", "attention, a head saved"), ATTENTION),
}
NOT_MERGED = NOT_LOADED | {
    **dict.fromkeys(("PiSSA", "OLoRA"), CHANGED),
    "a square Conv1D": "'dense.weight' is square, and the adapter's fan_in_fan_out is true",
}


def small(name):
    """Build a module of these layers, with random numbers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers.pytorch_utils")
    nn = torch.nn

    class Experts(nn.Module):
        def __init__(self, n, inputs, inner):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(n, inner, inputs))
            self.down_proj = nn.Parameter(torch.empty(n, 6, inner))

        def forward(self, x):
            x = torch.tanh(torch.einsum("ni,eoi->eno", x, self.gate_up_proj))
            return torch.einsum("eni,eoi->no", x, self.down_proj)

    class Net(nn.Module):
        def forward(self, x):
            for path, kind, _ in NETS[name]:
                layer = self.get_submodule(path)
                x = torch.tanh(layer(x, x, x)[0] if kind == "MultiheadAttention" else layer(x))
                x = x.flatten(2).mean(2) if kind in WINDOWS else x
            return x

    net, makers = Net(), {"Experts": Experts, "Conv1D": transformers.Conv1D}
    for path, kind, sizes in NETS[name]:
        owner, (*above, last) = net, path.split(".")
        for part in above:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.add_module(last, (makers.get(kind) or getattr(nn, kind))(*sizes))
    torch.manual_seed(0)
    for key, x in net.state_dict().items():
        if x.is_floating_point():
            x.copy_(torch.rand(x.shape) + 0.2 if "var" in key else 0.5 * torch.randn(x.shape))
    return net.eval()


def inputs_of(name):
    """Draw inputs of a small module: tokens, images or vectors."""
    rng, (_, kind, sizes) = np.random.default_rng(0), NETS[name][0]
    if kind == "Embedding":
        return rng.integers(0, sizes[0], (3, 4))
    size = sizes[1] if kind == "Experts" else sizes[0]
    return rng.normal(size=(5, size, *[5] * WINDOWS.get(kind, 0))).astype("float32")


def twin(net, name) -> tuple[Any, Any, dict[str, Any]]:
    """Make the same as a function of parameters, the parameters, and what is known of them."""
    params, layout, kinds = {}, {}, {}
    for path, kind, _ in NETS[name]:
        own = {key: from_torch(x) for key, x in net.get_submodule(path).state_dict().items()}
        own.pop("num_batches_tracked", None)
        key, path = f"{path.replace('.', '/')}/weight", path.replace(".", "/")
        if kind in WINDOWS:
            own["weight"] = own["weight"].transpose(*range(2, own["weight"].ndim), 1, 0)
            layout[key], kinds[key] = "i" * WINDOWS[kind] + "io", "Conv"
        elif kind == "Linear":
            own["weight"], layout[key] = own["weight"].T, "io"
        elif kind in ("Conv1D", "Embedding"):
            layout[key], kinds[key] = "io", kind
        elif kind == "Experts":
            layout |= {f"{path}/{x}": "boi" for x in own}
        params[path] = own

    def fn(p, x):
        for path, kind, sizes in NETS[name]:
            x = jnp.tanh(applied(kind, p[path.replace(".", "/")], x, sizes))
        return x

    return fn, params, {"layout": layout, "kinds": kinds}


def applied(kind, p, x, sizes):
    """Apply a layer."""
    if kind == "Embedding":
        return p["weight"][x]
    if kind in ("Linear", "Conv1D"):
        return x @ p["weight"] + p["bias"]
    if kind == "Experts":
        x = jnp.tanh(jnp.einsum("ni,eoi->eno", x, p["gate_up_proj"]))
        return jnp.einsum("eni,eoi->no", x, p["down_proj"])
    if kind in WINDOWS:
        spec = "NC" + "DHW"[3 - (n := WINDOWS[kind]) :]
        spec = (spec, spec[2:] + "IO", spec)
        groups = sizes[6] if len(sizes) > 6 else 1
        y = lax.conv_general_dilated(
            x, p["weight"], (1,) * n, "VALID", dimension_numbers=spec, feature_group_count=groups
        )
        y = jnp.tanh(y + p["bias"].reshape(-1, *[1] * n))
        return jnp.arctanh(y.mean(range(2, 2 + n)))
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    mean, var = p.get("running_mean", mean), p.get("running_var", var)
    return (x - mean) / jnp.sqrt(var + 1e-5) * p["weight"] + p["bias"]


def trained(model, folder, options):
    """Adapt a model in PEFT, move all that trains at random, and save that."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**({"r": 2, "lora_alpha": 3} | options)))
    for x in adapted.parameters():
        if x.requires_grad:
            x.data.add_(0.3 * torch.randn(x.shape))
    for key, x in adapted.named_buffers():  # the statistics of a whole module
        if "modules_to_save" in key and x.is_floating_point():
            x.mul_(1.5)
    adapted.save_pretrained(folder)


def tensors_in(folder):
    """Read all tensors of a folder."""
    load = pytest.importorskip("safetensors.numpy").load_file
    return {k: x for path in folder.glob("*.safetensors") for k, x in load(path).items()}


def check_tensors(found, expected):
    """The same tensors, to 1e-5 of the largest number or of 1."""
    assert found.keys() == expected.keys()
    errors = {k: np.abs(x - expected[k]).max() / max(1, np.abs(x).max()) for k, x in found.items()}
    assert max(errors.values()) < 1e-5, {k: x for k, x in errors.items() if not x < 1e-5}


@pytest.mark.parametrize("name", SMALL)
def test_adapters_of_small_modules(name, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    kind, options = SMALL[name]
    base, adapter, out = (tmp_path / x for x in ("base", "adapter", "out"))
    base.mkdir()
    save(small(kind).state_dict(), base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "small", FLAG: False}))
    trained(small(kind), adapter, options)
    theirs = peft.PeftModel.from_pretrained(small(kind), adapter)
    x = inputs_of(kind)
    expected = theirs(torch.tensor(x)).detach().numpy()

    if name in NOT_MERGED:
        with pytest.raises(ValueError, match=NOT_MERGED[name]):
            hf.merge(base, adapter, out)
        assert not out.exists()
    if kind != "attention":  # which has no twin
        fn, params, more = twin(small(kind), kind)
        assert_close(np.asarray(fn(params, x)), small(kind)(torch.tensor(x)).detach().numpy())
        if name in NOT_LOADED:
            with pytest.raises(ValueError, match=NOT_LOADED[name]):
                our_peft.load(adapter, params, **more)
        else:
            lora_params = our_peft.load(adapter, params, **more)
            found = np.asarray(lora_jax.lora(fn)(lora_params, x))
            assert np.abs(expected - np.asarray(fn(params, x))).max() > 1e-2
            assert_close(found, expected, depth=32)
            if NOT_MERGED.get(name) == CHANGED:  # what the message advises
                our_peft.save(tmp_path / "plain", lora_params, **more)
                hf.merge(base, tmp_path / "plain", out)
    if name not in NOT_MERGED:
        hf.merge(base, adapter, out)
    if out.exists():
        merged = theirs.merge_and_unload().state_dict()
        check_tensors(tensors_in(out), {k: x.numpy() for k, x in merged.items()})


CLASS, TOKENS, ANSWERS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
CAUSAL, MASKED, BOTH_SIDES = "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"
OF_CLASS, OF_TOKENS, OF_ANSWERS = (
    {"task_type": x} for x in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
)
IMAGES = "ForImageClassification"
ALL = {"target_modules": "all-linear"}
FULL = {"bias": "all"}
NO_ANSWERS = {"exclude_modules": ["qa_outputs"]}
ZOO = [
    ("OPT", CAUSAL, {}),
    ("OPT", CAUSAL, ALL | FULL),
    ("OPT", CLASS, OF_CLASS),
    ("GPT2", "LMHeadModel", {"fan_in_fan_out": True}),
    ("GPT2", "LMHeadModel", ALL | {"fan_in_fan_out": True, "use_dora": True}),
    ("GPT2", CLASS, OF_CLASS | {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    ("GPT2", TOKENS, OF_TOKENS | {"bias": "lora_only"}),
    ("GPT2", ANSWERS, OF_ANSWERS),
    ("GPTJ", CAUSAL, {}),
    ("GPTJ", CAUSAL, {"target_modules": ["fc_in", "wte"], "use_rslora": True}),
    ("GPTJ", CLASS, OF_CLASS),
    ("Bloom", CAUSAL, {}),
    ("Bloom", CAUSAL, {"target_modules": ["dense"], "modules_to_save": ["ln_f"]}),
    ("Bloom", TOKENS, OF_TOKENS),
    ("GPTNeoX", CAUSAL, {}),
    ("GPTNeoX", CAUSAL, ALL | {"exclude_modules": ["dense"]}),
    ("GPTNeoX", CLASS, OF_CLASS),
    ("GPTBigCode", CAUSAL, {}),
    ("GPTBigCode", TOKENS, OF_TOKENS),
    ("Llama", CAUSAL, {"target_modules": None}),
    ("Llama", CAUSAL, {"target_modules": ["up_proj"], "layers_to_transform": [1]}),
    ("Llama", CAUSAL, ALL | {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"1.mlp.*": 5}}),
    ("Llama", CLASS, OF_CLASS | {"use_dora": True}),
    ("Llama", TOKENS, OF_TOKENS),
    ("Llama", ANSWERS, OF_ANSWERS),
    ("Mistral", CAUSAL, {"trainable_token_indices": [7, 3]}),
    ("Mistral", CLASS, OF_CLASS | ALL),
    ("Qwen2", CAUSAL, {"trainable_token_indices": {"embed_tokens": [7, 3]}} | FULL),
    ("Qwen2", CLASS, OF_CLASS),
    ("Qwen3", CAUSAL, {"target_modules": ["q_proj", "embed_tokens"]}),
    ("Qwen3", TOKENS, OF_TOKENS | {"modules_to_save": ["norm"]}),
    ("Gemma3", CAUSAL, ALL),
    ("Phi3", CAUSAL, {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    ("Phi3", CLASS, OF_CLASS | ALL),
    ("T5", BOTH_SIDES, {}),
    ("T5", BOTH_SIDES, {"target_modules": ["q", "wi", "relative_attention_bias"]}),
    ("T5", CLASS, OF_CLASS),
    ("Bart", BOTH_SIDES, {"bias": "lora_only"}),
    ("Bart", CLASS, OF_CLASS),
    ("Bart", ANSWERS, OF_ANSWERS | ALL | NO_ANSWERS),
    ("Bart", CAUSAL, {"target_modules": ["embed_tokens"]}),
    ("Bert", MASKED, ALL | {"use_dora": True}),
    ("Bert", CLASS, OF_CLASS | FULL),
    ("Bert", TOKENS, OF_TOKENS | {"target_modules": ["query", "word_embeddings"]}),
    ("Roberta", MASKED, {"target_modules": ["dense"]}),
    ("Roberta", CLASS, OF_CLASS | ALL),
    ("Roberta", ANSWERS, OF_ANSWERS),
    ("Deberta", CLASS, OF_CLASS | ALL),
    ("Deberta", TOKENS, OF_TOKENS),
    ("DebertaV2", CLASS, OF_CLASS),
    ("DebertaV2", ANSWERS, OF_ANSWERS | ALL | NO_ANSWERS),
    ("Llama4", CAUSAL, {"target_modules": ["q_proj", "v_proj", "shared_expert.up_proj"]}),
    ("Llama4", CAUSAL, NO | {"target_parameters": ["gate_up_proj", "experts.down_proj"]}),
    ("GptOss", CAUSAL, ALL),
    ("GptOss", CAUSAL, NO | {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ("GptOss", CAUSAL, {"target_modules": ["o_proj"], "modules_to_save": ["router"]}),
    ("Mixtral", CAUSAL, {"target_modules": ["w1", "w2", "gate"]}),
    ("Mixtral", CLASS, OF_CLASS),
    ("Qwen2Moe", CAUSAL, ALL),
    ("Qwen2Moe", CLASS, OF_CLASS | {"target_modules": ["shared_expert_gate", "gate_proj"]}),
    ("ViT", IMAGES, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    ("ViT", IMAGES, {"target_modules": ["projection", "dense"], "use_dora": True}),
    ("ResNet", IMAGES, {"target_modules": ["convolution"]}),
    ("ResNet", IMAGES, {"target_modules": ["convolution"]}
    | {"modules_to_save": ["classifier", "normalization"]}),
]  # fmt: skip

SHARED = r"is tied to 'transformer\.shared\.weight', and the two would be different tensors"
REFUSED = [
    ("T5", CLASS, {"target_modules": ["q", "shared"]}, SHARED),
    ("T5", TOKENS, {"target_modules": ["q"], "modules_to_save": ["shared"]}, SHARED),
    ("Llama", CAUSAL, {"lora_bias": True}, r"which has none here \(lora_bias=True\)"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return the folder of a model of a class, which is made once."""
    root = tmp_path_factory.mktemp("bases")

    def folder(kind):
        if not (root / kind).exists():
            tiny(kind).save_pretrained(root / kind)
        return root / kind

    return folder


@pytest.mark.parametrize(("model", "head", "options"), ZOO, ids=lambda x: str(x))
def test_adapters_of_models(model, head, options, bases, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    cls, base = getattr(transformers, model + head), bases(model + head)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    trained(cls.from_pretrained(base), adapter, options)
    theirs = peft.PeftModel.from_pretrained(cls.from_pretrained(base), adapter)
    expected = logits(theirs)
    assert np.abs(expected - logits(cls.from_pretrained(base))).max() > 1e-3
    hf.merge(base, adapter, out)
    again, info = cls.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert np.abs(logits(again) - expected).max() < 1e-5 * max(1, np.abs(expected).max())
    if again.config.tie_word_embeddings != theirs.config.tie_word_embeddings:
        return  # PEFT merges both into the one tensor
    found, merged = tensors_in(out), theirs.merge_and_unload()
    state = {k: x.numpy() for k, x in merged.state_dict().items()}
    check_tensors(found, {k: state[k] for k in found})


@pytest.mark.parametrize(("model", "head", "options", "message"), REFUSED)
def test_adapters_of_models_that_are_refused(model, head, options, message, bases, tmp_path):
    transformers, base = pytest.importorskip("transformers"), bases(model + head)
    cls = getattr(transformers, model + head)
    trained(cls.from_pretrained(base), tmp_path / "adapter", options)
    with pytest.raises(ValueError, match=message):
        hf.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


LM, BARE = "LMHeadModel", "Model"
PICTURES = (IMAGES, {"modules_to_save": ["classifier"]})
AS_CLASS, AS_TOKENS, AS_ANSWERS = (CLASS, OF_CLASS), (TOKENS, OF_TOKENS), (ANSWERS, OF_ANSWERS)
WITH_POOLER = (CLASS, OF_CLASS | {"modules_to_save": ["pooler", "classifier"]})
WITH_HEAD = (CLASS, OF_CLASS | {"modules_to_save": ["classification_head"]})
# The model, how its base was saved, the classes of the adapters, and what they adapt.
NEW_HEADS = [
    ("OPT", (BARE, CAUSAL), (AS_CLASS, AS_ANSWERS), {}),
    ("GPT2", (BARE, LM), (AS_CLASS, AS_TOKENS, AS_ANSWERS), {"target_modules": ["c_attn", "wte"]}),
    ("GPTJ", (BARE, CAUSAL), (AS_CLASS, AS_ANSWERS), {}),
    ("Bloom", (BARE, CAUSAL), (AS_CLASS, AS_TOKENS, AS_ANSWERS), {}),
    ("GPTNeoX", (BARE, CAUSAL), (AS_CLASS, AS_TOKENS, AS_ANSWERS), {}),
    ("GPTBigCode", (BARE, CAUSAL), (AS_CLASS, AS_TOKENS), {}),
    ("Llama", (BARE, CAUSAL), (AS_CLASS, AS_TOKENS), {"bias": "all"}),
    ("Llama", (BARE,), (AS_ANSWERS,), {}),  # below a root that a causal base has not
    ("Mistral", (BARE, CAUSAL), (AS_CLASS, AS_TOKENS, AS_ANSWERS), {"use_dora": True}),
    ("Qwen2", (BARE, CAUSAL), (AS_CLASS, AS_TOKENS), {"trainable_token_indices": [7, 3]}),
    ("Qwen3", (BARE, CAUSAL), (AS_CLASS, AS_TOKENS), {"target_modules": ["embed_tokens"]}),
    ("Phi3", (BARE, CAUSAL), (AS_CLASS, AS_TOKENS), {"target_modules": ["qkv_proj"]}),
    ("GptOss", (BARE, CAUSAL), (AS_CLASS, AS_TOKENS), {"target_modules": ["q_proj"]}),
    ("Mixtral", (BARE, CAUSAL), (AS_CLASS, AS_TOKENS, AS_ANSWERS), {"target_modules": ["w1"]}),
    ("Qwen2Moe", (BARE, CAUSAL), (AS_CLASS, AS_ANSWERS), {"target_modules": ["q_proj"]}),
    ("T5", (BARE, BOTH_SIDES), (WITH_HEAD, AS_TOKENS, AS_ANSWERS), {}),
    ("Bart", (BARE, BOTH_SIDES), (WITH_HEAD, AS_ANSWERS), {}),
    ("Bert", (BARE, MASKED), (WITH_POOLER, AS_TOKENS, AS_ANSWERS), {}),
    ("Bert", ("ForPreTraining",), (AS_TOKENS,), {"target_modules": ["dense"], "bias": "all"}),
    ("Roberta", (BARE, MASKED), (AS_CLASS, AS_TOKENS), {"target_modules": ["dense"]}),
    ("Deberta", (BARE, MASKED), (WITH_POOLER, AS_TOKENS, AS_ANSWERS), {}),
    ("DebertaV2", (BARE, MASKED), (WITH_POOLER, AS_TOKENS, AS_ANSWERS), {}),
    ("DistilBert", (BARE, MASKED), (AS_CLASS, AS_TOKENS), {"target_modules": ["q_lin"]}),
    ("Electra", (BARE, MASKED), (AS_CLASS, AS_TOKENS), {"bias": "all"}),
    ("Albert", (BARE, MASKED), (WITH_POOLER, AS_TOKENS), {"target_modules": ["query"]}),
    ("ViT", (BARE,), (PICTURES,), {"target_modules": ["query"]}),
    ("ResNet", (BARE,), (PICTURES,), {"target_modules": ["convolution"]}),
]
HEADS = [
    (model, base, head, options | more)
    for model, saved, heads, more in NEW_HEADS
    for base in saved
    for head, options in heads
]


def with_new_head(kind, base, adapter, options, **labels):
    """Adapt a model of a class whose head the base has not; return its logits, as PEFT loads it."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    labels = labels or {"num_labels": 2 if "Question" in kind else 3}
    cls = getattr(transformers, kind)
    trained(cls.from_pretrained(base, **labels), adapter, options)
    theirs = peft.PeftModel.from_pretrained(cls.from_pretrained(base, **labels), adapter)
    return logits(theirs), lambda folder: cls.from_pretrained(
        folder, output_loading_info=True, **labels
    )


@pytest.mark.parametrize(("model", "base", "head", "options"), HEADS)
def test_heads_that_the_base_has_not(model, base, head, options, bases, tmp_path):
    base, adapter, out = bases(model + base), tmp_path / "adapter", tmp_path / "out"
    expected, opened = with_new_head(model + head, base, adapter, options)
    hf.merge(base, adapter, out)
    again, info = opened(out)
    assert not info["missing_keys"]
    assert np.abs(logits(again) - expected).max() < 1e-5 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("model", ["Llama", "Roberta", "DistilBert"])
def test_a_head_of_another_number_of_labels(model, bases, tmp_path):
    base, adapter, out = bases(model + CLASS), tmp_path / "adapter", tmp_path / "out"
    options = OF_CLASS | {"target_modules": ["q_proj", "query", "q_lin"]}
    labels = {"num_labels": 5, "ignore_mismatched_sizes": True}
    expected, opened = with_new_head(model + CLASS, base, adapter, options, **labels)
    with pytest.raises(ValueError, match=r"num_labels=5, ignore_mismatched_sizes=True\)"):
        hf.merge(base, adapter, out)
    assert not out.exists()
    opened(base)[0].save_pretrained(tmp_path / "five")  # what the message advises
    hf.merge(tmp_path / "five", adapter, out)
    again, info = opened(out)
    assert not any(info.values())
    assert np.abs(logits(again) - expected).max() < 1e-5
