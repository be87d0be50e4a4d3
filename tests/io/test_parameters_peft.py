"""Adapters of parameters and of experts that PEFT writes, merged into files as PEFT merges them."""

import json

import numpy as np
import pytest
from helpers import assert_close

import lora_jax
from lora_jax.io import hf
from lora_jax.io import peft as our_peft

pytestmark = [
    pytest.mark.peer,
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore"),  # those of transformers and PEFT
]

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "head_dim": 4, "num_local_experts": 3}
SIZES |= {"num_experts_per_tok": 2, "max_position_embeddings": 16}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
W = {"target_modules": ["w1", "w2", "w3"]}
QWEN = {"target_modules": ["gate_proj", "up_proj", "down_proj"]}


def adapted(model, folder, **options):
    """Adapt a model by PEFT, and return its tensors before and after it is merged."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    base = {name: x.detach().clone().numpy() for name, x in model.state_dict().items()}
    options = {"target_modules": [], "r": 2, "lora_alpha": 6} | options
    theirs = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(folder / "adapter")
    merged = theirs.merge_and_unload().state_dict()
    return base, {name: x.detach().numpy() for name, x in merged.items()}


def write(tensors, folder, **config):
    from safetensors.numpy import save_file

    (folder / "model").mkdir()
    own = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(own, folder / "model" / "model.safetensors")
    (folder / "model" / "config.json").write_text(json.dumps(config))


def merged_by_us(folder, **options):
    from safetensors.numpy import load_file

    hf.merge(folder / "model", folder / "adapter", folder / "out", **options)
    return load_file(folder / "out" / "model.safetensors")


def assert_merged(found, expected, base):
    assert found.keys() == expected.keys()
    changed = 0
    for name, x in expected.items():
        assert_close(found[name], x, length=8)
        changed += not np.array_equal(x, base[name])
    assert changed


@pytest.mark.parametrize("name", ["GptOss", "Llama4Text"])
@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
@pytest.mark.parametrize("width", [6, 8])
def test_experts_of_one_parameter(name, targets, width, tmp_path):
    transformers = pytest.importorskip("transformers")
    is_llama = name == "Llama4Text"
    sizes = SIZES | {"intermediate_size": width}
    sizes |= {"intermediate_size_mlp": 6, "interleave_moe_layer_step": 1} if is_llama else {}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    base, expected = adapted(model, tmp_path, target_parameters=targets)
    write(base, tmp_path, model_type=config.model_type)
    options = {}
    if not is_llama and width == 8 and targets == EXPERTS[1:]:
        with pytest.raises(ValueError, match=r"pass layout={'model/layers/0/mlp/experts/down_proj"):
            merged_by_us(tmp_path)
        options = {"layout": {".*/down_proj": "boi"}}
    assert_merged(merged_by_us(tmp_path, **options), expected, base)


def fused(width):
    """A model whose experts are one parameter, and whose router is another, as transformers 5."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layer, mlp, experts, gate = (nn.Module() for _ in range(4))
            self.model = nn.Module()
            self.model.layers = nn.ModuleList([layer])
            layer.mlp, mlp.experts, mlp.gate = mlp, experts, gate
            gate.weight = nn.Parameter(torch.zeros(3, 8))
            experts.gate_up_proj = nn.Parameter(torch.zeros(3, 2 * width, 8))
            experts.down_proj = nn.Parameter(torch.zeros(3, 8, width))

    return Model()


def apart(tensors, names, module="mlp"):
    """The same tensors, as files have them."""
    found = {}
    for name, x in tensors.items():
        owner, _, last = name.replace(".mlp.", f".{module}.").rpartition(".")
        parts = {"gate_up_proj": names[:2], "down_proj": names[2:]}.get(last)
        for k in range(len(x)) if parts else ():
            rows = np.split(x[k], len(parts))
            found |= {f"{owner}.{k}.{own}.weight": w for own, w in zip(parts, rows, strict=True)}
        found |= {} if parts else {f"{owner}.{last}": x}
    return found


FAMILIES = {
    "mixtral": (("w1", "w3", "w2"), "block_sparse_moe"),
    "qwen2_moe": (("gate_proj", "up_proj", "down_proj"), "mlp"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [[*EXPERTS, "gate.weight"], EXPERTS[1:]])
@pytest.mark.parametrize("width", [6, 8])
def test_an_adapter_of_all_experts_on_files_of_each(family, targets, width, tmp_path):
    base, expected = adapted(fused(width), tmp_path, target_parameters=targets)
    base, expected = (apart(x, *FAMILIES[family]) for x in (base, expected))
    write(base, tmp_path, model_type=family)
    assert_merged(merged_by_us(tmp_path), expected, base)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("is_turned", [False, True])
def test_an_adapter_of_each_expert_on_files_of_all(family, dora, is_turned, tmp_path):
    transformers = pytest.importorskip("transformers")
    names, module = FAMILIES[family]
    kind = "Mixtral" if family == "mixtral" else "Qwen2Moe"
    sizes = SIZES | {"intermediate_size": 6, "moe_intermediate_size": 6, "num_experts": 3}
    sizes |= {"shared_expert_intermediate_size": 6}
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**sizes)
    )
    base, expected = adapted(model, tmp_path, target_modules=[*names, "q_proj"], use_dora=dora)

    def together(tensors):
        found = {name: x for name, x in tensors.items() if ".experts." not in name}
        owner = f"model.layers.0.{module}.experts"
        stacks = (np.stack([tensors[f"{owner}.{k}.{x}.weight"] for k in range(3)]) for x in names)
        gate, up, down = stacks
        stacks = {"gate_up_proj": np.concatenate([gate, up], 1), "down_proj": down}
        axes = (0, 2, 1) if is_turned else (0, 1, 2)
        return found | {f"{owner}.{x}": y.transpose(axes) for x, y in stacks.items()}

    base, expected = together(base), together(expected)
    write(base, tmp_path, model_type=family)
    assert_merged(merged_by_us(tmp_path), expected, base)


def matrices(width):
    """A model of matrices of every kind, whose own axes tell nothing."""
    torch = pytest.importorskip("torch")
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(8, width)
            self.c_fc = conv1d(width, 8)
            self.table = torch.nn.Embedding(8, width)
            self.own = torch.nn.Module()
            self.own.there = torch.nn.Parameter(torch.zeros(8, width))
            self.own.back = torch.nn.Parameter(torch.zeros(width, 8))

    return Model()


PARAMETERS = ["lin.weight", "c_fc.weight", "table.weight", "own.there", "own.back"]


@pytest.mark.parametrize("width", [6, 8])
def test_matrices_that_are_adapted_as_parameters(width, tmp_path):
    ranks = {"rank_pattern": {"lin.weight": 3}, "alpha_pattern": {"own.there": 5}}
    base, expected = adapted(matrices(width), tmp_path, target_parameters=PARAMETERS, **ranks)
    write(base, tmp_path, model_type="own")
    options = {"parameter_order": ("there", "back")}
    assert_merged(merged_by_us(tmp_path, **options), expected, base)
    params = {
        "lin": {"kernel": base["lin.weight"].T, "bias": base["lin.bias"]},
        "c_fc": {"kernel": base["c_fc.weight"], "bias": base["c_fc.bias"]},
        "table": {"embedding": base["table.weight"]},
        "own": {"there": base["own.there"], "back": base["own.back"]},
    }
    kinds = {"c_fc/.*": "Conv1D", "own/.*": "Parameter"}
    options |= {"kinds": kinds, "layout": {"own/.*": "io"}}
    lora_params = our_peft.load(tmp_path / "adapter", params, **options)
    merged = lora_jax.merge(lora_params)
    for name in ("lin", "c_fc"):
        own = expected[f"{name}.weight"]
        assert_close(merged[name]["kernel"], own.T if name == "lin" else own, length=8)
    assert_close(merged["table"]["embedding"], expected["table.weight"], length=8)
    for name in ("there", "back"):
        assert_close(merged["own"][name], expected[f"own.{name}"], length=8)

    with pytest.raises(ValueError, match=r"'c_fc/kernel' is of a Conv1D and .* kinds={'c_fc/ker"):
        our_peft.save(tmp_path / "ours", lora_params, **options)
    names = {"c_fc": "c_fc.weight", "(own|table|lin).*": r"\g<0>"}
    options |= {"kinds": kinds | {"c_fc/.*": "Parameter"}, "names": names}
    our_peft.save(tmp_path / "ours", lora_params, **options)
    there = opened(matrices(width), base, tmp_path / "ours")
    assert_merged(there, expected, base)


def opened(model, base, folder):
    """Merge an adapter of ours in PEFT."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    model.load_state_dict({name: torch.tensor(x) for name, x in base.items()})
    merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return {name: x.detach().numpy() for name, x in merged.state_dict().items()}
