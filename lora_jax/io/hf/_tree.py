"""The tensors of a PyTorch model as a tree of ours: paths for names, letters for their axes.

Only this file knows what a tensor's name and shape do not tell: whether it is stored transposed,
whether it is another tensor as well, and whether its numbers are the weight.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from lora_jax._adapter.params import Adapter
from lora_jax._weights.layouts import Layouts, Weight
from lora_jax.io._fit import fitted
from lora_jax.io._kinds import Kind
from lora_jax.io._tensor import Tensor
from lora_jax.io._torch import Map, Names, as_name, as_path, module_path
from lora_jax.io.hf._experts import Piece, grouped, letters_of_square
from lora_jax.io.hf._families import CONV1D
from lora_jax.io.hf._quantized import check_plain
from lora_jax.io.hf._source import Source, UnknownModelError, no_config
from lora_jax.io.hf._ties import Ties
from lora_jax.io.hf._transposed import transposed
from lora_jax.io.peft._folder import Folder
from lora_jax.io.peft._own import forms_in, own_heads, own_others, own_parts
from lora_jax.io.peft._vocabulary import is_named_table

_Forms: TypeAlias = dict[str, tuple[str, Kind]]  # letters and kinds by path
_USES: dict[Kind, str] = {"Conv": "conv", "Embedding": "embedding", "Parameter": "ragged"}


@dataclass(frozen=True)
class TorchTree:
    """The leaves of a model that lies in files of PyTorch's, or of whose files something is known.

    Attributes:
        leaves: the tensors by path.
        layout: the layout of every tensor of two axes or more; and why others take no LoRA.
        kinds: the kinds that a layout does not tell, those of transposed layers, by pattern.
        names: the names of the tensors, by path.
        ties: the tensors that have several names. Those left out of the files are leaves, too, if
            there is an adapter: it may change one name alone.
        doubtful: the paths of dense layers that may be stored transposed or not.
        modules: the names of the modules in the adapter, by their paths; None if they are the same.
        pieces: the pieces of experts that the adapter names in another form than the files, by
            path.
    """

    leaves: Mapping[str, Any]
    layout: Layouts
    kinds: Mapping[str, Kind]
    names: Mapping[str, str] = field(default_factory=dict)
    ties: Ties = field(default_factory=Ties)
    doubtful: tuple[str, ...] = ()
    modules: Mapping[str, str] | None = None
    pieces: Mapping[str, Sequence[Piece]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        source: Source,
        adapter: Folder | None = None,
        names: Names = None,
        layout: Mapping[str, str] | None = None,
    ) -> "TorchTree":
        """Make the tree of a model.

        Args:
            source: the model.
            adapter: an adapter of it: its files tell which tensors are tables, and the axes of
                experts. Without one, tables are known by their names.
            names: the names of modules in the adapter, by their paths in the model; those that it
                does not name are the same, but for prefixes and what transformers renamed.
            layout: the axes of square experts, by pattern of their paths.

        Raises:
            ValueError: the model is quantized; nothing tells which axis of an adapted weight is
                read; or the adapter's modules may be several of the model's.
        """
        check_plain(source)
        ties = Ties.of(source)
        tensors, modules, pieces = dict(source.tensors), None, {}
        if adapter is not None:
            own = grouped(source, tensors | ties.missing(tensors), adapter)
            tensors, pieces = {**own.tensors}, {as_path(x): y for x, y in own.pieces.items()}
            modules = _fitted(tensors, adapter, source.where, names)
            tensors |= _new_heads(source, adapter, _own_names(tensors, modules).values())
            modules = _fitted(tensors, adapter, source.where, names)
        stored = {as_path(name): name for name in tensors}
        leaves = {path: tensors[name] for path, name in stored.items()}
        matrices = [path for path, x in leaves.items() if len(x.shape) == 2]
        turned = transposed(leaves, source.config, adapter, modules)
        forms: _Forms = {path: ("io", "Conv1D") for path, known in turned.items() if known}
        if adapter is not None and modules is not None:
            lone = lambda path: letters_of_square(source, adapter, is_grouped=path in pieces)  # noqa: E731
            forms |= forms_in(adapter, leaves, modules, layout or {}, lone)
        else:
            forms |= {path: ("io", "Embedding") for path in matrices if is_named_table(path)}
        doubtful = tuple(p for p, known in turned.items() if known is None and p not in forms)
        stored = {path: name for path, name in stored.items() if path not in pieces}
        more = {"names": stored, "ties": ties, "doubtful": doubtful, "pieces": pieces}
        tree = _tree(leaves, forms, modules=modules, **more)
        if adapter is not None and modules is not None:
            adapted = [path for path, name in modules.items() if name in adapter.modules]
            tree.check_axes(source, (f"{path}/weight" for path in adapted))
        return tree

    @classmethod
    def own(cls, adapter: Folder) -> "TorchTree":
        """Make the tree of the leaves that an adapter's files tell of, without what is in them."""
        parts = own_parts(adapter).values()
        shapes = {part.place.path: part.place.shape for part in parts}
        shapes |= {as_path(name): x.shape for name, x in own_others(adapter).items()}
        dtype = jnp.dtype("float32")
        leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
        forms: _Forms = {part.place.path: (part.letters, part.kind) for part in parts}
        return _tree(leaves, forms)

    @classmethod
    def known(cls, leaves: Mapping[str, Any], adapter: Adapter) -> "TorchTree":
        """Make a tree of leaves in PyTorch's names and axes, which an adapter of ours tells."""
        letters = {path: f.layout for path, f in adapter.factors.items()}
        forms: _Forms = {path: (own, _kind_of(path, own)) for path, own in letters.items()}
        return _tree(leaves, forms)

    def named(self, module: str) -> str:
        """Return the adapter's name of a module of the files."""
        return (self.modules or {}).get(as_path(module), module)

    def own_names(self) -> dict[str, str]:
        """Return the adapter's names of the tensors, by theirs in the files."""
        return _own_names(self.names.values(), self.modules or {})

    def check_axes(self, source: Source, paths: Iterable[str]) -> None:
        """Raise if nothing tells whether one of these weights is stored transposed.

        Raises:
            UnknownModelError: nothing does.
        """
        path = min(set(paths) & set(self.doubtful), default=None)
        if path is None:
            return
        if source.config is None:
            raise no_config(source.where, f"{path!r} is")
        raise UnknownModelError(
            f"{source.where}: {as_name(path)!r} is square, and the adapter's fan_in_fan_out is "
            "true: whether it is stored transposed is not known. If it is not, set fan_in_fan_out "
            "to false in adapter_config.json; if it is, load the adapter into parameters by "
            "peft.load with kinds={...: 'Conv1D'}, and write them by hf.save with the same kinds"
        )

    def stored(self, path: str) -> Sequence[Piece]:
        """Return where a leaf is in the files."""
        return self.pieces.get(path) or (Piece(self.names[path]),)

    def options(self, kinds: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the kinds and the layout, as loading and saving take them; those given win."""
        return {"kinds": {**(kinds or {}), **self.kinds}, "layout": self.layout}

    def places(self, names: Names = None, kinds: Mapping[str, str] | None = None) -> Map:
        """Return the places of the leaves."""
        named = names if self.modules is None else self.modules.__getitem__
        return Map(self.leaves, named, **self.options(kinds))


def _modules(names: Collection[str]) -> dict[str, str]:
    """Return the paths of the modules of tensors."""
    paths = {as_path(name): name for name in names}
    return {name: module_path(path, paths)[0] for path, name in paths.items()}


def _own_names(names: Collection[str], modules: Mapping[str, str]) -> dict[str, str]:
    """Return an adapter's names of tensors, by its names of the modules."""
    own = _modules(names).items()
    return {name: modules.get(m, as_name(m)) + name[len(m) :] for name, m in own}


def _new_heads(source: Source, adapter: Folder, known: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of a head that an adapter brings, in the model's dtype."""
    floats = [x.dtype for x in source.tensors.values() if jnp.issubdtype(x.dtype, jnp.floating)]
    return {
        name: Tensor(x.shape, floats[0], lambda x=x: x.astype(floats[0]))
        for name, x in own_heads(adapter, known).items()
    }


def is_torch(adapter: Adapter) -> bool:
    """Return whether an adapter is of weights as PyTorch keeps them.

    Those are ``weight``, ``[out, in]``, but for tables and for transposed layers by their names.
    """
    return any(
        path.endswith("/weight")
        and (
            re.fullmatch("oi{1,4}", f.layout)
            or (f.layout == "io" and (is_named_table(path) or re.fullmatch(CONV1D, path)))
        )
        for path, f in adapter.factors.items()
    )


def _fitted(tensors: Collection[str], adapter: Folder, where: str, names: Names) -> dict[str, str]:
    """Name the modules of a model as an adapter does, by their paths."""
    own = {as_name(m): m for m in _modules(tensors).values()}
    found = fitted(adapter.named, own, where, names)
    return {own[name]: new for name, new in found.items()}


def _tree(leaves: Mapping[str, Any], forms: _Forms, **more: Any) -> TorchTree:
    weights, kinds = {}, {}
    for path, leaf in leaves.items():
        letters, kind = forms.get(path) or _usual(leaf)
        shape, use = tuple(leaf.shape), _USES.get(kind, "dot")
        weights[path] = Weight(shape, leaf.dtype, letters, use, (), _why_not(path, leaf))
        if kind == "Conv1D" or (kind == "Parameter" and len(shape) == 2):
            kinds[re.escape(path)] = kind
    return TorchTree(leaves, Layouts(weights), kinds, **more)


def _usual(leaf: Any) -> tuple[str | None, Kind]:
    """Return the letters and the kind of a tensor that nothing is known of."""
    ndim = len(leaf.shape)
    return "o" + "i" * (ndim - 1) if ndim > 1 else None, "Conv" if ndim > 2 else "Linear"


def _kind_of(path: str, letters: str) -> Kind:
    """Return the kind of a module by its layout; of tables and transposed layers, by the name."""
    if "b" in letters or (len(letters) == 2 and not path.endswith("/weight")):
        return "Parameter"
    if letters == "io" and path.endswith("/weight"):
        return "Conv1D" if re.fullmatch(CONV1D, path) else "Embedding"
    return "Conv" if letters.startswith("oii") else "Linear"


def _why_not(path: str, leaf: Any) -> str | None:
    """Return why a tensor takes no LoRA: it is no weight, or its numbers are not."""
    if not path.endswith("/weight"):
        return "no weight of a module by its name"
    if len(leaf.shape) < 2:
        return f"{len(leaf.shape)}-D"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"dtype {leaf.dtype}"
    return "empty" if 0 in leaf.shape else None
