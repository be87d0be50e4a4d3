"""Write the tokenizers of GGUF files as Hugging Face's files: byte-level BPE."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.io.hf._gguf.header import Header, read_header


@dataclass(frozen=True)
class _Split:
    """Describe how text is split before pairs are merged.

    Attributes:
        words: a pattern of words; None is GPT-2's.
        digits: whether each digit is split off before words are found.
        nfc: whether characters are composed first.
        direct: whether a word of the vocabulary is one token whatever the pairs would make.
        bos: whether a text begins with the bos token where the file does not say.
    """

    words: str | None = None
    digits: bool = False
    nfc: bool = False
    direct: bool = False
    bos: bool = False


def _words(digits: str) -> str:
    """Match contractions, letters with one sign before, digits, other signs, line ends, spaces."""
    return (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_SPLITS = {
    "gpt-2": _Split(),
    "smollm": _Split(digits=True),
    "llama-bpe": _Split(_words(r"\p{N}{1,3}"), direct=True, bos=True),
    "qwen2": _Split(_words(r"\p{N}"), nfc=True),
}

_CONTROL, _ADDED = 3, 4  # types of tokens that are matched in the text
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # there, here


def tokenizer_of(path: Any) -> dict[str, str]:
    """Make ``tokenizer.json`` and ``tokenizer_config.json`` of the tokenizer of a file.

    Returns:
        The texts of the two files, by name.

    Raises:
        ImportError: gguf or tokenizers is not installed.
        OSError: the file cannot be read.
        ValueError: the file is damaged, or its tokenizer is of an unknown kind.
    """
    header = read_header(Path(path))
    kind, pre = header.text("tokenizer.ggml.model"), header.text("tokenizer.ggml.pre", "")
    if kind != "gpt2" or pre not in _SPLITS:
        raise ValueError(
            f"{path}: tokenizer.ggml.model={kind!r} with tokenizer.ggml.pre={pre!r}: expected "
            f"'gpt2', which is byte-level BPE, with one of {sorted(_SPLITS)}; load the tokenizer "
            "of the model that the file was made of"
        )
    tokens = _tokens(header)
    roles = {here: header.token(there, len(tokens)) for there, here in _ROLES.items()}
    special = {role: tokens[k] for role, k in roles.items() if k is not None}
    library, ends = _import_tokenizers(), _ends(header, _SPLITS[pre], special)
    try:
        text = _tokenizer(library, header, _SPLITS[pre], tokens, ends)
    except Exception as error:  # the library has no class of its own
        raise ValueError(f"{path}: its vocabulary is no tokenizer: {error}") from error
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": header.count("context_length"),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **{f"{role}_token": token for role, token in special.items()},
        **_chat(header),
    }
    return {
        "tokenizer.json": text,
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _tokens(header: Header) -> list[str]:
    """Read the vocabulary, and check it together with the merges and the types."""
    tokens, merges = (header.texts(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
    known = set(tokens)
    if len(known) != len(tokens) or "" in known:
        raise ValueError(f"{header.path}: tokenizer.ggml.tokens has empty words, or some twice")
    for merge in merges:
        one, _, other = merge.partition(" ")
        if not {one, other, one + other} <= known:
            raise ValueError(
                f"{header.path}: tokenizer.ggml.merges: {merge!r:.100}: expected two words of the "
                "vocabulary whose sum is one as well"
            )
    types = header.values.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(
            f"{header.path}: tokenizer.ggml.token_type: expected a type for each of "
            f"{len(tokens)} tokens"
        )
    return tokens


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "tokenizers of GGUF files are made with tokenizers, which is not installed: pip "
            "install 'lora-jax[gguf]'"
        ) from error
    return tokenizers


def _tokenizer(
    lib: Any, header: Header, split: _Split, tokens: list[str], ends: tuple[list[str], list[str]]
) -> str:
    """Make the text of ``tokenizer.json``."""
    vocab = {token: k for k, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in header.texts("tokenizer.ggml.merges")]
    made = lib.Tokenizer(lib.models.BPE(vocab=vocab, merges=merges, ignore_merges=split.direct))
    steps = [lib.pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.words:
        steps.append(lib.pre_tokenizers.Split(lib.Regex(split.words), "isolated"))
    by_regex = split.words is None
    steps.append(lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex))
    made.pre_tokenizer = lib.pre_tokenizers.Sequence(steps)
    made.decoder = lib.decoders.ByteLevel()
    if split.nfc:
        made.normalizer = lib.normalizers.NFC()
    types = header.values["tokenizer.ggml.token_type"]
    for wanted in (_CONTROL, _ADDED):
        found = [token for token, kind in zip(tokens, types, strict=True) if kind == wanted]
        made.add_tokens(
            [lib.AddedToken(token, special=wanted == _CONTROL, normalized=False) for token in found]
        )
    before, after = ends
    if before or after:
        single = [*before, "$A", *after]
        pair = [*single, *(f"{token}:1" for token in before), "$B:1"]
        pair += [f"{token}:1" for token in after]
        made.post_processor = lib.processors.TemplateProcessing(
            single, pair, [(token, vocab[token]) for token in {*before, *after}]
        )
    return made.to_str()


def _ends(header: Header, split: _Split, special: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Find the tokens that a text begins and ends with."""
    found = []
    for role, usual in (("bos", split.bos), ("eos", False)):
        key = f"tokenizer.ggml.add_{role}_token"
        if not isinstance(wanted := header.values.get(key, usual), bool):
            raise ValueError(f"{header.path}: {key}={wanted!r:.100}: expected true or false")
        if wanted and role not in special:
            raise ValueError(f"{header.path}: {key} without tokenizer.ggml.{role}_token_id")
        found.append([special[role]] if wanted else [])
    return found[0], found[1]


def _chat(header: Header) -> dict[str, Any]:
    """Read the template of a chat, or several by name."""
    key = "tokenizer.chat_template"
    if key not in header.values:
        return {}
    if "tokenizer.chat_templates" not in header.values:
        return {"chat_template": header.text(key)}
    names = header.texts("tokenizer.chat_templates")
    named = {"default": header.text(key)} | {n: header.text(f"{key}.{n}") for n in names}
    return {"chat_template": [{"name": n, "template": text} for n, text in named.items()]}
