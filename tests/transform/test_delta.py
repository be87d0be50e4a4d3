"""Deltas and probes under the methods that rules call: updates against NumPy, and places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import error, tolerance

from lora_jax import Factors
from lora_jax._transform.delta import Delta
from lora_jax._transform.labelled import Axis, Labelled
from lora_jax._transform.origin import Leaf
from lora_jax._transform.probe import Probe
from lora_jax._transform.record import Record
from lora_jax._transform.regroup import axis_groups
from lora_jax._transform.use import Use
from lora_jax._weights.ranges import Range

SHAPE, LEAF, RANGE = (2, 6, 3, 4), Leaf(0, "w"), Range(1, 1, 3)
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 2, 5)), RNG.normal(size=(2, 5, 3, 4))  # of W[:, 1:3]
UPDATE = np.zeros(SHAPE)
UPDATE[:, 1:3] = 0.5 * np.einsum("bir,brop->biop", A, B)
GROUPS = {shape: axis_groups(SHAPE, shape) for shape in [(2, 6, 12), (2, 2, 3, 3, 4), (12, 3, 4)]}

# Methods, the shape of W afterwards, and what they make of the dense update
METHODS = {
    "move": (lambda d: d.moved({0: 3, 1: 0, 2: 1, 3: 2}, 4), (6, 3, 4, 2), (1, 2, 3, 0)),
    "pad": (lambda d: d.padded([1, 2], SHAPE), SHAPE, None),
    "range": (lambda d: d.with_range(1, 0, 2, 4), (2, 4, 3, 4), lambda u: np.roll(u, -1, 1)[:, :4]),
    "merge": (lambda d: d.regrouped(GROUPS[2, 6, 12], SHAPE, (2, 6, 12)), (2, 6, 12), None),
    "split": (
        lambda d: d.regrouped(GROUPS[2, 2, 3, 3, 4], SHAPE, (2, 2, 3, 3, 4)),
        (2, 2, 3, 3, 4),
        None,
    ),
    "scale": (lambda d: d.scaled(lambda x: -x), SHAPE, lambda u: -u),
    "times": (
        lambda d: d.times(Labelled(jnp.arange(6.0), (1,)), SHAPE, jax.lax.mul),
        SHAPE,
        lambda u: u * np.arange(6).reshape(6, 1, 1),
    ),
    "sum": (lambda d: d.summed([1], SHAPE).moved({0: 0, 2: 1, 3: 2}, 3), (2, 3, 4), "sum"),
}  # fmt: skip


def delta():
    factors = Factors(A.astype(np.float32), B.astype(np.float32), 0.5, "bioo")
    return Delta.of(factors, LEAF, [RANGE])


def of(change, shape):
    if change == "sum":
        return UPDATE.sum(1)
    if isinstance(change, tuple):
        return UPDATE.transpose(change)
    return (UPDATE if change is None else change(UPDATE)).reshape(shape)


def test_the_update_follows_the_weight():
    def dense(delta):
        return [method(delta).dense(shape, jnp.float32) for method, shape, _ in METHODS.values()]

    for name, actual in zip(METHODS, jax.jit(dense)(delta()), strict=True):
        _, shape, change = METHODS[name]
        assert error(actual, of(change, shape)) <= tolerance(), name


@pytest.mark.parametrize("name", [name for name in METHODS if name != "merge"])
def test_a_probe_goes_where_the_update_goes(name):
    method, *_ = METHODS[name]
    probe = Probe.of(LEAF, 4).with_range(1, 1, 3, 6)
    expected, found = jax.eval_shape(method, delta()), method(probe)
    assert found.ranges == expected.ranges
    assert found.origin == expected.origin._replace(batch=frozenset())


def test_axes_of_different_roles_do_not_merge():
    method = lambda d: d.regrouped(GROUPS[12, 3, 4], SHAPE, (12, 3, 4))  # noqa: E731
    assert jax.eval_shape(method, delta()) is None
    assert METHODS["merge"][0](Probe.of(LEAF, 4)) is None
    merged = Probe.of(LEAF, 4).merged(GROUPS[12, 3, 4], 3)
    assert merged.origin.axes == ((0, 1), (2,), (3,))


def test_what_is_read():
    update, probe = jax.eval_shape(lambda: delta()), Probe.of(LEAF, 4)
    assert not update.is_read
    assert not probe.is_read
    assert update.marked("read", [1]).is_lookup
    assert not probe.marked("read", [1]).is_lookup  # three axes are left: perhaps a kernel
    assert update.marked("picked", [2, 3]).is_read
    assert not probe.marked("picked", [2, 3]).is_read
    assert update.marked("picked", [0, 1]).axes_read == {1}  # of layers, one is picked
    assert probe.marked("read", [1]).marked("summed", [2]).axes_read == {1, 2}


def test_arrays_with_axis_0_in_front():
    update = jax.eval_shape(lambda: delta().moved({0: 3, 1: 0, 2: 1, 3: 2}, 4).leading())
    assert update.a.labels == (0, 3, Axis.RANK)
    assert update.a.array.shape == (2, 2, 5)
    assert update.b.labels == (3, Axis.RANK, 1, 2)


def test_a_record_goes_back():
    record, leaf = Record(), Leaf(0, "w")
    use = Use(leaf, "dot_general", frozenset({0}), frozenset({1}), ())
    record.add(use)
    record.add(use)  # another range of the weight
    record.spend(leaf, 3)
    before = record.snapshot()
    record.add(Use(leaf, "add", frozenset(), frozenset(), (), why="adds"))
    record.spend(leaf, 4)
    record.entered.add("body")
    assert [use.why for use in record.materialized] == ["adds"]
    record.rollback(before)
    assert record == Record([use], {leaf: 3})
