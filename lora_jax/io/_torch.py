"""The places of our leaves in a model of PyTorch: the names of its modules, and their axes.

A leaf is one tensor there, or one per layer if the layers are stacked in front. Modules do not
keep their weights as Flax does; each kind has axes of its own::

    Linear     [out, in]            Conv        [out, in, *window]
    Conv1D     [in, out]            Embedding   [rows, out]
    Parameter  [experts, ...], a parameter of a module rather than the weight of one
"""

import functools
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias, get_args

import jax
import numpy as np

from lora_jax._weights.axes import check_layout, is_array, role_axes, role_shape
from lora_jax._weights.conventions import WRITES, conventional, is_table
from lora_jax._weights.paths import nearest
from lora_jax._weights.quantized import plain_array
from lora_jax._weights.selector import lookup
from lora_jax.io._record import to_host

Kind = Literal["Linear", "Conv1D", "Conv", "Embedding", "Parameter"]
Names: TypeAlias = Mapping[str, str] | Callable[[str], str] | None
LAYER, EXPERT = "{layer}", "{expert}"

POSITIONS = re.compile("pos|type|wpe")  # in the names of tables that are not of tokens
TABLE = re.compile(r"(.*\.)?(shared|wte|embed_\w+|\w*embeddings?)")  # those that heads are tied to

_LEAVES = {
    **dict.fromkeys(("kernel", "embedding", "scale", "weight", "w"), "weight"),
    **dict.fromkeys(("bias", "b"), "bias"),
}


@dataclass(frozen=True)
class Place:
    """One tensor of the other model, and the part of our leaf that it is.

    Attributes:
        path: the path of our leaf.
        index: the index of that part, along the leaf's first axes.
        module: the name of the module there; for a Parameter, that of the parameter.
        suffix: ``"weight"`` or ``"bias"``.
        shape: the shape of the part.
    """

    path: str
    index: tuple[int, ...]
    module: str
    suffix: str
    shape: tuple[int, ...]


class Map:
    """The places of all leaves of a tree.

    Attributes:
        leaves: the arrays of the tree, by path.
        places: the places of each leaf, by path; None if it has no name there.
    """

    def __init__(
        self,
        leaves: Mapping[str, Any],
        names: Names = None,
        kinds: Mapping[str, str] | None = None,
        layout: Mapping[str, str] | None = None,
    ):
        self.leaves = {path: x for path, x in leaves.items() if is_array(x)}
        if not (names is None or callable(names) or isinstance(names, Mapping)):
            raise TypeError(f"names={names!r}: expected patterns to templates, or a function")
        self._names, self._kinds, self._layout = names, kinds or {}, layout or {}
        self.places = {path: self._places(path) for path in self.leaves}
        self._by_name: dict[tuple[str, str], Place] = {}
        for found in self.places.values():
            for place in found or ():
                key = place.module, place.suffix
                if key in self._by_name:
                    raise ValueError(
                        f"names: {self._by_name[key].path!r} and {place.path!r} would both be "
                        f"{'.'.join(key)!r}: give them different names"
                    )
                self._by_name[key] = place

    def of(self, path: str) -> list[Place]:
        """Return the places of a leaf.

        Raises:
            ValueError: it has no name there.
        """
        if (places := self.places[path]) is None:
            module = module_path(path, self.leaves)[0]
            known = self._names.values() if isinstance(self._names, Mapping) else ()
            raise ValueError(
                f"names has no pattern for {module!r}: add one, such as "
                f"{{{module!r}: 'the.name.of.its.module'}}. Nearest names: "
                f"{nearest(as_name(module), dict.fromkeys(known))}"
            )
        return places

    def find(self, module: str, suffix: str = "weight") -> Place | None:
        """Find the place of this name."""
        return self._by_name.get((module, suffix))

    def modules(self) -> list[str]:
        """List the names of all modules that have a weight."""
        return [module for module, suffix in self._by_name if suffix == "weight"]

    def nearest(self, module: str) -> str:
        """List the names that are most like one that is not there."""
        return nearest(module, self.modules())

    def array(self, place: Place, leaves: Mapping[str, Any] | None = None) -> np.ndarray:
        """Read the part of a leaf that is at a place, onto the host, and dequantized."""
        leaf = plain_array((leaves or self.leaves)[place.path])
        return to_host({place.path: leaf})[place.path][place.index]

    def tensor(self, place: Place, leaves: Mapping[str, Any] | None = None) -> np.ndarray:
        """Read the same part in the axes of its module, in float32."""
        x = self.array(place, leaves).astype(np.float32)
        letters, kind = self.form(place)
        return to_torch(x, letters, kind)

    def form(self, place: Place) -> tuple[str, Kind]:
        """Return the letters and the kind of the module at a place; a vector has no letters."""
        if place.suffix == "bias" or len(place.shape) < 2:
            return "", "Linear"
        letters = self.letters(place.path)
        return letters, self.kind(place.path, letters)

    def is_module(self, path: str) -> bool:
        """Return whether a leaf is the weight or bias of a module, by its name or by ``kinds``."""
        own = module_path(path, self.leaves)[0] != path
        return own or lookup(self._kinds, path, "kinds") not in (None, "Parameter")

    def is_tied(self, path: str, has_head: bool | None) -> bool:
        """Return whether a table is, or may be, an output head as well.

        The layout tells by the table's uses. If it knows none, the table may be the head unless
        there is another matrix with an axis of that size. ``has_head`` is whether the model has a
        head for tokens; None: not known, so that a table counts if it has one of the usual names.
        """
        known = getattr(self._layout, "weights", {}).get(path)
        if known is not None:
            uses = known.uses if known.kind == "embedding" else ()
            return any(use.startswith("dot_general") for use in uses)
        shape = self.leaves[path].shape
        if has_head is False or len(shape) != 2 or not self.is_table(path):
            return False
        module = self.of(path)[0].module
        if POSITIONS.search(module.lower()) or not (has_head or TABLE.fullmatch(module)):
            return False
        count = shape[self.letters(path).index("i")]
        others = (x.shape for other, x in self.leaves.items() if not self.is_table(other))
        return not any(count in shape and len(shape) > 1 for shape in others)

    def is_table(self, path: str) -> bool:
        """Return whether a leaf is a lookup table: by ``kinds``, by its use, or by its name."""
        given = lookup(self._kinds, path, "kinds")
        return given == "Embedding" or (given is None and is_table(path, self._layout))

    @property
    def all_named(self) -> bool:
        """Return whether every leaf has a name there."""
        return None not in self.places.values()

    def all_modules(self) -> list[str]:
        """List the names of all modules."""
        found = (place.module for places in self.places.values() for place in places or ())
        return list(dict.fromkeys(found))

    def letters(self, path: str) -> str:
        """Return the layout of a leaf without the axes that are unstacked."""
        letters = lookup(self._layout, path, "layout")
        if letters is None:
            within = conventional(path, self._parts[path], self._parts)
            letters = "b" * len(self.of(path)[0].index) + within
        check_layout(letters, path, len(self.leaves[path].shape))
        return self.within(path, letters)

    @functools.cached_property
    def _parts(self) -> dict[str, Any]:
        """The leaves without the axes that are unstacked: conventions are for a single layer."""
        outer = {path: len(found[0].index) if found else 0 for path, found in self.places.items()}
        return {
            path: jax.ShapeDtypeStruct(x.shape[outer[path] :], x.dtype)
            for path, x in self.leaves.items()
        }

    def within(self, path: str, letters: str) -> str:
        """Return the letters of a leaf's layout that are left when it is unstacked."""
        outer = len(self.of(path)[0].index)
        if letters[:outer] != "b" * outer:
            raise ValueError(
                f"names: {self._template(path)!r} numbers {outer} axes of {path!r} in front, which "
                f"has layout {letters!r}: they must be batch axes, 'b'"
            )
        return letters[outer:]

    def kind(self, path: str, letters: str) -> Kind:
        """Return the kind of module that a leaf is in, given its letters within.

        Raises:
            ValueError: its layout leaves a doubt, or is none of that kind.
        """
        given = lookup(self._kinds, path, "kinds")
        if given is not None and given not in get_args(Kind):
            raise ValueError(f"kinds={{{path!r}: {given!r}}}: expected one of {get_args(Kind)}")
        kind: Any = given or self._usual_kind(path, letters)
        if letters.count("b") != (kind == "Parameter"):
            raise ValueError(
                f"{path!r} has batch axes (layout {letters!r}) and is a {kind}: give in names "
                f"where the number of the layer goes, {LAYER!r}, or of the expert, {EXPERT!r}; or "
                f"that it is one tensor there: kinds={{{path!r}: 'Parameter'}}"
            )
        return kind

    def _usual_kind(self, path: str, letters: str) -> str:
        known = getattr(self._layout, "weights", {}).get(path)
        if "b" in letters:
            return "Parameter"
        if is_table(path, self._layout):
            return "Embedding"
        if known is not None:
            return "Conv" if known.kind == "conv" else "Linear"
        inputs = letters.count("i")
        if inputs == 1 or (inputs == 2 and WRITES & set(path.split("/"))):
            return "Linear"
        if inputs > 2:
            return "Conv"
        raise ValueError(
            f"{path!r} has layout {letters!r}: is it a convolution or a dense kernel of two input "
            f"axes? Say kinds={{{path!r}: 'Conv'}} or 'Linear'"
        )

    def _template(self, path: str) -> str | None:
        name = self.named(module_path(path, self.leaves)[0])
        if name is None:
            return None
        if not isinstance(name, str):
            raise TypeError(f"names: {name!r} for {path!r}, expected a name")
        name = as_name(name)
        if set("{}") & set(name.replace(LAYER, "").replace(EXPERT, "")):
            raise ValueError(f"names: {name!r} for {path!r} has marks besides {LAYER} and {EXPERT}")
        return name

    def named(self, module: str) -> Any:
        """Name the module at a path as ``names`` does; None if it has no pattern."""
        if self._names is None:
            return module
        if callable(self._names):
            return self._names(module)
        for pattern, template in self._names.items():
            try:
                if match := re.fullmatch(pattern, module):
                    return match.expand(template)
            except (re.error, TypeError, IndexError) as error:
                raise ValueError(f"names={{{pattern!r}: {template!r}}}: {error}") from None
        return None

    def _places(self, path: str) -> list[Place] | None:
        template, suffix = self._template(path), module_path(path, self.leaves)[1]
        if template is None:
            return None
        shape = tuple(self.leaves[path].shape)
        outer = [mark for mark in (LAYER, EXPERT) if mark in template]
        if len(shape) < len(outer):
            raise ValueError(f"names: {template!r} numbers axes that {path!r}, {shape}, has not")
        places = []
        for index in np.ndindex(shape[: len(outer)]):
            name = template
            for mark, k in zip(outer, index, strict=True):
                name = name.replace(mark, str(k))
            places.append(Place(path, tuple(index), name, suffix, shape[len(outer) :]))
        return places


def as_path(name: str) -> str:
    """Turn the name of a tensor into a path: ``h.0.mlp.c_fc.weight``, ``h/0/mlp/c_fc/weight``."""
    return name.replace(".", "/")


def as_name(path: str) -> str:
    """Turn a path into a name: the reverse of :func:`as_path`."""
    return path.replace("/", ".")


def module_path(path: str, leaves: Container[str] = ()) -> tuple[str, str]:
    """Split a leaf's path into that of its module, and ``"weight"`` or ``"bias"``.

    >>> module_path("layers_0/attn/query/kernel"), module_path("layers/0/wq")
    (('layers_0/attn/query', 'weight'), ('layers/0/wq', 'weight'))
    """
    module, _, leaf = path.rpartition("/")
    own = _LEAVES.get(leaf, leaf)
    if (leaf == "scale" and f"{module}/kernel" in leaves) or (
        leaf != own and f"{module}/{own}" in leaves
    ):
        return path, "weight"  # a parameter of its own beside the weight or the bias
    return (module, _LEAVES[leaf]) if module and leaf in _LEAVES else (path, "weight")


def to_torch(x: np.ndarray, letters: str, kind: Kind) -> np.ndarray:
    """Put a weight into the axes of its module; a vector stays one."""
    if not letters:
        return x.reshape(-1)
    if kind == "Conv":
        return x.transpose([letters.index("o"), *channels_first(letters)])
    sizes = [prod(role_shape(letters, x.shape, role)) for role in "io"]
    matrix = x.transpose(_inputs_first(letters)).reshape(sizes)  # [in, out]
    return matrix.T if kind == "Linear" else matrix


def from_torch(x: np.ndarray, shape: tuple[int, ...], letters: str, kind: Kind) -> np.ndarray:
    """Put a weight of a module into our axes, which have this shape: undo :func:`to_torch`."""
    if not letters:
        return x.reshape(shape)
    if kind == "Conv":
        order = [letters.index("o"), *channels_first(letters)]
    else:
        order = _inputs_first(letters)
        x = x.T if kind == "Linear" else x
    return x.reshape([shape[k] for k in order]).transpose(np.argsort(order))


def torch_shape(shape: tuple[int, ...], letters: str, kind: Kind) -> tuple[int, ...]:
    """Return the shape of a weight of ours in the axes of its module."""
    return to_torch(np.broadcast_to(np.zeros(()), shape), letters, kind).shape


def _inputs_first(letters: str) -> list[int]:
    return [*role_axes(letters, "i"), *role_axes(letters, "o")]


def channels_first(letters: str) -> list[int]:
    """Order the input axes, channels before the window: Flax has them last, PyTorch first."""
    inputs = list(role_axes(letters, "i"))
    return inputs if letters[0] == "o" else [inputs[-1], *inputs[:-1]]
