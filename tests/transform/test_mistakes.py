"""Mistakes around ``lora``: the message says where, why and what to do, and doing it works."""

import traceback

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import lora_jax

PARAMS = {"query": {"kernel": jnp.ones((6, 5))}, "head": {"kernel": jnp.ones((6, 3))}}
X = jnp.ones((2, 6))


def fn(p, x):
    return x @ p["query"]["kernel"]


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("lora", lora_jax.lora),
        ("lora_rows", lora_jax.many.lora_rows),
        ("lora_routed", lora_jax.many.lora_routed),
    ],
)
def test_an_adapted_function_is_not_adapted_again(name, wrap):
    for adapted in (lora_jax.lora(fn), jax.jit(lora_jax.lora(fn)), lora_jax.many.lora_rows(fn)):
        with pytest.raises(ValueError, match=f"^{name}: the function is adapted already"):
            wrap(adapted)


def test_parameters_are_asked_of_a_lora_params():
    lora_params = lora_jax.lorafy(PARAMS, 2)
    remedy = r"takes it through lora_jax.lora: lora_jax.lora\(model.apply\)\("
    with pytest.raises(TypeError, match=rf"LoraParams\['query'\]: .*{remedy}"):
        fn(lora_params, X)
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(AttributeError, match=rf"LoraParams.items: .*{remedy}"):
        model.apply(lora_jax.lorafy(variables, 2, targets="all-linear"), X)
    adapted = lora_jax.lorafy(variables["params"], 2, targets="all-linear")
    assert lora_jax.lora(model.apply)({"params": adapted}, X).shape == (2, 3)


def test_a_module_is_called_and_a_state_is_merged():
    module = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    adapted = lora_jax.lorafy(module, 2, targets="all-linear")
    merging = lora_jax.lora(lambda state, x: nnx.merge(graphdef, state)(x))
    with pytest.raises(ValueError, match="number of leaves") as error:
        merging(adapted, X)
    assert "here the NNX module Linear" in "".join(traceback.format_exception(error.value))
    for apply, params in ((lambda m, x: m(x), module), (None, state)):
        run = merging if apply is None else lora_jax.lora(apply)
        y = run(lora_jax.lorafy(params, 2, targets="all-linear"), X)
        assert (y == module(X)).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": None}, TypeError, r"alpha=None for 'query/kernel': .*Leave it out"),
        ({"alpha": {"head.*": 1}, "targets": ".*"}, ValueError, r"alpha: no pattern of the map"),
        ({"rank": None}, TypeError, r"rank=None for 'query/kernel': expected a number"),
    ],
)
def test_settings_of_no_weight(options, error, message):
    with pytest.raises(error, match=message):
        lora_jax.lorafy(PARAMS, **{"rank": 2, **options})


def test_a_rank_above_a_heads_has_remedies_that_work():
    with pytest.raises(ValueError, match=r"expected 1 to min\(in, out\) = 3") as error:
        lora_jax.lorafy(PARAMS, 4, targets=".*kernel")
    text = str(error.value)
    rank = "{'head/kernel': 3, '.*': 4}"
    assert f"rank={rank}; train it fully, full='head/kernel'; or leave it out, exclude=" in text
    by_rank = lora_jax.lorafy(PARAMS, {"head/kernel": 3, ".*": 4}, targets=".*kernel")
    assert {f.rank for f in by_rank.adapter.factors.values()} == {3, 4}
    for remedy in ({"full": "head/kernel"}, {"exclude": "head/kernel"}):
        adapter = lora_jax.lorafy(PARAMS, 4, targets=".*kernel", **remedy).adapter
        assert list(adapter.factors) == ["query/kernel"]
        assert list(adapter.full) == list(remedy.get("full", "").split())


@pytest.mark.parametrize("params", [nn.Dense(3), fn, None])
def test_what_has_no_arrays(params):
    for call in (lora_jax.lorafy, lambda p: lora_jax.layout_of(fn, p, X)):
        with pytest.raises(ValueError, match=r"(?s)params has no arrays: it is a .*model.init"):
            call(params)
