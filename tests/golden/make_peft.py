"""Adapters as PEFT itself writes them, for ``tests/io/test_peft_folders.py``: small, and kept.

Run where PyTorch and PEFT are: ``python tests/golden/make_peft.py``. The experts come in two
layouts: PEFT changed the axes with 0.19; with ``peft==0.18.1`` the script makes the older one only.
Beside each adapter lie the base's weights, an input and the output of the adapted model.
"""

import shutil
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "peft"


class Net(torch.nn.Module):
    """A table, a linear layer, a convolution and another linear layer."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(9, 12)
        self.first = torch.nn.Linear(12, 16)
        self.conv = torch.nn.Conv1d(16, 8, 3, padding=1)
        self.last = torch.nn.Linear(8, 5)

    def forward(self, ids):
        x = torch.tanh(self.first(self.table(ids)))
        x = torch.tanh(self.conv(x.swapaxes(1, 2)).swapaxes(1, 2))
        return self.last(x)


class Experts(torch.nn.Module):
    """Experts whose kernels are parameters, ``[experts, out, in]``."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 10, 6))
        self.down_proj = torch.nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x):
        gate, up = torch.einsum("ni,eoi->eno", x, self.gate_up_proj).chunk(2, -1)
        return torch.einsum("eni,eoi->no", torch.tanh(gate) * up, self.down_proj)


class Mixture(torch.nn.Module):
    """A model of them."""

    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ALL = ["table", "first", "conv", "last"]
CASES = {
    "plain": (Net, {"target_modules": ALL, "rank_pattern": {"conv": 2}}),
    "rslora": (Net, {"target_modules": ALL, "use_rslora": True, "alpha_pattern": {"last": 3}}),
    "dora": (Net, {"target_modules": ALL, "use_dora": True}),
    "pissa": (Net, {"target_modules": ["first", "last"], "init_lora_weights": "pissa"}),
    "saved": (Net, {"target_modules": ["first"], "modules_to_save": ["last"], "bias": "all"}),
    "rows": (Net, {"target_modules": ["first"], "trainable_token_indices": {"table": [7, 2]}}),
    "experts": (Mixture, {"target_modules": [], "target_parameters": EXPERTS}),
}


def make(name, kind, options):
    """One folder."""
    torch.manual_seed(0)
    model = kind()
    weights = {f"base.{k}": v.detach().clone() for k, v in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **options)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    rng = np.random.default_rng(0)
    if kind is Net:
        x = torch.tensor(rng.integers(0, 9, (3, 7)))
    else:
        x = torch.tensor(rng.normal(size=(5, 6)), dtype=torch.float32)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    save_file(weights | {"x": x, "y": adapted(x).detach()}, folder / "expected.safetensors")


if __name__ == "__main__":
    is_old = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19)
    for name, (kind, options) in CASES.items():
        if not is_old:
            make(name, kind, options)
        elif name == "experts":
            make("experts_before_0_19", kind, options)
