"""DeBERTa v2 and v3 in Flax Linen, for masked words and for labels of sequences.

Modules are named as in PyTorch::

    model = deberta.from_config(json.loads(Path("folder/config.json").read_text()))
    logits = model.apply({"params": params}, input_ids, attention_mask)

The model is in one file, which is therefore longer than others.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Config", "MaskedLM", "SequenceClassifier", "from_config"]

_ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "relu": nn.relu,
    "tanh": nn.tanh,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings that outputs depend on: names of config.json, defaults of transformers."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-7
    position_biased_input: bool = True  # whether positions are embedded as well
    pos_att_type: tuple[str, ...] = ()
    share_att_key: bool = False
    max_relative_positions: int = -1  # the farthest that is told apart; -1 in files: all
    position_buckets: int = -1  # below 1: none, a table row per distance
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0  # 0: no convolution
    conv_groups: int = 1
    conv_act: str = "tanh"
    pooler_hidden_act: str = "gelu"
    num_labels: int = 2

    @property
    def span(self) -> int:
        """Half the number of table rows for distances."""
        buckets = self.position_buckets
        return buckets if buckets > 0 else self.max_relative_positions


class SelfAttention(nn.Module):
    """Disentangled attention: between contents, and between contents and distances.

    ::

        score[q, k] = (Q[q] K[k]  +  Q[q] Kd[q - k]  +  K[k] Qd[q - k]) / sqrt(3 * head_size)

    The second term is c2p, the third p2c. ``Kd`` and ``Qd`` are a key and a query of the distance.
    They come from the layers for contents, or from two layers of their own.
    """

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, distances: jax.Array) -> jax.Array:
        """Attend within ``x[batch, length, width]``, where ``mask[batch, 1, q, k]`` is true.

        ``distances[2 * span, width]`` are the embeddings of distances.
        """
        c = self.config
        dense = {
            name: nn.Dense(c.hidden_size, name=f"{name}_proj")
            for name in ("query", "key", "value", "pos_key", "pos_query")
        }
        if c.share_att_key:
            dense |= {"pos_key": dense["key"], "pos_query": dense["query"]}

        def project(name: str, y: jax.Array) -> jax.Array:
            y = dense[name](y)
            return y.reshape(*y.shape[:-1], c.num_attention_heads, -1)  # [..., heads, head_size]

        query, key, value = project("query", x), project("key", x), project("value", x)
        rows = rows_of_distances(x.shape[1], c)[None, None]  # [1, 1, q, k]
        bias = jnp.zeros((1, 1, 1, 1), x.dtype)
        if "c2p" in c.pos_att_type:
            scores = jnp.einsum("bqhd,rhd->bhqr", query, project("pos_key", distances))
            bias += jnp.take_along_axis(scores, rows, -1)  # [batch, heads, q, k]
        if "p2c" in c.pos_att_type:
            scores = jnp.einsum("bkhd,rhd->bhkr", key, project("pos_query", distances))
            scores = jnp.take_along_axis(scores, rows.swapaxes(2, 3), -1)  # [batch, heads, k, q]
            bias += scores.swapaxes(2, 3)  # [batch, heads, q, k]
        scale = 1 / math.sqrt(query.shape[-1] * (1 + len(c.pos_att_type)))
        y = jax.nn.dot_product_attention(query, key, value, bias * scale, mask, scale=scale)
        return y.reshape(x.shape)  # [batch, length, width]


class Output(nn.Module):
    """A dense layer, the residual, and a norm."""

    config: Config

    @nn.compact
    def __call__(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """Project ``y[batch, length, any]``, and add it to ``x[batch, length, width]``."""
        y = nn.Dense(self.config.hidden_size, name="dense")(y)
        return nn.LayerNorm(self.config.layer_norm_eps, name="LayerNorm")(x + y)


class Attention(nn.Module):
    """Attention and its output layer."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, distances: jax.Array) -> jax.Array:
        """Apply the module to ``x[batch, length, width]``."""
        y = SelfAttention(self.config, name="self")(x, mask, distances)
        return Output(self.config, name="output")(y, x)


class Activation(nn.Module):
    """A dense layer, an activation, and a norm if ``eps`` is given."""

    features: int
    act: str
    eps: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``x[..., width]`` to ``[..., features]``."""
        y = _ACTIVATIONS[self.act](nn.Dense(self.features, name="dense")(x))
        return y if self.eps is None else nn.LayerNorm(self.eps, name="LayerNorm")(y)


class Layer(nn.Module):
    """One post-norm layer: attention, then an MLP."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, distances: jax.Array) -> jax.Array:
        """Apply the module to ``x[batch, length, width]``."""
        c = self.config
        x = Attention(c, name="attention")(x, mask, distances)
        y = Activation(c.intermediate_size, c.hidden_act, name="intermediate")(x)
        return Output(c, name="output")(y, x)


class Convolution(nn.Module):
    """A convolution over words, which v2's larger models add to the first layer."""

    config: Config

    @nn.compact
    def __call__(self, words: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Convolve ``words[batch, length, width]``, and add them to ``x``, of the same shape."""
        c = self.config
        size, groups = (c.conv_kernel_size,), c.conv_groups
        y = nn.Conv(c.hidden_size, size, feature_group_count=groups, name="conv")(words)
        x = x + _ACTIVATIONS[c.conv_act](y)  # [batch, length, width]
        x = nn.LayerNorm(c.layer_norm_eps, name="LayerNorm")(x)
        return jnp.where(mask[..., None], x, 0)


class Embeddings(nn.Module):
    """The embeddings of words, and of positions if the model has any."""

    config: Config

    def setup(self) -> None:
        """Make the tables and the norm."""
        c = self.config
        self.word_embeddings = nn.Embed(c.vocab_size, c.hidden_size)
        if c.position_biased_input:
            self.position_embeddings = nn.Embed(c.max_position_embeddings, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.layer_norm_eps)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Embed ``ids[batch, length]`` as ``[batch, length, width]``, zero outside ``mask``."""
        length, positions = ids.shape[1], self.config.max_position_embeddings
        x = self.word_embeddings(ids)
        if self.config.position_biased_input:
            if length > positions:
                raise ValueError(f"ids have {length} tokens, expected at most {positions}")
            x += self.position_embeddings(jnp.arange(length)[None])
        return jnp.where(mask[..., None], self.LayerNorm(x), 0)


class Encoder(nn.Module):
    """The layers, and the table of distances that they share."""

    config: Config

    @nn.compact
    def __call__(self, words: jax.Array, mask: jax.Array) -> jax.Array:
        """Apply the module to ``words[batch, length, width]``."""
        c = self.config
        table = nn.Embed(2 * c.span, c.hidden_size, name="rel_embeddings")
        distances = table(jnp.arange(2 * c.span))  # [2 * span, width]
        if c.norm_rel_ebd == "layer_norm":
            distances = nn.LayerNorm(c.layer_norm_eps, name="LayerNorm")(distances)
        # A query that is padding sees no key, and so gets the mean of all values, as in PyTorch.
        pairs = (mask[:, :, None] & mask[:, None])[:, None]  # [batch, 1, q, k]
        x = words
        for i in range(c.num_hidden_layers):
            x = Layer(c, name=f"layer_{i}")(x, pairs, distances)
            if i == 0 and c.conv_kernel_size > 0:
                x = Convolution(c, name="conv")(words, x, mask)
        return x


class Deberta(nn.Module):
    """The network from tokens to hidden states."""

    config: Config

    def setup(self) -> None:
        """Make the embeddings and the encoder."""
        self.embeddings = Embeddings(self.config)
        self.encoder = Encoder(self.config)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return ``[batch, length, width]`` for ``ids[batch, length]``."""
        mask = mask.astype(bool)
        return self.encoder(self.embeddings(ids, mask), mask)


class Predictions(nn.Module):
    """The masked-word head: a transform, the product with the word embeddings, and a bias."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, attend: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return ``[batch, length, vocab_size]``; ``attend`` is the product with the table."""
        c = self.config
        x = Activation(c.hidden_size, c.hidden_act, c.layer_norm_eps, name="transform")(x)
        bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,))
        return attend(x) + bias[None, None]


class Head(nn.Module):
    """A wrapper that adds one level to the paths of the predictions, as checkpoints have it."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, attend: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return ``[batch, length, vocab_size]``."""
        return Predictions(self.config, name="predictions")(x, attend)


class MaskedLM(nn.Module):
    """A model of the word at each position."""

    config: Config

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Return the logits ``[batch, length, vocab_size]`` for ``input_ids[batch, length]``."""
        deberta = Deberta(self.config, name="deberta")
        x = deberta(input_ids, attention_mask)
        return Head(self.config, name="cls")(x, deberta.embeddings.word_embeddings.attend)


class SequenceClassifier(nn.Module):
    """A classifier that reads the label from the first token."""

    config: Config

    @nn.compact
    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Return the logits ``[batch, num_labels]`` for ``input_ids[batch, length]``."""
        c = self.config
        x = Deberta(c, name="deberta")(input_ids, attention_mask)[:, 0]  # [batch, width]
        x = Activation(c.hidden_size, c.pooler_hidden_act, name="pooler")(x)
        return nn.Dense(c.num_labels, name="classifier")(x)


def rows_of_distances(length: int, config: Config) -> np.ndarray:
    """Return the row of the distance table for each query and key: ``[q, k]``.

    Near distances have a table row each; farther ones share a row per bucket of their logarithm.
    NumPy computes the rows: ``length`` is static, and no device's logarithm may move a boundary.
    """
    distances = np.arange(length)[:, None] - np.arange(length)
    if config.position_buckets > 0:
        near = config.position_buckets // 2
        far = (config.max_relative_positions - 1) / near
        ratio = np.maximum(np.abs(distances), near).astype(np.float32) / near  # as PyTorch rounds
        steps = np.log(ratio) / np.log(np.float32(far)) * (near - 1)
        bucket = np.sign(distances) * (near + np.ceil(steps).astype(int))
        distances = np.where(np.abs(distances) > near, bucket, distances)
    return np.clip(distances + config.span, 0, 2 * config.span - 1)


_HEADS = {
    "DebertaV2ForMaskedLM": MaskedLM,
    "DebertaV2ForSequenceClassification": SequenceClassifier,
}


def from_config(config: Mapping[str, Any]) -> MaskedLM | SequenceClassifier:
    """Return the model of a config.json, with the head that its ``architectures`` names.

    Raises:
        ValueError: the config lacks a size, or a setting is not supported.
    """
    fields = dataclasses.fields(Config)
    needed = [f.name for f in fields if f.default is dataclasses.MISSING]
    if absent := [name for name in needed if name not in config]:
        raise ValueError(f"config lacks {', '.join(absent)}: not the config.json of a DeBERTa")
    given = {f.name: config[f.name] for f in fields if f.name in config}
    kinds = given.get("pos_att_type") or ()
    kinds = kinds.replace(" ", "").split("|") if isinstance(kinds, str) else kinds
    given["pos_att_type"] = tuple(sorted(set(kinds)))
    if given.get("max_relative_positions", -1) < 1:
        given["max_relative_positions"] = given["max_position_embeddings"]
    if "id2label" in config:  # files contain the labels, not their number
        given["num_labels"] = len(config["id2label"])
    c = Config(**given)
    architecture: Any = (config.get("architectures") or [None])[0]
    acts, size = list(_ACTIVATIONS), c.hidden_size
    known = {
        "model_type": ["deberta-v2"],
        "architectures": list(_HEADS),
        "relative_attention": [True],
        "pos_att_type": [(), ("c2p",), ("p2c",), ("c2p", "p2c")],
        "norm_rel_ebd": ["none", "layer_norm"],
        "hidden_act": acts,
        "conv_act": acts,
        "pooler_hidden_act": acts,
        "type_vocab_size": [0],
        "embedding_size": [size],
        "pooler_hidden_size": [size],
        "attention_head_size": [size // c.num_attention_heads],
    }
    if architecture == "DebertaV2ForMaskedLM":
        known |= {"legacy": [True], "tie_word_embeddings": [True]}
    found = {"relative_attention": False, **config, **vars(c), "architectures": architecture}
    for key, values in known.items():
        if (value := found.get(key, values[0])) not in values:
            only = " or ".join(map(repr, values))
            raise ValueError(f"{key} is {value!r}; this model supports {only} only")
    if size % c.num_attention_heads:
        raise ValueError(
            f"num_attention_heads={c.num_attention_heads} does not divide hidden_size={size}"
        )
    if c.conv_kernel_size > 0 and c.conv_kernel_size % 2 == 0:
        raise ValueError(f"conv_kernel_size is {c.conv_kernel_size}; expected an odd number")
    if c.position_buckets > 0 and not 1 < c.position_buckets < 2 * (c.max_relative_positions - 1):
        raise ValueError(
            f"position_buckets is {c.position_buckets}, and max_relative_positions "
            f"{c.max_relative_positions}: expected at least 2, half of them below the last position"
        )
    return _HEADS[architecture](c)
