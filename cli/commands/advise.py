"""`moeplace advise`: is a plan worth it for this record and cluster, and what to run next?"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...placement.errors import InputError
from ..options import (
    AsJson,
    BatchOptions,
    ComparisonOptions,
    HeldOutOptions,
    ModelOptions,
    ObjectiveOptions,
    RoutingPath,
    SolveOptions,
    TopologyOptions,
    as_arguments,
)
from ..output import Table, emit
from ..run_comparison import BASELINE, Entry, run_comparison
from ..tables import comparison_rows, comparison_tables
from .compare import comparison_data

ASKED = "eplb,search"
"""What engines' own balancers do, and the best there is here."""
WORTH = 0.01
"""Gain from which a plan is called worth it: less than that no one sees beside everything else in a step."""


def advise_command(routing: RoutingPath, options: ComparisonOptions, as_json: AsJson = False) -> None:
    """Say first whether a plan is worth it here, and then what to run next.

    Solves as engines' own balancers do (eplb) and by search, judges both on held-out routing against experts in index
    order, and tells what is left to any plan.

    Example:

      moeplace advise trace --topology h100-hgx --nodes 2 --for sglang --redundant 32
    """
    from ...placement.decide import read_other_ms
    from ...placement.step_mix import step_mix

    other = None if options.other_ms is None else read_other_ms(options.other_ms)
    asked = options if options.solvers is not None else replace(options, solvers=ASKED)
    if len(set(options.pool or ())) > 1:
        raise InputError("advice is on one --pool; ask for each")
    [comparison] = run_comparison(routing, asked)
    rows = comparison_rows(comparison)
    data = comparison_data(comparison, rows, other, options.restart_seconds)
    verdict, following = _of_steps(rows), _next(routing, options, comparison.best)
    mix = step_mix(comparison.problem)
    first = Table((), (), footnotes=[*verdict, *comparison.verdict(other, options.restart_seconds), "", mix.text, ""])
    last = Table((), (), footnotes=["Next:", *(f"  {line}" for line in following)], whole=True)
    emit(
        {"batches": mix.to_dict(), **data, "advice": verdict, "next": following},
        first,
        *comparison_tables(comparison, rows),
        last,
        as_json=as_json,
    )


def _of_steps(rows: list[dict[str, Any]]) -> list[str]:
    verdict = []
    for kind in dict.fromkeys(row["steps"] for row in rows):
        mine = {row["solver"]: row for row in rows if row["steps"] == kind and row["status"] == "ok"}
        base = mine[BASELINE]["step_seconds_mean"]
        best = min(mine.values(), key=lambda row: row["step_seconds_mean"])
        gain = 1.0 - best["step_seconds_mean"] / base
        worth = "WORTH IT" if gain >= WORTH else "NOT WORTH IT"
        said = f"{worth} for {kind}: the best plan ({best['solver']}) takes {gain:.1%} less time than index order"
        balancer = mine.get("eplb")
        if balancer is not None and best is not balancer:
            said += f" and {1.0 - best['step_seconds_mean'] / balancer['step_seconds_mean']:.1%} less than eplb"
        verdict.append(
            f"{said}. With every device at the mean load a step would take {best['ideal_share']:.1%} of that plan's "
            "time: no balancing gains more."
        )
    return verdict


def _next(routing: Path, options: ComparisonOptions, best: Entry) -> list[str]:
    """Commands that make, judge and hand over the best plan."""
    steps, held_out = as_arguments(options, BatchOptions), as_arguments(options, HeldOutOptions)
    asked = as_arguments(options, ModelOptions, TopologyOptions, SolveOptions)
    asked += [*steps, *as_arguments(options, ObjectiveOptions), *held_out]
    asked += [] if options.engine is None else ["--for", options.engine]
    asked += [] if best.was_given or best.name == BASELINE else ["--solver", best.name]
    lines = [
        shlex.join(["moeplace", "solve", str(routing), *asked, "-o", "plan.json"]),
        shlex.join(["moeplace", "evaluate", "plan.json", str(routing), *steps, *held_out]),
    ]
    if options.engine == "permute":
        return [*lines, "moeplace permute CHECKPOINT --plan plan.json -o FOLDER --verify"]
    file = "placement.yaml" if options.engine == "trtllm" else "placement.json"
    lines.append(f"moeplace export plan.json --for {options.engine or 'ENGINE'} -o {file}")
    if options.engine in ("sglang", "sglang-lp"):
        return [*lines, "moeplace check plan.json --running URL"]
    return [*lines, f"moeplace doctor --file {file} --plan plan.json"]
