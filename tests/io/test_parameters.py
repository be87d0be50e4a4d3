"""Adapters of parameters: matrices, and experts that files keep in another form."""

import json

import jax
import numpy as np
import pytest
from helpers import assert_close, normal, randomize_b
from safetensors.numpy import load_file, save_file

import lora_jax
from lora_jax.io import hf, peft
from lora_jax.io.peft._axes import LINEAR, PREFIX

NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}
MODULE = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp"}
EXPERTS = {"gate_up_proj": normal(0, (3, 8, 5)), "down_proj": normal(1, (3, 5, 4))}


def adapted(params, targets=".*", **options):
    return randomize_b(lora_jax.lorafy(params, 2, alpha=3.0, targets=targets, **options))


def files(folder, tensors, **config):
    folder.mkdir()
    own = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(own, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def merged(tmp_path, **options):
    hf.merge(tmp_path / "model", tmp_path / "a", tmp_path / "out", **options)
    return load_file(tmp_path / "out" / "model.safetensors")


def each(experts, family):
    """The experts one by one, as files have them."""
    gate, up, down = NAMES[family]
    found, owner = {}, f"model.layers.0.{MODULE[family]}.experts"
    for k in range(3):
        first, second = np.split(np.asarray(experts["gate_up_proj"][k]), 2)
        own = {gate: first, up: second, down: np.asarray(experts["down_proj"][k])}
        found |= {f"{owner}.{k}.{name}.weight": x for name, x in own.items()}
    return found


def of_all(targets=".*", **options):
    """An adapter of all experts, in the names of transformers 5."""
    params = {"model": {"layers": {"0": {"mlp": {"experts": EXPERTS}}}}}
    return adapted(params, targets, layout={".*": "boi"}, **options)


@pytest.mark.parametrize("family", NAMES)
def test_an_adapter_of_all_experts_is_merged_into_files_of_each(family, tmp_path):
    lora_params = of_all()
    peft.save(tmp_path / "a", lora_params)
    beside = {f"model.layers.0.{MODULE[family]}.gate.weight": np.ones((3, 5), np.float32)}
    files(tmp_path / "model", each(EXPERTS, family) | beside, model_type=family)
    own = lora_jax.merge(lora_params)["model"]["layers"]["0"]["mlp"]["experts"]
    found = merged(tmp_path)
    assert found.keys() == each(own, family).keys() | beside.keys()
    for name, x in (each(own, family) | beside).items():
        assert_close(found[name], x)


@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2, 1)])
def test_an_adapter_of_each_expert_is_merged_into_files_of_all(axes, tmp_path):
    base = each(EXPERTS, "qwen3_moe")
    params = {name.removesuffix(".weight"): {"weight": x} for name, x in base.items()}
    lora_params = adapted(params, layout={".*": "oi"})
    peft.save(tmp_path / "a", lora_params)
    own = {f"{name}.weight": x["weight"] for name, x in lora_jax.merge(lora_params).items()}
    names = {"model.layers.0.mlp.experts." + k: np.transpose(x, axes) for k, x in EXPERTS.items()}
    files(tmp_path / "model", names, model_type="qwen3_moe")
    found = {name.rpartition(".")[2]: x.transpose(axes) for name, x in merged(tmp_path).items()}
    for name, x in each(found, "qwen3_moe").items():
        assert_close(x, own[name])


def test_experts_without_a_counterpart_are_refused(tmp_path):
    peft.save(tmp_path / "a", of_all())
    base = each(EXPERTS, "mixtral")
    files(
        tmp_path / "model",
        {k: x for k, x in base.items() if ".1.w1" not in k},
        model_type="mixtral",
    )
    with pytest.raises(ValueError, match=r"experts \[0, 2\] in the files, .* are not all there"):
        merged(tmp_path)

    owner = "model.layers.0.mlp.experts"
    params = {f"{owner}.0.up_proj": {"weight": normal(0, (4, 5))}}
    peft.save(tmp_path / "b", adapted(params, layout={".*": "oi"}))
    stacks = {f"{owner}.{name}": x for name, x in EXPERTS.items()}
    alternate = stacks | {f"{owner}.gate_up_proj_bias": np.ones((3, 8), np.float32)}
    for k, tensors in enumerate((alternate, {k: x for k, x in stacks.items() if "gate" in k})):
        model = files(tmp_path / f"{k}", tensors, model_type="gpt_oss")
        with pytest.raises(
            ValueError, match="where each is in it is not known, or gate and up alter"
        ):
            hf.merge(model, tmp_path / "b", tmp_path / "out")
    params |= {f"{owner}.1.up_proj": {"weight": normal(0, (4, 5))}}
    lora_params = adapted(params, rf"{owner}.0.*", layout={".*": "oi"}, full=rf"{owner}.1.*")
    peft.save(tmp_path / "c", lora_params, layout={".*": "oi"})
    model = files(tmp_path / "model 2", stacks, model_type="qwen3_moe")
    with pytest.raises(
        ValueError, match=r"all of '.*1.up_proj.*', which is a part of '.*gate_up_pr"
    ):
        hf.merge(model, tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def exchanged(folder, modules):
    """Write the factors as PEFT does if a module keeps [experts, in, out] and does not tell it."""
    tensors = load_file(folder / peft.TENSORS)
    for module in modules:
        first, second = (f"{PREFIX}{module}.{role}" for role in LINEAR)
        a, b = tensors[first].reshape(3, 2, -1), tensors[second].reshape(-1, 2, 3)
        tensors[first] = np.ascontiguousarray(b.transpose(2, 1, 0)).reshape(6, -1)
        tensors[second] = np.ascontiguousarray(a.transpose(2, 1, 0)).reshape(-1, 6)
    save_file(tensors, folder / peft.TENSORS, {"format": "pt"})


def test_factors_of_experts_in_the_other_order_are_read(tmp_path):
    params = {"moe": {"gate_up_proj": normal(0, (3, 4, 10)), "down_proj": normal(1, (3, 4, 4))}}
    layout = {"moe/.*": "bio"}
    lora_params = adapted(params, layout=layout)
    peft.save(tmp_path / "a", lora_params)
    exchanged(tmp_path / "a", ["moe.base_layer", "moe"])
    found = peft.load(tmp_path / "a", params, layout=layout)  # the square one as the other is
    assert jax.tree.all(jax.tree.map(np.array_equal, found.adapter, lora_params.adapter))


@pytest.mark.parametrize("letters", ["io", "oi"])
@pytest.mark.parametrize("shape", [(4, 6), (5, 5)])
def test_matrices_that_are_parameters_go_to_peft_and_back(letters, shape, tmp_path):
    params = {"own": {"table": normal(0, shape)}, "lin": {"weight": normal(1, shape)}}
    options = {"layout": {".*": letters}, "kinds": {".*": "Parameter"}}
    lora_params = adapted(params, layout=options["layout"])
    peft.save(tmp_path / "a", lora_params, **options)
    config = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    assert config["target_parameters"] == ["lin.weight", "own.table"]
    tensors = load_file(tmp_path / "a" / peft.TENSORS)
    own = lora_jax.merge(lora_params)
    for name in ("lin", "own"):  # as PEFT adds it, whatever its rows are
        a, b = (tensors[f"{PREFIX}{name}.{role}"] for role in LINEAR)
        (base,), (expected,) = params[name].values(), own[name].values()
        assert_close(base + 1.5 * (b @ a), expected)
    found = peft.load(tmp_path / "a", params, **options)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.adapter, lora_params.adapter))
    files(
        tmp_path / "model",
        {"own.table": params["own"]["table"], "lin.weight": params["lin"]["weight"]},
    )
    assert_close(
        merged(tmp_path), {"own.table": own["own"]["table"], "lin.weight": own["lin"]["weight"]}
    )
    config |= {"init_lora_weights": "pissa"}
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"='pissa' of the parameter 'lin\.weight' cannot be repeat"
    ):
        peft.load(tmp_path / "a", params, **options)
