"""Weights of models that turn neighbours, and of those that turn halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, drawn, normal, randomize_b

import lora_jax
from lora_jax.io import hf
from lora_jax.recipes.attention import rotated, turns_of

ROTATED = ".*(query|key)/.*|.*norm/scale"


def turned(x, how):
    """Rotary positions of ``x[length, heads, head_dim]``, in NumPy."""
    length, _, width = x.shape
    angles = np.arange(length)[:, None] * 100.0 ** (-np.arange(width // 2) / (width // 2))
    z = x[..., : width // 2] + 1j * x[..., width // 2 :]
    z = x[..., ::2] + 1j * x[..., 1::2] if how == "pairs" else z
    z = z * np.exp(1j * angles)[:, None]
    parts = [z.real, z.imag]
    return np.stack(parts, -1).reshape(x.shape) if how == "pairs" else np.concatenate(parts, -1)


def scores(params, x, how):
    """Of attention, with a bias in the query and a norm on the heads of the key; in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(x, np.float64)
    query = (x @ p["query"]["kernel"] + p["query"]["bias"]).reshape(5, 2, 6)
    key = np.einsum("li,iho->lho", x, p["key"]["kernel"]) * p["norm"]["scale"]
    return np.einsum("qhd,khd->hqk", turned(query, how), turned(key, how))


def some_params():
    return {
        "query": {"kernel": normal(0, (7, 12)), "bias": normal(1, (12,))},
        "key": {"kernel": normal(2, (7, 2, 6))},
        "norm": {"scale": normal(3, (6,))},
        "value": {"kernel": normal(4, (7, 12))},
    }


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["LoRA", "DoRA"])
def test_scores_stay_what_they_are(options):
    x = normal(9, (5, 7))
    params = some_params()
    halves = hf.rotary_halves(params, ROTATED, 6)
    assert_close(scores(halves, x, "halves"), scores(params, x, "pairs"))
    assert_close(hf.rotary_pairs(halves, ROTATED, 6), params)
    assert halves["value"]["kernel"] is params["value"]["kernel"]

    options |= {"targets": ".*kernel", "full": "query/bias", "layout": {"key.*": "ioo"}}
    lora_params = randomize_b(lora_jax.lorafy(params, 2, init=drawn, **options))
    lora_params.adapter.full["query/bias"] = normal(5, (12,))
    merged = lora_jax.merge(lora_params)
    reordered = hf.rotary_halves(lora_params, ROTATED, 6)
    assert_close(lora_jax.merge(reordered), hf.rotary_halves(merged, ROTATED, 6))
    found = scores(lora_jax.merge(reordered), x, "halves")
    assert_close(found, scores(merged, x, "pairs"), dtype=jnp.float32)


def test_the_halves_are_those_of_the_llama():
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 6)).astype(np.float32)
    found = jax.jit(rotated)(x, turns_of(jnp.arange(5)[None], 6, 100.0))
    assert_close(found[0], turned(x[0].astype(np.float64), "halves"))


def test_other_axes_are_said():
    params = {"q": jnp.asarray(np.arange(12, dtype=np.float32).reshape(4, 3))}
    found = hf.rotary_halves(params, "q", 4, layout={"q": "oi"})
    assert found["q"][:, 0].tolist() == [0, 6, 3, 9]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": "q_proj.*"}, r"targets='q_proj\.\*' matches no leaf. Nearest"),
        ({"head_dim": 5}, "head_dim=5: expected an even number"),
        ({"head_dim": 8}, r"has shape .* its axis \d is not made of heads of 8"),
    ],
)
def test_what_is_no_head_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        hf.rotary_halves(some_params(), **({"targets": ROTATED, "head_dim": 6} | change))


def test_what_cannot_be_reordered_is_refused():
    params = some_params()
    lora_params = lora_jax.lorafy(params, 2, targets="query/kernel[:, 0:6]")
    with pytest.raises(ValueError, match="is a part of the outputs of 'query/kernel'"):
        hf.rotary_halves(lora_params, ROTATED, 6)
    quantized = lora_jax.quant.quantize(params, "int8", targets="query/kernel")
    with pytest.raises(ValueError, match="'query/kernel' is quantized: reorder before"):
        hf.rotary_halves(quantized, ROTATED, 6)
