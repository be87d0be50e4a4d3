"""Initializers: the model starts as it was, the draws are what they say, and the way back."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, error, loss_of, normal, randomize_b, tolerance
from jax import lax
from scipy import stats

import lora_jax
from lora_jax.init import pissa

NAMES = ["gaussian", "kaiming_uniform", "orthogonal", "pissa", "olora"]
ALL = [*NAMES, partial(pissa, niter=1)]
IDS = [*NAMES, "pissa, randomized"]

PARAMS = {
    "dense": normal(0, (12, 10), std=1 / 3),
    "heads": normal(1, (10, 2, 6), std=1 / 3),
    "back": normal(2, (12, 10), std=1 / 3),  # stored transposed
    "experts": normal(3, (3, 12, 10), std=1 / 3),
    "conv": normal(4, (3, 4, 6), std=1 / 3),
}
LAYOUT = {"dense": "io", "heads": "ioo", "back": "oi", "experts": "bio", "conv": "iio"}
X = normal(9, (5, 12))


def fn(p, x):
    """Every weight, in turn."""
    h = jnp.tanh(x @ p["dense"])
    h = jnp.tanh(jnp.einsum("bi,inh->bnh", h, p["heads"])).reshape(5, 12)
    h = jnp.einsum("bi,eio->ebo", h, p["experts"]).sum(0) @ p["back"].T
    image = lax.conv_general_dilated(
        h.reshape(5, 3, 4), p["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return h, image


plain = jax.jit(fn)
apply = jax.jit(lora_jax.lora(fn))  # one program for all adapters of the same shapes


@jax.jit
def both(lora_params):
    """Outputs and gradients: those of the adapted function, and those of the merged one."""

    def of(f):
        def loss(p):
            outputs = f(p, X)
            return loss_of(lambda _: outputs)(None), outputs

        (_, outputs), grads = lora_jax.value_and_grad(loss, has_aux=True)(lora_params)
        return outputs, grads

    return of(lora_jax.lora(fn)), of(lambda p, x: fn(lora_jax.merge(p), x))


def adapted(init, rank=4, **options):
    """An adapter of every weight."""
    return lora_jax.lorafy(PARAMS, rank, targets=".*", layout=LAYOUT, init=init, **options)


OPTIONS = {"scaled": {"rslora": True, "alpha": 4}, "DoRA": {"dora": True}}


@functools.cache
def started(init):
    """An adapter with each of the options."""
    return {name: adapted(init, **options) for name, options in OPTIONS.items()}


@pytest.mark.parametrize("init", ALL, ids=IDS)
def test_the_adapted_model_starts_as_the_model_and_trains_exactly(init):
    # OLoRA's base is several times as large as W, and so are its roundings.
    sums = {"depth": 64 if init == "olora" else 16}
    scaled, dora = started(init)["scaled"], started(init)["DoRA"]
    (outputs, _), _ = both(scaled)
    assert_close(outputs, plain(PARAMS, X), **sums)
    assert_close(apply(dora, X), plain(PARAMS, X), **sums)
    for name, lora_params in started(init).items():
        assert_close({name: lora_jax.merge(lora_params)}, {name: PARAMS}, **sums)
    assert_close(*both(randomize_b(scaled, std=0.05)), depth=32)


FEW = {"dense": PARAMS["dense"], "experts": PARAMS["experts"]}


def few(init):
    return lora_jax.lorafy(FEW, 4, targets=".*", layout={"experts": "bio"}, init=init)


eagerly = functools.cache(few)


@pytest.mark.parametrize("init", NAMES)
def test_only_those_that_take_from_the_weight_change_the_base(init):
    base = eagerly(init).base
    same = [base[name] is leaf for name, leaf in FEW.items()]
    assert all(same) == (init not in ("pissa", "olora"))
    assert any(same) == all(same)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("layout", ["iob", "obi", "biio", "ioob"])
def test_what_is_left_of_a_weight_keeps_the_order_of_its_axes(layout, init):
    """Also where the order of the roles is no swap, which is its own inverse."""
    params = {"w": normal(0, (5, 4, 3, 2)[: len(layout)])}
    adapt = lambda p: lora_jax.lorafy(p, 2, targets="w", layout={"w": layout}, init=init)  # noqa: E731
    assert_close(jax.jit(lambda p: lora_jax.merge(adapt(p)))(params), params, depth=64)


def test_every_path_has_its_own_draw_and_every_expert_too():
    params = {name: {"kernel": normal(0, (3, 12, 10))} for name in "uv"}
    for init in ("gaussian", "kaiming_uniform", "orthogonal"):
        drawn = lora_jax.lorafy(params, 4, targets=".*", layout={".*": "bio"}, init=init)
        draws = [np.asarray(f.a)[k] for f in drawn.adapter.factors.values() for k in range(3)]
        for i, one in enumerate(draws):
            assert all(error(one, other) > 0.1 for other in draws[:i]), init


@pytest.mark.parametrize("init", ALL, ids=IDS)
def test_eager_and_jitted_starts_agree(init):
    jitted = jax.jit(lambda: few(init))()
    if init in ("gaussian", "kaiming_uniform"):  # to the bit, as lorafy promises
        for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(eagerly(init)), strict=True):
            assert np.array_equal(a, b)
    assert_close(jitted, eagerly(init), depth=64)


def draw(init, shape=(400, 50), rank=20):
    params = {"w": jnp.asarray(np.ones(shape, np.float32))}
    made = jax.jit(lambda: lora_jax.lorafy(params, rank, targets="w", init=init))
    return made().adapter.factors["w"]


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
    assert not np.any(f.b)


def test_orthogonal_factors_are_random_and_meet_in_nothing():
    f = draw("orthogonal")
    # a row of a is half as many normals as the rank, over 10, in an orthonormal basis
    assert stats.kstest(np.ravel(f.a), stats.norm(0, np.sqrt(0.5) / 10).cdf).pvalue > 1e-3
    a, b = np.asarray(f.a), np.asarray(f.b)
    assert np.abs(a @ b).max() < tolerance() * (np.abs(a) @ np.abs(b)).max()
    assert np.linalg.matrix_rank(a) == np.linalg.matrix_rank(b) == 10
    with pytest.raises(ValueError, match="rank=3 of 'w' is odd"):
        draw("orthogonal", rank=3)


def test_pissa_takes_the_largest_singular_values():
    w = PARAMS["dense"]
    f = lora_jax.lorafy({"w": w}, 4, targets="w", init="pissa").adapter.factors["w"]
    a, b, scale = (np.asarray(x) for x in (f.a, f.b, f.scale))
    u, s, vt = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    assert_close(scale * a @ b, u[:, :4] @ np.diag(s[:4]) @ vt[:4], depth=64)
    assert_close(a.T @ a, np.diag(s[:4] / scale), depth=64)  # the halves are balanced
    assert_close(b @ b.T, np.diag(s[:4] / scale), depth=64)


def test_randomized_pissa_finds_a_decaying_spectrum():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((60, 60)))[0] for _ in range(2))
    w = jnp.asarray((u * 0.7 ** np.arange(60)) @ v, jnp.float32)
    inits = "pissa", partial(pissa, niter=4)
    bases = jax.jit(lambda: [lora_jax.lorafy({"w": w}, 4, targets="w", init=i).base for i in inits])
    exact, fast = bases()
    # Ten products, a QR of 60 sums behind each; what is left is a quarter of the weight.
    assert_close(fast, exact, length=60, depth=4**2 * 10 * 60)


def test_olora_writes_an_orthonormal_basis():
    f = lora_jax.lorafy({"w": PARAMS["dense"]}, 4, targets="w", init="olora").adapter.factors["w"]
    b = np.asarray(f.b)
    assert_close(b @ b.T, np.eye(4))


def test_a_part_of_a_weight_gives_up_its_own_principal_part():
    w = np.asarray(PARAMS["dense"])
    lora_params = lora_jax.lorafy({"w": jnp.asarray(w)}, 2, targets="w[:, 0:4]", init="pissa")
    base = np.asarray(lora_params.base["w"])
    assert (base[:, 4:] == w[:, 4:]).all()
    alone = lora_jax.lorafy({"w": jnp.asarray(w[:, :4])}, 2, targets="w", init="pissa")
    # What is left of a weight is smaller than the weight, whose roundings it has.
    assert_close(base[:, :4] + w[:, :4], np.asarray(alone.base["w"]) + w[:, :4], depth=64)
    assert_close(lora_jax.merge(lora_params), {"w": w}, depth=64)


def test_the_base_keeps_its_dtype_and_containers():
    params = {"params": [{"kernel": PARAMS["dense"].astype(jnp.bfloat16), "n": 3}]}
    lora_params = lora_jax.lorafy(params, 2, targets=".*kernel", init="pissa")
    assert jax.tree.structure(lora_params.base) == jax.tree.structure(params)
    assert lora_params.base["params"][0]["kernel"].dtype == jnp.bfloat16
    assert lora_params.base["params"][0]["n"] == 3
    assert_close(lora_jax.merge(lora_params)["params"][0]["kernel"], params["params"][0]["kernel"])


def trained(lora_params, seed=5):
    """Anything but the start."""
    factors, rng = {}, np.random.default_rng(seed)
    for path, f in lora_params.adapter.factors.items():
        a, b = (
            jnp.asarray(np.asarray(x) + 0.05 * rng.standard_normal(x.shape), x.dtype)
            for x in (f.a, f.b)
        )
        factors[path] = dataclasses.replace(f, a=a, b=b)
    return dataclasses.replace(lora_params, adapter=lora_jax.Adapter(factors))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_an_adapter_of_a_changed_base_is_one_of_twice_the_rank(init, dora):
    initial = started(init)["DoRA" if dora else "scaled"]
    lora_params = trained(initial)
    found = lora_jax.algebra.to_plain(lora_params, initial, PARAMS)
    assert all(found.base[name] is leaf for name, leaf in PARAMS.items())
    assert {f.rank for f in found.adapter.factors.values()} == {8}
    assert_close(lora_jax.merge(found), lora_jax.merge(lora_params), depth=64)
    assert_close(apply(found, X), apply(lora_params, X), depth=64)


def test_to_plain_refuses_what_does_not_belong_together():
    initial = started("pissa")["scaled"]
    with pytest.raises(TypeError, match="initial is Adapter, expected a LoraParams"):
        lora_jax.algebra.to_plain(initial, initial.adapter, PARAMS)
    other = lora_jax.lorafy(PARAMS, 4, targets="dense", layout=LAYOUT)
    with pytest.raises(ValueError, match=r"differ in \['back'"):
        lora_jax.algebra.to_plain(initial, other, PARAMS)
    with pytest.raises(ValueError, match="'back' has other factors in initial"):
        lora_jax.algebra.to_plain(initial, adapted("gaussian", rank=2), PARAMS)


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
    bad = {"w": jnp.asarray(np.where(np.arange(10) == 2, np.nan, np.asarray(PARAMS["dense"])))}
    with pytest.raises(ValueError, match="the factors of 'w' are not finite"):
        lora_jax.lorafy(bad, 2, targets="w", init="pissa")
    with pytest.raises(ValueError, match="dtype int8, not a real floating type"):
        lora_jax.lorafy({"w": jnp.asarray(np.ones((4, 4), np.int8))}, 2, targets="w", init="pissa")
