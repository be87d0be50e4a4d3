"""Count the collectives and matrix products of a compiled program from its text, loops included.

``cost_analysis()`` counts the body of a loop once. A text search for ``all-gather(`` counts an
asynchronous one up to three times: where it starts, runs and is awaited. The functions here count
each operation as often as it runs. All sizes are per device.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)(.*)")
_CALLEES = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|\S+)")


@dataclass(frozen=True)
class Instruction:
    """A line of a program: ``name = type op(operands), attributes``."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Collective:
    """An operation that moves data between devices.

    Attributes:
        kind: one of ``KINDS``.
        bytes: the larger of its input and its output on one device, per run.
        times: how often it runs.
        types: the types of its output.
    """

    kind: str
    bytes: int
    times: int
    types: str


def collectives(hlo: str) -> list[Collective]:
    """List the collectives of a compiled program, ``compiled.as_text()``.

    Raises:
        ValueError: a loop's trip count cannot be read.
    """
    program, entry = _parse(hlo)
    runs = list(_runs(program, entry, 1))
    begun = {
        _channel(x) for name, _ in runs if _begins(program[name]) for x in program[name].values()
    }
    found = []
    for name, times in runs:
        for x in program[name].values():
            kind = x.op.removesuffix("-start")
            # All parts of an asynchronous collective have its channel, also those in loops of other
            # work; it runs as often as it begins.
            if kind not in KINDS or (_channel(x) in begun - {None} and not _begins(program[name])):
                continue
            if name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # its name in programs for TPUs
            inputs = sum(_bytes(program[name][operand].type) for operand in x.operands)
            outputs = _bytes(x.type)
            if x.op.endswith("-start"):  # a tuple of inputs, outputs and contexts
                outputs -= inputs + 4 * x.type.count("u32[]")
            found.append(Collective(kind, max(inputs, outputs), times, x.type))
    return found


def _begins(computation: Computation) -> bool:
    """Return whether an asynchronous collective begins here."""
    return any('"AsyncCollectiveStart"' in x.attributes for x in computation.values())


def _channel(x: Instruction) -> str | None:
    channel = re.search(r"channel_id=(\d+)", x.attributes)
    return channel and channel[1]


def matmul_flops(hlo: str) -> int:
    """Count the FLOPs of the matrix products and convolutions of a compiled program per device.

    Raises:
        ValueError: a loop's trip count cannot be read.
    """
    program, entry = _parse(hlo)
    total = 0
    for name, times in _runs(program, entry, 1):
        for x in program[name].values():
            if x.op == "convolution":
                total += times * _convolution_flops(x, program[name])
            elif x.op == "dot":
                total += times * _dot_flops(x, program[name])
    return total


def _parse(hlo: str) -> tuple[dict[str, Computation], str]:
    """Parse the computations by name, and the name of the entry computation."""
    program: dict[str, Computation] = {}
    entry, inside = "", None
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) \(.*-> .* \{$", line):
            inside = program[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif inside is not None and (found := _INSTRUCTION.match(line)):
            name, kind, op, operands, attributes = found.groups()
            names = re.findall(r"%([\w.-]+)", operands) if op != "constant" else [operands]
            inside[name] = Instruction(name, kind, op, tuple(names), attributes)
    if not entry:
        raise ValueError("the text of a compiled program has no ENTRY: pass compiled.as_text()")
    return program, entry


def _runs(program: dict[str, Computation], name: str, times: int) -> Iterator[tuple[str, int]]:
    """Yield each computation that runs, and how often; all branches count."""
    yield name, times
    for x in program[name].values():
        if x.op == "while":
            body = re.search(r"body=%?([\w.-]+)", x.attributes)[1]
            yield from _runs(program, body, times * _trip_count(x, program, name))
        elif x.op in ("fusion", "call", "conditional", "async-start"):
            for callees in _CALLEES.findall(x.attributes):
                for callee in re.findall(r"%([\w.-]+)", callees):
                    yield from _runs(program, callee, times)


def _trip_count(loop: Instruction, program: dict[str, Computation], name: str) -> int:
    """Return the trip count of a loop to a constant, such as ``scan`` and ``fori_loop`` make.

    The step may be above one: a product with a piecewise operand takes two pieces at a time.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = program[re.search(r"condition=%?([\w.-]+)", loop.attributes)[1]]
    body = program[re.search(r"body=%?([\w.-]+)", loop.attributes)[1]]
    starts, ends = program[name][loop.operands[0]].operands, list(body.values())[-1].operands

    def value(x: Instruction, inside: Computation, counter: int | None = None) -> int:
        """Evaluate a constant; with ``counter``, what is added to that part of the loop's state."""
        if x.op in ("copy", "bitcast", "copy-done", "copy-start"):
            return value(inside[x.operands[0]], inside, counter)
        if x.op == "constant":
            return int(x.operands[0])
        if x.op == "add":
            return sum(value(inside[operand], inside, counter) for operand in x.operands)
        if x.op == "get-tuple-element" and inside is not program[name]:
            if (part := _index(x)) == counter:
                return 0
            return value(program[name][starts[part]], program[name])
        raise ValueError(f"{x.name} is {x.op}")

    try:
        test = next(x for x in condition.values() if x.op == "compare")
        counter = _index(condition[test.operands[0]])
        first = value(program[name][starts[counter]], program[name])
        last = value(condition[test.operands[1]], condition)
        step = value(body[ends[counter]], body, counter)
        if "direction=LT" not in test.attributes:
            raise ValueError(f"{test.name} is not <")
        return -(-(last - first) // step)
    except (StopIteration, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"the trip count of the loop {loop.name!r} cannot be read") from error


def _index(x: Instruction) -> int:
    return int(re.search(r"index=(\d+)", x.attributes)[1])


def _shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """Parse the arrays of a type: ``(bf16[2,3]{1,0:T(8,128)}, s32[])`` has two."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", kind)
    return [(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in found]


def _bytes(kind: str) -> int:
    total = 0
    for dtype, shape in _shapes(kind):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])  # bf16, u4, f8e4m3fn
        total += -(-bits * math.prod(shape) // 8)
    return total


def _dot_flops(x: Instruction, inside: Computation) -> int:
    ((_, left),) = _shapes(inside[x.operands[0]].type)
    axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)[1]
    ((_, out),) = _shapes(x.type)
    return 2 * math.prod(out) * math.prod(left[int(axis)] for axis in axes.split(",") if axis)


def _convolution_flops(x: Instruction, inside: Computation) -> int:
    """Count a convolution's FLOPs; on TPUs, a product is one whose batch axes are spatial axes."""
    ((_, left),) = _shapes(inside[x.operands[0]].type)
    ((_, right),) = _shapes(inside[x.operands[1]].type)
    ((_, out),) = _shapes(x.type)
    lhs, rhs, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes).groups()
    window = re.search(r"window=\{(.*?)\}", x.attributes)
    settings = dict(re.findall(r"(\w+)=(\S+)", window[1] if window else ""))
    axes = [letter for letter in lhs if letter.isdigit()]

    def setting(name: str, axis: str) -> int:
        if name not in settings:
            return 0 if name == "pad" else 1
        return int(settings[name].split("x")[int(axis)].split("_")[0])  # the first number of a pad

    products = 1
    for axis in axes:
        sizes = left[lhs.index(axis)], right[rhs.index(axis)], out[result.index(axis)]
        names = ("stride", "pad", "lhs_dilate", "rhs_dilate")
        products *= _valid(*sizes, *(setting(name, axis) for name in names))
    groups = re.search(r"batch_group_count=(\d+)", x.attributes)
    batch = left[lhs.index("b")] // (int(groups[1]) if groups else 1)
    return 2 * products * batch * right[rhs.index("i")] * out[result.index("f")]


def _valid(size: int, taps: int, out: int, stride: int, low: int, inner: int, outer: int) -> int:
    """Count the pairs of a place in the result and one in the window that read an entry."""
    places = (i * stride + tap * outer - low for tap in range(taps) for i in range(out))
    return sum(at % inner == 0 and 0 <= at <= (size - 1) * inner for at in places)
