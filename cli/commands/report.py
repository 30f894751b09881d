"""`moeplace report`: a comparison as a page."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from ...placement.errors import InputError
from ..options import AsJson, ComparisonOptions, RoutingPath
from ..output import emit, note
from ..run_comparison import Comparison, CountComparison, run_comparison
from ..tables import comparison_rows, comparison_tables
from .compare import comparison_data


def report_command(
    routing: RoutingPath,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.", show_default=False)],
    options: ComparisonOptions,
    before: Annotated[
        str | None,
        typer.Option(
            "--before",
            help="Plan to set out from: a solver or plan of this comparison. Default: the first of --plans, "
            "else contiguous.",
            show_default=False,
        ),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option("--after", help="Plan to show against it. Default: the best of the others.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare as `moeplace compare` does, and also write one HTML page with table and plots.

    The page holds everything it needs and opens without a network: load by layer and device, traffic between
    devices, expert affinity, step times.

    Example:

      moeplace report trace --topology h100-hgx --nodes 2 --devices-per-node 4 -o report.html
    """
    from ..report.build import build_report
    from ..report.page import write_page

    comparison = run_comparison(routing, options)
    if isinstance(comparison, CountComparison):
        raise InputError(f"{routing} holds counts only, a report is of step times; `moeplace compare` judges counts")
    write_page(build_report(comparison, before, after, provenance(comparison, routing)), output)
    note(f"wrote {output}")
    rows = comparison_rows(comparison)
    emit(comparison_data(comparison, rows), *comparison_tables(comparison, rows), as_json=as_json)


def provenance(comparison: Comparison, routing: Path) -> list[tuple[str, str]]:
    """Where the figures come from, by name."""
    from ...placement.version import __version__

    problem, split = comparison.problem, comparison.split
    solved = [
        f"{entry.name} (seed {entry.plan.provenance.seed}, {entry.plan.provenance.stop})"
        for entry in comparison.entries
        if entry.plan is not None
    ]
    return [
        ("Routing", f"{routing}: {split.train.num_tokens:,} tokens solved on, {split.judged.num_tokens:,} judged on"),
        ("Solved on", f"SHA-256 {problem.statistics.fingerprint}"),
        ("Judged on", f"SHA-256 {split.judged.fingerprint}"),
        ("Split", split.description),
        ("Steps", ", ".join(f"{steps.num_steps} of {kind}" for kind, steps in comparison.steps.items())),
        ("Objective", ", ".join(f"{key} {value}" for key, value in problem.objective.model_dump().items())),
        ("Plans", ", ".join(solved)),
        ("Version", f"moeplace {__version__}, Python {sys.version.split()[0]}"),
        ("Written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Command", shlex.join(["moeplace", *sys.argv[1:]])),
    ]
