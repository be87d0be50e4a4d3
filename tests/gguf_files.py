"""Write small GGUF models with the gguf library."""

import gguf
import numpy as np

KINDS = gguf.GGMLQuantizationType
RNG = np.random.default_rng(0)
HIDDEN, INNER, HEADS, KEYS, LAYERS, VOCAB = 32, 64, 4, 2, 2, 40
HEAD = HIDDEN // HEADS

# The tensors of a layer: their names in GGUF, their names in PyTorch, their shapes.
LAYER = {
    "attn_norm.weight": ("input_layernorm.weight", (HIDDEN,)),
    "attn_q.weight": ("self_attn.q_proj.weight", (HIDDEN, HIDDEN)),
    "attn_k.weight": ("self_attn.k_proj.weight", (KEYS * HEAD, HIDDEN)),
    "attn_v.weight": ("self_attn.v_proj.weight", (KEYS * HEAD, HIDDEN)),
    "attn_output.weight": ("self_attn.o_proj.weight", (HIDDEN, HIDDEN)),
    "ffn_norm.weight": ("post_attention_layernorm.weight", (HIDDEN,)),
    "ffn_gate.weight": ("mlp.gate_proj.weight", (INNER, HIDDEN)),
    "ffn_up.weight": ("mlp.up_proj.weight", (INNER, HIDDEN)),
    "ffn_down.weight": ("mlp.down_proj.weight", (HIDDEN, INNER)),
}
BIASES = {
    "attn_q.bias": ("self_attn.q_proj.bias", (HIDDEN,)),
    "attn_k.bias": ("self_attn.k_proj.bias", (KEYS * HEAD,)),
    "attn_v.bias": ("self_attn.v_proj.bias", (KEYS * HEAD,)),
}
NORMS = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", (HEAD,)),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", (HEAD,)),
}
TOP = {
    "token_embd.weight": ("model.embed_tokens.weight", (VOCAB, HIDDEN)),
    "output_norm.weight": ("model.norm.weight", (HIDDEN,)),
    "output.weight": ("lm_head.weight", (VOCAB, HIDDEN)),
}
MORE: dict[str, dict] = {"llama": {}, "qwen2": BIASES, "qwen3": NORMS, "gemma": {}}


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def places(arch):
    """Return all tensors: their names in GGUF, their names in PyTorch, their shapes."""
    layers = {
        f"blk.{k}.{there}": (f"model.layers.{k}.{here}", shape)
        for k in range(LAYERS)
        for there, (here, shape) in (LAYER | MORE[arch]).items()
    }
    return TOP | layers


def model_of(arch):
    return {there: floats(*shape) for there, (_, shape) in places(arch).items()}


def keys_of(arch):
    return {
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KEYS,
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 64,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 12345.0,
    }


def write(path, tensors, keys, arch="llama"):
    """Write a file with gguf's writer; tensors are floats, or pairs of blocks and their type."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)
    for name, x in tensors.items():
        data, kind = x if isinstance(x, tuple) else (x, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, arch="llama", tensors=None, **changes):
    """Write a model of an architecture, with keys changed or, for None, removed."""
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    keys = keys_of(arch) | {
        key if key.startswith(("tokenizer", "general", "split")) else f"{arch}.{key}": value
        for key, value in changed.items()
    }
    keys = {key: value for key, value in keys.items() if value is not None}
    return write(path, tensors or model_of(arch), keys, arch)
