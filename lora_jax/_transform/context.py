"""``Context``: one run of ``lora(fn)``: its policy, its record, and the place it has reached."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax

from lora_jax import _jax
from lora_jax._transform.delta import AnyDelta, Delta
from lora_jax._transform.dropout import Dropout
from lora_jax._transform.lora_array import LoraArray, with_leaves
from lora_jax._transform.origin import Leaf
from lora_jax._transform.record import Record
from lora_jax._transform.use import MATERIALIZE, Use

OnMaterialize = Literal["error", "warn", "allow"]
# (product, x, a) -> product(x, a), with a derivative of its own
Observe = Callable[[Callable[..., jax.Array], jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Policy:
    """Tell a run what it does at its weights' uses.

    Attributes:
        on_materialize: what it does where a weight has to be built.
        dropout: the share of the adapters' inputs that is dropped, where deltas have keys.
        observe: computes the product of an input and ``a`` in its own way; None for plain products.
    """

    on_materialize: OnMaterialize
    dropout: float = 0.0
    observe: Observe | None = None


@dataclass(frozen=True)
class Body:
    """A function inside the function, over split weights: made once, used at each of its calls.

    Attributes:
        jaxpr: the function, kept alive because its id is in the key of the body.
        made: what was made of it.
        record: the uses and costs in it, of weights named by their position among its inputs.
    """

    jaxpr: Any
    made: Any
    record: Record


class MaterializeError(NotImplementedError):
    """The policy forbids a materialization."""


@dataclass
class Context:
    """One run of ``lora(fn)``.

    Attributes:
        policy: what to do at uses.
        record: the uses and costs so far.
        warned: the warnings given.
        dropout: the keys drawn so far.
        eqns: the equations under evaluation, outermost first.
        times: how often the present equation is evaluated per call, as far as that is known.
        names: the weights at the inputs of the body that is being made, by position.
        broadcasts: the array, and the parameters, of each variable that is a broadcast plain array.
        bodies: the functions inside the function, over split weights.
    """

    policy: Policy
    record: Record = field(default_factory=Record)
    warned: set[str] = field(default_factory=set)
    dropout: Dropout = field(init=False)
    eqns: list[Any] = field(default_factory=list)
    times: int = 1
    names: dict[Leaf, Leaf] = field(default_factory=dict)
    broadcasts: dict[Any, Any] = field(default_factory=dict)
    bodies: dict[Any, Body] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dropout = Dropout(self.policy.dropout)

    # The record

    def use(self, v: LoraArray, contracted: Sequence[int], batch: Sequence[int]) -> None:
        """Record that the present equation reads ``v``, summing over its axes ``contracted``."""
        free = [i for i in range(len(v.shape)) if i not in contracted and i not in batch]
        for delta in v.deltas:
            behind = delta.origin.behind
            self._use(delta, self.eqns[-1].primitive.name, behind(contracted), behind(free))

    def _use(
        self, delta: AnyDelta, primitive: str, contracted: frozenset[int], free: frozenset[int]
    ) -> None:
        self.record.add(Use(delta.leaf, primitive, contracted, free, tuple(self.eqns)))

    def spend(self, delta: Delta, multiplications: int) -> None:
        """Record what a low-rank path costs."""
        self.record.spend(delta.leaf, 2 * multiplications * self.times)

    @contextlib.contextmanager
    def once(self, key: Any) -> Iterator[None]:
        """Keep what a block records if it is the first of this key."""
        record, before = self.record, self.record.snapshot()
        is_new = key not in record.entered
        record.entered.add(key)
        try:
            yield
        finally:
            if not is_new:
                record.rollback(before)

    @contextlib.contextmanager
    def attempt(self, keep: bool = True) -> Iterator[None]:
        """Keep what a block records if it ends without an exception, and if ``keep``."""
        record, before, depth = self.record, self.record.snapshot(), len(self.eqns)
        is_done = False
        try:
            yield
            is_done = True
        finally:
            if not (is_done and keep):
                record.rollback(before)
                del self.eqns[depth:]

    # The place

    def scope(self) -> Any:
        """Return a named scope for low-rank paths, inside the user's: profiles and HLO show it."""
        return jax.named_scope(f"{_jax.name_stack(self.eqns[-1])}/lora".lstrip("/"))

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Count what a block costs ``times`` times."""
        before = self.times
        self.times = before * times
        try:
            yield
        finally:
            self.times = before

    def unbroadcast(self, atom: Any, x: Any) -> Any:
        """Return an operand of the present equation, of size 1 along axes where it is constant."""
        if isinstance(atom, _jax.Literal) or atom not in self.broadcasts:
            return x
        x, params = self.broadcasts[atom]
        sizes = dict(zip(params["broadcast_dimensions"], x.shape, strict=True))
        return x.reshape([sizes.get(axis, 1) for axis in range(len(params["shape"]))])

    # Weights that meet inputs, and weights that are built

    def through(
        self, delta: Delta, product: Callable[..., jax.Array], x: jax.Array, factor: jax.Array
    ) -> jax.Array:
        """Return ``product(x, factor)``, observed or with some of the input ``x`` dropped."""
        if self.policy.observe is not None:
            return self.policy.observe(product, x, factor)
        if delta.key is None:
            return product(x, factor)
        return self.dropout.product(delta.key, product, x, factor)

    def read(self, v: LoraArray) -> jax.Array:
        """Return a weight that is read already, as a plain array."""
        for delta in v.deltas:
            origin, read = delta.origin, delta.axes_read
            name = "reduce_sum" if origin.summed and not origin.read else "gather"
            self._use(delta, name, read, origin.behind(range(len(origin.axes))) - read)
        for delta in v.updates:
            self.spend(delta, v.w.size * delta.rank)
        return v.map(v.w, self.dropout.rows).dense()

    def materialize(self, v: LoraArray, why: str) -> jax.Array:
        """Build ``W + scale * a b``, if the policy allows it; in any case if ``v`` is read already.

        Raises:
            NotImplementedError: the policy does not allow it.
        """
        if v.is_read:
            return self.read(v)
        form = f"{v.w.dtype}{list(v.shape)}"
        if v.has_keys:
            raise NotImplementedError(
                f"lora: the weight {v.leaves[0].path!r} {form} {why}, where the weight is built "
                "and there is no input of the adapter's to drop. Call without lora_key, or "
                f"keep the weight out: lorafy(..., exclude={v.leaves[0].path!r})"
            )
        if v.is_vector:
            why = f"may be a table, or vectors of layers: one row of it {why}"
        for leaf in v.leaves:
            nothing: frozenset[int] = frozenset()
            use = Use(leaf, MATERIALIZE, nothing, nothing, tuple(self.eqns), why, form)
            self.record.uses.append(use)
            self._complain(use)
        return v.dense()

    def plain(self, values: list[Any], why: str, where: Iterable[bool] | None = None) -> list[Any]:
        """Materialize the weights among the values; with ``where``, those it is True for."""
        flags = [True] * len(values) if where is None else where
        return [
            self.materialize(v, why) if flag and isinstance(v, LoraArray) else v
            for v, flag in zip(values, flags, strict=True)
        ]

    def _complain(self, use: Use) -> None:
        use = replace(use, leaf=self.names.get(use.leaf, use.leaf))
        if self.policy.on_materialize == "error":
            raise MaterializeError(use.complaint)
        if self.policy.on_materialize == "warn" and use.complaint not in self.warned:
            self.warned.add(use.complaint)
            use.warn()

    # Functions inside the function

    def body(
        self, jaxpr: Any, values: list[Any], make: Callable[[list[Any]], Any]
    ) -> tuple[Any, Callable[[Any], Any]]:
        """Make something of an inner function over these values, once for all values like them.

        Layers of one kind share it: inside, weights are named by their position among the inputs.
        Its record is repeated at each call, by the weights' own names.

        Returns:
            What ``make`` made, and a function that gives the weights in it their own names.
        """
        leaves = dict.fromkeys(
            leaf for v in values if isinstance(v, LoraArray) for leaf in v.leaves
        )
        positions = {leaf: Leaf(-1, str(k)) for k, leaf in enumerate(leaves)}
        here = {position: leaf for leaf, position in positions.items()}
        values = [with_leaves(v, positions) for v in values]
        arrays, tree = jax.tree.flatten(values)
        key = (id(jaxpr), tree, tuple(map(jax.typeof, arrays)))
        if key not in self.bodies:
            self.bodies[key] = self._body(jaxpr, values, here, make)
        body = self.bodies[key]
        for use in body.record.uses:
            use = replace(use, leaf=here[use.leaf], eqns=(*self.eqns, *use.eqns))
            self.record.uses.append(use)
            if use.why:
                self._complain(use)
        for position, flops in body.record.flops.items():
            self.record.spend(here[position], flops * self.times)
        return body.made, lambda v: with_leaves(v, here)

    def _body(
        self, jaxpr: Any, values: list[Any], here: dict[Leaf, Leaf], make: Callable[..., Any]
    ) -> Body:
        outer = self.record, self.times, self.names
        self.record, self.times = Record(), 1
        self.names = {p: self.names.get(leaf, leaf) for p, leaf in here.items()}
        depth = len(self.eqns)
        try:
            made = make(values)
            self.record.uses = [replace(u, eqns=u.eqns[depth:]) for u in self.record.uses]
            return Body(jaxpr, made, self.record)
        finally:
            self.record, self.times, self.names = outer
