"""The places of our leaves in a model of PyTorch: the names of its modules, and their kinds.

A leaf is one tensor there, or one per layer if the layers are stacked, or one for each part.
"""

import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, get_args

import jax
import numpy as np

from lora_jax._weights.axes import check_layout, is_array
from lora_jax._weights.conventions import WRITES, conventional, is_table
from lora_jax._weights.paths import nearest
from lora_jax._weights.quantized import plain_array
from lora_jax._weights.ranges import split_range
from lora_jax._weights.selector import lookup
from lora_jax.io._kinds import Kind, to_torch
from lora_jax.io._places import EXPERT, LAYER, Place, Template, places_of
from lora_jax.io._record import to_host

Names: TypeAlias = Mapping[str, str | Sequence[str]] | Callable[[str], Any] | None

POSITIONS = re.compile("pos|type|wpe")  # in the names of tables that are not of tokens
TABLE = re.compile(r"(.*\.)?(shared|wte|embed_\w+|\w*embeddings?)")  # those that heads are tied to

_LEAVES = {
    **dict.fromkeys(("kernel", "embedding", "scale", "weight", "w"), "weight"),
    **dict.fromkeys(("bias", "b"), "bias"),
}


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
        known: Mapping[str, str] | None = None,
    ):
        """Find the places; ``known`` are the layouts of some leaves, which win."""
        self.leaves = {path: x for path, x in leaves.items() if is_array(x)}
        if not (names is None or callable(names) or isinstance(names, Mapping)):
            raise TypeError(f"names={names!r}: expected patterns to templates, or a function")
        self._names, self._kinds, self._layout = names, kinds or {}, layout or {}
        self._known = known or {}
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
        self._check_counts()

    def of(self, path: str) -> list[Place]:
        """Return the places of a leaf.

        Raises:
            ValueError: it has no name there.
        """
        if (places := self.places[path]) is None:
            module = module_path(path, self.leaves)[0]
            known = self._names.values() if isinstance(self._names, Mapping) else ()
            known = [x for names in known for x in ([names] if isinstance(names, str) else names)]
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
        return to_host({place.path: leaf})[place.path][place.at]

    def assembled(self, path: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """Make a leaf of its parts, by the names of their modules."""
        places = self.of(path)
        x = np.empty(self.leaves[path].shape, arrays[places[0].module].dtype)
        for place in places:
            x[place.at] = arrays[place.module].reshape(place.shape)
        return x

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

    def parameter(self, place: Place) -> str:
        """Name the parameter at a place: as ``names`` does, or the weight of its module."""
        is_weight = place.path == as_path(f"{place.module}.weight")
        return f"{place.module}.weight" if is_weight else place.module

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
        return self.within(path, self.layout(path))

    def layout(self, path: str) -> str:
        """Return the layout of a leaf."""
        letters = self._given(path)
        if letters is None:
            inner = conventional(path, self._parts[path], self._parts)
            axes, rest = self.of(path)[0].axes, iter(inner)
            ndim = len(self.leaves[path].shape)
            letters = "".join("b" if axis in axes else next(rest) for axis in range(ndim))
        return check_layout(letters, path, len(self.leaves[path].shape))

    def _given(self, path: str) -> str | None:
        """Return the layout of a leaf if it was given."""
        return self._known.get(path) or lookup(self._layout, path, "layout")

    @functools.cached_property
    def _parts(self) -> dict[str, Any]:
        """The leaves without the axes that are unstacked: conventions are for a single layer."""
        shapes = {path: found[0].shape if found else x.shape for path, x, found in self._found()}
        return {
            path: jax.ShapeDtypeStruct(shapes[path], x.dtype) for path, x in self.leaves.items()
        }

    def _found(self) -> Iterator[tuple[str, Any, list[Place] | None]]:
        return ((path, x, self.places[path]) for path, x in self.leaves.items())

    def within(self, path: str, letters: str) -> str:
        """Return the letters of a leaf's layout that are left when it is unstacked."""
        place, name = self.of(path)[0], self._template(path)
        numbered = place.axes[: sum(mark in str(name) for mark in (LAYER, EXPERT))]
        if any(letters[axis] != "b" for axis in numbered):
            raise ValueError(
                f"names: {name!r} numbers the axes {[*numbered]} of {path!r}, which has layout "
                f"{letters!r}: they must be batch axes, 'b'. If they are others, pass layout="
            )
        return place.within(letters)

    def _check_counts(self) -> None:
        """Raise if two leaves have other numbers of the same layers."""
        counts: dict[str, tuple[str, int]] = {}
        for path, _, found in self._found():
            template = self._template(path) if found else None
            if not isinstance(template, str) or LAYER not in template:
                continue
            stack, own = template.partition(LAYER)[0], 1 + max(p.index[0] for p in found or ())
            other, count = counts.setdefault(stack, (path, own))
            if count != own:
                raise ValueError(
                    f"names: {path!r} of shape {tuple(self.leaves[path].shape)} would have {own} "
                    f"layers of {stack!r}, and {other!r} has {count}. Give the axis of the layers "
                    f"by layout=, as 'b': layout={{{path!r}: 'ob'}} for a vector of each layer"
                )

    def kind(self, path: str, letters: str) -> Kind:
        """Return the kind of module that a leaf is in, given its letters within.

        Raises:
            ValueError: its layout leaves a doubt, or is none of that kind.
        """
        given = lookup(self._kinds, path, "kinds")
        if given is not None and given not in get_args(Kind):
            raise ValueError(f"kinds={{{path!r}: {given!r}}}: expected one of {get_args(Kind)}")
        kind: Any = given or self._usual_kind(path, letters)
        is_matrix = kind == "Parameter" and sorted(letters) == ["i", "o"]
        if not is_matrix and letters.count("b") != (kind == "Parameter"):
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

    def _template(self, path: str) -> Template | None:
        found = self.named(module_path(path, self.leaves)[0])
        if found is None:
            return None
        names = [found] if isinstance(found, str) else found
        names = names.values() if isinstance(names, Mapping) else names
        if not isinstance(names, Iterable) or not all(isinstance(x, str) for x in names):
            raise TypeError(f"names: {found!r} for {path!r}, expected a name, or a list of them")
        for name in names:
            if set("{}") & set(name.replace(LAYER, "").replace(EXPERT, "")):
                raise ValueError(
                    f"names: {name!r} for {path!r} has marks besides {LAYER} and {EXPERT}"
                )
        if isinstance(found, str):
            return as_name(found)
        if isinstance(found, Mapping):
            return {part: as_name(name) for part, name in found.items()}
        return [as_name(name) for name in found]

    def named(self, module: str) -> Any:
        """Name the module at a path as ``names`` does; None if it has no pattern.

        A list of names is for the entries of an axis, a mapping for ranges.
        """
        if self._names is None:
            return module
        if callable(self._names):
            return self._names(module)
        parts: dict[str, str] = {}
        for key, template in self._names.items():
            pattern, ranges = split_range(key)
            try:
                if not (match := re.fullmatch(pattern, module)):
                    continue
                is_one = isinstance(template, str)
                names = [match.expand(x) for x in ([template] if is_one else template)]
                if ranges is not None and is_one:
                    parts[ranges] = names[0]
                elif not parts:
                    return names[0] if is_one else names
            except (re.error, TypeError, IndexError) as error:
                raise ValueError(f"names={{{key!r}: {template!r}}}: {error}") from None
        return parts or None

    def _places(self, path: str) -> list[Place] | None:
        if (template := self._template(path)) is None:
            return None
        shape, suffix = tuple(self.leaves[path].shape), module_path(path, self.leaves)[1]
        letters = self._given(path)
        letters = letters if isinstance(letters, str) and len(letters) == len(shape) else None
        return [*places_of(path, shape, template, suffix, letters)]


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
