"""Whole models in and out, and merged file by file."""

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapters import adapted
from cli_files import tensors_of
from damage import kill_while_saving, run_script
from helpers import assert_close, ones, randomize_b, tolerance

import lora_jax
from lora_jax.io import _files, hf, peft
from lora_jax.io._torch import Map
from lora_jax.io.hf import _shards

NIGHTLY = os.environ.get("LORA_JAX_LARGE")  # gigabytes of the checkpoint that is merged
RNG = np.random.default_rng(0)


def floats(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


@pytest.fixture
def model(tmp_path):
    """A folder as Hugging Face lays it out: two layers, a table, a convolution, a norm, buffers."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {"embed.weight": floats(7, 6), "norm.weight": floats(6), "cls": floats(1, 1, 6)}
    for k in range(2):
        tensors[f"h.{k}.q.weight"] = floats(4, 6)
        tensors[f"h.{k}.q.bias"] = floats(4)
        tensors[f"h.{k}.attn.bias"] = np.tri(3, dtype=bool)
    tensors["conv.weight"] = floats(5, 4, 3)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float32"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def zeros(*shape):
    return jnp.asarray(np.zeros(shape, np.float32))


LIKE = {
    "embed": {"embedding": zeros(7, 6)},
    "norm": {"scale": zeros(6)},
    "cls": zeros(1, 1, 6),
    "h": {"q": {"kernel": zeros(2, 6, 4), "bias": zeros(2, 4)}},
    "conv": {"kernel": zeros(3, 4, 5)},
}
OPTIONS = {
    "names": {"h/q": "h.{layer}.q", ".*": r"\g<0>"},
    "layout": {"conv.*": "iio", "h.*": "bio"},
    "kinds": {"conv.*": "Conv"},
}


def test_weights_come_in_their_own_axes(model):
    params = jax.tree.map(np.asarray, hf.load(model, LIKE, **OPTIONS))
    theirs = tensors_of(model)
    assert np.array_equal(params["embed"]["embedding"], theirs["embed.weight"])
    assert np.array_equal(params["h"]["q"]["kernel"][1], theirs["h.1.q.weight"].T)
    assert np.array_equal(params["conv"]["kernel"], theirs["conv.weight"].transpose(2, 1, 0))
    assert np.array_equal(params["cls"], theirs["cls"])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), LIKE)
    assert hf.load(model, like, **OPTIONS)["norm"]["scale"].dtype == jnp.bfloat16


@pytest.mark.devices(2)
def test_weights_come_with_the_shardings_asked_for(model):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    like = LIKE | {"norm": {"scale": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=place)}}
    assert hf.load(model, like, **OPTIONS)["norm"]["scale"].sharding == place


@pytest.mark.parametrize("shard_size", [10**9, 200, 1])
def test_what_came_in_goes_out_bit_for_bit(model, shard_size, tmp_path):
    params = hf.load(model, LIKE, **OPTIONS)
    hf.save(tmp_path / "out", params, source=model, shard_size=shard_size, **OPTIONS)
    theirs, ours = tensors_of(model), tensors_of(tmp_path / "out")
    assert list(ours) == list(theirs)
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype
        assert np.array_equal(ours[name], x)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {10**9: 1, 200: len(files), 1: len(theirs)}[shard_size]
    for file in files:  # as the library reads them
        safetensors.numpy.load_file(file)
    assert_close(hf.load(tmp_path / "out", LIKE, **OPTIONS), params)


def test_an_adapter_goes_out_merged(model, tmp_path):
    params = hf.load(model, LIKE, **OPTIONS)
    options = {"targets": ["h/q/kernel", "embed.*"], "layout": {"h.*": "bio"}, "full": "norm.*"}
    lora_params = adapted(params, **options)
    hf.save(tmp_path / "out", lora_params, source=model, **OPTIONS)
    merged = lora_jax.merge(lora_params)
    assert_close(hf.load(tmp_path / "out", LIKE, **OPTIONS), merged)
    base = lora_jax.quant.quantize(params, "int8", targets="h/q/kernel", layout={"h.*": "bio"})
    lora_params = lora_jax.LoraParams(base, lora_params.adapter)
    hf.save(tmp_path / "int8", lora_params, source=model, **OPTIONS)
    merged = lora_jax.merge(lora_params, quantized="dequantize")
    assert_close(hf.load(tmp_path / "int8", LIKE, **OPTIONS), merged)


def test_without_a_source_names_are_the_paths(tmp_path):
    params = {"a": {"kernel": floats(2, 3), "bias": floats(3)}, "cls": floats(1, 2)}
    params = jax.tree.map(jnp.asarray, params)
    hf.save(tmp_path / "out", params)
    shapes = {name: t.shape for name, t in _shards.tensors_in(tmp_path / "out").items()}
    assert shapes == {"a.weight": (3, 2), "a.bias": (3,), "cls": (1, 2)}
    assert_close(hf.load(tmp_path / "out", params, hf.Family()), params)


def test_another_precision_and_what_it_cannot_hold(model, tmp_path):
    params = hf.load(model, LIKE, **OPTIONS)
    hf.save(tmp_path / "out", params, source=model, dtype=jnp.bfloat16, **OPTIONS)
    kinds = {str(x.dtype) for x in tensors_of(tmp_path / "out").values()}
    assert kinds == {"bfloat16", "bool"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "bfloat16"}
    params["norm"]["scale"] = np.where(np.arange(6) == 2, np.float32(1e6), 1)
    with pytest.raises(ValueError, match=r"'norm\.weight': 1 numbers of up to 1e\+06 are too"):
        hf.save(tmp_path / "half", params, source=model, dtype=jnp.float16, **OPTIONS)
    assert not (tmp_path / "half").exists()
    params["norm"]["scale"] = np.full(6, np.float32(np.inf))  # what is infinite stays so
    hf.save(tmp_path / "half", params, source=model, dtype=jnp.float16, **OPTIONS)


def edited(folder, **changes):
    tensors = tensors_of(folder) | changes
    tensors = {name: x for name, x in tensors.items() if x is not None}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h.1.q.weight": None}, r"has no tensor h\.1\.q\.weight for 'h/q/kernel'. Nearest: h\.0"),
        ({"more.weight": floats(3)}, r"1 tensors have no place .* such as \['more\.weight'\]"),
        ({"h.1.q.weight": floats(6, 4)}, r"has shape \(6, 4\), and 'h/q/kernel' .* wants \(4, 6\)"),
        ({"norm.weight": floats(5)}, r"has shape \(5,\), and 'norm/scale'"),
        ({"cls": floats(1, 6)}, r"has shape \(1, 6\), and 'cls'"),
    ],
)
def test_other_models_are_refused(changes, message, model, tmp_path):
    params = hf.load(model, LIKE, **OPTIONS)
    edited(model, **changes)
    with pytest.raises(ValueError, match=message):
        hf.load(model, LIKE, **OPTIONS)
    with pytest.raises(ValueError, match=r"has no tensor|have no place|has shape"):
        hf.save(tmp_path / "out", params, source=model, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_tensors_may_be_left_over_if_said(model, tmp_path):
    edited(model, **{"pooler.dense.weight": floats(3, 3)})
    params = hf.load(model, LIKE, ignore=r"pooler\..*", **OPTIONS)
    hf.save(tmp_path / "out", params, source=model, ignore=r"pooler\..*", **OPTIONS)
    assert tensors_of(tmp_path / "out").keys() == tensors_of(model).keys()


# Families.


def test_the_configuration_says_how_tensors_are_named(tmp_path):
    params = {"model": {"norm": {"scale": ones(3)}}, "lm_head": {"kernel": ones(3, 2)}}
    stacked = {"q_proj": {"kernel": ones(2, 3, 4)}}
    params["model"]["layers"] = {"self_attn": stacked}
    hf.save(tmp_path / "model", params, "llama")
    names = [f"model.layers.{k}.self_attn.q_proj.weight" for k in range(2)]
    assert sorted(tensors_of(tmp_path / "model")) == ["lm_head.weight", *names, "model.norm.weight"]
    with pytest.raises(ValueError, match=r"holds no config\.json, whose .* known are bert, clip"):
        hf.load(tmp_path / "model", params)
    assert_close(hf.load(tmp_path / "model", params, "llama"), params)
    config = tmp_path / "model" / "config.json"
    config.write_text('{"model_type": "novel"}')
    with pytest.raises(
        ValueError, match=r"model_type 'novel' .* llama, .* hf\.FAMILIES\['novel'\] ="
    ):
        hf.load(tmp_path / "model", params)
    hf.FAMILIES["novel"] = hf.FAMILIES["llama"]
    try:
        assert_close(hf.load(tmp_path / "model", params), params)
    finally:
        del hf.FAMILIES["novel"]
    assert_close(hf.load(tmp_path / "model", params, names=hf.FAMILIES["llama"].names), params)
    with pytest.raises(ValueError, match=r"family='novel': known are bert"):
        hf.load(tmp_path / "model", params, "novel")
    with pytest.raises(TypeError, match=r"family=3: expected an hf\.Family"):
        hf.load(tmp_path / "model", params, 3)
    config.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds list, expected an object"):
        hf.load(tmp_path / "model", params)


PATHS = {
    "bert": {
        "bert/encoder/layer/3/output/dense": "bert.encoder.layer.3.output.dense",
        "encoder/layer_4/output/dense": "bert.encoder.layer.4.output.dense",
        "encoder/layer/output/LayerNorm": "bert.encoder.layer.{layer}.output.LayerNorm",
        "pooler/dense": "bert.pooler.dense",
        "cls/predictions/bias": "cls.predictions.bias",
    },
    "clip": {
        "text_model/encoder/layers/1/mlp/fc1": "text_model.encoder.layers.1.mlp.fc1",
        "vision_model/encoder/layers/mlp/fc1": "vision_model.encoder.layers.{layer}.mlp.fc1",
        "vision_model/pre_layrnorm": "vision_model.pre_layrnorm",
        "logit_scale": "logit_scale",
    },
    "deberta-v2": {
        "encoder/rel_embeddings": "deberta.encoder.rel_embeddings",
        "deberta/encoder/layer_0/attention/self/query_proj": (
            "deberta.encoder.layer.0.attention.self.query_proj"
        ),
        "pooler/dense": "pooler.dense",
    },
    "gpt2": {"h_1/attn/c_attn": "transformer.h.1.attn.c_attn", "wte": "transformer.wte"},
    "t5": {
        "decoder/block_1/layer_2/DenseReluDense/wi_0": (
            "decoder.block.1.layer.2.DenseReluDense.wi_0"
        ),
        "encoder/final_layer_norm": "encoder.final_layer_norm",
    },
    "vit": {"vit/embeddings/cls_token": "vit.embeddings.cls_token", "classifier": "classifier"},
}


@pytest.mark.parametrize("family", PATHS)
def test_families_name_modules(family):
    leaves = {f"{path}/kernel": ones(2, 3, 4) for path in PATHS[family]}
    places = Map(leaves, hf.FAMILIES[family].names)
    for path, name in PATHS[family].items():
        found = [place.module for place in places.of(f"{path}/kernel")]
        assert found == (
            [name.replace("{layer}", str(k)) for k in range(2)] if "{" in name else [name]
        )
    with pytest.raises(ValueError, match="names has no pattern for 'other/part'"):
        Map({"other/part/kernel": ones(2, 3)}, hf.FAMILIES[family].names).of("other/part/kernel")


def test_families_are_closed(tmp_path):
    """PEFT drops factors of a module that the model does not have without a word."""
    params = {"model": {"layers": {"0": {"attn": {"q_proj": {"kernel": ones(4, 4)}}}}}}
    lora_params = adapted(params)
    family = hf.FAMILIES["llama"]
    message = (
        r"no pattern for 'model/layers/0/attn/q_proj': add one, such as "
        r"(\{'model/layers/0/attn/q_proj': .*\})\. "
        r"Nearest names: model\.layers\.\\1\.self_attn\.q_proj"
    )
    with pytest.raises(ValueError, match=message) as error:
        peft.save(tmp_path / "adapter", lora_params, names=family.names)
    assert not list(tmp_path.iterdir())
    offered = re.search(message, str(error.value))
    assert offered is not None
    added = eval(offered[1])
    peft.save(tmp_path / "adapter", lora_params, names=family.names | added)
    own = {r"model/layers/(\d+)/attn/(.+)": r"model.layers.\1.self_attn.\2"}
    peft.save(tmp_path / "mine", lora_params, names=family.names | own)
    targets = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["q_proj"]


def test_files_may_have_modules_that_their_family_has_not(tmp_path):
    params = {"model": {"layers": {"0": {"mixer": {"kernel": jnp.asarray(floats(4, 3))}}}}}
    hf.save(tmp_path / "model", params, hf.Family(), config={"model_type": "llama"})
    assert_close(hf.load(tmp_path / "model", params), params)
    hf.save(tmp_path / "again", params, source=tmp_path / "model")
    assert tensors_of(tmp_path / "again").keys() == {"model.layers.0.mixer.weight"}
    with pytest.raises(ValueError, match=r"no pattern for 'model/layers/0/mixer'"):
        hf.save(tmp_path / "out", params, "llama")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_names_of_a_family_name_themselves(family):
    """So that a family can be given for files, which have these names."""
    names = hf.FAMILIES[family].names
    for template in names.values():
        name = template.replace(r"\1", "0").replace(r"\2", "1")
        if "{layer}" not in name:
            assert Map({}, names).named(name.replace(".", "/")) == name


def test_a_model_without_its_head_gets_a_new_one(tmp_path):
    """Files of the body alone have no prefix; beside a head they need it."""
    body = {"pooler": {"dense": {"kernel": jnp.asarray(floats(3, 3)), "bias": ones(3)}}}
    hf.save(tmp_path / "model", body, names={r"(.*)": r"\1"}, config={"model_type": "bert"})
    whole = {"bert": body, "classifier": {"kernel": ones(3, 2), "bias": jnp.zeros(2)}}
    with pytest.raises(ValueError, match=r"no tensor classifier\.bias .* such as a new head, new="):
        hf.load(tmp_path / "model", whole)
    params = hf.load(tmp_path / "model", whole, new="classifier/.*")
    assert_close(params, whole)
    hf.save(
        tmp_path / "out",
        params,
        source=tmp_path / "model",
        new="classifier/.*",
        config={"num_labels": 2},
    )
    names = ["bert.pooler.dense.bias", "bert.pooler.dense.weight"]
    assert sorted(tensors_of(tmp_path / "out")) == [*names, "classifier.bias", "classifier.weight"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "bert", "num_labels": 2}
    assert_close(hf.load(tmp_path / "out", whole), whole)
    with pytest.raises(ValueError, match=r"new='head' matches no leaf"):
        hf.load(tmp_path / "model", whole, new="head")
    shapes = jax.eval_shape(lambda: whole)
    with pytest.raises(ValueError, match=r"new: 'classifier/bias' is to stay as it is in like"):
        hf.load(tmp_path / "model", shapes, new="classifier/.*")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config={'a': 1}: .* holds no config\.json to change"):
        hf.save(tmp_path / "no", body, hf.Family(), source=tmp_path / "model", config={"a": 1})


def test_progress_is_told(model, tmp_path):
    seen = []
    params = hf.load(model, LIKE, progress=lambda *at: seen.append(at), **OPTIONS)
    read = sum(x.size for x in jax.tree.leaves(LIKE)) * 4
    assert seen[-1] == (read, read)
    assert seen == sorted(seen)
    hf.save(tmp_path / "out", params, source=model, progress=lambda *at: seen.append(at), **OPTIONS)
    assert seen[-1] == (read + 18, read + 18)  # with the masks that were left over


def test_tied_tensors_are_read_twice_and_written_once(tmp_path):
    params = {"embed": {"embedding": jnp.asarray(floats(7, 6))}}
    hf.save(tmp_path / "model", params)
    like = params | {"head": {"kernel": jnp.zeros((6, 7))}}
    with pytest.raises(ValueError, match=r"has no tensor head\.weight .* tied="):
        hf.load(tmp_path / "model", like, hf.Family())
    tied = {"tied": {"head.weight": "embed.weight"}, "family": hf.Family()}
    params = hf.load(tmp_path / "model", like, **tied)
    assert np.array_equal(params["head"]["kernel"], params["embed"]["embedding"].T)
    hf.save(tmp_path / "out", params, source=tmp_path / "model", **tied)
    assert list(tensors_of(tmp_path / "out")) == ["embed.weight"]
    params["head"]["kernel"] = jnp.asarray(
        np.asarray(params["head"]["kernel"]) + np.eye(6, 7, dtype="f")
    )
    with pytest.raises(ValueError, match=r"'head/kernel' is tied to 'embed\.weight' .* they"):
        hf.save(tmp_path / "no", params, source=tmp_path / "model", **tied)
    hf.save(tmp_path / "untied", params)
    assert_close(hf.load(tmp_path / "untied", like, **tied), params)


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    """And only where the configuration ties it."""
    params = {"model": {"embed_tokens": {"embedding": jnp.asarray(floats(7, 6))}}}
    whole = params | {"lm_head": {"kernel": params["model"]["embed_tokens"]["embedding"].T}}
    config = {"model_type": "llama", "tie_word_embeddings": True}
    hf.save(tmp_path / "once", params, "llama", config=config)
    hf.save(tmp_path / "twice", whole, "llama", config=config)
    for stored in ("once", "twice"):
        for like in (params, whole):
            assert_close(hf.load(tmp_path / stored, like), like)
    lora_params = adapted(params, targets=".*")
    hf.save(tmp_path / "out", lora_params, source=tmp_path / "twice")
    table, head = (
        tensors_of(tmp_path / "out")[k] for k in sorted(tensors_of(tmp_path / "out"))[::-1]
    )
    merged = lora_jax.merge(lora_params)["model"]["embed_tokens"]["embedding"]
    assert np.array_equal(table, merged)
    assert np.array_equal(head, table)

    names = hf.FAMILIES["llama"].names
    peft.save(tmp_path / "adapter", lora_params, names=names, task_type="FEATURE_EXTRACTION")
    for stored in ("once", "twice"):  # in PEFT it is of the lookups alone
        hf.merge(tmp_path / stored, tmp_path / "adapter", tmp_path / f"merged {stored}")
        found = tensors_of(tmp_path / f"merged {stored}")
        assert_close(found["model.embed_tokens.weight"], merged)
        assert np.array_equal(found["lm_head.weight"], params["model"]["embed_tokens"]["embedding"])
        config = json.loads((tmp_path / f"merged {stored}" / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
    own = floats(7, 6)
    edited(tmp_path / "twice", **{"lm_head.weight": own})
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is tied to .*, and they differ"):
        hf.load(tmp_path / "twice", params)
    with pytest.raises(ValueError, match=r"is tied to .*, both are stored, .* pass config="):
        hf.merge(tmp_path / "twice", tmp_path / "adapter", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    both = {"tie_word_embeddings": False}
    hf.merge(tmp_path / "twice", tmp_path / "adapter", tmp_path / "both", config=both)
    assert np.array_equal(tensors_of(tmp_path / "both")["lm_head.weight"], own)
    (tmp_path / "once" / "config.json").write_text('{"model_type": "llama"}')
    assert_close(hf.load(tmp_path / "once", params), params)
    with pytest.raises(ValueError, match=r"has no tensor lm_head\.weight"):
        hf.load(tmp_path / "once", whole)


def test_broken_indices_are_refused(model, tmp_path):
    hf.save(
        tmp_path / "out", hf.load(model, LIKE, **OPTIONS), source=model, shard_size=200, **OPTIONS
    )
    index = tmp_path / "out" / _shards.INDEX
    good = json.loads(index.read_text())
    where = good["weight_map"]
    first, last = next(iter(where)), where[list(where)[-1]]

    def refused(change, error, message):
        index.write_text(json.dumps(change))
        with pytest.raises(error, match=message):
            hf.load(tmp_path / "out", LIKE, **OPTIONS)

    for outside in ("../model/model.safetensors", "/etc/passwd", "..", "a/b"):
        broken = {"weight_map": where | {first: outside}}
        refused(broken, ValueError, "is no name of a file in")
    refused([], ValueError, "expected a weight_map")
    refused({"weight_map": {"a": 1}}, ValueError, "expected a weight_map")
    refused({"weight_map": where | {first: "no"}}, FileNotFoundError, "is missing, and .* names it")
    refused({"weight_map": where | {first: last}}, ValueError, "does not hold what")
    refused({"weight_map": where | {"more": last}}, ValueError, r"without \['more'\]")
    index.write_text(json.dumps(good))
    (tmp_path / "out" / last).write_bytes((tmp_path / "out" / last).read_bytes()[:-3])
    with pytest.raises(ValueError, match="is no complete safetensors file"):
        hf.load(tmp_path / "out", LIKE, **OPTIONS)
    with pytest.raises(FileNotFoundError, match="holds neither model"):
        hf.load(tmp_path, LIKE)
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(FileNotFoundError, match=r"but pytorch_model\.bin, a pickle"):
        hf.load(tmp_path, LIKE)


def test_what_was_there_stays_whatever_happens(model, tmp_path, monkeypatch):
    params = hf.load(model, LIKE, **OPTIONS)
    hf.save(tmp_path / "out", params, source=model, **OPTIONS)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        hf.save(tmp_path / "out", params, source=model, **OPTIONS)

    def full(*_):
        raise OSError(28, "No space left on device")

    for module, name in ((os, "fsync"), (_shards, "_write_one"), (_files, "_put")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left"):
                hf.save(tmp_path / "out", params, source=model, overwrite=True, **OPTIONS)
    (tmp_path / "out" / "mine.npy").write_text("")
    with pytest.raises(FileExistsError, match=r"holds mine\.npy, which would be lost"):
        hf.save(tmp_path / "out", params, source=model, overwrite=True, **OPTIONS)
    (tmp_path / "out" / "mine.npy").unlink()
    hf.save(tmp_path / "out", params, source=model, shard_size=200, overwrite=True, **OPTIONS)
    hf.save(tmp_path / "out", params, source=model, overwrite=True, **OPTIONS)
    assert_close(hf.load(tmp_path / "out", LIKE, **OPTIONS), params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


# Merging files.

ADAPTERS = {
    "plain": {"targets": ["h/q/kernel", "embed.*", "conv.*"]},
    "some layers": {"targets": "h/q/kernel", "layers": [1]},
    "DoRA": {"targets": ["h/q/kernel", "embed.*", "conv.*"], "dora": True},
    "whole": {"targets": "h/q/kernel", "full": ["norm.*", "conv.*"], "bias": "lora_only"},
    "rows": {"targets": "h/q/kernel", "rows": {"embed.*": [5, 2]}},
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("chunk", [2**22, 7])
def test_files_are_merged_as_parameters_are(name, chunk, model, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_jax.io.hf._merge._CHUNK", chunk)
    params = hf.load(model, LIKE, **OPTIONS)
    options = {"layout": OPTIONS["layout"]} | ADAPTERS[name]
    lora_params = adapted(params, **options)
    peft.save(tmp_path / "adapter", lora_params, **OPTIONS)
    hf.merge(model, tmp_path / "adapter", tmp_path / "out", shard_size=300)
    merged = lora_jax.merge(lora_params)
    assert_close(hf.load(tmp_path / "out", LIKE, **OPTIONS), merged)
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(model)
    assert {k: x.dtype for k, x in ours.items()} == {k: x.dtype for k, x in theirs.items()}


@pytest.mark.parametrize("wanted", ["bfloat16", "float32", "float16"])
def test_a_sum_is_rounded_once_to_what_is_written(wanted, model, tmp_path):
    half = {name: x.astype("bfloat16") for name, x in tensors_of(model).items() if x.ndim}
    safetensors.numpy.save_file(half, model / "model.safetensors")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), LIKE)
    params = hf.load(model, like, **OPTIONS)
    options = {"targets": "h/q/kernel", "layout": OPTIONS["layout"], "full": "norm.*"}
    base = np.asarray(params["h"]["q"]["kernel"], np.float64)

    def update(f):
        a, b, scale = (np.asarray(x, np.float64) for x in (f.a, f.b, f.scale))
        return scale * (a @ b)

    def worst(x, exact):
        return np.abs(np.asarray(x, np.float64) - exact).max()

    weights, exact = {}, base
    for k, weight in enumerate((0.25, 4.0)):
        lora_params = randomize_b(adapted(params, **options), seed=k)
        factors = lora_jax.Adapter(lora_params.adapter.factors)
        peft.save(tmp_path / f"a{k}", lora_jax.LoraParams(params, factors), **OPTIONS)
        weights[tmp_path / f"a{k}"] = weight
        exact = exact + weight * update(factors.factors["h/q/kernel"])
    hf.merge(model, weights, tmp_path / "sum", dtype=wanted)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, wanted), LIKE)
    found = hf.load(tmp_path / "sum", like, **OPTIONS)["h"]["q"]["kernel"]
    rounded = worst(exact.astype(jnp.dtype(wanted)), exact)  # once
    assert worst(found, exact) <= 1.01 * rounded + tolerance() * np.abs(exact).max()
    hf.save(tmp_path / "out", lora_params, source=model, dtype=wanted, **OPTIONS)
    saved = hf.load(tmp_path / "out", like, **OPTIONS)["h"]["q"]["kernel"]
    exact = base + update(lora_params.adapter.factors["h/q/kernel"])
    # The parameters are bfloat16, and so are the merged ones, but for those that train whole.
    limit = {"bfloat16": 2**-8, "float16": 2**-8, "float32": tolerance()}[wanted]
    assert worst(saved, exact) <= limit * np.abs(exact).max()


def test_transposed_layers_and_experts_are_merged(tmp_path):
    params = {
        "h": {"0": {"attn": {"c_attn": {"kernel": jnp.asarray(floats(6, 9))}}}},
        "moe": {"up": jnp.asarray(floats(3, 6, 5)), "down": jnp.asarray(floats(3, 5, 6))},
    }
    options = {"kinds": {".*c_attn.*": "Conv1D"}, "layout": {"moe.*": "bio", ".*": "io"}}
    lora_params = adapted(params, targets=".*", layout=options["layout"])
    order = {"parameter_order": ("up", "down")}
    with pytest.raises(
        ValueError, match=r"of a Conv1D and 'moe\..*' is a Parameter, and PEFT takes"
    ):
        peft.save(tmp_path / "moe", lora_params, **options, **order)
    merged = jax.tree.map(np.asarray, lora_jax.merge(lora_params))
    for name in ("h", "moe"):  # PEFT has no adapter of both
        factors = {k: f for k, f in lora_params.adapter.factors.items() if k.startswith(name)}
        own = lora_jax.LoraParams(params, lora_jax.Adapter(factors))
        peft.save(tmp_path / name, own, **options, **order)
    (tmp_path / "model").mkdir()
    tensors = {
        "h.0.attn.c_attn.weight": np.asarray(params["h"]["0"]["attn"]["c_attn"]["kernel"]),
        **{f"moe.{k}": np.asarray(x) for k, x in params["moe"].items()},
    }
    safetensors.numpy.save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no config\.json, whose model_type tells whether"):
        hf.merge(tmp_path / "model", tmp_path / "h", tmp_path / "out")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"PEFT nests them in the order"):
        hf.merge(tmp_path / "model", tmp_path / "moe", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    both = {tmp_path / "h": 1.0, tmp_path / "moe": 1.0}
    hf.merge(tmp_path / "model", both, tmp_path / "out", **order)
    ours = tensors_of(tmp_path / "out")
    assert_close(ours["h.0.attn.c_attn.weight"], merged["h"]["0"]["attn"]["c_attn"]["kernel"])
    assert_close(ours["moe.up"], merged["moe"]["up"])
    assert_close(ours["moe.down"], merged["moe"]["down"])


def test_several_adapters_are_added_up_with_weights(model, tmp_path):
    params = hf.load(model, LIKE, **OPTIONS)
    expected = np.asarray(params["h"]["q"]["kernel"], np.float64)
    for k, weight in enumerate((0.5, -2.0)):
        options = {"targets": "h/q/kernel", "layout": OPTIONS["layout"]}
        lora_params = randomize_b(adapted(params, **options), seed=k)
        peft.save(tmp_path / f"a{k}", lora_params, **OPTIONS)
        f = lora_params.adapter.factors["h/q/kernel"]
        a, b, scale = (np.asarray(x, np.float64) for x in (f.a, f.b, f.scale))
        expected = expected + weight * scale * (a @ b)
    weights = {tmp_path / "a0": 0.5, tmp_path / "a1": -2.0}
    hf.merge(model, weights, tmp_path / "out")
    found = hf.load(tmp_path / "out", LIKE, **OPTIONS)["h"]["q"]["kernel"]
    assert_close(found, expected)
    options = {"targets": "h/q/kernel", "layout": OPTIONS["layout"], "dora": True}
    lora_params = adapted(params, **options)
    peft.save(tmp_path / "dora", lora_params, **OPTIONS)
    with pytest.raises(ValueError, match="can neither be weighted nor summed"):
        hf.merge(model, {tmp_path / "dora": 0.5}, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_adapters_of_other_models_are_not_merged(model, tmp_path):
    params = {"x": {"kernel": ones(6, 4)}}
    peft.save(tmp_path / "a", adapted(params, targets=".*"))
    with pytest.raises(ValueError, match="adapts a module 'x', which the parameters have not"):
        hf.merge(model, tmp_path / "a", tmp_path / "out")
    config = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    (tmp_path / "a" / peft.CONFIG).write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    edited(model, **{"x.weight": floats(4, 6)})
    with pytest.raises(ValueError, match="its initializer changed the base"):
        hf.merge(model, tmp_path / "a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_merging_takes_the_memory_of_a_tensor_or_two(tmp_path):
    size = int(float(NIGHTLY) * 2**30) if NIGHTLY else 640 * 2**20
    largest = size // 8
    script = f"""
        import os
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax, numpy as np, lora_jax
        from pathlib import Path
        from lora_jax.io import hf, peft
        from lora_jax.io._tensor import Tensor
        from lora_jax.io.hf import _shards
        def peak():  # of this program alone: ru_maxrss begins with what its parent has had
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) * 1024
        root, width = Path({str(tmp_path)!r}), 1024
        rows = {largest} // width // 2
        dtype = _shards._DTYPES["BF16"]
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text('{{"model_type": "llama"}}')
        one = np.ones((rows, width), dtype)
        tensor = Tensor((rows, width), dtype, lambda: one)
        tensors = {{f"h.{{k}}.q.weight": tensor for k in range(8)}}
        _shards.write(root / "model", tensors, shard_size={size} // 4)
        del one
        f = lora_jax.Factors(
            np.ones((width, 4), np.float32), np.full((4, rows), 0.5, np.float32),
            np.float32(1), "io",
        )
        kernel = jax.ShapeDtypeStruct((width, rows), dtype)
        like = {{"h": {{str(k): {{"q": {{"kernel": kernel}}}} for k in range(8)}}}}
        adapter = lora_jax.Adapter({{f"h/{{k}}/q/kernel": f for k in range(8)}})
        peft.save(root / "adapter", lora_jax.LoraParams(like, adapter))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        hf.merge(root / "model", root / "adapter", root / "out", shard_size={size} // 4)
        print(peak() - before)
        x = _shards.tensors_in(root / "out")["h.7.q.weight"].read()
        assert (x == 3).all()
    """
    taken = int(run_script(script))
    assert largest / 2 < taken < 2 * largest + 300 * 2**20, taken


@pytest.mark.long
def test_a_full_disk_leaves_nothing(model, tmp_path):
    params = hf.load(model, LIKE, **OPTIONS)
    lora_params = adapted(params, targets="h/q/kernel", layout={"h.*": "bio"})
    peft.save(tmp_path / "adapter", lora_params, **OPTIONS)
    found = run_script(
        """
        import os, resource, signal, sys
        os.environ["JAX_PLATFORMS"] = "cpu"
        from lora_jax.io import hf
        root = sys.argv[1]
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
        for adapters in ({}, root + "/adapter"):
            try:
                hf.merge(root + "/model", adapters, root + "/out")
            except OSError as error:
                print("refused", error)
        """,
        tmp_path,
    )
    assert found.count("refused") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]


@pytest.mark.parametrize("kills", [3, pytest.param(12, marks=pytest.mark.long)])
def test_an_export_killed_at_any_moment_leaves_a_whole_model(kills, tmp_path):
    program = """
        import numpy as np
        from lora_jax.io import hf

        def save(folder, k):
            leaf = {"kernel": np.full((512, 1024), k, np.float32)}
            params = {f"layer_{i}": leaf for i in range(6)}
            hf.save(folder, params, shard_size=5_000_000, overwrite=True)
    """
    for i, count in enumerate(kill_while_saving(program, tmp_path, kills)):
        tensors = tensors_of(tmp_path / str(i) / "a")
        assert len(tensors) == 6
        (k,) = {float(f(x)) for x in tensors.values() for f in (np.min, np.max)}
        assert k in (count - 1, count)


KEPT = """config.json generation_config.json tokenizer.json tokenizer_config.json vocab.json
vocab.txt merges.txt special_tokens_map.json added_tokens.json tokenizer.model spiece.model
source.spm sentencepiece.bpe.model qwen.tiktoken tekken.json chat_template.jinja chat_template.json
preprocessor_config.json processor_config.json video_preprocessor_config.json normalizer.json
vocab-src.json bpe.codes dict.txt entity_vocab.json LICENSE LICENSE.txt NOTICE modules.json
sentence_bert_config.json vocab.bpe USE_POLICY.md""".split()

LEFT = """adapter_config.json README.md training_args.bin optimizer.pt scheduler.pt rng_state.pth
rng_state_0.pth trainer_state.json trainer_log.jsonl tokens_state.json axolotl_config.yaml
all_results.json train_results.json debug.log latest zero_to_fp32.py loss.png args.json Modelfile
pytorch_model.bin model.onnx tf_model.h5 flax_model.msgpack consolidated.safetensors
adapter_model.safetensors other.safetensors.index.json .gitattributes hf_quant_config.json
quantize_config.json""".split()


@pytest.mark.parametrize("code", [False, True])
def test_what_a_model_needs_is_copied_and_nothing_else(code, model, tmp_path):
    for name in {*KEPT, *LEFT, "modeling_mine.py"} - {"config.json"}:
        (model / name).write_text("{}")
    (model / "optimizer").mkdir()
    if code:
        (model / "config.json").write_text('{"model_type": "llama", "auto_map": {}}')
    params = hf.load(model, LIKE, **OPTIONS)
    hf.merge(model, {}, tmp_path / "merged")
    hf.save(tmp_path / "saved", params, source=model, **OPTIONS)
    own = {"modeling_mine.py", "zero_to_fp32.py"} if code else set()
    for out in ("merged", "saved"):
        found = {p.name for p in (tmp_path / out).iterdir()}
        assert found == {*KEPT, "tokenizer.json", "model.safetensors"} | own


def test_code_of_a_tokenizer_is_copied(model, tmp_path):
    (model / "tokenizer_config.json").write_text('{"auto_map": {}}')
    (model / "tokenization_mine.py").write_text("")
    hf.merge(model, {}, tmp_path / "out")
    assert (tmp_path / "out" / "tokenization_mine.py").exists()


def test_modules_of_sentence_transformers_are_copied(model, tmp_path):
    """They are in folders, and some have weights of their own."""
    folder, out = tmp_path / "model", tmp_path / "out"
    paths = ["", "1_Pooling", "2_Dense", "3_Router", "4_Normalize"]
    listed = [{"idx": k, "name": str(k), "path": path} for k, path in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps(listed))
    files = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]
    files += ["3_Router/query_0/config.json", "3_Router/query_0/pytorch_model.bin"]
    files += ["3_Router/router_config.json", "additional_chat_templates/tool_use.jinja"]
    left = ["1_Pooling/README.md", "2_Dense/optimizer.pt", "checkpoint-5/config.json"]
    for name in [*files, *left]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for _ in range(2):  # the second time over the first
        hf.merge(folder, {}, out, overwrite=True)
        found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
        assert {name for name in found if "/" in name} == {*files}
        assert all((out / name).read_text() == name for name in files)
    (out / "1_Pooling" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="holds 1_Pooling, which would be lost"):
        hf.merge(folder, {}, out, overwrite=True)
    (folder / "modules.json").write_text('[{"path": "../other"}]')
    with pytest.raises(ValueError, match=r"modules\.json: '\.\./other' is no folder of the model"):
        hf.merge(folder, {}, tmp_path / "no")
    assert not (tmp_path / "no").exists()
