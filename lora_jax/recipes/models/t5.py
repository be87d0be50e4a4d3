"""T5 v1.0 and v1.1 in Flax Linen: teacher-forced logits; modules are named as in PyTorch.

::

    model = t5.from_config(json.loads(Path("folder/config.json").read_text()))
    logits = model.apply({"params": params}, input_ids, attention_mask, decoder_input_ids)

The model is deterministic: it has no dropout, and no cache for generation.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

__all__ = ["T5", "Config", "from_config"]

# Whether the MLP is gated, the activation, and its name as dense_act_fn in config.json. Flax's GELU
# is the approximation by tanh, which is called gelu_new there.
_FEED_FORWARD = {"relu": (False, nn.relu, "relu"), "gated-gelu": (True, nn.gelu, "gelu_new")}
Dense = partial(nn.Dense, use_bias=False)  # T5 has no biases


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings that outputs depend on: names of config.json, defaults of transformers."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_decoder_layers: int | None = None  # None: num_layers
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True


class Attention(nn.Module):
    """Attention with a bias by distance. The first layer has the table for all layers."""

    config: Config
    is_decoder: bool
    has_relative_attention_bias: bool = False

    def setup(self) -> None:
        """Make the projections, and the table."""
        c = self.config
        self.q, self.k, self.v = (Dense(c.num_heads * c.d_kv) for _ in "qkv")
        self.o = Dense(c.d_model)
        if self.has_relative_attention_bias:
            self.relative_attention_bias = nn.Embed(c.relative_attention_num_buckets, c.num_heads)

    def bias(self, length: int) -> jax.Array:
        """Return the bias on the scores of ``length`` queries and keys: ``[1, heads, q, k]``."""
        distances = np.arange(length) - np.arange(length)[:, None]  # [q, k]
        bias = self.relative_attention_bias(buckets(distances, self.config, not self.is_decoder))
        return bias.transpose(2, 0, 1)[None]  # [1, heads, q, k]

    def __call__(
        self, x: jax.Array, source: jax.Array, mask: jax.Array, bias: jax.Array | None = None
    ) -> jax.Array:
        """Attend from ``x[batch, q, d_model]`` to ``source[batch, k, d_model]``, where ``mask``."""
        query, key, value = (
            y.reshape(*y.shape[:-1], -1, self.config.d_kv)  # [batch, length, heads, d_kv]
            for y in (self.q(x), self.k(source), self.v(source))
        )
        # T5 does not divide scores by sqrt(d_kv): the initial weights were divided instead.
        y = jax.nn.dot_product_attention(query, key, value, bias, mask, scale=1.0)
        return self.o(y.reshape(*x.shape[:-1], -1))  # [batch, q, d_model]


class FeedForward(nn.Module):
    """The MLP: ``wo act(wi x)``, or gated, ``wo (act(wi_0 x) * wi_1 x)``."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the module to ``x[batch, length, d_model]``."""
        is_gated, act, _ = _FEED_FORWARD[self.config.feed_forward_proj]
        if is_gated:
            y = act(Dense(self.config.d_ff, name="wi_0")(x))
            y = y * Dense(self.config.d_ff, name="wi_1")(x)  # [batch, length, d_ff]
        else:
            y = act(Dense(self.config.d_ff, name="wi")(x))  # [batch, length, d_ff]
        return Dense(self.config.d_model, name="wo")(y)


class SelfAttentionLayer(nn.Module):
    """Attention within the sequence, after a norm and with a residual."""

    config: Config
    is_decoder: bool
    is_first: bool

    def setup(self) -> None:
        """Make the norm and the attention."""
        self.layer_norm = nn.RMSNorm(self.config.layer_norm_epsilon)
        self.SelfAttention = Attention(self.config, self.is_decoder, self.is_first)

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> jax.Array:
        """Apply the module to ``x[batch, length, d_model]``."""
        y = self.layer_norm(x)
        return x + self.SelfAttention(y, y, mask, bias)


class CrossAttentionLayer(nn.Module):
    """Attention to the encoder's output, after a norm and with a residual, without a bias."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, encoded: jax.Array, mask: jax.Array) -> jax.Array:
        """Apply the module to ``x[batch, q, d_model]`` and ``encoded[batch, k, d_model]``."""
        y = nn.RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        attend = Attention(self.config, is_decoder=True, name="EncDecAttention")
        return x + attend(y, encoded, mask)


class FeedForwardLayer(nn.Module):
    """The MLP, after a norm and with a residual."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the module to ``x[batch, length, d_model]``."""
        y = nn.RMSNorm(self.config.layer_norm_epsilon, name="layer_norm")(x)
        return x + FeedForward(self.config, name="DenseReluDense")(y)


class Block(nn.Module):
    """A block of two layers in the encoder, three in the decoder, named layer_0, layer_1, ..."""

    config: Config
    is_decoder: bool
    is_first: bool

    def setup(self) -> None:
        """Make the layers."""
        attend = SelfAttentionLayer(self.config, self.is_decoder, self.is_first)
        cross = [CrossAttentionLayer(self.config)] if self.is_decoder else []
        self.layer = [attend, *cross, FeedForwardLayer(self.config)]

    def __call__(
        self, x: jax.Array, mask: jax.Array, bias: jax.Array, *encoded: jax.Array
    ) -> jax.Array:
        """Apply the module to ``x[batch, length, d_model]``; ``encoded``: as in :class:`Stack`."""
        x = self.layer[0](x, mask, bias)
        if self.is_decoder:
            x = self.layer[1](x, *encoded)
        return self.layer[-1](x)


class Stack(nn.Module):
    """The encoder or the decoder."""

    config: Config
    is_decoder: bool

    def setup(self) -> None:
        """Make the blocks and the last norm."""
        c = self.config
        depth = c.num_layers
        if self.is_decoder and c.num_decoder_layers is not None:
            depth = c.num_decoder_layers
        self.block = [Block(c, self.is_decoder, is_first=i == 0) for i in range(depth)]
        self.final_layer_norm = nn.RMSNorm(c.layer_norm_epsilon)

    def __call__(self, x: jax.Array, mask: jax.Array, *encoded: jax.Array) -> jax.Array:
        """Apply it to ``x[batch, q, d_model]``, attending where ``mask[batch, 1, 1 or q, q]``.

        A decoder takes ``encoded[batch, k, d_model]`` as well, and its mask ``[batch, 1, 1, k]``.
        """
        bias = self.block[0].layer[0].SelfAttention.bias(x.shape[1])  # [1, heads, q, q]
        for block in self.block:
            x = block(x, mask, bias, *encoded)
        return self.final_layer_norm(x)


class T5(nn.Module):
    """The encoder, the decoder, and the logits of the next token."""

    config: Config

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        decoder_input_ids: jax.Array,
        decoder_attention_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Return the logits ``[batch, q, vocab_size]``.

        Args:
            input_ids: the encoder's tokens, ``[batch, k]``.
            attention_mask: where these are not padding.
            decoder_input_ids: the decoder's tokens, ``[batch, q]``: the targets shifted right.
            decoder_attention_mask: where these are not padding; None: everywhere.
        """
        c = self.config
        shared = nn.Embed(c.vocab_size, c.d_model, name="shared")
        mask = attention_mask.astype(bool)[:, None, None]  # [batch, 1, 1, k]
        encoded = Stack(c, is_decoder=False, name="encoder")(shared(input_ids), mask)

        past = nn.make_causal_mask(decoder_input_ids, dtype=bool)  # [batch, 1, q, q]
        if decoder_attention_mask is not None:
            past = past & decoder_attention_mask.astype(bool)[:, None, None]
        x = Stack(c, is_decoder=True, name="decoder")(
            shared(decoder_input_ids), past, encoded, mask
        )
        if c.tie_word_embeddings:
            return shared.attend(x * c.d_model**-0.5)
        return Dense(c.vocab_size, name="lm_head")(x)


def buckets(distances: np.ndarray, config: Config, bidirectional: bool) -> np.ndarray:
    """Return the row of the bias table for each distance from a query to a key.

    Half of the rows stand for one distance each, the other half for equal steps of the logarithm.
    NumPy computes the rows: lengths are static, and no device's logarithm may move a boundary.
    """
    rows = config.relative_attention_num_buckets
    if bidirectional:  # keys after the query have table rows of their own
        rows //= 2
        first, far = np.where(distances > 0, rows, 0), np.abs(distances)
    else:
        first, far = 0, np.maximum(-distances, 0)
    exact = rows // 2
    ratio = np.maximum(far, exact).astype(np.float32) / exact  # float32, as in PyTorch
    steps = np.log(ratio) / math.log(config.relative_attention_max_distance / exact)
    log = exact + (steps * (rows - exact)).astype(np.int32)
    return first + np.where(far < exact, far, np.minimum(log, rows - 1))


def from_config(config: Mapping[str, Any]) -> T5:
    """Return the model of a config.json.

    Raises:
        ValueError: the config lacks a size, or a setting is not supported.
    """
    fields = dataclasses.fields(Config)
    needed = [f.name for f in fields if f.default is dataclasses.MISSING]
    if absent := [name for name in needed if name not in config]:
        raise ValueError(f"config lacks {', '.join(absent)}: not the config.json of a T5")
    c = Config(**{f.name: config[f.name] for f in fields if f.name in config})
    is_gated, _, act = _FEED_FORWARD.get(c.feed_forward_proj, (None, None, None))
    known = {
        "model_type": ["t5"],
        "is_encoder_decoder": [True],
        "feed_forward_proj": list(_FEED_FORWARD),
        "is_gated_act": [is_gated],
        "dense_act_fn": [act],
    }
    for key, values in known.items():
        if (value := config.get(key, values[0])) not in values:
            only = " or ".join(map(repr, values))
            raise ValueError(f"{key} is {value!r}; this model supports {only} only")
    exact = c.relative_attention_num_buckets // 2
    if not 2 <= exact < c.relative_attention_max_distance:
        raise ValueError(
            f"relative_attention_num_buckets is {c.relative_attention_num_buckets}, and "
            f"relative_attention_max_distance {c.relative_attention_max_distance}: expected at "
            "least 4, half of them below that distance"
        )
    return T5(c)
