"""What a function does with each of its weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Weight:
    """What a function does with one weight, as ``layout_of`` saw it.

    Attributes:
        shape: of the weight.
        dtype: of the weight.
        layout: its letters, one an axis; None if it cannot take a LoRA.
        kind: ``"dot"``, ``"conv"``, ``"embedding"`` or ``"ragged"``; None as ``layout``.
        uses: what reads it, and where: ``"dot_general at model.py:41 (Mlp.__call__): y = ..."``.
        why_not: why it cannot take a LoRA; None if it can.
    """

    shape: tuple[int, ...]
    dtype: Any
    layout: str | None
    kind: str | None
    uses: tuple[str, ...]
    why_not: str | None


class Layouts(Mapping[str, str]):
    """The layouts of a function's weights by path, for ``lorafy(params, layout=...)``.

    A mapping from the path of every weight that can take a LoRA to its letters. Printed, it is a
    table of all weights, with the reasons of those that cannot.

    Attributes:
        weights: :class:`Weight` by path, of every leaf.
    """

    def __init__(self, weights: Mapping[str, Weight]):
        self.weights = dict(weights)

    def __getitem__(self, path: str) -> str:
        letters = self.weights[path].layout
        if letters is None:
            raise KeyError(path)
        return letters

    def __iter__(self) -> Iterator[str]:
        return (path for path, weight in self.weights.items() if weight.layout is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        rows = [("path", "shape", "kind", "layout", "uses")]
        for path, w in self.weights.items():
            shape = "x".join(map(str, w.shape)) or "()"
            said = str(len(w.uses)) if w.why_not is None else w.why_not
            rows.append((path, shape, w.kind or "-", w.layout or "-", said))
        return table(rows)


def table(rows: Sequence[Sequence[str]], right: int = 99) -> str:
    """Rows of cells under a header, in columns; those from ``right`` on are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i >= right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
