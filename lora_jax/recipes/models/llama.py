"""Llama in Flax Linen, and its successors: Mistral, SmolLM2, Qwen2, Qwen3.

Modules are named as in Hugging Face's files, so ``hf.load`` needs no table::

    model = llama.from_config(json.loads(Path("folder/config.json").read_text()))
    like = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = hf.load("folder", like)
    logits = model.apply({"params": params}, ids)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from lora_jax.recipes.attention import Turns, attend, attend_cached, packed, rotated, turns_of
from lora_jax.recipes.loss import chunked_loss
from lora_jax.recipes.remat import mark, policy_of

__all__ = ["Cache", "Llama", "from_config", "generate"]


class Cache(NamedTuple):
    """The keys and values of the tokens read so far, for each batch row on its own.

    Attributes:
        keys: ``[layers, batch, size, key_value_heads, head_dim]``, already rotated.
        values: of the same shape.
        lengths: ``[batch]``, how many positions of ``size`` are filled. Later positions do not
            count: for a padded row, set it to the true length.
    """

    keys: Any
    values: Any
    lengths: Any

    def positions(self, count: int) -> jax.Array:
        """Return the positions of ``count`` tokens that follow: ``[batch, count]``."""
        return self.lengths[:, None] + jnp.arange(count)[None]


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped heads."""

    model: "Llama"

    @nn.compact
    def __call__(
        self, x: jax.Array, past: Cache | None, turns: Turns, segments: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        """Attend from each of ``x[batch, length, width]`` to itself and those before.

        With ``past``, this layer's cache, also to those in it; return it with ``x`` added. With
        ``segments``, only to those of the same number.
        """
        m = self.model

        def project(name: str, count: int) -> jax.Array:
            y = nn.Dense(count * m.head_dim, m.attention_bias, m.dtype, name=name)(x)
            y = mark(y, "projection")
            return m.join_heads(y).reshape(
                *x.shape[:-1], count, m.head_dim
            )  # [batch, length, heads, head_dim]

        query = project("q_proj", m.num_attention_heads)
        key = project("k_proj", m.num_key_value_heads)
        value = project("v_proj", m.num_key_value_heads)
        if m.qk_norm:
            query = nn.RMSNorm(m.rms_norm_eps, m.dtype, name="q_norm")(query)
            key = nn.RMSNorm(m.rms_norm_eps, m.dtype, name="k_norm")(key)
        query, key = (rotated(y, turns) for y in (query, key))
        options: Any = {"window": m.sliding_window, "name": m.attention}
        if past:
            positions = past.positions(x.shape[1])
            past = written(past, key, value, positions)
            y = attend_cached(query, past.keys, past.values, positions, **options)
        else:
            options |= {"segments": segments, "spread": m.activations}
            y = attend(query, key, value, **options)
        y = mark(y.reshape(*x.shape[:-1], -1), "attention")  # [batch, length, width of heads]
        width, product = m.hidden_size, m.product
        y = nn.Dense(width, m.output_bias, m.dtype, dot_general=product, name="o_proj")(y)
        return mark(y, "projection"), past


class Mlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    model: "Llama"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the module to ``x[..., width]``."""
        m = self.model
        gate = nn.Dense(m.intermediate_size, m.mlp_bias, m.dtype, name="gate_proj")(x)
        up = nn.Dense(m.intermediate_size, m.mlp_bias, m.dtype, name="up_proj")(x)
        gate, up = mark(gate, "projection"), mark(up, "projection")
        width, product = m.hidden_size, m.product
        down = nn.Dense(width, m.mlp_bias, m.dtype, dot_general=product, name="down_proj")
        return down(nn.silu(gate) * up)


class Layer(nn.Module):
    """A decoder block for ``nn.scan``: the carry is the hidden states, the output its cache."""

    model: "Llama"

    @nn.compact
    def __call__(
        self, x: jax.Array, past: Cache | None, turns: Turns, segments: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        """Apply the module to ``x[batch, length, width]``, whose positions have these turns."""
        m = self.model
        x = mark(x, "layer")
        y = nn.RMSNorm(m.rms_norm_eps, m.dtype, name="input_layernorm")(x)
        y, past = Attention(m, name="self_attn")(y, past, turns, segments)
        x = x + y
        y = nn.RMSNorm(m.rms_norm_eps, m.dtype, name="post_attention_layernorm")(x)
        return m.spread(x + Mlp(m, name="mlp")(y)), past


class Llama(nn.Module):
    """A language model, from tokens to the logits of the next; fields are named as in config.json.

    Attributes:
        attention_bias: whether queries, keys and values have a bias, as in Qwen2.
        output_bias: whether the projection after attention has a bias.
        qk_norm: whether queries and keys are normalized, as in Qwen3.
        scan_layers: whether the layers are one stacked block, compiled once.
        attention: a kernel of ``recipes.attention.NAMES``.
        unroll: how many scanned layers one step of the loop runs.
        remat: what of a layer the backward pass keeps, one of ``recipes.remat.NAMES``; True is
            ``"full"``, False ``"none"``.
        chunk: how many tokens' logits there are at once where the loss is asked for.
        frozen_head: whether the head has no gradient and no adapter: the loss is faster then.
        dtype: the dtype of the activations; the parameters are float32.
        activations: a sharding of ``[batch, length, width]`` between the layers, for meshes where
            the weights are sharded too and the compiler must not choose.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    scan_layers: bool = False
    unroll: int = 1
    remat: bool | str = False
    attention: str = "auto"
    chunk: int = 1024
    frozen_head: bool = False
    dtype: Any = jnp.float32
    activations: NamedSharding | None = None

    def spread(self, x: jax.Array) -> jax.Array:
        """Constrain an activation to the sharding in the field ``activations``."""
        if self.activations is None:
            return x
        move = jax.sharding.reshard if self.explicit else jax.lax.with_sharding_constraint
        return move(x, self.activations)

    @property
    def explicit(self) -> NamedSharding | None:
        """The value of ``activations`` on Explicit axes, as an ``out_sharding``; None elsewhere.

        On Explicit axes JAX does not guess an ambiguous output sharding.
        """
        is_typed = self.activations and AxisType.Explicit in self.activations.mesh.axis_types
        return self.activations if is_typed else None

    @property
    def product(self) -> Callable[..., jax.Array]:
        """The product that feeds the residual stream; its sum may be over a sharded axis."""
        return partial(jax.lax.dot_general, out_sharding=self.explicit)

    def join_heads(self, x: jax.Array) -> jax.Array:
        """Reshard queries, keys and values on Explicit axes if their parts would split heads."""
        if self.explicit is None:
            return x
        (axis,) = jax.typeof(x).sharding.spec[-1:]
        parts = self.explicit.mesh.shape[axis] if axis else 1
        return jax.sharding.reshard(x, self.explicit) if self.num_key_value_heads % parts else x

    def empty(self, batch: int, size: int) -> Cache:
        """Return an empty cache for rows of up to ``size`` tokens; logits beyond are NaN."""
        shape = self.num_hidden_layers, batch, size, self.num_key_value_heads, self.head_dim
        keys, values = (jnp.zeros(shape, self.dtype) for _ in range(2))
        return Cache(keys, values, jnp.zeros(batch, jnp.int32))

    def recomputed(self, layer: Any) -> Any:
        """Return a layer of which the backward pass keeps what the field ``remat`` says."""
        name = self.remat if isinstance(self.remat, str) else ("none", "full")[self.remat]
        if name == "none":
            return layer
        is_loop = self.scan_layers and self.unroll < self.num_hidden_layers
        return nn.remat(layer, prevent_cse=not is_loop, policy=policy_of(name))

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        cache: Cache | None = None,
        targets: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> Any:
        """Return the logits ``[batch, length, vocab_size]`` after each of ``ids[batch, length]``.

        A ``cache`` contains the tokens before ``ids``. With it, return the logits and the cache,
        with ``ids`` added. With ``targets[batch, length]``, return their summed cross-entropy in
        nats, without those that are negative; no more than ``chunk`` tokens' logits exist at once.
        A run of one number in ``segments[batch, length]`` is a text of its own.
        """
        shape = self.clone(parent=None, name=None)  # the fields, for the layers
        table = nn.Embed(self.vocab_size, self.hidden_size, dtype=self.dtype, name="embed_tokens")
        if self.explicit is None:
            x = self.spread(table(ids))
        else:
            x = table.embedding.astype(self.dtype).at[ids].get(out_sharding=self.explicit)
        positions = cache.positions(ids.shape[1]) if cache else jnp.arange(ids.shape[1])[None]
        if segments is not None:
            if cache:
                raise ValueError("segments: a cache has one text per row. Pass one of the two")
            positions, segments = packed(segments, ids.shape)
        turns = turns_of(positions, self.head_dim, self.rope_theta)  # once, for all layers
        past: Any
        layer = self.recomputed(Layer)
        if self.scan_layers:
            axes: Any = (Cache(0, 0, nn.broadcast) if cache else 0, nn.broadcast, nn.broadcast)
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.num_hidden_layers,
                in_axes=axes,
                unroll=self.unroll,
            )
            x, past = stack(shape, name="layers")(x, cache, turns, segments)
        else:
            pasts: list[Any] = []
            for i in range(self.num_hidden_layers):
                past = Cache(cache.keys[i], cache.values[i], cache.lengths) if cache else None
                x, past = layer(shape, name=f"layers_{i}")(x, past, turns, segments)
                pasts.append(past)
            past = Cache(*(jnp.stack(y) for y in zip(*pasts, strict=True))) if cache else None
        x = nn.RMSNorm(self.rms_norm_eps, self.dtype, name="norm")(x)
        head = nn.Dense(self.vocab_size, False, self.dtype, name="lm_head")
        if targets is not None:
            tied = self.tie_word_embeddings
            kernel = table.embedding if tied else head.variables["params"]["kernel"]
            return chunked_loss(x, kernel, targets, self.chunk, tied, self.frozen_head)
        logits = table.attend(x) if self.tie_word_embeddings else head(x)
        if cache is None:
            return logits
        end = cache.lengths + ids.shape[1]
        fits = positions < cache.keys.shape[2]
        return jnp.where(fits[..., None], logits, jnp.nan), past._replace(lengths=end)


def written(past: Cache, key: jax.Array, value: jax.Array, positions: jax.Array) -> Cache:
    """Write keys and values at their positions into a layer's cache; drop those beyond its size."""
    rows = jnp.arange(len(positions))[:, None]
    keys = past.keys.at[rows, positions].set(key.astype(past.keys.dtype), mode="drop")
    values = past.values.at[rows, positions].set(value.astype(past.values.dtype), mode="drop")
    return past._replace(keys=keys, values=values)


def from_config(config: Mapping[str, Any], **changes: Any) -> Llama:
    """Return the model of a config.json.

    Args:
        config: the contents of config.json.
        **changes: other values for fields of :class:`Llama`.

    Raises:
        ValueError: the architecture is another, or a setting is not supported.
    """
    kind = config.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"model_type {kind!r}: expected llama, mistral, qwen2 or qwen3")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {config['hidden_act']!r}; this model supports silu only")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"the rotary positions are {rope!r}; this model does not scale them")
    for name in ("num_attention_heads", "hidden_size"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise ValueError(f"{name} is {config.get(name)!r}, expected an integer >= 1")
    is_windowed = kind == "mistral" or config.get("use_sliding_window", False)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    fields = {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or width // heads,
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0)),
        "sliding_window": config.get("sliding_window") if is_windowed else None,
        "attention_bias": config.get("attention_bias", kind == "qwen2"),
        "output_bias": kind != "qwen2" and config.get("attention_bias", False),
        "qk_norm": kind == "qwen3",
    }
    of_model = set(Llama.__dataclass_fields__) - {"parent", "name"} - fields.keys()
    return Llama(**{**{k: config[k] for k in of_model if k in config}, **fields, **changes})


def generate(
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    ids: Sequence[int],
    *,
    length: int,
    stop: int | None = None,
) -> list[int]:
    """Continue ``ids`` greedily, without a cache: every token reads all earlier ones again.

    Args:
        apply: a function of parameters and ``ids[1, length]`` that returns logits; compiled once.
        params: its first argument.
        ids: the tokens of the prompt.
        length: the length of prompt and continuation together.
        stop: the token that ends the continuation.

    Returns:
        The new tokens, without ``stop``.
    """
    seen = np.zeros((1, length), np.int32)  # causal: later positions do not count
    seen[0, : len(ids)] = ids
    for end in range(len(ids), length):
        token = int(apply(params, jnp.asarray(seen))[0, end - 1].argmax())
        if token == stop:
            break
        seen[0, end] = token
    else:
        end = length
    return seen[0, len(ids) : end].tolist()
