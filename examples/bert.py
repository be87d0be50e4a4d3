"""A BERT sentence classifier in Flax Linen, and its weights as safetensors files keep them.

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

# Each submodule's name in the files. Those of a layer come after "encoder.layer.N.".
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
# What a mean-pooling encoder has no use for: kept in the file, as it is.
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
    """BERT with mean pooling: tokens to one embedding a sentence. Fields as in config.json."""

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
            raise ValueError(f"{length} tokens, and {self.max_position_embeddings} positions")
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
    """An encoder and a linear head. No dropout: the adapted function stays deterministic."""

    encoder: Encoder
    num_labels: int

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the logits ``[batch, num_labels]``."""
        head = nn.Dense(self.num_labels, kernel_init=nn.initializers.zeros, name="classifier")
        return head(self.encoder(ids, mask))


def load(folder: str | Path, num_labels: int | None = None) -> tuple[Classifier, dict[str, Any]]:
    """Read config.json and model.safetensors of a BERT-layout folder.

    Args:
        folder: the folder; tensors named as Hugging Face names them, ``bert.`` prefix or not.
        num_labels: for a new head, of zeros; None: the head that ``save`` wrote beside them.

    Returns:
        ``(model, params)``, the parameters float32.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the files are not a BERT's: the message says which setting or tensors.
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
    """Write a folder that loads wherever ``like`` does, and the head in a file of its own.

    Args:
        folder: to create.
        params: of a :class:`Classifier`, merged.
        like: the folder the encoder was loaded from; its small files are copied.
        labels: the names of the labels, kept with the head.
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
    for pattern in ("*.json", "*.txt", "*_*/config.json"):  # the last: sentence-transformers' own
        for path in like.glob(pattern):
            copy = folder / path.relative_to(like)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def from_safetensors(
    tensors: Mapping[str, np.ndarray], encoder: Encoder, where: str | Path = "the file"
) -> dict[str, Any]:
    """The encoder's parameters from the tensors of a file.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape.
    """
    row = jnp.zeros((1, 1), jnp.int32)
    abstract = jax.eval_shape(encoder.init, jax.random.key(0), row, row.astype(bool))["params"]
    expected = {_source_name(path): path for path in flatten_dict(abstract, sep="/")}
    found = {_canonical(name): tensor for name, tensor in tensors.items()}
    if len(found) < len(tensors):
        raise ValueError(f"{where}: model.safetensors names a tensor twice, with and without bert.")
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
                f"{where}: {name} gives {path} of shape {leaf.shape}, and config.json says {shape}"
            )
        params[path] = jnp.asarray(leaf, jnp.float32)
    return unflatten_dict(params, sep="/")


def to_safetensors(
    params: Mapping[str, Any], like: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The inverse of :func:`from_safetensors`: the tensors, names and shapes of ``like``.

    Args:
        params: the encoder's parameters.
        like: the tensors they were loaded from; what the encoder has no use for is carried over.

    Returns:
        Tensors by name, the encoder's float32.
    """
    ours = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        leaf = np.asarray(leaf, np.float32)
        ours[_source_name(path)] = leaf.T if path.endswith("kernel") else leaf
    # Contiguous, because safetensors writes the buffer of an array as it lies in memory.
    return {
        name: np.ascontiguousarray(tensor if _is_carried(name) else ours[_canonical(name)])
        for name, tensor in like.items()
    }


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, by name."""
    _require(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error


def load_tokenizer(folder: str | Path, length: int) -> Tokenizer:
    """The folder's tokenizer, set to cut and pad every sentence to ``length`` tokens."""
    _require(path := Path(folder) / "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the class that tokenizers raises
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
    """The name of a module of a classifier in PyTorch.

    That of ``encoder/layer_0/query`` is ``bert.encoder.layer.0.attention.self.query``.
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
    """A tensor's name without the prefix, and without the first BERT's names for norms."""
    name = name.removeprefix("bert.")
    return name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")


def _is_carried(name: str) -> bool:
    return _CARRIED.fullmatch(_canonical(name)) is not None


def _read_config(folder: Path) -> dict[str, Any]:
    """The encoder's fields; raises where config.json says another architecture."""
    _require(path := folder / "config.json")
    try:
        config = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    expected = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {config[key]!r}; this model does {value!r} only")
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
