"""Name the leaves of a parameter tree: ``layers_0/attn/query/kernel``.

Every container that JAX can flatten has paths: dicts, FrozenDicts, lists, dataclasses,
``nnx.State``. A box around one array (``nn.Partitioned``, ``nnx.Variable``) adds nothing to
the path.
"""

import difflib
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from lora_jax._weights.axes import is_array
from lora_jax._weights.quantized import is_quantized

PyTree: TypeAlias = Any
RANDOM = ("a PRNG key", "the counter of a PRNG key")  # what not_parameters calls those
_COLLECTIONS = frozenset("batch_stats cache intermediates perturbations".split())


def is_box(x: Any) -> bool:
    """Return whether ``x`` is Flax metadata around an array, not an array or a container."""
    return is_flax(x, "core.meta", "AxisMetadata") or is_flax(x, "nnx", "Variable")


def is_flax(x: Any, module: str, name: str) -> bool:
    """Return whether ``x`` is of a Flax type; before Flax is imported nothing can be."""
    flax = sys.modules.get(f"flax.{module}")
    return flax is not None and isinstance(x, getattr(flax, name))


def _name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
    return str(key)


def flatten(tree: PyTree) -> tuple[dict[str, Any], Any]:
    """Flatten a tree into ``{path: leaf}``, in JAX's leaf order, and its treedef.

    A quantized array is one leaf.

    A top-level ``"params"`` collection, as in ``{"params": ..., "batch_stats": ...}``, is not
    part of the paths of its leaves, so that paths are the same with and without it.

    Raises:
        ValueError: two leaves would spell the same path, as in ``{"a/b": x, "a": {"b": y}}``.
    """
    paths: dict[str, Any] = {}
    for path, leaf, outer, _ in _named(tree):
        if path in paths:
            raise ValueError(
                f"params: two leaves spell the same path {path!r}: at "
                f"{jax.tree_util.keystr(outer)} and at another place before it. Adapter "
                "entries are keyed by path, so paths must be unique: rename one of the keys."
            )
        paths[path] = leaf
    return paths, jax.tree.structure(tree, is_leaf=is_quantized)


def is_wrapped(tree: PyTree) -> bool:
    """Return whether a tree has a top-level ``"params"`` collection."""
    return isinstance(tree, Mapping) and "params" in tree


def _named(tree: PyTree) -> Iterator[tuple[str, Any, tuple[Any, ...], Any]]:
    """List the leaves: the path of each, the leaf, its keys, and its box or the leaf again."""
    wrapped = is_wrapped(tree)
    is_node = lambda x: is_box(x) or is_quantized(x)  # noqa: E731
    for outer, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)[0]:
        inner = jax.tree_util.tree_flatten_with_path(node)[0] if is_box(node) else [((), node)]
        for keys, leaf in inner:
            names = [_name(k) for k in (outer if len(inner) == 1 else (*outer, *keys))]
            path = "/".join(names[1:] if wrapped and names[0] == "params" else names)
            yield path, leaf, outer, node


def not_parameters(tree: PyTree) -> dict[str, str]:
    """Find the leaves that are no parameters, and describe each: ``{path: description}``.

    A variable of NNX is a parameter if it is an ``nnx.Param``, a variable of Linen if it is in the
    collection ``params``. PRNG keys and their counters are no parameters. Other leaves are.
    """
    named = list(_named(tree))
    found = {}
    keys = {path: [_name(key) for key in outer] for path, _, outer, _ in named}
    beside = {tuple(names[: names.index("params")]) for names in keys.values() if "params" in names}
    for path, _, _, node in named:
        names = keys[path]
        if is_flax(node, "nnx", "Variable"):
            if not is_flax(node, "nnx", "Param"):
                found[path] = f"{_type_name(node)}, not nnx.Param"
            continue
        # Beside "params" at the top, all are collections; in a tree, those of the usual names.
        known = [x for k, x in enumerate(names) if x in _COLLECTIONS and tuple(names[:k]) in beside]
        known += names[:1] if is_wrapped(tree) and names[0] != "params" else []
        if known:
            found[path] = f"in the collection {known[0]!r}, not in 'params'"
    return found | random_in({path: str(getattr(x, "dtype", "")) for path, x, *_ in named})


def random_in(dtypes: Mapping[str, str]) -> dict[str, str]:
    """Find PRNG keys by their dtypes, and the counters that NNX keeps beside them."""
    found = {path: RANDOM[0] for path, dtype in dtypes.items() if dtype.startswith("key<")}
    counters = {
        f"{path.removesuffix('key')}count" for path in found if path.split("/")[-1] == "key"
    }
    return found | {path: RANDOM[1] for path in counters if path in dtypes}


def _type_name(variable: Any) -> str:
    kind = type(variable)
    return f"nnx.{kind.__name__}" if kind.__module__.startswith("flax.") else kind.__name__


def arrays_in(tree: PyTree) -> dict[str, Any]:
    """Return the arrays of a tree by path, without its other leaves."""
    return {path: x for path, x in flatten(tree)[0].items() if is_array(x)}


def parameters_in(tree: PyTree) -> dict[str, Any]:
    """Return the arrays of a tree that are parameters, by path."""
    others = not_parameters(tree)
    return {path: x for path, x in arrays_in(tree).items() if path not in others}


def checked_arrays(params: PyTree, name: str) -> dict[str, Any]:
    """Return the arrays of ``params`` by path, or raise; ``name`` begins the message."""
    leaves = arrays_in(params)
    if not leaves:
        raise ValueError(
            f"{name}: params has no arrays: it is a {type(params).__name__}, "
            f"{reprlib.repr(params)}. Pass parameters, such as model.init(key, x)['params']"
        )
    return leaves


def nearest(path: str, paths: Iterable[str], n: int = 5) -> str:
    """List the paths most like ``path``, for the end of an error message."""
    paths = list(paths)
    found = difflib.get_close_matches(path, paths, n=n, cutoff=0.3) or paths[:n]
    return ", ".join(found) if found else "(none)"
