"""Scaling, layers, biases, and factors that stay frozen."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapters import lorafy
from flax import nnx
from helpers import NormedNet, assert_close, assert_oracle, normal, randomize_b

import lora_jax
from lora_jax._weights.paths import flatten


def attention(d=8, seed=0):
    names = ("query", "key", "value", "out")
    return {
        name: {"kernel": normal((seed, k), (d, d), std=1 / 3), "bias": jnp.ones(d)}
        for k, name in enumerate(names)
    }


UNROLLED = {
    "embed": {"embedding": jnp.ones((9, 8))},
    **{f"layers_{i}": {"attn": attention(seed=i), "norm": {"bias": jnp.ones(8)}} for i in range(4)},
    "head": {"kernel": jnp.ones((8, 3)), "bias": jnp.ones(3)},
}
STACKED = {
    "layers": jax.tree.map(
        lambda *x: jnp.asarray(np.stack(x)), *(attention(seed=i) for i in range(6))
    ),
    "head": UNROLLED["head"],
}


def keys(params, **options):
    return list(lorafy(params, **options).adapter.factors)


def test_rslora_scales_by_the_root_of_the_rank():
    lora_params = lorafy(UNROLLED, {".*query.*": 4, ".*": 2}, alpha=8, rslora=True)
    for path, f in lora_params.adapter.factors.items():
        assert f.scale == np.float32(8 / 2 if "query" in path else 8 / np.sqrt(2))


@pytest.mark.parametrize(
    "layers", [[0, 2], [-1], range(1, 3), {3, 0}], ids=lambda x: str(sorted(x))
)
def test_layers_by_the_numbers_in_their_paths(layers):
    wanted = sorted(k % 4 for k in layers)
    assert keys(UNROLLED, layers=layers) == [
        f"layers_{i}/attn/{name}/kernel" for i in wanted for name in ("query", "value")
    ]


@pytest.mark.parametrize(
    ("layers", "ranges"),
    [([0, 1, 4], ["0:2", "4:5"]), ([-1], ["5:6"]), (range(6), [None]), ([3, 2], ["2:4"])],
)
def test_layers_of_a_stack_are_parts_of_it(layers, ranges):
    path = "layers/query/kernel"
    spelled = [path if r is None else f"{path}[{r}, :, :]" for r in ranges]
    assert keys(STACKED, targets=".*query/kernel", layers=layers) == spelled
    lora_params = randomize_b(lorafy(STACKED, targets=".*query/kernel", layers=layers))
    merged = np.asarray(lora_jax.merge(lora_params)["layers"]["query"]["kernel"])
    changed = np.any(merged != np.asarray(STACKED["layers"]["query"]["kernel"]), (1, 2))
    assert np.flatnonzero(changed).tolist() == sorted(k % 6 for k in layers)


def test_adapted_layers_of_a_scanned_stack_are_exact():
    lora_params = randomize_b(lorafy(STACKED, layers=[1, 4, 5]))
    x = normal(1, (3, 8))

    def layer(x, p):
        q, v = (x @ p[name]["kernel"] for name in ("query", "value"))
        return jnp.tanh(q + v), None

    assert_oracle(lambda p, x: jax.lax.scan(layer, x, p["layers"])[0], lora_params, x)


def test_what_is_of_no_layer_is_left_out():
    assert keys(UNROLLED, targets=".*kernel", layers=[1], exclude=".*(key|out).*") == [
        "layers_1/attn/query/kernel",
        "layers_1/attn/value/kernel",
    ]


def test_a_lone_number_above_the_layers_is_no_layer():
    params = {
        "Transformer_0": {f"Block_{i}": {"query": {"kernel": jnp.ones((4, 4))}} for i in (0, 1)}
    }
    assert keys(params, layers=[1]) == ["Transformer_0/Block_1/query/kernel"]
    assert keys([{"query": jnp.ones((4, 4))}] * 1, layers=[0]) == ["0/query"]


def test_numbers_from_the_end_want_one_depth():
    towers = {"encoder": 2, "decoder": 6}
    params = {
        name: {f"layers_{i}": mlp("out", stacked=()) for i in range(n)}
        for name, n in towers.items()
    }
    with pytest.raises(ValueError, match=r"6 in 'decoder/layers_', 2 in 'encoder/layers_'"):
        keys(params, targets=".*kernel", layers=[-1])
    one = {"targets": "encoder.*kernel", "layers": [-1]}
    assert keys(params, **one) == ["encoder/layers_1/out/kernel"]  # the remedy
    assert len(keys(params, targets=".*kernel", layers=[1])) == 2


def test_a_lone_number_beside_the_layers_is_no_layer():
    params = {f"blocks_{i}": mlp("out", stacked=()) for i in (0, 1)} | mlp("Dense_0", stacked=())
    assert keys(params, targets=".*kernel", layers=[0]) == ["blocks_0/out/kernel"]
    with pytest.raises(TypeError, match=r"layers=1: expected numbers, such as \[1\]"):
        keys(params, targets=".*kernel", layers=1)


@pytest.mark.parametrize("layers", [[4], [-5], [], [0, 7]])
def test_layers_that_are_not_there_raise(layers):
    with pytest.raises(ValueError, match=r"expected numbers of layers, .* have 4"):
        keys(UNROLLED, layers=layers)


def mlp(*names, stacked=(3,)):
    return {
        name: {"kernel": jnp.ones((*stacked, 4, 4)), "bias": jnp.ones((*stacked, 4))}
        for name in names
    }


@pytest.mark.parametrize("names", [("Dense_0", "Dense_1"), ("fc_1", "fc_2"), ("0", "1")])
@pytest.mark.parametrize("where", [("layers",), ("decoder", "stack"), ()])
def test_numbers_of_names_in_a_stack_are_no_layers(names, where):
    params = {"head": mlp("out", stacked=())} if where else {}
    inner = mlp(*names)
    for name in reversed(where):
        inner = {name: inner}
    prefix = "".join(f"{name}/" for name in where)
    if names[0] == "0" and where == ("layers",):  # the number may be a layer's
        with pytest.raises(ValueError, match="each may be the layer's") as error:
            keys(params | inner, targets=".*kernel", layers=[1])
        part = str(error.value).split("'")[-2]
        assert keys(params | inner, targets=part) == [part]
        return
    for layers, part in (([1], "1:2"), ([-1], "2:3"), ([2, 1], "1:3")):
        wanted = [f"{prefix}{name}/kernel[{part}, :, :]" for name in names]
        options = {"targets": r".*\d/kernel", "layers": layers}
        assert sorted(keys(params | inner, **options)) == sorted(wanted)


def test_experts_are_stacked_in_layers_that_names_number():
    layer = {"norm": {"scale": jnp.ones(4)}, "experts": {"wi": jnp.ones((3, 4, 5))}}
    params = {f"layers_{i}": layer for i in range(4)}
    options = {"targets": ".*wi", "layout": {".*wi": "bio"}}
    assert keys(params, layers=[-1], **options) == ["layers_3/experts/wi"]


def test_layers_and_ranges_of_one_axis_contradict():
    with pytest.raises(ValueError, match="both choose along axis 0"):
        keys(STACKED, targets="layers/query/kernel[0:2]", layers=[0])


# What else trains


def full(**options):
    return set(lorafy(UNROLLED, **options).adapter.full)


def test_biases():
    beside = {f"layers_{i}/attn/{n}/bias" for i in range(4) for n in ("query", "value")}
    every = {p for p in flatten(UNROLLED)[0] if p.endswith("bias")}
    assert full() == set()
    assert full(bias="lora_only") == beside
    assert full(bias="lora_only", layers=[0]) == {p for p in beside if p.startswith("layers_0")}
    assert full(bias="all") == every
    assert full(bias="all", exclude="head.*") == every - {"head/bias"}
    assert full(bias="all", full="head.*") == every | {"head/kernel"}
    assert full(bias="all", targets=[]) == every  # BitFit


class Scale(nnx.Variable):
    """A variable of a kind that the model's author made, which is no nnx.Param."""


def normed_trees():
    """Trees with running statistics, PRNG keys and counters beside the parameters, by kind."""
    net = nnx.eval_shape(lambda: NormedNet(nnx.Rngs(0)))
    net.own = Scale(normal(3, (4, 4)))
    state = jax.tree.map(
        lambda x: jnp.ones(x.shape) if x.dtype == jnp.float32 else x, nnx.state(net)
    )
    stats = {"norm": {"mean": jnp.ones(4), "var": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    params = {"norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)}, "query": jnp.ones((4, 4))}
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), params)
    linen = {"params": boxed, "batch_stats": stats, "own": {"query": jnp.ones((4, 4))}}
    return {
        "nnx": state,
        "linen": linen,
        "two models": {"a": linen | {"cache": stats}, "b": jax.tree.map(jnp.copy, linen)},
    }


@pytest.mark.parametrize("kind", normed_trees())
def test_only_parameters_train(kind):
    params = normed_trees()[kind]
    every = flatten(params)[0]
    own = re.compile(
        r"(norm|query|value)/(kernel|scale|bias)|(.*/params/)?(norm/(scale|bias)|query)"
    )
    expected = {path for path in every if own.fullmatch(path)}
    if kind == "two models":  # inside a tree, "own" might be a module
        expected |= {path for path in every if path.endswith("own/query")}
    assert expected < every.keys()
    chosen = lora_jax.lorafy(params, targets=[], full=".*")
    assert chosen.adapter.full.keys() == expected
    chosen = lora_jax.lorafy(params, targets=[], bias="all")
    assert chosen.adapter.full.keys() == {path for path in expected if path.endswith("bias")}
    chosen = lora_jax.lorafy(params, 2, targets=".*", layout={".*(query|var|kernel|own)": "io"})
    assert set(chosen.adapter.factors) == {p for p in expected if re.search("query$|kernel", p)}
    layouts = lora_jax.layout_of(lambda p: jax.tree.map(jnp.shape, p) and None, params)
    others = {p for p, w in layouts.weights.items() if re.search(r"not (nnx|in)\b|PRNG", w.why_not)}
    assert others == every.keys() - expected
    sizes = sum(every[path].size for path in expected)
    assert f"all params: {sizes + chosen_size(chosen):,}" in repr(chosen)


def chosen_size(lora_params):
    return sum(f.size for f in lora_params.adapter.factors.values())


@pytest.mark.parametrize("option", ["full", "targets", "rows"])
@pytest.mark.parametrize(
    ("kind", "path", "what"),
    [
        ("nnx", "norm/var", "nnx.BatchStat, not nnx.Param"),
        ("nnx", "dropout/rngs/key", "a PRNG key"),
        ("nnx", "own", "Scale, not nnx.Param"),
        ("linen", "batch_stats/norm/var", "in the collection 'batch_stats', not in 'params'"),
        ("two models", "a/cache/norm/var", "in the collection 'cache', not in 'params'"),
    ],
)
def test_what_is_no_parameter_is_refused_by_name(kind, path, what, option):
    params, value = normed_trees()[kind], {path: [0]} if option == "rows" else path
    with pytest.raises(ValueError, match=f"(?s){option}.*{path}'?(:| is) {what}: no parameter"):
        lora_jax.lorafy(params, **{"targets": []} | {option: value})


def test_bad_biases_raise():
    with pytest.raises(ValueError, match="bias='some': expected one of"):
        full(bias="some")
    with pytest.raises(ValueError, match=r"bias='lora_only' selects nothing: .* beside an adapted"):
        full(bias="lora_only", targets="embed.*")
    with pytest.raises(ValueError, match="bias='all' selects nothing"):
        lora_jax.lorafy({"query": jnp.ones((4, 4))}, 2, bias="all")


def test_biases_train_beside_the_factors():
    lora_params = lorafy({"m": attention()["query"]}, targets="m/kernel", bias="all")
    fn = lambda p, x: x @ p["m"]["kernel"] + p["m"]["bias"][None]  # noqa: E731
    assert_oracle(fn, randomize_b(lora_params), jnp.ones((3, 8)))


# Rows of tables

TABLE = {"embed": {"embedding": normal(0, (9, 6))}, "w": jnp.eye(6)}


def tied(p, ids):
    h = jnp.tanh(p["embed"]["embedding"][ids] @ p["w"])
    return h @ p["embed"]["embedding"].T


def test_rows_train_on_their_own():
    ids = jnp.array([[3, 1, 7], [0, 3, 8]])
    lora_params = lorafy(TABLE, targets=[], rows={"embed/.*": [7, 3]})
    (key,) = lora_params.adapter.factors
    assert key == "embed/embedding"
    assert lora_params.adapter.factors[key].ids == (3, 7)
    assert "trainable params: 12 ||" in repr(lora_params)
    run = jax.jit(lambda p: (lora_jax.lora(tied)(p, ids), tied(p.base, ids)))
    assert_close(*run(lora_params))
    lora_params = randomize_b(lora_params)
    assert_oracle(tied, lora_params, ids)
    merged, before = (
        np.asarray(p["embed"]["embedding"]) for p in (lora_jax.merge(lora_params), TABLE)
    )
    assert np.flatnonzero(np.any(merged != before, 1)).tolist() == [3, 7]
    b = np.asarray(lora_params.adapter.factors[key].b, np.float64)
    assert_close(merged[3], before[3] + b[0])

    @jax.jit
    def dropped(p, dropout_key):
        y = lora_jax.lora(tied, dropout=0.5)(p, ids, lora_key=dropout_key)
        return y, tied(lora_jax.merge(p), ids)

    assert_close(*dropped(lora_params, jax.random.key(1)))


def test_rows_beside_factors():
    lora_params = lorafy(TABLE, targets="w", rows={"embed/.*": [0]}, dora=True)
    assert list(lora_params.adapter.factors) == ["w", "embed/embedding"]
    assert_oracle(tied, randomize_b(lora_params), jnp.array([[0, 2]]))
    assert "embed/embedding" in lora_params.summary()
    report = lora_jax.report(tied, lora_params, jnp.array([[0, 2]]))
    assert {row["path"]: row["uses"] for row in report.rows}["embed/embedding"] == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"embed/.*": [9]}, "different numbers from 0 to 8"),
        ({"embed/.*": [1, 1]}, "different numbers from 0 to 8"),
        ({"embed/.*": []}, "different numbers from 0 to 8"),
        ({"embedding": [1]}, "matches none of the"),
    ],
)
def test_bad_rows_raise(rows, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.lorafy(TABLE, 2, targets=[], rows=rows)


def test_rows_of_what_is_no_table_or_adapted_as_well_raise():
    with pytest.raises(ValueError, match=r"'norm' of shape .* is no table"):
        lora_jax.lorafy({"norm": jnp.ones(6)}, targets=[], rows={"norm": [1]})
    with pytest.raises(ValueError, match="overlap: an entry of a weight has one"):
        lora_jax.lorafy(TABLE, 2, targets="embed.*", rows={"embed.*": [1]})


# Frozen factors

X = normal(1, (5, 8))
W = {"w": normal(0, (8, 8))}


def fn(p, x):
    return jnp.tanh(x @ p["w"])


def sorted_names(freeze):
    return " ".join(sorted(freeze))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("freeze", [("a",), ["b"], {"a", "magnitude"}], ids=sorted_names)
def test_frozen_factors_keep_every_bit(freeze, dora, standard_promotion):
    lora_params = randomize_b(lorafy(W, targets="w", freeze=freeze, dora=dora))
    kept = {name: getattr(lora_params.adapter.factors["w"], name) for name in freeze}
    tx = lora_jax.optimizer(optax.adamw(1e-1, weight_decay=0.1))

    @jax.jit
    def step(lora_params):
        grads = jax.grad(lambda p: lora_jax.lora(fn)(p, X).sum())(lora_params)
        updates, _ = tx.update(grads, tx.init(lora_params), lora_params)
        return grads.adapter.factors["w"], optax.apply_updates(lora_params, updates)

    grads, moved = jax.tree.map(np.asarray, step(lora_params))
    assert not any(getattr(grads, name).any() for name in freeze if kept[name] is not None)
    trainable, frozen = lora_jax.split(lora_params)
    assert all(getattr(trainable.factors["w"], name) is None for name in freeze)
    assert lora_jax.combine(trainable, frozen).adapter.factors["w"].frozen == tuple(sorted(freeze))
    for name in ("a", "b"):
        new, old = (np.asarray(getattr(p.adapter.factors["w"], name)) for p in (moved, lora_params))
        assert (new == old).all() == (name in freeze)
    assert lora_params.adapter.factors["w"].size == sum(x.size for x in jax.tree.leaves(trainable))
    assert_oracle(fn, lora_params, X)


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="memory of a CPU: products of GPUs have workspaces"
)
def test_what_a_frozen_factor_reads_is_not_kept():
    """In a scan, what the backward pass needs is stacked: the inputs of ``a`` are not."""
    layers, size, tokens = 8, 64, 512
    params = {"w": jax.ShapeDtypeStruct((layers, size, size), jnp.float32)}
    x = jax.ShapeDtypeStruct((tokens, size), jnp.float32)

    def temp(freeze):
        lora_params = jax.eval_shape(
            lambda p: lora_jax.lorafy(p, 4, targets="w", layout={"w": "bio"}, freeze=freeze), params
        )
        apply = lora_jax.lora(lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0])
        step = lora_jax.value_and_grad(lambda p, x: (apply(p, x) ** 2).mean())
        return jax.jit(step).lower(lora_params, x).compile().memory_analysis().temp_size_in_bytes

    inputs = layers * tokens * size * 4
    assert temp(()) - temp(("a",)) > 0.9 * inputs


@pytest.mark.parametrize("freeze", ["a", ("a", "b", "magnitude"), ("c",)])
def test_bad_frozen_names_raise(freeze):
    with pytest.raises(ValueError, match="expected a collection such as"):
        lora_jax.lorafy(W, 2, targets="w", freeze=freeze)


def test_all_of_it_at_once_is_still_exact():
    lora_params = randomize_b(
        lora_jax.lorafy(
            UNROLLED,
            4,
            layers=[1, 3],
            rslora=True,
            dora=True,
            bias="lora_only",
            init="pissa",
            full="head/kernel",
            freeze=("a",),
        )
    )
    x = normal(1, (3, 8))

    def model(p, x):
        for i in range(4):
            attn = p[f"layers_{i}"]["attn"]
            for name in ("query", "key", "value", "out"):
                x = jnp.tanh(x @ attn[name]["kernel"] + attn[name]["bias"][None])
        return x @ p["head"]["kernel"]

    start = lora_jax.lorafy(UNROLLED, 4, layers=[1, 3], dora=True, init="pissa")
    run = jax.jit(lambda p: (lora_jax.lora(model)(p, x), model(UNROLLED, x)))
    # Sixteen layers, four of them with singular vectors and norms, forth and back.
    assert_close(*run(start), depth=32)
    assert_oracle(model, lora_params, x, sums={"depth": 64})
