"""Build model architectures of other packages, unmodified, with small random weights.

Every builder imports its package when it is called, and returns ``(fn, params, args)``:
``fn(params, *args)`` is a pure function of the package's tree of weights.
"""

import functools
import importlib.util
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Read when the packages are first imported.
os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ZOO = {}


def register(build):
    """Add a builder to ``ZOO``; it builds once, and adds noise to constant weights."""

    @functools.cache
    def build_once():
        fn, params, args = build()
        return fn, _jitter(params), args

    ZOO[build.__name__] = build_once
    return build_once


def _jitter(params):
    """Add noise to constant weights: zero biases and unit scales hide errors."""
    rng = np.random.default_rng(7)

    def add_noise(x):
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        x = np.asarray(x)
        if x.size and (x == x.flat[0]).all():
            x = x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype)
        return jnp.asarray(x)

    return jax.tree.map(add_noise, params)


def _ids(shape, seed=0):
    return np.random.default_rng(seed).integers(3, 128, shape).astype("int32")


def _floats(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def _mask(batch, length):
    """Return a mask of ones, with zeros for the last four tokens of the second sequence."""
    mask = np.ones((batch, length), "int32")
    mask[1, length - 4 :] = 0
    return mask


# Transformers: Linen

_BERT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_GPT2 = {
    "vocab_size": 128,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ = {
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def _transformers_text(model, **inference):
    def fn(params, ids, mask):
        return model(ids, attention_mask=mask, params=params, **inference)["logits"]

    return fn, model.params, (_ids((2, 16)), _mask(2, 16))


def _transformers_vision(model_class, config):
    shape = (1, 32, 32, 3)
    model = model_class(config, input_shape=shape, _do_init=False)
    params = jax.jit(lambda key: model.init_weights(key, shape))(jax.random.PRNGKey(0))

    def fn(params, pixels):
        return model(pixels, params=params, train=False)["logits"]

    return fn, params, (_floats(2, 3, 32, 32),)


@register
def gpt2():
    """GPT-2: fused query, key and value, stored transposed; tied head."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    return _transformers_text(FlaxGPT2LMHeadModel(GPT2Config(**_GPT2)), train=False)


@register
def gpt2_generate():
    """GPT-2 with the package's greedy decoding: a while loop over a key-value cache."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    model = FlaxGPT2LMHeadModel(GPT2Config(**_GPT2))

    def fn(params, ids):
        return model.generate(ids, params=params, max_length=12, do_sample=False).sequences

    return fn, model.params, (_ids((2, 5)),)


@register
def llama():
    """Llama: rotary positions, grouped queries, gated MLP."""
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(num_key_value_heads=2, **_BERT)
    return _transformers_text(FlaxLlamaForCausalLM(config), train=False)


@register
def opt():
    """OPT: learned positions by an offset lookup."""
    from transformers import FlaxOPTForCausalLM, OPTConfig

    config = OPTConfig(word_embed_proj_dim=32, ffn_dim=64, **_BERT)
    return _transformers_text(FlaxOPTForCausalLM(config), deterministic=True)


@register
def bert():
    """BERT with a classifier on the first token."""
    from transformers import BertConfig, FlaxBertForSequenceClassification

    config = BertConfig(num_labels=3, **_BERT)
    return _transformers_text(FlaxBertForSequenceClassification(config), train=False)


@register
def bart():
    """BART: encoder, and decoder with cross-attention."""
    from transformers import BartConfig, FlaxBartForConditionalGeneration

    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    config = BartConfig(
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        max_position_embeddings=64,
        **tokens,
        **_SEQ2SEQ,
    )
    model = FlaxBartForConditionalGeneration(config)

    def fn(params, ids, mask, targets):
        return model(
            ids, attention_mask=mask, decoder_input_ids=targets, params=params, train=False
        )["logits"]

    return fn, model.params, (_ids((2, 16)), _mask(2, 16), _ids((2, 8), seed=1))


@register
def whisper():
    """Whisper: two 1-d convolutions over a spectrogram, encoder, decoder."""
    from transformers import FlaxWhisperForConditionalGeneration, WhisperConfig

    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = WhisperConfig(
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **tokens,
        **_SEQ2SEQ,
    )
    model = FlaxWhisperForConditionalGeneration(config, input_shape=(1, 8, 32))

    def fn(params, spectrogram, targets):
        return model(spectrogram, targets, params=params, train=False)["logits"]

    return fn, model.params, (_floats(2, 8, 32), _ids((2, 8)))


@register
def vit():
    """ViT: patches by a convolution."""
    from transformers import FlaxViTForImageClassification, ViTConfig

    sizes = {
        key: _BERT[key] for key in _BERT if key not in ("vocab_size", "max_position_embeddings")
    }
    config = ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes)
    return _transformers_vision(FlaxViTForImageClassification, config)


@register
def resnet():
    """ResNet: batch statistics beside the weights."""
    from transformers import FlaxResNetForImageClassification, ResNetConfig

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=5)
    return _transformers_vision(FlaxResNetForImageClassification, config)


# Diffusers: Linen


@register
def diffusers_vae():
    """Stable Diffusion's autoencoder: convolutions, group norms, attention."""
    from diffusers import FlaxAutoencoderKL

    model = FlaxAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        sample_size=16,
    )

    def fn(params, images):
        return model.apply({"params": params}, images, deterministic=True).sample

    return fn, jax.jit(model.init_weights)(jax.random.key(0)), (_floats(2, 3, 16, 16),)


# Tunix: NNX


def _tunix(family, class_name, **options):
    """Build a model from its module, without the package's ``__init__``, which has the trainer."""
    if "tunix" not in sys.modules:
        package = types.ModuleType("tunix")
        package.__spec__ = importlib.util.find_spec("tunix")
        package.__path__ = list(package.__spec__.submodule_search_locations)
        sys.modules["tunix"] = package
    module = importlib.import_module(f"tunix.models.{family}.model")
    sizes = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 64, "head_dim": 8}
    heads = {"num_heads": 4, "num_kv_heads": 2}
    config = module.ModelConfig(num_experts=4, num_experts_per_tok=2, **sizes, **heads, **options)
    model = getattr(module, class_name)(config, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fn(params, ids, positions, mask):
        return nnx.merge(graph, params, rest)(ids, positions, None, mask)[0]

    positions = np.tile(np.arange(8, dtype="int32"), (2, 1))
    return fn, params, (_ids((2, 8)), positions, np.tril(np.ones((2, 8, 8), bool)))


@register
def tunix_qwen3_moe():
    """Qwen3 mixture of experts: einsums over [experts, in, out]."""
    return _tunix("qwen3", "Qwen3", vocab_size=128, rope_theta=10_000, norm_eps=1e-6)


@register
def tunix_gemma4_moe():
    """Gemma 4 mixture of experts: tokens sorted by expert, and ``ragged_dot``."""
    moe = {"enable_moe": True, "expert_dim": 16, "moe_dense_hidden_dim": 32}
    attention = {"sliding_window_size": 4, "global_key_size": 16}
    return _tunix("gemma4", "Gemma4", num_embed=128, param_dtype=jnp.float32, **moe, **attention)


# Smaller Linen packages


@register
def nano_moe():
    """nano-moe-jax: a mixture-of-experts language model."""
    from nano_moe.config import NanoMoEConfig
    from nano_moe.model import NanoMoE

    sizes = {"vocab_size": 128, "n_layers": 2, "n_heads": 4, "d_model": 32, "d_ff": 64}
    model = NanoMoE(NanoMoEConfig(n_experts=4, top_k=2, block_size=32, **sizes))
    ids = _ids((2, 16))
    params = jax.jit(model.init)(jax.random.key(0), ids)
    return (lambda params, ids: model.apply(params, ids, deterministic=True)), params, (ids,)


@register
def recurrentgemma_scan():
    """Griffin: a gated linear recurrence by ``scan``, local attention."""
    from recurrentgemma import common
    from recurrentgemma.jax import Griffin

    kinds = common.TemporalBlockType
    config = common.GriffinConfig(
        vocab_size=128,
        width=32,
        mlp_expanded_width=64,
        num_heads=4,
        lru_width=32,
        block_types=(kinds.RECURRENT, kinds.ATTENTION),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=8,
        logits_soft_cap=30.0,
        scan_type=common.ScanType.LINEAR_NATIVE,
    )
    model = Griffin(config, gradient_checkpointing=False)
    ids, positions = jnp.asarray(_ids((2, 16))), jnp.tile(jnp.arange(16), (2, 1))
    params = jax.jit(model.init)(jax.random.key(0), ids, positions)
    return model.apply, params, (ids, positions)


# penzai


@register
def penzai_llama():
    """Llama with named axes and a scanned stack of layers; parameters are variables."""
    from penzai import pz
    from penzai.models.transformer.variants import llamalike_common

    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=32,
        projection_dim=8,
        mlp_hidden_dim=64,
        num_decoder_blocks=2,
        vocab_size=128,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        use_layer_stack=True,
    )
    model = llamalike_common.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    model, params = pz.unbind_params(model, freeze=True)

    def fn(params, ids):
        tokens = pz.nx.wrap(ids).tag("batch", "seq")
        positions = pz.nx.wrap(jnp.arange(ids.shape[1])).tag("seq")
        logits = pz.bind_variables(model, params)(tokens, token_positions=positions)
        return logits.unwrap("batch", "seq", "vocabulary")

    return fn, params, (_ids((2, 12)),)


# Haiku


@register
def progen():
    """progen-transformer: windowed attention, a spatial gate; one sequence."""
    from progen_transformer import ProGen

    sizes = {"num_tokens": 128, "dim": 32, "depth": 3, "heads": 4, "dim_head": 8}
    model = ProGen(seq_len=16, window_size=8, global_mlp_depth=1, **sizes)
    params = jax.jit(model.init)(jax.random.key(0), _ids(16))
    return (lambda params, ids: model.apply(params, None, ids)), params, (_ids(16),)


@register
def haiku_mobilenet():
    """Haiku's MobileNet: depthwise convolutions; state beside the parameters."""
    import haiku as hk

    def forward(x, training):
        sizes = {"strides": (1, 2, 1, 2), "channels": (16, 32, 32, 64)}
        return hk.nets.MobileNetV1(num_classes=5, **sizes)(x, is_training=training)

    model = hk.transform_with_state(forward)
    x = _floats(2, 32, 32, 3)
    params, state = jax.jit(model.init, static_argnums=2)(jax.random.key(0), x, True)

    def fn(tree, x):
        return model.apply(tree["params"], tree["state"], None, x, False)[0]

    return fn, {"params": params, "state": state}, (x,)


# Equinox


def _equinox(model, call, *args):
    import equinox as eqx

    params, static = eqx.partition(model, eqx.is_array)
    return (lambda params, *args: call(eqx.combine(params, static), *args)), params, args


@register
def esm2quinox():
    """ESM2, a protein language model: layers stacked and scanned, ``vmap`` over sequences."""
    from esm2quinox import ESM2, tokenise

    model = ESM2(
        num_layers=2, embed_size=32, num_heads=4, token_dropout=True, key=jax.random.key(0)
    )
    tokens = np.asarray(tokenise(["SPIDERMAN#", "SPUDMAN"], length=12)).astype("int32")
    return _equinox(model, lambda model, tokens: jax.vmap(model)(tokens).logits, tokens)


@register
def jaxonmodels_mamba():
    """Mamba: a selective scan; one sequence."""
    from jaxonmodels.models.mamba import Mamba

    model = Mamba(n_embd=16, n_dims=128, n_layers=2, d_state=4, key=jax.random.key(0))
    return _equinox(model, lambda model, ids: model(ids), _ids(16))


# Keras


@register
def keras_mixtral():
    """Mixtral of KerasHub: experts by batched einsums; variables are a list."""
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    model = keras_hub.models.MixtralBackbone(
        vocabulary_size=128,
        num_layers=2,
        num_query_heads=4,
        hidden_dim=32,
        intermediate_dim=64,
        num_key_value_heads=2,
        num_experts=4,
        sliding_window=8,
        dtype="float32",
    )
    trainable = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]

    def fn(trainable, inputs):
        return model.stateless_call(trainable, rest, inputs, training=False)[0]

    inputs = {"token_ids": _ids((2, 16)), "padding_mask": _mask(2, 16)}
    return fn, trainable, (inputs,)
