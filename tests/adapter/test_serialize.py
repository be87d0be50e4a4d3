"""Adapters in what others serialize: states of Flax."""

import importlib
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from helpers import assert_same, drawn, ones

import lora_jax
from lora_jax._adapter.serialize import _WhenImported

PARAMS = {
    "embed": ones(7, 4),
    "query": {"kernel": ones(4, 4).astype(jnp.bfloat16), "bias": ones(4)},
}
OPTIONS = {"targets": "query.*", "dora": True, "rows": {"embed": [1, 3]}, "bias": "lora_only"}


def made(**options):
    return lora_jax.lorafy(PARAMS, 2, **{"init": drawn} | OPTIONS | options)


def test_a_train_state_of_flax_comes_back_bit_for_bit():
    tx = lora_jax.optimizer(optax.sgd(0.1, momentum=0.9))
    state = TrainState.create(apply_fn=None, params=made(), tx=tx)
    state = state.apply_gradients(grads=state.params)
    blank = TrainState.create(apply_fn=None, params=made(init="gaussian"), tx=tx)
    found = serialization.from_bytes(blank, serialization.to_bytes(state))
    assert_same(found, state)
    assert_same(serialization.from_state_dict(blank, serialization.to_state_dict(state)), state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"rows": {"embed": [1, 4]}},
            r"adapter/factors/embed' has ids \[1, 3\], expected \[1, 4\]",
        ),
        ({"freeze": ("a",)}, r"query/kernel' has frozen \[\], expected \['a'\]"),
        ({"layout": {"query/kernel": "oi"}}, r"has layout 'io', expected 'oi'"),
        ({"rows": None}, r"is of other factors: only the state has 'embed'"),
        ({"bias": "none"}, r"is of other full: only the state has 'query/bias'"),
        ({"dora": False}, r"'norm', 'scale', 'static'\], expected \['a', 'b', 'scale', 'static'\]"),
    ],
)
def test_a_state_of_another_adapter_is_refused(options, match):
    state = serialization.to_state_dict(made())
    other = made(**options)
    with pytest.raises(ValueError, match=match):
        serialization.from_state_dict(other, state)
    more = serialization.to_state_dict(other)
    assert_same(serialization.from_state_dict(other, more), other)  # the remedy


def test_a_state_of_no_adapter_is_refused():
    with pytest.raises(ValueError, match=r"the state at '.' has \['query'\], expected \['adapter'"):
        serialization.from_state_dict(made(), {"query": 1})
    with pytest.raises(ValueError, match="has list, expected"):
        serialization.from_state_dict(made(), [1])
    labels = jax.tree.map(lambda x: 0, lora_jax.LoraParams(None, made().adapter))
    assert serialization.from_state_dict(labels, serialization.to_state_dict(labels)).base is None


def test_flax_is_met_when_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "imported_later.py").write_text("names = []")
    monkeypatch.syspath_prepend(tmp_path)
    finder = _WhenImported("imported_later", lambda module: module.names.append("registered"))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    module = importlib.import_module("imported_later")
    assert module.names == ["registered"]
    assert module.__spec__.loader is module.__loader__
    assert importlib.reload(module).names == ["registered"]
    monkeypatch.delitem(sys.modules, "imported_later")
