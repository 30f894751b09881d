"""`moeplace compare`: several solvers, one table, on routing that none of them saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..options import SOLVING, AsJson, ComparisonOptions, RoutingPath
from ..output import emit, note
from ..routing_split import count_table
from ..run_comparison import Comparison, CountComparison, Entry, run_comparison
from ..tables import comparison_rows, comparison_tables


def compare_command(
    routing: RoutingPath,
    options: ComparisonOptions,
    save: Annotated[
        Path | None,
        Option(
            "--save",
            metavar="DIR",
            help="Write each solver's plan into this folder.",
            show_default=False,
            rich_help_panel=SOLVING,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Solve with several solvers and judge their plans on held-out routing.

    Each solver sees the training part only; all plans are replayed on the same steps made from the rest.
    Solvers that minimise step times do so for the first kind of steps named; search for both where none is.
    A solver that cannot serve the problem gets a line that says why.

    Example:

      moeplace compare trace --topology h100-hgx --nodes 2 --devices-per-node 4 --solvers eplb,exflow,search
    """
    comparison = run_comparison(routing, options)
    if isinstance(comparison, CountComparison):
        if save is not None:
            save_plans(comparison.entries, save)
        data = {"routing": {"held_out": comparison.split.description}, "rows": comparison.rows}
        emit(data, count_table(comparison.rows, comparison.split), as_json=as_json)
        return
    rows = comparison_rows(comparison)
    if save is not None:
        save_plans(comparison.entries, save)
    emit(comparison_data(comparison, rows), *comparison_tables(comparison, rows), as_json=as_json)


def comparison_data(comparison: Comparison, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The comparison as JSON has it."""
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
        "prediction": prediction_basis(problem.model, problem.topology).text,
        "objective": problem.objective.model_dump(mode="json"),
        "routing": {
            "train_fingerprint": problem.statistics.fingerprint,
            "held_out": split.description,
            "train_tokens": split.train.num_tokens,
            "judged_tokens": split.judged.num_tokens,
            "seed": comparison.seed,
        },
        "rows": rows,
    }


def save_plans(entries: Sequence[Entry], folder: Path) -> None:
    """Writes every solved plan as `<solver>.json`."""
    for entry in entries:
        if entry.plan is not None and not entry.was_given:
            path = folder / f"{entry.name.replace(':', '-').replace('/', '-')}.json"
            entry.plan.save(path)
            note(f"wrote {path}")
