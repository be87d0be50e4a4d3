"""``report``: what an adapted function costs, and where it uses its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax._adapter.params import count_line
from lora_jax._transform.call import Call
from lora_jax._transform.discover import kind_of
from lora_jax._transform.lora import rehearse
from lora_jax._transform.origin import Leaf
from lora_jax._transform.record import Record
from lora_jax._weights.layouts import table
from lora_jax._weights.ranges import part_of


@dataclass(frozen=True)
class Report:
    """The uses, costs and materializations of adapted weights; its repr is a table.

    Attributes:
        rows: one per entry of each adapter: its path, shape, kind, layout, number of uses, rank,
            parameters and extra FLOPs per call.
        materialized: the weights that have to be built, why, and where.
        unused: the entries that the function never uses.
        total: the counts of trainable and of all parameters, one line per LoraParams.
    """

    rows: tuple[Mapping[str, Any], ...]
    materialized: tuple[str, ...]
    unused: tuple[str, ...]
    total: tuple[str, ...]

    def __str__(self) -> str:
        names = ("path", "shape", "kind", "layout", "uses", "rank", "parameters", "extra FLOPs")
        cells = [
            tuple(
                f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in names
            )
            for row in self.rows
        ]
        lines = [table([names, *cells], right=4)]
        lines += [f"materialized: {line}" for line in self.materialized]
        lines += [f"never used: {path}" for path in self.unused]
        return "\n".join([*lines, *self.total])


def report(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Report how ``lora(fn)`` uses every adapted weight: used, unused or built, and its cost.

    Traces on shapes alone; nothing is computed, and nothing is an error: the report lists
    materializations and weights that are never used.

    Args:
        fn: a function as for :func:`lora`.
        *args: its arguments, arrays or shapes, with a LoraParams wherever it takes parameters.
        **kwargs: as ``args``.

    Returns:
        A :class:`Report`. FLOPs are those of the low-rank paths in one forward call; the body of a
        ``scan`` counts as often as it runs, that of a ``while`` loop once.

    Raises:
        ValueError: no LoraParams is among the arguments, or an adapter does not fit its base.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"query": {"kernel": jnp.ones((8, 6))}, "value": {"kernel": jnp.ones((8, 6))}}
        >>> lora_params = lora_jax.lorafy(params, rank=2)
        >>> print(lora_jax.report(lambda p, x: x @ p["query"]["kernel"], lora_params, jnp.ones((5, 8))))
        path          shape  kind  layout  uses  rank  parameters  extra FLOPs
        ----------------------------------------------------------------------
        query/kernel  8x6    dot   io         1     2          28          280
        value/kernel  8x6    -     io         0     2          28            0
        never used: value/kernel
        trainable params: 56 || all params: 152 || trainable%: 36.8
    """  # noqa: E501
    call = Call.of(args, kwargs)
    jaxpr, _, consts, _ = call.trace(fn)
    record = rehearse(jaxpr, [*consts, *call.values])
    rows = [row for owner in call.lora_params for row in _rows(record, call, owner)]
    built = [f"{use.leaf.path!r} {use.form} {use.reason}" for use in record.materialized]
    unused = tuple(row["path"] for row in rows if not row["uses"])
    total = tuple(count_line(lora_params) for lora_params in call.lora_params.values())
    return Report(tuple(rows), tuple(built), unused, total)


def _rows(record: Record, call: Call, owner: int):
    """Yield the rows of one LoraParams."""
    leaves = call.leaves[owner]
    for key, f in call.lora_params[owner].adapter.factors.items():
        path = part_of(key, leaves).path
        uses = record.uses_of(Leaf(owner, path))
        yield {
            "path": key,
            "shape": "x".join(map(str, leaves[path].shape)),
            "kind": kind_of(uses) if uses else "-",
            "layout": f.layout,
            "uses": len(uses),
            "rank": int(f.rank),
            "parameters": int(f.size),
            "extra FLOPs": int(record.flops.get(Leaf(owner, path), 0)),
        }
