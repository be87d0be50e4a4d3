"""Print tables on a terminal and in a pipe, JSON, and progress."""

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Advance = Callable[[int, int], None]  # what is done, and the total
_PATH_WIDTH = 28  # where paths have less room, columns are left out


@dataclass(frozen=True)
class Column:
    """Describe a column of a table.

    Attributes:
        name: the header.
        is_number: whether the cells are flush right.
        spare: on a narrow terminal, the columns with the largest number are left out first; 0 is
            never left out.
    """

    name: str
    is_number: bool = True
    spare: int = 0


class Show:
    """Print what a command has to show: tables and lines on stdout, notes and progress on stderr.

    Attributes:
        is_json: whether only the document is printed.
        is_quiet: whether nothing is printed but errors.
    """

    def __init__(self, console: Any = None):
        self.is_json = self.is_quiet = False
        self._console = console

    @property
    def console(self) -> Any:
        """Rich's console, if stdout is a terminal."""
        if self._console is None and sys.stdout.isatty():
            from rich.console import Console

            self._console = Console(highlight=False)
        return self._console

    @property
    def _is_silent(self) -> bool:
        return self.is_json or self.is_quiet

    def document(self, document: Any) -> None:
        """Print a document for programs, with ``--json``."""
        if self.is_json:
            print(json.dumps(plain(document), indent=2, allow_nan=False))

    def line(self, text: str) -> None:
        """Print a line on stdout."""
        if self._is_silent:
            return
        if self.console is None:
            print(text)
        else:
            self.console.print(text, markup=False, soft_wrap=False)

    def note(self, text: str) -> None:
        """Print a note on stderr."""
        if not self.is_quiet:
            print(f"lora-jax: note: {' '.join(text.split())}", file=sys.stderr)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        """Print a table whose first column is a path; nothing if there are no rows."""
        if self._is_silent or not rows:
            return
        if self.console is None:
            print(_piped(columns, rows))
        else:
            self.console.print("", _drawn(columns, rows, self.console.width), "", sep="\n")

    @contextlib.contextmanager
    def progress(self, text: str, *, stays: bool = False) -> Iterator[Advance]:
        """Draw a bar on stderr, if that is a terminal; with ``stays`` it is not removed."""
        is_drawn = self._console is not None or sys.stderr.isatty()
        if self._is_silent or not is_drawn:
            yield lambda done, total: None
            return
        from rich import progress
        from rich.console import Console

        columns = [progress.TextColumn("{task.description}"), progress.BarColumn()]
        columns += [progress.TaskProgressColumn(), progress.TimeElapsedColumn()]
        recorder = self._console if self._console and self._console.record else None
        bar = progress.Progress(
            *columns, console=Console(stderr=True), transient=not stays, disable=bool(recorder)
        )
        with bar:
            task = bar.add_task(text, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        if recorder and stays:  # a picture shows the last frame
            recorder.print(bar.get_renderable())


def plain(x: Any) -> Any:
    """Convert numbers for JSON: NumPy's to Python's, and those that are not finite to None."""
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    if hasattr(x, "item"):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x


def number(x: float | None, form: str = ".4g") -> str:
    """Format a number for a table; None is a dash."""
    return "-" if x is None else format(x, form)


def size(n: float) -> str:
    """Format a number of bytes.

    >>> size(999), size(1_234_567)
    ('999 bytes', '1.23 MB')
    """
    units = ["bytes", "kB", "MB", "GB", "TB"]
    k = min(int(math.log10(max(n, 1)) // 3), len(units) - 1)
    return f"{n:,} bytes" if k == 0 else f"{n / 1000**k:.3g} {units[k]}"


def fold(path: str, width: int) -> str:
    """Shorten a path to a number of characters by leaving out its middle.

    >>> fold("model.layers.11.self_attn.q_proj", 20)
    'model.lay…ttn.q_proj'
    """
    if len(path) <= width:
        return path
    left = (width - 1) // 2
    return f"{path[:left]}…{path[len(path) - (width - 1 - left) :]}"


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    """Measure the widest cell of every column."""
    cells = [[c.name for c in columns], *rows]
    return [max(map(len, column)) for column in zip(*cells, strict=True)]


def _piped(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """Format a table for programs and files: all columns, complete paths."""
    widths = _widths(columns, rows)

    def line(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, columns, strict=True)
        return "  ".join(x.rjust(w) if c.is_number else x.ljust(w) for x, w, c in parts).rstrip()

    return "\n".join(map(line, [[c.name for c in columns], *rows]))


def _drawn(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> Any:
    """Format a table for a terminal of this width: no cell is wrapped, paths are folded."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    kept = list(range(len(columns)))
    widths = _widths(columns, rows)
    gaps = 2  # a space of padding, and one of the box's

    def room() -> int:
        return width - sum(widths[k] + gaps for k in kept[1:])

    while room() < min(widths[0], _PATH_WIDTH) and any(columns[k].spare for k in kept):
        kept.remove(max(kept, key=lambda k: columns[k].spare))
    left = max(room(), 8)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for k in kept:
        column = columns[k]
        style = "cyan" if k == 0 else None
        justify = "right" if column.is_number else "left"
        wide = min(widths[0], left) if k == 0 else widths[k]
        table.add_column(column.name, justify=justify, style=style, no_wrap=True, min_width=wide)
    for row in rows:
        cells = [fold(row[k], left) if k == 0 else row[k] for k in kept]
        table.add_row(*map(Text, cells))
    return table
