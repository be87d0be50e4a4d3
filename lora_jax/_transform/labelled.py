"""Arrays with labelled axes: products, and parts of zeros."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import _jax
from lora_jax._adapter.lowrank import pad_axis
from lora_jax._weights.ranges import Range


def contract(
    x: jax.Array,
    x_labels: Sequence[Any],
    y: jax.Array,
    y_labels: Sequence[Any],
    out: Sequence[Any],
    *,
    precision: Any,
    dtype: Any,
) -> jax.Array:
    """An einsum over labels as one ``dot_general``: sums over every label not in ``out``.

    A label of ``out`` that neither operand has becomes an axis of size 1.
    """
    x, x_labels = _sum_alone(x, x_labels, (*y_labels, *out))
    y, y_labels = _sum_alone(y, y_labels, (*x_labels, *out))
    shared = [lab for lab in x_labels if lab in y_labels]
    batch = [lab for lab in shared if lab in out]
    summed = [lab for lab in shared if lab not in out]
    contracting = [x_labels.index(lab) for lab in summed], [y_labels.index(lab) for lab in summed]
    batching = [x_labels.index(lab) for lab in batch], [y_labels.index(lab) for lab in batch]
    labels = batch + [lab for lab in (*x_labels, *y_labels) if lab not in shared]
    x, y, out_sharding = _explicit(x, x_labels, y, y_labels, labels)
    result = lax.dot_general(
        x,
        y,
        (contracting, batching),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    )
    missing = [i for i, lab in enumerate(out) if lab not in labels]
    order = [labels.index(lab) for lab in out if lab in labels]
    if order != sorted(order):
        result = lax.transpose(result, order)
    return lax.expand_dims(result, missing) if missing else result


def _sum_alone(x: jax.Array, labels: Sequence[Any], wanted: Sequence[Any]):
    """Sum over the axes whose label nobody wants."""
    alone = [i for i, lab in enumerate(labels) if lab not in wanted]
    return (x.sum(alone), [lab for lab in labels if lab in wanted]) if alone else (x, labels)


def _explicit(x: jax.Array, x_labels, y: jax.Array, y_labels, out):
    """On a mesh of Explicit axes: ``y`` spread as ``x`` is, and how their product is spread.

    Where one of them is on no such mesh, it is spread as the other is.
    """
    x_spec, y_spec = _jax.explicit_spec(x), _jax.explicit_spec(y)
    if x_spec is None:
        if y_spec is None:
            return x, y, None
        y, x, spread = _explicit(y, y_labels, x, x_labels, out)
        return x, y, spread
    y_spec = [None] * y.ndim if y_spec is None else y_spec
    of_x = dict(zip(x_labels, x_spec, strict=True))
    taken = {name for spec in x_spec for name in _names(spec)}
    wanted = [
        of_x[lab] if lab in of_x else None if taken.intersection(_names(spec)) else spec
        for lab, spec in zip(y_labels, y_spec, strict=True)
    ]
    y = y if wanted == y_spec else jax.sharding.reshard(y, _jax.explicit_sharding(x, wanted))
    by_label = dict(zip(y_labels, wanted, strict=True)) | of_x
    return x, y, _jax.explicit_sharding(x, [by_label[lab] for lab in out])


def _names(spec: Any) -> tuple[str, ...]:
    return spec if isinstance(spec, tuple) else () if spec is None else (spec,)


def spread_like(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x``, which may be of size 1 along some axes, spread over an Explicit mesh as ``y`` is."""
    spec = _jax.explicit_spec(y)
    if spec is None:
        return x
    spec = [s if n != 1 else None for s, n in zip(spec, x.shape, strict=True)]
    return jax.sharding.reshard(x, _jax.explicit_sharding(y, spec))  # x may be on no mesh yet


def aligned(x: jax.Array, labels: Sequence[Any], out: Sequence[Any]) -> jax.Array:
    """``x`` with the axes ``out``, of size 1 where it has none."""
    order = [labels.index(lab) for lab in out if lab in labels]
    x = x.transpose(order) if order != sorted(order) else x
    return lax.expand_dims(x, [i for i, lab in enumerate(out) if lab not in labels])


def times(x: jax.Array, gain: jax.Array, labels: Sequence[int]) -> jax.Array:
    """``x`` by what multiplies its axes ``labels``, in the wider dtype, in ``x``'s dtype."""
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(gain.dtype)
    gain = spread_like(aligned(gain, labels, range(x.ndim)), x)
    if x.dtype == gain.dtype:
        return x * gain
    # checkpointed, or the wider x would be kept for the gradient of the gain
    product = jax.checkpoint(lambda x, gain: (x.astype(gain.dtype) * gain).astype(x.dtype))
    return product(x, gain)


def place(x: jax.Array, labels: Sequence[Any], ranges: Iterable[Range], sizes: Any) -> jax.Array:
    """``x``, which covers these ranges of its labelled axes, as a part of zeros."""
    for r in ranges:
        if r.axis in labels:
            axis = labels.index(r.axis)
            if x.shape[axis] == 1 != r.stop - r.start:  # the same all along the range
                full = (*x.shape[:axis], r.stop - r.start, *x.shape[axis + 1 :])
                x = jnp.broadcast_to(x, full)
            x = pad_axis(x, axis, r.start, sizes[r.axis])
    return x
