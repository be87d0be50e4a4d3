"""The Llama of the examples by itself; test_io_hf_models.py has it beside the real ones."""

import functools

import jax
import numpy as np
import pytest
from helpers import assert_close, drawn, randomize_b, tolerance

import lora_jax
from lora_jax.recipes.models import llama

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
IDS = np.random.default_rng(0).integers(0, 31, (2, 7)).astype(np.int32)


DEPTH = 20  # of sums that follow each other: eight a layer, and those around the layers


@functools.cache
def model_and_params(**changes):
    model = llama.from_config(CONFIG, **changes)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    return model, jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("remat", [False, True])
def test_a_scanned_model_is_the_unrolled_one(remat):
    unrolled, params = model_and_params()  # remat changes no shape
    unrolled = llama.from_config(CONFIG, remat=remat)
    scanned = llama.from_config(CONFIG, scan_layers=True, remat=remat)
    layers = [params[f"layers_{k}"] for k in range(2)]
    stacked = {name: x for name, x in params.items() if not name.startswith("layers_")}
    stacked |= {"layers": jax.tree.map(lambda *x: np.stack(x), *layers)}

    @jax.jit
    def both(stacked, params):
        models = (scanned, stacked), (unrolled, params)
        return [model.apply({"params": p}, IDS) for model, p in models]

    assert_close(*both(stacked, params), depth=DEPTH)


@pytest.mark.parametrize("window", [None, 2])
def test_tokens_see_those_before_them_and_in_the_window(window):
    model, params = model_and_params(sliding_window=window, num_hidden_layers=1)
    apply = jax.jit(lambda ids: model.apply({"params": params}, ids))
    logits, other = (np.asarray(apply(x)) for x in (IDS, (IDS + (np.arange(7) == 3)) % 31))
    changed = np.abs(logits - other).max((0, 2)) > tolerance(depth=DEPTH) * np.abs(logits).max()
    assert changed.tolist() == [k in range(3, 3 + (window or 4)) for k in range(7)]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_it_takes_an_adapter_everywhere(scan_layers):
    model, params = model_and_params(scan_layers=scan_layers)
    layout = lora_jax.layout_of(model.apply, {"params": params}, IDS)
    lora_params = lora_jax.lorafy(params, 2, targets=".*", layout=layout, init=drawn)
    assert len(lora_params.adapter.factors) == (8 if scan_layers else 15)

    @jax.jit
    def both(lora_params):
        adapted = lora_jax.lora(model.apply)({"params": lora_params}, IDS)
        return adapted, model.apply({"params": lora_jax.merge(lora_params)}, IDS)

    assert_close(*both(randomize_b(lora_params)), depth=DEPTH)


def read_on(apply, cache, ids, lengths):
    """The logits from the last token of each row's beginning on: read at once, then by one."""
    logits, cache = apply(ids[:, : max(lengths)], cache)  # the shorter rows' rest does not count
    found = [np.stack([np.asarray(logits)[n, k - 1] for n, k in enumerate(lengths)])]
    cache = cache._replace(lengths=np.array(lengths, np.int32))
    for step in range(ids.shape[1] - max(lengths)):
        tokens = np.stack([ids[n, k + step : k + step + 1] for n, k in enumerate(lengths)])
        logits, cache = apply(tokens, cache)
        found.append(np.asarray(logits)[:, 0])
    return np.stack(found, 1)


@pytest.mark.parametrize(
    ("scan_layers", "window"),
    [
        (True, None),
        (False, 3),
        pytest.param(True, 3, marks=pytest.mark.long),
        pytest.param(False, None, marks=pytest.mark.long),
    ],
)
def test_with_a_cache_it_says_what_it_says_without(scan_layers, window):
    model, params = model_and_params(scan_layers=scan_layers)
    model = model.clone(sliding_window=window)
    lengths = [4, 2, 3]
    ids = np.random.default_rng(1).integers(0, 31, (3, 9)).astype(np.int32)
    apply = jax.jit(lambda ids, cache=None: model.apply({"params": params}, ids, cache))
    found = read_on(apply, model.empty(3, 9), ids, lengths)
    whole = np.asarray(apply(ids))
    expected = [whole[n, k - 1 : k + found.shape[1] - 1] for n, k in enumerate(lengths)]
    assert_close(found, np.stack(expected), depth=DEPTH)


def test_beyond_the_cache_are_no_numbers():
    model, params = model_and_params()
    apply = jax.jit(lambda ids, cache: model.apply({"params": params}, ids, cache))
    logits, cache = apply(IDS, model.empty(2, 5))
    logits = np.asarray(logits)
    assert np.isfinite(logits[:, :5]).all()
    assert np.isnan(logits[:, 5:]).all()
    assert cache.lengths.tolist() == [7, 7]


@pytest.mark.long  # test_serve_many.py has the same of a server, by one token after the other
@pytest.mark.parametrize("scan_layers", [True, False])
def test_with_a_cache_every_row_has_its_own_adapter(scan_layers):
    model, params = model_and_params(scan_layers=scan_layers, num_hidden_layers=1)

    def plain(p, ids, cache=None):
        return model.apply({"params": p}, ids, cache)

    layout = lora_jax.layout_of(plain, params, IDS)
    options = {"targets": "all-linear", "layout": layout, "init": drawn}
    adapters = [
        randomize_b(lora_jax.lorafy(params, rank, **options), rank, std=0.5).adapter
        for rank in (2, 3)
    ]

    def of(base, adapters):
        return [lora_jax.LoraParams(base, adapter) for adapter in adapters]

    stacked = jax.jit(lambda *args: lora_jax.many.stack(of(*args)))(params, adapters)
    axes = llama.Cache(keys=1, values=1, lengths=0)
    rows = lora_jax.many.lora_rows(plain, in_axes=(None, 0, axes), out_axes=(0, axes))
    ids = np.random.default_rng(1).integers(0, 31, (3, 8)).astype(np.int32)
    which, lengths = np.array([1, -1, 0], np.int32), [4, 2, 3]
    step = jax.jit(lambda ids, cache: rows(stacked, ids, cache, lora_ids=which))
    found = read_on(step, model.empty(3, 8), ids, lengths)

    @jax.jit
    def alone(base, adapters, ids):
        merged = [*map(lora_jax.merge, of(base, adapters)), base]
        return [plain(merged[k], ids[n : n + 1])[0] for n, k in enumerate(which.tolist())]

    for x, expected, k in zip(found, alone(params, adapters, ids), lengths, strict=True):
        assert_close(x, np.asarray(expected)[k - 1 : k - 1 + len(x)], depth=DEPTH)


def test_it_generates_until_the_end_or_the_stop():
    def apply(params, ids):  # the next token is the last one plus one
        return jax.nn.one_hot(ids + params, 31)

    assert llama.generate(apply, 1, [4, 5], length=6) == [6, 7, 8, 9]
    assert llama.generate(apply, 1, [4, 5], length=6, stop=8) == [6, 7]
    assert llama.generate(apply, 1, [4, 5], length=2) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba': expected llama, mistral, qwen2 or qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model supports silu only"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "does not scale them"),
    ],
)
def test_other_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        llama.from_config(CONFIG | changes)


def test_the_newer_spelling_of_rotary_positions_is_read():
    rope = {"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}
    assert llama.from_config(CONFIG | rope).rope_theta == 7.0
    assert llama.from_config(CONFIG | {"rope_theta": 8.0}).rope_theta == 8.0
