"""Group the experts of a model's files as an adapter names them.

Files keep experts apart, transformers 5 trains those of a layer as one parameter, and some files
have that::

    experts.0.gate_proj.weight   [out, in]      experts.gate_up_proj   [experts, 2 out, in]
    experts.0.up_proj.weight     [out, in]
    experts.0.down_proj.weight   [in, out]      experts.down_proj      [experts, in, out]

Mixtral calls them ``w1``, ``w3`` and ``w2``. An update of one form is an update of the other: a
range of its rows belongs to each part.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax

from lora_jax.io.hf._source import Source
from lora_jax.io.peft._axes import Part
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._parameters import takes_axes_in_order

_APART = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)(?:\.weight)?")
_TOGETHER = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}

# The models whose modules keep [experts, out, in], or which PEFT takes for such in any version of
# transformers: Llama 4's experts are [experts, in, out] and do not tell.
_IN_LAST = frozenset(
    "deepseek_v2 deepseek_v3 dots1 ernie4_5_moe flex_olmo gemma4 gemma4_text glm4_moe glm4v_moe "
    "granitemoe granitemoehybrid granitemoeshared hunyuan_v1_moe jamba jetmoe lfm2_moe llama4 "
    "llama4_text longcat_flash minimax mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe "
    "qwen3_5_moe_text qwen3_moe qwen3_next solar_open".split()
)
# The models whose modules are [experts, in, out] and tell it since transformers 5.
_TOLD_SINCE_5 = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})


@dataclass(frozen=True)
class Piece:
    """A piece of a tensor as the adapter has it, and where it is in the files.

    Attributes:
        name: the name of the tensor in the files.
        own: the index of the piece in the adapter's tensor: an expert and a range, or all.
        index: the index of the piece in the tensor of the files.
        is_turned: whether its axes are in the other order there.
    """

    name: str
    own: tuple[Any, ...] = ()
    index: tuple[Any, ...] = ()
    is_turned: bool = False

    def cut(self, part: Part) -> Part:
        """Return the factors of the piece."""
        if self.own:
            expert, rows = self.own
            a, b = part.a[expert], part.b[expert]
            first, letters = part.letters[1], part.letters[1:]
            a, b = (a[rows], b) if first == "i" else (a, b[:, rows])
            part = replace(part, a=a, b=b, letters=letters, kind="Linear")
        return replace(part, letters=part.letters[::-1]) if self.is_turned else part


@dataclass(frozen=True)
class Grouped:
    """Tensors as an adapter names them.

    Attributes:
        tensors: all of them, by name.
        pieces: the pieces of those that the files have in another form, by name.
    """

    tensors: Mapping[str, Any]
    pieces: Mapping[str, tuple[Piece, ...]]


def grouped(source: Source, tensors: Mapping[str, Any], adapter: Folder) -> Grouped:
    """Group the experts of a model as an adapter does.

    Raises:
        ValueError: the adapter's form has no exact counterpart.
    """
    targets = adapter.config.get("target_parameters") or []
    wanted = {name for name in (t.rpartition(".")[2] for t in targets) if name in _TOGETHER}
    apart = [match for name in tensors if name.endswith(".weight") and (match := _matched(name))]
    if wanted and apart and not _has_parameters(tensors, wanted):
        return _together(source, tensors, apart)
    named = [match for name in adapter.named if (match := _matched(name))]
    if named and not apart and _has_parameters(tensors, _TOGETHER):
        return _taken_apart(source, tensors, {match[3] for match in named})
    return Grouped(tensors, {})


def _matched(name: str) -> re.Match[str] | None:
    return _APART.fullmatch(name)


def _has_parameters(tensors: Iterable[str], names: Collection[str]) -> bool:
    parts = (name.split(".")[-2:] for name in tensors)
    return any(last in names and module == "experts" for module, last in filter(_is_pair, parts))


def _is_pair(parts: list[str]) -> bool:
    return len(parts) == 2


def _together(
    source: Source, tensors: Mapping[str, Any], apart: Iterable[re.Match[str]]
) -> Grouped:
    """Make one tensor of the experts of a layer."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for match in apart:
        found.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = match[0]
    new: dict[str, Any] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for module, layers in found.items():
        for name, choices in _TOGETHER.items():
            inner = next((x for x in choices if set(x) <= layers.keys()), None)
            if inner is None or (name == "up_proj" and f"{module}.gate_up_proj" in new):
                continue
            own, shape = _stacked([layers[x] for x in inner], tensors, f"{module}.{name}", source)
            new[f"{module}.{name}"] = jax.ShapeDtypeStruct(shape, tensors[own[0].name].dtype)
            pieces[f"{module}.{name}"] = tuple(own)
    gone = {piece.name for own in pieces.values() for piece in own}
    return Grouped({name: x for name, x in tensors.items() if name not in gone} | new, pieces)


def _stacked(
    layers: list[dict[int, str]], tensors: Mapping[str, Any], name: str, source: Source
) -> tuple[list[Piece], tuple[int, ...]]:
    """Stack experts, and put their parts below each other: the pieces, and the shape of all."""
    numbers, pieces, start, width = sorted(layers[0]), [], 0, 0
    for named in layers:
        shapes = {tuple(tensors[x].shape) for x in named.values()}
        if sorted(named) != numbers or numbers != list(range(len(numbers))) or len(shapes) > 1:
            raise ValueError(
                f"{source.where}: the adapter has {name!r} as one parameter, and the experts "
                f"{sorted(named)} in the files, of shapes {sorted(shapes)}, are not all there or "
                "not alike: it is another model's"
            )
        ((rows, width),) = shapes
        pieces += [Piece(named[k], (k, slice(start, start + rows))) for k in numbers]
        start += rows
    return pieces, (len(numbers), start, width)


def _taken_apart(source: Source, tensors: Mapping[str, Any], names: Collection[str]) -> Grouped:
    """Make a tensor of each expert's part of a parameter."""
    new: dict[str, Any] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    gone = set()
    for full, x in tensors.items():
        module, _, name = full.rpartition(".")
        choices = _TOGETHER.get(name, ())
        inner = next((parts for parts in choices if {*names} & {*parts}), None)
        if inner is None or len(x.shape) != 3:
            continue
        is_turned = _is_turned(source, tensors, module, full)
        count, rows, width = x.shape if not is_turned else (x.shape[0], *x.shape[:0:-1])
        size = rows // len(inner)
        for k in range(count):
            for j, part in enumerate(inner):
                own = slice(j * size, (j + 1) * size)
                index = (k, slice(None), own) if is_turned else (k, own)
                new[f"{module}.{k}.{part}.weight"] = jax.ShapeDtypeStruct((size, width), x.dtype)
                piece = Piece(full, index=index, is_turned=is_turned)
                pieces[f"{module}.{k}.{part}.weight"] = (piece,)
        gone.add(full)
    return Grouped({name: x for name, x in tensors.items() if name not in gone} | new, pieces)


def _is_turned(source: Source, tensors: Mapping[str, Any], module: str, name: str) -> bool:
    """Return whether the parameters of experts are stored ``[experts, in, out]``.

    Raises:
        ValueError: their shapes do not tell, or gate and up alternate in them, as gpt-oss's do.
    """
    both = [tensors.get(f"{module}.{x}") for x in ("gate_up_proj", "down_proj")]
    are_stacks = all(x is not None and len(x.shape) == 3 for x in both)
    if are_stacks and f"{module}.gate_up_proj_bias" not in tensors:
        (_, *first), (_, outputs, inputs) = (x.shape for x in both if x is not None)
        if first == [2 * inputs, outputs]:
            return False
        if first == [inputs, 2 * outputs]:
            return True
    raise ValueError(
        f"{source.where}: the adapter has factors for the parts of single experts, and {name!r} "
        "has those of all: where each is in it is not known, or gate and up alternate, as in "
        "gpt-oss. Merge the adapter in PEFT: model.merge_and_unload()"
    )


def letters_of_square(source: Source, adapter: Folder, *, is_grouped: bool) -> str | None:
    """Return the axes of square experts, ``lora_A``'s as the input; None if nothing tells."""
    if adapter.letters is not None:
        return adapter.letters
    kind = str((source.config or {}).get("model_type"))
    if is_grouped or kind in _IN_LAST:
        return "bio" if takes_axes_in_order(adapter) else "boi"
    return "bio" if kind in _TOLD_SINCE_5 and takes_axes_in_order(adapter) else None
