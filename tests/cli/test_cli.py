"""The command line: what it prints, against NumPy that builds every update, and how it fails."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as library
from helpers import assert_close, drawn, randomize_b, tolerance

import lora_jax
from lora_jax._weights.paths import flatten
from lora_jax.cli import main
from lora_jax.cli._parser import parser
from lora_jax.cli._read.match import canonical
from lora_jax.cli._show import Show, plain, size
from lora_jax.io import _files as _files
from lora_jax.io import hf, orbax, peft, safetensors
from lora_jax.io.hf import _shards as _shards

RNG = np.random.default_rng(0)
COMMANDS = ("inspect", "merge", "convert", "diff", "extract", "verify", "completion")


def floats(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def parameters():
    layers = {
        str(k): {
            "self_attn": {
                "q_proj": {"kernel": floats(8, 8), "bias": floats(8)},
                "v_proj": {"kernel": floats(8, 4)},
            },
            "norm": {"scale": floats(8)},
        }
        for k in range(2)
    }
    model = {"embed_tokens": {"embedding": floats(11, 8)}, "layers": layers}
    return {"model": model, "score": {"kernel": floats(8, 3)}}


PARAMS = parameters()
PLAIN = {"targets": [".*q_proj/kernel", ".*v_proj/kernel"]}
DORA = PLAIN | {"dora": True, "full": "score.*"}
EQUAL = ("--tolerance", f"{tolerance():g}")  # to rounding
MORE = PLAIN | {"rows": {".*embed.*": [3, 5]}, "bias": "lora_only"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One model and adapters of it, in all formats; the names of the help's examples."""
    folder = tmp_path_factory.mktemp("made")
    with jax.numpy_dtype_promotion("strict"):
        hf.save(folder / "model", PARAMS, hf.Family())
        (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
        orbax.save_params(folder / "params", PARAMS)
        lora_params = adapted({}, 2)
        peft.save(folder / "adapter", lora_params, base_model="tiny/llama")
        safetensors.save(folder / "native", lora_params, content=True, about="of mine")
        safetensors.save(folder / "bare", lora_params.adapter)
        orbax.save(folder / "orbax", lora_params)
        other = adapted({}, {".*q_proj.*": 3, ".*": 2}, seed=7)
        peft.save(folder / "other", other)
        safetensors.save(folder / "other_native", other)
        for name, options in (("dora", DORA), ("more", MORE)):
            lora_params = adapted(options, 2, seed=3)
            full = {p: x + 1 for p, x in lora_params.adapter.full.items()}
            adapter = lora_jax.Adapter(lora_params.adapter.factors, full)
            lora_params = lora_jax.LoraParams(PARAMS, adapter)
            peft.save(folder / name, lora_params)
            safetensors.save(folder / f"{name}_native", lora_params)
        with orbax.Checkpointer(folder / "run") as checkpointer:
            for step in (5, 10):
                checkpointer.save(step, adapted({}, 2, seed=step))
        hf.save(folder / "tuned", lora_jax.merge(adapted({}, 2)), source=folder / "model")
        orbax.save_params(folder / "tuned_params", lora_jax.merge(adapted({}, 2)))
    return folder


def adapted(options, rank, seed=1):
    options = {"init": drawn} | PLAIN | options
    return randomize_b(lora_jax.lorafy(PARAMS, rank, **options), seed)


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of them to work in."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def cli(here, capsys):
    """Run a command: its status and stdout; nothing may be on stderr."""

    def run(*words, status=0):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, err) == (status, "")
        return json.loads(out) if "--json" in words else out

    return run


@pytest.fixture
def refused(here, capsys):
    """Run a command that must fail with one line, and leave nothing behind."""

    def run(*words, match):
        before = sorted(p.name for p in here.iterdir())
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert err.startswith(f"lora-jax {words[0]}: ")
        assert re.search(match, err), err
        assert sorted(p.name for p in here.iterdir()) == before

    return run


def updates(lora_params):
    """Every update, built, in float64."""
    return {
        path: float(f.scale) * np.asarray(f.a, np.float64) @ np.asarray(f.b, np.float64)
        for path, f in lora_params.adapter.factors.items()
    }


def rank_of(x):
    s = np.linalg.svd(x, compute_uv=False)
    p = s[s > 1e-9 * s[0]] / s.sum()
    return np.exp(-(p * np.log(p)).sum())


def tensors_of(folder):
    return {name: t.read() for name, t in _shards.tensors_in(folder).items()}


# Looking into


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
        assert line.split()[2:4] == ["whole", "whole"]
        assert line.endswith("24")
    rows = {r["path"]: r for r in cli("inspect", "more", "--json")["entries"]}
    assert rows["model.embed_tokens (rows)"]["kind"] == "rows"
    assert rows["model.layers.0.self_attn.q_proj.bias"]["parameters"] == 8
    found = cli("inspect", "more_native", "--base", "params", "--json")
    rows = {r["path"]: r for r in found["entries"]}
    assert rows["model/embed_tokens/embedding[[3, 5]]"]["kind"] == "rows"
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
    peft.save("kinds", lora_params, layout=layout, rslora=True)
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


def tensors(folder):
    return library.load_file(Path(folder) / peft.TENSORS)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype
        assert np.array_equal(x, other[name]), name


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


def test_inspect_refuses(refused, here):
    (here / "empty").mkdir()
    (here / "text").write_text("hello")
    (here / "pickled").mkdir()
    (here / "pickled" / "pytorch_model.bin").write_text("")
    (here / "outer").mkdir()
    shutil.copytree("adapter", "outer/default")
    refused("inspect", "nowhere", match="nowhere: no such file or folder")
    refused("inspect", "empty", match="empty is empty: expected a PEFT adapter")
    refused("inspect", "text", match="text is no whole safetensors file")
    refused("inspect", "pickled", match=r"pytorch_model\.bin is a pickle")
    refused("inspect", "outer", match="an adapter is in a folder within: default")
    refused("inspect", "adapter/adapter_model.safetensors", match="give the folder of both")
    refused("inspect", "model", "--base", "model", match="--base is for adapters")
    refused("inspect", "model", "--sort", "rank", match="want --spectrum")
    refused("inspect", "adapter", "--spectrum", match="--spectrum is for models")
    refused("inspect", "adapter", "--base", "other", match="other is an adapter, expected a model")
    refused("inspect", "adapter", "--top", "0", match="'0': expected a whole number, at least 1")
    refused("inspect", "adapter", "--sort", "size", match="argument --sort: invalid choice: 'size'")
    refused("inspect", "adapter", "--what", match="unrecognized arguments: --what")
    refused("inspect", match="the following arguments are required: PATH")
    params = {"q_proj": {"kernel": floats(8, 8)}}
    peft.save("stranger", randomize_b(lora_jax.lorafy(params, 2)))
    os.rename("stranger", "adapter/within")  # nothing new beside
    refused("inspect", "adapter/within", "--base", "model", match="no tensor for 'q_proj'")
    wrong = {"model": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": floats(9, 8)}}}}}}
    peft.save("adapter/wrong", randomize_b(lora_jax.lorafy(wrong, 2)))
    refused("inspect", "adapter/wrong", "--base", "model", match=r"of one of shape \(9, 8\): it is")


def damaged(path, change):
    found = tensors(path)
    change(found)
    library.save_file(found, Path(path) / peft.TENSORS, metadata={"format": "pt"})


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
        damaged("params/bad", change)
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
    refused("inspect", "model", match="no whole safetensors file")
    refused("merge", "model", "adapter", "out", match="no whole safetensors file")


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
    from lora_jax.cli._read import orbax as _orbax

    record, notes = _orbax.config_of(str(here / "params"))
    first, (label, kind, known) = next(iter(notes["params"].items()))

    def said(note):
        changed = {"params": notes["params"] | {first: note}}
        monkeypatch.setattr(_orbax, "config_of", lambda _: (record, changed))

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

    damaged("params/experts", narrow)
    refused("inspect", "params/experts", match="do not fit each other or rank 2")


def test_models_with_numbers_that_are_not(cli):
    library.save_file({"q": np.full((2, 2), np.nan, np.float32)}, "nans")
    (row,) = cli("inspect", "nans", "--spectrum", "--json")["entries"]
    assert row["norm"] is row["effective_rank"] is None


def test_gguf_files_are_models(cli, here, capsys):
    pytest.importorskip("gguf", reason="gguf, which writes the file, is not installed")
    from gguf_files import written

    written(here / "m.gguf")
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


# Merging


@pytest.mark.parametrize(
    "name", ["adapter", "native", "orbax", "bare", "dora", "dora_native", "more"]
)
def test_merge_writes_what_merge_computes(name, cli):
    options = {"dora": DORA, "more": MORE}.get(name.split("_")[0], {})
    lora_params = adapted(options, 2, seed=3 if options else 1)
    full = {p: x + 1 for p, x in lora_params.adapter.full.items()}
    adapter = lora_jax.Adapter(lora_params.adapter.factors, full)
    expected = lora_jax.merge(lora_jax.LoraParams(PARAMS, adapter))
    found = cli("merge", "model", name, "out", "--json")
    merged = hf.load("out", expected)
    assert_close(merged, expected)
    changed = sum(
        not np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(expected), strict=True)
    )
    assert found["tensors_changed"] == changed
    assert found["files"] == ["model.safetensors"]


def test_merge_of_what_was_peft_s(cli):
    cli("convert", "dora", "there", "--to", "orbax")
    cli("merge", "model", "there", "one")
    cli("merge", "model", "dora", "two")
    cli("merge", "model", "more_native", "three", "--like", "params")
    cli("merge", "model", "more", "four")
    assert cli("diff", "one", "two") == cli("diff", "three", "four", *EQUAL) == "equal\n"


def test_merge_weighs_and_shards(cli):
    words = (
        "merge",
        "model",
        "adapter",
        "other_native",
        "out",
        "--weight",
        "0.5",
        "--weight",
        "-2",
    )
    text = cli(*words, "--shard-size", "0.5kB", "--dtype", "float32")
    count = len(list(Path("out").glob("*.safetensors")))
    assert count > 1
    assert f"out: 4 of 10 tensors changed; {count} files of weights" in text
    other = adapted({}, {".*q_proj.*": 3, ".*": 2}, seed=7)
    expected = tensors_of("model")
    for weight, lora_params in ((0.5, adapted({}, 2)), (-2, other)):
        for path, x in updates(lora_params).items():
            expected[f"{canonical(path)}.weight"] = (
                expected[f"{canonical(path)}.weight"] + weight * x.T
            )
    for name, x in tensors_of("out").items():
        assert_close(x, np.asarray(expected[name], np.float64))


def test_merge_refuses(refused, here, monkeypatch):
    refused(
        "merge", "model", "adapter", "other", "out", "--weight", "1", match="1 weights for 2 ad"
    )
    refused("merge", "model", "adapter", "adapter/", "out", match="an adapter is there twice")
    refused("merge", "model", "adapter", "tuned", match="tuned exists: say --overwrite")
    refused(
        "merge", "model", "adapter", "no/out", match="no/out: there is no folder .*/no to write"
    )
    refused(
        "merge", "model", "adapter", "out", "--dtype", "float17", match="invalid choice: 'float17'"
    )
    refused(
        "merge", "model", "adapter", "out", "--shard-size", "5XB", match="'5XB': expected a size"
    )
    refused("merge", "nowhere", "adapter", "out", match="nowhere holds neither model")
    refused("merge", "model", "tuned", "out", match="tuned is a model or a file of tensors")
    refused("merge", "model", "out", match="the following arguments are required: OUT")
    refused("merge", "model", "dora", "other", "out", match="can neither be weighted nor summed")
    refused("merge", "model", "native", "out", "--names", "my", match="no such file, and no family")
    (here / "names.json").write_text('{"a": 1}')
    refused("merge", "model", "native", "out", "--names", "names.json", match="object of strings")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((os, "fsync"), (_shards, "_write_one"), (_files, "_put")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            refused("merge", "model", "adapter", "out", match="out: No space left on device")
            refused("merge", "model", "adapter", "tuned", "--overwrite", match="No space left")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        words = ("adapter", "out", "--to", "safetensors")
        refused("convert", *words, match="out: No space left on device")
        refused("extract", "model", "tuned", "out", "--rank", "1", match="out: No space left")


def test_merge_replaces_if_told_to(cli):
    before = tensors_of("tuned")
    cli("merge", "model", "other", "tuned", "--overwrite")
    assert any((x != before[name]).any() for name, x in tensors_of("tuned").items())


# Converting


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", ["safetensors", "orbax"])
def test_peft_there_and_back_is_the_same_bit_for_bit(to, dtype, cli):
    def narrow(found):
        found |= {name: x.astype(dtype) for name, x in found.items()}

    for name in ("adapter", "other"):
        damaged(name, narrow)
        cli("convert", name, f"{name}_there", "--to", to)
        assert cli("diff", name, f"{name}_there") == "equal\n"
        cli("convert", f"{name}_there", f"{name}_back", "--to", "peft")
        assert_same(tensors(name), tensors(f"{name}_back"))


@pytest.mark.parametrize("name", ["dora", "more"])
def test_what_is_more_than_factors_wants_the_model(name, cli, refused):
    if name == "more":
        words = ("convert", name, "there", "--to", "safetensors")
        refused(*words, match="is known together with the base's only: say --like")
    else:
        cli("convert", name, "alone", "--to", "safetensors")
        assert cli("diff", name, "alone") == "equal\n"
        refused(
            "convert", "alone", "back", "--to", "peft", match="without 'score/weight' means nothing"
        )
    cli("convert", name, "there", "--to", "safetensors", "--like", "model")
    if name == "more":
        refused("convert", "there", "back", "--to", "peft", match="needs what is in the base's")
    cli("convert", "there", "back", "--to", "peft", "--like", "model")
    assert_same(tensors(name), tensors("back"))


def test_paths_of_ours_by_a_tree_and_names(cli, here, refused):
    cli("convert", "adapter", "as_ours", "--to", "safetensors", "--like", "params")
    assert cli("diff", "as_ours", "native") == "equal\n"
    cli("convert", "adapter", "as_theirs", "--to", "orbax", "--like", "native")
    assert cli("diff", "as_theirs", "native") == "equal\n"
    cli("verify", "as_theirs", "params")
    (here / "names.json").write_text(json.dumps({r"model/layers/(\d+)/(.*)": r"h.\1.\2"}))
    cli("convert", "native", "renamed", "--to", "peft", "--names", "names.json")
    assert "base_model.model.h.0.self_attn.q_proj.lora_A.weight" in tensors("renamed")
    words = ("convert", "renamed", "again", "--to", "safetensors", "--like", "params")
    cli(*words, "--names", "names.json")
    assert cli("diff", "again", "native") == "equal\n"
    refused(*words[:2], "more_again", *words[3:], match="adapts a module 'h.0.self_attn")
    words = ("convert", "more_native", "p", "--to", "peft", "--names", "names.json")
    refused(*words, match="needs what is in the base's|says nothing of 'model/embed_tokens'")
    cli("convert", "native", "by_family", "--to", "peft", "--names", "llama")
    assert_same(tensors("by_family"), tensors("adapter"))
    cli("convert", "bare", "named", "--to", "peft", "--names", "names.json")
    assert_same(tensors("named"), tensors("renamed"))


def test_between_our_own_formats_the_record_goes_along(cli, here, capsys):
    assert main(["convert", "native", "there", "--to", "orbax"]) == 0
    assert "no room for words, which were 'of mine'" in capsys.readouterr().err
    cli("convert", "there", "back", "--to", "safetensors")
    with _files.open_tensors("native") as one, _files.open_tensors("back") as other:
        assert one.metadata["lora_jax"] == other.metadata["lora_jax"]
        assert_same(dict(one), dict(other))
    assert "the contents of 10" in cli("inspect", "back")
    residual = lora_jax.lorafy(PARAMS, 2, init="pissa", **PLAIN)
    safetensors.save("residual", residual)
    cli("convert", "residual", "residual_orbax", "--to", "orbax")
    found = orbax.load("residual_orbax", residual.base)
    assert all(f.residual for f in found.adapter.factors.values())


def test_convert_takes_models_from_orbax_to_hugging_face_and_back(here, cli):
    tuned = {name: x.read() for name, x in _shards.tensors_in("tuned").items()}
    cli("convert", "tuned_params", "out", "--to", "hf", "--like", "model", "--names", "llama")
    for name, x in _shards.tensors_in("out").items():
        assert np.array_equal(x.read(), tuned[name])
    assert json.loads(Path("out/config.json").read_text()) == {"model_type": "llama"}
    found = cli("convert", "out", "half", "--to", "hf", "--dtype", "bfloat16", "--json")
    assert (found["format"], found["from"], found["tensors"]) == ("hf", "huggingface", len(tuned))
    assert {str(x.dtype) for x in _shards.tensors_in("half").values()} == {"bfloat16"}

    text = cli("convert", "tuned", "again", "--to", "orbax", "--like", "params")
    assert re.match(rf"again: {len(tuned)} tensors, .* as orbax\n", text)
    assert cli("diff", "tuned_params", "again")
    cli("convert", "tuned", "own", "--to", "orbax")
    found = cli("inspect", "own", "--json")["entries"]
    assert {row["path"].replace("/", ".") for row in found} == tuned.keys()


def test_convert_refuses_models_that_it_cannot_take(here, refused):
    refused("convert", "model", "out", "--to", "peft", match="is a model, .* expected --to hf, or")
    refused("convert", "params", "out", "--to", "orbax", match="in the format orbax: expected")
    refused("convert", "adapter", "out", "--to", "hf", match="--to hf is for models, .* merge it")
    file = "model/model.safetensors"
    refused("convert", file, "out", "--to", "hf", match="one file of tensors: give the folder")
    words = ("convert", "model", "out", "--to", "orbax")
    refused(*words, "--dtype", "float16", match="--dtype goes with --to hf")
    refused(*words, "--names", "llama", match="--names is of the paths in --like")


def test_convert_says_what_it_wrote(cli):
    options = ("--base-model", "my/model", "--for-vllm", "--json")
    found = cli("convert", "run", "out", "--to", "peft", *options)
    assert (found["from"], found["format"], found["entries"]) == ("orbax", "peft", 4)
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "my/model"
    assert config["target_modules"] == ["q_proj", "v_proj"]
    text = cli("convert", "bare", "out", "--to", "peft", "--overwrite")
    assert text.startswith("out: 4 entries, ")
    targets = json.loads(Path("out/adapter_config.json").read_text())["target_modules"]
    assert targets[0] == "model.layers.0.self_attn.q_proj"  # the other modules are not known


def test_convert_refuses(refused, here):
    refused("convert", "adapter", "out", "--to", "peft", match="in the format peft already")
    refused("convert", "adapter", "out", "--to", "orbax", "--for-vllm", match="goes with --to peft")
    refused(
        "convert", "adapter", "out", "--to", "orbax", "--base-model", "x", match="--base-model g"
    )
    refused(
        "convert", "adapter", "native", "--to", "safetensors", match="native exists: say --over"
    )
    refused("convert", "adapter", "out", "--to", "pickle", match="argument --to: invalid choice")
    refused("convert", "native", "out", match="the following arguments are required: --to")
    words = ("convert", "adapter", "out", "--to", "orbax", "--names", "llama")
    refused(*words, match="--names is of the paths in --like PATH")
    words = ("convert", "adapter", "orbax", "--to", "orbax", "--overwrite")
    refused(*words, match="orbax exists, and is not replaced: choose another path")
    refused(
        "convert", "dora_native", "out", "--to", "peft", "--for-vllm", match="vLLM would refuse"
    )
    words = ("convert", "adapter", "out", "--to", "safetensors", "--like", "bare")
    refused(*words, match="--like bare: it is an adapter without a record of its base")
    residual = lora_jax.lorafy(PARAMS, 2, init="pissa", **PLAIN)
    safetensors.save("params/residual", residual)
    refused("convert", "params/residual", "out", "--to", "peft", match="what its initializer left")
    config = json.loads((here / "adapter" / peft.CONFIG).read_text()) | {
        "init_lora_weights": "pissa"
    }
    (here / "adapter" / peft.CONFIG).write_text(json.dumps(config))
    refused("convert", "adapter", "out", "--to", "orbax", match="init_lora_weights='pissa' changes")


# Comparing


def test_diff_of_adapters_is_that_of_their_updates(cli):
    one = {canonical(p): x for p, x in updates(adapted({}, 2)).items()}
    ranks = {".*q_proj.*": 3, ".*": 2}
    two = {canonical(p): x for p, x in updates(adapted({}, ranks, seed=7)).items()}
    found = cli("diff", "adapter", "other", "--json", status=1)
    assert not found["equal"]
    for row in found["entries"]:
        x, y = one[row["path"]], two[row["path"]]
        largest = max(np.linalg.norm(x), np.linalg.norm(y))
        assert row["relative"] == pytest.approx(np.linalg.norm(x - y) / largest, rel=1e-9)
        cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
        assert row["cosine"] == pytest.approx(cosine, rel=1e-7)
        assert row["ranks"] == [2, 3 if "q_proj" in row["path"] else 2]
    text = cli("diff", "adapter", "other", "--top", "1", status=1)
    assert text.count("q_proj") + text.count("v_proj") == 1
    assert "0 of 4 entries of both are equal" in text
    assert cli("diff", "native", "orbax") == "equal\n"
    assert cli("diff", "adapter", "bare", "--json")["equal"]
    assert cli("diff", "adapter", "other", "--quiet", status=1) == ""


def test_diff_sees_the_same_update_in_other_factors(cli):
    lora_params = adapted({}, 2)
    factors = {
        path: f.mapped(lambda name, x: {"a": x * 3, "b": x / 3}.get(name, x))
        for path, f in lora_params.adapter.factors.items()
    }
    safetensors.save("scaled", lora_jax.Adapter(factors))
    found = cli("diff", "native", "scaled", "--json", status=1)
    assert max(row["relative"] for row in found["entries"]) < tolerance()
    cli("diff", "native", "scaled", *EQUAL)


def test_diff_of_an_adapter_with_more_entries_is_not_equal(cli):
    adapter = adapted({}, 2).adapter
    *most, last = adapter.factors
    safetensors.save("fewer", lora_jax.Adapter({path: adapter.factors[path] for path in most}))
    for pair, side in ((("native", "fewer"), "only_in_a"), (("fewer", "native"), "only_in_b")):
        found = cli("diff", *pair, "--json", status=1)
        assert not found["equal"]
        assert all(row["equal"] for row in found["entries"])
        assert list(map(canonical, found[side])) == [canonical(last)]


def test_diff_of_magnitudes_wholes_and_what_one_has_only(cli):
    found = cli("diff", "adapter", "dora", "--json", status=1)
    assert found["only_in_b"] == ["score.weight"]
    assert all(row["relative"] is None and not row["equal"] for row in found["entries"])
    assert "only in dora: score.weight" in cli("diff", "adapter", "dora", status=1)
    lora_params = safetensors.load("dora_native", PARAMS)
    f = lora_params.adapter.factors["model/layers/0/self_attn/q_proj/kernel"]
    f = f.mapped(lambda name, x: x * (1.5 if name == "magnitude" else 1.0))
    factors = lora_params.adapter.factors | {"model/layers/0/self_attn/q_proj/kernel": f}
    full = {path: x * 2 for path, x in lora_params.adapter.full.items()}
    safetensors.save("changed", lora_jax.Adapter(factors, full))
    rows = cli("diff", "dora_native", "changed", "--json", status=1)["entries"]
    relative = {row["path"]: row["relative"] for row in rows if not row["equal"]}
    assert relative == pytest.approx(
        {"model/layers/0/self_attn/q_proj/kernel": 1 / 3, "score/kernel": 0.5}, rel=tolerance()
    )
    other = {"model": {"layers": {"0": {"self_attn": {"q_proj": {"kernel": floats(9, 8)}}}}}}
    safetensors.save("wide", randomize_b(lora_jax.lorafy(other, 2)))
    text = cli("diff", "native", "wide", status=1)
    assert "other shape" in text
    whole = lora_jax.Adapter({}, {"model/layers/0/self_attn/q_proj/kernel": floats(8, 8)})
    safetensors.save("whole", whole)
    cli("diff", "native", "whole", status=1)


@pytest.mark.parametrize("pair", [("model", "tuned"), ("params", "tuned_params")])
def test_diff_of_models(pair, cli):
    expected = {canonical(p): x for p, x in updates(adapted({}, 2)).items()}
    found = cli("diff", *pair, "--json", status=1)
    assert len(found["entries"]) == 10
    for row in found["entries"]:
        x = expected.get(canonical(row["path"]))
        assert row["equal"] == (x is None)
        if x is None:
            assert row["max"] == row["relative"] == 0
        else:
            largest = np.abs(x).max()  # rounded where it was added to weights of up to 4
            assert row["max"] == pytest.approx(largest, abs=tolerance() * (4 + largest))
    text = cli("diff", *pair, status=1)
    assert "6 of 10 entries of both are equal" in text
    assert cli("diff", pair[0], pair[0]) == "equal\n"
    cli("diff", *pair, "--tolerance", "10")


def test_diff_of_types_shapes_and_nans(cli):
    one = {"a": np.ones(3, np.float32), "n": np.arange(3), "x": np.array([np.nan, 1])}
    two = {"a": np.ones(3, "float16"), "n": np.arange(3), "x": np.array([np.nan, 1]), "y": one["a"]}
    library.save_file(one, "one")
    library.save_file(two, "two")
    found = cli("diff", "one", "two", "--json", status=1)
    assert {row["path"]: row["equal"] for row in found["entries"]} == {
        "a": False,
        "n": True,
        "x": True,
    }
    assert found["only_in_b"] == ["y"]
    assert "float32 float16" in cli("diff", "one", "two", status=1)
    library.save_file({**one, "a": np.ones(4, np.float32)}, "wider")
    assert "3 4" in cli("diff", "one", "wider", status=1)


def test_diff_refuses(refused):
    refused("diff", "adapter", "model", match="one is an adapter, and one a model")
    refused("diff", "adapter", "nowhere", match="no such file or folder")
    refused("diff", "adapter", "other", "--tolerance", "-1", match="expected a number, at least 0")


# Extracting


def test_extract_of_folders_finds_what_was_merged(cli):
    found = cli("extract", "model", "tuned", "out", "--rank", "2", "--base-model", "b", "--json")
    assert found["error"] < tolerance()
    assert {row["rank"] for row in found["entries"]} == {2}
    cli("diff", "out", "adapter", *EQUAL)
    cli("verify", "out", "model")
    cli("merge", "model", "out", "merged")
    cli("diff", "merged", "tuned", *EQUAL)


@pytest.mark.parametrize("pair", [("model", "tuned"), ("params", "tuned_params")])
def test_extract_truncates_as_the_svd_does(pair, cli):
    words = ("extract", *pair, "out")
    found = cli(*words, "--rank", "1", "--json")
    expected = {canonical(p): x for p, x in updates(adapted({}, 2)).items()}
    for row in found["entries"]:
        s = np.linalg.svd(expected[canonical(row["path"])], compute_uv=False)
        assert row["kept"] == pytest.approx(s[0] ** 2 / (s**2).sum(), rel=tolerance())
        assert row["error"] == pytest.approx(np.sqrt(1 - row["kept"]), rel=tolerance())
        assert row["norm"] == pytest.approx(np.linalg.norm(s), rel=tolerance())
    text = cli("extract", *pair, "more_out", "--energy", "0.9", "--alpha", "4")
    assert "4 weights; 9" in text
    rows = cli("inspect", "more_out", "--json")["entries"]
    assert all(row["alpha"] == pytest.approx(4, rel=tolerance()) for row in rows)


def test_extract_to_other_formats(cli, here):
    cli("extract", "params", "tuned_params", "one", "--rank", "2", "--to", "safetensors")
    found = safetensors.load("one", PARAMS)  # of this very base
    expected = lora_jax.merge(adapted({}, 2))
    assert_close(lora_jax.merge(found), expected)
    cli(
        "extract",
        "params",
        "tuned_params",
        "two",
        "--rank",
        "2",
        "--to",
        "peft",
        "--names",
        "llama",
    )
    cli("diff", "two", "adapter", *EQUAL)
    cli("extract", "model", "tuned", "three", "--rank", "2", "--to", "orbax")
    cli("diff", "three", "adapter", *EQUAL)
    words = (
        "extract",
        "model",
        "tuned",
        "four",
        "--rank",
        "2",
        "--targets",
        r".*0.*q_proj\.weight",
    )
    cli(*words, "--ignore-rest")
    assert len(cli("inspect", "four", "--json")["entries"]) == 1


def test_extract_of_other_layers(cli, here):
    def save(folder, **tensors):
        Path(folder).mkdir()
        library.save_file(tensors, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text('{"model_type": "gpt2"}')

    before = {
        "h.0.attn.c_attn.weight": np.asarray(floats(6, 9)),
        "wte.weight": np.asarray(floats(11, 6)),
        "conv.weight": np.asarray(floats(5, 4, 3)),
        "ln.weight": np.asarray(floats(6)),
        "head.bias": np.asarray(floats(6)),
        "head.weight": np.asarray(floats(6, 6)),
    }
    after = {name: x + np.asarray(floats(*x.shape)) for name, x in before.items()}
    save("before", **before)
    save("after", **after)
    words = ("extract", "before", "after", "out", "--targets", r"(h\.|wte|conv).*weight")
    found = cli(*words, "--rank", "99", "--rest", "full", "--json")
    assert len(found["entries"]) == 3
    assert sorted(found["whole"]) == ["head/bias", "head/weight", "ln/weight"]
    cli("merge", "before", "out", "merged")
    merged = tensors_of("merged")
    for name, x in after.items():
        assert_close(merged[name], x)
    (here / "before" / "config.json").unlink()
    assert main(["extract", "before", "after", "no", "--rank", "1"]) == 2


def test_extract_refuses(refused, here, capsys):
    words = ("extract", "model", "tuned", "out")
    refused(*words, match="one of the arguments --rank --energy is required")
    refused(*words, "--rank", "1", "--energy", "0.5", match="not allowed with argument")
    refused(*words, "--energy", "2", match="energy=2.0: expected a share")
    refused(*words, "--rank", "1", "--targets", "nothing", match="selects nothing")
    refused(
        *words,
        "--rank",
        "1",
        "--targets",
        ".*0.*q_proj.*",
        match=r"3 tensors changed that are no targets: .* --rest full",
    )
    refused(*words, "--rank", "1", "--to", "orbax", "--names", "llama", match="go with --to peft")
    refused("extract", "model", "model", "out", "--rank", "1", match="are equal: there is nothing")
    refused(
        "extract", "params", "params", "out", "--rank", "1", match="are equal: there is nothing"
    )
    refused("extract", "model", "params", "out", "--rank", "1", match="of different formats")
    refused(
        "extract", "model", "adapter", "out", "--rank", "1", match="adapter is an adapter, expec"
    )
    refused("extract", "model", "tuned", "adapter", "--rank", "1", match="adapter exists")
    words = (
        "extract",
        "params",
        "tuned_params",
        "out",
        "--rank",
        "1",
        "--targets",
        ".*0.*q_proj.*",
    )
    refused(*words, match=r"no targets: .*To leave .*: --rest 'ignore'; to take them whole")

    def edited(**changes):
        found = tensors_of("model") | changes
        found = {name: x for name, x in found.items() if x is not None}
        library.save_file(found, "tuned/model.safetensors")

    words = ("extract", "model", "tuned", "out", "--rank", "1")
    edited(**{"score.weight": None})
    refused(*words, match="tuned has no tensor 'score.weight', which model has")
    edited(more=np.ones(2))
    refused(*words, match="model has no tensor 'more', which tuned has")
    edited(**{"score.weight": np.ones((2, 2))})
    refused(*words, match=r"'score.weight' has shape \(3, 8\) in model and \(2, 2\) in tuned")
    edited(**{"score.weight": np.ones((3, 8), np.float32)})
    refused(*words, match="1 tensors changed that are no targets: score.weight")
    refused(*words, "--ignore-rest", match="no linear layer changed, but score.weight")
    q = "model.layers.0.self_attn.q_proj.weight"
    edited(**{q: np.full((8, 8), np.nan, np.float32)})
    refused(*words, match=f"'{q}' is not finite")
    library.save_file({"n": np.arange(3), "q.weight": np.ones((2, 2))}, "params/one")
    library.save_file({"n": np.arange(3) + 1, "q.weight": np.ones((2, 2))}, "params/two")
    words = ("extract", "params/one", "params/two", "out", "--rank", "1", "--targets")
    refused(
        *words, "none.*|n.*", match="'none.*|n.*' selects nothing. It matches only n: no weight of"
    )
    for name, x in (("i", np.ones((2, 2), np.int8)), ("e", np.ones((0, 2))), ("v", np.ones(2))):
        library.save_file({f"{name}.weight": x}, f"params/{name}")
        message = {"i": "dtype int8", "e": "empty", "v": "1-D"}[name]
        words = ("extract", f"params/{name}", f"params/{name}", "out", "--rank", "1", "--targets")
        refused(*words, ".*", match=f"{name}.weight: {message}")
    words = ("extract", "params/one", "params/two", "out", "--rank", "1", "--rest", "full")
    refused(*words, match="'n' changed, and cannot train whole: dtype int64")


# Whether it fits


@pytest.mark.parametrize("base", ["model", "params"])
@pytest.mark.parametrize(
    "name", ["adapter", "native", "orbax", "dora", "dora_native", "more", "more_native"]
)
def test_verify_says_yes(name, base, cli):
    text = cli("verify", name, base)
    assert text.startswith("yes: ")
    assert ("configuration says it is of tiny/llama" in text) == (name == "adapter")
    assert cli("verify", name, base, "--json")["fits"] is True


@pytest.mark.parametrize("base", ["model", "params"])
def test_verify_says_no_and_why(base, cli, here):
    changed = jax.tree.map(lambda x: x, PARAMS)
    changed["score"]["kernel"] = changed["score"]["kernel"] + 1
    wide = jax.tree.map(lambda x: x, PARAMS)
    wide["model"]["layers"]["1"]["self_attn"]["q_proj"]["kernel"] = floats(8, 9)
    more = PARAMS | {"more": {"kernel": floats(2, 2)}}
    less = {"model": PARAMS["model"]}
    for name, params in (("changed", changed), ("wide", wide), ("more_m", more), ("less", less)):
        if base == "model":
            hf.save(name, params, hf.Family())
            (here / name / "config.json").write_text('{"model_type": "llama"}')
        else:
            orbax.save_params(name, params)
    text = cli("verify", "native", "changed", status=1)
    assert text.startswith("no: native was trained on other weights: 'score/kernel' has")
    cli("verify", "orbax", "changed")  # names, shapes and types only
    cli("verify", "adapter", "changed")
    for adapter in ("native", "orbax", "adapter", "bare"):
        text = cli("verify", adapter, "wide", status=1)
        assert re.search(r"q_proj.*shape|shape.*q_proj", text), text
    for adapter in ("native", "orbax"):
        assert "more" in cli("verify", adapter, "more_m", status=1)
        assert "score" in cli("verify", adapter, "less", status=1)
    assert cli("verify", "orbax", "less", "--json", status=1)["fits"] is False
    assert cli("verify", "orbax", "less", "--quiet", status=1) == ""
    for adapter in ("adapter", "bare"):
        cli("verify", adapter, "more_m")
    cli("convert", "dora", "dora_torch", "--to", "safetensors")
    cli("convert", "adapter", "torch", "--to", "safetensors")
    assert cli("verify", "torch", "wide", status=1).startswith("no: ")
    if base == "model":
        assert "it has no record" in cli("verify", "torch", "model")
        assert "it has no record" in cli("verify", "dora_torch", "model")
        cli("convert", "dora", "like_torch", "--to", "safetensors", "--like", "model")
        assert "all 10 leaves" in cli("verify", "like_torch", "model")
        assert cli("verify", "like_torch", "wide", status=1).startswith("no: ")


def test_verify_of_an_adapter_that_says_nothing_of_its_base(cli, refused):
    lora_params = safetensors.load("dora_native", PARAMS)
    safetensors.save("alone", lora_params.adapter)
    for base in ("model", "params"):
        assert "its 5 entries fit" in cli("verify", "alone", base)
    parts = lora_jax.lorafy(PARAMS, 2, targets=".*q_proj/kernel[:, 0:4]")
    safetensors.save("parts", parts.adapter)
    cli("verify", "parts", "params")
    refused("verify", "parts", "model", match="no record of its base, and without '.*0:4]' means")
    relative = [
        row["relative"] for row in cli("inspect", "parts", "--base", "params", "--json")["entries"]
    ]
    assert relative == [0, 0]


def test_verify_notes_another_precision(here, capsys):
    orbax.save_params("half", jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS))
    assert main(["verify", "orbax", "half"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("yes: ")
    assert "note: " in err
    assert "base of another precision" in err


def test_verify_refuses(refused):
    refused("verify", "model", "adapter", match="model is a model or a file of tensors")
    refused("verify", "adapter", "other", match="other is an adapter, expected a model")
    refused("verify", "adapter", "nowhere", match="no such file or folder")


# The program


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_the_help_runs(command, here, capsys):
    if command == "completion":
        pytest.importorskip("shtab", reason="shtab, of the extra cli, is not installed")
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    example = re.search(r"example:\n  lora-jax (.*)\n", text)
    assert example
    assert main(example[1].split()) == (1 if command == "diff" else 0)
    assert capsys.readouterr().out


def test_completion_says_what_is_missing(refused, monkeypatch, cli):
    monkeypatch.setitem(sys.modules, "shtab", None)
    refused(
        "completion", "bash", match=r"shtab, which is not installed: pip install 'lora-jax\[cli\]'"
    )
    refused("completion", "fish", match="invalid choice: 'fish'")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands(shell, cli):
    pytest.importorskip("shtab", reason="shtab, of the extra cli, is not installed")
    text = cli("completion", shell)
    assert all(command in text for command in COMMANDS)
    assert cli("completion", shell, "--json")["script"].strip() == text.strip()
    assert cli("completion", shell, "--quiet") == ""


def run(*words, **options):
    command = [sys.executable, "-m", "lora_jax.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.long
def test_a_process_says_no_more_than_it_is_to(here):
    done = run("inspect", "native")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"native: adapter in one file, \d.* kB\npath ", done.stdout)
    done = run("diff", "run", "native", "--json")
    assert (done.returncode, done.stderr) == (1, "")
    json.loads(done.stdout)
    done = run("merge", "params", "adapter", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lora-jax merge: params holds neither model.safetensors")
    assert done.stderr.count("\n") == 1
    done = run("--version")
    assert done.stdout == f"lora-jax {lora_jax.__version__}\n"


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lora-jax {lora_jax.__version__}\n"


@pytest.mark.long
def test_a_reader_that_goes_away_hears_nothing(here):
    command = f"{sys.executable} -m lora_jax.cli inspect model | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_errors_of_ours_and_others(here, capsys, monkeypatch):
    assert main(["insect"]) == 2
    assert capsys.readouterr().err.startswith("lora-jax insect: argument COMMAND: invalid choice")
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("lora-jax: the following arguments are required")
    assert main(["inspect", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    from lora_jax.cli._commands import inspect as _inspect

    def stops(error):
        def run(*_):
            raise error

        monkeypatch.setattr(_inspect, "run", run)
        return main(["inspect", "adapter"])

    assert stops(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == ""
    assert stops(BrokenPipeError()) == 141
    assert stops(KeyError("a name")) == 2
    assert capsys.readouterr().err == "lora-jax inspect: a name\n"
    assert stops(ValueError("two\n  lines")) == 2
    assert capsys.readouterr().err == "lora-jax inspect: two lines\n"
    assert stops(PermissionError(errno.EACCES, "Permission denied", "there")) == 2
    assert capsys.readouterr().err == "lora-jax inspect: there: Permission denied\n"
    assert stops(FileExistsError("x exists: pass overwrite=True, or another path")) == 2
    assert (
        capsys.readouterr().err == "lora-jax inspect: x exists: say --overwrite, or another path\n"
    )
    assert stops(ValueError()) == 2
    assert capsys.readouterr().err == "lora-jax inspect: ValueError\n"
    with pytest.raises(RuntimeError, match="a bug"):
        stops(RuntimeError("a bug"))


def test_an_interrupted_merge_leaves_nothing(here, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_shards, "_write_one", interrupt)
    before = sorted(here.iterdir())
    assert main(["merge", "model", "adapter", "out"]) == 130
    assert sorted(here.iterdir()) == before


@pytest.fixture
def screen():
    """A terminal of so many columns that remembers what it showed."""
    console = pytest.importorskip(
        "rich.console", reason="rich, which comes with Flax, is not there"
    )
    with open(os.devnull, "w") as nowhere:
        options = {"record": True, "file": nowhere, "force_terminal": True, "highlight": False}
        yield lambda width: console.Console(width=width, **options)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_of_a_terminal_are_as_wide_as_it_is(width, here, screen):
    for words in (
        ("inspect", "adapter", "--base", "model"),
        ("inspect", "model"),
        ("diff", "adapter", "other"),
        ("diff", "model", "tuned"),
    ):
        console = screen(width)
        main(list(words), Show(console))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        found = [line for line in lines if line.startswith("model") and "proj" in line]
        assert len(found) == 4 + 2 * (words == ("inspect", "model"))  # no row is wrapped
        assert width < 120 or not any("…" in line for line in found)
    assert width > 60 or all("…" in line for line in found)


def test_progress_is_drawn_where_somebody_looks(here, screen):
    console = screen(100)
    assert main(["merge", "model", "adapter", "out"], Show(console)) == 0
    text = console.export_text()
    assert re.search(r"merging .*100%", text)
    assert "out: 4 of 10 tensors changed" in text


def test_numbers_of_json_are_numbers():
    found = plain({"a": np.float32(0.5), "b": [np.int64(2), float("nan")], "c": (None, "x", True)})
    assert found == {"a": 0.5, "b": [2, None], "c": [None, "x", True]}
    assert json.dumps(found)


def test_every_command_has_the_common_options():
    (commands,) = (a for a in parser()._actions if hasattr(a, "choices") and a.choices)
    assert tuple(commands.choices) == COMMANDS
    for command in commands.choices.values():
        assert {"--json", "--quiet", "--debug", "--help"} <= {*command._option_string_actions}
    assert size(0) == "0 bytes"
