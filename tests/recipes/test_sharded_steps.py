"""What a training step sends between devices, read out of the compiled program: the adapter's
gradient, and for the rest what the model without adapters does."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, drawn, randomize_b
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from benchmarks import hlo
from lora_jax.recipes.lm import mesh as lm_mesh
from lora_jax.recipes.loss import summed_loss
from lora_jax.recipes.models import llama

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
RANK = 4
IDS = np.random.default_rng(0).integers(0, 64, (8, 16)).astype(np.int32)
MESHES = {
    "data": "data=8",
    "fsdp": "fsdp=8",
    "tensor": "data=2,tensor=4",
    "fsdp and tensor": "data=2,fsdp=2,tensor=2",
}
MOVED = ("all-gather", "all-to-all", "collective-permute")
REDUCED = ("all-reduce", "reduce-scatter")

pytestmark = [pytest.mark.usefixtures("standard_promotion"), pytest.mark.devices(8)]


def sent(compiled, kinds):
    """Bytes of these kinds of collectives, loops multiplied."""
    return sum(c.bytes * c.times for c in hlo.collectives(compiled.as_text()) if c.kind in kinds)


def loss_of(logits, ids):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
    return losses.mean()


def spread(shapes, places):
    """Shapes with shardings: all that a compiler wants."""
    like = jax.ShapeDtypeStruct
    return jax.tree.map(lambda x, s: like(x.shape, x.dtype, sharding=s), shapes, places)


def size(x, of_shard=False):
    """Bytes of a leaf, or of the part of it that a device has."""
    shape = x.sharding.shard_shape(x.shape) if of_shard else x.shape
    return math.prod(shape) * x.dtype.itemsize


def programs(name, scan_layers):
    """A training step, the model's own forward and backward pass, and what the step trains."""
    mesh = lm_mesh.mesh_of(MESHES[name])
    rows = NamedSharding(mesh, P(lm_mesh.ROWS))
    sizes = SIZES | {"num_hidden_layers": 2 if scan_layers else 1}
    model = llama.Llama(**sizes, scan_layers=scan_layers, activations=rows)
    ids = jax.ShapeDtypeStruct(IDS.shape, IDS.dtype, sharding=rows)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    params = lm_mesh.placed(shapes, mesh, jnp.float32)
    layout = lora_jax.layout_of(model.apply, {"params": params}, ids)
    options = {"targets": "all-linear", "full": "norm/scale", "layout": layout}
    lora_params = jax.eval_shape(lambda params: lora_jax.lorafy(params, RANK, **options), params)
    of_base = jax.tree.map(lambda x: x.sharding, params)
    places = lora_jax.shardings(lora_params, of_base, replicate=lm_mesh.ROWS)
    trainable, frozen = lora_jax.split(spread(lora_params, places))
    of_trainable, tx = lora_jax.split(places)[0], optax.adamw(1e-3)
    state = jax.eval_shape(tx.init, trainable)
    of_state = lora_jax.state_shardings(state, trainable, of_trainable)
    opt_state = spread(state, of_state)

    def step(trainable, opt_state, frozen, ids):
        def loss(lora_params):
            return loss_of(lora_jax.lora(model.apply)({"params": lora_params}, ids), ids)

        value, grads = lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen))
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    out = (of_trainable, of_state, NamedSharding(mesh, P()))
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=out)
    step = step.lower(trainable, opt_state, frozen, ids).compile()

    first = ("layers", "layers_0")[not scan_layers]
    scale = params[first]["input_layernorm"]["scale"]

    def floor(scale, params, ids):  # forward, and backward down to the first layer
        norm = params[first] | {"input_layernorm": {"scale": scale}}
        return loss_of(model.apply({"params": params | {first: norm}}, ids), ids)

    floor = jax.jit(jax.value_and_grad(floor)).lower(scale, params, ids).compile()
    return step, floor, trainable, scale


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [
        ("fsdp", True),
        pytest.param("fsdp and tensor", True, marks=pytest.mark.long),
        pytest.param("data", False, marks=pytest.mark.long),
        pytest.param("fsdp", False, marks=pytest.mark.long),
        pytest.param("tensor", True, marks=pytest.mark.long),
    ],
)
def test_a_step_sends_the_gradient_and_what_the_model_sends(name, scan_layers):
    step, floor, trainable, scale = programs(name, scan_layers)
    assert sent(step, MOVED) == sent(floor, MOVED)  # no factor moves, and of the base no more
    own = sum(size(x, of_shard=True) for x in jax.tree.leaves(trainable))
    more = sent(step, REDUCED) - (sent(floor, REDUCED) - size(scale))
    if "tensor" not in name:
        assert own <= more <= own + 64
    else:  # and the low-rank products along sharded axes: of every weight, once forth or back
        tokens = IDS.size // (8 // lm_mesh.mesh_of(MESHES[name]).shape["tensor"])
        assert more <= own + 14 * tokens * RANK * 4 + 64


def test_on_explicit_axes_gradients_are_the_same_and_no_more_is_sent():
    sizes = SIZES | {"num_hidden_layers": 1}
    params = jax.jit(llama.Llama(**sizes).init)(jax.random.key(0), IDS)
    targets = ".*(q|o|down)_proj/kernel"  # into and out of what tensor spreads
    whole = randomize_b(lora_jax.lorafy(params, RANK, targets=targets, init=drawn))

    def gradients(mesh):
        rows = mesh and NamedSharding(mesh, P(lm_mesh.ROWS))
        model, lora_params, ids = llama.Llama(**sizes, activations=rows), whole, IDS
        if mesh:
            like = {"params": lm_mesh.placed(params["params"], mesh, jnp.float32)}
            of_base = jax.tree.map(lambda x: x.sharding, like)
            places = lora_jax.shardings(lora_params, of_base, replicate=lm_mesh.ROWS)
            lora_params, ids = jax.device_put((lora_params, ids), (places, rows))

        def loss(lora_params, ids):  # dropout, too, on a mesh that the arrays alone know
            apply = lora_jax.lora(model.apply, dropout=0.2)
            logits = apply(lora_params, ids, lora_key=jax.random.key(1))
            return summed_loss(logits[:, :-1], ids[:, 1:]) / ids.size

        compiled = jax.jit(lora_jax.value_and_grad(loss)).lower(lora_params, ids).compile()
        return jax.device_get(compiled(lora_params, ids)), sent(compiled, (*MOVED, *REDUCED))

    expected, _ = gradients(None)
    name = MESHES["fsdp and tensor"]
    (auto, sent_auto), (explicit, sent_explicit) = (
        gradients(lm_mesh.mesh_of(name, is_explicit)) for is_explicit in (False, True)
    )
    assert_close(auto, expected, depth=24)  # twelve sums forth, and twelve back
    assert_close(explicit, expected, depth=24)
    assert sent_explicit <= sent_auto


def test_pmap_sends_the_gradient_alone():
    model = llama.Llama(**SIZES)

    def made(key):
        return lora_jax.lorafy(model.init(key, IDS)["params"], RANK, full="norm/scale")

    trainable, frozen = lora_jax.split(jax.eval_shape(made, jax.random.key(0)))  # shapes suffice

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, None, 0), out_axes=None)
    def step(trainable, frozen, ids):
        def loss(lora_params):
            return loss_of(lora_jax.lora(model.apply)({"params": lora_params}, ids), ids)

        found = lora_jax.value_and_grad(loss)(lora_jax.combine(trainable, frozen))
        return jax.lax.pmean(found, "data")

    compiled = step.lower(trainable, frozen, IDS[:, None]).compile()
    own = sum(map(size, jax.tree.leaves(trainable)))
    crossing = hlo.collectives(compiled.as_text())
    assert {c.kind for c in crossing} == {"all-reduce"}
    assert own <= sum(c.bytes * c.times for c in crossing) <= own + 64
