"""Open a model: a folder as Hugging Face lays it out, or a GGUF file."""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.io._files import read_json
from lora_jax.io._tensor import Tensor
from lora_jax.io.hf import _shards as shards

CONFIG = "config.json"

# What a model needs beside its weights: its configurations, those of what prepares its inputs, the
# words of its tokenizer, and its license; not what training or PEFT left there, nor a model card.
_NEEDED = re.compile(
    r"((generation|tokenizer|preprocessor|processor|video_preprocessor|image_processor"
    r"|feature_extractor|sentence_bert|model)_)?config\.json|config_sentence_transformers\.json"
    r"|modules\.json|params\.json|chat_template\.(json|jinja)|emoji\.json|encoder\.json"
    r"|(special_tokens_map|added_tokens|normalizer)\.json|tekken\.json|tokenizer_checklist\.chk"
    r"|(.*[_.-])?(tokenizer|vocab|merges|dict|spiece|sentencepiece|spm|spm_char|bpe)([_.-].*)?"
    r"\.(json|jsonl|txt|model|bpe|codes|spm|chk)|.*\.(model|spm|tiktoken|jinja)|vocab|bpe\.codes"
    r"|(LICEN[SC]E|NOTICE|USE_POLICY|COPYING)([._-].*)?",
    re.IGNORECASE,
)
_CODE = re.compile(r".*\.py")
MODULES = "modules.json"  # of sentence-transformers
_INSIDE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
_OF_MODULE = re.compile(
    rf"{_NEEDED.pattern}|\w*config\.json|(pytorch_)?model\.(safetensors|bin)", re.IGNORECASE
)


class UnknownModelError(ValueError):
    """The files of a model do not tell what its numbers mean."""


def no_config(where: str, what: str) -> UnknownModelError:
    """Return the error of a model without a configuration, which would tell something."""
    return UnknownModelError(
        f"{where} holds no {CONFIG}, whose model_type tells whether {what} stored transposed, as "
        "GPT-2's are: copy the model's there, or write one with its model_type alone, such as "
        '{"model_type": "llama"}'
    )


@dataclass(frozen=True)
class Source:
    """A model on disk: its configuration, and its tensors, which are read one at a time.

    Attributes:
        where: the path.
        tensors: by name.
        config: the contents of ``config.json``, or None without one.
    """

    where: str
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] | None

    def small(self) -> dict[str, Path | str]:
        """Return the other files that the model needs, by name: a path, or the text to write.

        Those are configurations, the tokenizer's files, licenses, and code that a configuration
        names.

        Raises:
            UserWarning: a GGUF file has a tokenizer of an unknown kind.
        """
        path = Path(self.where)
        if _is_gguf(path):
            from lora_jax.io.hf._gguf.tokenizer import tokenizer_of

            try:
                return dict(tokenizer_of(path))
            except ValueError as error:
                warnings.warn(f"no tokenizer is written: {error}", stacklevel=4)
                return {}
        found = {p.name: p for p in sorted(path.iterdir()) if p.is_file()}
        has_code = "auto_map" in (self.config or {}) or _has_code(path / "tokenizer_config.json")
        needed = {
            name: p
            for name, p in found.items()
            if _NEEDED.fullmatch(name) or (has_code and _CODE.fullmatch(name))
        }
        return {**needed, **_within(path)}


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a model's folder or GGUF file as a :class:`Source`; no tensor is read yet.

    Raises:
        OSError: there is none.
        ValueError: a file is damaged, or contradicts itself.
    """
    path = Path(path)
    if _is_gguf(path):
        from lora_jax.io.hf._gguf import model as gguf

        return Source(str(path), gguf.tensors_in(path), gguf.config_of(path))
    tensors = shards.tensors_in(path)
    config = read_json(path / CONFIG) if (path / CONFIG).exists() else None
    if config is not None and not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG} holds {type(config).__name__}, expected an object")
    return Source(str(path), tensors, config)


def _within(path: Path) -> dict[str, Path]:
    """Find the files in folders of a model: of modules after it, and further chat templates.

    ``modules.json`` of sentence-transformers names the folders of modules (``1_Pooling``), which
    have weights of their own (``2_Dense``).
    """
    listed = read_json(path / MODULES) if (path / MODULES).is_file() else []
    own = [entry.get("path") for entry in listed if isinstance(entry, dict)]
    names = [name for name in own if isinstance(name, str) and name not in ("", ".")]
    if wrong := [name for name in names if not _INSIDE.fullmatch(name)]:
        raise ValueError(
            f"{path / MODULES}: {wrong[0]!r} is no folder of the model, expected a name such as "
            "1_Pooling"
        )
    found = {file for name in names for file in (path / name).rglob("*") if file.is_file()}
    found = {file for file in found if _OF_MODULE.fullmatch(file.name)}
    found |= set((path / "additional_chat_templates").glob("*.jinja"))
    return {file.relative_to(path).as_posix(): file for file in sorted(found)}


def _has_code(path: Path) -> bool:
    """Return whether a configuration names code of its own."""
    return path.is_file() and "auto_map" in read_json(path)


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"
