"""Tied tables and heads in small files: what is written, what is refused, and the ways out."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax
from lora_jax.cli import main
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


CLASS = {"parent_library": "transformers.models.gpt2.modeling_gpt2"}


@pytest.mark.parametrize(
    ("module", "beside", "config", "refused"),
    [
        ("wte", {}, {}, True),
        ("wte", {}, {"auto_mapping": CLASS | {"base_model_class": "GPT2LMHeadModel"}}, True),
        ("wte", {}, {"auto_mapping": CLASS | {"base_model_class": "GPT2Model"}}, False),
        ("wte", {}, {"auto_mapping": {"base_model_class": "GPT2Model"}}, True),
        ("wte", {}, {"task_type": "FEATURE_EXTRACTION"}, False),
        ("wte", {"head": {"bias": (7,)}}, {}, True),
        ("wte", {"lm_head": {"kernel": (4, 7)}}, {}, False),
        ("wte", {"word_embeddings": {"embedding": (7, 4)}}, {}, True),
        ("wpe", {}, {"task_type": "CAUSAL_LM"}, False),
        ("items", {}, {}, False),
        ("items", {}, {"task_type": "CAUSAL_LM"}, True),
    ],
)
@pytest.mark.parametrize("is_full", [False, True])
def test_a_table_that_may_be_tied_by_what_is_known(
    module, beside, config, refused, is_full, tmp_path
):
    ones = {m: {k: jnp.ones(shape) for k, shape in own.items()} for m, own in beside.items()}
    params = {module: {"embedding": jnp.asarray(TABLE)}, "q": {"kernel": jnp.ones((4, 4))}} | ones
    if is_full:
        factors = {f"q.lora_{k}.weight": np.ones(s, "f") for k, s in (("A", (1, 4)), ("B", (4, 1)))}
        more = {"target_modules": ["q"], "modules_to_save": [module]} | config
        ours = adapter(tmp_path / "a", factors | {f"{module}.weight": TABLE + 1}, **more)
    else:
        ours = of_table(tmp_path / "a", module, **config)
    if not refused:
        peft.load(ours, params)
        return
    with pytest.raises(ValueError, match=rf"'{module}/embedding' is an .* or may be: tied.*layout"):
        peft.load(ours, params)


def test_an_adapter_of_the_lookups_alone_of_a_tied_model(tmp_path):
    """It is refused where one leaf is table and head; the files have them apart."""
    base = model(tmp_path / "m", {"wte.weight": TABLE}, model_type="gpt2")
    params = hf.load(base, {"wte": {"embedding": jnp.zeros((7, 4))}})
    ours = of_table(tmp_path / "a", "transformer.wte")
    names = {"wte": "transformer.wte"}
    with pytest.raises(ValueError, match=r"tied\. .*io\.hf\.merge adds it to the model's files"):
        peft.load(ours, params, names=names)
    hf.merge(base, ours, tmp_path / "out")
    found, config = written(tmp_path / "out")
    assert np.allclose(found["transformer.wte.weight"], TABLE + 1)
    assert np.array_equal(found["lm_head.weight"], TABLE)
    assert config["tie_word_embeddings"] is False
    lora_params = lora_jax.lorafy(params, 1, targets=".*")
    with pytest.raises(ValueError, match=r"tied\. .* Merge it, .* hf\.save"):
        peft.save(tmp_path / "no", lora_params, names=names)
    assert not (tmp_path / "no").exists()
    hf.save(tmp_path / "tied", lora_jax.merge(lora_params), source=base)
    peft.save(tmp_path / "yes", lora_params, names=names, task_type="FEATURE_EXTRACTION")


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


GPT2 = {"wte": {"embedding": jnp.asarray(TABLE)}}
APART, TOGETHER = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_save_writes_the_head_that_a_configuration_unties(prefix, tmp_path):
    base = model(tmp_path / "m", {prefix + "wte.weight": TABLE}, model_type="gpt2")
    names = {"(wte)": r"transformer.\1", "(lm_head)": r"\1"}
    hf.save(tmp_path / "out", {"wte": GPT2["wte"]}, source=base, names=names, config=APART)
    found, config = written(tmp_path / "out")
    assert found.keys() == {"transformer.wte.weight", "lm_head.weight"}
    assert np.array_equal(found["lm_head.weight"], TABLE)
    assert config["tie_word_embeddings"] is False
    hf.save(tmp_path / "tied", {"wte": GPT2["wte"]}, source=base, names=names)
    assert written(tmp_path / "tied")[0].keys() == {prefix + "wte.weight"}


def test_save_of_a_head_of_its_own_beside_a_tied_table(tmp_path):
    """The messages' remedies work, one after the other."""
    base = model(tmp_path / "m", {"transformer.wte.weight": TABLE}, model_type="gpt2")
    both = GPT2 | {"lm_head": {"kernel": jnp.asarray(TABLE.T + 1)}}
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"pass new='lm_head/kernel' and config=\{'tie_word_"):
        hf.save(out, both, source=base)
    with pytest.raises(ValueError, match=r"is tied to .* they differ: .* Pass config=\{'tie_word_"):
        hf.save(out, both, source=base, new="lm_head/kernel")
    assert not out.exists()
    hf.save(out, both, source=base, new="lm_head/kernel", config=APART)
    assert np.array_equal(written(out)[0]["lm_head.weight"], TABLE + 1)
    with pytest.raises(ValueError, match=r"is tied to .* by config\.json, and they differ"):
        hf.save(tmp_path / "no", both, source=out, config=TOGETHER)
    with pytest.raises(ValueError, match=r"is tied to .* by config\.json, and they differ"):
        hf.merge(out, {}, tmp_path / "no", config=TOGETHER)
    with pytest.raises(ValueError, match=r"is tied to .* by config\.json, and they differ"):
        hf.save(tmp_path / "no", both, "gpt2", config={"model_type": "gpt2"})
    hf.save(tmp_path / "again", both, source=out)
    assert np.array_equal(written(tmp_path / "again")[0]["lm_head.weight"], TABLE + 1)


def test_save_of_a_class_whose_head_is_not_there(tmp_path):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    with pytest.raises(ValueError, match=r"no 'lm_head\.weight', which GPT2LMHeadModel would"):
        hf.save(tmp_path / "out", GPT2, "gpt2", config=config | APART)
    assert not (tmp_path / "out").exists()
    hf.save(tmp_path / "one", GPT2, "gpt2", config=config | TOGETHER)
    hf.save(tmp_path / "two", GPT2, "gpt2", config=APART | {"model_type": "gpt2"})


@pytest.mark.parametrize("config", [TOGETHER, {"decoder": TOGETHER}])
def test_a_tied_head_of_unknown_name_is_not_parted(config, tmp_path):
    names = {"emb": "emb.wte"}
    base = model(tmp_path / "m", {"emb.wte.weight": TABLE}, model_type="mine", **config)
    apart = {key: APART if key == "decoder" else False for key in config}
    params = {"emb": GPT2["wte"]}
    for write in (
        lambda: hf.save(tmp_path / "out", params, source=base, names=names, config=apart),
        lambda: hf.merge(base, {}, tmp_path / "out", config=apart),
    ):
        with pytest.raises(ValueError, match=r"a head is tied .* is not known: make it known: hf"):
            write()
        assert not (tmp_path / "out").exists()
    hf.FAMILIES["mine"] = hf.Family(tied_head={"lm_head.weight": "emb.wte.weight"})
    try:
        hf.merge(base, {}, tmp_path / "out", config=apart)
    finally:
        del hf.FAMILIES["mine"]
    assert np.array_equal(written(tmp_path / "out")[0]["lm_head.weight"], TABLE)


def test_an_encoder_that_is_tied_to_its_decoder_is_refused(tmp_path):
    tensors = {"decoder.wte.weight": TABLE}
    base = model(tmp_path / "m", tensors, model_type="encoder-decoder", tie_encoder_decoder=True)
    ours = of_table(tmp_path / "a", "decoder.wte")
    with pytest.raises(ValueError, match=r"are tied \(tie_encoder_decoder\)"):
        hf.merge(base, ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_t5_has_no_head_of_its_own_beside_a_tied_one(tmp_path):
    base = model(tmp_path / "m", {"shared.weight": TABLE}, model_type="t5")
    params = {"shared": GPT2["wte"]}
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is tied: its model scales"):
        hf.save(tmp_path / "out", params, source=base, config=APART)
    assert not (tmp_path / "out").exists()


FAMILY = {"gpt2": ("transformer.", "wte"), "llama": ("model.", "embed_tokens")}


@pytest.mark.parametrize("kind", ["head", "table", "table and full head", "rows"])
@pytest.mark.parametrize("is_bare", [False, True])
@pytest.mark.parametrize("family", FAMILY)
def test_commands_take_what_merge_takes(family, is_bare, kind, tmp_path, monkeypatch, capsys):
    """An adapter of PEFT's and the same in our form, of a model whose table is its head."""
    monkeypatch.chdir(tmp_path)
    prefix, table = FAMILY[family]
    tensors = {("" if is_bare else prefix) + f"{table}.weight": TABLE}
    model(tmp_path / "model", tensors, model_type=family, **TOGETHER)
    if kind == "head":
        of_head(tmp_path / "peft", "lm_head")
    elif kind == "rows":
        rows = {f"{prefix}{table}.token_adapter.trainable_tokens_delta": np.ones((2, 4), "float32")}
        listed = {"target_modules": [], "trainable_token_indices": {table: [1, 5]}}
        adapter(tmp_path / "peft", rows, **listed)
    else:
        of_table(tmp_path / "peft", prefix + table)
    if kind == "table and full head":
        path = tmp_path / "peft" / "adapter_model.safetensors"
        found = safetensors.numpy.load_file(path) | {PRE + "lm_head.weight": TABLE + 1}
        safetensors.numpy.save_file(found, path)
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        config["modules_to_save"] = ["lm_head"]
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))

    def cli(*words, status=0):
        assert main(list(words)) == status, capsys.readouterr().err
        return capsys.readouterr()

    hf.merge("model", "peft", "out")
    cli("convert", "peft", "ours", "--to", "safetensors", "--like", "model")
    for name in ("peft", "ours"):
        cli("merge", "model", name, f"{name} out")
        assert cli("diff", "out", f"{name} out").out == "equal\n"
        cli("inspect", name, "--base", "model")
        assert cli("verify", name, "model").out.startswith("yes")
    words = ("convert", "ours", "back", "--to", "peft")
    if kind == "rows":
        assert "no weight has factors" in cli(*words, status=2).err
    else:
        if is_bare and kind != "head":
            assert f"may lack the prefix '{prefix}'" in cli(*words, status=2).err
        cli(*words, "--like", "model")
        own = (tmp_path / name / "adapter_model.safetensors" for name in ("peft", "back"))
        one, two = map(safetensors.numpy.load_file, own)
        assert one.keys() == two.keys()
        assert all(np.allclose(one[name], two[name]) for name in one)
    assert not list(tmp_path.glob(".*"))


def test_merge_takes_rows_of_parameters_of_ours(tmp_path, monkeypatch):
    """The new rows are known with the table's, which is in the model's files."""
    monkeypatch.chdir(tmp_path)
    base = model(tmp_path / "m", {"wte.weight": TABLE}, model_type="gpt2")
    params = {"transformer": {"wte": {"embedding": jnp.asarray(TABLE)}}}
    lora_params = lora_jax.lorafy(params, targets=[], rows={".*wte.*": [1, 5]})
    (key,) = lora_params.adapter.factors
    rows = lora_params.adapter.factors[key].map(lambda name, x: x + 1 if name == "b" else x)
    own = lora_jax.LoraParams(params, lora_jax.Adapter({key: rows}))
    lora_jax.io.safetensors.save("own", own)
    assert main(["merge", str(base), "own", "out"]) == 0
    expected = TABLE.copy()
    expected[[1, 5]] += 1
    assert np.allclose(written(tmp_path / "out")[0]["wte.weight"], expected)
