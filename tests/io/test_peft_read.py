"""PEFT's files are read into one value, complete or not at all."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_close

from lora_jax.io._torch import Map
from lora_jax.io.peft._axes import wrappers
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._own import own_others, own_parts
from lora_jax.io.peft._read import read

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
NAMES = "dora experts experts_before_0_19 pissa plain rows rslora saved".split()
COPIES = "original_module", "modules_to_save"  # PEFT writes them; what is in them does not count


def golden(name):
    """The folder, the places of its base in PyTorch's names, and the base."""
    found = safetensors.numpy.load_file(GOLDEN / name / "expected.safetensors")
    base = {k.removeprefix("base."): jnp.asarray(x) for k, x in found.items() if "base." in k}
    leaves = {name.replace(".", "/"): x for name, x in base.items()}
    letters = {2: "oi", 3: "boi" if "experts" in name else "oii"}
    layout = {path: letters[x.ndim] for path, x in leaves.items() if x.ndim > 1}
    layout |= {path: "io" for path in leaves if path.startswith("table")}
    kinds = {"conv/weight": "Conv", "table/weight": "Embedding"}
    return Folder.open(GOLDEN / name), Map(leaves, None, kinds, layout), leaves


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing_or_left_over_is_an_error(name):
    folder, places, _ = golden(name)
    read(folder, places)

    def of(tensors):
        return read(dataclasses.replace(folder, tensors=tensors), places)

    for tensor, x in folder.tensors.items():
        fewer = {k: v for k, v in folder.tensors.items() if k != tensor}
        if not any(copy in tensor for copy in COPIES):
            with pytest.raises(ValueError, match=r"missing|no place"):
                of(fewer)
        with pytest.raises(ValueError, match=r"no place|have not|missing|two different"):
            of(fewer | {f"{tensor}.more": x})
    for stray in ("first.lora_B.bias", "last.lora_embedding_B", "first.more", "more"):
        with pytest.raises(ValueError, match="no place"):
            of({**folder.tensors, stray: np.ones(5, np.float32)})


@pytest.mark.parametrize("name", NAMES)
def test_contents_are_by_path(name):
    folder, places, leaves = golden(name)
    contents = read(folder, places)
    paths = {"pissa": "first last", "saved": "first", "rows": "first"}.get(name, "")
    paths = paths or "table first conv last"
    expected = {f"{path}/weight" for path in paths.split()}
    if "experts" in name:
        expected = {"experts/gate_up_proj", "experts/down_proj"}
    assert contents.factors.keys() == expected
    full = {"first/bias", "conv/bias", "last/weight", "last/bias"} if name == "saved" else set()
    assert contents.full.keys() == full
    assert contents.redone == (expected if name == "pissa" else frozenset())
    assert {path: rows.ids for path, rows in contents.rows.items()} == (
        {"table/weight": (2, 7)} if name == "rows" else {}
    )
    adapter = contents.adapter(leaves)
    assert [key.partition("[")[0] for key in adapter.factors] == [
        path for path in leaves if path in {*expected, *contents.rows}
    ]
    if name == "rows":
        new = folder.tensors["table.token_adapter.trainable_tokens_delta"][::-1]
        f = adapter.factors["table/weight"]
        update = np.asarray(f.a, np.float64) @ np.asarray(f.b, np.float64)
        assert_close((leaves["table/weight"] + update)[np.array([2, 7])], new)
    with pytest.raises(dataclasses.FrozenInstanceError):
        contents.full = {}


# Before 0.19 the axes were in another order, which only the model tells.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "experts_before_0_19"])
def test_an_adapter_alone_tells_the_same_factors(name):
    folder, places, _ = golden(name)
    own, contents = own_parts(folder), read(folder, places)
    assert own.keys() == {part.key for parts in contents.factors.values() for part in parts}
    for (part,) in contents.factors.values():
        alone = own[part.key]
        assert (alone.scale, alone.rank, alone.kind) == (part.scale, part.rank, part.kind)
        for one, other in ((alone.a, part.a), (alone.b, part.b), (alone.magnitude, part.magnitude)):
            assert (one is None and other is None) or np.array_equal(one, other)
    more = {
        "saved": {"first.bias", "conv.bias", "last.weight", "last.bias"},
        "rows": {"table (rows)"},
    }
    assert own_others(folder).keys() == more.get(name, set())


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["m.a"], {"m.a": "m"}),
        (["m.a", "m.b"], {"m.a": "m.base_layer", "m.b": "m"}),
        (["m.b", "n.a"], {"m.b": "m", "n.a": "n"}),
        (
            ["m.c", "m.a", "m.b"],
            {"m.a": "m.base_layer.base_layer", "m.b": "m.base_layer", "m.c": "m"},
        ),
        (["m.x"], {"m.x": "m"}),
        (["m.x", "m.a"], None),
    ],
)
def test_wrappers_of_parameters_are_nested_in_their_order(names, found):
    if found is None:
        with pytest.raises(
            ValueError, match=r"\['a', 'x'\] of the module 'm' .* for \['x'\] is not"
        ):
            wrappers(names, ("a", "b", "c"))
    else:
        assert wrappers(names, ("a", "b", "c")) == found


def test_full_leaves_without_a_layer_have_the_base_s(tmp_path):
    base = {"layers": {"bias": jnp.asarray(np.arange(6, dtype=np.float32).reshape(3, 2))}}
    leaves = {"layers/bias": base["layers"]["bias"], "q/kernel": jax.ShapeDtypeStruct((2, 2), "f4")}
    places = Map(leaves, {"layers": "l.{layer}", "q": "q"})
    config = {"r": 1, "lora_alpha": 1, "bias": "none", "modules_to_save": ["l.1"]}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}
    tensors = {"l.1.bias": np.full(2, 9, np.float32)}
    tensors |= {"q.lora_A.weight": np.ones((1, 2), "f4"), "q.lora_B.weight": np.ones((2, 1), "f4")}
    contents = read(Folder("a", config | {"target_modules": ["q"]}, tensors), places)
    assert np.array_equal(contents.full["layers/bias"], [[0, 1], [9, 9], [4, 5]])
