"""PEFT's files: those that PEFT wrote, those that we write, and those that must be refused."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_close, drawn, normal, ones, randomize_b
from jax import lax

import lora_jax
from lora_jax.io import peft

pytestmark = pytest.mark.usefixtures("standard_promotion")

PRE = "base_model.model."
GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
EXPERTS = {"layout": {".*_proj": "boi"}}
NET = {"kinds": {"conv/kernel": "Conv"}, "layout": {"conv/kernel": "iio"}}


def net(p, ids):
    """The model of the golden files."""
    x = jnp.tanh(p["table"]["embedding"][ids] @ p["first"]["kernel"] + p["first"]["bias"])
    conv = p["conv"]["kernel"]
    x = lax.conv_general_dilated(x, conv, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    return jnp.tanh(x + p["conv"]["bias"]) @ p["last"]["kernel"] + p["last"]["bias"]


def mixture(p, x):
    """The model of the golden experts."""
    p = p["experts"]
    gate, up = jnp.split(jnp.einsum("ni,eoi->eno", x, p["gate_up_proj"]), 2, -1)
    return jnp.einsum("eni,eoi->no", jnp.tanh(gate) * up, p["down_proj"])


@functools.cache
def golden(name):
    """The folder, the base's parameters here, the function, an input and the output."""
    found = safetensors.numpy.load_file(GOLDEN / name / "expected.safetensors")
    base = {k.removeprefix("base."): v for k, v in found.items() if "base." in k}
    if "experts" in name:
        params = {"experts": {k.removeprefix("experts."): v for k, v in base.items()}}
        params = jax.tree.map(jnp.asarray, params)
        return GOLDEN / name, params, jax.jit(mixture), found["x"], found["y"], EXPERTS
    params: dict = {"table": {"embedding": base["table.weight"]}}
    for layer in ("first", "conv", "last"):
        kernel = base[f"{layer}.weight"].transpose()
        params[layer] = {"kernel": kernel, "bias": base[f"{layer}.bias"]}
    params = jax.tree.map(jnp.asarray, params)
    return GOLDEN / name, params, jax.jit(net), found["x"], found["y"], NET


NAMES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and "__" not in p.name)


def test_there_are_golden_files_of_every_kind():
    kinds = "dora experts experts_before_0_19 pissa plain rows rslora saved"
    assert kinds.split() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_adapters_of_peft_compute_what_they_did_there_and_are_written_as_they_were(name, tmp_path):
    folder, params, fn, x, y, options = golden(name)
    lora_params = peft.load(folder, params, **options)
    assert np.abs(fn(params, x) - y).max() > 0.05
    apply, sums = jax.jit(lora_jax.lora(fn)), {"depth": 16}  # and norms of DoRA, a PiSSA of PEFT
    assert_close(apply(lora_params, x), y, **sums)
    assert_close(fn(lora_jax.merge(lora_params), x), y, **sums)
    peft.save(tmp_path / "out", lora_params, rslora=name == "rslora", **options)
    again = peft.load(tmp_path / "out", params, **options)
    assert_close(apply(again, x), y, **sums)
    if name in ("pissa", "experts_before_0_19"):
        return  # another rank, another layout
    theirs, ours = (
        safetensors.numpy.load_file(f / peft.TENSORS) for f in (folder, tmp_path / "out")
    )
    copies = ("original_module", "modules_to_save")
    theirs = {k: v for k, v in theirs.items() if not any(copy in k for copy in copies)}
    assert theirs.keys() == ours.keys()
    for key, x in theirs.items():
        x = x[::-1] if "trainable_tokens" in key else x  # we sort the rows
        assert_close(ours[key], x)
    theirs, ours = (json.loads((f / peft.CONFIG).read_text()) for f in (folder, tmp_path / "out"))
    for key in "r lora_alpha use_dora use_rslora bias alpha_pattern modules_to_save".split():
        assert ours[key] == theirs[key], key
    rows = [config["trainable_token_indices"] for config in (ours, theirs)]
    assert rows == ([{"table": [2, 7]}, {"table": [7, 2]}] if name == "rows" else [None, None])
    for key in ("rank_pattern", "target_modules", "target_parameters"):
        assert sorted(ours[key] or ()) == sorted(theirs[key] or ()), key


# Ours, out and in.

BLOCK = {
    "query": {"kernel": (6, 2, 3), "bias": (2, 3)},
    "out": {"kernel": (2, 3, 6)},
    "fused": {"kernel": (6, 9)},
    "head": {"kernel": (6, 4), "bias": (4,)},
    "embed": {"embedding": (11, 6)},
}


@functools.cache
def block(layers=2):
    """Parameters of a small transformer: attention over heads, a fused kernel, a table."""
    shapes = {
        f"layers_{k}": {n: BLOCK[n] for n in ("query", "out", "fused")} for k in range(layers)
    }
    shapes |= {name: BLOCK[name] for name in ("head", "embed")}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return jax.tree.unflatten(tree, [normal(k, shape) for k, shape in enumerate(leaves)])


def trained(params, **options):
    """An adapter of which no part is zero."""
    lora_params = randomize_b(lora_jax.lorafy(params, **{"init": drawn, **options}))
    adapter = lora_params.adapter
    full = {
        path: jnp.asarray(np.asarray(x) + x.dtype.type(0.25)) for path, x in adapter.full.items()
    }
    return lora_jax.LoraParams(params, lora_jax.Adapter(adapter.factors, full))


LAYOUT = {".*out/kernel": "iio", ".*query/kernel": "ioo"}
CASES = {
    "heads are folded": {"targets": ".*(query|out)/kernel"},
    "everything": {"targets": ".*(query|out|fused)/kernel|embed.*", "full": "head/kernel"},
    "ranks and alphas": {
        "targets": ".*(query|out|fused)/kernel",
        "rank": {".*query.*": 3, "layers_1/fused.*": 1, ".*": 2},
        "alpha": {".*out.*": 5.0, "layers_0/fused.*": 0.3, ".*": 16.0},
    },
    "DoRA": {"targets": ".*(query|out|fused)/kernel", "dora": True},
    "parts of a fused kernel": {
        "targets": [".*fused/kernel[:, 0:3]", ".*fused/kernel[:, 6:9]"],
        "alpha": {"layers_0.*": 3.0, ".*": 4.0},
    },
    "parts, DoRA": {"targets": [".*fused/kernel[:, 0:3]", ".*fused/kernel[:, 6:9]"], "dora": True},
    "a part of the inputs": {"targets": ".*fused/kernel[2:5]"},
    "biases beside": {"targets": ".*(query|out)/kernel", "bias": "lora_only"},
    "all biases": {"targets": ".*query/kernel", "bias": "all"},
    "some bias": {"targets": ".*query/kernel", "full": "layers_1/query/bias"},
    "a head": {"targets": ".*query/kernel", "full": "head/.*"},
    "a head without its bias": {"targets": ".*query/kernel", "full": "head/kernel"},
    "rows": {"targets": ".*query/kernel", "rows": {"embed.*": [9, 2]}},
    "frozen": {"targets": ".*query/kernel", "freeze": ["a"]},
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_reads_as_the_same_function(name, tmp_path):
    params = block()
    options = {"rank": 2, "layout": LAYOUT} | CASES[name]
    lora_params = trained(params, **options)
    peft.save(tmp_path / "a", lora_params, layout=LAYOUT)
    again = peft.load(tmp_path / "a", params, layout=LAYOUT)
    assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))


def test_stacked_layers_are_taken_apart_and_put_together(tmp_path):
    params = {"layers": {"q": {"kernel": normal(0, (4, 6, 5))}}}
    layout = {".*kernel": "bio"}
    names = {r"layers/q": "model.layers.{layer}.q_proj"}
    for name, options in {
        "all": {"targets": ".*"},
        "some": {"targets": ".*", "layers": [1, 2]},
        "two runs": {"targets": ["layers/q/kernel[0:1]", "layers/q/kernel[2:4]"]},
        "dora": {"targets": ".*", "dora": True},
    }.items():
        lora_params = trained(params, rank=2, layout=layout, **options)
        peft.save(tmp_path / name, lora_params, names=names, layout=layout)
        again = peft.load(tmp_path / name, params, names=names, layout=layout)
        assert again.adapter.factors.keys() == lora_params.adapter.factors.keys()
        assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))
    config = json.loads((tmp_path / "some" / peft.CONFIG).read_text())
    assert config["target_modules"] == ["model.layers.1.q_proj", "model.layers.2.q_proj"]
    config = json.loads((tmp_path / "all" / peft.CONFIG).read_text())
    assert config["target_modules"] == ["q_proj"]


def test_experts_of_every_layer(tmp_path):
    params = {"layers": {"moe": {"down_proj": normal(0, (2, 3, 6, 5))}}}
    layout = {".*": "bbio"}
    lora_params = trained(params, rank=2, targets=".*", layout=layout)
    for name, template in {
        "parameters": "layers.{layer}.experts.down_proj",
        "modules": "layers.{layer}.experts.{expert}.down_proj",
    }.items():
        options = {"names": {"layers/moe/down_proj": template}, "layout": layout}
        peft.save(tmp_path / name, lora_params, **options)
        again = peft.load(tmp_path / name, params, **options)
        assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))
    tensors = safetensors.numpy.load_file(tmp_path / "parameters" / peft.TENSORS)
    shapes = {key: x.shape for key, x in tensors.items()}
    assert shapes["base_model.model.layers.1.experts.lora_A.weight"] == (6, 6)


def test_several_parameters_of_a_module_are_nested_in_their_order(tmp_path):
    params = {"moe": {name: ones(2, 4, 4) * k for k, name in enumerate("abc", 1)}}
    layout = {".*": "bio"}
    lora_params = trained(params, rank=1, targets=["moe/[ac]"], layout=layout)
    with pytest.raises(ValueError, match=r"nests them in the order .* pass parameter_order="):
        peft.save(tmp_path / "a", lora_params, layout=layout)
    options = {"layout": layout, "parameter_order": ("c", "a")}
    peft.save(tmp_path / "a", lora_params, **options)
    tensors = safetensors.numpy.load_file(tmp_path / "a" / peft.TENSORS)
    inner = "base_model.model.moe.base_layer.lora_A.weight"
    assert_close(tensors[inner][:1], np.asarray(lora_params.adapter.factors["moe/c"].a[0].T))
    with pytest.warns(UserWarning, match=r"'moe\.[ac]' is square, and nothing .* hf.merge"):
        again = peft.load(tmp_path / "a", params, **options)
    assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))


def test_layouts_of_a_function_say_the_kinds(tmp_path):
    _, params, fn, x, _, _ = golden("plain")
    layout = lora_jax.layout_of(fn, params, x)
    lora_params = trained(params, rank=2, targets=".*", layout=layout)
    peft.save(tmp_path / "a", lora_params, layout=layout)
    again = peft.load(tmp_path / "a", params, layout=layout)
    assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))


def test_tied_tables_are_refused_where_the_function_is_known(tmp_path):
    params = {"embed": {"embedding": ones(5, 4)}}
    table = lambda p: p["embed"]["embedding"]  # noqa: E731
    layout = lora_jax.layout_of(lambda p, ids: table(p)[ids] @ table(p).T, params, jnp.arange(3))
    lora_params = trained(params, rank=1, targets=".*", layout=layout)
    with pytest.raises(ValueError, match="is an output head as well, or may be: tied"):
        peft.save(tmp_path / "a", lora_params, layout=layout)


def test_tied_tables_are_refused_in_all_their_forms(tmp_path):
    params = {"embed": {"embedding": ones(5, 4)}, "q": {"kernel": ones(4, 4)}}

    def fn(p, ids):
        table = p["embed"]["embedding"]
        return table[ids] @ p["q"]["kernel"] @ table.T

    layout = lora_jax.layout_of(fn, params, jnp.arange(3))
    for k, options in enumerate(
        [{"targets": ["q.*", "embed.*"]}, {"targets": "q.*", "full": "embed.*"}]
    ):
        lora_params = trained(params, rank=1, **options)
        with pytest.raises(ValueError, match=r"peft\.save: the table .* is an output head as well"):
            peft.save(tmp_path / f"{k}", lora_params, layout=layout)
        peft.save(tmp_path / f"{k}", lora_params)  # where the function is not known
        with pytest.raises(ValueError, match=r"peft\.load: the table .* is an output head as well"):
            peft.load(tmp_path / f"{k}", params, layout=layout)


def test_files_are_what_the_format_says_in_plain_numpy(tmp_path):
    """Against the mathematics, without our reader and without PEFT, which has bugs of its own."""
    shapes = {"dense": (6, 5), "conv": (3, 2, 4, 8), "embed": (7, 6), "moe": (3, 6, 5)}
    leaf = {"embed": "embedding", "moe": "up"}
    params = {
        name: {leaf.get(name, "kernel"): normal(k, shape)}
        for k, (name, shape) in enumerate(shapes.items())
    }
    layout = {"conv.*": "iiio", "moe.*": "bio"}
    options = {"rank": 2, "targets": ".*", "layout": layout, "alpha": 6.0}
    for dora in (False, True):
        exclude = {"exclude": "moe.*"} if dora else {}
        lora_params = trained(params, dora=dora, **options, **exclude)
        folder = tmp_path / str(dora)
        peft.save(folder, lora_params)
        found = safetensors.numpy.load_file(folder / peft.TENSORS)
        found = {k.removeprefix(PRE): x.astype(np.float64) for k, x in found.items()}
        config = json.loads((folder / peft.CONFIG).read_text())
        s = config["lora_alpha"] / config["r"]
        merged = jax.tree.map(np.asarray, lora_jax.merge(lora_params))

        def a(name, found=found):
            return found[f"{name}.lora_A.weight"]

        def b(name, found=found):
            return found[f"{name}.lora_B.weight"]

        table = np.asarray(params["embed"]["embedding"], np.float64)
        table = table + s * (found["embed.lora_embedding_B"] @ found["embed.lora_embedding_A"]).T
        dense = np.asarray(params["dense"]["kernel"]).T + s * b("dense") @ a("dense")
        conv = np.asarray(params["conv"]["kernel"]).transpose(3, 2, 0, 1)
        conv = conv + s * np.einsum("or,rihw->oihw", b("conv")[:, :, 0, 0], a("conv"))
        if dora:
            m = {
                name: found[f"{name}.lora_magnitude_vector"] for name in ("dense", "conv", "embed")
            }
            table = m["embed"] * table / np.linalg.norm(table, axis=0)
            dense = m["dense"][:, None] * dense / np.linalg.norm(dense, axis=1)[:, None]
            norms = np.sqrt((conv**2).sum((1, 2, 3)))
            conv = m["conv"].reshape(-1, 1, 1, 1) * conv / norms[:, None, None, None]
        else:
            a_moe, b_moe = a("moe").reshape(3, 2, 6), b("moe").reshape(5, 2, 3)
            moe = np.asarray(params["moe"]["up"]) + s * np.einsum("ore,eri->eio", b_moe, a_moe)
            assert_close(merged["moe"]["up"], moe)
        assert_close(merged["embed"]["embedding"], table)
        assert_close(merged["dense"]["kernel"].T, dense)
        assert_close(merged["conv"]["kernel"].transpose(3, 2, 0, 1), conv)


def test_norms_are_those_of_the_base(tmp_path):
    folder, params, *_, options = golden("dora")
    lora_params = peft.load(folder, params, **options)
    kernel = params["first"]["kernel"]
    assert_close(
        lora_params.adapter.factors["first/kernel"].norm,
        (np.asarray(kernel, np.float64) ** 2).sum(0),
    )


def test_low_precision_factors_and_bases(tmp_path):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), block())
    options = {"targets": ".*query/kernel", "bias": "all", "dtype": jnp.bfloat16}
    lora_params = trained(params, rank=2, layout=LAYOUT, **options)
    peft.save(tmp_path / "a", lora_params, layout=LAYOUT)
    again = peft.load(tmp_path / "a", params, layout=LAYOUT)
    assert again.adapter.factors["layers_0/query/kernel"].a.dtype == jnp.float32
    assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))


@pytest.mark.parametrize("init", ["pissa", "olora", lora_jax.init.loftq("int4")])
def test_initializers_that_change_the_base_are_made_plain_first(init, tmp_path):
    params = block()
    initial = lora_jax.lorafy(params, 2, targets=".*fused/kernel", init=init)
    lora_params = randomize_b(initial)
    with pytest.raises(ValueError, match=r"what its initializer left of the base.*initial= and"):
        peft.save(tmp_path / "a", lora_params)
    with pytest.raises(ValueError, match="initial and params go together"):
        peft.save(tmp_path / "a", lora_params, initial=initial)
    peft.save(tmp_path / "a", lora_params, initial=initial, params=params)
    again = peft.load(tmp_path / "a", params)
    assert again.adapter.factors["layers_0/fused/kernel"].rank == 4
    if isinstance(init, str):
        assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))
    else:  # what rounding the base took away comes back with the base
        ours, start = (lora_jax.merge(p, quantized="dequantize") for p in (lora_params, initial))
        change = jax.tree.map(lambda a, b, c: a - b + c, ours, start, params)
        assert_close(lora_jax.merge(again), change)


def test_alphas_are_round_numbers_of_the_very_scale(tmp_path):
    for rank, alpha, rslora in [(3, 16.0, False), (6, 0.1, False), (5, 8.0, True), (1, 1e-3, True)]:
        options = {"targets": ".*fused/kernel", "rslora": rslora}
        lora_params = trained(block(), rank=rank, alpha=alpha, **options)
        peft.save(tmp_path / "a", lora_params, rslora=rslora, overwrite=True)
        assert json.loads((tmp_path / "a" / peft.CONFIG).read_text())["lora_alpha"] == alpha
        again = peft.load(tmp_path / "a", block())
        scales = {f.scale.item() for p in (again, lora_params) for f in p.adapter.factors.values()}
        assert len(scales) == 1


def test_names_that_others_end_with_are_told_apart(tmp_path):
    weights = {f"{name}/kernel": ones(3, 3) for name in ("q", "a/q", "b/norm_head", "head")}
    params: dict = {}
    for path, x in weights.items():
        *outer, last = path.split("/")
        inner = params
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = x
    lora_params = trained(params, rank=1, targets="q/kernel", full="head/kernel")
    peft.save(tmp_path / "a", lora_params)
    config = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    assert config["target_modules"] == "q"  # a pattern in full: a list would take a.q as well
    tensors = safetensors.numpy.load_file(tmp_path / "a" / peft.TENSORS)
    assert "base_model.model.b.norm_head.weight" in tensors  # PEFT takes it for a head, too
    again = peft.load(tmp_path / "a", params)
    assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))


def kernel():
    return {"kernel": ones(3, 3)}


def test_patterns_are_of_one_module_each(tmp_path):
    params: dict = {"model": {"q": kernel()}, "vision": {"model": {"q": kernel(), "k": kernel()}}}
    params |= {"b[0]": kernel(), "b[1]": kernel(), "c": kernel()}
    options = {
        "alpha": {"model/q/.*": 2.0, "vision.*": 3.0, r"b\[0\].*": 4.0, ".*": 16.0},
        "rank": {"model/q/.*": 1, ".*": 2},
    }
    lora_params = trained(params, targets=".*", **options)
    peft.save(tmp_path / "a", lora_params)
    config = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    assert config["rank_pattern"] == {r"^model\.q": 1}
    with pytest.raises(ValueError, match="patterns that anchor a name others end with"):
        peft.save(tmp_path / "b", lora_params, for_vllm=True)
    assert set(config["alpha_pattern"]) >= {r"^model\.q", r"^b\[0\]"}
    assert_close(lora_jax.merge(peft.load(tmp_path / "a", params)), lora_jax.merge(lora_params))
    config["alpha_pattern"]["b[0]"] = config["alpha_pattern"].pop(r"^b\[0\]")  # as PEFT writes it
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps(config))
    assert_close(lora_jax.merge(peft.load(tmp_path / "a", params)), lora_jax.merge(lora_params))


def test_scales_of_any_sign_and_none(tmp_path):
    params = {"fused": {"kernel": ones(4, 6)}, "x": {"kernel": ones(4, 4)}}
    params["l"] = {"kernel": ones(2, 4, 4)}
    layout = {"l.*": "bio"}
    targets = ["fused/kernel[:, 0:2]", "fused/kernel[:, 4:6]", "x.*", "l.*"]
    lora_params = trained(params, rank=1, targets=targets, layout=layout)
    factors = dict(lora_params.adapter.factors)
    for key, scale in {"fused/kernel[:, 0:2]": 0.0, "x/kernel": -1.0, "l/kernel": 0.0}.items():
        factors[key] = dataclasses.replace(factors[key], scale=jnp.float32(scale))
    lora_params = lora_jax.LoraParams(params, lora_jax.Adapter(factors))
    options = {"names": {"l": "l.{layer}", "(.*)": r"\1"}, "layout": layout}
    peft.save(tmp_path / "a", lora_params, **options)
    again = peft.load(tmp_path / "a", params, **options)
    assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))
    factors["x/kernel"] = dataclasses.replace(factors["x/kernel"], scale=jnp.float32(jnp.inf))
    with pytest.raises(ValueError, match="a scale is inf, expected a finite number"):
        peft.save(tmp_path / "b", lora_jax.LoraParams(params, lora_jax.Adapter(factors)), **options)


def test_names_are_names_of_modules(tmp_path):
    params = {
        "enc": {"attn": {"q": {"kernel": ones(3, 3)}}},
        "s": {"kernel": ones(3, 3)},
    }
    params["s"]["scale"] = ones(3)  # beside a kernel, a parameter of its own
    params["lora_gate"] = {"kernel": ones(3, 3)}
    lora_params = trained(params, rank=1, targets=".*kernel")
    peft.save(tmp_path / "a", lora_params, names={"(.*)": r"\1"})
    again = peft.load(tmp_path / "a", params)
    assert_close(lora_jax.merge(again), lora_jax.merge(lora_params))
    for names, error, message in [
        ({".*": "{x}"}, ValueError, "has marks besides"),
        ({"(": "x"}, ValueError, "names="),
        ({".*": r"\3"}, ValueError, "names="),
        (["x"], TypeError, "expected patterns to templates, or a function"),
        (lambda path: 1, TypeError, "expected a name"),
    ]:
        with pytest.raises(error, match=message):
            peft.save(tmp_path / "b", lora_params, names=names)
    with pytest.raises(TypeError, match="params is a LoraParams, expected its base"):
        peft.load(tmp_path / "a", lora_params)


def test_a_module_inside_a_whole_one_is_part_of_it(tmp_path):
    params = {"decoder": {"head": {"proj": kernel()}}, "head": kernel(), "q": kernel()}
    lora_params = trained(params, rank=1, targets=["q.*", "decoder.*"], full="head/kernel")
    with pytest.raises(ValueError, match=r"'decoder\.head\.proj' would train fully and have"):
        peft.save(tmp_path / "a", lora_params)
    lora_params = trained(params, rank=1, targets="q.*", full="head/kernel")
    peft.save(tmp_path / "a", lora_params)
    tensors = safetensors.numpy.load_file(tmp_path / "a" / peft.TENSORS)
    assert "base_model.model.decoder.head.proj.weight" in tensors
    assert_close(lora_jax.merge(peft.load(tmp_path / "a", params)), lora_jax.merge(lora_params))


def test_layers_of_one_stack_and_several_ranks_have_no_common_start(tmp_path):
    params = {"l": {"kernel": normal(0, (2, 5, 5))}}
    options = {"names": {"l": "l.{layer}"}, "layout": {".*": "bio"}}
    parts = {"l/kernel[0:1]": 1, "l/kernel[1:2]": 2}
    one, two = (
        trained(params, rank=rank, targets=f"l/kernel[{k}:{k + 1}]", layout=options["layout"])
        for k, rank in enumerate(parts.values())
    )
    factors = one.adapter.factors | two.adapter.factors
    peft.save(tmp_path / "a", lora_jax.LoraParams(params, lora_jax.Adapter(factors)), **options)
    path = tmp_path / "a" / peft.CONFIG
    path.write_text(
        path.read_text().replace('"init_lora_weights": true', '"init_lora_weights": "pissa"')
    )
    with pytest.raises(ValueError, match=r"ranks \[1, 2\], and are stacked here: the initializer"):
        peft.load(tmp_path / "a", params, **options)


def test_a_card_and_the_mode_of_files_are_kept(tmp_path):
    lora_params = trained(block(), rank=1, targets=".*fused/kernel")
    peft.save(tmp_path / "a", lora_params, base_model=tmp_path)
    (tmp_path / "a" / "README.md").write_text("mine")
    peft.save(tmp_path / "a", lora_params, overwrite=True)
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    modes = {p.stat().st_mode for p in (tmp_path / "a").iterdir()}
    assert len(modes) == 1


def test_what_vllm_would_refuse_is_refused(tmp_path):
    params = block()
    good = trained(params, rank=2, targets=".*query/kernel", layout=LAYOUT)
    peft.save(tmp_path / "good", good, for_vllm=True)
    tied = {"names": lambda path: {"head": "lm_head"}.get(path, path.replace("/", "."))}
    for name, options, more, message in [
        ("bias", {"bias": "all"}, {}, "bias='all'"),
        ("dora", {"dora": True}, {}, "DoRA: merge"),
        ("rows", {"rows": {"embed.*": [1]}}, {}, "rows of an embedding"),
        ("head", {"full": "head/.*"}, {}, r"fully trained modules, \['head'\]"),
        ("lm_head", {"full": "head/.*"}, tied, "a full base_model.model.lm_head.weight"),
    ]:
        lora_params = trained(params, rank=2, targets=".*query/kernel", layout=LAYOUT, **options)
        with pytest.raises(ValueError, match=f"vLLM would refuse this adapter: .*{message}"):
            peft.save(tmp_path / name, lora_params, for_vllm=True, layout=LAYOUT, **more)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"targets": [], "full": "head/kernel"}, {}, "no weight has factors"),
        (
            {"targets": ".*query.*"},
            {"names": {"nothing": "x"}},
            "names has no pattern for 'layers_0",
        ),
        ({"targets": ".*query.*"}, {"names": lambda path: "same"}, "would both be 'same.weight'"),
        ({"targets": ".*query.*"}, {"kinds": {".*": "linear"}}, "kinds=.*expected one of"),
        (
            {"targets": "head.*", "full": "layers_0/fused/kernel"},
            {"names": {".*fused": "a.head", ".*": "head"}},
            "would both be",
        ),
        (
            {"targets": "head/kernel", "full": "layers_0/fused/kernel"},
            {"names": lambda p: "x." + p if p == "head" else {"layers_0/fused": "d"}.get(p, p)},
            "would train fully and have factors as well",
        ),
    ],
)
def test_what_has_no_form_there_is_refused(options, arguments, message, tmp_path):
    lora_params = trained(block(), rank=2, layout=LAYOUT, **options)
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "a", lora_params, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_more_that_has_no_form_there(tmp_path):
    with pytest.raises(TypeError, match="expected a LoraParams, got dict"):
        peft.save(tmp_path / "a", {})
    params = {"a": {"kernel": ones(3, 4)}, "token": ones(1, 4)}
    lora_params = trained(params, rank=1, targets="a/kernel", full="token")
    with pytest.raises(ValueError, match="'token' trains fully, and is no weight or bias"):
        peft.save(tmp_path / "a", lora_params)
    mixed = trained(
        {"a": {"kernel": ones(3, 4)}, "b": {"kernel": ones(3, 4)}},
        rank=1,
        targets=".*",
        dora=True,
    )
    factors = dict(mixed.adapter.factors)
    factors["b/kernel"] = dataclasses.replace(factors["b/kernel"], magnitude=None)
    with pytest.raises(ValueError, match="'a' has a DoRA magnitude and 'b' has not"):
        peft.save(tmp_path / "a", lora_jax.LoraParams(mixed.base, lora_jax.Adapter(factors)))
    stacked = {"a": {"kernel": ones(2, 3, 4)}}
    lora_params = trained(stacked, rank=1, targets=".*", layout={".*": "bio"}, dora=True)
    with pytest.raises(ValueError, match="PEFT has none of parameters"):
        peft.save(tmp_path / "a", lora_params)
    with pytest.raises(ValueError, match=r"has batch axes .* is a Linear: give in names"):
        peft.save(tmp_path / "a", lora_params, kinds={".*": "Linear"})
    three = trained({"a": {"kernel": ones(2, 3, 4)}}, rank=1, targets=".*", layout={".*": "iio"})
    with pytest.raises(ValueError, match="a convolution or a dense kernel of two input axes"):
        peft.save(tmp_path / "a", three)
    part = trained({"a": {"kernel": ones(4, 4)}}, rank=1, targets="a/kernel[0:2]", dora=True)
    with pytest.raises(ValueError, match="is a part of its inputs: PEFT has one magnitude"):
        peft.save(tmp_path / "a", part)


# Bad files.


@pytest.fixture
def broken(tmp_path):
    """Change a copy of a golden adapter and load it."""

    def load(name, config=None, tensors=None, **more):
        folder, params, *_, options = golden(name)
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "a")
        if config is not None:
            values = json.loads((folder / peft.CONFIG).read_text()) | config
            values = {k: v for k, v in values.items() if v != "absent"}
            (tmp_path / "a" / peft.CONFIG).write_text(json.dumps(values))
        if tensors is not None:
            found = safetensors.numpy.load_file(folder / peft.TENSORS)
            safetensors.numpy.save_file(tensors(found), tmp_path / "a" / peft.TENSORS)
        return peft.load(tmp_path / "a", more.pop("params", params), **options | more)

    return load


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("plain", {"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ("plain", {"r": "4"}, "r is '4', expected int"),
        ("plain", {"r": True}, "r is True, expected int"),
        ("plain", {"r": 5}, "have rank 4, and its configuration has 5"),
        ("plain", {"r": 0}, "rank 0, expected a positive number"),
        ("plain", {"rank_pattern": {"conv": 0}}, "rank 0, expected a positive number"),
        ("plain", {"rank_pattern": {"(": 2}}, "is not a regular expression"),
        ("plain", {"rank_pattern": {"conv": 2.5}}, r"rank_pattern\['conv'\] is 2\.5"),
        ("plain", {"rank_pattern": {"conv": float("inf")}}, r"rank_pattern\['conv'\] is inf"),
        ("plain", {"alpha_pattern": {"conv": float("nan")}}, "alpha nan, expected a finite"),
        ("plain", {"alpha_pattern": {"(?i)Conv": 4}}, "is not a regular expression"),
        ("plain", {"lora_alpha": 10**400}, "alpha 10+, expected a finite number"),
        ("plain", {"r": 10**400}, "rank 10+, expected a positive number"),
        ("plain", {"layers_pattern": "("}, "is not a regular expression"),
        ("plain", {"modules_to_save": ["("]}, "is not a regular expression"),
        ("plain", {"lora_bias": True}, "lora_B.bias' is missing"),
        ("plain", {"modules_to_save": ["last"]}, "'last', which its configuration does not adapt"),
        (
            "plain",
            {"trainable_token_indices": {"table": [1]}},
            "trainable_tokens_delta' is missing",
        ),
        ("plain", {"bias": "all"}, "base_layer.bias' is missing"),
        ("plain", {"target_modules": [1]}, r"target_modules is \[1\], expected a list of names"),
        ("plain", {"target_modules": "(first"}, "is not a regular expression"),
        ("plain", {"target_modules": ["first"]}, "has factors for 'conv', which its configuration"),
        ("plain", {"exclude_modules": ["conv"]}, "factors for 'conv', which its configuration"),
        ("plain", {"bias": "some"}, "bias='some'"),
        ("plain", {"use_dora": True}, "lora_magnitude_vector' is missing"),
        ("dora", {"use_dora": False}, "magnitude_vector' has no place here"),
        ("plain", {"init_lora_weights": "loftq"}, "init_lora_weights='loftq' changes the base"),
        ("plain", {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conver"),
        ("plain", {"use_qalora": True}, "use_qalora=True is a variant"),
        ("plain", {"some_new_thing": 3}, "some_new_thing=3: PEFT .* has no such key"),
        ("plain", {"layer_replication": [[0, 2]]}, "layer_replication=.* is a variant"),
        ("saved", {"modules_to_save": None}, "'base_model.model.last.weight' has no place"),
        ("saved", {"bias": "none"}, "has no place here"),
        ("rows", {"trainable_token_indices": {"table": [7, 99]}}, "of a vocabulary of 100 tokens"),
        ("rows", {"trainable_token_indices": None}, "trainable_token_indices are None"),
        ("experts", {"target_parameters": ["experts.up"]}, r"the parameters \['experts.up'\]"),
    ],
)
def test_configurations_that_cannot_be_read_exactly_are_refused(name, config, message, broken):
    with pytest.raises(ValueError, match=message):
        broken(name, config)


def renamed(old, new):
    return lambda found: {k.replace(old, new): v for k, v in found.items()}


def without(part):
    return lambda found: {k: v for k, v in found.items() if part not in k}


def changed(part, f):
    return lambda found: {k: f(v) if part in k else v for k, v in found.items()}


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("plain", renamed(PRE, ""), "does not begin with 'base_model.model.'"),
        ("plain", renamed("lora_A.weight", "lora_A.default.weight"), "has no place here"),
        ("plain", without("first.lora_B"), "first.lora_B.weight' is missing"),
        ("plain", without("first.lora_A"), "first.lora_B.weight' has no place"),
        ("plain", without("first."), "adapts 'first', and the tensors of its factors are missing"),
        ("plain", renamed("first", "frist"), "a module 'frist', which .* Nearest: first"),
        (
            "plain",
            lambda found: found | {PRE + "x": np.ones(2, "f")},
            "'base_model.model.x' has no",
        ),
        (
            "plain",
            changed("first.lora_A", lambda x: x[:, :-1]),
            "'first': lora_A has shape .4, 11.",
        ),
        ("plain", changed("first.lora_A", lambda x: x.T), "'first': lora_A has shape"),
        ("plain", changed("first.lora_A", lambda x: x * np.nan), "values that are not finite"),
        ("plain", changed("first.lora_A", lambda x: x.astype(int)), "of type int64"),
        (
            "dora",
            changed("first.lora_mag", lambda x: x[1:]),
            "expected one number for each of the 16",
        ),
        ("saved", without("last.weight"), "last.weight' is missing"),
        ("saved", without("conv.bias"), "conv.bias' is missing"),
        ("rows", without("trainable"), "table.token_adapter.trainable_tokens_delta' is missing"),
        ("saved", changed("last.weight", lambda x: x.T), "has shape .8, 5., expected .5, 8."),
        ("saved", changed("original_module", lambda x: x[:2]), None),
        (
            "saved",
            changed("modules_to_save.bias", lambda x: x + 1),
            "two different tensors of 'last.bias'",
        ),
        ("rows", changed("trainable", lambda x: x[:1]), "has shape .1, 12."),
    ],
)
def test_tensors_that_have_no_place_or_none_are_refused(name, tensors, message, broken):
    if message is None:  # what is left out may be anything
        broken(name, tensors=tensors)
        return
    with pytest.raises(ValueError, match=message):
        broken(name, tensors=tensors)


def test_values_that_are_not_finite_can_be_asked_for(broken):
    found = broken("plain", tensors=changed("first.lora_A", lambda x: x * np.nan), finite=False)
    assert np.isnan(found.adapter.factors["first/kernel"].a).all()


def test_square_parameters_of_an_older_peft_are_not_guessed(tmp_path):
    params = {"moe": {"up": ones(2, 4, 4)}}
    lora_params = trained(params, rank=1, targets=".*", layout={".*": "bio"})
    peft.save(tmp_path / "a", lora_params)
    config = tmp_path / "a" / peft.CONFIG
    config.write_text(config.read_text().replace("0.21.2", "0.18.1"))
    with pytest.raises(ValueError, match=r"'moe\.up' is square: which axis is which cannot"):
        peft.load(tmp_path / "a", params, layout={".*": "bio"})
    config.write_text(config.read_text().replace('"0.18.1"', "null"))
    with pytest.raises(ValueError, match="does not give peft_version"):
        peft.load(tmp_path / "a", params, layout={".*": "bio"})


def test_keys_that_are_not_known_can_be_deleted_and_those_that_change_nothing_are_read(broken):
    with pytest.raises(ValueError, match=r"If it does not, delete it from adapter_config\.json"):
        broken("plain", {"trained_by": "someone"})
    plain = broken("plain", {"trained_by": "absent"})
    tying = broken("plain", {"ensure_weight_tying": True, "task_type": "X", "merge_weights": False})
    for one, other in zip(*(jax.tree.leaves(x.adapter) for x in (plain, tying)), strict=True):
        assert np.array_equal(one, other)


def test_what_peft_lists_and_did_not_adapt(broken):
    plain = broken("plain")
    listed = ["first", "table", "conv", "last"]
    more = ["query_key_value", "gone"]

    def same(lora_params):
        return all(map(np.array_equal, *(jax.tree.leaves(x.adapter) for x in (lora_params, plain))))

    assert same(broken("plain", {"target_modules": [*listed, *more]}))
    _, params, *_ = golden("plain")
    beside = params | {"extra": {"kernel": ones(3, 3)}}
    config, names = {"target_modules": [*listed, "gone"]}, {"(table|first|conv|last)": r"\1"}
    with pytest.raises(ValueError, match=r"the modules \['gone'\]; .* since 'extra/kernel' and"):
        broken("plain", config, params=beside, names=names)
    assert same(broken("plain", config, params=beside, names=names | {"extra": "extra"}))
    assert same(broken("plain", {"target_modules": listed}, params=beside, names=names))

    def without_conv(found):
        return {k: x for k, x in found.items() if "conv" not in k}

    left_out = broken("plain", {"exclude_modules": ["conv"]}, without_conv)
    assert "conv/kernel" not in left_out.adapter.factors
    with pytest.raises(ValueError, match="adapts 'conv', and the tensors of its factors are miss"):
        broken("plain", {}, without_conv)


@pytest.mark.parametrize("form", ["adapted", "adapted, by a pattern", "saved"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_adapters_are_read_once_or_twice(is_tied, form, tmp_path):
    """As PEFT writes a tied model with ensure_weight_tying: the table's, and its copy."""
    params = {"embed_tokens": {"embedding": normal(0, (7, 4))}, "q": {"kernel": normal(1, (4, 4))}}
    params |= {} if is_tied else {"lm_head": {"kernel": params["embed_tokens"]["embedding"].T}}
    q, a, b = (np.asarray(normal(k, s)) for k, s in ((2, (4, 2)), (3, (2, 7)), (4, (4, 2))))
    tensors = {"q.lora_A.weight": q.T.copy(), "q.lora_B.weight": q}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "ensure_weight_tying": True}
    table = np.asarray(params["embed_tokens"]["embedding"])
    if form == "saved":
        expected = table + 1
        tensors |= {"embed_tokens.weight": expected, "lm_head.weight": expected}
        config |= {"target_modules": ["q"], "modules_to_save": ["embed_tokens"]}
    else:
        expected = table + (b @ a).T
        tensors |= {"embed_tokens.lora_embedding_A": a, "embed_tokens.lora_embedding_B": b}
        tensors |= {"lm_head.lora_A.weight": b.T.copy(), "lm_head.lora_B.weight": a.T.copy()}
        tensors |= {"embed_tokens.base_layer.weight": table, "lm_head.base_layer.weight": table}
        config |= {
            "target_modules": ["q", "embed_tokens"] if form == "adapted" else "q|embed_tokens"
        }
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    safetensors.numpy.save_file(
        {PRE + name: x for name, x in tensors.items()}, tmp_path / peft.TENSORS
    )

    def fn(p, ids):
        head = p["embed_tokens"]["embedding"].T if is_tied else p["lm_head"]["kernel"]
        return p["embed_tokens"]["embedding"][ids] @ p["q"]["kernel"] @ head

    layout = lora_jax.layout_of(fn, params, jnp.arange(3))
    merged = lora_jax.merge(peft.load(tmp_path, params, layout=layout))
    assert_close(merged["embed_tokens"]["embedding"], expected)
    if not is_tied:
        assert_close(merged["lm_head"]["kernel"], expected.T)
    own = "lm_head.weight" if form == "saved" else "lm_head.lora_A.weight"
    tensors = {PRE + name: x for name, x in (tensors | {own: 2 * tensors[own]}).items()}
    safetensors.numpy.save_file(tensors, tmp_path / peft.TENSORS)
    with pytest.raises(ValueError, match=r"lm_head|is an output head as well"):  # no copy
        peft.load(tmp_path, params, layout=layout)


def test_folders_without_their_files_are_refused(tmp_path):
    _, params, *_ = golden("plain")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        peft.load(tmp_path, params)
    shutil.copytree(GOLDEN / "plain", tmp_path / "named" / "default")
    with pytest.raises(FileNotFoundError, match=r"is in a folder within: \['default'\]"):
        peft.load(tmp_path / "named", params)
    folder = tmp_path / "named" / "default"
    (folder / peft.TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle, which could run anything"):
        peft.load(folder, params)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        peft.load(folder, params)


def test_a_table_that_is_not_the_bases_is_refused(broken):
    _, params, *_ = golden("plain")

    def with_table(table):
        name = PRE + "table.base_layer.weight"
        return lambda found: found | {name: np.asarray(table)}

    broken("plain", tensors=with_table(params["table"]["embedding"]))
    with pytest.raises(
        ValueError, match="brings a weight of 'table' that is not the one in params"
    ):
        broken("plain", tensors=with_table(params["table"]["embedding"] + 1))
    table = params["table"]["embedding"]
    for dtype in ("bfloat16", "float16"):  # float32 files, trained in another dtype
        broken("plain", tensors=with_table(table.astype(dtype)))
        broken("plain", tensors=with_table(table.astype(dtype).astype("float32")))
        with pytest.raises(ValueError, match="that is not the one in params, nor that rounded"):
            broken("plain", tensors=with_table((1.02 * table).astype(dtype)))
    moved = params | {"table": {"embedding": table + 1}}
    broken("plain", tensors=with_table(table + 1), params=moved)  # as the message says


def test_an_existing_folder_is_kept(tmp_path):
    lora_params = trained(block(), rank=2, targets=".*fused/kernel")
    peft.save(tmp_path / "a", lora_params)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        peft.save(tmp_path / "a", lora_params)
    peft.save(tmp_path / "a", lora_params, overwrite=True)
    (tmp_path / "a" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds mine\.txt, which would be lost"):
        peft.save(tmp_path / "a", lora_params, overwrite=True)
    assert (tmp_path / "a" / "mine.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
