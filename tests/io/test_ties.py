"""Tied tables and heads in small files: what is written, what is refused, and the ways out."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax
from lora_jax.io import hf, peft

PRE = "base_model.model."
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(7, 4)).astype("float32")


def model(folder, tensors, **config):
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder, tensors, **config):
    """An adapter of PEFT's files, of rank 1 and scale 1."""
    folder.mkdir()
    tensors = {PRE + name: x for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def of_table(folder, module, **config):
    a, b = (np.ones(shape, "float32") for shape in ((1, 7), (4, 1)))
    tensors = {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    return adapter(folder, tensors, target_modules=[module], **config)


def of_head(folder, module):
    a, b = (np.ones(shape, "float32") for shape in ((1, 4), (7, 1)))
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return adapter(folder, tensors, target_modules=[module])


def written(folder):
    config = json.loads((folder / "config.json").read_text())
    return safetensors.numpy.load_file(folder / "model.safetensors"), config


def test_a_head_is_written_beside_names_with_their_prefix(tmp_path):
    base = model(tmp_path / "m", {"wte.weight": TABLE}, model_type="gpt2")
    hf.merge(base, of_head(tmp_path / "a", "lm_head"), tmp_path / "out")
    found, config = written(tmp_path / "out")
    assert found.keys() == {"transformer.wte.weight", "lm_head.weight"}
    assert np.array_equal(found["transformer.wte.weight"], TABLE)
    assert np.allclose(found["lm_head.weight"], TABLE + 1)
    assert config["tie_word_embeddings"] is False


def test_ties_below_another_module(tmp_path):
    base = model(tmp_path / "m", {"_orig_mod.model.embed_tokens.weight": TABLE}, model_type="gemma")
    hf.merge(base, of_table(tmp_path / "a", "model.embed_tokens"), tmp_path / "out")
    found, config = written(tmp_path / "out")
    assert np.array_equal(found["_orig_mod.lm_head.weight"], TABLE)
    assert np.allclose(found["_orig_mod.model.embed_tokens.weight"], TABLE + 1)
    assert config["tie_word_embeddings"] is False
    layer = {"transformer.encoder.block.0.weight": TABLE, "transformer.shared.weight": TABLE}
    base = model(tmp_path / "t5", layer, model_type="t5", architectures=["T5ForSequence"])
    message = r"'transformer\.encoder\.embed_tokens\.weight' is tied to 'transformer\.shared"
    with pytest.raises(ValueError, match=message):
        hf.merge(base, of_table(tmp_path / "b", "transformer.shared"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_class_of_one_stack_has_no_table_of_the_other(tmp_path):
    names = [f"model.decoder.{x}.weight" for x in ("embed_tokens", "layers.0.fc1")]
    base = model(tmp_path / "m", dict.fromkeys(names, TABLE), model_type="bart")
    hf.merge(base, of_table(tmp_path / "a", "embed_tokens"), tmp_path / "out")
    assert written(tmp_path / "out")[0].keys() == {*names, "lm_head.weight"}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_rows_follow_to_the_head_whatever_the_prefix(prefix, tmp_path):
    base = model(tmp_path / "m", {prefix + "wte.weight": TABLE}, model_type="gpt2")
    rows = {"transformer.wte.token_adapter.trainable_tokens_delta": np.ones((2, 4), "float32")}
    listed = {"wte": [1, 5]}
    made = adapter(tmp_path / "a", rows, target_modules=[], trainable_token_indices=listed)
    hf.merge(base, made, tmp_path / "out")
    found, config = written(tmp_path / "out")
    assert found.keys() == {prefix + "wte.weight"}  # the head is still tied
    expected = TABLE.copy()
    expected[[1, 5]] = 1
    assert np.allclose(found[prefix + "wte.weight"], expected)
    assert "tie_word_embeddings" not in config


def test_a_configuration_that_unties_gets_the_head(tmp_path):
    base = model(tmp_path / "m", {"transformer.wte.weight": TABLE}, model_type="gpt2")
    hf.merge(base, {}, tmp_path / "out", config={"tie_word_embeddings": False})
    assert np.array_equal(written(tmp_path / "out")[0]["lm_head.weight"], TABLE)
    ours = of_head(tmp_path / "a", "lm_head")
    with pytest.raises(ValueError, match=r"is tied to .*, and the adapter changes them apart"):
        hf.merge(base, ours, tmp_path / "no", config={"tie_word_embeddings": True})
    assert not (tmp_path / "no").exists()


def test_a_model_that_cannot_have_them_apart_is_refused(tmp_path):
    base = model(tmp_path / "m", {"shared.weight": TABLE}, model_type="t5")
    for name, own in (("head", of_head(tmp_path / "a", "lm_head")), ("table", None)):
        own = own or of_table(tmp_path / "b", "shared")
        with pytest.raises(ValueError, match=r"is tied to 'shared\.weight', and the two would"):
            hf.merge(base, own, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_a_model_that_is_not_known(tmp_path):
    """Its table may be a head: both ways out work."""
    tensors, ours = {"emb.wte.weight": TABLE}, of_table(tmp_path / "a", "emb.wte")
    base = model(tmp_path / "m", tensors, model_type="mine", architectures=["MineForCausalLM"])
    with pytest.raises(ValueError, match=r"may be tied .* 'mine' .* pass config=.*hf\.FAMILIES"):
        hf.merge(base, ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hf.merge(base, ours, tmp_path / "one", config={"tie_word_embeddings": False})
    assert written(tmp_path / "one")[0].keys() == tensors.keys()
    hf.FAMILIES["mine"] = hf.Family(tied_head={"lm_head.weight": "emb.wte.weight"})
    try:
        hf.merge(base, ours, tmp_path / "two")
    finally:
        del hf.FAMILIES["mine"]
    found, _ = written(tmp_path / "two")
    assert np.array_equal(found["lm_head.weight"], TABLE)
    assert np.allclose(found["emb.wte.weight"], TABLE + 1)
    bare = model(tmp_path / "bare", tensors, model_type="mine", architectures=["MineModel"])
    hf.merge(bare, ours, tmp_path / "three")


def test_an_adapter_that_is_tied_fits_one_table_and_two_leaves(tmp_path):
    """``ensure_weight_tying``: PEFT writes the head's factors, too, and does not list the head."""
    module = "embed_tokens"
    a, b = RNG.normal(size=(1, 7)).astype("float32"), RNG.normal(size=(4, 1)).astype("float32")
    tensors = {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
    head = {"lm_head.lora_A.weight": b.T, "lm_head.lora_B.weight": a.T}
    head = {name: np.ascontiguousarray(x) for name, x in head.items()}
    config = {"target_modules": [module], "ensure_weight_tying": True}
    ours = adapter(tmp_path / "a", tensors | head, **config)
    alone = adapter(tmp_path / "alone", tensors, **config)
    one = {module: {"embedding": jnp.asarray(TABLE)}}
    two = one | {"lm_head": {"kernel": jnp.asarray(TABLE.T)}}
    expected = TABLE + (b @ a).T

    def fn(p, ids):
        return p[module]["embedding"][ids] @ p[module]["embedding"].T

    layout = lora_jax.layout_of(fn, one, jnp.arange(3))
    merged = lora_jax.merge(peft.load(ours, one, layout=layout))
    assert np.allclose(merged[module]["embedding"], expected)
    merged = lora_jax.merge(peft.load(ours, two))
    assert np.allclose(merged[module]["embedding"], expected)
    assert np.allclose(merged["lm_head"]["kernel"], expected.T)
    with pytest.raises(ValueError, match="is an output head as well"):
        peft.load(alone, one, layout=layout)  # the model there was not tied


def test_the_one_table_of_a_language_model_is_its_head(tmp_path):
    """Without a layout, too; a layout that knows the function tells that it is none."""
    ours = of_table(tmp_path / "a", "embed", task_type="CAUSAL_LM")
    one = {"embed": {"embedding": jnp.asarray(TABLE)}, "q": {"kernel": jnp.ones((4, 4))}}
    with pytest.raises(ValueError, match=r"'embed/embedding' is an output head .* layout="):
        peft.load(ours, one)
    lora_params = lora_jax.lorafy(one, 1, targets="embed.*")
    with pytest.raises(ValueError, match=r"peft\.save: the table 'embed/embedding' is .* layout="):
        peft.save(tmp_path / "no", lora_params, task_type="CAUSAL_LM")
    assert not (tmp_path / "no").exists()
    layout = lora_jax.layout_of(lambda p, ids: p["embed"]["embedding"][ids], one, jnp.arange(3))
    peft.save(tmp_path / "yes", lora_params, task_type="CAUSAL_LM", layout=layout)
    peft.load(ours, one, layout=layout)
    peft.load(ours, one | {"lm_head": {"kernel": jnp.ones((4, 7))}})
    peft.load(of_table(tmp_path / "b", "embed", task_type="SEQ_CLS"), one)


@pytest.mark.parametrize("prefix", ["", "model.", "_orig_mod."])
def test_a_head_that_the_model_has_not_is_written(prefix, tmp_path):
    q, norm = np.ones((4, 4), "float16"), np.ones(4, "float16")
    layer = {f"{prefix}layers.0.q_proj.weight": q, f"{prefix}norm.weight": norm}
    base = model(tmp_path / "m", layer, model_type="llama")
    a, b = np.ones((1, 4), "float32"), np.ones((4, 1), "float32")
    tensors = {f"model.layers.0.q_proj.lora_{k}.weight": x for k, x in (("A", a), ("B", b))}
    config = {"target_modules": ["q_proj"], "modules_to_save": ["score"], "task_type": "SEQ_CLS"}
    score = RNG.normal(size=(3, 4)).astype("float32")
    ours = adapter(tmp_path / "a", tensors | {"score.weight": score}, **config)
    hf.merge(base, ours, tmp_path / "out", config={"num_labels": 3})
    found, _ = written(tmp_path / "out")
    names = {"model.layers.0.q_proj.weight", "model.norm.weight", "score.weight"}
    assert found.keys() == names  # as its class has them
    assert np.array_equal(found["score.weight"], score.astype("float16"))
    other = {"other.weight": score}
    config["modules_to_save"] = ["other"]
    strange = adapter(tmp_path / "b", tensors | other, **config)
    with pytest.raises(ValueError, match=r"'base_model\.model\.other\.weight' has no place"):
        hf.merge(base, strange, tmp_path / "no")


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_modules_of_another_class_than_the_adapters_stay(prefix, tmp_path):
    sizes = {"bert.h.0.dense": 4, "bert.h.1.dense": 4, "cls.dense": 4, "cls.decoder": 7}
    tensors = {f"{m}.weight": RNG.normal(size=(n, 4)).astype("float32") for m, n in sizes.items()}
    tensors |= {f"{m}.bias": np.zeros(n, "float32") for m, n in sizes.items()}
    base = model(tmp_path / "m", tensors, model_type="bert")
    new, row = {}, np.ones((1, 4), "float32")
    for k in range(2):
        new |= {f"{prefix}h.{k}.dense.lora_{x}.weight": y for x, y in (("A", row), ("B", row.T))}
        new[f"{prefix}h.{k}.dense.base_layer.bias"] = row[0]
    hf.merge(
        base, adapter(tmp_path / "a", new, target_modules=["dense"], bias="all"), tmp_path / "b"
    )
    expected = {k: x + k.startswith("bert") for k, x in tensors.items()}
    found, _ = written(tmp_path / "b")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(x, expected[k]) for k, x in found.items())
    # A module that is asked for by its own name is missed.
    config = {"target_modules": ["dense", "decoder"], "bias": "all"}
    message = (
        r"adapts 'cls.decoder', .* set exclude_modules in adapter_config.json: \['cls.decoder'"
    )
    with pytest.raises(ValueError, match=message):
        hf.merge(base, adapter(tmp_path / "c", new, **config), tmp_path / "no")
    config["exclude_modules"] = ["cls.decoder"]
    hf.merge(base, adapter(tmp_path / "d", new, **config), tmp_path / "e")
    assert all(np.array_equal(x, expected[k]) for k, x in written(tmp_path / "e")[0].items())
    # One of the adapter's own layers is missed, too.
    less = {k: x for k, x in new.items() if "h.1" not in k}
    with pytest.raises(ValueError, match=r"h\.1\.dense"):
        hf.merge(base, adapter(tmp_path / "f", less, target_modules=["dense"]), tmp_path / "no")
    assert not (tmp_path / "no").exists()
