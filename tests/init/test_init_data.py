"""What weights read, and the initializers that look at it, or at a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import all_eqns, assert_close, drawn, loss_of, normal, randomize_b
from jax import lax
from test_init import LAYOUT, PARAMS, X, both, fn, trained
from test_init import plain as base

import lora_jax
from lora_jax.init import corda, eva, eva_ranks, loftq, lora_ga

BATCH = normal(8, (5, 12))


def plain(rank=3, **options):
    options = {"targets": ".*", "layout": LAYOUT, "init": drawn} | options
    return lora_jax.lorafy(PARAMS, rank, **options)


def moment(x):
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return x.T @ x


def test_moments_are_of_what_every_weight_reads():
    moments = jax.jit(lambda p, x: lora_jax.init.input_moments(fn, p, x))(plain(), X)
    p = {name: np.asarray(w, np.float64) for name, w in PARAMS.items()}
    h = np.tanh(np.asarray(X, np.float64) @ p["dense"])
    expected = {"dense": moment(X), "heads": moment(h)}
    h = np.tanh(np.einsum("bi,inh->bnh", h, p["heads"])).reshape(5, 12)
    expected["experts"] = np.stack([moment(h)] * 3)
    h = np.einsum("bi,eio->bo", h, p["experts"])
    expected["back"] = moment(h)
    h = np.pad((h @ p["back"].T).reshape(5, 3, 4), ((0, 0), (1, 1), (0, 0)))
    expected["conv"] = moment(np.stack([h[:, i : i + 3].reshape(5, 12) for i in range(3)]))
    assert_close(moments, expected)


def test_moments_add_up_over_layers_and_uses():
    w = normal(0, (3, 6, 6), std=1 / 3)
    params = {"layers": w, "one": jnp.asarray(np.asarray(w)[0])}
    inputs = normal(1, (5, 6))

    def uses(wrap):
        def fn(p, x):
            step = wrap(lambda x, w: jnp.tanh(x @ w))
            x, _ = lax.scan(lambda x, w: (step(x, w), None), x, p["layers"])
            return lax.fori_loop(0, 2, lambda _, x: step(x, p["one"]), x)

        return fn

    wraps = {"plain": lambda f: f, "checkpoint": jax.checkpoint, "jit": jax.jit}
    layout = {"layers": "bio", "one": "io"}
    lora_params = lora_jax.lorafy(params, 2, targets=".*", layout=layout, init=drawn)

    @jax.jit
    def found(lora_params, x):
        return {
            name: lora_jax.init.input_moments(uses(wrap), lora_params, x)
            for name, wrap in wraps.items()
        }

    read, x = [], np.asarray(inputs, np.float64)
    for k in (0, 1, 2, 0, 0):
        read.append(moment(x))
        x = np.tanh(x @ np.asarray(w)[k])
    expected = {"layers": np.stack(read[:3]), "one": read[3] + read[4]}
    for name, moments in found(lora_params, inputs).items():
        assert_close({name: moments}, {name: expected})


def test_moments_of_experts_in_groups():
    params = {"w": normal(0, (2, 6, 4))}
    x = normal(1, (5, 6))
    lora_params = lora_jax.lorafy(params, 2, targets="w", layout={"w": "bio"}, init=drawn)

    @jax.jit
    def found(lora_params, x):
        sizes = jnp.array([2, 3])
        grouped = lambda p, x: lax.ragged_dot(x, p["w"], sizes)  # noqa: E731
        return lora_jax.init.input_moments(grouped, lora_params, x)

    x = np.asarray(x)
    assert_close(found(lora_params, x)["w"], np.stack([moment(x[:2]), moment(x[2:])]))


def test_moments_of_a_low_precision_model_are_float32():
    x = normal(1, (400, 6), jnp.bfloat16)
    params = {"w": jnp.asarray(np.ones((6, 4), jnp.bfloat16))}
    lora_params = lora_jax.lorafy(params, 2, targets="w", init=drawn)
    moments = jax.jit(lambda p, x: lora_jax.init.input_moments(lambda p, x: x @ p["w"], p, x))
    assert_close(moments(lora_params, x)["w"], moment(x), length=400)


def test_moments_want_to_know_which_weights():
    with pytest.raises(TypeError, match=r"expected one LoraParams among the arguments, .* got 0"):
        lora_jax.init.input_moments(fn, PARAMS, X)


@pytest.fixture(scope="module")
def moments():
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(lambda p: lora_jax.init.input_moments(fn, p, BATCH))(plain())


@pytest.fixture(scope="module")
def grads():
    return jax.jit(jax.grad(loss_of(fn)))(PARAMS, X)  # of the loss in both


def initializers(moments, grads):
    return {
        "eva": eva(moments),
        "corda, ipm": corda(moments),
        "corda, kpm": corda(moments, "kpm"),
        "lora_ga": lora_ga(grads),
    }


@pytest.fixture(scope="module")
def initials(moments, grads):
    """An adapter of every initializer, all made by one program, of which the moments are none."""
    inits = initializers(moments, grads)
    return jax.jit(lambda: {name: plain(init=init) for name, init in inits.items()})()


@pytest.mark.parametrize("name", ["eva", "corda, ipm", "corda, kpm", "lora_ga"])
def test_the_adapted_model_starts_as_the_model_and_trains_exactly(name, initials):
    initial = initials[name]
    # CorDA's base may be larger than W, and so are its roundings.
    (outputs, _), _ = both(initial)
    assert_close(outputs, base(PARAMS, X), depth=64)
    assert_close(*both(randomize_b(initial, std=0.05)), depth=64)
    later = trained(initial)
    if name != "eva":
        converted = lora_jax.algebra.to_plain(later, initial, PARAMS)
        assert_close(lora_jax.merge(converted), lora_jax.merge(later), depth=64)


@pytest.mark.parametrize("name", ["eva", "corda, ipm", "corda, kpm", "lora_ga"])
def test_those_that_take_from_the_weight_change_the_base(name, moments, grads):
    init = initializers(moments, grads)[name]
    w = {"dense": PARAMS["dense"]}
    left = lora_jax.lorafy(w, 3, targets="dense", init=init).base["dense"]
    assert (left is w["dense"]) == (name == "eva")


@pytest.mark.parametrize("name", ["pissa", "olora", "corda, ipm", "lora_ga", "loftq"])
def test_what_is_taken_out_of_the_weight_is_multiplied_in_full_precision(name, moments, grads):
    """Accelerators multiply in fewer bits by default, and the model would not start as the base."""
    init = {"loftq": loftq(block=6), **initializers(moments, grads)}.get(name, name)
    adapt = lambda w: lora_jax.lorafy({"dense": w}, 3, targets="dense", init=init)  # noqa: E731
    jaxpr = jax.make_jaxpr(adapt)(PARAMS["dense"])
    inputs, outputs = PARAMS["dense"].shape
    products = [
        eqn.params["precision"]
        for eqn in all_eqns(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
        and [x.aval.shape for x in eqn.invars] == [(inputs, 3), (3, outputs)]
    ]
    assert set(products) == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}


def test_eva_reads_the_principal_components(initials):
    f = initials["eva"].adapter.factors["dense"]
    _, _, vt = np.linalg.svd(np.asarray(BATCH, np.float64), full_matrices=False)
    assert_close(np.abs(f.a.T), np.abs(vt[:3]), depth=256)  # of moments: squares, and close ones
    assert not np.any(f.b)


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
        left = lora_jax.lorafy({"dense": w}, 4, targets="dense", init=init).base["dense"]
        change[name] = np.linalg.norm(np.asarray(BATCH) @ (np.asarray(w) - np.asarray(left)))
    assert change["ipm"] > change["pissa"] > change["kpm"]


def test_the_first_step_of_lora_ga_is_nearer_to_full_fine_tuning(initials, grads):
    """Cosine of the first change of the merged weight with the full gradient."""

    def cosine(initial):
        (_, step), _ = both(initial)
        f, step = (x.factors["dense"] for x in (initial.adapter, step))
        a, b, da, db = (np.asarray(x) for x in (f.a, f.b, step.a, step.b))
        change, target = a @ db + da @ b, np.asarray(grads["dense"])
        return (change * target).sum() / (np.linalg.norm(change) * np.linalg.norm(target))

    assert cosine(initials["lora_ga"]) > cosine(plain(init="gaussian")) + 0.1


def test_lora_ga_is_its_definition(grads):
    w = {"dense": PARAMS["dense"]}
    f = lora_jax.lorafy(w, 2, targets="dense", init=lora_ga(grads)).adapter.factors["dense"]
    u, _, vt = np.linalg.svd(np.asarray(grads["dense"], np.float64))
    c = 10**0.25 / 4
    assert_close(np.abs(f.a), np.abs(c * u[:, :2]), depth=256)
    assert_close(np.abs(f.b), np.abs(c * vt[2:4]), depth=256)


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
        lora_jax.lorafy(other, 2, targets="w", init=eva({"w": jnp.asarray(np.zeros((12, 12)))}))
    assert_close(moments["dense"], moment(BATCH))
