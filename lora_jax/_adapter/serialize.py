"""Register adapters with those who serialize trees: ``jax.export`` and ``flax.serialization``.

Flax is not imported for that: a finder registers the classes when somebody else imports it.
"""

import dataclasses
import importlib.abc
import json
import sys
from collections.abc import Callable
from typing import Any

from jax import export

from lora_jax._adapter.factors import Factors, Rows
from lora_jax._adapter.params import Adapter, LoraParams

_STATIC = {Factors: ("layout", "frozen", "residual"), Rows: ("layout", "ids", "vocabulary")}
_CLASSES = (*_STATIC, Adapter, LoraParams)
_FLAX = "flax.serialization"


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


def register_exports() -> None:
    """Register the classes for functions that ``jax.export`` serializes."""
    for cls in _CLASSES:
        export.register_pytree_node_serialization(
            cls,
            serialized_name=f"lora_jax.{cls.__name__}",
            serialize_auxdata=lambda static: json.dumps(static).encode(),
            deserialize_auxdata=lambda text: _tuples(json.loads(text)),
        )


def register_states(flax: Any) -> None:
    """Register the classes for the state dictionaries of ``flax.serialization``."""

    def to_state(x: Any) -> dict[str, Any]:
        fields = {name: y for name, y in _fields(x).items() if y is not None}
        return {name: flax.to_state_dict(y) for name, y in fields.items()} | _static(x)

    def from_state(x: Any, state: Any) -> Any:
        where = flax.current_path()
        _check_state(x, state, where)
        fields = {name: y for name, y in _fields(x).items() if y is not None}
        new = {n: flax.from_state_dict(y, state[n], name=n) for n, y in fields.items()}
        return dataclasses.replace(x, **new)

    for cls in _CLASSES:
        flax.register_serialization_state(cls, to_state, from_state, override=True)


def _fields(x: Any) -> dict[str, Any]:
    static = _STATIC.get(type(x), ())
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.name not in static}


def _static(x: Any) -> dict[str, str]:
    """Return the static fields as one leaf, which no map over arrays takes for numbers."""
    names = _STATIC.get(type(x))
    return {"static": json.dumps({name: getattr(x, name) for name in names})} if names else {}


def _check_state(x: Any, state: Any, where: str) -> None:
    """Raise unless a state is one of an object like ``x``.

    Raises:
        ValueError: it has other fields, entries of other weights, or other layouts or rows.
    """
    wanted = {name for name, y in _fields(x).items() if y is not None} | {*_static(x)}
    what, remedy = (
        f"the state at {where!r}",
        "restore into what lora_jax.lorafy made with the same options",
    )
    if not isinstance(state, dict) or state.keys() != wanted:
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{what} has {found}, expected {sorted(wanted)}: {remedy}")
    for name, own in _fields(x).items() if isinstance(x, Adapter) else ():
        if isinstance(own, dict) and (other := own.keys() ^ state[name].keys()):
            side = "the state" if min(other) in state[name] else type(x).__name__
            raise ValueError(f"{what} is of other {name}: only {side} has {min(other)!r}: {remedy}")
    own = json.loads(_static(x).get("static", "{}"))
    there = json.loads(state.get("static", "{}"))
    if changed := [name for name in own if there.get(name) != own[name]]:
        name = changed[0]
        raise ValueError(f"{what} has {name} {there.get(name)!r}, expected {own[name]!r}: {remedy}")


class _WhenImported(importlib.abc.MetaPathFinder):
    """Find a module as others do, and run a function on it after its import."""

    def __init__(self, name: str, then: Callable[[Any], None]):
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next(filter(None, (f.find_spec(name, path, target) for f in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.then)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, then: Callable[[Any], None]):
        self.loader, self.then = loader, then

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then(module)


def register() -> None:
    """Register the classes, with Flax as soon as it is there."""
    register_exports()
    if _FLAX in sys.modules:
        register_states(sys.modules[_FLAX])
    else:
        sys.meta_path.insert(0, _WhenImported(_FLAX, register_states))


register()
