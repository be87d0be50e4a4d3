"""The size of the vocabulary that an adapter was trained with, against that of the model."""

import re

from lora_jax._weights.conventions import is_embedding, is_head
from lora_jax.io._kinds import torch_shape
from lora_jax.io._places import Place
from lora_jax.io._torch import POSITIONS, Map, as_path, module_path
from lora_jax.io.peft._axes import EMBEDDING, LINEAR
from lora_jax.io.peft._folder import Folder

UNLOADED = (
    "PeftModel.from_pretrained(model, adapter).unload().save_pretrained(folder) writes the base "
    "that the adapter fits"
)
_SIZED = re.compile(
    rf"(.+?)\.((?:token_adapter\.)?base_layer\.weight|weight|{EMBEDDING[0]}|{LINEAR[1]})"
)


def tokens_of(places: Map, place: Place) -> int | None:
    """Return the size of the vocabulary of a table, or of a head beside one; of others, None.

    PyTorch has the tokens in front in both.
    """
    if place.suffix != "weight" or len(place.shape) != 2:
        return None
    size = torch_shape(place.shape, *places.form(place))[0]
    found = filter(None, (places.find(module) for module in places.modules()))
    tables = [x for x in found if len(x.shape) == 2 and _is_vocabulary(places, x)]
    sizes = {torch_shape(x.shape, *places.form(x))[0] for x in tables}
    return size if place in tables or size in sizes else None


def _is_vocabulary(places: Map, place: Place) -> bool:
    """Return whether a weight is a table of tokens, by its use or its name."""
    path = as_path(f"{place.module}.weight")
    if POSITIONS.search(path):
        return False
    return places.is_table(place.path) or is_named_table(path)


def check_vocabulary(folder: Folder, places: Map) -> None:
    """Raise if a table or a head of an adapter has another number of tokens than it has here."""
    for name, x in folder.tensors.items():
        match = _SIZED.fullmatch(name)
        place = places.find(match[1]) if match else None
        if match is None or place is None or x.ndim != 2:
            continue
        own, theirs = tokens_of(places, place), x.shape[match[2] == EMBEDDING[0]]
        if own is not None and theirs != own:
            other = {*place.shape} - {own} or {own}
            is_factor = match[2] in (EMBEDDING[0], LINEAR[1])
            if is_factor or x.shape[1] in other:
                raise resized(folder, name, theirs, own)


def resized(folder: Folder, name: str, theirs: int, own: int) -> ValueError:
    """Make the error for a tensor of a larger or smaller vocabulary."""
    return folder.error(
        f"{name!r} is of a vocabulary of {theirs} tokens, and here it has {own}: the model was "
        "resized before it was trained. Resize this one: in transformers, "
        f"model.resize_token_embeddings({theirs}); then {UNLOADED}"
    )


def is_named_table(path: str) -> bool:
    """Return whether a weight is a lookup table by its name."""
    parts = [part for part in module_path(path)[0].split("/") if not part.isdecimal()]
    last = parts[-1].lower() if parts else ""
    if is_head(last) or last.endswith(("_proj", "_projection", "_dense", "_linear")):
        return False
    return is_embedding(f"{last}/weight") or last == "shared" or last.startswith("embed_")
