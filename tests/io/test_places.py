"""Leaves that are several modules elsewhere: layers along any axis, and parts of a fused axis."""

import jax
import numpy as np
import pytest
from helpers import assert_close, normal, randomize_b

import lora_jax
from lora_jax.io import hf, peft
from lora_jax.io.peft._folder import Folder


def adapted(params, **options):
    return randomize_b(lora_jax.lorafy(params, 2, alpha=3.0, **options))


def updates(lora_params):
    """What an adapter adds to each leaf."""
    merged = lora_jax.merge(lora_params)
    return jax.tree.map(lambda x, y: np.asarray(x - y), merged, lora_params.base)


def update_there(folder, module):
    """What PEFT adds to the weight of a module, [out, in]."""
    tensors = Folder.open(folder).tensors
    config = Folder.open(folder).config
    a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
    return config["lora_alpha"] / config["r"] * (b @ a)


def same(found, lora_params):
    """Compare two adapters: their keys, and every array."""
    assert found.adapter.factors.keys() == lora_params.adapter.factors.keys()
    for key, f in lora_params.adapter.factors.items():
        assert found.adapter.factors[key].layout == f.layout
        assert np.array_equal(found.adapter.factors[key].a, f.a)
        assert np.array_equal(found.adapter.factors[key].b, f.b)


@pytest.mark.parametrize("letters", ["bio", "ibo", "iob", "iboo", "ibooo"[:4]])
def test_layers_along_any_axis(letters, tmp_path):
    sizes = {"b": 3, "i": 4, "o": 2}
    shape = [sizes[x] for x in letters]
    shape[letters.index("o")] = 5
    params = {"layers": {"q_proj": {"kernel": normal(0, tuple(shape))}}}
    layout = {"layers/q_proj/kernel": letters}
    options = {"names": {"layers/q_proj": "model.layers.{layer}.q_proj"}}
    lora_params = adapted(params, targets=".*", layout=layout)
    peft.save(tmp_path / "a", lora_params, **options)  # the adapter knows the axes
    update = np.moveaxis(updates(lora_params)["layers"]["q_proj"]["kernel"], letters.index("b"), 0)
    for k in range(3):
        there = update_there(tmp_path / "a", f"model.layers.{k}.q_proj")
        assert_close(there.T.reshape(update[k].shape), update[k])
    same(peft.load(tmp_path / "a", params, layout=layout, **options), lora_params)
    hf.save(tmp_path / "m", params, layout=layout, **options)
    back = hf.load(tmp_path / "m", params, hf.Family(), layout=layout, **options)
    assert np.array_equal(back["layers"]["q_proj"]["kernel"], params["layers"]["q_proj"]["kernel"])
