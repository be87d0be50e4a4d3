"""``ragged_dot_general``: the experts of a mixture, each with its own factors."""

from collections.abc import Sequence

import jax
from jax import lax

from lora_jax import _jax
from lora_jax._params import wide
from lora_jax._transform._dot import compute_dtype
from lora_jax._transform._rules import Context, rule
from lora_jax._transform._value import Delta, Labels, LoraArray, R, contract


@rule("ragged_dot_general", reads=True)
def ragged_dot_general(ctx: Context, eqn, values):
    """Rows of ``x``, in groups, each by ``W`` of its group; or by its group's rows of ``W``."""
    x, v, sizes = values[:3]
    if not isinstance(v, LoraArray) or isinstance(x, LoraArray):
        return NotImplemented
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, summed), (_, batch) = numbers.dot_dimension_numbers
    (result,) = _jax.bind(eqn, [x, v.w, *values[2:]])
    ctx.use(v, summed, (*batch, *numbers.rhs_group_dimensions))
    with ctx.scope():
        for delta in v.deltas:
            if not delta.is_probe:
                update = _ragged_delta(ctx, eqn.params, x, v, sizes, delta, result)
                if update is NotImplemented:
                    return NotImplemented
                result += update
    return [result]


def _ragged_delta(ctx: Context, params, x, v: LoraArray, sizes, delta: Delta, result):
    numbers = params["ragged_dot_dimension_numbers"]
    (x_summed, summed), (x_batch, batch) = numbers.dot_dimension_numbers
    (ragged,), group = numbers.lhs_ragged_dimensions, tuple(numbers.rhs_group_dimensions)
    free = [i for i in range(len(v.shape)) if i not in {*summed, *batch, *group}]
    delta = delta.whole(range(len(v.shape)), v.shape)
    first, then = delta.factors
    if _has(then, summed) or _has(first, free):
        first, then = then, first
    if _has(then, summed) or _has(first, free):
        return NotImplemented  # a factor that both reads and writes
    first, first_labels = _with_axes(*first, (*batch, *summed), v.shape)
    alone = () if _has((first, first_labels), group) else group  # one of the two must be ragged
    then, then_labels = _with_axes(*then, (*batch, *free, *alone), v.shape)

    dtype = compute_dtype(x.dtype, result.dtype)

    def product(x, x_dims, ragged, y, labels, summed, out_type):
        own_summed, own_batch = (tuple(map(labels.index, axes)) for axes in (summed, batch))
        dims = ((tuple(x_dims[0]), own_summed), (tuple(x_dims[1]), own_batch))
        options = {"precision": params["precision"], "preferred_element_type": out_type}
        y = y.astype(dtype)
        if ragged is None or not _has((y, labels), group):
            return lax.dot_general(x, y, dims, **options)
        own = tuple(labels.index(i) for i in group)
        ragged_numbers = lax.RaggedDotDimensionNumbers(dims, (ragged,), own)
        return lax.ragged_dot_general(
            x, y, sizes, ragged_numbers, group_offset=params["group_offset"], **options
        )

    if not group and ragged in x_summed:  # each group's part of the summed axis: [g, ..., r]
        own = lax.RaggedDotDimensionNumbers(
            (
                (tuple(x_summed), tuple(map(first_labels.index, summed))),
                (tuple(x_batch), tuple(map(first_labels.index, batch))),
            ),
            (ragged,),
            (),
        )
        small = lax.ragged_dot_general(
            x.astype(dtype), first.astype(dtype), sizes, own,
            precision=params["precision"], preferred_element_type=wide(dtype),
        )  # fmt: skip
        small = (small * delta.scale.astype(small.dtype)).astype(dtype)
        rows = [("x", i) for i in range(small.ndim - 2 - len(batch))]
        labels = ["group", *batch, *rows, R]
        ctx.spend(delta, x.size * delta.a.shape[-1] + small.size * result.shape[-1])
        return contract(
            small, labels, then.astype(dtype), then_labels, [*labels[:-1], *free],
            precision=params["precision"], dtype=result.dtype,
        )  # fmt: skip

    is_plain = not group  # a ragged batch axis is computed whole
    small = product(
        x.astype(dtype), (x_summed, x_batch), None if is_plain else ragged,
        first, first_labels, summed, wide(dtype),
    )  # fmt: skip
    small = (small * delta.scale.astype(small.dtype)).astype(dtype)  # [*batch, *rows, r]
    rows = [i for i in range(x.ndim) if i not in {*x_summed, *x_batch}]
    ragged = None if is_plain else len(batch) + rows.index(ragged)
    rank = small.shape[-1]
    ctx.spend(delta, x.size * rank + small.size * (result.size // max(small.size // rank, 1)))
    small_dims = ((small.ndim - 1,), tuple(range(len(batch))))
    return product(small, small_dims, ragged, then, then_labels, (R,), result.dtype)


def _has(factor: tuple[jax.Array, Labels], axes: Sequence[int]) -> bool:
    return not set(axes).isdisjoint(factor[1])


def _with_axes(
    x: jax.Array, labels: Labels, axes: Sequence[int], shape: Sequence[int]
) -> tuple[jax.Array, Labels]:
    """A factor with all of these axes, in the order of ``W``'s, and the rank axis last."""
    missing = [i for i in axes if i not in labels]
    x, labels = lax.broadcast(x, [shape[i] for i in missing]), (*missing, *labels)
    order = sorted(range(len(labels)), key=lambda k: (labels[k] == R, labels[k]))
    return x.transpose(order), tuple(labels[k] for k in order)
