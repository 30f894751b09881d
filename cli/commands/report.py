"""`moeplace report`: a comparison as a page."""

from __future__ import annotations

import re
import shlex
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...placement.errors import InputError
from ..options import AsJson, ComparisonOptions, RoutingPath, output_file, output_option
from ..output import wrote
from ..run_comparison import Comparison, run_comparison
from ..save import attempted, end_unwritten
from .compare import routing_tokens, show_comparisons


def report_command(
    routing: RoutingPath,
    output: Annotated[Path, output_option("FILE", "HTML file to write.", output_file)],
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
    from ...placement.decide import read_other_ms
    from ..report import build_report, write_page

    other = None if options.other_ms is None else read_other_ms(options.other_ms)
    restart = options.restart_seconds
    comparisons = run_comparison(routing, options)
    if len(comparisons) > 1:
        raise InputError("a report is of one --pool; `moeplace compare` sets both in one output")
    [comparison] = comparisons
    page = build_report(comparison, before, after, provenance(comparison, routing), comparison.verdict(other, restart))
    _, unwritten = attempted(partial(write_page, page, output))
    if unwritten is None:
        wrote(output)
    show_comparisons(comparisons, other, as_json, restart)
    end_unwritten(unwritten)


def provenance(comparison: Comparison, routing: Path) -> list[tuple[str, str]]:
    """Where the figures come from, by name."""
    from ...placement.step_mix import step_mix
    from ...placement.version import __version__

    problem, split = comparison.problem, comparison.split
    solved = [
        f"{entry.name} (seed {entry.plan.provenance.seed}, {entry.plan.provenance.stop})"
        for entry in comparison.entries
        if entry.plan is not None
    ]
    return [
        (
            "Routing",
            f"{routing.name}: {routing_tokens(split.train):,} tokens solved on, "
            f"{routing_tokens(split.judged):,} judged on",
        ),
        ("Solved on", f"SHA-256 {problem.statistics.fingerprint}"),
        ("Judged on", f"SHA-256 {split.judged.fingerprint}"),
        ("Split", split.description),
        ("Steps", step_mix(problem).text.removeprefix("Steps: ")),
        ("Replayed", ", ".join(f"{steps.num_steps} of {kind}" for kind, steps in comparison.kinds.items())),
        ("Objective", ", ".join(f"{key} {value}" for key, value in problem.objective.model_dump().items())),
        ("Plans", ", ".join(solved)),
        ("Version", f"moeplace {__version__}, Python {sys.version.split()[0]}"),
        ("Written", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Command", shlex.join(["moeplace", *map(without_folders, sys.argv[1:])])),
    ]


def without_folders(argument: str) -> str:
    """An argument as others may read it: of paths, alone, in lists or after `=`, their last part; of addresses, what is
    no secret."""
    if "://" in argument:
        return ADDRESS.sub(r"\1://...", argument)
    return ",".join(
        f"{option}{equals}{SEPARATOR.split(value.rstrip('/'))[-1]}"
        for part in argument.split(",")
        for option, equals, value in [part.rpartition("=")]
    )


ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://.*")
SEPARATOR = re.compile(r"[/\\]")
