"""The same methods as PEFT's, on the same weights: starts, outputs, and three steps of training."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, from_torch
from jax import lax

import lora_jax

pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("standard_promotion")]

RANK, ALPHA, STEPS = 4, 8, 3
IDS = np.random.default_rng(0).integers(0, 9, (3, 7))
TARGET = np.random.default_rng(1).normal(size=(3, 7, 5)).astype("float32")
LINEAR = ("first", "last")
LAYOUT = {"table": "io", "first": "io", "conv": "iio", "last": "io"}


def torch_model():
    """A table, a linear layer, a convolution and another linear layer."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(9, 12)
            self.first = torch.nn.Linear(12, 16)
            self.conv = torch.nn.Conv1d(16, 8, 3, padding=1)
            self.last = torch.nn.Linear(8, 5, bias=False)

        def forward(self, ids):
            x = torch.tanh(self.first(self.table(ids)))
            x = torch.tanh(self.conv(x.swapaxes(1, 2)).swapaxes(1, 2))
            return self.last(x)

    return Net()


def fn(p, ids):
    """The same in JAX."""
    x = jnp.tanh(p["table"][ids] @ p["first"] + p["first_bias"])
    x = lax.conv_general_dilated(
        x, p["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return jnp.tanh(x + p["conv_bias"]) @ p["last"]


def weights(model):
    """The base's weights of a torch model, adapted or not, in JAX's axes."""
    base = {name: getattr(model, name) for name in LAYOUT}
    base = {name: getattr(layer, "base_layer", layer) for name, layer in base.items()}
    kernels = {"table": base["table"].weight}
    kernels |= {name: base[name].weight.T for name in LINEAR}
    kernels |= {"conv": base["conv"].weight.permute(2, 1, 0)}
    biases = {f"{name}_bias": base[name].bias for name in ("first", "conv")}
    return {name: from_torch(x) for name, x in (kernels | biases).items()}


def factors_of(model, f, name):
    """PEFT's factors and magnitude in our axes."""
    layer = getattr(model, name)
    if name == "table":
        a, b = layer.lora_embedding_A["default"].T, layer.lora_embedding_B["default"].T
    elif name == "conv":
        a = layer.lora_A["default"].weight.permute(2, 1, 0)
        b = layer.lora_B["default"].weight[..., 0].T
    else:
        a, b = layer.lora_A["default"].weight.T, layer.lora_B["default"].weight.T
    magnitude = f.magnitude
    if magnitude is not None:
        magnitude = from_torch(layer.lora_magnitude_vector["default"].weight).reshape(-1)
    return dataclasses.replace(f, a=from_torch(a), b=from_torch(b), magnitude=magnitude)


def train_theirs(model):
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.AdamW(trained, lr=1e-2, eps=1e-4, weight_decay=0.1)
    outputs = []
    for step in range(STEPS + 1):
        y = model(torch.tensor(IDS))
        outputs.append(from_torch(y))
        if step < STEPS:
            tx.zero_grad()
            ((y - torch.tensor(TARGET)) ** 2).mean().backward()
            tx.step()
    return outputs


def train_ours(lora_params):
    apply = lora_jax.lora(fn)
    trainable, frozen = lora_jax.split(lora_params)
    tx = optax.adamw(1e-2, eps=1e-4, weight_decay=0.1)
    state, outputs = tx.init(trainable), []
    for _ in range(STEPS):
        whole = lora_jax.combine(trainable, frozen)
        outputs.append(apply(whole, IDS))
        _, grads = lora_jax.value_and_grad(lambda p: ((apply(p, IDS) - TARGET) ** 2).mean())(whole)
        updates, state = tx.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    whole = lora_jax.combine(trainable, frozen)
    return [*outputs, apply(whole, IDS)], whole


CASES = {
    "plain": (LAYOUT, {}, {}),
    "rsLoRA": (LAYOUT, {"use_rslora": True}, {"rslora": True}),
    "DoRA": (LAYOUT, {"use_dora": True}, {"dora": True}),
    "DoRA, rsLoRA": (
        LAYOUT,
        {"use_dora": True, "use_rslora": True},
        {"dora": True, "rslora": True},
    ),
    "orthogonal": (LINEAR, {"init_lora_weights": "orthogonal"}, {"init": "orthogonal"}),
    "PiSSA": (LINEAR, {"init_lora_weights": "pissa"}, {"init": "pissa"}),
    "PiSSA, DoRA": (
        LINEAR,
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init": "pissa", "dora": True},
    ),
    "OLoRA": (LINEAR, {"init_lora_weights": "olora"}, {"init": "olora"}),
    "OLoRA, rsLoRA": (
        LINEAR,
        {"init_lora_weights": "olora", "use_rslora": True},
        {"init": "olora", "rslora": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_training_are_those_of_peft(name):
    peft = pytest.importorskip("peft")
    import torch

    targets, theirs, own = CASES[name]
    model = torch_model()
    params = weights(model)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(targets), bias="none", **theirs
    )
    wrapped = peft.get_peft_model(model, config)
    net = wrapped.base_model.model
    lora_params = lora_jax.lorafy(
        params, RANK, alpha=ALPHA, targets=list(targets), layout=LAYOUT, **own
    )
    if name.startswith(("PiSSA", "OLoRA")):  # the factors are a function of the weights
        assert_close(lora_params.base, weights(net), depth=64)  # of an SVD or a QR
    else:  # they are random: take theirs, and let no factor be zero
        torch.manual_seed(1)
        for key in targets:
            layer = getattr(net, key)
            zero = (
                layer.lora_embedding_A["default"]
                if key == "table"
                else layer.lora_B["default"].weight
            )
            if "orthogonal" not in name:
                torch.nn.init.normal_(zero, std=0.1)
        factors = lora_params.adapter.factors
        factors = {key: factors_of(net, f, key) for key, f in factors.items()}
        lora_params = dataclasses.replace(lora_params, adapter=lora_jax.Adapter(factors))

    (start, *_), end = (expected := train_theirs(wrapped)), expected[-1]
    outputs, trained = train_ours(lora_params)
    assert np.abs(end - start).max() > 0.05
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual, wanted, depth=16 * STEPS)
    merged = wrapped.merge_and_unload()
    assert_close(lora_jax.merge(trained), weights(merged), depth=64)
    if own.get("init") in ("pissa", "olora") and "dora" not in own:
        plain = lora_jax.algebra.to_plain(trained, lora_params, params)
        assert_close(lora_jax.lora(fn)(plain, IDS), end, depth=16 * STEPS)
