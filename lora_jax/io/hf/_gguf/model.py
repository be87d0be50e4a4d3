"""Read GGUF files, which llama.cpp runs, as models in Hugging Face's layout.

GGUF files have other names; the rows of queries and keys are in the order of interleaved rotary
embeddings; Gemma's norms contain the 1 that the model adds; and weights in blocks of few bits
become float32.

The format has no checksums. A header that contradicts itself, its tensors or the size of the file
is refused; a changed number in a tensor, another epsilon or another word cannot be noticed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.io._tensor import Tensor
from lora_jax.io.hf._gguf.header import Header, read_header
from lora_jax.io.hf._gguf.read import lazy

# Names there, names here, and axes: of hidden, inner, vocabulary, queries, keys and a head.
_Table = Mapping[str, tuple[str, str]]

_TOP: _Table = {
    "token_embd.weight": ("model.embed_tokens.weight", "vh"),
    "output_norm.weight": ("model.norm.weight", "h"),
    "output.weight": ("lm_head.weight", "vh"),
    "rope_freqs.weight": ("", ""),  # in the configuration here
}

_OPTIONAL = {"output.weight", "rope_freqs.weight"}

_LAYER: _Table = {
    "attn_norm.weight": ("input_layernorm.weight", "h"),
    "attn_q.weight": ("self_attn.q_proj.weight", "qh"),
    "attn_k.weight": ("self_attn.k_proj.weight", "kh"),
    "attn_v.weight": ("self_attn.v_proj.weight", "kh"),
    "attn_output.weight": ("self_attn.o_proj.weight", "hq"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "h"),
    "ffn_gate.weight": ("mlp.gate_proj.weight", "fh"),
    "ffn_up.weight": ("mlp.up_proj.weight", "fh"),
    "ffn_down.weight": ("mlp.down_proj.weight", "hf"),
}

_BIASES: _Table = {
    "attn_q.bias": ("self_attn.q_proj.bias", "q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "k"),
    "attn_v.bias": ("self_attn.v_proj.bias", "k"),
}

_HEAD_NORMS: _Table = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "d"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "d"),
}


@dataclass(frozen=True)
class _Architecture:
    """Describe how llama.cpp stores a kind of model.

    Attributes:
        name: of its classes in transformers.
        layer: the tensors of a layer.
        interleaved: the tensors whose rows are in the order of interleaved rotary embeddings.
        norms: the number that the file adds to the weights of norms.
        config: the part of the configuration that all models of the kind share.
    """

    name: str
    layer: _Table
    interleaved: frozenset[str] = frozenset()
    norms: float = 0.0
    config: Mapping[str, Any] = field(default_factory=dict)


_SILU = {"hidden_act": "silu", "attention_bias": False}
_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}

_ARCHITECTURES = {
    "llama": _Architecture(  # and Mistral: without a window of attention the two are one
        "Llama",
        _LAYER,
        interleaved=frozenset({"attn_q.weight", "attn_k.weight"}),
        config={**_SILU, "mlp_bias": False},
    ),
    "qwen2": _Architecture("Qwen2", {**_LAYER, **_BIASES}, config={"hidden_act": "silu"}),
    "qwen3": _Architecture("Qwen3", {**_LAYER, **_HEAD_NORMS}, config=_SILU),
    "gemma": _Architecture("Gemma", _LAYER, norms=1.0, config={**_GELU, "attention_bias": False}),
}

# The known keys of a model, after the name of its architecture; any other key is refused.
_KEYS = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}

_TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad"}  # there, here


def tensors_in(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Find all tensors of a file, by the names of Hugging Face's classes.

    Raises:
        ImportError: gguf is not installed.
        OSError: the file cannot be read.
        ValueError: the file is damaged or of an unknown architecture; tensors are missing, left
            over, or of other shapes or types.
    """
    header = read_header(Path(path))
    return {name: tensor for name, tensor in _tensors(header).items() if name}


def config_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Make the ``config.json`` of the model in a file.

    Raises:
        ImportError: gguf is not installed.
        OSError: the file cannot be read.
        ValueError: as in :func:`tensors_in`, or a key has no counterpart.
    """
    header = read_header(Path(path))
    tensors, arch, sizes = _tensors(header), _architecture(header), _sizes(header)
    if unknown := sorted(header.own() - _KEYS):
        raise ValueError(
            f"{path}: {header.architecture}.{unknown[0]} has no counterpart in a configuration "
            f"here: expected nothing besides {sorted(_KEYS)}"
        )
    return {
        "architectures": [f"{arch.name}ForCausalLM"],
        "model_type": arch.name.lower(),
        "torch_dtype": "float32",
        "hidden_size": sizes["h"],
        "intermediate_size": sizes["f"],
        "num_hidden_layers": header.count("block_count"),
        "num_attention_heads": header.count("attention.head_count"),
        "num_key_value_heads": sizes["k"] // sizes["d"],
        "head_dim": sizes["d"],
        "vocab_size": sizes["v"],
        "max_position_embeddings": header.count("context_length"),
        "rms_norm_eps": header.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": header.real("rope.freq_base", 1e4),
        **_rope_scaling(header, tensors.get("")),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        **{f"{here}_token_id": header.token(there, sizes["v"]) for there, here in _TOKENS.items()},
        **arch.config,
    }


def _architecture(header: Header) -> _Architecture:
    if header.architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{header.path}: general.architecture={header.architecture!r}: expected one of "
            f"{sorted(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[header.architecture]


def _sizes(header: Header) -> dict[str, int]:
    """Find the sizes of the axes of tensors, by their letters."""
    path, table = header.path, header.tensors.get("token_embd.weight")
    hidden, heads = header.count("embedding_length"), header.count("attention.head_count")
    keys = header.count("attention.head_count_kv", heads)
    head = header.count("attention.key_length", max(1, hidden // heads))
    if heads % keys or head % 2 or ("attention.key_length" not in header.own() and hidden % heads):
        raise ValueError(
            f"{path}: {heads} heads of {head}, {keys} heads of keys, {hidden} hidden: expected "
            "heads of an even size that share the keys, and the hidden ones, evenly"
        )
    vocab = table.shape[0] if table else header.count("vocab_size")
    repeated = {"attention.value_length": head, "rope.dimension_count": head, "vocab_size": vocab}
    for key, expected in repeated.items():
        if (value := header.count(key, expected)) != expected:
            raise ValueError(f"{path}: {header.architecture}.{key}={value}, expected {expected}")
    if "tokenizer.ggml.tokens" in header.values:
        words = len(header.texts("tokenizer.ggml.tokens"))
        if words != vocab:
            raise ValueError(f"{path}: {words} words, and token_embd.weight has {vocab} rows")
    return {
        "h": hidden,
        "f": header.count("feed_forward_length"),
        "v": vocab,
        "q": heads * head,
        "k": keys * head,
        "d": head,
    }


def _tensors(header: Header) -> dict[str, Tensor]:
    """Find the tensors by their names here; the factors of rotary frequencies have the name ""."""
    path, arch, sizes = header.path, _architecture(header), _sizes(header)
    layers = header.count("block_count")
    if layers > len(header.tensors):
        raise ValueError(
            f"{path}: {header.architecture}.block_count={layers} layers, and there are "
            f"{len(header.tensors)} tensors"
        )
    names = dict(_TOP) | {
        f"blk.{k}.{there}": (f"model.layers.{k}.{here}", axes)
        for k in range(layers)
        for there, (here, axes) in arch.layer.items()
    }
    if missing := sorted(names.keys() - _OPTIONAL - header.tensors.keys()):
        raise ValueError(f"{path}: {len(missing)} tensors are missing, such as {missing[:3]}")
    if unknown := sorted(header.tensors.keys() - names.keys()):
        raise ValueError(
            f"{path}: {len(unknown)} tensors have no place in a model of architecture "
            f"{header.architecture!r}, such as {unknown[:3]}"
        )
    found = {}
    for there, info in header.tensors.items():
        here, axes = names[there]
        expected = tuple(sizes[axis] for axis in axes) or (sizes["d"] // 2,)
        if info.shape != expected:
            raise ValueError(f"{path}: {there!r} has shape {info.shape}, expected {expected}")
        is_interleaved = there.split(".", 2)[-1] in arch.interleaved
        heads = info.shape[0] // sizes["d"] if is_interleaved else 0
        added = arch.norms if there.endswith("norm.weight") else 0.0
        found[here] = lazy(path, there, info, heads=heads, added=added)
    return found


def _rope_scaling(header: Header, freqs: Tensor | None) -> dict[str, Any]:
    """Find how rotary frequencies are scaled: by name, or by a factor for each."""
    path = header.path
    kind = header.values.get(f"{header.architecture}.rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn") or (kind != "none" and freqs is not None):
        raise ValueError(
            f"{path}: {header.architecture}.rope.scaling.type={kind!r:.100}: expected 'none', "
            "'linear' or 'yarn', and only one of these and rope_freqs.weight"
        )
    if freqs is not None:
        return {"rope_scaling": _llama3(freqs, header)}
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": header.real("rope.scaling.factor")}
    if kind == "yarn":
        length = header.count("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = length
    return {"rope_scaling": scaling}


def _llama3(freqs: Tensor, header: Header) -> dict[str, Any]:
    """Find the configuration that gives these factors; all Llama 3 models differ in one number."""
    found = freqs.read().astype(np.float64)
    base = header.real("rope.freq_base", 1e4)
    low, high, length, factor = 1.0, 4.0, 8192, float(found.max())
    with np.errstate(all="ignore"):
        turns = length / (2 * np.pi * base ** (np.arange(len(found)) / len(found)))
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
    if not (0 < factor < inf and np.allclose(found, expected, rtol=1e-4, atol=0)):
        raise ValueError(
            f"{header.path}: 'rope_freqs.weight' has other factors than those of Llama 3, "
            f"{found[:3]} ... {found[-1]}: they have no counterpart in a configuration"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
