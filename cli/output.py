"""What commands print: data on stdout, as a table or as JSON; notes on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from ..solvers.base import Progress as SolveProgress

# Progress of long work, on stderr, and only where a person watches: a pipe or a log stays quiet.


Update = Callable[[str, float | None], None]
"""Tells what is being done, and which share of it is done (0 to 1) where that is known."""


@contextlib.contextmanager
def working(description: str) -> Iterator[Update]:
    """A progress line while the block runs; yields the function that updates it."""
    if not sys.stderr.isatty():
        yield lambda message, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=None)

        def update(message: str, share: float | None) -> None:
            progress.update(
                task,
                description=message,
                total=None if share is None else 1.0,
                completed=0.0 if share is None else share,
            )

        yield update


def solve_listener(update: Update, label: str, seconds: float) -> Callable[[SolveProgress], None]:
    """Shows a solve's news: its best value, its bound, and how much of its time is spent."""

    def listen(progress: SolveProgress) -> None:
        value = "" if progress.value is None else f" {progress.value:.5g}"
        bound = "" if progress.bound is None else f", bound {progress.bound:.5g}"
        update(f"{label}{value}{bound} {progress.message}".rstrip(), min(1.0, progress.seconds / seconds))

    return listen


Format = Callable[[Any], str]


@dataclass(frozen=True)
class Column:
    """A column of a table: the key it shows of each row, its heading, and how a value is written.

    A row that lacks the key, or holds None there, shows a dash.
    """

    key: str
    title: str
    write: Format = str
    right: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of plain values under columns, with lines of remarks below. Columns without titles go without a head."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    title: str = ""
    footnotes: Sequence[str] = ()


def emit(data: Any, *tables: Table, as_json: bool) -> None:
    """Prints `data` as JSON, or the tables that say the same to a reader."""
    if as_json:
        typer.echo(json.dumps(plain(data), indent=2, allow_nan=False))
        return
    for position, table in enumerate(tables):
        if position:
            typer.echo()
        _print(table)


def note(message: str) -> None:
    """One line for the person at the terminal, beside the data."""
    typer.echo(message, err=True)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy scalars and arrays unpacked, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def pairs(values: Mapping[str, Any]) -> Table:
    """Names and values, a line each."""
    columns = (Column("name", "", right=False), Column("value", "", right=False))
    return Table(columns, [{"name": name, "value": value} for name, value in values.items()])


def number(digits: int) -> Format:
    """Fixed decimals."""
    return lambda value: f"{value:.{digits}f}"


def figure(value: float) -> str:
    """Four significant digits, or whole where there are more."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:#.4g}"


def percent(value: float) -> str:
    return f"{value:.1%}"


def milliseconds(value: float) -> str:
    """Seconds, written in ms."""
    return f"{value * 1e3:.3f}"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def quantity(unit: str) -> Format:
    """A value with a decimal prefix: 3.35 TB/s."""

    def write(value: float) -> str:
        for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return f"{value / size:.3g} {prefix}{unit}"
        return f"{value:.3g} {unit}"

    return write


def _print(table: Table) -> None:
    from rich.console import Console
    from rich.text import Text

    terminal = sys.stdout.isatty()
    # In a pipe nothing is cut or wrapped: the reader is a file or a tool.
    console = Console(file=sys.stdout, width=None if terminal else 10_000, highlight=False, soft_wrap=not terminal)
    if table.columns:
        shown = _laid_out(table)
        if any(column.title for column in table.columns):
            wide = console.options.update(width=10_000)
            turned = _laid_out(_turned(table))
            width, width_turned = (console.measure(way, options=wide).maximum for way in (shown, turned))
            if width > console.width and width_turned < width:
                # A line a figure, a column a row. What is too wide both ways the terminal wraps.
                shown, width = turned, width_turned
            console.width = max(console.width, width)
        console.print(shown)
    for line in table.footnotes:
        console.print(Text(line))


def _laid_out(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    headed = any(column.title for column in table.columns)
    shown = RichTable(
        box=box.SIMPLE_HEAD if headed else None,
        show_header=headed,
        title=Text(table.title) if table.title else None,
        title_justify="left",
        pad_edge=False,
    )
    for column in table.columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        shown.add_column(Text(column.title), justify=justify, vertical="bottom" if headed else "top")
    for row in table.rows:
        shown.add_row(*(Text(_cell(row.get(column.key), column.write)) for column in table.columns))
    return shown


def _turned(table: Table) -> Table:
    """The table with rows and columns exchanged."""
    first, *others = table.columns
    heads = [Column(str(i), _cell(row.get(first.key), first.write)) for i, row in enumerate(table.rows)]
    rows = [
        {"": column.title.replace("\n", " ")}
        | {str(i): _cell(row.get(column.key), column.write) for i, row in enumerate(table.rows)}
        for column in others
    ]
    return Table([Column("", first.title, right=False), *heads], rows, table.title)


def _cell(value: Any, write: Format) -> str:
    return "-" if value is None else write(value)
