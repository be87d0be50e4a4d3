"""Dropout on what the adapters read: unbiased, of its own in every place, and off without a key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, drawn, error, normal, randomize_b, tolerance
from jax import lax

import lora_jax

KEY = jax.random.key(3)
X = normal(1, (5, 6))
TINY = normal(0, (6, 6), std=1 / 3)


def adapted(params, **options):
    return randomize_b(
        lora_jax.lorafy(params, 2, targets=".*", **{"init": drawn, **options}), std=0.3
    )


def stack(*layers):
    return jnp.asarray(np.stack(layers))


def dense(p, x):
    return x @ p["w"]


def test_it_drops_from_the_adapters_input_alone():
    lora_params = adapted({"w": TINY})
    f = lora_params.adapter.factors["w"]
    apply = jax.jit(lora_jax.lora(dense, dropout=0.5))
    y, x, w, a, b = (
        np.asarray(leaf, np.float64)
        for leaf in (apply(lora_params, X, lora_key=KEY), X, TINY, f.a, f.b)
    )
    # undo: the update is of a masked x, whose entries are 0 or 2 x
    undo = np.linalg.pinv(b) / float(f.scale)
    read = (y - x @ w) @ undo  # [5, 2]
    allowed = tolerance() * np.abs(y).max() * np.linalg.norm(undo, 2)
    for row, got in zip(x, read, strict=True):
        masks = np.array(np.meshgrid(*[[0, 2]] * 6)).reshape(6, -1).T
        candidates = (masks * row) @ a
        assert np.abs(candidates - got).max(1).min() < allowed < 1e-3


def test_it_is_off_without_a_key():
    lora_params = adapted({"w": TINY})
    jaxprs = [
        str(jax.make_jaxpr(lora_jax.lora(dense, **options))(lora_params, X))
        for options in ({"dropout": 0.5}, {})
    ]
    assert jaxprs[0] == jaxprs[1]
    with_key = jax.make_jaxpr(lora_jax.lora(dense, dropout=0.5))(lora_params, X, lora_key=KEY)
    assert str(with_key) != jaxprs[0]


CASES = {
    "dense": ({"w": TINY}, None, dense),
    "stored transposed": ({"w": TINY}, {"w": "oi"}, lambda p, x: x @ p["w"].T),
    "a convolution": (
        {"w": normal(3, (3, 2, 4))},
        {"w": "iio"},
        lambda p, x: lax.conv_general_dilated(
            x.reshape(5, 3, 2), p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
    ),
    "experts in groups": (
        {"w": stack(TINY, 2 * np.asarray(TINY))},
        {"w": "bio"},
        lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 3])),
    ),
    "a lookup": ({"w": TINY}, None, lambda p, x: p["w"][jnp.array([3, 1, 0, 3])]),
    "in a scan": (
        {"w": stack(TINY, 2 * np.asarray(TINY), TINY)},
        {"w": "bio"},
        lambda p, x: lax.scan(lambda x, w: (x @ w, x @ w), x, p["w"]),
    ),
    "in a checkpoint": ({"w": TINY}, None, jax.checkpoint(dense)),
    "in a jit": ({"w": TINY}, None, jax.jit(dense)),
}


@pytest.mark.parametrize("name", CASES)
def test_its_mean_is_the_adapted_function(name):
    params, layout, fn = CASES[name]
    lora_params = adapted(params, layout=layout)
    apply = lora_jax.lora(fn, dropout=0.3)

    @jax.jit
    def run(key):
        """Outputs by 2000 keys, and those without dropout."""
        keys = jax.random.split(key, 2000)
        many = lax.map(lambda key: apply(lora_params, X, lora_key=key), keys)
        return many, lora_jax.lora(fn)(lora_params, X)

    many, exact = jax.tree.map(np.asarray, run(KEY))
    if name == "in a scan":  # of a product of three, the first step is unbiased by itself
        many, exact = many[1][:, 0], exact[1][0]
    many = many.astype(np.float64)
    spread = many.std(0) / np.sqrt(2000)
    assert many.std(0).max() > 0.01
    assert (np.abs(many.mean(0) - exact) <= 5 * spread + 1e-5).all()


SLOW = ("stored transposed", "experts in groups", "in a checkpoint", "in a jit")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] if n in SLOW else []) for n in CASES]
)
def test_it_is_the_same_for_the_same_key_eager_and_jitted(name):
    params, layout, fn = CASES[name]
    lora_params = adapted(params, layout=layout)
    apply = lora_jax.lora(fn, dropout=0.3)
    first = apply(lora_params, X, lora_key=KEY)
    jitted = jax.jit(apply)
    assert_close(jitted(lora_params, X, lora_key=KEY), first)
    other = jitted(lora_params, X, lora_key=jax.random.key(4))
    assert error(other, first) > 1e-3


def same_layers(n=3):
    """A stack of layers with one and the same weight and factors."""
    lora_params = adapted({"w": stack(*[TINY] * n)}, layout={"w": "bio"})
    f = lora_params.adapter.factors["w"]
    a, b = (stack(*[np.asarray(x)[0]] * n) for x in (f.a, f.b))
    f = dataclasses.replace(f, a=a, b=b)
    return lora_jax.LoraParams(lora_params.base, lora_jax.Adapter({"w": f}))


LOOPS = {
    "layers of a scan": (
        same_layers,
        lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1],
    ),
    "a scan, checkpointed": (
        same_layers,
        lambda p, x: lax.scan(lambda c, w: (c, jax.checkpoint(jnp.matmul)(x, w)), 0, p["w"])[1],
    ),
    "steps over one weight": (
        lambda: adapted({"w": TINY}),
        lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, length=3)[1],
    ),
    "a while loop": (
        lambda: adapted({"w": TINY}),
        lambda p, x: lax.while_loop(  # a fori_loop of three steps would be a scan
            lambda c: c[0] < 3,
            lambda c: (c[0] + 1, c[1].at[c[0]].set(x @ p["w"])),
            (0, jnp.zeros((3, 5, 6))),
        )[1],
    ),
    "a weight in the carry": (
        lambda: adapted({"w": TINY}),
        lambda p, x: lax.scan(lambda w, _: (w * 1.0, x @ w), p["w"], None, length=3)[1],
    ),
    "uses in a row": (
        lambda: adapted({"w": TINY}),
        lambda p, x: jnp.stack([x @ p["w"] for _ in range(3)]),
    ),
    "calls of a jitted function": (
        lambda: adapted({"w": TINY}),
        lambda p, x: jnp.stack([jax.jit(dense)(p, x) for _ in range(3)]),
    ),
    "layers that share a checkpointed block": (
        lambda: same_leaves(3),
        lambda p, x: jnp.stack([jax.checkpoint(jnp.matmul)(x, w) for w in p]),
    ),
}


def same_leaves(n):
    lora_params = adapted([jnp.asarray(np.array(TINY)) for _ in range(n)])
    factors = lora_params.adapter.factors
    return lora_jax.LoraParams(
        lora_params.base, lora_jax.Adapter(dict.fromkeys(factors, factors["0"]))
    )


@pytest.mark.parametrize("name", LOOPS)
def test_every_step_and_every_use_drops_its_own(name):
    make, fn = LOOPS[name]
    lora_params = make()

    @jax.jit
    def run(p, key):
        return lora_jax.lora(fn)(p, X), lora_jax.lora(fn, dropout=0.5)(p, X, lora_key=key)

    plain, y = jax.tree.map(np.asarray, run(lora_params, KEY))
    assert_close(plain[1], plain[0])
    assert_close(plain[2], plain[0])
    assert min(error(y[i], y[j]) for i, j in ((1, 0), (2, 0), (2, 1))) > 1e-2


@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, lambda f: f])
def test_the_backward_pass_sees_the_same_mask(wrap):
    """The gradient is that of what the forward pass computed, by differences in float64."""
    with jax.enable_x64(True):
        w, x = (jnp.asarray(np.asarray(leaf, np.float64)) for leaf in (TINY, X))
        lora_params = adapted({"w": w}, dtype=jnp.float64)
        fn = wrap(lambda p, x: jnp.sin(x @ p["w"]))
        apply = lora_jax.lora(lambda p, x: fn(p, fn(p, x)), dropout=0.5)
        trainable, frozen = lora_jax.split(lora_params)
        direction = jax.tree.map(
            lambda leaf: np.cos(np.arange(leaf.size)).reshape(leaf.shape), trainable
        )

        @jax.jit
        @jax.value_and_grad
        def loss(trainable):
            whole = lora_jax.combine(trainable, frozen)
            return apply(whole, x, lora_key=KEY).sum()

        def moved(t):
            return loss(jax.tree.map(lambda p, d: np.asarray(p) + t * d, trainable, direction))[0]

        numeric = (float(moved(1e-7)) - float(moved(-1e-7))) / 2e-7
        pairs = jax.tree.map(lambda g, d: (np.asarray(g) * d).sum(), loss(trainable)[1], direction)
        np.testing.assert_allclose(sum(jax.tree.leaves(pairs)), numeric, rtol=1e-6)


def test_rows_of_a_table_are_dropped_whole():
    lora_params = adapted({"w": TINY})
    fn = lambda p: p["w"][np.arange(300) % 6]  # noqa: E731

    @jax.jit
    def run(p, key):
        dropped = lora_jax.lora(fn, dropout=0.4)(p, lora_key=key)
        return dropped, lora_jax.lora(fn)(p), fn(p.base)

    dropped, full, base = (np.asarray(y, np.float64) for y in run(lora_params, KEY))
    kept = (np.abs(dropped - base) > 1e-7).any(1)
    # Of differences, in which the base cancels, the error is relative to the base.
    expected = np.where(kept[:, None], (full - base) / 0.6, 0)
    assert np.abs(dropped - base - expected).max() <= tolerance() * np.abs(base).max()
    assert 0.5 < kept.mean() < 0.7


def test_examples_drop_their_own_under_vmap():
    lora_params = adapted({"w": TINY})
    apply = lora_jax.lora(dense, dropout=0.5)
    one = lambda x, key: apply(lora_params, x, lora_key=key)  # noqa: E731

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 3)
        each = jnp.stack([one(X, key) for key in keys])
        return jax.vmap(one)(jnp.stack([X, X, X]), keys), each

    y, each = jax.tree.map(np.asarray, run(KEY))
    assert min(error(y[1], y[0]), error(y[2], y[0])) > 1e-2
    assert_close(y, each)


def test_two_adapted_trees_of_the_same_paths_drop_their_own():
    first = adapted({"w": TINY})
    apply = lora_jax.lora(lambda p, q: (X @ p["w"], X @ q["w"]), dropout=0.5)
    y = jax.jit(lambda p, key: apply(p, p, lora_key=key))(first, KEY)
    assert error(y[0], y[1]) > 1e-2


def test_a_raw_key_will_do():
    lora_params = adapted({"w": TINY})
    apply = lora_jax.lora(dense, dropout=0.5)

    @jax.jit
    def run(p, key):
        return [apply(p, X, lora_key=k) for k in (jax.random.key_data(key), key)]

    assert_close(*run(lora_params, KEY))


def test_it_stays_off_a_weight_that_meets_another():
    """A weight is no input to drop from."""
    params = {"v": TINY, "w": jnp.asarray(np.asarray(TINY).T.copy())}
    lora_params = adapted(params, layout={"v": "oi", "w": "io"})
    fn = lambda p: p["v"] @ p["w"]  # noqa: E731

    @jax.jit
    def run(p, key):
        return lora_jax.lora(fn, dropout=0.5)(p, lora_key=key), fn(lora_jax.merge(p))

    assert_close(*run(lora_params, KEY))


def test_a_key_used_twice_is_found():
    lora_params = adapted({"w": TINY})
    apply = lora_jax.lora(dense, dropout=0.5)
    with jax.debug_key_reuse(True):
        key = jax.random.key(7)
        apply(lora_params, X, lora_key=key)
        with pytest.raises(jax.errors.KeyReuseError):
            apply(lora_params, X, lora_key=key)


def test_what_is_refused():
    lora_params = adapted({"w": TINY})
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a share"):
            lora_jax.lora(dense, dropout=share)
    with pytest.raises(ValueError, match="has an argument 'lora_key'"):
        lora_jax.lora(lambda p, x, lora_key: x)
    with pytest.raises(ValueError, match="lora_key is given, and nothing is dropped"):
        lora_jax.lora(dense)(lora_params, X, lora_key=KEY)
    apply = lora_jax.lora(dense, dropout=0.5)
    with pytest.raises(TypeError, match="lora_key is int, expected a key"):
        apply(lora_params, X, lora_key=0)
    with pytest.raises(ValueError, match=r"lora_key has shape \(3,\), expected one key"):
        apply(lora_params, X, lora_key=jax.random.split(KEY, 3))


def test_a_materialized_weight_has_no_input_to_drop_from():
    lora_params = adapted({"w": TINY})
    apply = lora_jax.lora(lambda p, x: x @ jnp.exp(p["w"]), on_materialize="allow", dropout=0.5)
    jax.eval_shape(apply, lora_params, X)
    with pytest.raises(NotImplementedError, match="no input of the adapter's to drop"):
        jax.eval_shape(lambda key: apply(lora_params, X, lora_key=key), KEY)
