"""Inspecting adapters and models, by the command line."""

import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as library
from cli_files import (
    EQUAL,
    PARAMS,
    PLAIN,
    adapted,
    assert_same,
    damage,
    floats,
    rank_of,
    run,
    tensors,
    updates,
)
from helpers import randomize_b, tolerance

import lora_jax
from lora_jax._weights.paths import flatten
from lora_jax.cli import main
from lora_jax.cli._read.match import canonical
from lora_jax.io import orbax, peft, safetensors


@pytest.mark.parametrize("name", ["adapter", "native", "orbax", "bare"])
def test_inspect_knows_all_formats_and_their_numbers(name, cli):
    expected = {canonical(p): x for p, x in updates(adapted({}, 2)).items()}
    found = cli("inspect", name, "--json")
    assert found["what"] == "adapter"
    rows = {canonical(row["path"]): row for row in found["entries"]}
    assert rows.keys() == expected.keys()
    for path, x in expected.items():
        row = rows[path]
        assert row["norm"] == pytest.approx(np.linalg.norm(x), rel=1e-9)
        assert row["effective_rank"] == pytest.approx(rank_of(x), rel=1e-7)
        assert (row["rank"], row["alpha"], row["scale"]) == (2, 16, 8)
        assert row["shape"] == list(x.shape)
        assert row["parameters"] == 2 * sum(x.shape)
    assert found["totals"]["trainable"] == sum(row["parameters"] for row in rows.values())
    text = cli("inspect", name)
    (header,) = (line for line in text.splitlines() if "alpha" in line)
    for row in rows.values():
        (line,) = (line for line in text.splitlines() if line.startswith(row["path"] + " "))
        assert f"{row['norm']:.4g}" in line.split()
        assert f"{row['effective_rank']:.1f}" in line.split()
        columns = dict(zip(header.split(), line.split(), strict=True))
        assert (columns["rank"], columns["alpha"]) == ("2", "16")
    total = found["totals"]["trainable"]
    assert f"trainable params: {total:,}" in text
    if name in ("native", "orbax"):
        every = found["totals"]["all"]
        assert every == total + sum(x.size for x in jax.tree.leaves(PARAMS))
        assert f"|| all params: {every:,} || trainable%: {100 * total / every:.3g}" in text
        assert ("contents of 10" in text) == (name == "native")
    assert ("tiny/llama" in text) == (name == "adapter")
    assert ("not recorded" in text) == (name == "bare")


@pytest.mark.parametrize(
    ("name", "base"), [("adapter", "model"), ("native", "params"), ("native", "model")]
)
def test_inspect_compares_updates_with_weights(name, base, cli):
    found = cli("inspect", name, "--base", base, "--json")
    weights = {p: np.asarray(x, np.float64) for p, x in flatten(PARAMS)[0].items()}
    expected = {canonical(p): (x, weights[p]) for p, x in updates(adapted({}, 2)).items()}
    for row in found["entries"]:
        x, w = expected[canonical(row["path"])]
        assert row["relative"] == pytest.approx(np.linalg.norm(x) / np.linalg.norm(w), rel=1e-9)
    assert "|dW|/|W|" in cli("inspect", name, "--base", base)


def test_inspect_shows_what_is_beside_plain_factors(cli):
    for name in ("dora", "dora_native"):
        text = cli("inspect", name)
        assert "DoRA: 4 of 4 weights" in text
        (line,) = (line for line in text.splitlines() if line.startswith("score"))
        assert line.split()[2:4] == ["full", "full"]
        assert line.endswith("24")
    rows = {r["path"]: r for r in cli("inspect", "more", "--json")["entries"]}
    assert rows["model.embed_tokens (rows)"]["kind"] == "rows"
    assert rows["model.layers.0.self_attn.q_proj.bias"]["parameters"] == 8
    found = cli("inspect", "more_native", "--base", "params", "--json")
    rows = {r["path"]: r for r in found["entries"]}
    assert rows["model/embed_tokens/embedding"]["kind"] == "rows"
    norm = rows["model/layers/0/self_attn/q_proj/bias"]["norm"]
    assert norm == pytest.approx(np.sqrt(8), rel=tolerance())


def test_inspect_sorts_and_cuts(cli):
    rows = cli("inspect", "other", "--sort", "norm", "--json")["entries"]
    norms = [row["norm"] for row in rows]
    assert norms == sorted(norms, reverse=True)
    assert [
        row["rank"] for row in cli("inspect", "other", "--sort", "rank", "--json")["entries"]
    ] == [3, 3, 2, 2]
    text = cli("inspect", "other", "--top", "1", "--sort", "norm")
    assert "... 1 of 4 rows" in text
    assert text.count("self_attn") == 1


def test_inspect_takes_the_last_step(cli, here):
    text = cli("inspect", "run")
    assert "run/10: adapter in an Orbax checkpoint, step 10, the last of 2, " in text
    assert (
        cli("inspect", "run/5", "--json")["entries"] != cli("inspect", "run", "--json")["entries"]
    )


def test_inspect_says_whether_the_base_is_a_changed_one(cli, here):
    with orbax.Checkpointer("pissa") as checkpointer:
        checkpointer.save(0, lora_jax.lorafy(PARAMS, 2, init="pissa", **PLAIN))
    text = cli("inspect", "pissa")
    assert "step 0, the last of 1, on what its initializer left of its base" in text
    config = json.loads((here / "adapter" / peft.CONFIG).read_text()) | {
        "init_lora_weights": "olora"
    }
    (here / "adapter" / peft.CONFIG).write_text(json.dumps(config))
    assert "on what olora leaves of its base" in cli("inspect", "adapter")


def test_stacked_leaves_are_one_row(cli, here):
    params = {"query": {"kernel": floats(3, 6, 2, 5)}}
    lora_params = lora_jax.lorafy(params, 2, layout={".*": "bioo"}, rslora=True)
    lora_params = randomize_b(lora_params)
    safetensors.save("stacked", lora_params)
    (row,) = cli("inspect", "stacked", "--json")["entries"]
    f = lora_params.adapter.factors["query/kernel"]
    x = float(f.scale) * np.einsum("lir,lrhd->lihd", f.a, f.b, dtype=np.float64)
    assert row["shape"] == [3, 6, 10]
    assert row["norm"] == pytest.approx(np.linalg.norm(x), rel=1e-9)
    ranks = [rank_of(layer.reshape(6, 10)) for layer in x]
    assert row["effective_rank"] == pytest.approx(np.mean(ranks), rel=1e-7)


def test_peft_modules_of_all_kinds(cli, here):
    params = {
        "conv": {"kernel": floats(3, 3, 4, 5)},
        "experts": {"up": floats(3, 6, 7)},
        "wte": {"embedding": floats(9, 4)},
        "q": {"kernel": floats(5, 6)},
    }
    layout = {"conv.*": "iiio", "experts.*": "bio", ".*": "io"}
    lora_params = lora_jax.lorafy(params, 2, targets=".*", layout=layout, rslora=True)
    lora_params = randomize_b(lora_params)
    task = {"task_type": "FEATURE_EXTRACTION"}
    peft.save("kinds", lora_params, layout=layout, rslora=True, **task)
    rows = {row["path"]: row for row in cli("inspect", "kinds", "--json")["entries"]}
    kinds = {path: row["kind"] for path, row in rows.items()}
    assert kinds == {"conv": "Conv", "experts.up": "Parameter", "q": "Linear", "wte": "Embedding"}
    for path, f in lora_params.adapter.factors.items():
        row = rows[next(p for p in kinds if path.startswith(p.replace(".", "/")))]
        batch = f.layout.count("b")
        a = np.asarray(f.a, np.float64).reshape(*f.a.shape[:batch], -1, 2)
        b = np.asarray(f.b, np.float64).reshape(*f.b.shape[:batch], 2, -1)
        expected = float(f.scale) * np.linalg.norm(a @ b)  # the scale is in float32
        assert row["norm"] == pytest.approx(expected, rel=tolerance())
        assert row["alpha"] == pytest.approx(16, rel=tolerance())  # the configuration says rsLoRA
    cli("convert", "kinds", "native_kinds", "--to", "safetensors")
    cli("convert", "native_kinds", "back", "--to", "peft")
    assert_same(tensors("kinds"), tensors("back"))


@pytest.mark.parametrize("name", ["model", "params", "model/model.safetensors"])
def test_inspect_shows_models(name, cli):
    found = cli("inspect", name, "--spectrum", "--json")
    assert found["what"] == "model"
    leaves = flatten(PARAMS)[0].items()
    leaves = {canonical(p): np.asarray(x, np.float64) for p, x in leaves}
    rows = {canonical(row["path"].replace("scale", "weight")): row for row in found["entries"]}
    assert found["totals"]["parameters"] == sum(x.size for x in leaves.values())
    for path, x in leaves.items():
        row = rows[canonical(path.replace("scale", "weight"))]
        assert row["norm"] == pytest.approx(np.linalg.norm(x), rel=1e-9)
        if x.ndim == 2:
            assert row["effective_rank"] == pytest.approx(rank_of(x), rel=tolerance())
        else:
            assert row["effective_rank"] is None
    text = cli("inspect", name, "--top", "3", "--sort", "norm")
    assert "... 3 of 10 rows" in text
    assert "10 tensors, 336 parameters, float32" in text


def test_orbax_parameters_of_any_tree_are_read_one_by_one(cli, here):
    tree = {
        "params": {
            "a.b": [floats(2, 3), (floats(4), jnp.asarray(np.ones(5), jnp.bfloat16))],
            "it's": {"100%": floats(2)},
            "n": np.arange(6, dtype=np.int64).reshape(2, 3),
            "u": jnp.asarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
        },
        "key": jax.random.key(3),
    }
    orbax.save_params("odd", tree)
    rows = {row["path"]: row for row in cli("inspect", "odd", "--json")["entries"]}
    assert {p: r["dtype"] for p, r in rows.items()} == {
        "a.b/0": "float32",
        "a.b/1/0": "float32",
        "a.b/1/1": "bfloat16",
        "it's/100%": "float32",
        "n": "int64",
        "u": "uint8",
        "key": "uint32",
    }
    expected = np.linalg.norm(np.asarray(tree["params"]["a.b"][0], np.float64))
    assert rows["a.b/0"]["norm"] == pytest.approx(expected, rel=1e-9)
    assert rows["n"]["norm"] is None


def test_an_adapter_without_a_tensor_is_refused(refused):
    library.save_file({}, "adapter/adapter_model.safetensors")
    safetensors.save("nothing", lora_jax.Adapter({}))
    for words in (
        ["inspect", "adapter"],
        ["inspect", "nothing"],
        ["merge", "model", "nothing", "out"],
    ):
        refused(*words, match="is an adapter without a tensor: nothing was adapted")


def test_inspect_refuses(refused, here):
    (here / "empty").mkdir()
    (here / "text").write_text("hello")
    (here / "pickled").mkdir()
    (here / "pickled" / "pytorch_model.bin").write_text("")
    (here / "outer").mkdir()
    shutil.copytree("adapter", "outer/default")
    refused("inspect", "nowhere", match="nowhere: no such file or folder")
    refused("inspect", "empty", match="empty is empty: expected a PEFT adapter")
    refused("inspect", "text", match="text is no complete safetensors file")
    refused("inspect", "pickled", match=r"pytorch_model\.bin is a pickle")
    refused("inspect", "outer", match="an adapter is in a folder within: default")
    refused("inspect", "adapter/adapter_model.safetensors", match="give the folder of both")
    refused("inspect", "model", "--base", "model", match="--base is for adapters")
    refused("inspect", "model", "--sort", "rank", match="want --spectrum")
    refused("inspect", "adapter", "--spectrum", match="--spectrum is for models")
    refused("inspect", "adapter", "--base", "other", match="other is an adapter, expected a model")
    refused("inspect", "adapter", "--top", "0", match="'0': expected an integer, at least 1")
    refused("inspect", "adapter", "--sort", "size", match="argument --sort: invalid choice: 'size'")
    refused(
        "inspect", "adapter", "--what", match=r"there is no --what \(see lora-jax inspect --help"
    )
    refused("inspect", match="the following arguments are required: PATH")
    params = {"q_proj": {"kernel": floats(8, 8)}}
    peft.save("stranger", randomize_b(lora_jax.lorafy(params, 2)))
    os.rename("stranger", "adapter/within")  # nothing new beside
    refused("inspect", "adapter/within", "--base", "model", match="no tensor for 'q_proj'")
    wrong = {"model": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": floats(9, 8)}}}}}}
    peft.save("adapter/wrong", randomize_b(lora_jax.lorafy(wrong, 2)))
    refused("inspect", "adapter/wrong", "--base", "model", match=r"of one of shape \(9, 8\): it is")


def test_damaged_adapters_are_refused(refused, here):
    def nan(found):
        found[next(iter(found))][0, 0] = np.nan

    def orphan(found):
        del found[next(n for n in found if "lora_B" in n)]

    def headless(found):
        del found[next(n for n in found if "lora_A" in n)]

    def narrow(found):
        name = next(n for n in found if "lora_A" in n)
        found[name] = found[name][:1]

    for change, match in (
        (nan, "has values that are not finite"),
        (orphan, "and not .*lora_B"),
        (headless, "and not the factor that goes with it"),
        (narrow, "which do not fit each other or rank 2"),
    ):
        shutil.copytree("adapter", "params/bad")
        damage("params/bad", change)
        refused("inspect", "params/bad", match=match)
        refused("convert", "params/bad", "out", "--to", "safetensors", match=match)
        refused("merge", "model", "params/bad", "out", match=match)
        refused("verify", "params/bad", "model", match=match)
        shutil.rmtree("params/bad")
    data = bytearray((here / "native").read_bytes())
    data[-3] ^= 1
    (here / "native").write_bytes(data)
    refused("diff", "native", "bare", match="native is damaged")
    cut = (here / "model" / "model.safetensors").read_bytes()[:-9]
    (here / "model" / "model.safetensors").write_bytes(cut)
    refused("inspect", "model", match="no complete safetensors file")
    refused("merge", "model", "adapter", "out", match="no complete safetensors file")


def test_damaged_parameters_are_noticed(here):
    files = (p for p in (here / "params" / "params").rglob("*") if p.is_file())
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 255
    largest.write_bytes(data)
    done = run("diff", "params", "params")  # apart, since Orbax leaves an event loop behind
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("lora-jax diff: .*params.* damaged.*\n", done.stderr)


def test_parameters_that_are_not_those_that_were_written(refused, here, monkeypatch):
    from lora_jax.io.orbax import _tensors

    record, notes = _tensors.config_of(str(here / "params"))
    first, (label, kind, known) = next(iter(notes["params"].items()))

    def said(note):
        changed = {"params": notes["params"] | {first: note}}
        monkeypatch.setattr(_tensors, "config_of", lambda _: (record, changed))

    said([label, kind, known[:-1] + "x"])
    refused("diff", "params", "params", match="params is damaged: params.* is not what was written")
    said(["params['other']", kind, known])
    refused("diff", "params", "params", match=r"params is damaged: params\['other'\] is not in it")


def test_experts_with_wrong_factors_are_refused(here, refused):
    params = {"experts": {"up": floats(3, 6, 7)}}
    lora_params = lora_jax.lorafy(params, 2, targets=".*", layout={".*": "bio"})
    peft.save("params/experts", lora_params)

    def narrow(found):
        name = next(n for n in found if "lora_A" in n)
        found[name] = found[name][:5]

    damage("params/experts", narrow)
    refused("inspect", "params/experts", match="do not fit each other or rank 2")


def test_models_with_numbers_that_are_not(cli):
    library.save_file({"q": np.full((2, 2), np.nan, np.float32)}, "nans")
    (row,) = cli("inspect", "nans", "--spectrum", "--json")["entries"]
    assert row["norm"] is row["effective_rank"] is None


def test_gguf_files_are_models(cli, here, capsys):
    pytest.importorskip("gguf", reason="gguf, which writes the file, is not installed")
    from gguf_files import write_model

    write_model(here / "m.gguf")
    found = cli("inspect", "m.gguf", "--json")
    assert found["format"] == "gguf"
    q = {"kernel": jax.ShapeDtypeStruct((32, 32), jnp.float32)}
    params = {"model": {"layers": {str(k): {"self_attn": {"q_proj": q}} for k in range(2)}}}
    leaves = jax.tree.map(lambda x: floats(*x.shape), params)
    peft.save("of_gguf", randomize_b(lora_jax.lorafy(leaves, 2)))
    cli("verify", "of_gguf", "m.gguf")
    assert main(["merge", "m.gguf", "of_gguf", "out"]) == 0
    out, err = capsys.readouterr()
    assert "2 of 21 tensors changed" in out
    assert err.startswith("lora-jax: note: no tokenizer is written")
    assert "19 of 21 entries" in cli("diff", "m.gguf", "out", status=1)
    cli("extract", "m.gguf", "out", "again", "--rank", "2")
    cli("diff", "again", "of_gguf", *EQUAL)


def test_a_model_beside_what_an_adapter_left(cli, here):
    """Trainers leave an adapter's configuration beside merged models; some keep its tensors."""
    expected = cli("inspect", "tuned")
    shutil.copy("adapter/adapter_config.json", "tuned")
    assert cli("inspect", "tuned").partition(",")[0] == expected.partition(",")[0]
    cli("merge", "tuned", "adapter", "out")
    assert not Path("out/adapter_config.json").exists()
    cli("extract", "model", "tuned", "found", "--rank", "2")
    cli("diff", "found", "adapter", *EQUAL)
    shutil.copy("adapter/adapter_model.safetensors", "tuned")
    assert "PEFT adapter" in cli("inspect", "tuned")  # as transformers takes it
    cli("verify", "tuned", "tuned")  # each as what it is asked for
    cli("extract", "model", "tuned", "again", "--rank", "2")
