"""Models of other libraries, as pure functions over their own trees; small, and all in one file.

Haiku, Equinox and Keras are peers: they are installed for these tests only.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_oracle, assert_same, drawn, normal, randomize_b

import lora_jax

X = np.asarray(normal(0, (3, 12, 8)))


def haiku():
    """A Haiku function: its parameters are a dict of dicts, with slashes in the names."""
    hk = pytest.importorskip("haiku")

    def net(x):
        x = hk.Conv1D(16, 3, name="conv")(x)
        x = x + hk.MultiHeadAttention(2, 8, w_init=hk.initializers.TruncatedNormal(0.2))(x, x, x)
        x = jax.nn.relu(hk.nets.MLP([16, 16])(x))
        ids = jnp.arange(12) % 5
        return hk.Linear(4)(x + hk.Embed(5, 16)(ids)[None])

    model = hk.without_apply_rng(hk.transform(net))
    return model.apply, model.init(jax.random.key(1), X), 1 + 4 + 2 + 1


def equinox():
    """An Equinox module: a dataclass, with functions among its leaves, called by vmap."""
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP
        conv: eqx.nn.Conv1d
        cell: eqx.nn.GRUCell

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[0])
            self.mlp = eqx.nn.MLP(8, 6, 10, 2, key=keys[1])
            self.conv = eqx.nn.Conv1d(6, 5, 3, key=keys[2])
            self.cell = eqx.nn.GRUCell(5, 7, key=keys[3])

        def __call__(self, x):
            x = jax.vmap(self.mlp)(x + self.attention(x, x, x))
            x = self.conv(x.T).T
            step = lambda h, x: (self.cell(x, h), None)  # noqa: E731
            return jax.lax.scan(step, jnp.zeros(7), x)[0]

    params, static = eqx.partition(Net(jax.random.key(1)), eqx.is_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, 4 + 3 + 1 + 2


def keras():
    """A Keras model as a stateless call: its variables are a list."""
    os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is first imported
    keras = pytest.importorskip("keras")
    inputs = keras.Input((12, 8))
    x = keras.layers.Conv1D(8, 3, padding="same")(inputs)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = keras.layers.LSTM(6)(keras.layers.LayerNormalization()(x))
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    trainable = [v.value for v in model.trainable_variables]
    frozen = [v.value for v in model.non_trainable_variables]

    def fn(trainable, x):
        return model.stateless_call(trainable, frozen, x)[0]

    return fn, trainable, 1 + 4 + 2 + 1


LIBRARIES = {
    "haiku": pytest.param(haiku, marks=pytest.mark.peer),
    "equinox": pytest.param(equinox, marks=pytest.mark.peer),
    "keras": pytest.param(keras, marks=pytest.mark.peer),
}


@pytest.mark.parametrize("build", LIBRARIES.values(), ids=LIBRARIES)
def test_a_model_of_another_library(build, standard_promotion):
    fn, params, linear = build()
    layout = lora_jax.layout_of(fn, params, X)
    lora_params = randomize_b(lora_jax.lorafy(params, 2, targets="all-linear", layout=layout))
    assert len(lora_params.adapter.factors) == linear
    assert_oracle(fn, lora_params, X, sums={"depth": 64})  # twelve steps of a recurrent cell
    merged = lora_jax.merge(lora_params)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    report = lora_jax.report(fn, lora_params, X)
    assert (report.materialized, report.unused) == ((), ())


@pytest.mark.peer
def test_an_equinox_transformer_with_its_embedding_trains(standard_promotion):
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):
        attention: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear
        norms: list[eqx.nn.LayerNorm]

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[0])
            self.up = eqx.nn.Linear(8, 16, key=keys[1])
            self.down = eqx.nn.Linear(16, 8, key=keys[2])
            self.norms = [eqx.nn.LayerNorm(8), eqx.nn.LayerNorm(8)]

        def __call__(self, x):
            y = jax.vmap(self.norms[0])(x)
            x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((len(x),) * 2, bool)))
            y = jax.vmap(self.norms[1])(x)
            return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(y)))

    class Transformer(eqx.Module):
        embedding: eqx.nn.Embedding
        positions: eqx.nn.Embedding
        blocks: list[Block]
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 5)
            self.embedding = eqx.nn.Embedding(11, 8, key=keys[0])
            self.positions = eqx.nn.Embedding(6, 8, key=keys[1])
            self.blocks = [Block(keys[2]), Block(keys[3])]
            self.head = eqx.nn.Linear(8, 11, key=keys[4])

        def __call__(self, ids):
            x = jax.vmap(self.embedding)(ids)
            x = x + jax.vmap(self.positions)(jnp.arange(len(ids)))
            for block in self.blocks:
                x = block(x)
            return jax.vmap(self.head)(x)

    params, static = eqx.partition(Transformer(jax.random.key(1)), eqx.is_array)

    def fn(p, ids):
        return jax.vmap(eqx.combine(p, static))(ids)

    ids = jax.random.randint(jax.random.key(2), (4, 6), 0, 11)
    layout = lora_jax.layout_of(fn, params, ids)
    tables = {path for path, w in layout.weights.items() if w.kind == "embedding"}
    assert tables == {"embedding/weight", "positions/weight"}
    start = lora_jax.lorafy(params, 4, targets=list(layout), layout=layout)
    assert len(start.adapter.factors) == 2 + 2 * 6 + 1
    assert_oracle(fn, randomize_b(start), ids)

    def loss(p):
        logits = lora_jax.lora(fn)(p, ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    optimizer = lora_jax.optimizer(optax.adam(0.03))

    @jax.jit
    def step(p, state):
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = optimizer.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    p, state, losses = start, optimizer.init(start), []
    for _ in range(40):
        p, state, value = step(p, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 4, losses
    assert_same(p.base, start.base)


def test_plain_jax_with_parameters_in_nested_tuples():
    params = (
        [normal(0, (8, 6)), normal(1, (6,))],
        {"deep": (normal(2, (6, 3, 2)), None)},
    )

    def fn(p, x, *, scale):
        (w, b), rest = p
        return scale * jnp.einsum("btd,dnh->btnh", jnp.tanh(x @ w + b), rest["deep"][0])

    fn = functools.partial(fn, scale=2.0)
    with jax.numpy_rank_promotion("allow"):
        layout = lora_jax.layout_of(fn, params, X)
        assert dict(layout) == {"0/0": "io", "1/deep/0": "ioo"}
        options = {"targets": ".*", "layout": layout, "init": drawn}
        assert_oracle(fn, randomize_b(lora_jax.lorafy(params, 2, **options)), X)
