"""Record the use that a function makes of each weight."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Weight:
    """The use that a function makes of one weight, as ``layout_of`` saw it.

    Attributes:
        shape: the shape of the weight.
        dtype: the dtype of the weight.
        layout: one letter per axis; None if the weight cannot take a LoRA.
        kind: ``"dot"``, ``"conv"``, ``"embedding"`` or ``"ragged"``; None if ``layout`` is.
        uses: the operations that read the weight, with their places:
            ``"dot_general at model.py:41 (Mlp.__call__): y = ..."``.
        why_not: the reason why it cannot take a LoRA; None if it can.
    """

    shape: tuple[int, ...]
    dtype: Any
    layout: str | None
    kind: str | None
    uses: tuple[str, ...]
    why_not: str | None


class Layouts(Mapping[str, str]):
    """The batch, input and output axes of a function's weights, for ``lorafy(layout=...)``.

    A mapping from paths to letters, for the weights that can take a LoRA. Its repr is a table of
    all weights, which gives a reason for each that cannot.

    Attributes:
        weights: a :class:`Weight` for every leaf, by path.
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
            uses = str(len(w.uses)) if w.why_not is None else w.why_not
            rows.append((path, shape, w.kind or "-", w.layout or "-", uses))
        return table(rows)


def table(rows: Sequence[Sequence[str]], right: int = 99) -> str:
    """Format cells in columns under a header; columns from ``right`` on are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i >= right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
