"""Strictness: what cannot be done exactly is said, with where and what to do; nothing else is."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, assert_oracle, drawn, normal, normed_case, randomize_b

import lora_jax

X = normal(9, (3, 4))


def layers(n=3, d=4):
    params = [
        {name: normal((k, i), (d, d), std=d**-0.5) for i, name in enumerate("wv")} for k in range(n)
    ]
    return adapted(params)


def adapted(params, **options):
    options = {"targets": ".*", "init": drawn, **options}
    return randomize_b(lora_jax.lorafy(params, 2, **options))


def normed(p, x):
    return jnp.tanh(x @ (p["w"] / jnp.linalg.norm(p["w"]))) @ p["v"]


def stack(block):
    def fn(params, x):
        for p in params:
            x = block(p, x)
        return x

    return fn


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_one_error_names_every_weight_that_would_be_built(wrap):
    lora_params = layers()
    with pytest.raises(NotImplementedError) as info:
        jax.eval_shape(lora_jax.lora(stack(wrap(normed))), lora_params, X)
    message = str(info.value)
    assert message.startswith("lora: the weight '0/w' float32[4, 4] reaches")
    assert f"{__file__}:" in message
    assert "exclude='0/w'" in message
    assert "on_materialize='allow'" in message
    assert "So would others:\n  '1/w' float32[4, 4] reaches" in message
    assert "exclude=['0/w', '1/w', '2/w']" in message
    assert "/v'" not in message
    kept = adapted(lora_params.base, exclude=["0/w", "1/w", "2/w"])
    assert_oracle(stack(wrap(normed)), kept, X)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_a_warning_for_each_weight_and_none_where_allowed(wrap):
    lora_params, fn = layers(), stack(wrap(normed))
    with pytest.warns(UserWarning, match="would have to be built") as caught:
        jax.eval_shape(lora_jax.lora(fn, on_materialize="warn"), lora_params, X)
    assert [str(w.message).split("'")[1] for w in caught] == ["0/w", "1/w", "2/w"]
    here = [(w.filename, normed.__code__.co_firstlineno + 1) for w in caught]
    assert here == [(__file__, w.lineno) for w in caught]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(lora_jax.lora(fn, on_materialize="allow"), lora_params, X)
    # Three layers with two products and a norm each, forth and back.
    assert_oracle(fn, lora_params, X, on_materialize="allow", sums={"depth": 32})


def test_a_very_long_list_is_cut_short():
    lora_params = layers(24)
    with pytest.raises(NotImplementedError, match=r"\.\.\. and 3 more\nTo keep all of them out"):
        jax.eval_shape(lora_jax.lora(stack(normed)), lora_params, X)


def test_a_sum_of_two_weights_is_reported_by_both_names():
    lora_params = layers(1)
    fn = lambda p, x: x @ jnp.exp(p[0]["w"] + p[0]["v"])  # noqa: E731
    with pytest.raises(
        NotImplementedError, match=r"'0/w'(.|\n)*'0/v'(.|\n)*exclude=\['0/w', '0/v'"
    ):
        jax.eval_shape(lora_jax.lora(fn), lora_params, X)


def test_a_function_that_returns_a_weight():
    lora_params = layers(1)
    fn = lambda p, x: (x @ p[0]["w"], p[0]["v"])  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"'0/v' .* is returned by the function\n"):
        jax.eval_shape(lora_jax.lora(fn), lora_params, X)
    assert_oracle(fn, lora_params, X, on_materialize="allow")


def test_a_function_that_returns_its_state_whole():
    case = normed_case()
    graph = case.fn.args[0]

    def returning(kind):
        def fn(state, x):
            model = nnx.merge(graph, state, copy=True)
            return model(x), nnx.state(model, kind)

        return lora_jax.lora(fn)

    lora_params = case.lorafy()
    message = r"^lora: 2 adapted weights are returned .*: 'query/kernel', 'value/kernel'\. A call"
    with pytest.raises(NotImplementedError, match=message) as info:
        jax.eval_shape(returning(...), lora_params, case.x)
    assert "exclude" not in str(info.value)
    assert "nnx.state(model, nnx.Not(nnx.Param))" in str(info.value)
    _, rest = jax.eval_shape(returning(nnx.Not(nnx.Param)), lora_params, case.x)
    assert set(rest) == {"dropout", "norm"}
    one = case.lorafy(targets="query.*")
    with pytest.raises(NotImplementedError, match=r"'query/kernel'(.|\n)*If it belongs to a state"):
        jax.eval_shape(returning(...), one, case.x)


class Normed(nn.Module):
    """Two dense layers and a batch norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))
        return jnp.tanh(nn.Dense(2)(x))


@pytest.mark.usefixtures("standard_promotion")
def test_a_linen_model_that_returns_every_collection():
    model = Normed()
    params = jax.eval_shape(model.init, jax.random.key(0), X)
    lora_params = jax.eval_shape(lambda p: lora_jax.lorafy(p, 1, targets=".*kernel"), params)
    apply = lora_jax.lora(model.apply)
    message = r"2 adapted weights are returned .*mutable=\['batch_stats'\] instead of mutable=True"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(lambda p, x: apply(p, x, mutable=True), lora_params, X)
    _, rest = jax.eval_shape(lambda p, x: apply(p, x, mutable=["batch_stats"]), lora_params, X)
    assert set(rest) == {"batch_stats"}


def test_weights_returned_beside_others_are_told_apart():
    lora_params = layers(2)
    fn = lambda p, x: (normed(p[0], x), p[1])  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"^lora: 2 adapted.*\nlora: the weight '0/w'"):
        jax.eval_shape(lora_jax.lora(fn), lora_params, X)


def test_a_weight_in_a_closure_is_named():
    lora_params = layers(1)
    held = lora_params.base
    with pytest.raises(ValueError, match="holds '0/v' itself as a constant, in a closure"):
        lora_jax.lora(lambda p, x: x @ held[0]["v"])(lora_params, X)


def test_a_weight_in_two_roles_has_one_update_and_the_layout_of_the_first():
    params = {"w": normal(0, (4, 4))}
    fn = lambda p, x: jnp.tanh(x @ p["w"].T) @ p["w"]  # noqa: E731
    layout = lora_jax.layout_of(fn, params, X)
    assert dict(layout) == {"w": "oi"}
    assert len(layout.weights["w"].uses) == 2
    assert_oracle(fn, adapted(params, layout=layout), X)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64, bool])
def test_weights_that_no_gradient_step_moves(dtype):
    params = {"w": jnp.ones((4, 4), dtype), "v": jnp.ones((4, 4))}
    fn = lambda p, x: (x @ p["w"].astype(jnp.float32)) @ p["v"]  # noqa: E731
    if dtype != jnp.complex64:
        layout = lora_jax.layout_of(fn, params, X)
        assert dict(layout) == {"v": "io"}
        assert "not a real floating type" in str(layout)
    with pytest.raises(ValueError, match=f"w: dtype {jnp.dtype(dtype)}, not a real floating type"):
        lora_jax.lorafy(params, 2, targets="w")


def test_quantized_weights_and_their_scales():
    """Integers cannot be adapted; a float8 weight is, through the chain that dequantizes it."""
    w = np.random.default_rng(0).normal(size=(4, 6))
    scales = np.random.default_rng(1).uniform(1, 2, (1, 6)).astype(np.float32)
    params = {
        "int8": {"w": np.round(w * 50).astype(np.int8), "scales": scales / 50},
        "float8": {"w": w.astype(jnp.float8_e4m3fn), "scales": scales},
    }
    params = jax.tree.map(jnp.asarray, params)

    def fn(params, x):
        return {k: x @ (p["w"].astype(jnp.float32) * p["scales"]) for k, p in params.items()}

    layout = lora_jax.layout_of(fn, params, X)
    assert dict(layout) == {"float8/w": "io"}
    assert "not a real floating type" in layout.weights["int8/w"].why_not
    lora_params = adapted(params, layout=layout)
    f = lora_params.adapter.factors["float8/w"]

    @jax.jit
    def run(p, x):
        return lora_jax.lora(fn)(p, x), fn(p.base, x)

    actual, plain = jax.tree.map(np.asarray, run(lora_params, X))
    x, a, b, scale = (np.asarray(leaf, np.float64) for leaf in (X, f.a, f.b, f.scale))
    expected = plain["float8"] + scale * x @ a @ b * scales
    assert_close(actual, plain | {"float8": expected})


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_layers_that_share_a_function_share_its_adapted_form(wrap):
    made = []

    def block(p, x):
        made.append(len(made))
        return jnp.tanh(x @ p["w"]) @ p["v"].T

    lora_params = layers(4)
    base, adapter = lora_params
    layout = {".*w": "io", ".*v": "oi"}
    lora_params = adapted(base, layout=layout)
    fn = stack(wrap(block))
    report = lora_jax.report(fn, lora_params, X)
    assert [(row["path"], row["uses"]) for row in report.rows] == [
        (f"{k}/{name}", 1) for k in range(4) for name in "vw"
    ]
    assert len({row["extra FLOPs"] for row in report.rows}) == 1
    assert len(made) == 1
    jaxpr = str(jax.make_jaxpr(lora_jax.lora(fn))(lora_params, X))
    assert jaxpr.count("tanh") <= 4  # printed once a call at most
    assert_oracle(fn, lora_params, X)
    swapped = jax.tree.map(lambda x: x, lora_params)
    factors = dict(swapped.adapter.factors)
    factors["0/w"], factors["3/w"] = factors["3/w"], factors["0/w"]
    other = lora_jax.LoraParams(base, lora_jax.Adapter(factors))
    run = jax.jit(lambda p: (lora_jax.lora(fn)(p, X), fn(lora_jax.merge(p), X)))
    (first, _), (actual, expected) = run(lora_params), run(other)
    assert not np.allclose(first, actual)
    assert_close(actual, expected)
    assert adapter.factors.keys() == factors.keys()


def test_the_function_is_traced_once_for_each_shape():
    traces = []

    def fn(p, x):
        traces.append(x.shape)
        return x @ p[0]["w"]

    lora_params = layers(1)
    apply = jax.jit(lora_jax.lora(fn))
    for x in (X, 2 * X, X[:1], X[:1]):
        apply(lora_params, x)
    other = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), lora_params)
    apply(other, X)
    assert traces == [(3, 4), (1, 4)]
    traces.clear()
    lora_jax.layout_of(fn, lora_params.base, X)
    assert len(traces) == 1
