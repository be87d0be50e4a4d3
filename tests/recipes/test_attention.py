"""Attention by every path: what a token sees, and what is never formed."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_eqns, assert_close, drawn, normal, randomize_b

import lora_jax
from lora_jax.recipes import attention
from lora_jax.recipes.models import llama

pytestmark = pytest.mark.usefixtures("standard_promotion")

LENGTH = attention.LONG + 61  # no multiple of a block


def inputs(length, dtype=jnp.float32, heads=2):
    """Return queries, keys and values with one head for two of the queries'."""
    shapes = (1, length, heads, 4), (1, length, heads // 2, 4), (1, length, heads // 2, 4)
    return [normal(k, shape, dtype) for k, shape in enumerate(shapes)]


def with_gradients(fn, *args):
    """Return ``fn(*args)``, and the gradients of a sum of it with random weights."""

    @jax.jit
    def both(*args):
        y, back = jax.vjp(fn, *args)
        return y, back(normal(9, y.shape, y.dtype))

    return both(*args)


@pytest.mark.parametrize(
    ("window", "dtype"),
    [(None, "float32"), (100, "float32"), (100, "bfloat16"), (None, "bfloat16")],
)
def test_a_long_row_attends_by_blocks_as_at_once(window, dtype):
    args = inputs(LENGTH, dtype)

    def plain(query, key, value):
        sizes = window and (window - 1, 0)
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, local_window_size=sizes
        )

    found = with_gradients(lambda *args: attention.attend(*args, window=window, name="xla"), *args)
    assert_close(found, with_gradients(plain, *args), length=LENGTH)


@pytest.mark.parametrize("window", [None, 100])
def test_no_array_of_length_times_length_exists(window):
    length = 4096
    args = [jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype) for x in inputs(1)]

    def largest(name):
        def loss(*args):
            return attention.attend(*args, window=window, name=name).sum()

        eqns = all_eqns(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*args))
        return max(math.prod(v.aval.shape) for e in eqns for v in e.outvars)

    assert max(largest(name) for name in ("xla", "auto")) < length**2 / (16 if window else 3)


SEGMENTS = np.array([[0, 0, 0, 5, 5, 2, 2, 2, 2, 0, 0], [1] * 9 + [3, 1]], np.int32)


@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "full"), (False, "none")])
def test_packed_texts_are_read_as_alone(scan_layers, remat, monkeypatch):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = llama.Llama(**sizes, **heads, scan_layers=scan_layers, remat=remat, sliding_window=3)
    ids = np.random.default_rng(0).integers(0, 40, SEGMENTS.shape).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets="all-linear", init=drawn))
    apply = lora_jax.lora(model.apply)

    @jax.jit
    def packed(lora_params, ids):
        return apply({"params": lora_params}, ids, segments=SEGMENTS)

    found = packed(lora_params, ids)
    monkeypatch.setattr(attention, "LONG", 4)
    monkeypatch.setattr(attention, "BLOCK", 4)
    jax.clear_caches()
    assert_close(packed(lora_params, ids), found, depth=24)
    alone = jax.jit(lambda params, ids: model.apply({"params": params}, ids))
    merged = lora_jax.merge(lora_params)
    for row, (texts, numbers) in enumerate(zip(ids, SEGMENTS, strict=True)):
        ends = [*(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        for start, end in itertools.pairwise([0, *ends]):
            text = np.zeros((1, len(texts)), np.int32)
            text[0, : end - start] = texts[start:end]  # later tokens do not count
            assert_close(found[row, start:end], alone(merged, text)[0, : end - start], depth=24)


def test_gradients_stay_in_their_segments(monkeypatch):
    args = inputs(11)
    monkeypatch.setattr(attention, "BLOCK", 4)
    segments = SEGMENTS[:1]
    at_once = with_gradients(lambda *x: attention.attend(*x, segments=segments, window=3), *args)
    monkeypatch.setattr(attention, "LONG", 4)
    blocks = with_gradients(lambda *x: attention.attend(*x, segments=segments, window=3), *args)
    assert_close(blocks, at_once)
    other = [x.at[:, 3:5].multiply(2) for x in args]
    changed = with_gradients(lambda *x: attention.attend(*x, segments=segments, window=3), *other)
    same = np.r_[0:3, 5:11]
    assert_close(*(jax.tree.map(lambda x: x[:, same], y) for y in (changed, blocks)))


def test_segments_that_cannot_be_are_refused():
    args = inputs(11)
    for segments in (SEGMENTS, SEGMENTS[:1, 1:], SEGMENTS[0], SEGMENTS[:1].astype(np.float32)):
        with pytest.raises(ValueError, match=r"segments: .*, expected integers of shape \[1, 11\]"):
            attention.attend(*args, segments=jnp.asarray(segments))
    q, k, v = (x.astype(jnp.bfloat16) for x in args)
    segments = jnp.asarray(SEGMENTS[:1])
    with pytest.raises(ValueError, match=r"attention='cudnn': .* no segments. Pass 'auto', or"):
        attention.attend(q, k, v, segments=segments, name="cudnn")
    model = llama.Llama(40, 16, 24, 1, 4, 2, 4)
    with pytest.raises(ValueError, match="a cache has one text per row"):
        model.init(jax.random.key(0), SEGMENTS, model.empty(2, 11), segments=SEGMENTS)
    with pytest.raises(ValueError, match=r"segments: int32\[11\], expected integers of shape"):
        model.init(jax.random.key(0), SEGMENTS, segments=SEGMENTS[0])


@pytest.mark.parametrize("window", [None, 3])
def test_a_long_prompt_is_read_into_a_cache_by_blocks(window, monkeypatch):
    query, _, _ = (jnp.concatenate([x, 2 * x]) for x in inputs(11))
    _, keys, values = (jnp.concatenate([x, -x]) for x in inputs(19))
    positions = np.array([[0], [6]]) + np.arange(11)[None]  # rows have different lengths
    attend_cached = functools.partial(attention.attend_cached, window=window)
    at_once = with_gradients(lambda *x: attend_cached(*x, positions), query, keys, values)
    monkeypatch.setattr(attention, "LONG", 4)
    monkeypatch.setattr(attention, "BLOCK", 4)
    blocks = with_gradients(lambda *x: attend_cached(*x, positions), query, keys, values)
    assert_close(blocks, at_once)
    for row, at in enumerate(positions[:, 0]):  # one row's blocks read what its window sees
        x = [y[row : row + 1] for y in (query, keys, values)]
        found = attend_cached(*x, positions[row : row + 1])
        assert_close(found, at_once[0][row : row + 1])
        x[0] = jnp.pad(x[0], ((0, 0), (at, 0), (0, 0), (0, 0)))
        x[1:] = (y[:, : at + 11] for y in x[1:])
        assert_close(found, attention.attend(*x, window=window)[:, at:])
