"""``Context``: one run of ``lora(fn)``, its policy, and what it has seen."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax import _jax
from lora_jax._transform.delta import Delta, R
from lora_jax._transform.labelled import spread_like
from lora_jax._transform.lora_array import LoraArray, renamed
from lora_jax._transform.origin import Leaf
from lora_jax._transform.use import MATERIALIZE, Use

OnMaterialize = Literal["error", "warn", "allow"]


@dataclass(frozen=True)
class Body:
    """A function inside the function, over split weights: made once, used wherever it is called.

    Attributes:
        jaxpr: what it was made of.
        made: what was made, whatever that is.
        uses: those in it, of weights by their position among its inputs.
        flops: by the same.
    """

    jaxpr: Any
    made: Any
    uses: tuple[Use, ...]
    flops: Mapping[Leaf, int]


# (product, x, a) -> product(x, a), with a derivative of its own
Observe = Callable[[Callable[..., jax.Array], jax.Array, jax.Array], jax.Array]


@dataclass
class Context:
    """One run of ``lora(fn)``: its policy, and what it has seen of the adapted weights.

    Attributes:
        on_materialize: the policy.
        dropout: the share of the adapters' inputs that is dropped, where they have keys.
        observe: None; or what stands in for the product of an input with ``a``.
        uses: every use so far.
        flops: what the low-rank paths cost, in floating-point operations, by weight.
        eqns: the equations under evaluation, outermost first.
        times: how often the present equation is evaluated in a call, as far as that is known.
        warned: the warnings given.
        refused: whether a materialization was an error.
        broadcasts: for each variable that is a plain array broadcast, that array and how.
        entered: the loop bodies whose uses are recorded.
        bodies: the functions inside the function, over split weights.
        names: inside such a body, the weights that its inputs are of at present.
        draws: how many keys have been made of others.
    """

    on_materialize: OnMaterialize
    dropout: float = 0.0
    observe: Observe | None = None
    uses: list[Use] = field(default_factory=list)
    flops: dict[Leaf, int] = field(default_factory=dict)
    eqns: list[Any] = field(default_factory=list)
    times: int = 1
    warned: set[str] = field(default_factory=set)
    refused: bool = False
    broadcasts: dict[Any, Any] = field(default_factory=dict)
    entered: set[Any] = field(default_factory=set)
    bodies: dict[Any, Body] = field(default_factory=dict)
    names: dict[Leaf, Leaf] = field(default_factory=dict)
    draws: int = 0

    def use(self, v: LoraArray, contracted: Sequence[int], batch: Sequence[int]) -> None:
        """Record that the present equation reads ``v``, summing over its axes ``contracted``."""
        free = [i for i in range(len(v.shape)) if i not in contracted and i not in batch]
        for delta in v.deltas:
            groups = (contracted, free)
            axes = [delta.past.behind(group) for group in groups]
            self._record(delta, self.eqns[-1].primitive.name, axes[0], axes[1])

    def _record(
        self, delta: Delta, primitive: str, contracted: frozenset[int], free: frozenset[int]
    ) -> None:
        use = Use(delta.leaf, primitive, contracted, free, tuple(self.eqns))
        last = self.uses[-1] if self.uses else None
        if last and last.leaf == use.leaf and last.eqns[-1:] == use.eqns[-1:]:
            if (last.contracted, last.free) == (contracted, free):
                return  # another range of the same weight
        self.uses.append(use)

    def spend(self, delta: Delta, multiplications: int) -> None:
        """Record what a low-rank path costs."""
        cost = 2 * multiplications * self.times
        self.flops[delta.leaf] = self.flops.get(delta.leaf, 0) + cost

    def scope(self) -> Any:
        """A name for low-rank paths, inside the user's, for profiles and HLO dumps."""
        return jax.named_scope(f"{_jax.name_stack(self.eqns[-1])}/lora".lstrip("/"))

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """The body of a loop."""
        before = self.times
        self.times = before * times
        try:
            yield
        finally:
            self.times = before

    @contextlib.contextmanager
    def once(self, key: Any) -> Iterator[None]:
        """A block whose records are kept if it is the first of this key."""
        uses, flops = len(self.uses), dict(self.flops)
        is_new = key not in self.entered
        self.entered.add(key)
        try:
            yield
        finally:
            if not is_new:
                del self.uses[uses:]
                self.flops = flops

    @contextlib.contextmanager
    def attempt(self, keep: bool = True) -> Iterator[None]:
        """A block whose records are kept if it is left normally, and if ``keep``."""
        before = len(self.uses), dict(self.flops), set(self.entered)
        done, depth = False, len(self.eqns)
        try:
            yield
            done = True
        finally:
            if not (done and keep):
                del self.uses[before[0] :], self.eqns[depth:]
                self.flops, self.entered = before[1:]

    def uses_of(self, leaf: Leaf) -> list[Use]:
        """The recorded uses of one weight."""
        return [use for use in self.uses if use.leaf == leaf]

    def through(
        self, delta: Delta, product: Callable[..., jax.Array], x: jax.Array, factor: jax.Array
    ) -> jax.Array:
        """``product(x, factor)``: an input meets what reads it, and some of it may be dropped."""
        if self.observe is not None:
            return self.observe(product, x, factor)
        if delta.key is None:
            return product(x, factor)
        # checkpointed: neither what is dropped is kept, nor what is left
        run = jax.checkpoint(lambda x, factor, key: product(self._drop(key, x), factor))
        return run(x, factor, self._next_key(delta))

    def _next_key(self, delta: Delta) -> jax.Array:
        self.draws += 1
        return jax.random.fold_in(delta.key, self.draws)

    def _drop(self, key: jax.Array, x: jax.Array, whole: Sequence[int] = ()) -> jax.Array:
        """``x`` with entries dropped, whole ones along some axes, and the others made larger."""
        shape = [1 if i in whole else n for i, n in enumerate(x.shape)]
        keep = spread_like(jax.random.bernoulli(key, 1 - self.dropout, shape), x)
        return x * (keep.astype(x.dtype) * jnp.asarray(1 / (1 - self.dropout), x.dtype))

    def again(self, values: list[Any], step: Any = None) -> list[Any]:
        """Values for another run of a body: what is dropped in it differs from run to run."""
        if not self.dropout:
            return values
        self.draws += step is None
        return [
            v.keyed(self.draws if step is None else step) if isinstance(v, LoraArray) else v
            for v in values
        ]

    def unbroadcast(self, atom: Any, x: Any) -> Any:
        """An operand of the present equation, with an axis of size 1 where it is constant."""
        if isinstance(atom, _jax.Literal) or atom not in self.broadcasts:
            return x
        x, params = self.broadcasts[atom]
        sizes = dict(zip(params["broadcast_dimensions"], x.shape, strict=True))
        return x.reshape([sizes.get(axis, 1) for axis in range(len(params["shape"]))])

    def read(self, v: LoraArray) -> Any:
        """A weight that is read already, as a plain array."""
        for delta in v.deltas:
            past = delta.past
            axes = past.behind(range(len(past.axes)))
            read = past.read | past.summed
            if not delta.is_probe:  # of a probe, what was picked may have been a layer
                read = (read | past.picked) - past.batch
            if not delta.is_probe and not delta.reads:  # rows of a table, some of its columns
                written = {*delta.b_labels} - {*delta.a_labels}
                read -= past.behind(written)
            name = "gather" if past.read else "reduce_sum"
            self._record(delta, name, read, axes - read)
            if not delta.is_probe:
                self.spend(delta, v.w.size * delta.b.shape[delta.b_labels.index(-1)])
        return v.map(v.w, self._dropped).dense()

    def _dropped(self, delta: Delta) -> Delta:
        """A delta that a lookup has read, with whole rows dropped if it has a key."""
        if delta.key is None or not delta.past.read:
            return delta
        rank = delta.a_labels.index(R)
        return dataclasses.replace(delta, a=self._drop(self._next_key(delta), delta.a, (rank,)))

    def materialize(self, v: LoraArray, why: str) -> Any:
        """``W + scale * a b`` itself, if the policy allows it; always, once ``v`` is read.

        Raises:
            NotImplementedError: it does not.
        """
        if v.is_read:
            return self.read(v)
        form = f"{v.w.dtype}{list(v.shape)}"
        if any(delta.key is not None for delta in v.deltas):
            raise NotImplementedError(
                f"lora: the weight {v.leaves[0].path!r} {form} {why}, where the whole weight is "
                "built and there is no input of the adapter's to drop. Call without lora_key, or "
                f"keep the weight out: lorafy(..., exclude={v.leaves[0].path!r})"
            )
        for leaf in v.leaves:
            nothing: frozenset[int] = frozenset()
            use = Use(leaf, MATERIALIZE, nothing, nothing, tuple(self.eqns), why, form)
            self.uses.append(use)
            self._complain(use)
        return v.dense()

    def _complain(self, use: Use) -> None:
        if self.on_materialize == "allow":
            return
        use = replace(use, leaf=self.names.get(use.leaf, use.leaf))
        if self.on_materialize == "error":
            self.refused = True
            raise NotImplementedError(use.complaint)
        if use.complaint not in self.warned:
            self.warned.add(use.complaint)
            use.warn()

    def body(self, jaxpr: Any, values: list[Any], make: Callable[[list[Any]], Any]) -> Any:
        """What ``make`` makes of an inner function over these values, made once for all like them.

        Layers of one kind share it: the weights are called by their position, and what is
        recorded of them is recorded again, by their names, at each call.

        Returns:
            What ``make`` made, and a function that gives the weights in it their names back.
        """
        leaves = dict.fromkeys(
            leaf for v in values if isinstance(v, LoraArray) for leaf in v.leaves
        )
        positions = {leaf: Leaf(-1, str(k)) for k, leaf in enumerate(leaves)}
        here = {position: leaf for leaf, position in positions.items()}
        values = [renamed(v, positions) for v in values]
        arrays, tree = jax.tree.flatten(values)
        key = (id(jaxpr), tree, tuple(map(jax.typeof, arrays)))
        if key not in self.bodies:
            outer = self.uses, self.flops, self.times, self.names
            self.uses, self.flops, self.times = [], {}, 1
            self.names = {p: outer[3].get(leaf, leaf) for p, leaf in here.items()}
            try:
                made = make(values)
                uses = tuple(replace(u, eqns=u.eqns[len(self.eqns) :]) for u in self.uses)
                self.bodies[key] = Body(jaxpr, made, uses, self.flops)
            finally:
                self.uses, self.flops, self.times, self.names = outer
        body = self.bodies[key]
        for use in body.uses:
            use = replace(use, leaf=here[use.leaf], eqns=(*self.eqns, *use.eqns))
            self.uses.append(use)
            if use.why:
                self._complain(use)
        for position, cost in body.flops.items():
            leaf = here[position]
            self.flops[leaf] = self.flops.get(leaf, 0) + cost * self.times
        return body.made, lambda v: renamed(v, here)
