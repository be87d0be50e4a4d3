"""A PyTorch model's tensors as leaves: what their names, shapes and configurations tell of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.io._tensor import Tensor
from lora_jax.io.hf._source import Source
from lora_jax.io.hf._tree import TorchTree, is_torch
from lora_jax.io.peft._folder import Folder

SHAPES = {
    "h.0.attn.c_attn.weight": (4, 4),
    "h.0.attn.c_attn.bias": (4,),
    "h.0.mlp.fc.weight": (8, 4),
    "wte.weight": (9, 4),
    "model.embed_tokens.weight": (9, 4),
    "shared.weight": (9, 4),
    "mlp.shared_expert.up.weight": (8, 4),
    "time_embedding.linear_1.weight": (8, 4),
    "embeddings.0.weight": (9, 4),
    "embed_norm.weight": (4,),
    "patch_embedding.weight": (4, 3, 2, 2),
    "codes.weight": (4, 4),
    "experts.up": (3, 4, 5),
    "empty.weight": (0, 4),
}


def source(model_type=None, **config):
    """A model of these tensors, of which nothing can be read."""
    dtypes = {"codes.weight": bool}
    tensors = {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.float32))
        for name, shape in SHAPES.items()
    }
    return Source("m", tensors, None if model_type is None else {"model_type": model_type} | config)


def forms(tree):
    """The letters and the kind of every tensor with letters, as a place has them."""
    places = tree.places()
    found = {path: places.form(places.of(path)[0]) for path in tree.leaves}
    return {tree.names[path]: form for path, form in found.items() if form[0]}


@pytest.mark.parametrize("model_type", ["gpt2", "llama", None])
def test_letters_and_kinds(model_type):
    tree = TorchTree.of(source(model_type))
    transposed = ("io", "Conv1D") if model_type == "gpt2" else ("oi", "Linear")
    assert forms(tree) == {
        "h.0.attn.c_attn.weight": transposed,
        **dict.fromkeys(
            ("h.0.mlp.fc.weight", "mlp.shared_expert.up.weight", "codes.weight", "empty.weight"),
            ("oi", "Linear"),
        ),
        "time_embedding.linear_1.weight": ("oi", "Linear"),
        **dict.fromkeys(
            ("wte.weight", "model.embed_tokens.weight", "shared.weight", "embeddings.0.weight"),
            ("io", "Embedding"),
        ),
        "patch_embedding.weight": ("oiii", "Conv"),
        "experts.up": ("oii", "Conv"),
    }
    assert tree.doubtful == (("h/0/attn/c_attn/weight",) if model_type is None else ())


def test_what_takes_no_lora_and_why():
    weights = TorchTree.of(source("llama")).layout.weights
    assert {path: w.why_not for path, w in weights.items() if w.why_not} == {
        "h/0/attn/c_attn/bias": "no weight of a module by its name",
        "experts/up": "no weight of a module by its name",
        "embed_norm/weight": "1-D",
        "codes/weight": "dtype bool",
        "empty/weight": "empty",
    }


HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("kind", "config", "stored", "ties"),
    [
        ("gpt2", {}, ["transformer.wte.weight"], {HEAD: "transformer.wte.weight"}),
        ("gpt2", {}, ["wte.weight"], {HEAD: "wte.weight"}),  # saved without the head's prefix
        ("gpt2", {"tie_word_embeddings": False}, ["transformer.wte.weight"], {}),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, ["wte.weight"], {}),
        ("llama", {}, ["model.embed_tokens.weight"], {}),
        (
            "llama",
            {"tie_word_embeddings": True},
            ["model.embed_tokens.weight"],
            {HEAD: "model.embed_tokens.weight"},
        ),
        (
            "llama",
            {"tie_word_embeddings": True},
            [HEAD, "model.norm.weight"],
            {"model.embed_tokens.weight": HEAD},
        ),
        ("opt", {}, ["x"], {}),
        (
            "t5",
            {"tie_word_embeddings": False},
            ["shared.weight", "encoder.norm.weight", "decoder.norm.weight"],
            {f"{x}.embed_tokens.weight": "shared.weight" for x in ("encoder", "decoder")},
        ),
        (
            "t5",
            {"tie_word_embeddings": False},
            ["shared.weight", "encoder.norm.weight"],  # of a class that has no decoder
            {"encoder.embed_tokens.weight": "shared.weight"},
        ),
        ("unheard of", {}, ["wte.weight", HEAD], {HEAD: "wte.weight"}),  # equal numbers
        ("unheard of", {"tie_word_embeddings": False}, ["wte.weight", HEAD], {}),
        (None, {}, ["wte.weight"], {}),
    ],
)
def test_ties_are_those_of_the_configuration_the_class_and_the_numbers(kind, config, stored, ties):
    x = Tensor((9, 4), np.dtype(np.float32), lambda: np.ones((9, 4), np.float32))
    own = None if kind is None else {"model_type": kind} | config
    assert TorchTree.of(Source("m", dict.fromkeys(stored, x), own)).ties.names == ties


def folder(tensors, **config):
    """An adapter of PEFT's with tensors of these shapes."""
    defaults = {"r": 2, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}
    arrays = {name: np.zeros(shape, np.float16) for name, shape in tensors.items()}
    return Folder("a", defaults | config, arrays)


ADAPTER = {
    "h.0.mlp.fc.lora_A.weight": (2, 4),
    "h.0.mlp.fc.lora_B.weight": (8, 2),
    "wte.lora_embedding_A": (2, 9),
    "wte.lora_embedding_B": (4, 2),
    "patch_embedding.lora_A.weight": (2, 3, 2, 2),
    "patch_embedding.lora_B.weight": (4, 2, 1, 1),
    "experts.lora_A.weight": (6, 4),
    "experts.lora_B.weight": (5, 6),
}


def test_an_adapter_tells_tables_and_the_axes_of_experts():
    own = folder(ADAPTER, target_parameters=["experts.up"])
    found = forms(TorchTree.of(source("gpt2"), own))
    assert found["wte.weight"] == ("io", "Embedding")
    assert found["shared.weight"] == ("oi", "Linear")  # a name does not count
    assert found["experts.up"] == ("bio", "Parameter")
    assert found["h.0.attn.c_attn.weight"] == ("io", "Conv1D")
    turned = {"experts.lora_A.weight": (6, 5), "experts.lora_B.weight": (4, 6)}
    own = dataclasses.replace(own, tensors=own.tensors | folder(turned).tensors)
    assert forms(TorchTree.of(source("gpt2"), own))["experts.up"] == ("boi", "Parameter")
    broken = folder(ADAPTER | {"experts.lora_A.weight": (6, 6)}, target_parameters=["experts.up"])
    with pytest.raises(ValueError, match=r"factors do not fit the parameter 'experts\.up'"):
        TorchTree.of(source("gpt2"), broken)


@pytest.mark.parametrize("letters", ["bio", "boi"])
def test_square_experts_are_read_as_those_beside_them(letters):
    shapes = {"moe.gate_up_proj": (3, 4, 10), "moe.down_proj": (3, 4, 4)}  # as gpt-oss
    tensors = {name: jax.ShapeDtypeStruct(x, jnp.float32) for name, x in shapes.items()}
    model = Source("m", tensors, {"model_type": "gpt_oss"})
    inputs, outputs = (4, 10) if letters == "bio" else (10, 4)
    names = {
        "moe.base_layer.lora_A.weight": (6, inputs),
        "moe.base_layer.lora_B.weight": (outputs, 6),
        "moe.lora_A.weight": (6, 4),
        "moe.lora_B.weight": (4, 6),
    }
    own = folder(names, target_parameters=["moe.gate_up_proj", "moe.down_proj"])
    assert forms(TorchTree.of(model, own)) == dict.fromkeys(shapes, (letters, "Parameter"))


SQUARE = {"moe.lora_A.weight": (6, 4), "moe.lora_B.weight": (4, 6)}


@pytest.mark.parametrize(
    ("model_type", "version", "expected"),
    [
        ("qwen3_moe", "0.21.2", "boi"),
        ("llama4_text", "0.19.0", "boi"),  # whose modules do not tell that they are [in, out]
        ("llama4_text", "0.18.1", "bio"),  # an older PEFT asks no module
        ("gpt_oss", "0.17.0", "bio"),
        ("gpt_oss", "0.21.2", None),  # by the version of transformers
        ("qwen3_vl_moe", "0.18.0", None),  # whose files are the transpose of what it trains
        ("new", "0.21.2", None),
        ("qwen3_moe", "", "does not give peft_version"),
    ],
)
def test_square_experts_alone_are_read_as_their_model_keeps_them(model_type, version, expected):
    leaf = jax.ShapeDtypeStruct((3, 4, 4), jnp.float32)
    model = Source("m", {"moe.down_proj": leaf}, {"model_type": model_type})
    own = folder(SQUARE, target_parameters=["moe.down_proj"], peft_version=version)
    if expected in ("bio", "boi"):
        assert forms(TorchTree.of(model, own)) == {"moe.down_proj": (expected, "Parameter")}
        return
    with pytest.raises(ValueError, match=expected or r"pass layout={'moe/down_proj': 'bio'}"):
        TorchTree.of(model, own)
    for letters in ("bio", "boi"):
        found = forms(TorchTree.of(model, own, layout={"moe/.*": letters}))
        assert found == {"moe.down_proj": (letters, "Parameter")}


def test_a_layout_of_experts_that_shapes_contradict_is_refused():
    own = folder(ADAPTER, target_parameters=["experts.up"])
    with pytest.raises(
        ValueError, match=r"layout={'experts/up': 'boi'}: the factors of .* have bio"
    ):
        TorchTree.of(source("gpt2"), own, layout={"experts/up": "boi"})


@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_tree_that_an_adapter_itself_tells_of(is_transposed):
    more = {"score.weight": (3, 4), "norm.bias": (4,), "h.0.mlp.fc.base_layer.bias": (8,)}
    more |= {"score.original_module.weight": (3, 4), "wte.base_layer.weight": (9, 4)}
    config = {"target_parameters": ["experts.up"], "fan_in_fan_out": is_transposed}
    tree = TorchTree.own(folder(ADAPTER | more, **config))
    places = tree.places()
    dense = ((4, 8), "io", "Conv1D") if is_transposed else ((8, 4), "oi", "Linear")
    assert {p: (x.shape, *places.form(places.of(p)[0])) for p, x in tree.leaves.items()} == {
        "h/0/mlp/fc/weight": dense,
        "wte/weight": ((9, 4), "io", "Embedding"),
        "patch_embedding/weight": ((4, 3, 2, 2), "oiii", "Conv"),
        "experts/up": ((3, 4, 5), "bio", "Parameter"),
        "score/weight": ((3, 4), "oi", "Linear"),
        "norm/bias": ((4,), "", "Linear"),
        "h/0/mlp/fc/bias": ((8,), "", "Linear"),
    }


def test_an_adapter_of_ours_in_the_names_of_pytorch():
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()}
    leaves = {path.replace(".", "/"): x for path, x in leaves.items()}
    letters = {"h/0/attn/c_attn/weight": "io", "wte/weight": "io", "h/0/mlp/fc/weight": "oi"}
    letters |= {"patch_embedding/weight": "oiii", "experts/up": "bio"}
    factors = {
        path: lora_jax.Factors(*np.zeros((2, 1, 1)), np.float32(1), own)
        for path, own in letters.items()
    }
    adapter = lora_jax.Adapter(factors)
    assert is_torch(adapter)
    alone = {path: is_torch(lora_jax.Adapter({path: f})) for path, f in factors.items()}
    told = {path for path in factors if path.endswith("/weight")}
    assert {path for path, is_told in alone.items() if is_told} == told
    assert not is_torch(lora_jax.Adapter({"first/weight": factors["wte/weight"]}))
    places = TorchTree.known(leaves, adapter).places(kinds={"shared.*": "Embedding"})
    assert [places.form(places.of(path)[0])[1] for path in letters] == [
        "Conv1D",
        "Embedding",
        "Linear",
        "Conv",
        "Parameter",
    ]
    assert places.form(places.of("shared/weight")[0]) == ("oi", "Embedding")  # as given
