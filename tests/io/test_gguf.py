"""GGUF files as models in Hugging Face's layout."""

import functools
import importlib
import json
import os
import struct
import sys
import tracemalloc
from pathlib import Path

import gguf
import hypothesis
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from damage import EDITS, EXAMPLES, damaged, fuzz
from gguf_files import (
    HEAD,
    HEADS,
    HIDDEN,
    INNER,
    KEYS,
    KINDS,
    LAYERS,
    MORE,
    RNG,
    VOCAB,
    floats,
    keys_of,
    model_of,
    places,
    write,
    write_model,
)

from lora_jax.io.hf._gguf import header as _gguf_header
from lora_jax.io.hf._gguf import model as _gguf
from lora_jax.io.hf._gguf import read as _gguf_read
from lora_jax.io.hf._gguf.tokenizer import tokenizer_of


@pytest.mark.parametrize("arch", MORE)
def test_tensors_have_hugging_faces_names_and_shapes(arch, tmp_path):
    model = model_of(arch)
    found = _gguf.tensors_in(write_model(tmp_path / "a.gguf", arch, model))
    expected = {here: (model[there], shape) for there, (here, shape) in places(arch).items()}
    assert list(found) == list(expected)
    for name, (x, shape) in expected.items():
        assert found[name].shape == shape
        assert found[name].nbytes == x.nbytes
        read = np.asarray(found[name])
        assert read.dtype == found[name].dtype == np.float32
        if arch == "gemma" and name.endswith("norm.weight"):
            assert np.array_equal(read, x - np.float32(1))
        elif arch == "llama" and "q_proj" in name + name.replace("k_proj", "q_proj"):
            assert np.array_equal(np.sort(read, 0), np.sort(x, 0))  # rows in another order
            assert not np.array_equal(read, x)
        else:
            assert np.array_equal(read, x)
    assert np.asarray(found["model.norm.weight"], np.float16).dtype == np.float16


def rotated(x, interleaved, base=1e4):
    """``x [tokens, heads, size]`` turned by the angles of their places: pairs, or halves."""
    size = x.shape[-1]
    angles = np.arange(len(x))[:, None] * base ** -(np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # [tokens, 1, size / 2]
    one, other = (x[..., ::2], x[..., 1::2]) if interleaved else np.split(x, 2, -1)
    pair = one * cos - other * sin, one * sin + other * cos
    return np.stack(pair, -1).reshape(x.shape) if interleaved else np.concatenate(pair, -1)


def scores(x, q, k, interleaved):
    """Of attention, with grouped heads: ``[heads, tokens, tokens]``."""
    q, k = ((x @ w.T.astype(np.float64)).reshape(len(x), -1, HEAD) for w in (q, k))
    q, k = (rotated(y, interleaved) for y in (q, k))
    return np.einsum("thd,shd->hts", q, np.repeat(k, HEADS // KEYS, 1))


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_rows_in_halves_give_the_scores_that_pairs_gave(arch, tmp_path):
    model, x = model_of(arch), floats(9, HIDDEN)
    found = _gguf.tensors_in(write_model(tmp_path / "a.gguf", arch, model))
    theirs = (model[f"blk.1.attn_{name}.weight"] for name in "qk")
    ours = (found[f"model.layers.1.self_attn.{name}_proj.weight"].read() for name in "qk")
    expected = scores(x, *theirs, interleaved=arch == "llama")
    np.testing.assert_allclose(
        scores(x, *ours, interleaved=False), expected, rtol=0, atol=1e-9 * np.abs(expected).max()
    )


@functools.cache
def blocks(kind, rows, width):
    """Numbers in a type: quantized by gguf, or for types that it only reads, blocks of noise."""
    try:
        data = gguf.quantize(floats(rows, width), kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = RNG.integers(0, 256, (rows, width // block * size), np.uint8)
        data[..., 1::2] &= 0xBF  # no exponent is all ones: scales are finite
    return (data, kind)


def squares(path, arch, kind, width):
    """A file whose matrices are of a type, ``width`` wide and mostly as high; and its tensors."""
    model: dict = {}
    for there, x in model_of(arch).items():
        rows = width // 4 if "attn_k." in there or "attn_v." in there else width
        rows = VOCAB if x.shape == (VOCAB, HIDDEN) else rows
        model[there] = floats(rows) if x.ndim == 1 else blocks(kind, rows, width)
    sizes = {"embedding_length": width, "feed_forward_length": width}
    sizes |= {"attention__head_count": 8, "attention__head_count_kv": 2}
    return write_model(path, arch, model, **sizes), model


NAMES = "F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q4_K Q5_K Q6_K".split()


# Numbers at a time: all, some rows and a rest, less than a row.
@pytest.mark.parametrize(
    ("name", "chunk"), [(n, k) for n in NAMES for k in (2**20, 20_000)] + [("Q5_K", 700)]
)
def test_numbers_are_those_that_gguf_makes(name, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(_gguf_read, "_CHUNK", chunk)
    path, model = squares(tmp_path / "a.gguf", "qwen2", KINDS[name], 256)
    own = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
    found = _gguf.tensors_in(path)
    for there, (here, _) in places("qwen2").items():
        data, kind = model[there] if isinstance(model[there], tuple) else (model[there], KINDS.F32)
        x, expected = found[here].read(), gguf.dequantize(data, kind)
        assert x.shape == found[here].shape == expected.shape
        assert x.dtype == found[here].dtype == own.get(kind.name, np.float32)
        assert np.array_equal(x.astype(np.float32), expected)


def test_reading_takes_the_memory_of_one_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(_gguf_read, "_CHUNK", 2**14)
    path, _ = squares(tmp_path / "a.gguf", "llama", KINDS.Q4_1, 1024)
    tracemalloc.start()
    tensors = _gguf.tensors_in(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    for tensor in tensors.values():
        tensor.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(tensor.nbytes for tensor in tensors.values()) == 2**22
    assert 2**22 < peak < 1.3 * 2**22


def test_what_is_said_is_what_ggufs_reader_finds(tmp_path):
    more = {
        "general.name": "a ñame",
        "general.few": [1, 2, 3],
        "general.words": ["one", "two"],
        "general.yes": True,
    }
    path = write(tmp_path / "a.gguf", model_of("llama"), keys_of("llama") | more)
    ours, theirs = _gguf_header.read_header(path), gguf.GGUFReader(path)
    said = {name: field.contents() for name, field in theirs.fields.items()}
    said = {name: x for name, x in said.items() if not name.startswith("GGUF.")}
    assert ours.values.keys() == said.keys()
    for name, x in ours.values.items():
        assert x == (pytest.approx(said[name], rel=1e-7) if isinstance(x, float) else said[name])
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert (stored.start, stored.shape) == (tensor.data_offset, tensor.data.shape)
        assert stored.kind == tensor.tensor_type.name


def test_configurations_say_what_the_classes_want(tmp_path):
    config = _gguf.config_of(write_model(tmp_path / "a.gguf", tokenizer__ggml__bos_token_id=3))
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,  # not 9.99999974e-06
        "rope_theta": 12345.0,
        "tie_word_embeddings": False,
        "bos_token_id": 3,
        "eos_token_id": None,
        "pad_token_id": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    model = model_of("gemma")
    del model["output.weight"]
    config = _gguf.config_of(write_model(tmp_path / "b.gguf", "gemma", model, rope__freq_base=None))
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == 1e4
    assert config["hidden_activation"] == "gelu_pytorch_tanh"


def test_heads_may_be_of_another_size(tmp_path):
    model = model_of("qwen3")
    for k in range(LAYERS):
        for name, size in (("q", HEADS), ("k", KEYS), ("v", KEYS)):
            model[f"blk.{k}.attn_{name}.weight"] = floats(16 * size, HIDDEN)
        model[f"blk.{k}.attn_output.weight"] = floats(HIDDEN, 16 * HEADS)
        model |= {f"blk.{k}.attn_{name}_norm.weight": floats(16) for name in "qk"}
    size = {"attention__key_length": 16, "attention__value_length": 16}
    path = write_model(tmp_path / "a.gguf", "qwen3", model, **size)
    assert _gguf.config_of(path)["head_dim"] == 16
    assert _gguf.tensors_in(path)["model.layers.0.self_attn.k_proj.weight"].shape == (32, HIDDEN)


def freqs_of(factor, length=8192, size=HEAD, base=5e5):
    """The factors of Llama 3 as llama.cpp writes them: one frequency after the other."""
    found = []
    for k in range(size // 2):
        wave = 2 * np.pi * base ** (2 * k / size)
        smooth = (length / wave - 1) / 3
        between = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if wave < length / 4 else factor if wave > length else between)
    return np.array(found, np.float32)


def test_scaled_frequencies_are_in_the_configuration(tmp_path):
    def scaling(freqs=None, **keys):
        model = model_of("llama") | ({} if freqs is None else {"rope_freqs.weight": freqs})
        keys = {f"rope__scaling__{key}": value for key, value in keys.items()}
        keys["rope__freq_base"] = 5e5
        path = write_model(tmp_path / "a.gguf", "llama", model, **keys)
        assert set(_gguf.tensors_in(path)) == {here for here, _ in places("llama").values()}
        return _gguf.config_of(path).get("rope_scaling")

    assert scaling() is None
    assert scaling(type="none") is None
    assert scaling(type="linear", factor=4.0) == {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    assert scaling(type="yarn", factor=2.0, original_context_length=32) == yarn
    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert len(set(freqs_of(32.0))) > 2  # some as they are, some between, some slower
    assert scaling(freqs_of(32.0)) == llama3
    for freqs in (freqs_of(32.0, length=4096), freqs_of(32.0)[::-1].copy(), freqs_of(np.inf)):
        with pytest.raises(ValueError, match="other factors than those of Llama 3"):
            scaling(freqs)
    with pytest.raises(ValueError, match=r"rope\.scaling\.type='longrope': expected 'none'"):
        scaling(type="longrope")
    with pytest.raises(ValueError, match=r"type='linear': .* only one of these and rope_freqs"):
        scaling(freqs_of(32.0), type="linear", factor=4.0)
    with pytest.raises(ValueError, match=r"without llama\.rope\.scaling\.factor: expected a posi"):
        scaling(type="linear")


def changed(**changes):
    """The tensors of a Llama, some changed or left out; ``blk_0_x`` is ``blk.0.x.weight``."""
    names = {f"{key.replace('_', '.', 2)}.weight": x for key, x in changes.items()}
    return {name: x for name, x in (model_of("llama") | names).items() if x is not None}


OTHERS = [
    ({}, {"general__architecture": "mamba"}, r"architecture='mamba': .*'gemma', 'llama', 'qwen2'"),
    ({}, {"general__architecture": 3}, r"general\.architecture=3: expected a string"),
    ({"blk_0_attn_q": None}, {}, r"1 tensors are missing, such as \['blk\.0\.attn_q\.weight'\]"),
    ({"blk_0_more": floats(3)}, {}, r"1 tensors have no place .*'llama', such as \['blk\.0\.more"),
    ({"blk_0_attn_k": floats(32, 32)}, {}, r"'blk\.0\.attn_k\.weight' has shape \(32, 32\), .*16"),
    ({"blk_0_ffn_down": floats(64, 32)}, {}, r"has shape \(64, 32\), expected \(32, 64\)"),
    ({}, {"block_count": 1}, r"9 tensors have no place .*'blk\.1"),
    ({}, {"block_count": 10**6}, r"llama\.block_count=1000000 layers, and there are 21 tensors"),
    ({}, {"block_count": None}, r"without llama\.block_count: expected a positive integer"),
    ({}, {"block_count": 0}, r"llama\.block_count=0: expected a positive integer"),
    ({}, {"block_count": 2.0}, r"llama\.block_count=2\.0: expected a positive integer"),
    ({}, {"attention__head_count": [4, 4]}, r"head_count=\[4, 4\]: expected a positive integer"),
    ({}, {"attention__head_count": 3}, r"3 heads of 10, 2 heads of keys, 32 hidden: expected"),
    ({}, {"attention__head_count": 32}, r"32 heads of 1, 2 heads of keys"),
    ({}, {"attention__head_count": 8}, r"'blk\.0\.attn_k\.weight' has shape"),
    ({}, {"attention__value_length": 16}, r"llama\.attention\.value_length=16, expected 8"),
    ({}, {"rope__dimension_count": 4}, r"llama\.rope\.dimension_count=4, expected 8"),
    ({}, {"vocab_size": 41}, r"llama\.vocab_size=41, expected 40"),
    ({}, {"tokenizer__ggml__tokens": ["a"]}, "1 words, and token_embd.weight has 40 rows"),
    ({}, {"tokenizer__ggml__tokens": [1]}, r"tokenizer\.ggml\.tokens=\[1\]: expected a list of st"),
    ({}, {"split__count": 3}, "is one of 3 files of a model: make them one"),
]


@pytest.mark.parametrize(("tensors", "keys", "message"), OTHERS)
def test_other_models_are_refused(tensors, keys, message, tmp_path):
    path = write_model(tmp_path / "a.gguf", tensors=changed(**tensors), **keys)
    for read in (_gguf.tensors_in, _gguf.config_of):
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_count": 8}, r"llama\.expert_count has no counterpart in a configuration"),
        ({"attention__layer_norm_rms_epsilon": None}, "without llama.attention.*a positive, fini"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "epsilon=nan: expected a positive"),
        ({"rope__freq_base": float("inf")}, "freq_base=inf: expected a positive, finite"),
        ({"context_length": None}, "without llama.context_length"),
        ({"tokenizer__ggml__eos_token_id": VOCAB}, "eos_token_id=40: expected an integer below 40"),
        ({"tokenizer__ggml__padding_token_id": "x"}, "padding_token_id='x': expected an integer"),
    ],
)
def test_what_has_no_counterpart_is_refused(keys, message, tmp_path):
    path = write_model(tmp_path / "a.gguf", **keys)
    assert _gguf.tensors_in(path)
    with pytest.raises(ValueError, match=message):
        _gguf.config_of(path)


# Files of another making.


def text(x):
    x = x if isinstance(x, bytes) else x.encode()
    return struct.pack("<Q", len(x)) + x


def info(name="x", shape=(32,), kind=0, offset=0):
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + axes + struct.pack("<IQ", kind, offset)


def raw(values=(), infos=(), data=b"", version=3, magic=b"GGUF"):
    """A file by hand: values are pairs of a key and the bytes of its type and value."""
    head = magic + struct.pack("<IQQ", version, len(infos), len(values))
    head += b"".join(text(key) + value for key, value in values) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + data


ONE, NO = bytes(128), struct.pack("<I", 99)
LIST = struct.pack("<I", 9)
DAMAGED = [
    (b"", "4 bytes are to follow at 0, and the header can have 0"),
    (raw(magic=b"GGML"), "does not begin with GGUF"),
    (raw(version=1), "version 1, expected 2 or 3"),
    (raw(version=3 << 24), "version 50331648, expected 2 or 3, lowest byte first"),
    (raw([("a", NO)]), "a value at .* is of type 99, which there is not"),
    (raw([("a", LIST + NO + bytes(8))]), "a list at .* is of type 99, which there is not"),
    (raw([("a", LIST + LIST + bytes(8))]), "a list at .* is of type 9, which there is not"),
    (raw([("a", struct.pack("<IB", 7, 2))]), "2 is neither true nor false"),
    (raw([("a", struct.pack("<IB", 7, 1))] * 2), "'a' stands twice"),
    (raw([("a", struct.pack("<I", 8) + text(b"\xff"))]), "can't decode byte 0xff"),
    (raw([("a", LIST + struct.pack("<IQ", 8, 2**63))]), "bytes are to follow"),
    (raw([("a", LIST + struct.pack("<IQ", 4, 2**63))]), "bytes are to follow"),
    (raw([("general.alignment", struct.pack("<II", 4, 24))]), "alignment=24, expected a power"),
    (raw([("general.alignment", struct.pack("<II", 4, 0))]), "alignment=0, expected a power"),
    (raw(infos=[info(shape=())]), "'x' has 0 axes, expected 1 to 4"),
    (raw(infos=[info(shape=(1,) * 5)]), "'x' has 5 axes"),
    (raw(infos=[info(kind=77)]), r"'x' is of type 77, which this version .* \{0: 'F32'"),
    (raw(infos=[info(kind=26)]), "'x' is of type 26, which this version"),  # I32
    (raw(infos=[info(), info(offset=128)], data=2 * ONE), "a tensor 'x' stands twice"),
    (raw(infos=[info(offset=32)], data=ONE), "'x' begins at 32, expected 0"),
    (raw(infos=[info(), info("y", offset=64)], data=2 * ONE), "'y' begins at 64, expected 128"),
    (raw(infos=[info(shape=(48,), kind=8)], data=ONE), r"'x', Q8_0 of shape \(48,\): .* of 32"),
    (raw(infos=[info(shape=(32, 0))], data=ONE), r"'x', F32 of shape \(0, 32\)"),
    (raw(infos=[info(shape=(2**62,) * 4)], data=ONE), "224 bytes, and its tensors end at"),
    (raw(infos=[info()], data=ONE[:-1]), "191 bytes, and its tensors end at 192"),
    (raw(infos=[info()], data=ONE + b"\0"), "193 bytes, and its tensors end at 192"),
]


@pytest.mark.parametrize(("data", "message"), DAMAGED)
def test_damaged_headers_are_refused(data, message, tmp_path):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a is no complete GGUF file: .*{message}"):
        _gguf.tensors_in(tmp_path / "a")


def test_headers_end_somewhere(tmp_path, monkeypatch):
    path = write_model(tmp_path / "a.gguf")
    monkeypatch.setattr(_gguf_header, "_LARGEST", 256)
    with pytest.raises(ValueError, match="and the header can have 256"):
        _gguf.tensors_in(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        _gguf.tensors_in(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        _gguf.config_of(tmp_path)


def test_a_file_that_is_cut_off_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    path = write_model(tmp_path / "a.gguf")
    tensors = _gguf.tensors_in(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4096])
    with pytest.raises(ValueError, match=r"was cut off while 'blk\.1\.ffn_down\.weight' was read"):
        tensors["model.layers.1.mlp.down_proj.weight"].read()
    path.write_bytes(whole[:100])
    size = os.stat_result((0,) * 6 + (len(whole), 0, 0, 0))
    monkeypatch.setattr(_gguf_header.os, "fstat", lambda _: size)
    with pytest.raises(ValueError, match="no complete GGUF file: it was cut off while it was read"):
        _gguf.tensors_in(path)


def test_damaged_scales_are_noticed(tmp_path):
    model = model_of("llama")
    data, kind = blocks(KINDS.Q8_0, *model["output.weight"].shape)
    model["output.weight"] = data.copy(), kind
    model["output.weight"][0][3, :2] = 0, 0x7C  # infinity
    found = _gguf.tensors_in(write_model(tmp_path / "a.gguf", tensors=model))
    with pytest.raises(ValueError, match=r"a\.gguf: 'output\.weight' has scales that are not fin"):
        found["lm_head.weight"].read()


def test_damaged_files_are_errors_or_models_of_the_same_shape(tmp_path):
    model = model_of("llama")
    for name, x in model.items():
        if x.ndim == 2:
            model[name] = blocks(KINDS.Q4_1, *x.shape)
    path = words(tmp_path / "a.gguf", "smollm", model)
    data = path.read_bytes()
    shapes = {name: tensor.shape for name, tensor in _gguf.tensors_in(path).items()}
    outcomes = []

    @fuzz
    @hypothesis.given(EDITS)
    def run(edits):
        (tmp_path / "b").write_bytes(damaged(data, edits))
        for read in (_gguf.tensors_in, _gguf.config_of, tokenizer_of):
            try:
                found = read(tmp_path / "b")
                if read is _gguf.tensors_in:
                    assert {name: tensor.shape for name, tensor in found.items()} == shapes
                    assert all(x.read().shape == shapes[name] for name, x in found.items())
            except (ValueError, OSError) as error:
                outcomes.append("refused" if str(tmp_path / "b") in str(error) else str(error))
            else:  # the format has no checksum: other numbers are a model, too
                outcomes.append("read")

    run()
    assert set(outcomes) == {"refused", "read"}
    assert outcomes.count("refused") > 0.4 * len(outcomes) >= 0.4 * 3 * 0.8 * EXAMPLES


# Tokenizers.

TEXT = "It's 12 cats, don't  they'LL say\n\n  café naïve 1234567 ½ 日本 = x**2; \t<|im_end|> end"


def splits(pre):
    """How the models' own tokenizers take a text apart, and what else they do."""
    parts, more = tokenizers.pre_tokenizers, tokenizers.normalizers
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    plain = parts.ByteLevel(add_prefix_space=False)
    rest = parts.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(digits):
        return parts.Split(tokenizers.Regex(words % digits), behavior="isolated")

    return {
        "gpt-2": (plain, None),
        "smollm": (parts.Sequence([parts.Digits(individual_digits=True), plain]), None),
        "llama-bpe": (parts.Sequence([split("{1,3}"), rest]), None),
        "qwen2": (parts.Sequence([split(""), rest]), more.NFC()),
    }[pre]


@functools.cache
def trained(pre):
    """A tokenizer of a kind that has learnt the text above and this file."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe"))
    made.pre_tokenizer, normalizer = splits(pre)
    if normalizer:
        made.normalizer = normalizer
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<|bos|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator([TEXT, *map(str, range(2000)), Path(__file__).read_text()], trainer)
    return made


def words(path, pre, tensors=None, **changes):
    """A file with a vocabulary."""
    model = json.loads(trained(pre).to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    tensors = tensors or model_of("llama")
    if VOCAB != len(vocab):
        tensors["token_embd.weight"] = tensors["output.weight"] = floats(len(vocab), HIDDEN)
    keys = {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": pre,
        "tokenizer__ggml__tokens": vocab,
        "tokenizer__ggml__merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer__ggml__token_type": [3] * 3 + [1] * (len(vocab) - 3),
        "tokenizer__ggml__bos_token_id": 0,
        "tokenizer__ggml__eos_token_id": 1,
        "tokenizer__ggml__padding_token_id": 2,
        "tokenizer__chat_template": "{{ messages }}",
    }
    return write_model(path, "llama", tensors, **(keys | changes))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokenizers_give_the_ids_of_those_that_were_written(pre, tmp_path):
    path = words(tmp_path / "a.gguf", pre, tokenizer__ggml__add_bos_token=False)
    files = tokenizer_of(path)
    ours, theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"]), trained(pre)
    for some in (TEXT, "", " ", "a   1 b  22", "é", *TEXT.split(" ")):  # e and an accent
        found, expected = ours.encode(some), theirs.encode(some)
        assert (found.ids, found.offsets) == (expected.ids, expected.offsets)
        whole = ours.decode(found.ids, skip_special_tokens=False)
        assert whole == (theirs.normalizer.normalize_str(some) if theirs.normalizer else some)
    assert ours.decode(ours.encode("a<|im_end|>").ids) == "a"
    assert json.loads(files["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "chat_template": "{{ messages }}",
    }


def test_texts_begin_and_end_as_the_file_says(tmp_path):
    def ids(pre, *pair, **keys):
        keys = {f"tokenizer__ggml__{key}": value for key, value in keys.items()}
        files = tokenizer_of(words(tmp_path / "a.gguf", pre, **keys))
        return tokenizers.Tokenizer.from_str(files["tokenizer.json"]).encode(*pair).ids

    (a,), (b,) = (trained("smollm").encode(x).ids for x in "ab")
    assert ids("smollm", "a") == [a]
    assert ids("smollm", "a", add_bos_token=True) == [0, a]
    assert ids("smollm", "a", "b", add_bos_token=True) == [0, a, 0, b]
    assert ids("smollm", "a", "b", add_eos_token=True) == [a, 1, b, 1]
    assert ids("smollm", "a", add_bos_token=True, add_eos_token=True) == [0, a, 1]
    assert ids("llama-bpe", "a")[0] == 0  # where the file says nothing
    assert len(ids("llama-bpe", "a", add_bos_token=False)) == 1


def test_added_words_and_templates_by_name(tmp_path):
    count = len(json.loads(trained("smollm").to_str())["model"]["vocab"])
    types = [3] * 2 + [4] + [1] * (count - 3)
    more = {"tokenizer__chat_templates": ["tool"], "tokenizer__chat_template__tool": "{{ tools }}"}
    more |= {"tokenizer__ggml__token_type": types}
    files = tokenizer_of(words(tmp_path / "a.gguf", "smollm", **more))
    made = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    assert made.decode(made.encode("a<|pad|><|im_end|>").ids) == "a<|pad|>"  # found, and no sign
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == [
        {"name": "default", "template": "{{ messages }}"},
        {"name": "tool", "template": "{{ tools }}"},
    ]
    none = tokenizer_of(words(tmp_path / "b", "smollm", tokenizer__chat_template=None))
    assert "chat_template" not in json.loads(none["tokenizer_config.json"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ggml__model": "llama"}, "model='llama' with tokenizer.ggml.pre='smollm': expected"),
        ({"ggml__pre": "tekken"}, r"pre='tekken': .* one of \['gpt-2', 'llama-bpe', 'qwen2'"),
        ({"ggml__pre": None}, "pre='': expected"),
        ({"ggml__model": None}, "without tokenizer.ggml.model: expected a string"),
        ({"ggml__tokens": None}, "without tokenizer.ggml.tokens: expected a list of strings"),
        ({"ggml__tokens": ["a", "a"]}, "tokens has empty words, or some twice"),
        ({"ggml__tokens": ["a", ""]}, "tokens has empty words, or some twice"),
        ({"ggml__merges": ["ab"]}, "merges: 'ab': expected two words of the vocabulary"),
        ({"ggml__merges": ["日 本"]}, "merges: '日 本': expected two words"),
        ({"ggml__token_type": None}, "token_type: expected a type for each of"),
        ({"ggml__token_type": [1, 2]}, "token_type: expected a type for each of"),
        ({"ggml__bos_token_id": 10**6}, "bos_token_id=1000000: expected an integer below"),
        ({"ggml__add_bos_token": "yes"}, "add_bos_token='yes': expected true or false"),
        (
            {"ggml__add_bos_token": True, "ggml__bos_token_id": None},
            "add_bos_token without tokenizer.ggml.bos_token_id",
        ),
        ({"chat_template": 3}, "tokenizer.chat_template=3: expected a string"),
    ],
)
def test_other_tokenizers_are_refused(keys, message, tmp_path):
    keys = {f"tokenizer__{key}": value for key, value in keys.items()}
    path = words(tmp_path / "a.gguf", "smollm", **keys)
    with pytest.raises(ValueError, match=message) as error:
        tokenizer_of(path)
    assert str(path) in str(error.value)


def test_what_the_library_refuses_is_an_error_of_the_file(tmp_path, monkeypatch):
    path = words(tmp_path / "a.gguf", "smollm")

    def no(**_):
        raise Exception("no")

    monkeypatch.setattr(tokenizers.models, "BPE", no)
    with pytest.raises(ValueError, match=r"a\.gguf: its vocabulary is no tokenizer: no"):
        tokenizer_of(path)


@pytest.mark.parametrize("library", ["gguf", "tokenizers"])
def test_what_is_not_installed_is_named(library, tmp_path, monkeypatch):
    path = words(tmp_path / "a.gguf", "smollm")
    monkeypatch.setitem(sys.modules, library, None)
    _gguf_header._kinds.cache_clear()
    with pytest.raises(ImportError, match=rf"with {library}, .* pip\s+install 'lora-jax\[gguf\]'"):
        tokenizer_of(path)


# Beside transformers.

PEERS = {
    "llama": ("Llama", {"head_dim": 16}),
    "llama, scaled": (
        "Llama",
        {"head_dim": 16, "tie_word_embeddings": True, "rope_theta": 5e5}
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 128}),  # transformers reads no other from a file
    "gemma": ("Gemma", {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}),
}


def peer(name, tmp_path):
    """A model of transformers with random weights, and a file of it as llama.cpp makes it."""
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    family, more = PEERS[name]
    arch = {"mistral": "llama"}.get(name, name.split(",")[0])
    config = getattr(transformers, f"{family}Config")(
        **{"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER}
        | {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEYS}
        | {"max_position_embeddings": 64, "rope_theta": 12345.0, "pad_token_id": 2}
        | more
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms and biases that do something
        for x in model.parameters():
            x.copy_(0.2 * torch.randn_like(x))
    head = getattr(config, "head_dim", None) or HIDDEN // HEADS
    state, tensors = model.state_dict(), {}
    for there, (here, _) in places(arch).items():
        if there == "output.weight" and config.tie_word_embeddings:
            continue
        x = state[here].numpy()
        if arch == "llama" and there.split(".", 2)[-1] in ("attn_q.weight", "attn_k.weight"):
            x = x.reshape(-1, 2, head // 2, HIDDEN).swapaxes(1, 2).reshape(x.shape)
        if arch == "gemma" and there.endswith("norm.weight"):
            x = x + np.float32(1)
        tensors[there] = np.ascontiguousarray(x)
    if getattr(config, "rope_scaling", None):
        tensors["rope_freqs.weight"] = freqs_of(config.rope_scaling["factor"], size=head)
    keys = {"attention__key_length": head, "attention__value_length": head}
    keys |= {"tokenizer__ggml__bos_token_id": config.bos_token_id}
    keys |= {"tokenizer__ggml__eos_token_id": config.eos_token_id}
    keys |= {"tokenizer__ggml__padding_token_id": 2}
    keys |= {"attention__layer_norm_rms_epsilon": config.rms_norm_eps}
    keys |= {"rope__freq_base": config.rope_theta, "rope__dimension_count": head}
    keys |= {"vocab_size": VOCAB}
    return model, write_model(tmp_path / "a.gguf", arch, tensors, **keys)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEERS)
def test_models_of_transformers_come_back(name, tmp_path):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    model, path = peer(name, tmp_path)
    ours = {key: torch.from_numpy(x.read()) for key, x in _gguf.tensors_in(path).items()}
    state = model.state_dict()
    left = state.keys() - ours.keys()
    assert left == ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    for key, x in ours.items():  # (x + 1) - 1 is rounded
        assert torch.allclose(x, state[key], rtol=0, atol=1e-7 if name == "gemma" else 0)
    (tmp_path / "config.json").write_text(json.dumps(_gguf.config_of(path)))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    if name == "mistral":  # as a Llama, which is the same without a window
        assert type(config).__name__ == "LlamaConfig"
    else:
        said, wanted = config.to_dict(), model.config.to_dict()
        said = {key: said.get(key) for key in wanted}
        apart = {"architectures", "_name_or_path", "dtype", "torch_dtype"}
        assert {key for key in wanted if said[key] != wanted[key]} <= apart
    again = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert again.load_state_dict(ours, strict=False).missing_keys == sorted(left)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    if name == "gemma":  # which transformers does not read
        return
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", torch_dtype=torch.float32
    ).state_dict()
    assert theirs.keys() - left == ours.keys()
    assert all(torch.equal(theirs[key], x) for key, x in ours.items())


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_tokenizers_are_those_that_transformers_makes(pre, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert = importlib.import_module("transformers.convert_slow_tokenizer")
    model = json.loads(trained(pre).to_str())["model"]
    parts = model["vocab"], [tuple(merge) for merge in model["merges"]]
    if pre == "llama-bpe":
        converter = convert.TikTokenConverter(additional_special_tokens=[])
        converter.extract_vocab_merges_from_model = lambda _: parts
        theirs = converter.converted()
    else:
        kind = convert.GPT2Converter if pre == "gpt-2" else convert.Qwen2Converter
        theirs = kind(None).converted(*parts)
    theirs.add_special_tokens(["<|bos|>", "<|im_end|>", "<|pad|>"])
    template = "{% for m in messages %}<|bos|>{{ m.content }}<|im_end|>{% endfor %}"
    keys = {"tokenizer__ggml__add_bos_token": False, "tokenizer__chat_template": template}
    path = words(tmp_path / "a.gguf", pre, **keys)
    for name, content in tokenizer_of(path).items():
        (tmp_path / name).write_text(content)
    (tmp_path / "config.json").write_text(json.dumps(_gguf.config_of(path)))
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours).__name__ == "PreTrainedTokenizerFast"
    texts = [file.read_text() for file in Path(__file__).parent.glob("*.py")]
    for some in (TEXT, "  a   1 b  22 \r\n x", "é ñ ½²", *texts):
        found = ours(some)["input_ids"]
        assert found == theirs.encode(some).ids
        if pre != "qwen2":
            assert ours.decode(found) == some
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, 2)
    assert ours.model_max_length == 64
    chat = ours.apply_chat_template([{"role": "user", "content": "It's"}])
    assert chat == [0, *theirs.encode("It's").ids, 1]
