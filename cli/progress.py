"""Progress of long work, on stderr, and only where a person watches: a pipe or a log stays quiet."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..solvers.base import Progress as SolveProgress

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
