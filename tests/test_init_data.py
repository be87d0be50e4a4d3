"""What weights read, and the initializers that look at it, or at a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_oracle, error, randomize_b
from jax import lax
from test_init import LAYOUT, PARAMS, X, fn, trained

import lora_jax
from lora_jax.init import corda, eva, eva_ranks, lora_ga

BATCH = jax.random.normal(jax.random.key(8), (5, 12))


def plain(rank=3, **options):
    return lora_jax.lorafy(PARAMS, rank, targets=".*", layout=LAYOUT, **options)


def moment(x):
    x = np.asarray(x, np.float32).reshape(-1, x.shape[-1])
    return x.T @ x


def test_moments_are_of_what_every_weight_reads():
    moments = lora_jax.input_moments(fn, plain(), X)
    h = jnp.tanh(X @ PARAMS["dense"])
    assert_close(moments["dense"], moment(X), 1e-6)
    assert_close(moments["heads"], moment(h), 1e-6)
    h = jnp.tanh(jnp.einsum("bi,inh->bnh", h, PARAMS["heads"])).reshape(5, 12)
    assert_close(moments["experts"], jnp.stack([moment(h)] * 3), 1e-6)
    h = jnp.einsum("bi,eio->bo", h, PARAMS["experts"])
    assert_close(moments["back"], moment(h), 1e-5)
    h = jnp.pad((h @ PARAMS["back"].T).reshape(5, 3, 4), ((0, 0), (1, 1), (0, 0)))
    windows = jnp.stack([h[:, i : i + 3].reshape(5, 12) for i in range(3)])
    assert_close(moments["conv"], moment(windows), 1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_moments_add_up_over_layers_and_uses(wrap):
    w = jax.random.normal(jax.random.key(0), (3, 6, 6)) / 3
    params = {"layers": w, "one": w[0]}
    x = jax.random.normal(jax.random.key(1), (5, 6))

    def fn(p, x):
        step = wrap(lambda x, w: jnp.tanh(x @ w))
        x, _ = lax.scan(lambda x, w: (step(x, w), None), x, p["layers"])
        return lax.fori_loop(0, 2, lambda _, x: step(x, p["one"]), x)

    lora_params = lora_jax.lorafy(params, 2, targets=".*", layout={"layers": "bio", "one": "io"})
    moments = lora_jax.input_moments(fn, lora_params, x)
    read = []
    for k in (0, 1, 2, 0, 0):
        read.append(moment(x))
        x = jnp.tanh(x @ w[k])
    assert_close(moments["layers"], jnp.stack(read[:3]), 1e-6)
    assert_close(moments["one"], read[3] + read[4], 1e-6)


def test_moments_of_experts_in_groups():
    params = {"w": jax.random.normal(jax.random.key(0), (2, 6, 4))}
    x = jax.random.normal(jax.random.key(1), (5, 6))
    lora_params = lora_jax.lorafy(params, 2, targets="w", layout={"w": "bio"})
    moments = lora_jax.input_moments(
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 3])), lora_params, x
    )
    assert_close(moments["w"], jnp.stack([moment(x[:2]), moment(x[2:])]), 1e-6)


def test_moments_of_a_low_precision_model_are_float32():
    x = jax.random.normal(jax.random.key(1), (400, 6)).astype(jnp.bfloat16)
    lora_params = lora_jax.lorafy({"w": jnp.ones((6, 4), jnp.bfloat16)}, 2, targets="w")
    moments = lora_jax.input_moments(lambda p, x: x @ p["w"], lora_params, x)
    assert_close(moments["w"], moment(x.astype(jnp.float32)), 1e-6)


def test_moments_want_to_know_which_weights():
    with pytest.raises(TypeError, match=r"expected one LoraParams among the arguments, .* got 0"):
        lora_jax.input_moments(fn, PARAMS, X)


@pytest.fixture(scope="module")
def moments():
    with jax.numpy_dtype_promotion("standard"):
        return lora_jax.input_moments(fn, plain(), BATCH)


@pytest.fixture(scope="module")
def grads():
    return jax.grad(lambda p: sum((y**2).sum() for y in fn(p, BATCH)))(PARAMS)


def initializers(moments, grads):
    return {
        "eva": eva(moments),
        "corda, ipm": corda(moments),
        "corda, kpm": corda(moments, "kpm"),
        "lora_ga": lora_ga(grads),
    }


@pytest.mark.parametrize("name", ["eva", "corda, ipm", "corda, kpm", "lora_ga"])
def test_the_adapted_model_starts_as_the_model_and_trains_exactly(name, moments, grads):
    init = initializers(moments, grads)[name]
    initial = plain(init=init)
    assert_close(lora_jax.lora(fn)(initial, X), fn(PARAMS, X), 5e-6)
    assert all(initial.base[k] is leaf for k, leaf in PARAMS.items()) == (name == "eva")
    assert_oracle(fn, randomize_b(initial, std=0.05), X, tolerance=2e-5)
    later = trained(initial)
    if name != "eva":
        converted = lora_jax.to_plain(later, initial, PARAMS)
        assert_close(lora_jax.merge(converted), lora_jax.merge(later), 2e-6)


def test_eva_reads_the_principal_components(moments):
    f = plain(init=eva(moments)).adapter.factors["dense"]
    _, _, vt = np.linalg.svd(BATCH, full_matrices=False)
    assert_close(jnp.abs(f.a.T), jnp.abs(vt[:3]), 1e-4)
    assert not f.b.any()


def test_eva_spreads_its_ranks_to_where_the_variance_is():
    wide = np.diag(np.ones(10))  # evenly spread: ten shares of 0.1
    narrow = np.diag([100.0, *[1e-3] * 9])  # one direction
    middle = np.diag([4.0, 3.0, 2.0, *[0.01] * 7])
    moments = {"wide": wide, "narrow": narrow, "middle": middle}
    assert eva_ranks(moments, rank=2, rho=1) == dict.fromkeys(moments, 2)
    ranks = eva_ranks(moments, rank=2, rho=2)
    assert sum(ranks.values()) == 6
    assert ranks == {"wide": 2, "narrow": 1, "middle": 3}
    assert max(eva_ranks(moments, rank=2, rho=3).values()) <= 6
    with pytest.raises(ValueError, match=r"rho=0\.5: expected at least 1"):
        eva_ranks(moments, rho=0.5)


def test_eva_ranks_go_into_lorafy(moments):
    ranks = eva_ranks(moments, rank=2)
    lora_params = lora_jax.lorafy(
        PARAMS, targets=lambda path, leaf: ranks.get(path, 0), layout=LAYOUT, init=eva(moments)
    )
    assert {path: f.rank for path, f in lora_params.adapter.factors.items()} == ranks
    assert sum(ranks.values()) == 10


def test_corda_orders_the_parts_by_what_they_do_to_the_inputs(moments):
    """Dropping the part that trains changes the outputs most for ipm, and least for kpm."""
    w = PARAMS["dense"]
    change = {}
    for name, init in (
        ("ipm", corda(moments)),
        ("kpm", corda(moments, "kpm")),
        ("pissa", "pissa"),
    ):
        base = lora_jax.lorafy({"dense": w}, 4, targets="dense", init=init).base["dense"]
        change[name] = float(jnp.linalg.norm(BATCH @ (w - base)))
    assert change["ipm"] > change["pissa"] > change["kpm"]


def test_the_first_step_of_lora_ga_is_nearer_to_full_fine_tuning(grads):
    """Cosine of the first change of the merged weight with the full gradient."""

    def cosine(init):
        initial = plain(init=init)
        loss = lambda p: sum((y**2).sum() for y in lora_jax.lora(fn)(p, BATCH))  # noqa: E731
        _, g = lora_jax.value_and_grad(loss)(initial)
        f, step = initial.adapter.factors["dense"], g.factors["dense"]
        change = f.a @ step.b + step.a @ f.b
        target = grads["dense"]
        return (change * target).sum() / (jnp.linalg.norm(change) * jnp.linalg.norm(target))

    assert cosine(lora_ga(grads)) > cosine("gaussian") + 0.1


def test_lora_ga_is_its_definition(grads):
    f = plain(2, init=lora_ga(grads)).adapter.factors["dense"]
    u, _, vt = np.linalg.svd(grads["dense"])
    c = 10**0.25 / 4
    assert_close(jnp.abs(f.a), jnp.abs(c * u[:, :2]), 1e-4)
    assert_close(jnp.abs(f.b), jnp.abs(c * vt[2:4]), 1e-4)


def test_statistics_of_something_else_are_refused(moments, grads):
    other = {"w": PARAMS["dense"]}
    for init in (eva(moments), corda(moments)):
        with pytest.raises(ValueError, match=r"moments has shape None at 'w', expected \(12, 12\)"):
            lora_jax.lorafy(other, 2, targets="w", init=init)
    with pytest.raises(ValueError, match="grads has shape None at 'w', and the weight has"):
        lora_jax.lorafy(other, 2, targets="w", init=lora_ga(grads))
    with pytest.raises(ValueError, match="rank=6 of 'back' needs 12 singular vectors"):
        plain(6, init=lora_ga(grads))
    with pytest.raises(ValueError, match="mode='kmp': expected 'ipm' or 'kpm'"):
        corda(moments, "kmp")
    with pytest.raises(ValueError, match="the moments of 'w' are zero: it read nothing"):
        lora_jax.lorafy(other, 2, targets="w", init=eva({"w": jnp.zeros((12, 12))}))
    assert error(moments["dense"], moment(BATCH)) < 1e-6
