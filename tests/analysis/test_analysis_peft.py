"""Adapters that PEFT wrote: its factors, decomposed by PyTorch in float64."""

import numpy as np
import pytest
from helpers import from_torch

from lora_jax import analysis
from lora_jax.io import peft as our_peft

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

TARGETS = ["query", "value"]


def written(torch, peft, seed, rank, folder):
    """A model with an adapter that PEFT wrote into a folder."""
    torch.manual_seed(0)  # the base is the same
    layers = {
        f"layer_{k}": torch.nn.ModuleDict({n: torch.nn.Linear(12, 9) for n in TARGETS})
        for k in range(2)
    }
    base = torch.nn.ModuleDict(layers)
    base.forward = lambda x: x
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=6, target_modules=TARGETS))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    model.save_pretrained(folder)
    return model


def test_adapters_of_peft_are_measured_as_pytorch_does(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    runs = {
        3: written(torch, peft, 1, 3, tmp_path / "3"),
        5: written(torch, peft, 2, 5, tmp_path / "5"),
    }
    layers = {f"layer_{k}": dict.fromkeys(TARGETS, k) for k in range(2)}
    base = runs[3].get_base_model()
    params = {
        layer: {
            n: {
                "kernel": from_torch(base[layer][n].base_layer.weight.T),
                "bias": from_torch(base[layer][n].base_layer.bias),
            }
            for n in names
        }
        for layer, names in layers.items()
    }
    ours = {r: our_peft.load(tmp_path / str(r), params) for r in runs}
    spectra, factors = analysis.spectra(ours[3]), analysis.amplification(ours[3])
    phi = analysis.subspace_similarity(ours[3].adapter, ours[5].adapter)
    intruders = analysis.intruder_dimensions(ours[3], k=4)
    assert len(spectra) == 4

    def double(x):
        return x.detach().to(torch.float64)

    for layer, names in layers.items():
        for n in names:
            key, one, two = (
                f"{layer}/{n}/kernel",
                *(m.get_base_model()[layer][n] for m in runs.values()),
            )
            w = double(one.base_layer.weight)
            d = 2 * double(one.lora_B["default"].weight) @ double(one.lora_A["default"].weight)
            u, s, vh = torch.linalg.svd(d, full_matrices=False)
            np.testing.assert_allclose(spectra[key], s[:3], rtol=1e-5)
            inner = torch.linalg.norm(u[:, :3].T @ w @ vh[:3].T)
            np.testing.assert_allclose(factors[key].factor, torch.linalg.norm(d) / inner, rtol=1e-4)
            rights = [torch.linalg.svd(double(m.lora_A["default"].weight))[2] for m in (one, two)]
            for i, j in ((1, 1), (2, 4), (3, 5)):
                product = rights[0][:i] @ rights[1][:j].T
                expected = (product**2).sum() / min(i, j)
                np.testing.assert_allclose(phi[key][i - 1, j - 1], expected, rtol=1e-4)
            left, before = (torch.linalg.svd(x, full_matrices=False)[0] for x in (w + d, w))
            cosines = (left[:, :4].T @ before).abs().max(1).values
            np.testing.assert_allclose(intruders[key].cosines, cosines, rtol=1e-3)
