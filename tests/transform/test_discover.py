"""``layout_of`` and ``report``: any naming, by what the function does."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import CASES, assert_oracle, drawn, error, normal, randomize_b
from jax import lax

import lora_jax


@functools.cache
def params_and_fn():
    shapes = {
        "table": (9, 6),
        "fused": (6, 12),
        "back": (4, 6),
        "kernel": (3, 6, 8),
        "experts": (2, 8, 5),
        "stack": (3, 5, 5),
        "gains": (3, 5),
        "bias": (5,),
        "unused": (4, 4),
        "squared": (5, 5),
        "counts": (2, 2),
    }
    params = {name: normal(k, shape, std=0.4) for k, (name, shape) in enumerate(shapes.items())}
    params["counts"] = jnp.ones((2, 2), int)

    def fn(p, ids):
        x = p["table"][ids]  # [2, 5, 6]
        q, k, v = jnp.split(x @ p["fused"], 3, -1)  # [2, 5, 4]
        x = (q * k + v) @ p["back"]
        x = lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        x = lax.ragged_dot(x.reshape(10, 8), p["experts"], jnp.array([4, 6]))
        x, _ = lax.scan(
            lambda x, ws: (jnp.tanh(x @ ws[0].T * ws[1][None]), None), x, (p["stack"], p["gains"])
        )
        x = x @ jnp.square(p["squared"]) + p["bias"][None] + p["counts"].sum().astype(jnp.float32)
        return x @ p["table"][:, :5].T  # tied

    return params, fn


IDS = jnp.array([[0, 1, 2, 3, 8], [4, 4, 5, 6, 7]])
LAYOUTS = {
    "table": ("io", "embedding"),
    "fused": ("io", "dot"),
    "back": ("io", "dot"),
    "kernel": ("iio", "conv"),
    "experts": ("bio", "ragged"),
    "stack": ("boi", "dot"),
}


@functools.cache
def layouts():
    params, fn = params_and_fn()
    return lora_jax.layout_of(fn, params, IDS)


def test_layouts_come_from_what_the_function_does():
    found = layouts()
    assert {p: (letters, found.weights[p].kind) for p, letters in found.items()} == LAYOUTS
    reasons = {p: w.why_not for p, w in found.weights.items() if w.why_not}
    assert reasons["unused"] == "not used by the function"
    assert reasons["bias"] == "1-D: a LoRA needs an input and an output axis"
    assert reasons["counts"] == "dtype int32, not a real floating type"
    assert "reaches 'square'" in reasons["squared"]
    assert f"{__file__}:" in reasons["squared"]
    assert "reaches 'tanh'" in reasons["gains"]
    uses = found.weights["table"].uses
    assert [use.split()[0] for use in uses] == ["gather", "dot_general"]
    assert all(f"{__file__}:" in use for use in uses)


def test_lorafy_by_a_discovered_layout_needs_no_names():
    params, fn = params_and_fn()
    layout = layouts()
    lora_params = lora_jax.lorafy(params, 2, targets=".*", layout=layout, init=drawn)
    assert set(lora_params.adapter.factors) == set(LAYOUTS)
    assert_oracle(fn, randomize_b(lora_params), IDS, sums={"depth": 32})  # forth and back
    linear = lora_jax.lorafy(params, 2, targets="all-linear", layout=layout, init=drawn)
    assert set(linear.adapter.factors) == set(LAYOUTS) - {"table"}


def test_shapes_are_enough_and_a_params_wrapper_is_no_part_of_paths():
    params, fn = params_and_fn()
    shapes = jax.eval_shape(lambda p: p, {"params": params})
    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    found = lora_jax.layout_of(lambda p, ids: fn(p["params"], ids), shapes, ids)
    assert dict(found) == {path: letters for path, (letters, _) in LAYOUTS.items()}
    lora_params = jax.eval_shape(
        lambda p: lora_jax.lorafy(p, 2, targets=".*", layout=found), shapes
    )
    rows = lora_jax.report(lambda p, ids: fn(p["params"], ids), lora_params, ids).rows
    assert len(rows) == len(LAYOUTS)


@pytest.mark.parametrize("name", CASES)
def test_discovered_layouts_agree_with_flax_conventions(name):
    case = CASES[name]()
    options = {"targets": case.targets, "init": drawn}
    by_names = lora_jax.lorafy(case.params, 2, **options).adapter.factors
    found = lora_jax.layout_of(case.fn, case.params, case.x)
    assert {path: f.layout for path, f in by_names.items()} == dict(found)
    by_use = lora_jax.lorafy(case.params, 2, layout=found, **options).adapter.factors
    assert error(by_use, by_names) == 0


def test_convolutional_and_recurrent_flax_models():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=2, feature_group_count=1)(x))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
            x = nn.ConvTranspose(6, (2, 2), strides=(2, 2), transpose_kernel=True)(x)
            x = x.reshape(*x.shape[:2], -1)  # [2, 8, 48]
            return nn.Dense(3)(nn.RNN(nn.LSTMCell(5))(x))

    model, x = Net(), normal(0, (2, 8, 8, 3))
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    fn = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    layout = lora_jax.layout_of(fn, params, x)
    assert layout["Conv_0/kernel"] == "iiio"
    assert layout["ConvTranspose_0/kernel"] == "iioi"  # stored [.., out, in]
    options = {"targets": "all-linear", "layout": layout, "init": drawn}
    lora_params = randomize_b(lora_jax.lorafy(params, 2, **options))
    assert len(lora_params.adapter.factors) == 4 + 8
    assert_oracle(fn, lora_params, x, sums={"depth": 40})  # eight steps, forth and back


def test_units_and_inputs_of_size_one():
    params = {"score": jnp.ones((6, 1)), "time": jnp.ones((1, 6))}
    fn = lambda p, t: (t @ p["time"]) @ p["score"]  # noqa: E731
    assert dict(lora_jax.layout_of(fn, params, jnp.ones((3, 1)))) == {"score": "io", "time": "io"}
    squeezed = lambda p, x: x @ p["score"][:, 0]  # noqa: E731
    layout = lora_jax.layout_of(squeezed, params, jnp.ones((3, 6)))
    assert dict(layout) == {"score": "io"}
    with pytest.raises(ValueError, match="'all-linear' selects nothing"):  # no low rank in vectors
        lora_jax.lorafy(params, 1, targets="all-linear", layout=layout)
    options = {"targets": "score", "layout": layout, "init": drawn}
    assert lora_jax.lorafy(params, 1, **options).adapter.factors


def test_what_layout_of_refuses():
    with pytest.raises(TypeError, match=r"params is a LoraParams; pass its \.base"):
        lora_jax.layout_of(lambda p: p, lora_jax.LoraParams(None, None))
    with pytest.raises(ValueError, match="params has no arrays"):
        lora_jax.layout_of(lambda p: 0, {"a": None})


def test_a_weight_without_outputs_and_one_returned_cannot_take_a_lora():
    params = {"w": jnp.ones((3, 4)), "v": jnp.ones((3, 4)), "u": jnp.ones((3, 4))}

    def fn(p, x):
        return jnp.tensordot(x, p["w"], 2), p["v"], p["u"].reshape(4, 3).T @ x.T

    reasons = {
        p: w.why_not for p, w in lora_jax.layout_of(fn, params, jnp.ones((3, 4))).weights.items()
    }
    assert "no use of it both reads and writes: dot_general" in reasons["w"]
    assert reasons["v"] == "is returned by the function"
    assert "no use of it both reads and writes" in reasons["u"]


def test_a_layout_from_another_model_is_refused():
    params, _ = params_and_fn()
    layout = layouts()
    other = {**params, "back": jnp.ones((4, 7))}
    with pytest.raises(
        ValueError, match=r"another model: 'back' has shape \(4, 6\) there and \(4, 7\)"
    ):
        lora_jax.lorafy(other, 2, targets=".*", layout=layout)
    with pytest.raises(ValueError, match=r"another model: 'new' has shape None there and \(3, 3\)"):
        lora_jax.lorafy({**params, "new": jnp.ones((3, 3))}, 2, targets=".*", layout=layout)
    missing = {path: leaf for path, leaf in params.items() if path != "bias"}
    with pytest.raises(ValueError, match=r"'bias' has shape \(5,\) there and None in params"):
        lora_jax.lorafy(missing, 2, targets=".*", layout=layout)


def test_targets_that_cannot_take_a_lora_say_what_the_function_does_with_them():
    params, _ = params_and_fn()
    layout = layouts()
    with pytest.raises(ValueError, match=r"squared: reaches 'square', which has no low-rank rule"):
        lora_jax.lorafy(params, 2, targets="squared", layout=layout)


def test_the_report_counts_uses_parameters_and_flops():
    params, fn = params_and_fn()
    layout = layouts()
    lora_params = lora_jax.lorafy(params, 2, targets=".*", layout=layout, init=drawn)
    report = lora_jax.report(fn, lora_params, IDS)
    rows = {row["path"]: row for row in report.rows}
    rank, tokens = 2, 10
    assert rows["fused"]["extra FLOPs"] == 2 * tokens * rank * (6 + 12)
    assert rows["stack"]["extra FLOPs"] == 3 * 2 * tokens * rank * (5 + 5)
    assert rows["kernel"]["extra FLOPs"] == 2 * tokens * rank * (3 * 6 + 8)
    assert rows["experts"]["extra FLOPs"] == 2 * tokens * rank * (8 + 5)
    assert rows["table"]["extra FLOPs"] == 2 * tokens * rank * (6 + (5 + 9))
    assert rows["stack"]["parameters"] == 3 * rank * (5 + 5)
    assert (rows["table"]["kind"], rows["table"]["uses"]) == ("embedding", 2)
    assert (report.materialized, report.unused) == ((), ())
    assert "table    9x6    embedding  io" in str(report)
    assert "trainable params:" in str(report)


def test_the_report_lists_what_is_built_and_what_is_never_used():
    params, fn = params_and_fn()
    options = {"targets": "back|squared|unused", "layout": {"back": "io"}, "init": drawn}
    lora_params = lora_jax.lorafy(params, 2, **options)
    report = lora_jax.report(fn, lora_params, IDS)
    assert report.unused == ("unused",)
    (line,) = report.materialized
    assert line.startswith("'squared' float32[5, 5] reaches 'square'")
    assert f"{__file__}:" in line
    assert "materialized: 'squared'" in str(report)
    assert "never used: unused" in str(report)


def test_the_report_sees_through_conds_and_loops_once():
    params = {"w": jnp.ones((4, 4))}
    lora_params = lora_jax.lorafy(params, 2, targets="w", init=drawn)

    def fn(p, x):
        x = lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: -x @ w, p["w"])
        x = lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["w"]), x)
        picked = lax.cond(x[0, 0] > 0, lambda w: 2 * w, lambda w: w, p["w"])
        return x @ picked

    (row,) = lora_jax.report(fn, lora_params, jnp.ones((5, 4))).rows
    one = 2 * 5 * 2 * (4 + 4)
    assert row["uses"] == 4
    assert row["extra FLOPs"] == (2 + 3 + 1) * one  # both branches, three turns, one more


def test_a_report_of_two_adapters():
    state = nnx.state(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    one = lora_jax.lorafy(state, 2, targets="all-linear")
    fn = lambda p, x: x @ p[0]["kernel"][...] @ p[1]["kernel"][...]  # noqa: E731
    report = lora_jax.report(fn, (one, one), jnp.ones((2, 4)))
    assert [row["uses"] for row in report.rows] == [1, 1]
    assert len(report.total) == 2
