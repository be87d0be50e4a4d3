"""The experiments: intervals, files that continue, packs, and methods that train what they say."""

import csv
import json
import math
import re

import bert
import common
import data
import dinov2
import grids
import jax
import jax.numpy as jnp
import methods
import numpy as np
import pack
import pytest
import quality
import quality_vision
import results
import stacks
import tasks
import weights_and_ranks
from common import Results, interval, on_par, paired, student
from helpers import assert_close

import lora_jax

pytestmark = pytest.mark.usefixtures("standard_promotion")

ENCODER = bert.Encoder(
    vocab_size=1200,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)
LENGTH, CLASSES = 8, 3


def drawn(rng, n):
    mask = np.arange(LENGTH) < rng.integers(3, LENGTH, (n, 1))
    labels = rng.integers(0, CLASSES, n)
    ids = rng.integers(labels[:, None] * 300, labels[:, None] * 300 + 300, (n, LENGTH))
    return {"ids": ids.astype(np.int32), "mask": mask, "labels": labels.astype(np.int32)}


@pytest.fixture(scope="module")
def inputs():
    """An encoder with random weights, and a task that its embeddings can solve."""
    rng = np.random.default_rng(0)
    row = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(ENCODER.init, jax.random.key(0), row, row.astype(bool))["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    task = tasks.Task("drawn", CLASSES, drawn(rng, 64), drawn(rng, 30), drawn(rng, 30))
    return tasks.Inputs(ENCODER, params, {"drawn": task}, {"model": "m", "drawn": "d"})


@pytest.fixture(scope="module")
def setup(inputs):
    return methods.Setup.of(inputs, inputs.tasks["drawn"], 5)


SIZE = stacks.Size(5, 4, LENGTH, None, width=3, together=3)


# --- intervals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272)],
)
def test_student_is_that_of_the_tables(degrees, expected):
    assert student(degrees) == pytest.approx(expected, abs=1e-6)


def test_student_bounds_the_integral_of_the_density():
    t = np.linspace(-student(5, 0.8), student(5, 0.8), 20001)
    factor = math.gamma(3) / (math.sqrt(5 * math.pi) * math.gamma(2.5))
    assert np.trapezoid(factor * (1 + t**2 / 5) ** -3, t) == pytest.approx(0.8, abs=1e-8)


def test_intervals_of_values_and_of_pairs():
    mean, half = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * math.sqrt(7 / 3) / math.sqrt(3), rel=1e-6)
    # The seeds vary, and the difference does not.
    difference = paired([0.8, 0.9, 0.7], [0.79, 0.89, 0.69])
    assert difference == pytest.approx((0.01, 0.0))
    assert not on_par(difference)
    assert on_par(paired([0.80, 0.805, 0.80], [0.80, 0.80, 0.80]))
    assert not on_par(paired([0.80, 0.90, 0.80], [0.80, 0.80, 0.80]))  # too wide to tell
    assert math.isnan(interval([1.0]).half)
    assert not on_par(paired([0.8], [0.8]))


def test_intervals_raise_without_pairs():
    with pytest.raises(ValueError, match="one per seed"):
        interval([])
    with pytest.raises(ValueError, match="2 values and 1 of the reference"):
        paired([1, 2], [1])
    with pytest.raises(ValueError, match="degrees=0"):
        student(0)


# --- results -----------------------------------------------------------------------------------


def opened(path, settings=(("steps", 3),), inputs=(("model", "a"), ("x", "b"))):
    return Results(path, dict(settings), dict(inputs), ("accuracy",))


def row(seed, accuracy=0.5):
    return {"task": "x", "method": "LoRA", "setting": "r=1", "seed": seed, "accuracy": accuracy}


def test_results_continue(tmp_path):
    path = tmp_path / "new" / "a.csv"
    opened(path).append([row(0), row(1, None)])
    whole = path.read_bytes()
    again = opened(path)
    assert path.read_bytes() == whole
    assert again.rows == [row(0), row(1, None)]
    keys = [("x", "LoRA", "r=1", seed) for seed in range(3)]
    assert again.missing(keys) == keys[2:]
    assert again.get(seed=1) == [row(1, None)]
    path.write_bytes(whole + b"x,LoRA,r=1,2,0.")  # killed while it wrote
    assert opened(path).rows == again.rows
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match=r"there is a row .*'r=1', 1"):
        again.append([row(2), row(1)])
    with pytest.raises(ValueError, match=r"\['accuracy', 'loss'\] are missing or unexpected"):
        again.append([{**{k: v for k, v in row(2).items() if k != "accuracy"}, "loss": 1}])
    assert path.read_bytes() == whole


def test_results_of_other_runs_do_not_mix(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    opened(path).append([row(0)])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=r"rows have settings \{'steps': 3\}.*remove a.csv and a.j"
    ):
        opened(path, (("steps", 4),))
    with pytest.raises(ValueError, match="rows have inputs"):
        opened(path, inputs=(("model", "z"), ("x", "b")))
    with monkeypatch.context() as patch:
        patch.setattr(results, "code_digest", lambda: "changed")
        with pytest.raises(ValueError, match="rows have code"):
            opened(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    opened(path, inputs=(("model", "a"), ("y", "c")))  # another task
    assert opened(path).rows == [row(0)]
    shared = json.loads(path.with_suffix(".json").read_text())
    assert shared["inputs"] == {"model": "a", "x": "b", "y": "c"}
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"without a a\.json"):
        opened(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("task,other\n", "its columns are"), ("", "its columns are none"), (None, "line 3: 2 fields")],
)
def test_results_raise_for_files_that_are_not_theirs(tmp_path, text, message):
    path = tmp_path / "a.csv"
    opened(path).append([row(0)])
    path.write_text(path.read_text() + "x,LoRA\n" if text is None else text)
    with pytest.raises(ValueError, match=message):
        opened(path)


# --- methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_trains_what_its_name_says(name, setup):
    built = methods.METHODS[name](setup, jax.random.key(1))
    base, adapter = built.lora_params
    paths = set(bert.flatten_dict(base, sep="/"))
    head = {"classifier/kernel", "classifier/bias"}
    full = {
        "full fine-tuning": paths,
        "BitFit": head | {path for path in paths if path.endswith("bias")},
        "bottleneck": head | {p for p in paths if re.search("new/|layer_./.*_norm/", p)},
        "prefix embedding": head | {"new/prefix_0"},
        "LoRA + prefix": head | {"new/prefix_0"},
        "prefix layer": head | {"new/prefix_0", "new/prefix_1"},
    }
    assert set(adapter.full) == full.get(name, head)
    has_factors = "LoRA" in name or name in ("DoRA", "PiSSA", "EVA")
    expected = {f"encoder/layer_{i}/{w}/kernel" for i in range(2) for w in ("query", "value")}
    assert set(adapter.factors) == (expected if has_factors else set())
    count = sum(x.size for x in jax.tree.leaves(lora_jax.split(built.lora_params)[0]))
    assert methods.trained_parameters(built.lora_params) == count


@pytest.mark.parametrize(
    "name", ["bottleneck", "prefix embedding", "prefix layer", "LoRA + prefix"]
)
def test_every_trained_number_has_a_gradient_and_the_start_is_the_base(name, setup):
    rng = np.random.default_rng(3)
    head = jnp.asarray(rng.normal(0, 1, (16, CLASSES)), jnp.float32)  # a head of zeros hides all
    params = {**setup.params, "classifier": {"kernel": head, "bias": jnp.zeros(CLASSES)}}
    setup = methods.Setup(setup.model, params, setup.task, 5)
    built = methods.METHODS[name](setup, jax.random.key(1))
    ids, mask = (setup.task.train[column] for column in ("ids", "mask"))

    @jax.jit
    def both(lora_params, params):
        def total(lora_params):
            logits = lora_jax.lora(built.fn)(lora_params, ids, mask)
            return (logits**2).sum(), logits

        (_, logits), grads = lora_jax.value_and_grad(total, has_aux=True)(lora_params)
        return logits, setup.fn(params, ids, mask), grads

    logits, expected, grads = both(built.lora_params, params)
    if "prefix" in name:  # the prefix is read, and its vectors differ from nothing
        assert float(jnp.abs(logits - expected).max()) > 0.01
    else:
        assert_close(logits, expected, length=24, depth=12)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
    # No gradient: keys' biases move all scores of a row alike, and rows of a lookup that no
    # sentence has; a of LoRA, while b is zero; down and its bias, while up is zero.
    silent = re.compile(r"key/bias|_embeddings/|\.a$|down")
    for (key, field), x in grads.arrays().items():
        if not silent.search(f"{key}.{field}"):
            assert float(jnp.abs(x).max()) > 1e-6 * scale, (key, field)


def test_a_member_trains_in_a_stack_as_it_does_alone(setup):
    members = [
        stacks.Member(rate, seed, methods.METHODS["LoRA"])
        for rate, seed in ((1e-2, 0), (3e-2, 1), (3e-3, 2))
    ]
    together = stacks.Trainer(SIZE).train("LoRA", setup, members, test=True)
    one = stacks.Size(5, 4, LENGTH, None, width=1, together=1)
    trainer = stacks.Trainer(one)
    for member, there in zip(members, together, strict=True):
        (alone,) = trainer.train("LoRA", setup, [member], test=True)
        for column in ("validation_accuracy", "test_accuracy"):
            # Rounding may move one sentence of the 30 across a tie.
            assert alone[column] == pytest.approx(there[column], abs=1 / 30 + 1e-6)
        for column in ("trained_parameters", "optimizer_bytes", "file_bytes"):
            assert alone[column] == there[column]
    assert len(trainer._programs) == 2  # a step and a prediction, for all three


def test_members_of_other_ranks_and_weights_share_a_program(setup):
    shape = weights_and_ranks.build_of("q,k,v,o", 8)
    trainer = stacks.Trainer(SIZE)
    builds = [weights_and_ranks.build_of("q", 1), weights_and_ranks.build_of("q,v", 4)]
    counts = []
    for build in builds:
        (measured,) = trainer.train(
            "cells", setup, [stacks.Member(1e-2, 0, build)], test=False, shape=shape
        )
        counts.append(measured["trained_parameters"])
        assert measured["test_accuracy"] is None
    head = 16 * CLASSES + CLASSES
    assert counts == [head + 2 * 1 * 32, head + 4 * 4 * 32]
    assert len(trainer._programs) == 2


def test_cells_of_one_budget_have_one_number_of_parameters(setup):
    counts = {
        methods.trained_parameters(build(setup, jax.random.key(0)).lora_params)
        for build in weights_and_ranks.cells_of(weights_and_ranks.BUDGET, (), ()).values()
    }
    assert len(counts) == 1


# --- an interrupted sweep ----------------------------------------------------------------------

TIMES = ("seconds_per_step",)


def quality_rows(path, inputs, chosen=("head only", "LoRA")):
    rows = Results(path, {}, inputs.digest)
    setup = methods.Setup.of(inputs, inputs.tasks["drawn"], SIZE.steps)
    quality.run(rows, {"drawn": setup}, chosen, SIZE, (1e-2, 3e-2), (0, 1), (100,))
    return rows


def untimed(path):
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def test_an_interrupted_sweep_continues_to_the_same_rows(tmp_path, monkeypatch, inputs, capsys):
    whole = quality_rows(tmp_path / "whole.csv", inputs)
    assert len(whole.rows) == 2 * (2 + 2)
    assert all((row["test_accuracy"] is None) == (row["seed"] == 100) for row in whole.rows)
    append = Results.append

    def killed(self, rows):
        append(self, rows)
        if len(self.rows) >= 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Results, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            quality_rows(tmp_path / "cut.csv", inputs)
    lines = (tmp_path / "cut.csv").read_text().splitlines(keepends=True)
    (tmp_path / "cut.csv").write_text("".join(lines[:-1]) + lines[-1][:9])  # and half a row
    quality_rows(tmp_path / "cut.csv", inputs)
    assert untimed(tmp_path / "cut.csv") == untimed(tmp_path / "whole.csv")
    capsys.readouterr()
    before = (tmp_path / "cut.csv").read_bytes()
    quality_rows(tmp_path / "cut.csv", inputs)
    assert (tmp_path / "cut.csv").read_bytes() == before
    assert capsys.readouterr().out == ""
    text = quality.table(whole, "drawn", ("head only", "LoRA"), (0, 1))
    assert re.search(r"LoRA +0\.0[13]\* +0\.\d+ ± ", text)


def test_the_best_rate_has_not_diverged(tmp_path):
    rows = Results(tmp_path / "a.csv", {}, {}, ("validation_accuracy",))

    def measured(rate, seed, accuracy):
        key = {"task": "x", "method": "m", "setting": f"rate={rate:g}", "seed": seed}
        return key | {"validation_accuracy": accuracy}

    scores = {1e-3: (0.8, 0.6), 1e-2: (0.7, 0.7), 3e-2: (0.9, math.nan), 1e-1: (0.5, 0.5)}
    rows.append(measured(rate, 100 + k, each[k]) for rate, each in scores.items() for k in (0, 1))
    rows.append([measured(1e-1, 0, 1.0)])  # a reported seed has no say
    assert grids.best_rate(rows, "x", "m", (100, 101)) == 1e-3  # of equal ones, the smaller
    rows.append([{**measured(1e-3, 100, math.nan), "method": "n"}])
    with pytest.raises(ValueError, match=r"n: every rate of \[0.001\] has diverged"):
        grids.best_rate(rows, "x", "n", (100, 101))


# --- packs and data ----------------------------------------------------------------------------


def arrays(inputs):
    fields = [f for f in bert.Encoder.__dataclass_fields__ if f not in ("name", "parent")]
    config = json.dumps({field: getattr(ENCODER, field) for field in fields}).encode()
    flat = bert.flatten_dict(inputs.params, sep="/")
    found = {"config": np.frombuffer(config, np.uint8)}
    found |= {f"model/{path}": np.asarray(x, np.float16) for path, x in flat.items()}
    for name in tasks.TASKS:
        found[f"{name}/classes"] = np.array(CLASSES, np.int32)
        for split in ("train", "validation", "test"):
            columns = getattr(inputs.tasks["drawn"], split)
            found |= {f"{name}/{split}/{c}": x for c, x in columns.items()}
    return found


def test_a_pack_gives_the_same_numbers_as_the_packages(tmp_path, monkeypatch, inputs, capsys):
    def download(names, wordnet):
        return {k: x for k, x in arrays(inputs).items() if tasks._is_used(k, names)}

    monkeypatch.setattr(tasks, "_download", download)
    path = tmp_path / "pack.npz"
    pack.main([str(path)])
    assert "float16" in capsys.readouterr().out
    packed, direct = tasks.load(["movie"], path), tasks.load(["movie"])
    assert packed.digest == direct.digest
    assert [*packed.tasks] == ["movie"]
    flat = bert.flatten_dict(packed.params, sep="/")
    for name, x in bert.flatten_dict(inputs.params, sep="/").items():
        assert flat[name].dtype == np.float32
        np.testing.assert_array_equal(flat[name], x.astype(np.float16).astype(np.float32))
    task, expected = packed.tasks["movie"], inputs.tasks["drawn"]
    for split in ("train", "validation", "test"):
        for column, x in getattr(expected, split).items():
            got = getattr(task, split)[column]
            np.testing.assert_array_equal(got, x)
            assert got.dtype == x.dtype
    for damaged, message in (
        (path.read_bytes()[:-100], "damaged"),
        (b"text", "not a pack"),
    ):
        (tmp_path / "bad.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{message}.*write it with: python"):
            tasks.load(["movie"], tmp_path / "bad.npz")
    np.savez(tmp_path / "less.npz", config=arrays(inputs)["config"])
    with pytest.raises(ValueError, match="no 'movie/test/labels'"):
        tasks.load(["movie"], tmp_path / "less.npz")
    with pytest.raises(FileNotFoundError, match="no such file; write it with"):
        tasks.load(["movie"], tmp_path / "none.npz")
    with pytest.raises(ValueError, match="task 'books': expected one of movie"):
        tasks.load(["books"], path)
    monkeypatch.setattr(pack, "LIMIT", 10)
    with pytest.raises(SystemExit, match="expected at most 10"):
        pack.main([str(path)])
    with pytest.raises(ValueError, match=r"w: 70000.0 does not fit into float16"):
        tasks.half("w", np.array([1.0, 70000.0]))
    with pytest.raises(ValueError, match="do not fit into 16 bits"):
        tasks._narrow("ids", np.array([70000], np.int32))


def message(*fields):
    """Encode fields of a protocol buffer: ints, or bytes."""

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    out = b""
    for number, x in fields:
        if isinstance(x, int):
            out += varint(number << 3) + varint(x)
        else:
            out += varint(number << 3 | 2) + varint(len(x)) + x
    return out


def test_an_onnx_file_gives_tensors_and_what_products_multiply_by():
    x = np.arange(300, dtype=np.float32).reshape(2, 150)

    def tensor(name, kind, dims):
        return message(*dims, (2, kind), (8, name), (9, x.tobytes()))

    graph = message(
        (1, message((1, b"input"), (1, b"w"), (2, b"y"), (3, b"/q/MatMul"), (4, b"MatMul"))),
        (1, message((1, b"y"), (1, b"w"), (3, b"/q/Add"), (4, b"Add"))),
        (5, tensor(b"w", 1, [(1, 2), (1, 150)])),
        (5, tensor(b"packed", 1, [(1, bytes([2, 0x96, 1]))])),
        (5, tensor(b"integers", 7, [(1, 2)])),
    )
    fixed = bytes([3 << 3 | 5]) + bytes(4) + bytes([4 << 3 | 1]) + bytes(8)
    weights, products = dinov2.read_onnx(message((1, 8)) + fixed + message((7, graph)))
    assert products == {"/q/MatMul": "w"}
    assert [*weights] == ["w", "packed"]
    for name in weights:
        np.testing.assert_array_equal(weights[name], x)
    with pytest.raises(ValueError, match="not an ONNX file: a field of kind 3"):
        dinov2.read_onnx(b"\x0btext")


def test_positions_are_resized_as_cubic_interpolation_does():
    line = np.linspace(0, 1, 9, dtype=np.float32)
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(1, 81, 2)
    np.testing.assert_allclose(dinov2._resized(grid, 9), grid, atol=1e-6)  # the same size
    inside = dinov2._resized(grid, 3).reshape(3, 3, 2)[1, 1]
    np.testing.assert_allclose(inside, [0.5, 0.5], atol=1e-6)  # planes stay planes


def test_vision_methods_train_on_digits(tmp_path):
    rng = np.random.default_rng(0)
    backbone = dinov2.Backbone(width=12, layers=1, heads=2)
    n = {"train": 40, "validation": 20, "test": 20}
    split = {
        name: {
            "ids": rng.integers(0, 256, (k, 28, 28)).astype(np.uint8),
            "mask": np.ones((k, 1), bool),
            "labels": rng.integers(0, 10, k).astype(np.int32),
        }
        for name, k in n.items()
    }
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), split["train"]["ids"])["params"]
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    task = tasks.Task("digits", 10, **split)
    inputs = tasks.Inputs(backbone, params, {"digits": task}, {"model": "m"})
    size = stacks.Size(3, 4, 28, None, 2, 2)
    rows = Results(tmp_path / "a.csv", {}, inputs.digest)
    setups = {"digits": quality_vision.setup_of(inputs, size)}
    quality.run(rows, setups, ("BitFit", "LoRA"), size, (1e-3,), (0, 1), (100,))
    counts = [row["trained_parameters"] for row in rows.get(seed=0)]
    head, norms, biases = 12 * 10 + 10, 3 * 12, 12 + 4 * 12 + 48 + 12
    assert counts == [head + norms + biases, head + 2 * 8 * 24]


def test_without_wordnet_the_message_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"apt-get install wordnet-base\), or pass --wordn"):
        data.wordnet_topics(tmp_path)
    with pytest.raises(FileNotFoundError, match="or pass --packed FILE"):
        tasks.load(["topics"], wordnet=tmp_path)
    (tmp_path / "data.noun").write_text("other")
    with pytest.raises(ValueError, match=r"not the data.noun of WordNet 3.0"):
        data.wordnet_topics(tmp_path)
    with pytest.raises(ValueError, match="domain='books': expected one of amazon, nyt, tweets"):
        data.other_sentiment("books")


# --- end to end --------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("script", [quality, weights_and_ranks])
def test_quick_runs_continue_and_draw(script, tmp_path, capsys):
    name = script.__name__
    argv = ["--quick", "--out", str(tmp_path)]
    script.main(argv)
    first = capsys.readouterr().out
    assert "too few steps" in first
    rows = (tmp_path / f"{name}.csv").read_bytes()
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert len(pictures) == 4
    assert {re.sub("light|dark", "", name) for name in pictures} != pictures
    script.main(argv)
    assert (tmp_path / f"{name}.csv").read_bytes() == rows
    described = json.loads((tmp_path / f"{name}.json").read_text())
    assert described["rounding"] == common.tasks.ROUNDING
