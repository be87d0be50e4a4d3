"""Routing by directions, against a plain float64 loop over tokens and adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    dict_case,
    drawn,
    normal,
    randomize_b,
    scan_case,
    stack_by_numpy,
    tolerance,
)
from jax.test_util import check_grads

import lora_jax
from lora_jax import Adapter, LoraParams


def adapters_of(params, count=4, ranks=(2, 3, 1, 2), **options):
    made, options = [], {"init": drawn, **options}
    for k in range(count):
        one = lora_jax.lorafy(params, ranks[k], key=jax.random.key(k), alpha=k + 1.0, **options)
        made.append(randomize_b(one, k + 9))
    return made


def updates_of(adapters, key, shape):
    """``[layers, adapters, in, out]``, in float64, of weights ``[layers, in, out]``."""
    found = []
    for one in adapters:
        f = one.adapter.factors[key]
        a = np.asarray(f.a, float).reshape(*shape[:2], f.rank)
        found.append(
            float(f.scale) * a @ np.asarray(f.b, float).reshape(shape[0], f.rank, shape[2])
        )
    return np.stack(found, 1)


def mixed(x, w, updates, top_k, temperature):
    """``x W`` plus the mixture for each row of ``x``, by SVD of whole updates."""
    directions = [np.linalg.svd(update)[0][:, 0] for update in updates]
    rows = []
    for row in np.asarray(x, float):
        logits = np.abs([row @ v for v in directions])
        best = np.argsort(-logits)[:top_k]
        shares = np.exp(logits[best] / temperature - logits[best].max() / temperature)
        shares /= shares.sum()
        rows.append(row @ np.asarray(w, float))
        rows[-1] += sum(g * row @ updates[n] for g, n in zip(shares, best, strict=True))
    return np.stack(rows)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.3), (9, 1.0)])
def test_every_token_gets_the_adapters_that_answer_to_it(top_k, temperature):
    w = normal(1, (6, 5))
    adapters = adapters_of({"query": {"kernel": w}})
    x = normal(2, (3, 4, 6))
    stacked = lora_jax.many.stack(adapters)
    apply = lora_jax.many.lora_routed(
        lambda p, x: x @ p["query"]["kernel"], top_k=top_k, temperature=temperature
    )
    found = jax.jit(apply)(stacked, x, lora_router=lora_jax.many.arrow(stacked))
    updates = updates_of(adapters, "query/kernel", (1, 6, 5))[0]
    expected = mixed(np.reshape(x, (-1, 6)), w, updates, top_k, temperature)
    assert_close(found, expected.reshape(3, 4, 5))


@pytest.mark.parametrize("equation", ["bd,dhe->bhe", "lbd,lde->lbe", "bhe,hed->bd"])
def test_directions_have_the_axes_that_a_weight_reads(equation):
    layout = {"bd,dhe->bhe": "ioo", "lbd,lde->lbe": "bio", "bhe,hed->bd": "iio"}[equation]
    shape = {"ioo": (6, 2, 3), "bio": (2, 6, 3), "iio": (2, 3, 6)}[layout]
    x_shape = {"ioo": (4, 6), "bio": (2, 4, 6), "iio": (4, 2, 3)}[layout]
    w, x = (normal(k, s) for k, s in enumerate((shape, x_shape)))
    adapters = adapters_of({"w": w}, targets="w", layout={"w": layout})
    stacked = stack_by_numpy(adapters)
    router = jax.tree.map(np.asarray, jax.jit(lora_jax.many.arrow)(stacked))
    inputs = tuple(n for n, letter in zip(shape, layout, strict=True) if letter in "bi")
    assert router["w"].shape == (*inputs, 4)
    axes = tuple(i for i, c in enumerate(layout.replace("o", "")) if c == "i")
    norm = (np.asarray(router["w"], np.float64) ** 2).sum(axes)
    np.testing.assert_allclose(norm, np.ones_like(norm), rtol=tolerance())
    apply = lora_jax.many.lora_routed(lambda p, x: jnp.einsum(equation, x, p["w"]), top_k=2)
    found = jax.jit(apply)(stacked, x, lora_router=router)
    layers = 2 if layout == "bio" else 1
    w, x = np.reshape(w, (layers, 6, -1)), np.reshape(x, (layers, 4, 6))
    updates = updates_of(adapters, "w", w.shape)
    expected = [
        mixed(*layer, top_k=2, temperature=1.0) for layer in zip(x, w, updates, strict=True)
    ]
    assert_close(found, np.stack(expected).reshape(found.shape))


def test_experts_that_all_read_one_input_choose_each_for_itself():
    w, x = normal(0, (3, 6, 5)), normal(1, (2, 4, 6))
    adapters = adapters_of({"w": w}, targets="w", layout={"w": "bio"})
    apply = lora_jax.many.lora_routed(lambda p, x: jnp.einsum("bli,eio->belo", x, p["w"]))
    run = jax.jit(lambda stacked, x: apply(stacked, x, lora_router=lora_jax.many.arrow(stacked)))
    found = run(stack_by_numpy(adapters), x)
    w, x = np.asarray(w), np.asarray(x)
    updates = updates_of(adapters, "w", w.shape)
    each = [mixed(x.reshape(8, 6), w[e], updates[e], 2, 1.0).reshape(2, 4, 5) for e in range(3)]
    assert_close(found, np.stack(each, 1))


def test_one_adapter_is_that_adapter_everywhere(standard_promotion):
    case = scan_case()
    one = case.lorafy()
    apply = lora_jax.many.lora_routed(case.fn)

    @jax.jit
    def both(stacked, one, x):
        found = apply(stacked, x, lora_router=lora_jax.many.arrow(stacked))
        return found, lora_jax.lora(case.fn)(one, x)

    assert_close(*both(stack_by_numpy([one]), one, case.x), depth=26)  # three layers of eight sums


def test_nothing_goes_to_an_adapter_that_does_nothing_nor_from_it():
    case = dict_case()
    one, other = adapters_of(case.params, 2, targets=case.targets)
    fresh = lora_jax.lorafy(case.params, 2, targets=case.targets, init=drawn)
    kept = {k: f for k, f in other.adapter.factors.items() if k != "w1"}
    stacked = lora_jax.many.stack([one, fresh, LoraParams(case.params, Adapter(kept))])
    router = jax.tree.map(np.asarray, jax.jit(lora_jax.many.arrow)(stacked))
    assert not np.any(router["w1"][:, 1:])
    apply = lora_jax.many.lora_routed(case.fn, top_k=3)
    run = jax.jit(lambda stacked, router: apply(stacked, case.x, lora_router=router))
    few = jax.tree.map(lambda x: np.asarray(x)[[0, 2]], stacked.adapter)
    few_router = {k: v[..., [0, 2]] for k, v in router.items()}
    assert_close(run(stacked, router), run(LoraParams(case.params, few), few_router))
    nothing = jax.tree.map(np.zeros_like, router)
    assert_close(run(stacked, nothing), jax.jit(case.fn)(case.params, case.x))


@pytest.mark.usefixtures("standard_promotion")
def test_gradients_are_those_of_finite_differences():
    """In float64: in float32 a difference of two losses is hardly more than their rounding."""
    with jax.enable_x64(True):
        check_gradients(dict_case(jnp.float64))


def check_gradients(case):
    stacked = stack_by_numpy(adapters_of(case.params, 3, targets=case.targets, dtype=jnp.float64))
    router = jax.tree.map(np.float64, jax.jit(lora_jax.many.arrow)(stacked))

    def loss(adapter, router):
        stacked = LoraParams(case.params, adapter)
        return (lora_jax.many.lora_routed(case.fn)(stacked, case.x, lora_router=router) ** 2).mean()

    trainable = {k: (f.a, f.b) for k, f in stacked.adapter.factors.items()}

    def by_factors(trainable, router):
        factors = {
            k: dataclasses.replace(stacked.adapter.factors[k], a=a, b=b)
            for k, (a, b) in trainable.items()
        }
        return loss(Adapter(factors), router)

    # Shares are in float32 whatever the inputs are: a smaller step would measure their rounding.
    check_grads(jax.jit(by_factors), (trainable, router), 1, ["rev"], eps=3e-4, rtol=1e-3)


def test_what_cannot_be_routed_is_refused():
    case = dict_case()
    adapters = adapters_of(case.params, 2, targets=case.targets)
    stacked = lora_jax.many.stack(adapters)
    router, apply = jax.jit(lora_jax.many.arrow)(stacked), lora_jax.many.lora_routed(case.fn)
    with pytest.raises(TypeError, match="lora_routed: expected a function"):
        lora_jax.many.lora_routed(None)
    for top_k in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"top_k=.*expected an integer >= 1"):
            lora_jax.many.lora_routed(case.fn, top_k=top_k)
    with pytest.raises(ValueError, match="temperature=0: expected a number > 0"):
        lora_jax.many.lora_routed(case.fn, temperature=0)
    with pytest.raises(ValueError, match="has an argument 'lora_router'"):
        lora_jax.many.lora_routed(lambda p, lora_router: p)
    with pytest.raises(TypeError, match="lora_router is int, expected directions"):
        apply(stacked, case.x, lora_router=1)
    with pytest.raises(TypeError, match="adapter is int, expected an Adapter that is a stack"):
        apply(LoraParams(case.params, 0), case.x, lora_router=router)
    with pytest.raises(ValueError, match="of other weights than the stack: 'w1'"):
        apply(stacked, case.x, lora_router={k: v for k, v in router.items() if k != "w1"})
    with pytest.raises(ValueError, match=r"scale \(\), expected a stack's"):
        apply(adapters[0], case.x, lora_router=router)
    with pytest.raises(ValueError, match=r"router has shape .* expected a stack's"):
        apply(lora_jax.many.take(stacked, [0]), case.x, lora_router=router)
    whole = lora_jax.many.stack(adapters_of(case.params, 2, targets=case.targets, full="b1"))
    with pytest.raises(ValueError, match="'b1' is a full leaf"):
        apply(whole, case.x, lora_router=router)
    dora = lora_jax.many.stack(adapters_of(case.params, 2, targets=case.targets, dora=True))
    with pytest.raises(ValueError, match="has DoRA magnitudes"):
        apply(dora, case.x, lora_router=router)
    with pytest.raises(TypeError, match="stacked is int"):
        lora_jax.many.arrow(0)
    with pytest.raises(ValueError, match="this is no stack"):
        lora_jax.many.arrow(adapters[0])


@pytest.mark.parametrize("use", ["lookup", "head", "convolution", "whole"])
def test_a_weight_that_no_input_meets_is_refused(use):
    w = normal(0, (3, 5, 5))
    fns = {
        "lookup": lambda p, x: p["w"][0][jnp.array([1, 2])],
        "head": lambda p, x: x @ p["w"][0].T,
        "convolution": lambda p, x: jax.lax.conv(
            x.T[None], p["w"].transpose(2, 1, 0), (1,), "SAME"
        ),
        "whole": lambda p, x: jnp.exp(p["w"]),
    }
    layout = {"w": "iio" if use == "convolution" else "bio"}
    stacked = stack_by_numpy(adapters_of({"w": w}, 2, ranks=(1, 1), targets="w", layout=layout))
    router = jax.eval_shape(lora_jax.many.arrow, stacked)
    with pytest.raises(NotImplementedError, match="'w'"):
        jax.eval_shape(
            lambda stacked, x, router: lora_jax.many.lora_routed(fns[use])(
                stacked, x, lora_router=router
            ),
            stacked,
            np.ones((4, 5), np.float32),
            router,
        )


def test_an_adapter_that_is_broken_gets_nothing_and_spoils_nothing():
    params = {"query": {"kernel": normal(1, (6, 5))}}
    adapters = adapters_of(params, 3)
    x = normal(2, (4, 6))
    apply = lora_jax.many.lora_routed(lambda p, x: x @ p["query"]["kernel"], top_k=1)

    @jax.jit  # where stack cannot refuse it
    def run(adapters, params, x):
        stacked = lora_jax.many.stack([LoraParams(params, one) for one in adapters])
        return apply(stacked, x, lora_router=lora_jax.many.arrow(stacked))

    first, *others = [one.adapter for one in adapters]
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), first)
    found = run([broken, *others], params, x)
    assert_close(found, run(others, params, x))
