"""DeBERTa and T5 of the examples: beside those of transformers, and by themselves."""

import functools
import json

import jax
import numpy as np
import pytest
from helpers import assert_close, drawn, randomize_b, tolerance

import lora_jax
from lora_jax.io import hf
from lora_jax.recipes.models import deberta, t5

RNG = np.random.default_rng(0)
IDS = RNG.integers(2, 40, (3, 20)).astype(np.int32)
MASK = np.ones((3, 20), np.int32)
MASK[1, 13:] = 0
MASK[2, :4] = 0
TARGETS = RNG.integers(2, 40, (3, 15)).astype(np.int32)
TARGETS_MASK = np.ones((3, 15), np.int32)
TARGETS_MASK[1, 9:] = 0

WORDS = {
    "model_type": "deberta-v2",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "relative_attention": True,
    "initializer_range": 0.2,
}
V3 = WORDS | {  # twenty places, twelve of which are farther than any bucket
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_buckets": 8,
    "position_biased_input": False,
}
PAIRS = {  # a sequence to a sequence
    "model_type": "t5",
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
GATED = PAIRS | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
LM, LABELS = "DebertaV2ForMaskedLM", "DebertaV2ForSequenceClassification"
SEQ2SEQ = "T5ForConditionalGeneration"

CONVOLUTION = "DeBERTa-v2 with a convolution"

MODELS = {
    "DeBERTa-v3, masked LM": (LM, V3),
    "DeBERTa-v3, labels": (LABELS, V3 | {"id2label": {0: "a", 1: "b", 2: "c"}}),
    CONVOLUTION: (
        LABELS,
        V3 | {"conv_kernel_size": 3, "conv_act": "gelu", "conv_groups": 2},
    ),
    "DeBERTa, distances cut off": (LM, V3 | {"position_buckets": -1, "max_relative_positions": 7}),
    "DeBERTa, nothing shared": (
        LM,
        V3
        | {
            "share_att_key": False,
            "position_biased_input": True,
            "norm_rel_ebd": "none",
            "max_relative_positions": 12,
            "hidden_act": "gelu_new",
        },
    ),
    "DeBERTa, c2p alone": (LABELS, V3 | {"pos_att_type": ["c2p"], "pooler_hidden_act": "tanh"}),
    "DeBERTa, contents alone": (LABELS, V3 | {"pos_att_type": None}),
    "T5": (SEQ2SEQ, PAIRS),
    "T5 v1.1": (SEQ2SEQ, GATED),
}


def example(architecture, config):
    """The model and its inputs, by their names in transformers."""
    config = config | {"architectures": [architecture]}
    if config["model_type"] == "t5":
        inputs = {
            "input_ids": IDS,
            "attention_mask": MASK,
            "decoder_input_ids": TARGETS,
            "decoder_attention_mask": TARGETS_MASK,
        }
        return t5.from_config(config), inputs
    return deberta.from_config(config), {"input_ids": IDS, "attention_mask": MASK}


def apply(model):
    return lambda params, inputs: model.apply({"params": params}, **inputs)


def random_params(model, inputs):
    like = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), like)


@functools.cache
def case(name):
    """A function that is compiled once, its parameters, and what it reads."""
    model, inputs = example(*MODELS[name])
    return jax.jit(apply(model)), random_params(model, inputs), inputs


# Sums that follow each other: eight a layer of DeBERTa, and eight or twelve in a layer of T5.
DEPTH = 64


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # those of transformers
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_transformers_comes_in_and_goes_out(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    architecture, config = MODELS[name]
    kind = config["model_type"]
    there = getattr(transformers, architecture)
    options = {key: value for key, value in config.items() if key != "model_type"}
    torch_model = there(there.config_class(**options)).eval()
    for parameter in torch_model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    torch_model.save_pretrained(tmp_path / "model")
    _, inputs = example(architecture, config)

    def logits(model):
        tensors = {key: torch.tensor(x).long() for key, x in inputs.items()}
        return model(**tensors).logits.detach().numpy()

    written = json.loads((tmp_path / "model" / "config.json").read_text())
    model = (t5 if kind == "t5" else deberta).from_config(written)
    fn = apply(model)
    like = jax.eval_shape(model.init, jax.random.key(0), **inputs)["params"]
    layout = lora_jax.layout_of(fn, like, inputs)
    params = hf.load(tmp_path / "model", like, layout=layout)
    assert_close(np.asarray(fn(params, inputs)), logits(torch_model), depth=DEPTH)

    lora_params = lora_jax.lorafy(params, 2, targets=".*", full=".*scale", layout=layout)
    lora_params = randomize_b(lora_params, std=0.03)
    hf.save(tmp_path / "out", lora_params, source=tmp_path / "model", layout=layout)
    again, info = there.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    merged = np.asarray(fn(lora_jax.merge(lora_params), inputs))
    assert np.abs(merged - fn(params, inputs)).max() > 0.01
    assert_close(logits(again.eval()), merged, depth=DEPTH)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_distances_have_the_rows_that_transformers_gives_them():
    torch = pytest.importorskip("torch")
    there = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    x = torch.zeros(1, 1500, 1)
    for buckets, reach in [(256, 512), (256, 256), (128, 2048), (7, 24), (2, 9)]:
        model = deberta.from_config(
            V3
            | {"architectures": [LM], "position_buckets": buckets, "max_relative_positions": reach}
        )
        expected = there.build_relative_position(x, x, buckets, reach)[0] + buckets
        rows = deberta.rows_of_distances(1500, model.config)
        np.testing.assert_array_equal(rows, expected.clamp(0, 2 * buckets - 1))
    there = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    distances = np.arange(-3000, 3001)
    for buckets, reach in [(32, 128), (64, 256), (32, 1024), (9, 20), (4, 8)]:
        sizes = {"num_buckets": buckets, "max_distance": reach}
        c = {f"relative_attention_{key}": size for key, size in sizes.items()}
        c = t5.from_config(PAIRS | c).config
        for bidirectional in (True, False):
            args = torch.tensor(distances), bidirectional, *sizes.values()
            expected = there._relative_position_bucket(*args)
            np.testing.assert_array_equal(t5.buckets(distances, c, bidirectional), expected)


def at_length(*names):
    return [pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.mark.parametrize(
    "name", [CONVOLUTION, "T5", *at_length("DeBERTa, nothing shared", "T5 v1.1")]
)
def test_they_take_an_adapter_everywhere(name):
    fn, params, inputs = case(name)
    layout = lora_jax.layout_of(fn, params, inputs)
    lora_params = lora_jax.lorafy(params, 2, targets=".*", layout=layout, init=drawn)
    weights = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    assert len(lora_params.adapter.factors) == len(weights)

    @jax.jit
    def both(lora_params):
        return lora_jax.lora(fn)(lora_params, inputs), fn(lora_jax.merge(lora_params), inputs)

    assert_close(*both(randomize_b(lora_params)), depth=DEPTH)


OTHERS = ("DeBERTa-v3, labels", "DeBERTa, c2p alone", "DeBERTa, contents alone")


@pytest.mark.parametrize("name", [*(x for x in MODELS if x not in OTHERS), *at_length(*OTHERS)])
def test_nobody_sees_padding(name):
    fn, params, inputs = case(name)
    ids = (IDS + (MASK == 0)) % 40
    changes = ({}, {"input_ids": ids}, {"input_ids": (IDS + 1) % 40})
    logits, others, changed = (np.asarray(fn(params, inputs | more)) for more in changes)
    if name.startswith("T5"):  # padded on either side
        assert_close(others, logits, depth=DEPTH)
    elif logits.ndim == 2:  # a label is read from the first token, which the last row has not
        assert_close(others[:2], logits[:2], depth=DEPTH)
    else:
        assert_close(others[MASK == 1], logits[MASK == 1], depth=DEPTH)
    assert np.abs(changed[:2] - logits[:2]).max() > 1e-3


@pytest.mark.parametrize("name", ["T5", "T5 v1.1"])
def test_a_decoder_sees_no_later_token_and_no_padding(name):
    fn, params, inputs = case(name)
    at = np.arange(15) == 6
    targets = (TARGETS, (TARGETS + at) % 40, (TARGETS + 1 - TARGETS_MASK) % 40)
    logits, others, padded = (
        np.asarray(fn(params, inputs | {"decoder_input_ids": ids})) for ids in targets
    )
    changed = np.abs(others - logits).max(-1)  # [batch, length]
    changed = changed > tolerance(depth=DEPTH) * np.abs(logits).max()
    expected = (np.arange(15) >= 6) & (TARGETS_MASK == 1)
    np.testing.assert_array_equal(changed[TARGETS_MASK == 1], expected[TARGETS_MASK == 1])
    assert_close(padded[TARGETS_MASK == 1], logits[TARGETS_MASK == 1], depth=DEPTH)


def test_a_decoder_without_a_mask_has_no_padding():
    fn, params, inputs = case("T5")
    full = inputs | {"decoder_attention_mask": np.ones_like(TARGETS)}
    less = {key: x for key, x in inputs.items() if key != "decoder_attention_mask"}
    assert_close(fn(params, less), fn(params, full), depth=DEPTH)


def test_more_tokens_than_positions_raise():
    model, inputs = example(*MODELS["DeBERTa, nothing shared"])
    long = {key: np.ones((1, 25), np.int32) for key in inputs}
    with pytest.raises(ValueError, match="ids have 25 tokens, expected at most 24"):
        jax.eval_shape(model.init, jax.random.key(0), **long)


REFUSED = [
    (LM, V3, {"model_type": "deberta"}, "model_type is 'deberta'; .* 'deberta-v2' only"),
    (LM, V3, {"architectures": None}, "architectures is None; .*ForMaskedLM' or '"),
    (LM, V3, {"relative_attention": False}, "relative_attention is False; .* True only"),
    (LM, V3, {"pos_att_type": "c2p | p2p"}, r"pos_att_type is \('c2p', 'p2p'\)"),
    (LM, V3, {"norm_rel_ebd": "batch"}, "norm_rel_ebd is 'batch'; .* 'none' or 'layer_norm' only"),
    (LM, V3, {"hidden_act": "mish"}, "hidden_act is 'mish'"),
    (LM, V3, {"conv_act": "mish"}, "conv_act is 'mish'"),
    (LABELS, V3, {"pooler_hidden_act": "mish"}, "pooler_hidden_act is 'mish'"),
    (LM, V3, {"type_vocab_size": 2}, "type_vocab_size is 2; this model supports 0 only"),
    (LM, V3, {"embedding_size": 8}, "embedding_size is 8; this model supports 16 only"),
    (LABELS, V3, {"pooler_hidden_size": 8}, "pooler_hidden_size is 8; this model supports 16 only"),
    (LM, V3, {"attention_head_size": 4}, "attention_head_size is 4; this model supports 8 only"),
    (LM, V3, {"legacy": False}, "legacy is False; this model supports True only"),
    (LM, V3, {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    (LM, V3, {"num_attention_heads": 3}, "num_attention_heads=3 does not divide hidden_size=16"),
    (LM, V3, {"conv_kernel_size": 4}, "conv_kernel_size is 4; expected an odd number"),
    (LM, V3, {"position_buckets": 1}, "position_buckets is 1, and max_relative_positions 24"),
    (LM, V3, {"position_buckets": 46}, "position_buckets is 46, and max_relative_positions 24"),
    (SEQ2SEQ, PAIRS, {"model_type": "mt5"}, "model_type is 'mt5'; this model supports 't5' only"),
    (SEQ2SEQ, PAIRS, {"is_encoder_decoder": False}, "is_encoder_decoder is False"),
    (SEQ2SEQ, PAIRS, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
    (
        SEQ2SEQ,
        PAIRS,
        {"is_gated_act": True},
        "is_gated_act is True; this model supports False only",
    ),
    (SEQ2SEQ, GATED, {"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'; .* 'gelu_new' only"),
    (SEQ2SEQ, PAIRS, {"relative_attention_num_buckets": 2}, "num_buckets is 2, and .*distance 12"),
    (SEQ2SEQ, PAIRS, {"relative_attention_max_distance": 4}, "num_buckets is 8, and .*distance 4"),
]


@pytest.mark.parametrize(("architecture", "config", "change", "message"), REFUSED)
def test_what_a_model_does_not_do_is_refused(architecture, config, change, message):
    module = t5 if architecture == SEQ2SEQ else deberta
    config = config | {"architectures": [architecture]}
    module.from_config(config)
    with pytest.raises(ValueError, match=message):
        module.from_config(config | change)
    del config["num_layers" if module is t5 else "hidden_size"]
    with pytest.raises(ValueError, match=r"lacks (num_layers|hidden_size): not the config.json of"):
        module.from_config(config)
