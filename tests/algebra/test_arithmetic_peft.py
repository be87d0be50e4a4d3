"""PEFT's ``add_weighted_adapter``: where it gives the update that it names, and where it does not.

On a table, a linear layer, a convolution and another linear layer, against the weighted sum of the
updates, which ours is.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tolerance
from test_peft import LAYOUT, LINEAR, torch_model

import lora_jax
from lora_jax import Adapter, Factors

pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("standard_promotion")]

WEIGHTS = (0.7, -0.4)
DENSITY = 0.5  # of even sizes, so that the counts of entries agree


def wrapped(*configs):
    """A model of PEFT's with an adapter of each configuration, B at random."""
    peft = pytest.importorskip("peft")
    import torch

    configs = [peft.LoraConfig(bias="none", **config) for config in configs]
    model = peft.get_peft_model(torch_model(), configs[0], "x")
    model.add_adapter("y", configs[1])
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def ours(model, name, targets):
    """An adapter of PEFT's as one of ours."""
    factors = {}
    for key in targets:
        layer = getattr(model.base_model.model, key)
        if key == "table":
            a, b = layer.lora_embedding_A[name].T, layer.lora_embedding_B[name].T
        else:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a, b = (a.permute(2, 1, 0), b[..., 0].T) if key == "conv" else (a.T, b.T)
        a, b = (jnp.asarray(x.detach().numpy()) for x in (a, b))
        scale = jnp.float32(layer.scaling[name])
        factors[key] = Factors(a, b, scale, LAYOUT[key])
    return Adapter(factors)


def update(model, name, key):
    """``dW`` as PEFT has it, in our axes."""
    d = getattr(model.base_model.model, key).get_delta_weight(name).detach().numpy()
    return d if key == "table" else d.transpose(2, 1, 0) if d.ndim == 3 else d.T


def dense(adapter, key):
    f = adapter.factors[key]
    return float(f.scale) * np.tensordot(np.asarray(f.a, "f8"), np.asarray(f.b, "f8"), 1)


def gap(model, adapter, targets):
    """The largest relative difference of PEFT's combination ``z`` to an adapter."""
    return max(
        np.abs(update(model, "z", key) - dense(adapter, key)).max()
        / np.abs(dense(adapter, key)).max()
        for key in targets
    )


def combined(configs, kind, targets, weights=WEIGHTS, **options):
    model = wrapped(*(config | {"target_modules": list(targets)} for config in configs))
    x, y = (ours(model, name, targets) for name in "xy")
    for key in targets:  # we read what PEFT has
        want = update(model, "x", key)
        np.testing.assert_allclose(dense(x, key), want, atol=tolerance() * np.abs(want).max())
    model.add_weighted_adapter(["x", "y"], list(weights), "z", kind, **options)
    return model, x, y


PLAIN = ({"r": 4, "lora_alpha": 8}, {"r": 4, "lora_alpha": 2})
UNEQUAL = ({"r": 2, "lora_alpha": 8}, {"r": 4, "lora_alpha": 2})
STABLE = tuple(config | {"use_rslora": True} for config in PLAIN)
PATTERN = ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"last": 3}}, PLAIN[1])


@pytest.mark.parametrize("configs", [PLAIN, UNEQUAL, PATTERN])
def test_cat_is_the_sum(configs):
    model, x, y = combined(configs, "cat", LINEAR)
    assert gap(model, WEIGHTS[0] * x + WEIGHTS[1] * y, LINEAR) < tolerance()


@pytest.mark.parametrize("configs", [PLAIN, UNEQUAL])
def test_svd_is_the_sum_resized(configs):
    model, x, y = combined(configs, "svd", LINEAR, svd_rank=3)
    total = lora_jax.algebra.resize(WEIGHTS[0] * x + WEIGHTS[1] * y, 3)
    assert gap(model, total, LINEAR) < 10 * tolerance()  # singular vectors magnify roundings


def test_linear_is_linear_in_factors():
    model, x, y = combined(PLAIN, "linear", LINEAR, weights=(0.7, 0.4))
    result = lora_jax.algebra.linear_in_factors([x, y], [math.sqrt(0.7), math.sqrt(0.4)])
    assert gap(model, result, LINEAR) < tolerance()
    assert gap(model, 0.7 * x + 0.4 * y, LINEAR) > 0.1  # and not the sum


def test_ties_and_pruning_of_updates_are_theirs():
    """Where all weights are equal: PEFT elects signs before it weights."""
    model = wrapped(*(config | {"target_modules": list(LINEAR)} for config in PLAIN))
    x, y = (ours(model, name, LINEAR) for name in "xy")
    for kind, verb in (
        ("ties_svd", lora_jax.algebra.ties),
        ("magnitude_prune_svd", lora_jax.algebra.prune),
    ):
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "z", kind, svd_rank=3, density=DENSITY)
        result, _ = verb([x, y], density=DENSITY, rank=3)
        assert gap(model, result, LINEAR) < 10 * tolerance()  # singular vectors magnify roundings
        model.delete_adapter("z")


@pytest.mark.parametrize(("kind", "rank"), [("cat", 8), ("svd", 5)])
def test_peft_forgets_the_scale_of_rslora(kind, rank):
    """The result is made with alpha = rank, and rsLoRA divides by the root of the rank only."""
    options = {"svd_rank": rank} if kind == "svd" else {}
    model, x, y = combined(STABLE, kind, LINEAR, **options)
    total = WEIGHTS[0] * x + WEIGHTS[1] * y
    total = lora_jax.algebra.resize(total, rank) if kind == "svd" else total
    assert gap(model, total, LINEAR) > 0.5
    assert (
        gap(model, math.sqrt(rank) * total, LINEAR) < 10 * tolerance()
    )  # singular vectors magnify roundings


def test_peft_refuses_unequal_ranks_in_ties_of_factors():
    model = wrapped(*(config | {"target_modules": list(LINEAR)} for config in UNEQUAL))
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "z", "ties", density=DENSITY)
    x, y = (ours(model, name, LINEAR) for name in "xy")
    assert lora_jax.algebra.ties([x, y], density=DENSITY, rank=3)[0].factors["last"].rank == 3


def test_ties_of_factors_is_not_ties_of_updates():
    model, x, y = combined(PLAIN, "ties", LINEAR, density=DENSITY)
    result, _ = lora_jax.algebra.ties([WEIGHTS[0] * x, WEIGHTS[1] * y], density=DENSITY, rank=None)
    assert gap(model, result, LINEAR) > 0.3


def test_all_kinds_of_layers_add_up():
    model = wrapped(*(config | {"target_modules": list(LAYOUT)} for config in UNEQUAL))
    x, y = (ours(model, name, LAYOUT) for name in "xy")
    total = 2 * x - y
    for key in LAYOUT:
        want = 2 * update(model, "x", key) - update(model, "y", key)
        terms = [np.abs(update(model, name, key)).max() for name in "xy"]
        allowed = tolerance() * (2 * terms[0] + terms[1])
        np.testing.assert_allclose(dense(total, key), want, atol=allowed)
