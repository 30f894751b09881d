"""A comparison as rows of plain values, and the table that shows them."""

from __future__ import annotations

from typing import Any

from .comparison import BASELINE, Comparison, Entry
from .output import Column, Table, figure, milliseconds, number, percent, seconds

FIGURES = (
    "load_max_mean",
    "load_max_mean_p99",
    "devices_per_token",
    "nodes_per_token",
    "cross_device_fraction",
    "cross_node_fraction",
    "local_transitions",
    "node_local_transitions",
    "step_seconds_mean",
    "step_seconds_p50",
    "step_seconds_p95",
    "step_seconds_p99",
    "compute_seconds",
    "transfer_seconds",
    "device_bytes_max",
    "node_bytes_max",
    "device_memory_max",
)

COLUMNS = (
    Column("solver", "plan", right=False),
    Column("load_max_mean", "load\nmax/mean", number(3)),
    Column("devices_per_token", "devices\na token", number(2)),
    Column("nodes_per_token", "nodes\na token", number(2)),
    Column("cross_device_fraction", "cross\ndevice", percent),
    Column("cross_node_fraction", "cross\nnode", percent),
    Column("local_transitions", "local\ntransitions", percent),
    Column("step_seconds_mean", "step ms\nmean", milliseconds),
    Column("step_seconds_p50", "step ms\np50", milliseconds),
    Column("step_seconds_p99", "step ms\np99", milliseconds),
    Column("ratio", f"time to\n{BASELINE}", number(3)),
    Column("value", "value", figure),
    Column("bound", "bound", figure),
    Column("gap", "gap", percent),
    Column("solve_seconds", "solve s", seconds),
)
RISK = Column("risk_seconds", "risk ms", milliseconds)


def comparison_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each kind of steps and entry, kinds in turn; keys are the same in every row, None where unknown."""
    return [_row(comparison, entry, kind) for kind in comparison.steps for entry in comparison.entries]


def _row(comparison: Comparison, entry: Entry, kind: str) -> dict[str, Any]:
    plan, evaluation = entry.plan, entry.evaluations.get(kind)
    certificate = None if plan is None else plan.certificate
    summary = {} if evaluation is None else evaluation.summary()
    base = comparison.baseline.evaluations.get(kind)
    row: dict[str, Any] = {
        "solver": entry.name,
        "steps": kind,
        "status": "ok" if plan is not None else "failed",
        "reason": entry.reason.removeprefix(f"{entry.name}: ") or None,
        **{name: summary.get(name) for name in FIGURES},
        "risk": comparison.problem.objective.risk,
        "risk_seconds": None if evaluation is None else comparison.risk(entry, kind),
        "ratio": None,
        "objective": None if certificate is None else certificate.objective,
        "value": None if certificate is None else certificate.value,
        "bound": None if certificate is None else certificate.bound,
        "gap": None if plan is None else plan.gap,
        "proven_optimal": None if plan is None else plan.proven_optimal,
        "stop": None if plan is None else plan.provenance.stop,
        "solve_seconds": None if plan is None or plan.provenance.stop == "given" else plan.provenance.seconds,
    }
    if evaluation is not None and base is not None:
        row["ratio"] = float(evaluation.step_seconds.mean() / base.step_seconds.mean())
    return row


def comparison_tables(comparison: Comparison, rows: list[dict[str, Any]]) -> list[Table]:
    """One table a kind of steps; remarks stand below the last."""
    columns = [column for column in COLUMNS if column.key != "nodes_per_token" or _several_nodes(comparison)]
    columns = [column for column in columns if column.key != "cross_node_fraction" or _several_nodes(comparison)]
    if comparison.problem.objective.risk != "mean":
        columns.insert(next(i for i, column in enumerate(columns) if column.key == "ratio"), RISK)
    tables = []
    for kind, steps in comparison.steps.items():
        mine = [row for row in rows if row["steps"] == kind]
        tables.append(Table(columns, mine, title=f"{kind}: {steps.num_steps} steps of {int(steps.tokens[0])} tokens"))
    notes = reading_notes(comparison, rows) + failure_notes(comparison, rows)
    last = tables[-1]
    tables[-1] = Table(last.columns, last.rows, last.title, notes)
    return tables


def _several_nodes(comparison: Comparison) -> bool:
    return comparison.problem.topology.num_nodes > 1


def reading_notes(comparison: Comparison, rows: list[dict[str, Any]]) -> list[str]:
    """What the figures mean and where they come from."""
    objective = comparison.problem.objective
    solvers: dict[str, list[str]] = {}
    for row in _once(comparison, rows):
        if row["objective"]:
            solvers.setdefault(row["objective"], []).append(row["solver"])
    return [
        f"{comparison.parted.description}. {objective.execution}, replicas split {objective.split}.",
        "Step times are predicted. Value, bound and gap are of each solver's own objective on the training part:",
        *(f"  {', '.join(names)}: {name}" for name, names in solvers.items()),
    ]


def failure_notes(comparison: Comparison, rows: list[dict[str, Any]]) -> list[str]:
    """Why a solver has no plan, a line each."""
    return [
        f"{row['solver']}: no plan. {row['reason']}" for row in _once(comparison, rows) if row["status"] == "failed"
    ]


def _once(comparison: Comparison, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = next(iter(comparison.steps))
    return [row for row in rows if row["steps"] == first]
