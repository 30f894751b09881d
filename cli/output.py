"""What commands print: data on stdout, as a table or as JSON; notes on stderr."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import typer

from ..placement.files import FULL
from ..placement.progress import COMPILE_TIME

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

    from ..placement.progress import Progress as SolveProgress
    from ..placement.step_mix import StepMix

# Progress of long work, on stderr: a bar where a person watches, a line now and then in a pipe or a log.

PULSE = 5.0
"""Seconds between two lines where nobody watches: short work stays quiet."""
LONGEST_PULSE = 20.0
"""While kernels are compiled."""

Update = Callable[[str, float | None], None]
"""Tells what is being done, and which share of it is done (0 to 1) where that is known."""


@contextlib.contextmanager
def working(description: str) -> Iterator[Update]:
    """A progress line while the block runs; yields the function that updates it."""
    state = _Working(description)
    if not sys.stderr.isatty():
        ended = threading.Event()
        pulse = threading.Thread(target=state.tell_until, args=(ended,), daemon=True)
        pulse.start()
        try:
            yield state.update
        finally:
            ended.set()
            pulse.join()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
    from rich.text import Text

    class Time(ProgressColumn):
        """As it passes, between news too."""

        def render(self, _: object) -> Text:
            return Text(state.time)

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), Time())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=None)

        def update(message: str, share: float | None) -> None:
            state.update(message, share)
            progress.update(task, description=message, total=None if share is None else 1.0, completed=share or 0.0)

        yield update


class _Working:
    """What is being done, how much of it is done, and how long the rest will take at the pace so far. What compiling
    takes, once an installation, is no part of the pace."""

    def __init__(self, description: str) -> None:
        self._message, self._began = description, _clock()
        self._share: float | None = None
        self._from: tuple[float, float] | None = None
        self._ends: float | None = None

    def update(self, message: str, share: float | None) -> None:
        now = _clock()
        if share is not None and (self._from is None or self._share is None or share < self._share):
            # Another piece of work, with a pace of its own.
            self._from, self._ends = (now, share), None
        elif share is not None and self._from is not None and share > self._from[1]:
            began, first = self._from
            self._ends = now + (now - began) / (share - first) * (1.0 - share)
        self._message, self._share = message, share

    @property
    def time(self) -> str:
        """`40 %, about 12 s left`, or how long it has taken so far."""
        now, share = _clock(), self._share
        done = f"{now - self._began:.0f} s so far" if share is None else f"{share:.0%}"
        if COMPILE_TIME.is_running:
            return f"{done}, compiling for {COMPILE_TIME.seconds:.0f} s, which is once an installation"
        if share is None or self._ends is None or now > self._ends:
            return done
        return f"{done}, about {self._ends - now:.0f} s left"

    def tell_until(self, ended: threading.Event) -> None:
        pause = PULSE
        while not ended.wait(pause):
            note(f"{self._message}: {self.time}")
            # Compiling tells nothing but that it goes on.
            pause = min(2 * pause, LONGEST_PULSE) if COMPILE_TIME.is_running else PULSE


def _clock() -> float:
    """Seconds that pass while nothing is compiled."""
    return time.monotonic() - COMPILE_TIME.seconds


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
    """Rows of plain values under columns, with lines of remarks below. Columns without titles go without a head.

    whole: lines are not broken, as they hold commands to copy.
    """

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    title: str = ""
    footnotes: Sequence[str] = ()
    whole: bool = False


SCHEMA = 1
"""Version of what --json prints: it rises where a name goes or changes its meaning, and not where one is added."""
RUNNING = ["moeplace"]
"""The name of the command that runs, last."""


def emit(
    data: Any,
    *tables: Table,
    as_json: bool,
    mix: StepMix | None = None,
    closing: Callable[[], Sequence[str]] = tuple,
) -> None:
    """Prints `data` as JSON, or the tables that say the same to a reader. A list goes as the `rows` of an object.

    mix: the steps that figures are about, which come first. closing: gives the lines below the tables, which may take
    a while and which JSON has not.
    """
    if as_json:
        named = data if isinstance(data, Mapping) else {"rows": data}
        if mix is not None:
            named = {"batches": mix.to_dict(), **named}
        data = {"schema": f"moeplace/{RUNNING[-1]}/{SCHEMA}", **named}
        typer.echo(json.dumps(plain(data), indent=2, allow_nan=False))
        return
    if mix is not None:
        typer.echo(_wrapped(mix.text, _width()))
        typer.echo()
    for position, table in enumerate(tables):
        if position:
            typer.echo()
        _print(table)
    for position, line in enumerate(closing()):
        if not position:
            typer.echo()
        typer.echo(_wrapped(line, _width()))


WRITTEN: list[str] = []
"""What the command that runs has written so far: all that is left of it after Ctrl-C."""


def wrote(what: object, *, show: bool = True) -> None:
    """Notes what is on disk from now on, whatever comes. show: at once, where no table will say it."""
    WRITTEN.append(str(what))
    if show:
        note(f"wrote {what}")


INTERRUPTION: list[str] = []
"""What the command that runs has said of Ctrl-C."""


def interrupted(message: str) -> None:
    """Says once what is kept after Ctrl-C."""
    if not INTERRUPTION:
        INTERRUPTION.append(message)
        note(message)


def draw(*pictures: Sequence[str]) -> None:
    """Prints pictures of lines below the tables; their words fit the line."""
    for picture in pictures:
        typer.echo("\n" + "\n".join(line if DRAWN.search(line) else _wrapped(line, _width()) for line in picture))


DRAWN = re.compile("[\u2500-\u259f]{2}")
"""Characters that make a picture beside each other."""


def note(message: str) -> None:
    """One line for the person at the terminal, beside the data."""
    typer.echo(message, err=True)


def os_reason(error: OSError) -> str:
    """What the system says of a file, without its number."""
    if error.strerror is None:
        return str(error)
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if error.errno in FULL:
        return "no space is left where this output, or a temporary file, goes; free some, then repeat"
    return error.strerror


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays unpacked, NaN and infinities as null, moments as ISO 8601 has them."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def pairs(values: Mapping[str, Any], whole: bool = False) -> Table:
    """Names and values, a line each."""
    columns = (Column("name", "", right=False), Column("value", "", right=False))
    return Table(columns, [{"name": name, "value": value} for name, value in values.items()], whole=whole)


@dataclass(frozen=True)
class Decimals:
    """Writes fixed decimals of a value times `scale`."""

    digits: int
    scale: float = 1.0

    def __call__(self, value: float) -> str:
        return f"{value * self.scale:.{self.digits}f}"

    def telling_apart(self, values: Sequence[float]) -> Decimals:
        """With as many more decimals, up to four, as make values that differ by a ten-thousandth read differently."""
        ordered = sorted(value for value in values if isinstance(value, int | float) and math.isfinite(value))
        differing = [(low, high) for low, high in itertools.pairwise(ordered) if high - low > 1e-4 * abs(high)]
        for more in range(4):
            finer = replace(self, digits=self.digits + more)
            if all(finer(low) != finer(high) for low, high in differing):
                return finer
        return replace(self, digits=self.digits + 4)


def number(digits: int) -> Decimals:
    """Fixed decimals."""
    return Decimals(digits)


def figure(value: float) -> str:
    """Four significant digits, or whole where there are more."""
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:#.4g}"


def percent(value: float) -> str:
    return f"{value:.1%}"


milliseconds = Decimals(3, 1e3)
"""Seconds, written in ms."""


def seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def to_the_minute(value: Any) -> str:
    """A moment without its seconds; all else as it is."""
    return value.strftime("%Y-%m-%d %H:%M") if isinstance(value, datetime) else str(value)


def to_the_second(value: Any) -> str:
    """A moment without its fraction and zone."""
    return f"{value:%Y-%m-%d %H:%M:%S}"


def quantity(unit: str) -> Format:
    """A value with a decimal prefix: 3.35 TB/s."""

    def write(value: float) -> str:
        for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return f"{value / size:.3g} {prefix}{unit}"
        return f"{value:.3g} {unit}"

    return write


PIPE_WIDTH = 80
"""Columns of characters where no terminal says how many there are."""


def _width() -> int:
    """Characters in a line: as COLUMNS says, else of the terminal, or for a pipe."""
    if sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else PIPE_WIDTH


def _print(table: Table) -> None:
    from rich.console import Console

    width = _width()
    console = Console(file=sys.stdout, width=width, highlight=False)
    # On a table a title is as narrow as that.
    blocks = [_wrapped(table.title, width)] if table.title else []
    # Columns of nothing are left out where a line says what that means.
    if table.columns and (table.rows or not table.footnotes):
        parts = [_laid_out(part) for part in _parts(table, console)]
        least = max(console.measure(part, options=console.options.update(width=10_000)).minimum for part in parts)
        if least > width and not table.whole and table.rows:
            blocks.append("\n".join(_listed(table, width)))
            parts = []
        console.width = 10_000 if table.whole else max(width, least)
        for part in parts:
            with console.capture() as printed:
                console.print(part)
            # What pads the last column is of no use to anyone, nor are the lines of a frame that is not drawn.
            blocks.append("\n".join(line.rstrip() for line in printed.get().splitlines()).strip("\n"))
    if table.footnotes:
        blocks.append("\n".join(line if table.whole else _wrapped(line, width) for line in table.footnotes))
    typer.echo("\n\n".join(blocks))


def _parts(table: Table, console: Console) -> list[Table]:
    """The table as it fits: as it is, else turned, a line a figure; else in parts below each other, each beginning with
    the first column."""
    wide = console.options.update(width=10_000)

    def fits(part: Table) -> bool:
        return console.measure(_laid_out(part), options=wide).maximum <= console.width

    headed = any(column.title for column in table.columns)
    if not headed or fits(table):
        return [table]
    if fits(turned := _turned(table)):
        return [turned]
    first, *others = table.columns
    parts: list[list[Column]] = [[]]
    for column in others:
        if parts[-1] and not fits(replace(table, columns=[first, *parts[-1], column])):
            parts.append([])
        parts[-1].append(column)
    return [replace(table, columns=[first, *columns]) for columns in parts]


def _listed(table: Table, width: int) -> list[str]:
    """Where not even two columns fit: a line a figure, below what the first column says. Only a word that is longer
    than the line makes it longer."""
    first, *others = table.columns
    titled = first.title or any(column.title for column in others)
    lines = []
    for row in table.rows:
        name = _cell(row.get(first.key), _column_format(first, table.rows))
        figures = [
            (column.title.replace("\n", " "), _cell(row.get(column.key), _column_format(column, table.rows)))
            for column in others
        ]
        if titled:
            lines += [_wrapped(name, width), *(_wrapped(f"  {title}: {figure}", width) for title, figure in figures)]
        else:
            lines.append(_wrapped(f"{name}: {', '.join(figure for _, figure in figures)}", width))
    return lines


def _wrapped(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )


def _laid_out(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    headed = any(column.title for column in table.columns)
    shown = RichTable(
        box=box.SIMPLE_HEAD if headed else None,
        show_header=headed,
        pad_edge=False,
    )
    for column in table.columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        shown.add_column(Text(column.title), justify=justify, vertical="bottom" if headed else "top", overflow="fold")
    writes = [_column_format(column, table.rows) for column in table.columns]
    for row in table.rows:
        cells = (_cell(row.get(column.key), write) for column, write in zip(table.columns, writes, strict=True))
        shown.add_row(*map(Text, cells))
    return shown


def _turned(table: Table) -> Table:
    """The table with rows and columns exchanged."""
    first, *others = table.columns
    heads = [Column(str(i), _cell(row.get(first.key), first.write)) for i, row in enumerate(table.rows)]
    rows = []
    for column in others:
        write = _column_format(column, table.rows)
        figures = {str(i): _cell(row.get(column.key), write) for i, row in enumerate(table.rows)}
        rows.append({"": column.title.replace("\n", " "), **figures})
    return Table([Column("", first.title, right=False), *heads], rows, table.title)


def telling_apart(table: Table) -> list[Column]:
    """The table's columns, with the digits that make their values differ."""
    return [replace(column, write=_column_format(column, table.rows)) for column in table.columns]


def _column_format(column: Column, rows: Sequence[Mapping[str, Any]]) -> Format:
    if not isinstance(column.write, Decimals):
        return column.write
    return column.write.telling_apart([row[column.key] for row in rows if row.get(column.key) is not None])


def _cell(value: Any, write: Format) -> str:
    return "-" if value is None else write(value)
