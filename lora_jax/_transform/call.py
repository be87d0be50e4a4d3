"""``Call``: the arguments of one call, flattened, with the weights among them as they enter."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import _jax
from lora_jax._adapter.factors import Rows
from lora_jax._adapter.params import LoraParams, check, is_lora
from lora_jax._transform.delta import Delta, N
from lora_jax._transform.dora import delta_of
from lora_jax._transform.lazy import Lazy
from lora_jax._transform.lora_array import LoraArray
from lora_jax._transform.origin import Leaf
from lora_jax._weights.paths import flatten
from lora_jax._weights.quantized import is_quantized
from lora_jax._weights.target import fold_in_path


def is_traced(x: Any) -> bool:
    """Whether an argument's leaf is traced, rather than handed on as it is."""
    kinds = jax.Array | np.ndarray | np.generic | LoraArray | jax.ShapeDtypeStruct
    return isinstance(x, kinds)


class Among(NamedTuple):
    """Which adapters of a stack count.

    Attributes:
        slot: the one that does; -1: none.
        router: or directions by which inputs choose, for each key of the factors.
        routing: how they do: see ``Delta.routing``.
    """

    slot: Any = None
    router: Mapping[str, Any] | None = None
    routing: tuple[int, float] | None = None


def enter(
    lora_params: LoraParams,
    owner: int,
    leaves: dict[str, Any],
    key: Any = None,
    among: Among | None = None,
) -> dict[str, Any]:
    """The base's leaves as they enter the function: frozen, adapted or trained whole.

    With ``among`` the adapter is a stack.
    """
    parts = check(lora_params if among is None else _one_of(lora_params), leaves).parts
    factors, full = lora_params.adapter.factors, lora_params.adapter.full
    entered = {}
    for path, leaf in leaves.items():
        if path in full:
            new = full[path] if among is None else _picked(full[path], leaf, among.slot)
            leaf = _cast(new, leaf.dtype)
        elif isinstance(leaf, jax.Array):
            leaf = lax.stop_gradient(leaf)
        elif is_quantized(leaf):
            leaf = Lazy.of(jax.tree.map(lax.stop_gradient, leaf))
        entered[path] = leaf
    for name, f in factors.items():
        path, ranges = parts[name]
        leaf = entered[path]
        deltas = leaf.deltas if isinstance(leaf, LoraArray) else ()
        w = leaf.w if isinstance(leaf, LoraArray) else leaf
        if f.frozen:
            f = f.map(lambda n, x, f=f: lax.stop_gradient(x) if n in f.frozen else x)
        of = functools.partial(delta_of, leaf=Leaf(owner, path), ranges=ranges, w=w)
        delta = of(f) if among is None else _in_stack(jax.vmap(of)(_arrays(f)), name, among)
        if key is not None and not isinstance(f, Rows):  # table rows are never dropped
            delta = replace(delta, key=fold_in_path(key, f"{owner}/{name}"))
        entered[path] = LoraArray(w, (*deltas, delta))
    return entered


def _in_stack(delta: Delta, name: str, among: Among) -> Delta:
    """The delta of all adapters of a stack, of which one counts, or as inputs choose."""
    delta = delta.map(lambda x, labels: (x, (N, *labels)))
    if among.router is None:
        return delta.of_slot(among.slot)
    labels = (*delta.a_labels[1:-1], N)
    return replace(delta, router=among.router[name], router_labels=labels, routing=among.routing)


def _one_of(stacked: LoraParams) -> LoraParams:
    """The shapes of one adapter of a stack."""

    def one(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if jnp.ndim(x) else x

    return LoraParams(stacked.base, jax.tree.map(one, stacked.adapter))


def _arrays(tree: Any) -> Any:
    """NumPy's arrays as JAX's, which can be indexed by what is traced."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)


def _picked(full: Any, leaf: Any, slot: Any) -> Any:
    """A leaf that the adapters of a stack train whole, of one of them; the base's own at -1."""
    # in the leaf's dtype, so that the base's is what it is; NaN only where there is one
    dtype = leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.inexact) else full.dtype
    k = jnp.clip(slot, 0, full.shape[0] - 1)
    one = _arrays(full).at[k].get(mode="promise_in_bounds", wrap_negative_indices=False)
    base = lax.stop_gradient(leaf).astype(dtype)
    other = jnp.where(slot == -1, base, jnp.full_like(base, jnp.nan))
    return jnp.where(slot == k, one.astype(dtype), other)


def _put_off(x: Any) -> Any:
    """A quantized leaf as a weight, adapted or not, that is made where it is used."""
    if isinstance(x, LoraArray):
        return replace(x, w=Lazy.of(x.w)) if is_quantized(x.w) else x
    x = Lazy.of(x) if is_quantized(x) else x
    return LoraArray(x, ()) if isinstance(x, Lazy) else x


def _cast(x: Any, dtype: Any) -> Any:
    is_shape = isinstance(x, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(x.shape, dtype) if is_shape else x.astype(dtype)


@dataclass
class Call:
    """The arguments of one call, flattened.

    Attributes:
        structure: of the arguments, with every LoraParams as a leaf.
        places: for each such leaf, its structure, and for each leaf inside None where it is an
            array, or a tuple of it.
        values: one for each array: an array or a :class:`LoraArray`.
        lora_params: the LoraParams, by position among the leaves.
        leaves: of their bases, by path.
    """

    structure: Any
    places: list[tuple[Any, list[Any]]]
    values: list[Any]
    lora_params: dict[int, LoraParams]
    leaves: dict[int, dict[str, Any]]

    @classmethod
    def of(
        cls,
        args: Any,
        kwargs: Any,
        how: Callable[[LoraParams, int, dict[str, Any]], Mapping[str, Any]] = enter,
    ) -> "Call":
        """Flatten; ``how`` gives the leaves of a LoraParams' base by path, as they enter."""
        nodes, structure = jax.tree.flatten((args, kwargs), is_leaf=is_lora)
        lora_params = {i: node for i, node in enumerate(nodes) if is_lora(node)}
        found = {i: flatten(node.base)[0] for i, node in lora_params.items()}
        call = cls(structure, [], [], lora_params, found)
        if not call.lora_params:
            raise ValueError(
                "lora(fn) was called without a LoraParams among its arguments. Pass what "
                "lora_jax.lorafy returned; for the base model, call the function itself"
            )
        for i, node in enumerate(nodes):
            is_params = i in lora_params
            leaves = how(node, i, found[i]).values() if is_params else [node]
            leaves = list(map(_put_off, leaves))
            tree = flatten(node.base)[1] if is_params else jax.tree.structure(0)
            call.places.append((tree, [None if is_traced(x) else (x,) for x in leaves]))
            call.values += [x for x in leaves if is_traced(x)]
        return call

    def trace(self, fn: Callable[..., Any]) -> Any:
        """The jaxpr of ``fn`` on the frozen arrays: see ``_jax.trace``."""

        def flat_fn(*arrays):
            rest = iter(arrays)
            rebuilt = [
                jax.tree.unflatten(tree, [next(rest) if s is None else s[0] for s in static])
                for tree, static in self.places
            ]
            args, kwargs = jax.tree.unflatten(self.structure, rebuilt)
            return fn(*args, **kwargs)

        arrays = [v.w if isinstance(v, LoraArray) else v for v in self.values]
        arrays = [x.aval if isinstance(x, Lazy) else x for x in arrays]
        with jax.disable_jit(False):
            return _jax.trace(flat_fn, arrays)

    def paths_read(self, owner: int, read: Sequence[bool]) -> set[str]:
        """The paths of a LoraParams that are read, given that for every array."""
        flags = iter(read)
        by_node = [[s is None and next(flags) for s in static] for _, static in self.places]
        return {path for path, r in zip(self.leaves[owner], by_node[owner], strict=True) if r}
