"""Files that earlier versions wrote are read to the bit, and written again they are the same."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same

import lora_jax
from lora_jax.io import _record, hf, orbax, peft, safetensors

OWN = Path(__file__).parents[1] / "golden" / "own"
spec = importlib.util.spec_from_file_location("make_own", OWN.parent / "make_own.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


def read(path):
    """The bytes of a file; of a safetensors file, whose metadata has no order, header and data."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return data
    length = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:length]), length, data[length:]


def contents(folder):
    """What every file of a folder holds."""
    return {p.relative_to(folder): read(p) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", made.KINDS)
def test_native_files(name, tmp_path):
    path, expected = OWN / f"{name}.safetensors", made.kind(name)
    assert_same(safetensors.load(path, expected.base), expected)
    assert safetensors.about(path) == made.WORDS
    made.save(tmp_path / "again", name)
    if name == "rows":  # version 1 stored them dense
        path = OWN / "rows_2.safetensors"
        assert_same(safetensors.load(path, expected.base), expected)
    assert read(tmp_path / "again") == read(path)


def test_orbax_checkpoints():
    dora = made.kind("dora")
    assert_same(orbax.load(OWN / "orbax_adapter", dora.base), dora)
    params = made.model()
    like = jax.tree.map(jnp.zeros_like, params)
    assert_same(orbax.load_params(OWN / "orbax_params", like), params)
    lora_params, state = made.training()
    tx = lora_jax.optimizer(optax.sgd(0.5, momentum=0.5))
    extra = {"seen": 0, "name": ""}
    with orbax.Checkpointer(OWN / "orbax_training") as checkpointer:
        found = checkpointer.load(params, tx.init(lora_params), extra)
    assert_same(found.lora_params.adapter, lora_params.adapter)
    assert_same(found.opt_state, state)
    assert (found.step, found.extra) == (made.STEP, made.SEEN)


@pytest.mark.parametrize("name", made.PEFT)
def test_peft_folders(name, tmp_path):
    expected = made.llama(name)
    found = peft.load(OWN / f"peft_{name}", expected.base, layout=made.LLAMA)
    assert_same(found, expected)
    peft.save(tmp_path / "again", expected, layout=made.LLAMA)
    assert contents(tmp_path / "again") == contents(OWN / f"peft_{name}")


def test_merged_folder(tmp_path):
    made.merge(OWN / "peft_plain", tmp_path)
    assert contents(tmp_path / "model") == contents(OWN / "model")
    assert contents(tmp_path / "merged") == contents(OWN / "merged")
    expected = lora_jax.merge(made.llama("plain"))
    found = hf.load(OWN / "merged", expected, hf.Family(), layout=made.LLAMA)
    assert_same(found, expected)


@pytest.mark.parametrize("change", [lambda a: a[::-1], lambda a: 2 * a, lambda a: a[:5]])
def test_rows_of_version_1_pick_rows_or_are_refused(change):
    entry = {"layout": "io", "rank": 2, "frozen": ["a"], "residual": False, "dora": False}
    record = {"factors": {"t[[2, 6]]": entry}, "full": []}
    a = np.eye(7, dtype=np.float32)[:, [2, 6]]
    arrays = {"a": a, "b": np.ones((2, 3), np.float32), "scale": np.ones((), np.float32)}
    load = lambda a: _record.adapter_of(  # noqa: E731
        record, {f"t[[2, 6]].{k}": x for k, x in (arrays | {"a": a}).items()}, "it"
    )
    f = load(a).factors["t"]
    assert (f.ids, f.vocabulary, f.layout) == ((2, 6), 7, "io")
    with pytest.raises(ValueError, match=r"t\[\[2, 6\]\]' are not those of these rows"):
        load(change(a))
