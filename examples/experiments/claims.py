"""List the claims, where their numbers are, and the rules that judge them, fixed before the runs.

A claim is one number per seed. Its verdict follows from the 95 % interval of their mean: see the
rules below. Nothing else decides, and no claim is left out because of its verdict.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import SEEDS, Interval, on_par

Files = Mapping[str, Sequence[Mapping[str, Any]]]  # rows by the name of their file
Values = dict[int, float]  # by seed
Getter = Callable[[Files], Values]

HOLDS, FAILS, UNSEEN = "holds", "does not hold", "cannot be seen at this scale"
NARROW = 0.02


@dataclass(frozen=True)
class OnPar:
    """The mean difference is 0, and is known well enough to say so."""

    def verdict(self, x: Interval) -> str:
        """Judge an interval: one that excludes 0 fails; a wide one shows nothing."""
        if on_par(x, NARROW):
            return HOLDS
        return FAILS if abs(x.mean) > x.half else UNSEEN

    def __str__(self) -> str:
        return f"contains 0, narrower than {NARROW:g}"


@dataclass(frozen=True)
class Above:
    """The mean is above a bound."""

    bound: float = 0.0

    def verdict(self, x: Interval) -> str:
        """Judge an interval by the side of the bound that it is on."""
        return _side(x.mean - self.bound, x.half)

    def __str__(self) -> str:
        return f"above {self.bound:g}"


@dataclass(frozen=True)
class Below:
    """The mean is below a bound."""

    bound: float

    def verdict(self, x: Interval) -> str:
        """Judge an interval by the side of the bound that it is on."""
        return _side(self.bound - x.mean, x.half)

    def __str__(self) -> str:
        return f"below {self.bound:g}"


def _side(above: float, half: float) -> str:
    if not (math.isfinite(above) and math.isfinite(half)):
        return UNSEEN
    return HOLDS if above > half else FAILS if above < -half else UNSEEN


@dataclass(frozen=True)
class Claim:
    """A claim, and how it is judged.

    Attributes:
        group: the heading that it stands under.
        text: the claim.
        paper: the paper's number; "" if it gives none.
        number: what is measured, in words.
        rule: judges the interval.
        get: finds the numbers.
    """

    group: str
    text: str
    paper: str
    number: str
    rule: OnPar | Above | Below
    get: Getter


def value(file: str, column: str, **where: Any) -> Getter:
    """Return the number of each seed in a column, in the rows with the values ``where``.

    Raises:
        ValueError: a file lacks a column, or has two such rows of one seed.
    """

    def get(files: Files) -> Values:
        found: Values = {}
        for row in files.get(file, ()):
            if missing := [name for name in (column, *where) if name not in row]:
                raise ValueError(
                    f"{file}.csv has no column {missing[0]!r}, but {', '.join(row)}: this version "
                    "of the experiments did not write it; run them again with another --out"
                )
            if row[column] is None or row["seed"] not in SEEDS:
                continue
            if all(row[name] == wanted for name, wanted in where.items()):
                if row["seed"] in found:
                    raise ValueError(f"{file}.csv has two rows {where} of seed {row['seed']}")
                found[row["seed"]] = float(row[column])
        return found

    return get


def less(one: Getter, other: Getter) -> Getter:
    """Return ``one - other``, seed by seed."""

    def get(files: Files) -> Values:
        x, y = one(files), other(files)
        return {seed: x[seed] - y[seed] for seed in x if seed in y}

    return get


def ratio(one: Getter, other: Getter) -> Getter:
    """Return ``one / other``, seed by seed."""

    def get(files: Files) -> Values:
        x, y = one(files), other(files)
        return {seed: x[seed] / y[seed] for seed in x if seed in y}

    return get


def mean(each: Sequence[Getter]) -> Getter:
    """Return the mean of several numbers, seed by seed."""

    def get(files: Files) -> Values:
        found = [one(files) for one in each]
        return {s: float(np.mean([x[s] for x in found])) for s in found[0] if all_have(found, s)}

    def all_have(found: Sequence[Values], seed: int) -> bool:
        return all(seed in x for x in found)

    return get


TASKS = {
    "movie": "movie reviews",
    "amazon": "product reviews",
    "topics": "WordNet topics",
    "digits": "digits",
}
FULL = "full fine-tuning"


def quality_of(method: str, task: str) -> Getter:
    """Return the test accuracy of a method of the comparison."""
    file = "quality_vision" if task == "digits" else "quality"
    return value(file, "test_accuracy", task=task, method=method)


def quality() -> list[Claim]:
    """Return the claims on quality: the paper's tables 2 to 4, and LoRA's variants."""
    number = "accuracy, difference"
    paper = {
        FULL: "RoBERTa-base, GLUE: 87.2, full 86.4",
        "BitFit": "GPT-3, MNLI: 91.7, BitFit 91.0",
        "bottleneck": "GPT-3, MNLI: 91.7, adapters 91.5",
        "prefix embedding": "GPT-3, MNLI: 91.7, prefix 88.6",
        "prefix layer": "GPT-3, MNLI: 91.7, prefix 89.5",
    }
    found = []
    for task, name in TASKS.items():
        for method, theirs in paper.items():
            if task == "digits" and method not in (FULL, "BitFit"):
                continue  # not compared there
            text = f"LoRA is {'on par with' if method == FULL else 'better than'} {method}, {name}"
            get = less(quality_of("LoRA", task), quality_of(method, task))
            rule = OnPar() if method == FULL else Above()
            found.append(Claim("Quality", text, theirs, number, rule, get))
    full_wins = less(quality_of(FULL, "topics"), quality_of("LoRA", "topics"))
    text = "Full fine-tuning is better than LoRA on a far domain, WordNet topics"
    found.append(Claim("Quality", text, "", number, Above(), full_wins))
    for method in ("rsLoRA", "DoRA", "PiSSA", "LoRA+", "OLoRA", "EVA"):
        for task, name in TASKS.items():
            if task == "digits" and method != "DoRA":
                continue  # not compared there
            get = less(quality_of(method, task), quality_of("LoRA", task))
            text = f"{method} is better than LoRA, {name}"
            found.append(Claim("LoRA variants", text, "", number, Above(), get))
    return found


def costs() -> list[Claim]:
    """Return the claims on what LoRA costs, beside full fine-tuning on the movie reviews."""

    def share(column: str) -> Getter:
        def of(method: str) -> Getter:
            return value("quality", column, task="movie", method=method)

        return ratio(of("LoRA"), of(FULL))

    rows = (
        (
            "LoRA trains less than 1 % of the parameters",
            "0.01 to 0.3 %",
            "trained_parameters",
            0.01,
        ),
        ("LoRA's file has less than 1 % of the model's bytes", "1/10,000", "file_bytes", 0.01),
        ("LoRA needs less than half of the memory", "350 GB of 1.2 TB", "peak_bytes", 0.5),
        ("A step of LoRA is faster", "0.75 of the time", "seconds_per_step", 1.0),
    )
    return [
        Claim("Costs", text, paper, "share of full fine-tuning", Below(bound), share(column))
        for text, paper, column, bound in rows
    ]


def cell(name: str, task: str) -> Getter:
    """Return the test accuracy of a cell of the paper's tables 5 and 6."""
    return value("weights_and_ranks", "test_accuracy", task=task, method=name)


def weights_and_ranks() -> list[Claim]:
    """Return the claims on weights and ranks: the paper's tables 5 and 6."""
    group, number = "Weights and rank", "accuracy, difference"
    found = []
    for task in ("movie", "topics"):
        name = TASKS[task]
        budget = {"q": 8, "k": 8, "v": 8, "o": 8, "q,k": 4}
        for one, rank in budget.items():
            get = less(cell("q,v r=4", task), cell(f"{one} r={rank}", task))
            text = f"Query and value are better than {one} with the same budget, {name}"
            paper = {"q": 70.4, "k": 70.0, "v": 73.0, "o": 73.2, "q,k": 71.4}[one]
            found.append(Claim(group, text, f"WikiSQL: 73.7, {paper}", number, Above(), get))
        get = less(cell("q,k,v,o r=2", task), cell("q,v r=4", task))
        text = f"All four with rank 2 are on par with query and value with rank 4, {name}"
        found.append(Claim(group, text, "WikiSQL: 73.7, 73.7", number, OnPar(), get))
        get = less(cell("q,k,v,o r=2", task), cell("q r=8", task))
        text = f"All four with rank 2 are better than query alone with rank 8, {name}"
        found.append(Claim(group, text, "WikiSQL: 73.7, 70.4", number, Above(), get))
        for rank, paper in ((1, 73.4), (4, 73.7)):
            get = less(cell(f"q,v r={rank}", task), cell("q,v r=64", task))
            text = f"Rank {rank} is on par with rank 64 for query and value, {name}"
            paper = f"WikiSQL: {paper}, 73.5"
            found.append(Claim(group, text, paper, number, OnPar(), get))
    return found


def subspaces() -> list[Claim]:
    """Return the claims of the paper's section 7."""
    group, found = "Subspaces", []

    def own(column: str, method: str, weight: str, task: str = "movie") -> Getter:
        return value("subspaces", column, task=task, method=method, setting=weight)

    def add(text: str, paper: str, number: str, rule: OnPar | Above | Below, get: Getter) -> None:
        found.append(Claim(group, text, paper, number, rule, get))

    for weight in ("query", "value"):
        text = f"Ranks 8 and 64 share the top direction of A, {weight}"
        add(text, "> 0.5", "phi(1, 1)", Above(0.5), own("phi_1_1", "ranks", weight))
        text = f"Most of the first 8 directions are not shared, {weight}"
        add(text, "little", "phi(8, 8)", Below(0.5), own("phi_8_8", "ranks", weight))
        text = f"Untrained A share no top direction, {weight}"
        add(text, "0", "phi(1, 1)", Below(0.1), own("phi_1_1", "random", weight))
        get = less(own("phi_1_1", "seeds", weight), own("phi_1_1", "random", weight))
        text = f"Two seeds of rank 64 share more than untrained A, {weight}"
        add(text, "", "phi(1, 1), difference", Above(), get)
        get = own("amplification", "rank 4", weight)
        text = f"Rank 4 amplifies its directions at least tenfold, {weight}"
        add(text, "21.5", "amplification", Above(10.0), get)
        get = less(get, own("amplification", "rank 64", weight))
        text = f"Rank 4 amplifies more than rank 64, {weight}"
        add(text, "21.5, 1.9", "amplification, difference", Above(), get)
        get = less(own("projected", "rank 4", weight), own("projected_random", "rank 4", weight))
        text = f"The update's directions have more of W than random ones, {weight}"
        add(text, "0.32, 0.02", "norm of U^T W V, difference", Above(), get)
        get = less(
            own("effective_rank", FULL, weight, "topics"),
            own("effective_rank", FULL, weight, "movie"),
        )
        text = f"A far domain's update has a higher effective rank than an easy one's, {weight}"
        add(text, "", "effective rank, difference", Above(), get)
    return found


def full_rank() -> list[Claim]:
    """Return the claims on LoRA of full rank."""
    group, found = "Full rank", []

    def own(column: str, method: str, optimizer: str) -> Getter:
        return value("full_rank", column, task="movie", method=method, setting=optimizer)

    def add(text: str, number: str, rule: OnPar | Above | Below, get: Getter) -> None:
        paper = "LoRA roughly converges to full" if rule == OnPar() else ""
        found.append(Claim(group, text, paper, number, rule, get))

    distance = "distance of updates, relative"
    for optimizer, name in (("sgd", "SGD"), ("adam", "Adam")):
        for method in ("orthogonal", "gaussian"):
            full = own("test_accuracy", FULL, optimizer)
            get = less(own("test_accuracy", method, optimizer), full)
            text = f"Full rank is on par with full fine-tuning, {name}, {method} A"
            add(text, "accuracy, difference", OnPar(), get)
        text = f"Control: A frozen as the identity takes the path of full fine-tuning, {name}"
        add(text, distance, Below(0.01), own("final_gap", "identity, a frozen", optimizer))
    text = "Theory: SGD with an orthogonal A starts on the path of full fine-tuning"
    add(text, f"{distance}, 10 steps", Below(0.1), own("early_gap", "orthogonal", "sgd"))
    text = "Theory: Adam with an orthogonal A takes another path than full fine-tuning"
    add(text, f"{distance}, 10 steps", Above(0.1), own("early_gap", "orthogonal", "adam"))
    return found


def latency() -> list[Claim]:
    """Return the claims of the paper's table 1, on both devices."""
    paper = {
        "32x512": ("+2.2 %", "+3.0 %"),
        "16x256": ("+5.0 %", "+8.4 %"),
        "1x128": ("+20.7 %", "+30.3 %"),
    }
    places = [("gpu", shape) for shape in paper] + [("cpu", "1x128"), ("cpu", "4x64")]
    found = []
    for platform, shape in places:
        where = f"{shape.replace('x', ' x ')} tokens, {platform.upper()}"
        ratio = {
            name: less(
                value(
                    f"latency_{platform}", "ratio", setting=shape, method=name, task="gpt2-medium"
                ),
                value(
                    f"latency_{platform}", "ratio", setting=shape, method="base", task="gpt2-medium"
                ),
            )
            for name in ("merged", "unmerged", "adapter_l", "adapter_h")
        }
        low, high = paper.get(shape, ("", ""))

        def add(text: str, number: str, rule: OnPar | Above, name: str) -> None:
            text, get = f"{text}, {where}", ratio[name]  # noqa: B023
            found.append(Claim("Latency", text, number, "time / base - 1", rule, get))

        add("Merged LoRA adds no latency", "0 %", OnPar(), "merged")
        add("Unmerged LoRA adds latency", "", Above(), "unmerged")
        add("Adapters (Lin) add latency", low, Above(), "adapter_l")
        add("Adapters (Houlsby) add latency", high, Above(), "adapter_h")
    return found


def switching() -> list[Claim]:
    """Return the claims on task switching and on combined adapters."""
    domains, group = ("movie", "amazon", "nyt", "tweets"), "Task switching"

    def own(method: str, domain: str) -> Getter:
        return value("switching", "test_accuracy", task=domain, method=method)

    def everywhere(method: str) -> Getter:
        return mean([own(method, domain) for domain in domains])

    found = []
    best = mean([own(domain, domain) for domain in domains])
    for domain in domains:
        others = mean([own(other, domain) for other in domains if other != domain])
        text = f"A domain's adapter is better there than the other three, {domain}"
        get = less(own(domain, domain), others)
        found.append(Claim(group, text, "", "accuracy, difference", Above(), get))
    for name, label in (
        ("unmerged", "Passing another adapter"),
        ("switch", "Replacing a merged one"),
    ):
        get = value("switching", "ratio", task="switch", method=name)
        text = f"{label} is faster than copying a fine-tuned model"
        found.append(Claim(group, text, "", "time / time of a copy", Below(1.0), get))
    for name in ("sum", "mean", "TIES", "DARE", "Arrow"):
        text = f"{name} of four adapters is on par with each domain's own"
        get = less(everywhere(name), best)
        found.append(Claim(group, text, "", "accuracy, difference", OnPar(), get))
    for name in ("TIES", "DARE", "Arrow"):
        text = f"{name} is better than the plain mean of the updates"
        get = less(everywhere(name), everywhere("mean"))
        found.append(Claim(group, text, "", "accuracy, difference", Above(), get))
    return found


def every() -> list[Claim]:
    """Return all claims, in the order of the page."""
    parts = quality, costs, weights_and_ranks, subspaces, full_rank, latency, switching
    return [claim for part in parts for claim in part()]
