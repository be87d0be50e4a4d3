"""The rules that judge the claims, the page of results, fair timing, and the scripts end to end."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "experiments")]

import bert  # noqa: E402
import claims  # noqa: E402
import common  # noqa: E402
import full_rank  # noqa: E402
import latency  # noqa: E402
import members  # noqa: E402
import page  # noqa: E402
import quality  # noqa: E402
import quality_vision  # noqa: E402
import subspaces  # noqa: E402
import switching  # noqa: E402
import tasks  # noqa: E402
import weights_and_ranks  # noqa: E402
from claims import FAILS, HOLDS, UNSEEN, Above, Below, OnPar  # noqa: E402

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize(
    ("rule", "mean", "half", "verdict"),
    [
        (OnPar(), 0.004, 0.009, HOLDS),
        (OnPar(), 0.0, 0.0, HOLDS),
        (OnPar(), 0.004, 0.0101, UNSEEN),  # contains 0, but is wider than 0.02
        (OnPar(), 0.004, 0.003, FAILS),  # better is not on par either
        (OnPar(), -0.03, 0.01, FAILS),
        (OnPar(), np.nan, np.nan, UNSEEN),
        (Above(0.5), 0.6, 0.09, HOLDS),
        (Above(0.5), 0.6, 0.11, UNSEEN),
        (Above(0.5), 0.4, 0.09, FAILS),
        (Above(), 0.0, 0.0, UNSEEN),
        (Above(), np.nan, np.nan, UNSEEN),
        (Below(1.0), 0.5, 0.4, HOLDS),
        (Below(1.0), 1.5, 0.4, FAILS),
        (Below(1.0), 1.5, 0.6, UNSEEN),
    ],
)
def test_a_rule_judges_an_interval(rule, mean, half, verdict):
    assert rule.verdict(common.Interval(mean, half)) == verdict


def written(folder, name, rows):
    """Write a CSV file as the experiments do, without running one."""
    folder.mkdir(exist_ok=True)
    columns = list(rows[0])
    lines = [",".join(columns), *(",".join(str(row[c]) for c in columns) for row in rows)]
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    shared = {"commands": ["python x.py"], "versions": {"jax": "1"}, "hardware": "H"}
    shared |= dict.fromkeys(("rounding", "precision", "code"), "-") | {"inputs": {"model": "0"}}
    (folder / f"{name}.json").write_text(json.dumps(shared))


def phi_rows(values, weight="query"):
    return [
        {
            "task": "movie",
            "method": "ranks",
            "setting": weight,
            "seed": seed,
            "phi_1_1": x,
            "phi_8_8": 0.2,
            "amplification": "",
            "projected": "",
            "projected_random": "",
            "effective_rank": "",
        }
        for seed, x in enumerate(values)
    ]


def verdicts(folder, tmp_path):
    """The last cell of each claim's line, by claim."""
    page.main([str(folder), "--page", str(tmp_path / "page.md")])
    lines = (tmp_path / "page.md").read_text().splitlines()
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return {own[0]: (own[3], own[-1]) for own in cells}


def test_the_page_judges_what_has_run_and_says_what_has_not(tmp_path):
    folder = tmp_path / "results"
    rows = phi_rows([0.7, 0.72, 0.69, 0.71, 0.7])
    written(folder, "subspaces", rows + phi_rows([0.1, 0.9, 0.5], "value"))
    found = verdicts(folder, tmp_path)
    # t with four degrees: 2.776 * std([...], ddof=1) / sqrt(5)
    assert found["Ranks 8 and 64 share the top direction of A, query"] == (
        "+0.7040 ± 0.0142",
        HOLDS,
    )
    assert found["Most of the first 8 directions are not shared, query"][1] == HOLDS
    partial_run = found["Ranks 8 and 64 share the top direction of A, value"]
    assert partial_run == ("", "not run (3 of 5 seeds)")
    assert found["Rank 4 amplifies more than rank 64, query"] == ("", "not run")
    assert found["LoRA is on par with full fine-tuning, movie reviews"] == ("", "not run")


def test_the_page_shows_a_claim_that_does_not_hold_and_by_how_much(tmp_path):
    folder = tmp_path / "results"
    rows = [
        {"task": "movie", "method": m, "setting": "rate=1", "seed": s, "test_accuracy": 0.8 + d + x}
        for m, d in (("LoRA", -0.05), ("full fine-tuning", 0.0))
        for s, x in enumerate((0, 0.01, 0.02, 0.03, 0.04))
    ]
    for row in rows:
        row |= dict.fromkeys(("trained_parameters", "file_bytes", "peak_bytes"), 1)
        row["seconds_per_step"] = 1
    written(folder, "quality", rows)
    own = verdicts(folder, tmp_path)["LoRA is on par with full fine-tuning, movie reviews"]
    assert own == ("-0.0500 ± 0.0000", f"**{FAILS}**")


def test_an_empty_folder_gives_a_page_on_which_nothing_has_run(tmp_path):
    (tmp_path / "results").mkdir()
    found = verdicts(tmp_path / "results", tmp_path)
    assert {own[1] for name, own in found.items() if name in {c.text for c in claims.every()}} == {
        "not run"
    }


def test_claims_are_worded_differently_and_each_has_its_script():
    texts = [claim.text for claim in claims.every()]
    assert len(set(texts)) == len(texts)
    assert list(page.SCRIPTS) == list(dict.fromkeys(claim.group for claim in claims.every()))
    scripts = {name for own in page.SCRIPTS.values() for name in own.split(", ")}
    assert all((EXAMPLES / "experiments" / f"{name}.py").is_file() for name in scripts)


def test_claims_ask_for_what_the_experiments_write(monkeypatch):
    asked = []
    monkeypatch.setattr(claims, "value", lambda file, column, **where: asked.append((file, where)))
    claims.every()
    cells = weights_and_ranks.cells_of(
        weights_and_ranks.BUDGET, weights_and_ranks.RANKED, weights_and_ranks.RANKS
    )
    ranks = (f"rank {rank}" for rank in subspaces.RANKS)
    methods = {
        "quality": quality.METHODS,
        "quality_vision": quality_vision.METHODS,
        "weights_and_ranks": cells,
        "subspaces": (*subspaces.PAIRS, *ranks, subspaces.FULL),
        "full_rank": (full_rank.FULL, *full_rank.METHODS),
        "latency_gpu": latency.METHODS,
        "latency_cpu": latency.METHODS,
        "switching": (*switching.METHODS, *switching.SWITCHES),
    }
    places = {
        "quality": quality.NAMES,
        "weights_and_ranks": weights_and_ranks.NAMES,
        "subspaces": subspaces.TASKS,
        "switching": (*switching.DOMAINS, "switch"),
    }
    assert {file for file, _ in asked} == {*methods}
    for file, where in asked:
        assert where["method"] in methods[file]
        assert where["task"] in places.get(file, where["task"])


def test_the_stated_rules_are_those_of_the_code():
    assert f"narrower than {claims.NARROW:g}" in page.HEADER
    assert f"{len(common.SEEDS)} seeds" in page.HEADER


def test_damaged_results_are_refused_and_the_page_stays(tmp_path):
    folder = tmp_path / "results"
    out = tmp_path / "page.md"
    out.write_text("before")
    run = partial(page.main, [str(folder), "--page", str(out)])
    with pytest.raises(SystemExit, match="no such folder; pass the --out"):
        run()
    written(folder, "subspaces", phi_rows([0.5, "x"]))
    with pytest.raises(SystemExit, match=r"subspaces\.csv, line 3: .*'x'.*remove the line"):
        run()
    written(folder, "subspaces", [{"task": "a", "method": "b", "setting": "c", "seed": 0}])
    with pytest.raises(SystemExit, match=r"has no column 'phi_1_1'.*another --out"):
        run()
    written(folder, "subspaces", phi_rows([0.5]) * 2)
    with pytest.raises(SystemExit, match=r"two rows .* of seed 0"):
        run()
    (folder / "subspaces.json").write_text("{")
    with pytest.raises(SystemExit, match=r"subspaces\.json: not JSON"):
        run()
    (folder / "subspaces.json").write_text('{"inputs": "x", "versions": {}}')
    with pytest.raises(SystemExit, match=r"subspaces\.json: this version .* did not write it"):
        run()
    (folder / "subspaces.json").unlink()
    with pytest.raises(SystemExit, match="or remove the CSV file"):
        run()
    assert out.read_text() == "before"


class Clock:
    """A clock on which calls take longer and longer."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now

    def work(self, name, cost):
        self.order.append(name)
        self.now += cost * (1 + 0.05 * len(self.order))


def test_interleaved_timing_is_fair_to_each_function_while_the_machine_slows_down():
    clock, costs = Clock(), {"a": 1.0, "b": 1.0, "c": 2.0}
    calls = {name: partial(clock.work, name, cost) for name, cost in costs.items()}
    seconds = latency.interleaved(calls, 12, seed=0, clock=clock)
    assert np.median(seconds["b"] / seconds["a"]) == pytest.approx(1.0, abs=0.05)
    assert np.median(seconds["c"] / seconds["a"]) == pytest.approx(2.0, abs=0.1)
    timed = np.array(clock.order[3:]).reshape(12, 3)  # the first round is not timed
    for place in timed.T:
        assert all((place == name).sum() == 4 for name in costs)


def test_the_interval_of_a_median_has_its_order_statistics():
    x = np.arange(101.0)[::-1]
    median, low, high = latency.median_interval(x)
    assert median == 50
    assert low == 40  # floor(101/2 - 1.96 sqrt(101)/2)
    assert high == 61
    assert latency.median_interval(np.array([3.0, 1.0])) == (2.0, 1.0, 3.0)


def test_timed_outputs_must_be_equal_and_differ_from_the_base():
    base, adapted = np.zeros((2, 3)), np.ones((2, 3))
    same = {"base": base, "merged": adapted, "unmerged": adapted * (1 + 1e-4)}
    assert latency.check_equal(same, "float32") == pytest.approx(1e-4)
    with pytest.raises(AssertionError, match=r"differ by 1\.0e-01"):
        latency.check_equal(same | {"unmerged": adapted * 1.1}, "float32")
    with pytest.raises(AssertionError, match=r"moves the output by 0\.0e\+00"):
        latency.check_equal(dict.fromkeys(same, adapted), "float32")


@pytest.mark.parametrize("text", ["32", "0x3", "3x2000", "ax4"])
def test_latency_refuses_shapes_that_it_cannot_time(text, capsys):
    with pytest.raises(SystemExit):
        latency.main(["--shapes", text])
    assert "BATCHxLENGTH" in (err := capsys.readouterr().err) or "1024 positions" in err


def test_full_rank_sgd_is_on_the_path_of_full_fine_tuning_as_theory_says():
    gaps = full_rank.toy_gaps((4, 8))
    assert gaps[8] < 0.01
    assert gaps[4] / gaps[8] == pytest.approx(4, rel=0.15)  # 1 / c^2


def tiny_pack(path):
    """Write a pack of a model of two layers, and of a task where one token decides."""
    rng, words, width, length = np.random.default_rng(0), 40, 64, tasks.LENGTH
    encoder = bert.Encoder(words, width, 2, 2, 96, length, 2, 1e-12)
    config = {k: v for k, v in vars(encoder).items() if k in bert.Encoder.__dataclass_fields__}
    config = {k: v for k, v in config.items() if k not in ("name", "parent")}
    arrays: dict[str, Any] = {"config": np.frombuffer(json.dumps(config).encode(), np.uint8)}
    row = np.zeros((1, 4), np.int32)
    params = encoder.init(jax.random.key(0), row, row == 0)["params"]
    for name, leaf in flatten_dict(params, sep="/").items():
        arrays[f"model/{name}"] = np.asarray(leaf, np.float16)
    for name in tasks.TASKS:
        arrays[f"{name}/classes"] = np.array(10 if name == "topics" else 2, np.uint16)
        for split in ("train", "validation", "test"):
            ids = rng.integers(0, words, (120, length)).astype(np.uint16)
            arrays[f"{name}/{split}/ids"] = ids
            arrays[f"{name}/{split}/mask"] = np.ones(ids.shape, bool)
            arrays[f"{name}/{split}/labels"] = ids[:, 0] % arrays[f"{name}/classes"]
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.long
def test_every_experiment_runs_quickly_and_continues(tmp_path, monkeypatch):
    pack, out = tiny_pack(tmp_path / "pack.npz"), tmp_path / "out"
    args = ["--quick", "--packed", str(pack), "--out", str(out)]
    scripts = full_rank, subspaces, switching, latency
    for script in scripts:
        script.main(args)
    before = {path.name: path.read_text() for path in out.glob("*.csv")}
    assert {"full_rank.csv", "latency_cpu.csv", "subspaces.csv", "switching.csv"} == {*before}
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert [name.rpartition("-")[2] for name in pictures] == ["dark.png", "light.png"] * 6

    # What is there is not computed again.
    trained = members.train
    for script, name in ((members, "train"), (full_rank, "train"), (latency, "measure")):
        monkeypatch.setattr(script, name, None)
    for script in scripts:
        script.main(args)
    assert {path.name: path.read_text() for path in out.glob("*.csv")} == before

    # A lost row is, and the others stay.
    monkeypatch.setattr(members, "train", trained)
    lines = before["subspaces.csv"].splitlines(keepends=True)
    (out / "subspaces.csv").write_text("".join(lines[:3] + lines[4:]))
    subspaces.main(args)
    again = (out / "subspaces.csv").read_text().splitlines(keepends=True)
    assert again[:-1] == lines[:3] + lines[4:]
    assert again[-1].split(",")[:4] == lines[3].split(",")[:4]

    # Two seeds are no result.
    page.main([str(out), "--page", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert "not run (2 of 5 seeds)" in text
    assert 'srcset="out/full_rank-dark.png"' in text
    assert claims.HOLDS not in text.partition("## How")[0].partition("| claim")[2]
