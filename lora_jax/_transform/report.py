"""What an adapted function costs, and where it uses its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_jax._adapter.params import count_line
from lora_jax._transform.call import Call
from lora_jax._transform.context import Context
from lora_jax._transform.discover import kind_of
from lora_jax._transform.lora import materialized, rehearse
from lora_jax._transform.origin import Leaf
from lora_jax._weights.layouts import table
from lora_jax._weights.ranges import part_of


@dataclass(frozen=True)
class Report:
    """What a function does with its adapted weights. Printed, it is a table.

    Attributes:
        rows: a row for each entry of each adapter: its path, shape, kind, layout, number of uses,
            rank, parameters, extra FLOPs a call, and a note: what is built, or that it is unused.
        materialized: the weights that have to be built, with what for, and where.
        unused: the entries that the function never uses.
        total: the counts of trainable and all parameters, a line for each LoraParams.
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
    """Report what ``lora(fn)(*args, **kwargs)`` would do with every adapted weight.

    Traces on shapes alone; nothing is computed, and nothing is an error: materializations and
    weights that are never used are rows of the report.

    Args:
        fn: a function as for :func:`lora`.
        *args: its arguments, with a LoraParams wherever it takes parameters; shapes will do.
        **kwargs: as ``args``.

    Returns:
        A :class:`Report`. FLOPs are of the low-rank paths of one forward call; the body of a
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
    ctx = rehearse(jaxpr, [*consts, *call.values])
    rows = [row for owner in call.lora_params for row in _rows(ctx, call, owner)]
    built = [f"{use.leaf.path!r} {use.form} {use.reason}" for use in materialized(ctx)]
    unused = tuple(row["path"] for row in rows if not row["uses"])
    total = tuple(count_line(lora_params) for lora_params in call.lora_params.values())
    return Report(tuple(rows), tuple(built), unused, total)


def _rows(ctx: Context, call: Call, owner: int):
    leaves = call.leaves[owner]
    for key, f in call.lora_params[owner].adapter.factors.items():
        path = part_of(key, leaves).path
        uses = ctx.uses_of(Leaf(owner, path))
        yield {
            "path": key,
            "shape": "x".join(map(str, leaves[path].shape)),
            "kind": kind_of(uses) if uses else "-",
            "layout": f.layout,
            "uses": len(uses),
            "rank": int(f.rank),
            "parameters": int(f.size),
            "extra FLOPs": int(ctx.flops.get(Leaf(owner, path), 0)),
        }
