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
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|ot)|.*\.index\.json")


class UnknownModelError(ValueError):
    """The files of a model do not tell what its numbers mean."""


@dataclass(frozen=True)
class Source:
    """Hold a model in files: its tensors and its configuration.

    Attributes:
        where: the path.
        tensors: by name.
        config: the contents of ``config.json``, or None without one.
    """

    where: str
    tensors: Mapping[str, Tensor]
    config: dict[str, Any] | None

    def small(self) -> dict[str, Path | str]:
        """Find the files beside the weights, of the model and its tokenizer: paths, or texts.

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
        files = (p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith("."))
        return {p.name: p for p in files if not _WEIGHTS.fullmatch(p.name)}


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a folder, or a GGUF file.

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


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"
