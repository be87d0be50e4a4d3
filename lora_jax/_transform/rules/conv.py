"""``conv_general_dilated``: ``a`` has the window and reads the channels, ``b`` writes them."""

from math import prod

import jax
from jax import lax

from lora_jax._adapter.factors import wide
from lora_jax._transform.context import Context
from lora_jax._transform.delta import Delta, Labels, R
from lora_jax._transform.labelled import contract, times
from lora_jax._transform.lazy import bind
from lora_jax._transform.lora_array import LoraArray, gains_around
from lora_jax._transform.rule import rule
from lora_jax._transform.rules.dot import compute_dtype


@rule("conv_general_dilated", reads=(0,))
def conv(ctx: Context, eqn, values):
    """The window and the channels that are read are ``a``'s, those that are written are ``b``'s.

    ``conv(x, W) + scale * conv(conv(x, a), b)``, where any window axis is that of the factor
    which has it, with its stride, padding and dilations; ``b``'s are 1 as a rule.
    """
    x, v = values
    if isinstance(x, LoraArray):
        return NotImplemented  # a weight in the place of the image
    numbers = eqn.params["dimension_numbers"]
    _, in_axis, *window = numbers.rhs_spec
    around = gains_around(v, (in_axis, *window), ())
    if around is None or (around[0] and eqn.params["feature_group_count"] != 1):
        return NotImplemented
    for gain, labels in around[0]:
        if labels != (in_axis,):
            return NotImplemented  # along the window
        x = times(x, gain, [numbers.lhs_spec[1]])
    (result,) = bind(eqn, [x, v.w])
    ctx.use(v, (in_axis, *window), ())
    with ctx.scope():
        for delta in v.deltas:
            if not delta.is_probe:
                update = _conv_delta(ctx, eqn.params, x, v, delta, result)
                if update is NotImplemented:
                    return NotImplemented
                result += update
        for gain, labels in around[1]:  # without labels, of a single output
            result = times(result, gain, [numbers.out_spec[1]] * len(labels))
    return [result]


def _conv_delta(ctx: Context, params, x: jax.Array, v: LoraArray, delta: Delta, result):
    numbers = params["dimension_numbers"]
    out_axis, in_axis, *window = numbers.rhs_spec
    delta = delta.picked().whole(range(len(v.shape)), v.shape)
    (first, first_labels), (then, then_labels) = delta.factors
    if in_axis in then_labels or out_axis in first_labels:
        first, first_labels, then, then_labels = then, then_labels, first, first_labels
    both = set(first_labels) & set(then_labels) - {R}
    if both or in_axis in then_labels or out_axis in first_labels:
        return NotImplemented
    missing = [i for i in (in_axis, *window) if not delta.has(i)]
    first = lax.broadcast(first, [v.shape[i] for i in missing])
    first_labels = (*missing, *first_labels)
    if out_axis not in then_labels:
        then, then_labels = lax.broadcast(then, [v.shape[out_axis]]), (out_axis, *then_labels)

    groups = params["feature_group_count"]
    dtype = compute_dtype(x.dtype, result.dtype)
    dtype = wide(dtype) if ctx.observe else dtype
    ours = [i in first_labels for i in window]
    narrow = _kernel(first, first_labels, (R, in_axis, *window)).astype(dtype)

    def product(x, narrow):  # the same a for every group
        kernel = lax.concatenate([narrow] * groups, dimension=0)
        return _window_conv(x, kernel, params, ours, groups=groups)

    small = ctx.through(delta, product, x.astype(dtype), narrow)
    small = small * delta.scale.astype(small.dtype)
    kernel = _kernel(then, then_labels, (out_axis, R, *window)).astype(dtype)
    ctx.spend(delta, small.size * prod(narrow.shape[1:]) + result.size * prod(kernel.shape[1:]))
    if all(ours) and groups == params["batch_group_count"] == 1:  # a product with the channels
        batch, channels, *image = numbers.lhs_spec
        labels = dict(zip((batch, channels, *image), ("batch", R, *window), strict=True))
        out = dict(zip(numbers.out_spec, ("batch", out_axis, *window), strict=True))
        return contract(
            small,
            [labels[i] for i in range(small.ndim)],
            then.astype(dtype),
            then_labels,
            [out[i] for i in range(result.ndim)],
            precision=params["precision"],
            dtype=result.dtype,
        )
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


def _kernel(x: jax.Array, labels: Labels, order: tuple[int, ...]) -> jax.Array:
    """A factor with these axes, of size 1 where it has none."""
    x = x.transpose([labels.index(i) for i in order if i in labels])
    return lax.expand_dims(x, [k for k, i in enumerate(order) if i not in labels])


def _window_conv(x, kernel, params, mine, *, groups, batch_groups=1):
    """A convolution with the strides, paddings and dilations of some of the window's axes.

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
