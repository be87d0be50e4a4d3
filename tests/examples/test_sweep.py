"""A sweep's adapters are those of separate runs; its table and picture; its bad input."""

import functools
import io
import itertools
import json
import math
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import assert_close
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_jax.recipes.folders import check_output, write_results, written_at_once

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import bert
import finetune_sentiment
import sweep
import sweep_report
import sweeping
import training
from sweep_report import Trial
from training import make_step, predict, train

import lora_jax
from lora_jax.io import peft, safetensors

pytestmark = pytest.mark.usefixtures("standard_promotion")

ENCODER = {
    "vocab_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}
STEPS, BATCH, LENGTH, SEEDS = 8, 6, 5, (0, 7)

# --- as separate runs ----------------------------------------------------------------------------


@functools.cache
def model():
    """``(apply, params)`` of a tiny classifier in float64, its parameters random."""
    tiny = bert.Classifier(bert.Encoder(**ENCODER), 2)
    row = jnp.zeros((1, LENGTH), jnp.int32)
    abstract = jax.eval_shape(tiny.init, jax.random.key(0), row, row.astype(bool))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape)), abstract)
    return jax.jit(lora_jax.lora(lambda p, *x: tiny.apply({"params": p}, *x))), params


def sentences(n, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, ENCODER["vocab_size"], (n, LENGTH)).astype(np.int32)
    mask = np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (n, 1))
    return {"ids": ids, "mask": mask, "labels": (ids[:, 0] % 2).astype(np.int32)}


DATA, VALIDATION = sentences(40, 0), sentences(30, 1)

# Every two differ in rank, rate, alpha, initializer and, where two have one trial, in seed.
TRIALS = (
    (1, 1e-3, 16.0, "gaussian"),
    (3, 3e-2, 4.0, "kaiming_uniform"),
    (2, 1e-2, 1.0, "orthogonal"),
)


@functools.cache
def initializer(trial):
    """One program that makes the factors of a trial from a seed."""
    _, params = model()
    rank, _, alpha, init = trial

    def made(key):
        options = {"alpha": alpha, "init": init, "full": finetune_sentiment.HEAD, "key": key}
        dtype = params["classifier"]["bias"].dtype
        return lora_jax.lorafy(params, rank, **options, dtype=dtype).adapter

    return jax.jit(made)


def starting(trial, seed):
    adapter = initializer((trial.rank, trial.rate, trial.alpha, trial.init))(jax.random.key(seed))
    return lora_jax.LoraParams(model()[1], adapter)


def swept(rows=None, **options):
    apply, _ = model()
    rows = rows or [(trial, seed) for trial in (Trial(*x) for x in TRIALS) for seed in SEEDS]
    adapters = [starting(*row) for row in rows]
    alive, stacked = sweeping.sweep(
        apply, adapters, rows, DATA, VALIDATION, steps=STEPS, batch_size=BATCH, **options
    )
    return rows, alive, stacked


@functools.cache
def alone(settings):
    """What the demo's own trainer makes of it, by seed: a rate that is a constant, and no vmap."""
    apply, _ = model()
    trial = Trial(*settings)
    steps = []

    def make_once(*args):
        if not steps:  # both seeds have the same step
            steps.append(make_step(*args))
        return steps[0]

    with mock.patch.object(training, "make_step", make_once):
        return {
            seed: train(
                apply,
                starting(trial, seed),
                DATA,
                VALIDATION,
                learning_rate=trial.rate,
                steps=STEPS,
                batch_size=BATCH,
                seed=seed,
            )
            for seed in SEEDS
        }


def assert_is_alone(single, row, losses):
    """Factors, head and losses are those of a separate run; what was filled up is zero."""
    trial, seed = row
    expected = alone((trial.rank, trial.rate, trial.alpha, trial.init))[seed]
    np.testing.assert_allclose(losses, expected.losses[-len(losses) :], rtol=1e-9)
    start = starting(trial, seed).adapter
    for key, f in single.adapter.factors.items():
        e = expected.lora_params.adapter.factors[key]
        assert_close(f.a[..., : trial.rank], e.a)
        assert_close(f.b[: trial.rank], e.b)
        assert not np.any(f.a[..., trial.rank :])
        assert not np.any(f.b[trial.rank :])
        assert f.scale == e.scale
        assert np.abs(e.b).max() > 1e-4
        assert np.abs(e.a - start.factors[key].a).max() > 1e-5
    assert_close(single.adapter.full, expected.lora_params.adapter.full)
    assert single.base is model()[1]
    return expected


@pytest.mark.usefixtures("in_float64")
@pytest.mark.long  # the next tests have single rows
@pytest.mark.parametrize("together", [4, 16])  # 6 rows: some at a time, and the rest; or all
def test_all_at_once_is_each_on_its_own(together):
    losses = []
    rows, alive, stacked = swept(
        halving=False, together=together, on_step=lambda n, s, x: losses.append(x)
    )
    assert alive == rows
    accuracies = {}
    for i, single in enumerate(lora_jax.many.unstack(stacked, trim=False)):
        run = assert_is_alone(single, rows[i], np.stack(losses)[:, i])
        accuracies.setdefault(rows[i][0].rank, []).append(run.validation[-1][1])
    for trial, _ in rows:
        assert [step for step, _ in trial.scores] == [2, 4, 8]
        assert trial.scores[-1][1] == pytest.approx(np.mean(accuracies[trial.rank]))
    ranks = [f.rank for x in lora_jax.many.unstack(stacked) for f in x.adapter.factors.values()]
    assert ranks == [trial.rank for trial, _ in rows for _ in range(2)]


@pytest.mark.usefixtures("in_float64")
def test_those_that_halving_keeps_are_those_of_whole_runs():
    losses, rungs = [], []
    rows, alive, stacked = swept(
        on_step=lambda n, s, x: losses.append(x),
        on_rung=lambda *args: rungs.append(args),
    )
    assert [len(x) for x in losses] == [6] * 2 + [4] * 2 + [2] * 4  # 3, 2 and 1 of two seeds
    for step, trials, kept in rungs[:-1]:
        dropped = [trial for trial in trials if trial not in kept]
        of = {trial: dict(trial.scores)[step] for trial in trials}
        assert min(of[t] for t in kept) >= max(of[t] for t in dropped)
        assert all(t.scores[-1][0] == step for t in dropped)
    assert [seed for _, seed in alive] == [0, 7]
    assert alive == [row for row in rows if row in alive]
    singles = lora_jax.many.unstack(stacked, trim=False)
    runs = [
        assert_is_alone(single, alive[i], np.stack(losses[4:])[:, i])
        for i, single in enumerate(singles)
    ]
    accuracies = [run.validation[-1][1] for run in runs]
    assert alive[0][0].scores[-1] == (8, pytest.approx(np.mean(accuracies)))
    (rank,) = {f.rank for x in lora_jax.many.unstack(stacked) for f in x.adapter.factors.values()}
    assert rank == alive[0][0].rank


@pytest.mark.usefixtures("in_float64")
def test_a_rate_that_diverges_loses_and_leaves_the_others_alone():
    losses = []
    rows = [(Trial(2, 1e300, 16.0, "gaussian"), 0), (Trial(*TRIALS[0]), 7)]
    _, alive, stacked = swept(rows, halving=False, on_step=lambda n, s, x: losses.append(x))
    assert alive == rows
    ranked = sweep_report.best_first([trial for trial, _ in rows])
    assert [trial.rate for trial in ranked] == [1e-3, 1e300]
    assert math.isnan(ranked[1].scores[-1][1])
    (good,) = lora_jax.many.unstack(lora_jax.many.take(stacked, [1]), trim=False)
    assert_is_alone(good, rows[1], np.stack(losses)[:, 1])

    both = lora_jax.many.take(stacked, [0, 0])
    rows = [(Trial(2, rate, 16.0, "gaussian"), 0) for rate in (1e300, 1e299)]
    message = r"all 2 settings have diverged after 3 steps: lower --rates, now 1e.299 to 1e.300"
    with pytest.raises(ValueError, match=message):
        sweeping.measure(model()[0], both, rows, VALIDATION, 3)


# --- the table and the picture -------------------------------------------------------------------


def scored():
    """A grid of 2 x 3, of which the rate 0.1 stopped first, and one diverged."""
    trials = [Trial(r, x, 16.0, "gaussian") for r in (2, 8) for x in (1e-3, 1e-2, 1e-1)]
    for i, trial in enumerate(trials):
        trial.scores.append((10, 0.6 + 0.01 * i))
        if trial.rate < 0.1:
            trial.scores.append((20, 0.7 + 0.02 * i))
    trials[2].scores[0] = (10, math.nan)
    return trials


def test_the_table_has_the_best_first():
    console = Console(width=100, file=io.StringIO())
    console.print(sweep_report.table(scored(), "title"))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines[0] == ["title"]
    assert lines[1] == "rank rate step 10 step 20".split()
    assert [line[:2] for line in lines[3:]] == [
        ["8", "0.01"],
        ["8", "0.001"],
        ["2", "0.01"],
        ["2", "0.001"],
        ["8", "0.1"],
        ["2", "0.1"],
    ]
    assert lines[3] == ["8", "0.01", "0.640", "0.780", "winner"]
    assert lines[7] == ["8", "0.1", "0.650", "stopped", "at", "10"]
    assert lines[8] == ["2", "0.1", "diverged", "stopped", "at", "10"]


def test_what_varies_besides_has_columns_and_panels(tmp_path):
    trials = [
        Trial(4, 1e-3, alpha, init, [(5, 0.5 + alpha / 100)])
        for alpha, init in itertools.product((8.0, 16.0), ("gaussian", "orthogonal"))
    ]
    table = sweep_report.table(trials, "title")
    assert [c.header for c in table.columns] == ["rank", "rate", "alpha", "init", "step 5", ""]
    sweep_report.draw(tmp_path / "wide.png", trials, "title")
    sweep_report.draw(tmp_path / "narrow.png", trials[:1], "title")
    wide, narrow = (plt.imread(tmp_path / f"{x}.png") for x in ("wide", "narrow"))
    assert wide.shape[0] == narrow.shape[0]
    assert wide.shape[1] > 2 * narrow.shape[1]


def test_the_heat_map_has_a_color_a_cell(tmp_path):
    trials = scored()
    sweep_report.draw(tmp_path / "a.png", trials, "title")
    image = plt.imread(tmp_path / "a.png")
    assert image.shape == (round(160 * (1.9 + 0.85 * 2)), round(160 * (2.0 + 1.25 * 3)), 4)
    pixels = (image[..., :3] * 255).round().astype(int).reshape(-1, 3)
    values = [0.7, 0.72, 0.65, 0.76, 0.78]
    cmap = plt.colormaps["viridis"]
    colors = [cmap((x - min(values)) / (max(values) - min(values)))[:3] for x in values]
    for color in [*(np.array(colors) * 255).round(), (217, 217, 217)]:  # the last: diverged
        assert (np.abs(pixels - color).max(-1) <= 1).sum() > 5000, color
    frame = np.abs(pixels - [209, 73, 91]).max(-1) <= 2
    assert frame.sum() > 500


# --- from the command line -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    encoder = bert.Encoder(**ENCODER)
    row = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), row, row.astype(bool))["params"]
    rng = np.random.default_rng(0)
    tensors = {}
    for keys, x in jax.tree_util.tree_leaves_with_path(shapes):
        path = "/".join(key.key for key in keys)
        shape = x.shape[::-1] if path.endswith("kernel") else x.shape
        mean = 1.0 if path.endswith("scale") else 0.0  # of norms, so that words stay apart
        tensors[bert._source_name(path)] = rng.normal(mean, 0.3, shape).astype(np.float32)
    folder = tmp_path_factory.mktemp("model")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | ENCODER))
    words = "[PAD] [UNK] a film lovely moving great bright dull tired awful flat".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    rng = np.random.default_rng(0)
    good, bad = "lovely moving great bright".split(), "dull tired awful flat".split()
    rows = ["text,label"]
    for i in range(200):
        first, second = rng.choice((good, bad)[i % 2], 2)
        rows.append(f"a {first} {second} film,{('good', 'bad')[i % 2]}")
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_text("\n".join(rows))
    return path


def command(model_dir, reviews, out, *extra):
    sweep.main(["--model", str(model_dir), "--data", str(reviews), "--out", str(out), *extra])


def test_a_sweep_writes_what_it_says(model_dir, reviews, tmp_path, capsys):
    out, flags = tmp_path / "run", "--ranks 2 --rates 0.01 0.02 --steps 4 --quick --no-halving"
    with written_at_once(out) as made:  # of an earlier run, which is replaced
        write_results(made, sweep.MADE_BY, {})
    command(model_dir, reviews, out, *flags.split())
    printed = capsys.readouterr().out
    assert "2 adapters at once, 2 settings x 1 seeds" in printed
    assert "--quick: too few steps" in printed
    results = json.loads((out / "results.json").read_text())
    assert [t["rate"] for t in results["trials"]] == [0.01, 0.02]
    assert [[step for step, _ in t["scores"]] for t in results["trials"]] == [[1, 2, 4]] * 2
    assert plt.imread(out / "sweep.png").shape[2] == 4
    assert_holds_the_winner(out, model_dir, results["winner"])


def assert_holds_the_winner(out, model_dir, winner):
    """Both adapters of a folder are of the winner's rank, and compute the same."""
    model, params = bert.load(model_dir, 2)
    loaded = safetensors.load(out / "adapter.safetensors", params)
    assert {f.rank for f in loaded.adapter.factors.values()} == {winner["rank"]}
    again = peft.load(out / "peft", params, names=bert.torch_module)
    apply = jax.jit(lora_jax.lora(lambda p, *x: model.apply({"params": p}, *x)))
    tokens = sentences(20, 3)
    expected = predict(apply, loaded, tokens)
    assert_close(predict(apply, again, tokens), expected)


@pytest.mark.long
def test_a_sweep_from_data_to_the_winner(model_dir, reviews, tmp_path, capsys):
    out = tmp_path / "run"
    command(
        model_dir,
        reviews,
        out,
        *["--ranks", "4", "1", "--rates", "1e-6", "0.01", "--seeds", "2", "--steps", "80"],
    )
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    winner = results["winner"]
    assert winner["rate"] == 0.01
    assert winner["test_accuracy"] > 0.9
    assert f"Winner: rank {winner['rank']}, rate 0.01" in printed
    assert "8 adapters at once, 4 settings x 2 seeds" in printed
    assert "2 of 4 continue" in printed
    assert "compiling the step for 3 sizes" in printed
    assert [len(t["scores"]) for t in results["trials"]].count(1) == 2
    assert set(results["seconds"]["step"]) == {"8", "4", "2"}
    assert plt.imread(out / "sweep.png").shape == (576, 768, 4)
    assert_holds_the_winner(out, model_dir, winner)


BAD = [
    (["--ranks", "2", "0"], "sweep: .*rank=0 for 'encoder/layer_0/query/kernel'"),
    (["--ranks", "99"], "rank=99"),
    (["--ranks", "2", "4", "2"], "--ranks: 2 occurs twice; pass each value once"),
    (["--inits", "gaussian", "gaussian"], "--inits: gaussian occurs twice"),
    (["--inits", "pissa"], "--inits pissa: it changes the base"),
    (["--seed", "-1"], "--seed -1: expected 0 to 2147483647"),
    (["--inits", "oops"], "oops"),
    (["--alphas", "nan"], "alpha=nan"),
    (["--targets", "oops"], "targets='oops' selects nothing"),
    (["--batch-size", "1000"], "--batch-size 1000: there are only 140 sentences to train on"),
    pytest.param(
        ["--rates", "1e30"],
        "all 2 settings have diverged after 2 steps: lower --rates, now 1e.30",
        marks=pytest.mark.long,
    ),
]


@pytest.mark.parametrize(("extra", "message"), BAD)
def test_bad_settings_are_one_line_and_no_file(model_dir, reviews, tmp_path, extra, message):
    with pytest.raises(SystemExit, match=message) as info:
        command(model_dir, reviews, tmp_path / "out", "--quick", *extra)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "out").exists()


def test_a_rate_must_be_a_positive_number(capsys):
    for rate in ("0", "nan", "-1", "x"):
        with pytest.raises(SystemExit):
            sweep.main(["--rates", rate])
        assert "argument --rates" in capsys.readouterr().err


def test_an_output_folder_of_somebody_else_is_refused(model_dir, reviews, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(SystemExit, match="not made by an earlier run; pass another"):
        command(model_dir, reviews, tmp_path / "out")
    with pytest.raises(SystemExit, match="lies in it; pass another --out"):
        command(model_dir, reviews, model_dir)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "x"


def test_of_an_earlier_run_no_other_file_is_lost(tmp_path):
    folder = tmp_path / "out"
    with written_at_once(folder) as made:
        (made / "adapter.safetensors").write_text("x")
        write_results(made, sweep.MADE_BY, {})
    check_output(folder, sweep.MADE_BY)
    with pytest.raises(FileExistsError, match="not made by an earlier run"):
        check_output(folder, "another example")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"notes\.txt in it is not from an earlier run"):
        check_output(folder, sweep.MADE_BY)


def test_what_has_diverged_is_null_in_a_file():
    trial = sweep_report.Trial(2, 1e-3, 16.0, "gaussian", [(2, 0.5), (4, float("nan"))])
    assert json.loads(json.dumps(trial.record(), allow_nan=False))["scores"] == [
        [2, 0.5],
        [4, None],
    ]
