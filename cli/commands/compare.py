"""`moeplace compare`: several solvers, one table, on routing that none of them saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ..options import AsJson, ComparisonOptions, Plot, PlotFile, RoutingPath, output_folder
from ..output import emit, wrote
from ..plots import comparison_drawings, show
from ..run_comparison import Comparison, Entry, run_comparison
from ..save import attempted, end_unwritten
from ..tables import comparison_rows, comparison_tables

if TYPE_CHECKING:
    from ...placement.statistics import RoutingStatistics
    from ...placement.trace import RoutingTrace


def compare_command(
    routing: RoutingPath,
    options: ComparisonOptions,
    output: Annotated[
        Path | None,
        Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Write each solver's plan into this folder, which is made where it is not there.",
            show_default=False,
            callback=output_folder,
        ),
    ] = None,
    plot: Plot = False,
    plot_file: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Solve with several solvers and judge their plans on held-out routing.

    Each solver sees the training part only; all plans are replayed on the same steps made from the rest, and a sentence
    says whether a change is worth it. Steps are those of --batch, for which solvers that minimise step times solve.
    Of counts, steps are drawn from held-out windows. A solver that cannot serve the problem gets a line that says why.

    Example:

      moeplace compare trace --topology h100-hgx --nodes 2 --devices-per-node 4 --solvers eplb,exflow,search
    """
    from ...placement.decide import read_other_ms

    other = None if options.other_ms is None else read_other_ms(options.other_ms)
    comparisons = run_comparison(routing, options)
    unwritten = None
    for comparison in comparisons:
        if output is not None:
            folder = output / comparison.pool if comparison.pool else output
            _, failed = attempted(partial(save_plans, comparison.entries, folder))
            unwritten = unwritten or failed
    show_comparisons(comparisons, other, as_json, options.restart_seconds)
    if plot or plot_file:
        drawings = [
            drawing
            for comparison in comparisons
            for drawing in comparison_drawings(comparison, comparison.sides, comparison.pool)
        ]
        show(drawings, plot_file, plot and not as_json)
    end_unwritten(unwritten)


def show_comparisons(
    comparisons: Sequence[Comparison],
    other_ms: Mapping[str, float] | None,
    as_json: bool,
    restart_seconds: float | None = None,
) -> None:
    """Prints comparisons, of several pools one after the other."""
    from ...placement.step_mix import step_mix

    data = [
        comparison_data(comparison, comparison_rows(comparison), other_ms, restart_seconds)
        for comparison in comparisons
    ]
    if as_json and len(comparisons) > 1:
        pools = {
            comparison.pool: {"batches": step_mix(comparison.problem).to_dict(), **each}
            for comparison, each in zip(comparisons, data, strict=True)
        }
        emit({"pools": pools}, as_json=True)
        return
    for comparison, each in zip(comparisons, data, strict=True):
        emit(
            each,
            *comparison_tables(comparison, each["rows"]),
            as_json=as_json,
            mix=step_mix(comparison.problem),
            closing=partial(comparison.verdict, other_ms, restart_seconds),
        )


def comparison_data(
    comparison: Comparison,
    rows: list[dict[str, Any]],
    other_ms: Mapping[str, float] | None = None,
    restart_seconds: float | None = None,
) -> dict[str, Any]:
    """The comparison as JSON has it. other_ms, restart_seconds: as `Comparison.verdict` takes them."""
    from ...placement.cost import prediction_basis

    problem, split = comparison.problem, comparison.split
    return {
        "model": problem.model.model_dump(mode="json"),
        "topology": {
            "name": problem.topology.name,
            "nodes": problem.topology.num_nodes,
            "devices": problem.topology.num_devices,
        },
        "slots": problem.num_slots,
        "prediction": prediction_basis(problem.model, problem.topology, problem.objective).text,
        "objective": problem.objective.model_dump(mode="json"),
        "routing": {
            "train_fingerprint": problem.statistics.fingerprint,
            "held_out": split.description,
            "train_tokens": routing_tokens(split.train),
            "judged_tokens": routing_tokens(split.judged),
            "seed": comparison.seed,
        },
        "windows": comparison.windows,
        "rows": rows,
        "best": comparison.best.name,
        "verdict": comparison.verdict_data(other_ms, restart_seconds),
    }


def routing_tokens(routing: RoutingTrace | RoutingStatistics) -> int:
    """Tokens of either part of a record."""
    from ...placement.trace import RoutingTrace

    return routing.num_tokens if isinstance(routing, RoutingTrace) else routing.tokens


def save_plans(entries: Sequence[Entry], folder: Path) -> None:
    """Writes every solved plan as `<solver>.json`."""
    for entry in entries:
        if entry.plan is not None and not entry.was_given:
            path = folder / f"{entry.name.replace(':', '-').replace('/', '-')}.json"
            entry.plan.save(path)
            wrote(path)
