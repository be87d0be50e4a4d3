"""An adapter of PEFT's in the neutral form: its files tell all but what its base is like."""

from pathlib import Path

from lora_jax.cli._read.forms import AdapterFile, Update
from lora_jax.io.peft import _config as configs
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._own import Module, own_modules, own_others


def open_peft(path: Path) -> AdapterFile:
    """Read the adapter in a folder of PEFT's, without the model that it is for.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is damaged, or cannot be read exactly.
    """
    folder = Folder.open(path)
    updates = {name: _update(name, m, folder) for name, m in own_modules(folder).items()}
    base = folder.config.get("base_model_name_or_path") or "not recorded"
    init = folder.config["init_lora_weights"]
    note = f"on what {init} leaves of its base" if init in configs.REDONE else ""
    others = own_others(folder)
    return AdapterFile(path, "peft", updates, others, str(base), folder=folder, note=note)


def _update(name: str, module: Module, folder: Folder) -> Update:
    piece, batch = module.piece, module.shape[: module.letters.count("b")]
    root = piece.rank**0.5 if folder.config.get("use_rslora") else piece.rank
    layers = piece.a.shape[0] if batch else 1
    arrays = (piece.a, piece.b, piece.magnitude)
    return Update(
        name,
        "Linear" if module.kind == "Conv1D" else module.kind,
        piece.a.reshape(layers, -1, piece.rank),
        piece.b.reshape(layers, piece.rank, -1),
        float(piece.scale),
        float(piece.scale) * root,
        batch,
        piece.magnitude,
        sum(x.size for x in arrays if x is not None),
    )
