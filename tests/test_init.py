"""Initializers: the model starts as it was, the draws are what they say, and the way back."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_oracle, error, randomize_b
from jax import lax
from scipy import stats

import lora_jax
from lora_jax.init import pissa

NAMES = ["gaussian", "kaiming_uniform", "orthogonal", "pissa", "olora"]
ALL = [*NAMES, partial(pissa, niter=4)]
IDS = [*NAMES, "pissa, randomized"]

PARAMS = {
    "dense": jax.random.normal(jax.random.key(0), (12, 10)) / 3,
    "heads": jax.random.normal(jax.random.key(1), (10, 2, 6)) / 3,
    "back": jax.random.normal(jax.random.key(2), (12, 10)) / 3,  # stored transposed
    "experts": jax.random.normal(jax.random.key(3), (3, 12, 10)) / 3,
    "conv": jax.random.normal(jax.random.key(4), (3, 4, 6)) / 3,
}
LAYOUT = {"dense": "io", "heads": "ioo", "back": "oi", "experts": "bio", "conv": "iio"}
X = jax.random.normal(jax.random.key(9), (5, 12))


def fn(p, x):
    """Every weight, in turn."""
    h = jnp.tanh(x @ p["dense"])
    h = jnp.tanh(jnp.einsum("bi,inh->bnh", h, p["heads"])).reshape(5, 12)
    h = jnp.einsum("bi,eio->ebo", h, p["experts"]).sum(0) @ p["back"].T
    image = lax.conv_general_dilated(
        h.reshape(5, 3, 4), p["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return h, image


def adapted(init, rank=4, **options):
    return lora_jax.lorafy(PARAMS, rank, targets=".*", layout=LAYOUT, init=init, **options)


@pytest.mark.parametrize("options", [{}, {"rslora": True, "alpha": 4}, {"dora": True}], ids=str)
@pytest.mark.parametrize("init", ALL, ids=IDS)
def test_the_adapted_model_starts_as_the_model(init, options):
    lora_params = adapted(init, **options)
    # OLoRA's base is several times as large as W, and the norm of a sum cancels
    tolerance = 1e-5 if init == "olora" and "dora" in options else 2e-6
    assert_close(lora_jax.lora(fn)(lora_params, X), fn(PARAMS, X), tolerance)
    assert_close(lora_jax.merge(lora_params), PARAMS, tolerance)


@pytest.mark.parametrize("init", ALL, ids=IDS)
def test_factors_of_every_initializer_train_exactly(init):
    assert_oracle(fn, randomize_b(adapted(init), std=0.05), X, tolerance=2e-5)


@pytest.mark.parametrize("init", NAMES)
def test_only_those_that_take_from_the_weight_change_the_base(init):
    base = adapted(init).base
    same = [base[name] is leaf for name, leaf in PARAMS.items()]
    assert all(same) == (init not in ("pissa", "olora"))
    assert any(same) == all(same)


def test_every_path_has_its_own_draw_and_every_expert_too():
    params = {name: jnp.zeros((2, 8, 8)) for name in "uv"}
    for init in ("gaussian", "kaiming_uniform", "orthogonal"):
        factors = lora_jax.lorafy(params, 4, targets=".*", layout={".": "bio"}, init=init)
        draws = [f.a[k] for f in factors.adapter.factors.values() for k in (0, 1)]
        for i, draw in enumerate(draws):
            assert all(error(draw, other) > 0.1 for other in draws[:i])


@pytest.mark.parametrize("init", ALL, ids=IDS)
def test_eager_and_jitted_starts_agree(init):
    exact = init in ("gaussian", "kaiming_uniform")
    eager, jitted = adapted(init), jax.jit(lambda: adapted(init))()
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if exact else 2e-5)


def draw(init, shape=(400, 50), rank=20):
    params = {"w": jnp.ones(shape)}
    (f,) = lora_jax.lorafy(params, rank, targets="w", init=init).adapter.factors.values()
    return f


@pytest.mark.parametrize(
    ("init", "distribution"),
    [
        ("gaussian", stats.norm(0, 1 / np.sqrt(400))),
        ("kaiming_uniform", stats.uniform(-1 / 20, 2 / 20)),
    ],
)
def test_draws_are_of_their_distribution(init, distribution):
    f = draw(init)
    assert stats.kstest(np.ravel(f.a), distribution.cdf).pvalue > 1e-3
    assert not f.b.any()


def test_orthogonal_factors_are_random_and_meet_in_nothing():
    f = draw("orthogonal")
    # a row of a is half as many normals as the rank, over 10, in an orthonormal basis
    assert stats.kstest(np.ravel(f.a), stats.norm(0, np.sqrt(0.5) / 10).cdf).pvalue > 1e-3
    assert jnp.abs(f.a @ f.b).max() < 1e-6
    assert jnp.linalg.matrix_rank(f.a) == jnp.linalg.matrix_rank(f.b) == 10
    with pytest.raises(ValueError, match="rank=3 of 'w' is odd"):
        draw("orthogonal", rank=3)


def test_pissa_takes_the_largest_singular_values():
    w = PARAMS["dense"]
    f = lora_jax.lorafy({"w": w}, 4, targets="w", init="pissa").adapter.factors["w"]
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    assert_close(f.scale * f.a @ f.b, u[:, :4] @ jnp.diag(s[:4]) @ vt[:4], 1e-5)
    assert_close(f.a.T @ f.a, jnp.diag(s[:4] / f.scale), 1e-5)  # the halves are balanced
    assert_close(f.b @ f.b.T, jnp.diag(s[:4] / f.scale), 1e-5)


def test_randomized_pissa_finds_a_decaying_spectrum():
    u, v = (jnp.linalg.qr(jax.random.normal(jax.random.key(i), (60, 60)))[0] for i in (0, 1))
    w = (u * 0.7 ** jnp.arange(60.0)[None]) @ v
    exact, fast = (
        lora_jax.lorafy({"w": w}, 4, targets="w", init=init).base["w"]
        for init in ("pissa", partial(pissa, niter=4))
    )
    assert_close(fast, exact, 1e-4)


def test_olora_writes_an_orthonormal_basis():
    f = lora_jax.lorafy({"w": PARAMS["dense"]}, 4, targets="w", init="olora").adapter.factors["w"]
    assert_close(f.b @ f.b.T, jnp.eye(4), 1e-5)


def test_a_part_of_a_weight_gives_up_its_own_principal_part():
    w = PARAMS["dense"]
    lora_params = lora_jax.lorafy({"w": w}, 2, targets="w[:, 0:4]", init="pissa")
    assert (lora_params.base["w"][:, 4:] == w[:, 4:]).all()
    alone = lora_jax.lorafy({"w": w[:, :4]}, 2, targets="w", init="pissa")
    assert_close(lora_params.base["w"][:, :4], alone.base["w"], 1e-5)
    assert_close(lora_jax.merge(lora_params), {"w": w}, 1e-5)


def test_the_base_keeps_its_dtype_and_containers():
    params = {"params": [{"kernel": PARAMS["dense"].astype(jnp.bfloat16), "n": 3}]}
    lora_params = lora_jax.lorafy(params, 2, targets=".*kernel", init="pissa")
    assert jax.tree.structure(lora_params.base) == jax.tree.structure(params)
    assert lora_params.base["params"][0]["kernel"].dtype == jnp.bfloat16
    assert lora_params.base["params"][0]["n"] == 3
    assert_close(lora_jax.merge(lora_params)["params"][0]["kernel"], params["params"][0]["kernel"])


def trained(lora_params, seed=5):
    """Anything but the start."""
    factors = {}
    for i, (path, f) in enumerate(lora_params.adapter.factors.items()):
        keys = jax.random.split(jax.random.key(seed + i), 2)
        a, b = (
            x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip((f.a, f.b), keys, strict=True)
        )
        factors[path] = dataclasses.replace(f, a=a, b=b)
    return dataclasses.replace(lora_params, adapter=lora_jax.Adapter(factors))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_an_adapter_of_a_changed_base_is_one_of_twice_the_rank(init, dora):
    initial = adapted(init, dora=dora)
    lora_params = trained(initial)
    plain = lora_jax.to_plain(lora_params, initial, PARAMS)
    assert all(plain.base[name] is leaf for name, leaf in PARAMS.items())
    assert {f.rank for f in plain.adapter.factors.values()} == {8}
    assert_close(lora_jax.merge(plain), lora_jax.merge(lora_params), 5e-6)
    assert_close(lora_jax.lora(fn)(plain, X), lora_jax.lora(fn)(lora_params, X), 5e-6)


def test_to_plain_refuses_what_does_not_belong_together():
    initial = adapted("pissa")
    with pytest.raises(TypeError, match="initial is Adapter, expected a LoraParams"):
        lora_jax.to_plain(initial, initial.adapter, PARAMS)
    other = lora_jax.lorafy(PARAMS, 4, targets="dense", layout=LAYOUT)
    with pytest.raises(ValueError, match=r"differ in \['back'"):
        lora_jax.to_plain(initial, other, PARAMS)
    with pytest.raises(ValueError, match="'back' has other factors in initial"):
        lora_jax.to_plain(initial, adapted("pissa", rank=2), PARAMS)


# Functions of one's own


def test_any_function_may_draw():
    def ones(key, target):
        assert target.path == "w"
        assert (target.inputs, target.outputs, target.batch, target.rank) == (12, 10, (), 3)
        a = jnp.ones((target.inputs, target.rank))
        return a, jnp.zeros((target.rank, target.outputs))

    lora_params = lora_jax.lorafy({"w": PARAMS["dense"]}, 3, targets="w", init=ones)
    assert (lora_params.adapter.factors["w"].a == 1).all()


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda a, b: (0 * a, b), ValueError, "both factors of 'w' are zero"),
        (lambda a, b: (a.T, b), ValueError, r"a \(2, 12\) and b \(2, 10\), expected"),
        (lambda a, b: a, TypeError, r"expected a tuple \(a, b\)"),
    ],
)
def test_bad_functions_are_told_what_is_wrong(made, error, message):
    def init(key, target):
        return made(jnp.ones((target.inputs, 2)), jnp.zeros((2, target.outputs)))

    with pytest.raises(error, match=message):
        lora_jax.lorafy({"w": PARAMS["dense"]}, 2, targets="w", init=init)


def test_bad_weights_and_names():
    with pytest.raises(ValueError, match="init='pisa': expected one of"):
        adapted("pisa")
    bad = {"w": PARAMS["dense"].at[1, 2].set(jnp.nan)}
    with pytest.raises(ValueError, match="the factors of 'w' are not finite"):
        lora_jax.lorafy(bad, 2, targets="w", init="pissa")
    with pytest.raises(ValueError, match="dtype int8, not a real floating type"):
        lora_jax.lorafy({"w": jnp.ones((4, 4), jnp.int8)}, 2, targets="w", init="pissa")
