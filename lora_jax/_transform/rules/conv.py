"""``conv_general_dilated``: ``a`` has the window and reads the channels, ``b`` writes them."""

from collections.abc import Sequence
from math import prod
from typing import Any

import jax
from jax import lax

from lora_jax._adapter.factors import wide
from lora_jax._transform.context import Context
from lora_jax._transform.delta import Delta
from lora_jax._transform.labelled import Axis, Label, Labelled, contract, times
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray, gains_around
from lora_jax._transform.rule import first_looked_up, rule
from lora_jax._transform.rules.dot import compute_dtype


@rule("conv_general_dilated", reads=first_looked_up)
def conv(ctx: Context, eqn, values):
    """Compute ``x * W + scale * (x * a) * b``, where ``*`` is the convolution.

    ``a`` reads the channels, and ``b`` writes them. A window axis belongs to the factor that has
    it, with its stride, padding and dilations; the other factor's are 1.
    """
    x, v = values
    if isinstance(x, LoraArray):
        return NotImplemented  # a weight in the place of the image
    numbers = eqn.params["dimension_numbers"]
    out_axis, in_axis, *window = numbers.rhs_spec
    around = gains_around(v, (in_axis, *window), ())
    if around is None or (around[0] and eqn.params["feature_group_count"] != 1):
        return NotImplemented
    for gain in around[0]:
        if gain.labels != (in_axis,):
            return NotImplemented  # along the window
        x = times(_image(x, numbers.lhs_spec, in_axis, window), gain).array
    (result,) = bind(eqn, [x, v.w])
    ctx.use(v, (in_axis, *window), ())
    with ctx.scope():
        for delta in v.updates:
            update = _conv_delta(ctx, eqn.params, x, v, delta, result)
            if update is NotImplemented:
                return NotImplemented
            result += update
        for gain in around[1]:
            result = times(_image(result, numbers.out_spec, out_axis, window), gain).array
    return [result]


def _image(x: jax.Array, spec: Sequence[int], channels: Label, window: Sequence[Label]) -> Labelled:
    """Label an image, or the result: its channels, and the axes that the window goes along."""
    labels = dict(zip(spec, ("batch", channels, *window), strict=True))
    return Labelled(x, tuple(labels[i] for i in range(x.ndim)))


def _conv_delta(ctx: Context, params, x: jax.Array, v: LoraArray, delta: Delta, result) -> Any:
    numbers = params["dimension_numbers"]
    out_axis, in_axis, *window = numbers.rhs_spec
    delta = delta.picked().padded(range(len(v.shape)), v.shape)
    first, then = delta.factors
    if in_axis in then.labels or out_axis in first.labels:
        first, then = then, first
    both = set(first.labels) & set(then.labels) - {Axis.RANK}
    if both or in_axis in then.labels or out_axis in first.labels:
        return NotImplemented
    first = first.broadcast({i: v.shape[i] for i in (in_axis, *window) if not delta.has(i)})
    if out_axis not in then.labels:
        then = then.broadcast({out_axis: v.shape[out_axis]})

    groups = params["feature_group_count"]
    dtype = compute_dtype(x.dtype, result.dtype)
    dtype = wide(dtype) if ctx.policy.observe else dtype
    ours = [i in first.labels for i in window]
    narrow = first.aligned((Axis.RANK, in_axis, *window)).astype(dtype)

    def product(x, narrow):  # the same a for every group
        kernel = lax.concatenate([narrow] * groups, dimension=0)
        return _window_conv(x, kernel, params, ours, groups=groups)

    small = ctx.through(delta, product, x.astype(dtype), narrow)
    small = small * delta.scale.astype(small.dtype)  # the axes of x, with the rank as channels
    kernel = then.aligned((out_axis, Axis.RANK, *window)).astype(dtype)
    ctx.spend(delta, small.size * prod(narrow.shape[1:]) + result.size * prod(kernel.shape[1:]))
    if all(ours) and groups == params["batch_group_count"] == 1:  # a product with the channels
        return contract(
            _image(small, numbers.lhs_spec, Axis.RANK, window),
            then.astype(dtype),
            _image(result, numbers.out_spec, out_axis, window).labels,
            precision=params["precision"],
            dtype=result.dtype,
        ).array
    update = _window_conv(
        small,
        kernel,
        params,
        [not mine for mine in ours],
        groups=groups,
        batch_groups=params["batch_group_count"],
    )
    order = [numbers.lhs_spec[numbers.out_spec.index(i)] for i in range(result.ndim)]
    return update.transpose(order).astype(result.dtype)


def _window_conv(x, kernel, params, mine, *, groups, batch_groups=1):
    """Convolve with the strides, paddings and dilations of some of the window's axes.

    The result has its axes in the order of ``x``'s.
    """
    spec = params["dimension_numbers"].lhs_spec

    def window(name, nothing):
        return [p if m else nothing for p, m in zip(params[name], mine, strict=True)]

    return lax.conv_general_dilated(
        x,
        kernel,
        window("window_strides", 1),
        window("padding", (0, 0)),
        window("lhs_dilation", 1),
        window("rhs_dilation", 1),
        lax.ConvDimensionNumbers(spec, tuple(range(kernel.ndim)), spec),
        feature_group_count=groups,
        batch_group_count=batch_groups,
        precision=params["precision"],
    )
