"""An adapter of PEFT's in the neutral form: its files tell all but what its base is like."""

from pathlib import Path

from lora_jax.cli._read.forms import AdapterFile, Update
from lora_jax.io.peft._axes import PARAMETER_ORDER, Part
from lora_jax.io.peft._config import REDONE
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._own import own_others, own_parts


def open_peft(path: Path, order: tuple[str, ...] = PARAMETER_ORDER) -> AdapterFile:
    """Read the adapter in a folder of PEFT's, without the model that it is for.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is damaged, or cannot be read exactly.
    """
    folder = Folder.open(path, order=order)
    rslora = bool(folder.config.get("use_rslora"))
    updates = {name: _update(name, part, rslora) for name, part in own_parts(folder).items()}
    base = folder.config.get("base_model_name_or_path") or "not recorded"
    init = folder.config["init_lora_weights"]
    note = f"on what {init} leaves of its base" if init in REDONE else ""
    others = own_others(folder)
    return AdapterFile(path, "peft", updates, others, str(base), folder=folder, note=note)


def _update(name: str, part: Part, rslora: bool) -> Update:
    rank, scale, batch = part.rank, float(part.scale), part.place.shape[: part.letters.count("b")]
    return Update(
        name,
        "Linear" if part.kind == "Conv1D" else part.kind,
        part.a.reshape(*batch or (1,), -1, rank),
        part.b.reshape(*batch or (1,), rank, -1),
        scale,
        scale * (rank**0.5 if rslora else rank),
        batch,
        part.magnitude,
        sum(x.size for x in (part.a, part.b, part.magnitude) if x is not None),
    )
