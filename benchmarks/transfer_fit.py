"""Coefficients of dispatch and combine, fitted to measured all-to-alls, and what they predict of rows left out.

    pip install aiconfigurator-core            # Apache-2.0, NVIDIA; 114 MB, asked for by this command alone
    python -m benchmarks transfer_fit --write  # placement/transfers.json and docs/results/transfers.md

What rows are of, and what is fitted to them, is said in `placement/transfers.py`.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from kernel_fit import SOURCE, compact, root_argument, tables_root, written
from runner import HERE, Report

from moeplace.placement.topology import PRESETS
from moeplace.placement.transfers import COLUMNS, TransferRows, fitted, form, newest

FILE = HERE.parent / "placement" / "transfers.json"
PAGE = "transfers"
NODES_SLOW = 8
"""Normal mode of 8 nodes moved 15 GB/s a device, low latency there and fewer nodes 36 to 49: its network, not its kind.
Shown, not kept."""
MOST_ERROR = 0.4


def entry(coefficients: dict[str, float], error: float, between_nodes: bool) -> list[float]:
    """A row of the file, in the order and the units of `placement.transfers.COLUMNS`."""
    link = 1e-9 / coefficients["link"]
    figures = {
        "launch": coefficients["launch"] * 1e6,
        "expert": coefficients.get("expert", 0.0) * 1e9,
        "row": coefficients.get("row", 0.0) * 1e9,
        "token": coefficients.get("token", 0.0) * 1e9,
        "peer": coefficients.get("peer", 0.0) * 1e6,
        "root": coefficients.get("root", 0.0) * 1e9,
        "intra": 0.0 if between_nodes else link,
        "inter": link if between_nodes else 0.0,
        "error": 100 * error,
    }
    return [round(float(f"{figures[name]:.3g}"), 4) for name in COLUMNS]


def links_error(gpu: str, rows: TransferRows) -> float:
    """Median error of a preset's links alone, all rows, one node."""
    box = next(box for box in PRESETS.values() if box.gpu == gpu)
    plain = box.intra_latency * (rows.ranks - 1) + rows.link / box.intra_bandwidth
    return float(np.median(np.abs(plain / rows.seconds - 1)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    root_argument(parser)


def run(options: argparse.Namespace, report: Report) -> None:
    measured = newest(tables_root(options.root))
    table = report.table(
        "errors", ("GPU", "kind", "nodes", "library", "dispatch %", "combine %", "preset's links %"), {"nodes": "d"}
    )
    known: dict[str, Any] = {}
    medians: dict[str, list[float]] = {}
    for (gpu, engine, kind, nodes), (_, _, _, _, library, both) in sorted(measured.items()):
        legs, shown = [], []
        for rows in both:
            assert rows is not None
            coefficients, error = fitted(rows, form(kind, nodes, library))
            legs.append(entry(coefficients, float(np.median(error)), nodes > 1))
            shown.append(written(error))
            medians.setdefault(f"{kind}, {engine}", []).append(float(np.median(error)))
        plain = None if nodes > 1 else 100 * float(np.mean([links_error(gpu, rows) for rows in both if rows]))
        kept = max(leg[-1] for leg in legs) <= 100 * MOST_ERROR and not (kind == "normal" and nodes == NODES_SLOW)
        table.row(gpu, kind, nodes, library + ("" if kept else ", not kept"), *shown, plain)
        if kept:
            entries = known.setdefault(gpu, {}).setdefault(engine, {}).setdefault(kind, {})
            entries[str(nodes)] = {"library": library, "dispatch": legs[0], "combine": legs[1]}
    total = report.table("by kind", ("kind", "tables", "median %", "worst %", "above 10 %"), {"above 10 %": "d"})
    for name, found in medians.items():
        above = sum(median > 0.1 for median in found)
        total.row(name, str(len(found)), 100 * float(np.median(found)), 100 * max(found), above)
    if options.write:
        FILE.write_text(compact({"source": SOURCE, "columns": list(COLUMNS), "transfers": known}), "utf-8")
