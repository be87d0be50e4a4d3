"""Forms of PEFT's adapters that few files have: read as what they are, or named as such."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import assert_close

from lora_jax._adapter.factors import Rows
from lora_jax.cli import main
from lora_jax.io import hf, peft
from lora_jax.io.peft import _config as configs

RNG = np.random.default_rng(0)
PRE = "base_model.model."
MODEL = {
    "q.weight": RNG.normal(size=(6, 4)).astype("f"),
    "bn.weight": np.ones(6, "f"),
    "bn.bias": np.zeros(6, "f"),
    "bn.running_mean": np.zeros(6, "f"),
    "bn.running_var": np.ones(6, "f"),
    "bn.num_batches_tracked": np.asarray(3),
    "probe.latent": np.zeros((2, 3), "f"),
}
A, B = RNG.normal(size=(2, 4)).astype("f"), RNG.normal(size=(6, 2)).astype("f")
FACTORS = {"q.lora_A.weight": A, "q.lora_B.weight": B}
UPDATE = B @ A  # with alpha equal to the rank


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    safetensors.numpy.save_file(MODEL, "model/model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mine"}')
    return tmp_path


def adapter(here, tensors, **config):
    """Write an adapter, and merge it: what the model then is."""
    shutil.rmtree(here / "adapter", ignore_errors=True)
    (here / "adapter").mkdir()
    found = {PRE + name: x for name, x in tensors.items()}
    safetensors.numpy.save_file(found, here / "adapter" / "adapter_model.safetensors")
    own = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]} | config
    (here / "adapter" / "adapter_config.json").write_text(json.dumps(own))


def merged():
    hf.merge("model", "adapter", "out", overwrite=True)
    return safetensors.numpy.load_file("out/model.safetensors")


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_adapters_in_float8_are_read(dtype, here, capsys):
    """Shorter than numbers are aligned, among others, so that the offset counts."""
    tensors = {name: x.astype(dtype) for name, x in FACTORS.items()}
    adapter(here, tensors)
    a, b = (tensors[name].astype("f") for name in FACTORS)
    assert_close(merged()["q.weight"], MODEL["q.weight"] + b @ a)
    like = {"q": {"kernel": jnp.zeros((4, 6))}}
    factors = peft.load("adapter", like).adapter.factors["q/kernel"]
    assert factors.a.dtype == jnp.float32
    assert np.array_equal(factors.a, a.T)
    for words in (("inspect", "adapter"), ("convert", "adapter", "own", "--to", "safetensors")):
        assert main(list(words)) == 0


def test_types_that_numpy_has_not_are_named(here):
    adapter(here, FACTORS)
    path = here / "adapter" / "adapter_model.safetensors"
    header = {PRE + "q.lora_A.weight": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"12")
    with pytest.raises(ValueError, match="is of type F8_E8M0, which NumPy has not"):
        peft.load("adapter", {"q": {"kernel": jnp.zeros((4, 6))}})


def test_magnitudes_of_either_name(here):
    norms = np.full(6, 2, "f")
    adapter(here, FACTORS | {"q.lora_magnitude_vector": norms}, use_dora=True)
    expected = merged()
    adapter(here, FACTORS | {"q.lora_magnitude_vector.weight": norms}, use_dora=True)
    assert np.array_equal(merged()["q.weight"], expected["q.weight"])
    both = {"q.lora_magnitude_vector": norms, "q.lora_magnitude_vector.weight": norms}
    adapter(here, FACTORS | both, use_dora=True)
    with pytest.raises(ValueError, match=r"'q\.lora_magnitude_vector' twice"):
        merged()


def test_velora_is_lora_once_trained(here):
    config = {"velora_config": {"num_groups": 64, "scale": 1.0}}
    adapter(here, FACTORS | {"q.lora_velora_embed": np.ones(1, "f")}, **config)
    assert_close(merged()["q.weight"], MODEL["q.weight"] + UPDATE)
    adapter(here, FACTORS | {"q.lora_velora_embed": np.ones(1, "f")})
    with pytest.raises(ValueError, match="lora_velora_embed' has no place here"):
        merged()


STATS = {"bn.weight": np.full(6, 2, "f"), "bn.bias": np.ones(6, "f")}
STATS |= {"bn.running_mean": np.full(6, 3, "f"), "bn.running_var": np.full(6, 4, "f")}
STATS |= {"bn.num_batches_tracked": np.asarray(7)}


def test_batch_norm_that_is_saved_has_its_statistics(here):
    adapter(here, FACTORS | STATS, modules_to_save=["bn"])
    found = merged()
    for name, x in STATS.items():
        assert found[name].dtype == x.dtype
        assert np.array_equal(found[name], x)
    like = {"q": {"kernel": jnp.zeros((4, 6))}}
    like["bn"] = {"scale": jnp.ones(6), "bias": jnp.zeros(6)}
    with pytest.raises(ValueError, match=r"'bn\.running_mean' is a statistic .* names="):
        peft.load("adapter", like)
    like["bn"] |= {"mean": jnp.zeros(6), "var": jnp.ones(6)}  # the remedy
    names = {"bn/(mean|var)": r"bn.running_\1", "(q|bn)": r"\1"}
    full = peft.load("adapter", like, names=names).adapter.full
    assert np.array_equal(full["bn/mean"], STATS["bn.running_mean"])
    assert np.array_equal(full["bn/scale"], STATS["bn.weight"])


def test_statistics_that_are_known_as_such_go_into_the_base_and_do_not_train(here):
    adapter(here, FACTORS | STATS, modules_to_save=["bn"])
    moments = {"mean": jnp.zeros(6), "var": jnp.ones(6)}
    like = {"params": {"q": {"kernel": jnp.zeros((4, 6))}}, "batch_stats": {"bn": moments}}
    like["params"]["bn"] = {"scale": jnp.ones(6), "bias": jnp.zeros(6)}
    names = {"batch_stats/bn/(mean|var)": r"bn.running_\1", "(q|bn)": r"\1"}
    found = peft.load("adapter", like, names=names)
    assert found.adapter.full.keys() == {"bn/scale", "bn/bias"}
    assert np.array_equal(found.base["batch_stats"]["bn"]["mean"], STATS["bn.running_mean"])
    assert np.array_equal(found.base["batch_stats"]["bn"]["var"], STATS["bn.running_var"])
    assert found.base["params"]["q"]["kernel"] is like["params"]["q"]["kernel"]


def test_bare_parameters_of_a_saved_module(here):
    adapter(here, FACTORS | {"probe.latent": np.ones((2, 3), "f")}, modules_to_save=["probe"])
    assert np.array_equal(merged()["probe.latent"], np.ones((2, 3)))


def test_tensors_that_zero_left_empty_are_named(here):
    adapter(here, FACTORS | {"q.lora_A.weight": np.zeros((0,), "f")})
    with pytest.raises(ValueError, match=r"'base_model.model.q.lora_A.weight' is empty, .* ZeRO-3"):
        merged()


def test_an_adapter_in_several_files_is_named_and_joined(here):
    adapter(here, FACTORS)
    folder = here / "adapter"
    found = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    for k, (name, x) in enumerate(found.items()):
        file = folder / f"adapter_model-{k + 1:05d}-of-00002.safetensors"
        safetensors.numpy.save_file({name: x}, file)
    with pytest.raises(ValueError, match=r"several files, .*-00001-of-00002.*: join them"):
        merged()
    assert main(["inspect", "adapter"]) == 2
    parts = sorted(folder.glob("adapter_model-*.safetensors"))
    joined = {n: x for part in parts for n, x in safetensors.numpy.load_file(part).items()}
    safetensors.numpy.save_file(joined, folder / "adapter_model.safetensors")  # the remedy
    assert_close(merged()["q.weight"], MODEL["q.weight"] + UPDATE)


def test_an_adapter_of_mlx_is_named_and_made_peft_s(here):
    (here / "adapter").mkdir()
    own = {"q.lora_a": A.T.copy(), "q.lora_b": B.T.copy()}
    safetensors.numpy.save_file(own, "adapter/adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 20.0}}
    (here / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"an adapter of MLX: .* lora_alpha scale \* rank"):
        merged()
    assert main(["inspect", "adapter"]) == 2
    adapter(here, FACTORS, lora_alpha=40)  # the remedy
    assert_close(merged()["q.weight"], MODEL["q.weight"] + 20 * UPDATE)


def test_multi_head_attention_is_named(here):
    names = {"lora_A.weight": A, "lora_B.weight": B}
    tensors = {
        f"{m}.{n}": x for m in ("attn", "attn.base_layer.out_proj") for n, x in names.items()
    }
    adapter(here, tensors, target_modules=["attn"])
    with pytest.raises(ValueError, match=r"adapts 'attn', an nn\.MultiheadAttention, .* in PEFT"):
        merged()
    assert not (here / "out").exists()


HEAD = {"classifier.dense.weight": np.ones((4, 4), "f"), "classifier.dense.bias": np.ones(4, "f")}
TABLES = {"embed_tokens.weight": RNG.normal(size=(9, 4)).astype("f")}
TABLES |= {"lm_head.weight": RNG.normal(size=(9, 4)).astype("f")}


def more(here, tensors):
    safetensors.numpy.save_file(MODEL | tensors, here / "model" / "model.safetensors")


@pytest.mark.parametrize("wrapper", ["modules_to_save", "modules_to_save.default"])
@pytest.mark.parametrize("has_head", [True, False])
def test_copies_of_a_saved_head_are_none_of_the_models_tensors(has_head, wrapper, here, capsys):
    more(here, {name: 0 * x for name, x in HEAD.items()} if has_head else {})
    copies = {f"classifier.{wrapper}.dense.bias": HEAD["classifier.dense.bias"]}
    copies |= {"classifier.original_module.dense.bias": np.zeros(4, "f")}
    config = {"modules_to_save": ["classifier"], "bias": "all"}
    biases = {"bn.bias": np.ones(6, "f")}
    adapter(here, FACTORS | HEAD | biases | copies, **config)
    found = merged()
    assert found.keys() == MODEL.keys() | HEAD.keys()
    assert all(np.array_equal(found[name], x) for name, x in HEAD.items())
    assert main(["inspect", "adapter"]) == 0
    assert wrapper not in capsys.readouterr().out
    adapter(here, FACTORS | HEAD | biases | {k: x + 1 for k, x in copies.items()}, **config)
    with pytest.raises(ValueError, match=r"two different tensors of 'classifier\.dense\.bias'"):
        merged()


def test_copies_of_tables_are_the_models(here):
    more(here, TABLES)
    table, head = TABLES.values()
    rows = {"embed_tokens.token_adapter.trainable_tokens_delta": np.ones((1, 4), "f")}
    config = {"trainable_token_indices": [8]}
    copies = {"embed_tokens.token_adapter.base_layer.weight": table, "lm_head.weight": head}
    adapter(here, FACTORS | rows | copies, **config)
    assert np.array_equal(merged()["embed_tokens.weight"][8], np.ones(4))
    for name, x in copies.items():
        adapter(here, FACTORS | rows | copies | {name: x + 1}, **config)
        with pytest.raises(ValueError, match=r"brings a weight of .*\.unload\(\)"):
            merged()
        adapter(here, FACTORS | rows | copies | {name: np.zeros((11, 4), "f")}, **config)
        with pytest.raises(ValueError, match=r"a vocabulary of 11 tokens, and here it has 9"):
            merged()
        adapter(here, FACTORS | rows | copies | {name: np.zeros((11, 5), "f")}, **config)
        with pytest.raises(ValueError, match=r"is not the one in params|expected"):  # another's
            merged()
    adapter(here, FACTORS | rows, trainable_token_indices=[9])
    with pytest.raises(ValueError, match=r"a vocabulary of 10 tokens, and here it has 9"):
        merged()


@pytest.mark.parametrize("theirs", [7, 11])
def test_factors_of_another_vocabulary_are_named_as_such(theirs, here):
    more(here, TABLES)
    a, b = np.ones((2, 4), "f"), np.ones((theirs, 2), "f")
    adapter(
        here, {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}, target_modules=["lm_head"]
    )
    with pytest.raises(ValueError, match=f"of a vocabulary of {theirs} tokens, and here it has 9"):
        merged()
    factors = {
        "embed_tokens.lora_embedding_A": b.T.copy(),
        "embed_tokens.lora_embedding_B": a.T.copy(),
    }
    adapter(here, factors, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=f"of a vocabulary of {theirs} tokens, and here it has 9"):
        peft.load("adapter", {"embed_tokens": {"embedding": jnp.zeros((9, 4))}})


def test_copies_of_a_tied_head_are_the_tables(here):
    table = TABLES["embed_tokens.weight"]
    like = {"q": {"kernel": jnp.zeros((4, 6))}, "embed_tokens": {"embedding": jnp.asarray(table)}}
    adapter(here, FACTORS | {"embed_tokens.weight": table, "lm_head.weight": table})
    assert list(peft.load("adapter", like).adapter.factors) == ["q/kernel"]
    adapter(here, FACTORS | {"embed_tokens.weight": table, "lm_head.weight": table + 1})
    with pytest.raises(ValueError, match=r"'base_model\.model\.lm_head\.weight' has no place"):
        peft.load("adapter", like)
    ends = {"trainable_tokens_delta": np.ones((1, 4), "f"), "base_layer.weight": table}
    modules = ("embed_tokens", "lm_head")
    rows = {f"{m}.token_adapter.{end}": x for m in modules for end, x in ends.items()}
    for indices in ([8], {m: [8] for m in modules}):
        adapter(here, FACTORS | rows, trainable_token_indices=indices)
        found = peft.load("adapter", like).adapter.factors
        assert found["embed_tokens/embedding"].ids == (8,)


OF_TABLE = {
    "embed_tokens.lora_embedding_A": RNG.normal(size=(2, 9)).astype("f"),
    "embed_tokens.lora_embedding_B": RNG.normal(size=(4, 2)).astype("f"),
}
TIED = {
    f"lm_head.{name}": np.ascontiguousarray(x.T)
    for name, x in zip(("lora_B.weight", "lora_A.weight"), OF_TABLE.values(), strict=True)
}
EXPERTS = {"experts.lora_A.weight": np.ones((6, 5), "f"), "experts.lora_B.weight": np.ones((7, 6))}
# Keys of the configuration, with a value that is not the default: and the tensors that go with it.
KEYS = {
    "r": ({"r": 2, "lora_alpha": 3}, {}),
    "lora_alpha": ({"lora_alpha": 5.5}, {}),
    "use_rslora": ({"use_rslora": True}, {}),
    "use_dora": ({"use_dora": True}, {"q.lora_magnitude_vector": np.full(6, 2, "f")}),
    "lora_bias": ({"lora_bias": True}, {"q.lora_B.bias": np.ones(6, "f")}),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, {}),
    "rank_pattern": ({"r": 1, "rank_pattern": {"q": 2}}, {}),
    "alpha_pattern": ({"alpha_pattern": {"^q": 7}}, {}),
    "bias": ({"bias": "all"}, {"q.base_layer.bias": np.ones(6, "f")}),
    "target_modules": ({"target_modules": "[qz]"}, {}),
    "exclude_modules": ({"target_modules": ["q", "lm_head"], "exclude_modules": ["lm_head"]}, {}),
    "target_parameters": ({"target_parameters": ["experts.up"], "peft_version": "0.19"}, EXPERTS),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, {"lm_head.weight": np.ones((9, 4), "f")}),
    "layers_to_transform": ({"layers_to_transform": [1], "target_modules": ["q", "k"]}, None),
    "layers_pattern": ({"layers_to_transform": 1, "layers_pattern": "h"}, None),
    "trainable_token_indices": (
        {"trainable_token_indices": {"lm_head": [8]}},
        {"lm_head.token_adapter.trainable_tokens_delta": np.ones((1, 4), "f")},
    ),
    "ensure_weight_tying": (
        {"ensure_weight_tying": True, "target_modules": ["q", "embed_tokens"]},
        OF_TABLE | TIED,
    ),
    "init_lora_weights": ({"init_lora_weights": "gaussian"}, {}),
    "peft_type": ({}, {}),
    "peft_version": ({"peft_version": "0.19.0"}, {}),
    "auto_mapping": ({"auto_mapping": {"base_model_class": "A", "parent_library": "b"}}, {}),
    "base_model_name_or_path": ({"base_model_name_or_path": "a/b"}, {}),
    "revision": ({"revision": "main"}, {}),
    "task_type": ({"task_type": "CAUSAL_LM"}, {}),
    "inference_mode": ({"inference_mode": False}, {}),
    "lora_dropout": ({"lora_dropout": 0.5}, {}),
    "megatron_core": ({"megatron_core": "megatron.core"}, {}),
    "megatron_config": ({"megatron_config": {"a": 1}}, {}),
    "eva_config": ({"eva_config": {"rho": 2.0}}, {}),
    "corda_config": ({"corda_config": {"a": 1}}, {}),
    "loftq_config": ({"loftq_config": {"loftq_bits": 4}}, {}),
    "lora_ga_config": ({"lora_ga_config": {"a": 1}}, {}),
    "qalora_group_size": ({"qalora_group_size": 32}, {}),
    "runtime_config": ({"runtime_config": {"ephemeral_gpu_offload": True}}, {}),
    "velora_config": ({"velora_config": {"a": 1}}, {"q.lora_velora_embed": np.ones(1, "f")}),
}


def effect(adapter):
    """What an adapter does to each leaf, in numbers."""
    found: dict = {path: np.asarray(x) for path, x in adapter.full.items()}
    for path, f in adapter.factors.items():
        if isinstance(f, Rows):
            found[path] = f.ids, np.asarray(f.b)
        else:
            norms = f.magnitude if f.magnitude is not None else ()
            found[path] = np.asarray(f.a) @ np.asarray(f.b) * np.asarray(f.scale), np.asarray(norms)
    return found


@pytest.mark.parametrize("key", KEYS)
def test_every_key_that_is_read_is_written_or_changes_nothing(key, here):
    config, tensors = KEYS[key]
    params = {"q": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}
    params |= {"lm_head": {"kernel": jnp.asarray(TABLES["lm_head.weight"].T)}}
    params |= {"embed_tokens": {"embedding": jnp.asarray(TABLES["embed_tokens.weight"])}}
    params |= {"experts": {"up": jnp.ones((3, 5, 7))}}
    kinds = {"q/kernel": "Conv1D"} if key == "fan_in_fan_out" else {}
    options: dict = {"layout": {"experts/up": "bio"}, "kinds": kinds}
    if tensors is None:  # of one layer of two
        params |= {"model": {"h": {str(k): {"q": params["q"]} for k in range(2)}}}
        params.pop("q")
        factors = {f"model.h.1.{name}": x for name, x in FACTORS.items()}
    else:
        factors = FACTORS | tensors
    adapter(here, factors, **config)
    lora_params = peft.load("adapter", params, **options)
    peft.save("again", lora_params, **options)
    again = peft.load("again", params, **options)
    first, then = effect(lora_params.adapter), effect(again.adapter)
    assert jax.tree.structure(first) == jax.tree.structure(then)
    assert all(map(np.allclose, jax.tree.leaves(first), jax.tree.leaves(then)))
    assert {"q/kernel", "model/h/1/q/kernel"} & first.keys()


def test_the_keys_are_all_that_are_read():
    assert KEYS.keys() == {*configs._KNOWN, *configs._HARMLESS}


def test_an_adapter_of_both_is_not_written_as_one_of_the_lookups(here):
    """The one key that the leaves do not tell: whether a table's adapter is its head's, too."""
    adapter(here, OF_TABLE | TIED, target_modules=["embed_tokens"], ensure_weight_tying=True)
    one = {"embed_tokens": {"embedding": jnp.asarray(TABLES["embed_tokens.weight"])}}
    both = peft.load("adapter", one)
    for task in (None, "CAUSAL_LM"):
        with pytest.raises(ValueError, match=r"peft\.save: .* or may be: tied.* lookups alone"):
            peft.save("again", both, task_type=task)
    assert not (here / "again").exists()
