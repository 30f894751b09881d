"""What a plan's layers wait for, as rows of plain values, and the table that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .output import Column, Table, milliseconds, percent

if TYPE_CHECKING:
    from ..placement.evaluate import Evaluation

SHOWN = 5
"""Layers in a table, the slowest first; JSON has them all."""
NAMED = 2
"""Devices or nodes named in a cell."""

COLUMNS = (
    Column("layer", "layer", right=False),
    Column("seconds", "step ms", milliseconds),
    Column("compute", "compute", percent),
    Column("memory", "memory", percent),
    Column("intra", "links in\nnodes", percent),
    Column("inter", "links be-\ntween nodes", percent),
    Column("latency", "latency", percent),
    Column("slowest", "slowest devices,\nin steps", right=False),
    Column("busiest", "busiest links,\nin steps", right=False),
)


def binding_rows(evaluation: Evaluation, moe_layers: Sequence[int]) -> list[dict[str, Any]]:
    """A row a layer: mean seconds of a step, and by phase the fraction of steps and the seconds each term binds, and the
    fraction of steps in which each device or node is the one waited for (those never waited for are left out)."""
    from ..placement.binding import PHASES, TERMS, binding_terms

    found = binding_terms(evaluation)
    rows = []
    for i, layer in enumerate(moe_layers):
        phases = {
            phase: {
                "steps": dict(zip(TERMS, found.steps[i, p].tolist(), strict=True)),
                "seconds": dict(zip(TERMS, found.seconds[i, p].tolist(), strict=True)),
                "devices": {g: share for g, share in enumerate(found.device_steps[i, p].tolist()) if share},
                "nodes": {n: share for n, share in enumerate(found.node_steps[i, p].tolist()) if share},
            }
            for p, phase in enumerate(PHASES)
        }
        terms = dict(zip(TERMS, found.layer_seconds()[i].tolist(), strict=True))
        rows.append({"layer": layer, "seconds": sum(terms.values()), "terms": terms, "phases": phases})
    return rows


def binding_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Shares of the step time by term, of all layers together and of the slowest ones."""
    slowest = sorted(rows, key=lambda row: -row["seconds"])[:SHOWN]
    shown = [_cells("all", rows)] + ([_cells(str(row["layer"]), [row]) for row in slowest] if len(rows) > 1 else [])
    notes = [
        f"Shares of the step time by what it waits for; the {len(slowest)} slowest of {len(rows)} layers below all."
    ]
    columns = [column for column in COLUMNS if column.key != "inter" or any(row.get("inter") for row in shown)]
    return Table(columns, shown, title, notes)


def _cells(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sum(row["seconds"] for row in rows)
    terms = {term: sum(row["terms"][term] for row in rows) for term in rows[0]["terms"]}
    shares = {term: spent / seconds if seconds else 0.0 for term, spent in terms.items()}
    links = {f"node {n}": share for n, share in _mean(rows, "dispatch", "nodes").items()}
    links |= {str(g): share for g, share in _mean(rows, "dispatch", "devices").items()}
    slowest = {str(g): share for g, share in _mean(rows, "compute", "devices").items()}
    return {"layer": name, "seconds": seconds, **shares, "slowest": _named(slowest), "busiest": _named(links)}


def _mean(rows: list[dict[str, Any]], phase: str, kind: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for row in rows:
        for index, share in row["phases"][phase][kind].items():
            found[index] = found.get(index, 0.0) + share / len(rows)
    return found


def _named(shares: dict[str, float]) -> str | None:
    most = sorted(shares.items(), key=lambda entry: -entry[1])[:NAMED]
    return ", ".join(f"{name} ({percent(share)})" for name, share in most) or None
