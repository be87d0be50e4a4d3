"""A second adapter on a frozen first one: their updates add up, and one of them trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    assert_close,
    assert_oracle,
    assert_same,
    dict_case,
    normal,
    randomize_b,
    scan_case,
)

import lora_jax
from lora_jax import Adapter, LoraParams
from lora_jax.io import hf, orbax, peft, safetensors

PARAMS = {
    "table": normal(0, (7, 6)),
    "query": {"kernel": normal(1, (6, 5))},
    "norm": {"scale": jnp.ones(5)},
}
LAYOUT = {"table": "io"}
IDS = jnp.arange(3)


def fn(p, ids):
    return p["table"][ids] @ p["query"]["kernel"] * p["norm"]["scale"][None]


def first(**options):
    options = {"targets": ["table", "query.*"], "full": "norm/scale", "layout": LAYOUT, **options}
    return randomize_b(lora_jax.lorafy(PARAMS, 2, **options), 3)


def second(under=None, **options):
    under = first() if under is None else under
    options = {"targets": "query.*", "layout": LAYOUT, "alpha": 6, **options}
    return randomize_b(lora_jax.lorafy(under, 3, **options), 4)


@pytest.mark.parametrize("case", [scan_case, dict_case])
def test_both_updates_count_and_one_trains(case):
    case = case()
    under = randomize_b(lora_jax.lorafy(case.params, 2, targets=case.targets), 3)
    both = randomize_b(lora_jax.lorafy(under, 3, targets=case.targets), 4)
    assert_oracle(case.fn, both, case.x)
    one = lora_jax.merge(LoraParams(lora_jax.merge(under), both.adapter))
    assert_same(lora_jax.merge(both), one)


@pytest.mark.usefixtures("standard_promotion")
def test_the_first_is_frozen_and_not_copied():
    both = second()
    grads = jax.grad(lambda p: lora_jax.lora(fn)(p, IDS).sum())(both)
    assert all(not np.any(x) for x in jax.tree.leaves(grads.base))
    trainable, frozen = lora_jax.split(both)
    assert list(trainable.factors) == ["query/kernel"]
    assert frozen.base is both.base
    tx = lora_jax.optimizer(optax.adamw(0.1, weight_decay=0.5))
    grads = lora_jax.value_and_grad(lambda p: lora_jax.lora(fn)(p, IDS).sum())(both)[1]
    updates, _ = tx.update(grads, tx.init(both), both)
    assert_same(optax.apply_updates(both, updates).base, both.base)
    line = str(both)
    assert "1 adapted weights" in line
    assert "all params: 110" in line  # of the model, and its own


def test_a_third_goes_on_top():
    three = second(second(), targets="table")
    assert_oracle(fn, three, IDS)
    report = lora_jax.report(fn, three, IDS)
    assert [row["path"] for row in report.rows] == ["table"]


def test_they_are_saved_apart_and_loaded_in_order(tmp_path):
    both = second()
    apply = lora_jax.lora(fn)
    for io in (safetensors, orbax):
        one, two = tmp_path / f"{io.__name__}.one", tmp_path / f"{io.__name__}.two"
        io.save(one, both.base)
        io.save(two, both)
        under = io.load(one, PARAMS)
        assert_same(apply(io.load(two, under), IDS), apply(both, IDS))
        with pytest.raises(ValueError, match="trained on top of another, frozen one"):
            io.load(two, PARAMS)
        with pytest.raises(TypeError, match="params is a LoraParams, expected its base"):
            io.load(one, both.base)
        on_top = LoraParams(first(full=None), io.load(two))
        assert_same(on_top.adapter, both.adapter)
        other = dataclasses.replace(under, adapter=first(full=None).adapter)
        with pytest.raises(ValueError, match="trained on top of another, frozen one"):
            io.load(two, other)


def test_whole_models_have_both_and_peft_wants_each_apart(tmp_path):
    both = second(first(full=None))
    family = hf.Family({r"(.*)": r"\1"})
    hf.save(tmp_path / "model", both, family, config={"model_type": "mine"})
    found = hf.load(tmp_path / "model", like=PARAMS, family=family)
    assert_close(found, lora_jax.merge(both))
    with pytest.raises(ValueError, match="PEFT activates both"):
        peft.save(tmp_path / "both", both)
    peft.save(tmp_path / "one", both.base)
    peft.save(tmp_path / "two", LoraParams(both.base.base, both.adapter))
    loaded = [peft.load(tmp_path / name, PARAMS) for name in ("one", "two")]
    again = LoraParams(loaded[0], loaded[1].adapter)
    assert_close(lora_jax.lora(fn)(again, IDS), lora_jax.lora(fn)(both, IDS))


def test_stacks_and_sums_are_over_one_frozen_adapter():
    both = second()
    stacked = lora_jax.many.stack([both, LoraParams(both.base, second(both.base).adapter)])
    rows = lora_jax.many.lora_rows(fn)(stacked, IDS, lora_ids=np.array([0, 1, -1]))
    apply = lora_jax.lora(fn)
    wanted = jnp.stack([apply(both, IDS)[0], apply(both, IDS)[1], apply(both.base, IDS)[2]])
    assert_close(rows, wanted)
    assert_close(apply(0.5 * both + 0.5 * both, IDS), apply(both, IDS))
    other = LoraParams(first(), both.adapter)
    with pytest.raises(ValueError, match="over different frozen adapters"):
        both + other
    places = lora_jax.shardings(both, jax.tree.map(lambda _: sharding(), PARAMS))
    assert jax.tree.structure(places) == jax.tree.structure(both)


def sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@pytest.mark.parametrize(
    ("under", "options", "message"),
    [
        ({}, {"dora": True}, "is of DoRA"),
        ({"dora": True, "full": None}, {}, "is of DoRA"),
        ({}, {"init": "pissa"}, "changes the base"),
        ({"init": "pissa", "targets": "query.*"}, {}, "is of an initializer's residual"),
        ({}, {"targets": [], "full": "norm/scale"}, "would replace what the frozen adapter made"),
        ({}, {"targets": [], "full": "table"}, "would replace what the frozen adapter made"),
    ],
)
def test_what_does_not_add_up_is_merged_first(under, options, message):
    under = first(**under)
    with pytest.raises(ValueError, match=message) as error:
        lora_jax.lorafy(under, 2, **{"targets": "query.*", "layout": LAYOUT, **options})
    assert "lora_jax.lorafy(lora_jax.merge(lora_params), ...)" in str(error.value)
    options = {"targets": "query.*", "layout": LAYOUT, **options}
    assert lora_jax.lorafy(lora_jax.merge(under), 2, **options)


def test_dora_under_another_weight_is_no_matter():
    both = second(first(targets="query.*", dora=True), targets="table")
    assert_oracle(fn, both, IDS)
    assert Adapter is type(both.adapter)
