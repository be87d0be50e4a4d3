"""Arrays with labelled axes, and the member of a stack that counts, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import error, tolerance

from lora_jax._transform.labelled import Axis, Labelled, contract, place, times
from lora_jax._transform.pick import Slot
from lora_jax._weights.ranges import Range


def numbers(*shape):
    return np.random.default_rng(shape).normal(size=shape)


def compare(cases):
    """Run functions of Labelled arrays: ``{name: (f, arrays, expected, labels)}``."""
    fs = [f for f, *_ in cases.values()]
    arrays = jax.tree.map(np.float32, [xs for _, xs, *_ in cases.values()])
    results = jax.jit(lambda arrays: [f(*xs) for f, xs in zip(fs, arrays, strict=True)])(arrays)
    for (name, (_, _, expected, labels)), actual in zip(cases.items(), results, strict=True):
        assert actual.labels == tuple(labels), name
        assert error(actual.array, expected) <= tolerance(), name


def test_axes_by_label():
    x, rank = numbers(2, 3, 4), Axis.RANK
    labels = (0, rank, "x")
    labelled = Labelled(x, labels)
    aligned = lambda x: Labelled(x.aligned((rank, 5, "x", 0)), (1, 2, 3, 4))  # noqa: E731
    cases = [
        (lambda x: x.front("x"), x.transpose(2, 0, 1), ("x", 0, rank)),
        (lambda x: x.front(1), x, labels),
        (lambda x: x.sum((0, 7)), x.sum(0), (rank, "x")),
        (lambda x: x.along("x", jnp.flip), x[..., ::-1], labels),
        (lambda x: x.along(1, jnp.flip), x, labels),
        (lambda x: x.broadcast({1: 5}), np.broadcast_to(x, (5, 2, 3, 4)), (1, *labels)),
        (lambda x: x.scaled(jnp.float32(3)), 3 * x, labels),
        (aligned, x.transpose(1, 2, 0)[:, None], (1, 2, 3, 4)),
        (lambda x: x.relabel({0: 4, "x": 0}), x, (4, rank, 0)),
    ]
    compare({str(k): (f, [labelled], *expected) for k, (f, *expected) in enumerate(cases)})
    assert labelled.sizes == {0: 2, rank: 3, "x": 4}
    with pytest.raises(KeyError):
        labelled.relabel({0: 1})


def test_products_and_places_by_label():
    x, gain, part = numbers(2, 3, 4), numbers(4, 2), numbers(1, 3)
    ranges = [Range(0, 2, 4), Range(1, 1, 4), Range(2, 0, 1)]
    placed = np.zeros((6, 5))
    placed[2:4, 1:4] = part
    operands = [Labelled(x, (0, 1, "x")), Labelled(gain, ("x", 0))]
    place_part = lambda x: place(x, ranges, (6, 5, 3))  # noqa: E731
    compare(
        {
            "times": (times, operands, x * gain.T[:, None], (0, 1, "x")),
            "place": (place_part, [Labelled(part, (0, 1))], placed, (0, 1)),
        }
    )


def test_contract_agrees_with_einsum():
    size = {"a": 2, "b": 3, "c": 4, "d": 5}
    axes = ["ab", "abc", "ca", "cd", "dba"]
    kind = {"precision": None, "dtype": jnp.float32}
    cases = {}
    for x in axes:
        for y in axes:
            out = "".join(sorted(set(x + y)))[::-1][1:]
            operands = [Labelled(numbers(*map(size.get, z)), tuple(z)) for z in (x, y)]
            expected = np.einsum(f"{x},{y}->{out}", *(z.array for z in operands))
            f = lambda x, y, out=out: contract(x, y, out, **kind)  # noqa: E731
            cases[f"{x},{y}->{out}"] = f, operands, expected, out
    compare(cases)


def test_a_slot_picks_its_member_and_its_step():
    x, scales = numbers(3, 4, 2).astype(np.float32), np.float32([1, 2, 3])
    labelled = Labelled(x, (Axis.MEMBER, Axis.STEP, 0))
    inner = Labelled(x, (Axis.STEP, Axis.MEMBER, 0))
    stepping = Slot(0, 2).stepping(inner)
    assert stepping.labels == (Axis.MEMBER, Axis.STEP)
    np.testing.assert_array_equal(stepping.array, x[2])

    def picked(index, labelled, scales):
        slot = Slot(index, 3)
        return slot.picker(3)(labelled).array, slot.scale(scales)

    picked = jax.vmap(picked, (0, None, None))
    arrays, found = jax.jit(picked)(np.array([0, 2, -1, 3]), labelled, scales)
    expected = np.stack([x[0, 3], x[2, 3], 0 * x[0, 3], 0 * x[0, 3]])
    assert error(arrays, expected) <= tolerance()
    np.testing.assert_array_equal(found, [1, 3, 0, np.nan])
