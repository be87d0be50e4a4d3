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


def as_there(update, letters):
    """Put a part of an update into the axes of a Linear."""
    order = [k for x in "oi" for k, y in enumerate(letters) if x == y]
    outputs = np.prod([size for size, x in zip(update.shape, letters, strict=True) if x == "o"])
    return update.transpose(order).reshape(int(outputs), -1)


def same(found, lora_params):
    """Compare two adapters: their keys, and every array."""
    assert found.adapter.factors.keys() == lora_params.adapter.factors.keys()
    for key, f in lora_params.adapter.factors.items():
        assert found.adapter.factors[key].layout == f.layout
        assert np.array_equal(found.adapter.factors[key].a, f.a)
        assert np.array_equal(found.adapter.factors[key].b, f.b)


@pytest.mark.parametrize("letters", ["bio", "ibo", "iob", "iboo", "oibo"])
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
        assert_close(there, as_there(update[k], letters.replace("b", "")))
    same(peft.load(tmp_path / "a", params, layout=layout, **options), lora_params)
    hf.save(tmp_path / "m", params, layout=layout, **options)
    back = hf.load(tmp_path / "m", params, hf.Family(), layout=layout, **options)
    assert np.array_equal(back["layers"]["q_proj"]["kernel"], params["layers"]["q_proj"]["kernel"])


QKV = {
    r"layers_(\d+)/qkv[:, 0:4]": r"l.\1.q_proj",
    r"layers_(\d+)/qkv[:, 4:6]": r"l.\1.k_proj",
    r"layers_(\d+)/qkv[:, 6:8]": r"l.\1.v_proj",
}
ROWS = {key.replace(":, ", ""): name for key, name in QKV.items()}
EACH = {"at/kv_einsum": ["at.k_proj", "at.v_proj"]}
STACKED = {"at/kv_einsum": ["at.{layer}.k_proj", "at.{layer}.v_proj"]}
BOTH = {"at.k_proj": np.s_[0], "at.v_proj": np.s_[1]}
# The names; the shape and the letters of the leaf; the part that is adapted; the parts of the leaf
# that some modules are, and the letters of these.
FUSED = {
    "ranges": (
        QKV,
        (3, 8),
        "io",
        "",
        {"l.0.q_proj": np.s_[:, :4], "l.0.v_proj": np.s_[:, 6:]},
        "io",
    ),
    "the queries": (QKV, (3, 8), "io", "[:, 0:4]", {"l.0.q_proj": np.s_[:, :4]}, "io"),
    "rows": (ROWS, (8, 3), "oi", "", {"l.0.q_proj": np.s_[:4], "l.0.v_proj": np.s_[6:]}, "oi"),
    "entries": (EACH, (2, 3, 4, 5), "ooio", "", BOTH, "oio"),
    "an entry": (EACH, (2, 3, 4, 5), "ooio", "[1:2]", {"at.v_proj": np.s_[1]}, "oio"),
    "of inputs": (EACH, (2, 4, 5), "iio", "", BOTH, "io"),
    "of a batch": (EACH, (2, 4, 5), "bio", "", BOTH, "io"),
    "layers": (STACKED, (3, 2, 4, 5), "boio", "", {"at.2.v_proj": np.s_[2, 1]}, "io"),
    "layers inside": (STACKED, (2, 4, 3, 5), "oibo", "", {"at.2.v_proj": np.s_[1, :, 2]}, "io"),
    "some": (STACKED, (2, 4, 3, 5), "oibo", "[:, :, 1:3]", {"at.2.v_proj": np.s_[1, :, 2]}, "io"),
}


def fused(names, shape, letters):
    path = "at/kv_einsum/w" if any("kv_einsum" in key for key in names) else "layers_0/qkv/kernel"
    params = normal(0, shape)
    for key in reversed(path.split("/")):
        params = {key: params}
    return path, params, {"names": names, "layout": {path: letters}, "kinds": {".*": "Linear"}}


@pytest.mark.parametrize("name", FUSED)
def test_parts_of_a_fused_axis_are_modules_of_their_own(name, tmp_path):
    names, shape, letters, part, modules, inner = FUSED[name]
    path, params, options = fused(names, shape, letters)
    lora_params = adapted(params, targets=path + part, layout=options["layout"])
    peft.save(tmp_path / "a", lora_params, **options)
    (update,) = jax.tree.leaves(updates(lora_params))
    for module, index in modules.items():
        there = update_there(tmp_path / "a", module)
        assert_close(there, as_there(update[index], inner))
    same(peft.load(tmp_path / "a", params, **options), lora_params)
    hf.save(tmp_path / "m", params, **options)
    back = hf.load(tmp_path / "m", params, hf.Family(), **options)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_rows_of_a_table_that_is_several_modules_are_refused(tmp_path):
    params = {"table": {"embedding": normal(0, (6, 4))}, "q": {"kernel": normal(1, (4, 4))}}
    lora_params = lora_jax.lorafy(params, 1, targets="q/kernel", rows={"table/embedding": [1]})
    names = {"q": "q", "table[0:3]": "one", "table[3:6]": "two"}
    with pytest.raises(ValueError, match=r"makes it 2 modules there, such as 'one'"):
        peft.save(tmp_path / "a", lora_params, names=names)


def test_an_entry_across_modules_is_one_of_each(tmp_path):
    path, params, options = fused(QKV, (3, 8), "io")
    lora_params = adapted(params, targets=f"{path}[:, 2:5]", layout=options["layout"])
    peft.save(tmp_path / "a", lora_params, **options)
    found = peft.load(tmp_path / "a", params, **options)
    assert [*found.adapter.factors] == [f"{path}[:, 0:4]", f"{path}[:, 4:6]"]
    assert_close(lora_jax.merge(found), lora_jax.merge(lora_params))


def test_modules_with_factors_of_their_own_are_entries_of_their_own(tmp_path):
    path, params, options = fused(EACH, (2, 3, 4, 5), "ooio")
    targets = [f"{path}[0:1]", f"{path}[1:2]"]
    lora_params = adapted(params, targets=targets, layout=options["layout"])
    peft.save(tmp_path / "a", lora_params, **options)
    same(peft.load(tmp_path / "a", params, **options), lora_params)


def test_magnitudes_go_with_outputs_and_not_with_parts_of_inputs(tmp_path):
    path, params, options = fused(EACH, (2, 3, 4, 5), "ooio")
    lora_params = adapted(params, targets=path, layout=options["layout"], dora=True)
    peft.save(tmp_path / "a", lora_params, **options)
    found = peft.load(tmp_path / "a", params, **options)
    same(found, lora_params)
    assert_close(lora_jax.merge(found), lora_jax.merge(lora_params), depth=8)
    path, params, options = fused(EACH, (2, 4, 5), "iio")
    lora_params = adapted(params, targets=path, layout=options["layout"], dora=True)
    with pytest.raises(ValueError, match=r"of columns that 'at\.k_proj' has a part of"):
        peft.save(tmp_path / "b", lora_params, **options)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("names", "shape", "message"),
    [
        ({**QKV, r"layers_(\d+)/qkv[:, 4:6]": r"l.\1.q_proj"}, (3, 8), r"would both be 'l\.0\.q"),
        (
            {**QKV, r"layers_(\d+)/qkv[:, 3:5]": r"l.\1.x"},
            (3, 8),
            r"\[:, 0:4\] and \[:, 3:5\] .* over",
        ),
        (QKV, (3, 9), r"'layers_0/qkv/kernel', \(3, 9\), are not all of it: give every part a"),
        (QKV, (3, 7), r"'6:8' is no part of axis 1, of size 7"),
        (EACH, (3, 4, 5), r"2 names for 'at/kv_einsum/w', \(3, 4, 5\): expected one for each"),
        (STACKED, (2,), r"2 names for 'at/kv_einsum/w', \(2,\): expected one for each .* numbered"),
        ({"at/kv_einsum": [3]}, (2, 4), r"names={'at/kv_einsum': \[3\]}"),
        (
            {"layers_0/qkv[0:2]": "a.{layer}", "layers_0/qkv[2:3]": "b.{layer}"},
            (3, 8),
            "and divides",
        ),
    ],
)
def test_names_that_do_not_fit_a_fused_axis_are_refused(names, shape, message, tmp_path):
    _, params, options = fused(names, shape, "io")
    with pytest.raises((ValueError, TypeError), match=message):
        hf.save(tmp_path / "m", params, names=options["names"])
    assert not (tmp_path / "m").exists()


def test_other_numbers_of_layers_are_refused_and_a_layout_tells_them(tmp_path):
    params = {"norm": {"scale": normal(0, (4, 3))}, "q_proj": {"kernel": normal(1, (4, 3, 5))}}
    params |= {"layers_0": {"qkv": {"kernel": normal(2, (3, 8)), "bias": normal(3, (8,))}}}
    names = QKV | {"(.+)": r"model.layers.{layer}.\1"}
    options = {"names": names, "layout": {"q_proj/.*": "ibo"}}
    with pytest.raises(ValueError, match=r"3 layers of 'model\.layers\.', and .* layout={'q_proj/"):
        hf.save(tmp_path / "m", params, **options)
    options["layout"] |= {"norm/scale": "ob"}
    hf.save(tmp_path / "m", params, **options)
    back = hf.load(tmp_path / "m", params, hf.Family(), **options)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, params))
