"""Define a BERT sentence classifier in Flax Linen; read and write it as safetensors files.

::

    model, params = bert.load("path/to/model", num_labels=2)
    logits = model.apply({"params": params}, ids, mask)
    embedding = model.encoder.apply({"params": params["encoder"]}, ids, mask)
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

# The name of each submodule in the files. "encoder.layer.N." precedes the names in a layer.
_SOURCE = {
    "word_embeddings": "embeddings.word_embeddings",
    "position_embeddings": "embeddings.position_embeddings",
    "token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings_norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
# Tensors that a mean-pooling encoder does not use; ``save`` copies them unchanged.
_CARRIED = re.compile(r"embeddings\.position_ids|pooler\.dense\.(weight|bias)|cls\..+")


class Layer(nn.Module):
    """One post-LN transformer layer: attention, then an MLP."""

    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Apply the layer to ``x[batch, length, width]``, attending where ``mask`` is true."""
        width = x.shape[-1]
        heads = (*x.shape[:-1], self.num_attention_heads, -1)
        query, key, value = (
            nn.Dense(width, name=name)(x).reshape(heads)  # [batch, length, heads, head_width]
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        y = nn.Dense(width, name="out")(y.reshape(x.shape))  # [batch, length, width]
        x = nn.LayerNorm(self.layer_norm_eps, name="attention_norm")(x + y)
        y = nn.gelu(nn.Dense(self.intermediate_size, name="intermediate")(x), approximate=False)
        y = nn.Dense(width, name="output")(y)
        return nn.LayerNorm(self.layer_norm_eps, name="output_norm")(x + y)


class Encoder(nn.Module):
    """BERT with mean pooling: one embedding per sentence. The fields are those of config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Embed ``ids[batch, length]``, where ``mask`` is true, as ``[batch, hidden_size]``."""
        length = ids.shape[-1]
        if length > self.max_position_embeddings:
            raise ValueError(f"{length} tokens, but {self.max_position_embeddings} positions")
        tables = {
            "word_embeddings": (self.vocab_size, ids),
            "position_embeddings": (self.max_position_embeddings, jnp.arange(length)),
            "token_type_embeddings": (self.type_vocab_size, jnp.zeros_like(ids)),
        }
        x = sum(nn.Embed(n, self.hidden_size, name=k)(rows) for k, (n, rows) in tables.items())
        x = nn.LayerNorm(self.layer_norm_eps, name="embeddings_norm")(x)
        for i in range(self.num_hidden_layers):
            x = Layer(
                self.num_attention_heads,
                self.intermediate_size,
                self.layer_norm_eps,
                name=f"layer_{i}",
            )(x, mask)
        return x.mean(-2, where=mask[..., None])


class Classifier(nn.Module):
    """An encoder and a linear head, without dropout."""

    encoder: Encoder
    num_labels: int

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the logits ``[batch, num_labels]``."""
        head = nn.Dense(self.num_labels, kernel_init=nn.initializers.zeros, name="classifier")
        return head(self.encoder(ids, mask))


def load(folder: str | Path, num_labels: int | None = None) -> tuple[Classifier, dict[str, Any]]:
    """Read config.json and model.safetensors from the folder of a BERT model.

    Args:
        folder: the folder; its tensors have Hugging Face's names, with or without ``bert.``.
        num_labels: the size of a new head of zeros; None: read the head that ``save`` wrote.

    Returns:
        ``(model, params)``; the parameters are float32.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are not those of a BERT; the message names the setting or tensors.
    """
    folder = Path(folder)
    encoder = Encoder(**_read_config(folder))
    tensors = read_tensors(folder / "model.safetensors")
    params = {"encoder": from_safetensors(tensors, encoder, folder)}
    if num_labels is None:
        head = read_tensors(folder / "classifier.safetensors")
        kernel, bias = head["classifier.weight"].T, head["classifier.bias"]
    else:
        kernel, bias = np.zeros((encoder.hidden_size, num_labels)), np.zeros(num_labels)
    params["classifier"] = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
    return Classifier(encoder, len(bias)), params


def save(folder: Path, params: Mapping[str, Any], like: Path, labels: Sequence[str]) -> None:
    """Write a folder that loads like the original, and the head in a separate file.

    Args:
        folder: the folder to create.
        params: merged parameters of a :class:`Classifier`.
        like: the folder that the encoder was loaded from; its small files are copied.
        labels: the names of the labels, stored with the head.
    """
    folder.mkdir()
    source = like / "model.safetensors"
    with safe_open(source, "numpy") as file:
        metadata = file.metadata()
    tensors = to_safetensors(params["encoder"], read_tensors(source))
    save_file(tensors, folder / "model.safetensors", metadata)
    head = {
        "classifier.weight": np.ascontiguousarray(np.asarray(params["classifier"]["kernel"]).T),
        "classifier.bias": np.asarray(params["classifier"]["bias"]),
    }
    save_file(head, folder / "classifier.safetensors", {"labels": json.dumps(list(labels))})
    for pattern in ("*.json", "*.txt", "*_*/config.json"):  # the last: sentence-transformers
        for path in like.glob(pattern):
            copy = folder / path.relative_to(like)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def from_safetensors(
    tensors: Mapping[str, np.ndarray], encoder: Encoder, where: str | Path = "the file"
) -> dict[str, Any]:
    """Convert the tensors of a file to the encoder's parameters.

    Raises:
        ValueError: a tensor is missing, unexpected, or has another shape.
    """
    row = jnp.zeros((1, 1), jnp.int32)
    abstract = jax.eval_shape(encoder.init, jax.random.key(0), row, row.astype(bool))["params"]
    expected = {_source_name(path): path for path in flatten_dict(abstract, sep="/")}
    found = {_canonical(name): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        raise ValueError(f"{where}: model.safetensors has a tensor twice, with and without bert.")
    missing = [name for name in expected if name not in found]
    unexpected = [n for n in tensors if _canonical(n) not in expected and not _is_carried(n)]
    for what, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            raise ValueError(
                f"{where}: model.safetensors {what} {len(names)} tensors: {', '.join(names[:5])}"
                f"{', ...' if len(names) > 5 else ''}. Expected a BERT encoder of "
                f"{encoder.num_hidden_layers} layers, such as AutoModel.save_pretrained writes"
            )
    params = {}
    for name, path in expected.items():
        leaf = found[name].T if path.endswith("kernel") else found[name]  # files have [out, in]
        if leaf.shape != (shape := flatten_dict(abstract, sep="/")[path].shape):
            raise ValueError(
                f"{where}: {name} gives {path} of shape {leaf.shape}, but config.json gives {shape}"
            )
        params[path] = jnp.asarray(leaf, jnp.float32)
    return unflatten_dict(params, sep="/")


def to_safetensors(
    params: Mapping[str, Any], like: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Invert :func:`from_safetensors`: return tensors with the names and shapes of ``like``.

    Args:
        params: the encoder's parameters.
        like: the tensors they were loaded from; those that the encoder does not use are copied.

    Returns:
        Tensors by name; the encoder's are float32.
    """
    ours = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf, np.float32)
        ours[_source_name(path)] = leaf.T if path.endswith("kernel") else leaf
    # Contiguous: safetensors writes the buffer of an array as it is in memory.
    return {
        name: np.ascontiguousarray(tensor if _is_carried(name) else ours[_canonical(name)])
        for name, tensor in like.items()
    }


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a safetensors file, by name."""
    _require(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error


def load_tokenizer(folder: str | Path, length: int) -> Tokenizer:
    """Read a folder's tokenizer, and set it to cut and pad every sentence to ``length`` tokens."""
    _require(path := Path(folder) / "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises this class
        raise ValueError(f"{path}: not a tokenizer: {error}") from error
    tokenizer.enable_truncation(length)
    pad = next((t for t in ("[PAD]", "<pad>") if tokenizer.token_to_id(t) is not None), None)
    if pad is None:
        raise ValueError(f"{path}: has no padding token, neither [PAD] nor <pad>")
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Tokenize: ``{"ids": int[batch, length], "mask": bool[batch, length]}``."""
    encoded = tokenizer.encode_batch(list(texts))
    return {
        "ids": np.array([e.ids for e in encoded], np.int32),
        "mask": np.array([e.attention_mask for e in encoded], bool),
    }


def torch_module(path: str) -> str:
    """Return the PyTorch name of a classifier's module.

    ``encoder/layer_0/query`` becomes ``bert.encoder.layer.0.attention.self.query``.
    """
    encoder, _, module = path.partition("/")
    return f"bert.{_module_name(module)}" if encoder == "encoder" else path


def _module_name(path: str) -> str:
    *layer, module = path.split("/")
    prefix = f"encoder.layer.{layer[0].removeprefix('layer_')}." if layer else ""
    return f"{prefix}{_SOURCE[module]}"


def _source_name(path: str) -> str:
    module, _, leaf = path.rpartition("/")
    return f"{_module_name(module)}.{'bias' if leaf == 'bias' else 'weight'}"


def _canonical(name: str) -> str:
    """Remove the prefix of a tensor's name, and rename the norms of the original BERT."""
    name = name.removeprefix("bert.")
    return name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")


def _is_carried(name: str) -> bool:
    return _CARRIED.fullmatch(_canonical(name)) is not None


def _read_config(folder: Path) -> dict[str, Any]:
    """Read the encoder's fields; raise if config.json describes another architecture."""
    _require(path := folder / "config.json")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{path}: {key} is {config[key]!r}; this model supports {value!r} only"
            )
    fields = [f for f in Encoder.__dataclass_fields__ if f not in ("name", "parent")]
    if absent := [field for field in fields if field not in config]:
        raise ValueError(f"{path}: lacks {', '.join(absent)}: not a BERT's config.json")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise ValueError(f"{path}: num_attention_heads does not divide hidden_size")
    return {field: config[field] for field in fields}


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found. A model folder has config.json, model.safetensors, tokenizer.json"
        )
