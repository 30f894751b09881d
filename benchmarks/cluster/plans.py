"""Plans of the example model for a calibrated cluster, and held-out steps to run them on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import moeplace as mp

TRACE = Path(__file__).resolve().parents[2] / "examples" / "data" / "olmoe_small"
SPEC = mp.ModelSpec(
    name="example model", layers=8, experts=32, top_k=2, hidden_size=192, ffn_size=128, expert_dtype="fp32"
)
OBJECTIVE = mp.Objective(dispatch_dtype="fp32", combine_dtype="fp32")
PEERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("contiguous", {}),
    ("eplb", {}),
    ("exflow", {"form": "staged"}),
    ("moetuner", {}),
)


def routing() -> tuple[mp.RoutingTrace, mp.RoutingTrace]:
    """Recorded routing of the trained example model, in two parts that share no sequence: to solve on, to judge on."""
    return mp.read_trace(TRACE).split("sequence", 0.25, seed=0)


def problem_for(topology: mp.Topology, train: mp.RoutingTrace, extra: int = 0, **objective: Any) -> mp.Problem:
    """extra: slots a device beyond those that hold every expert once."""
    slots = SPEC.experts + extra * topology.num_devices
    return mp.Problem(
        model=SPEC,
        topology=topology,
        statistics=mp.RoutingStatistics.from_trace(train),
        objective=OBJECTIVE.replace(**objective),
        slots=slots,
    )


def held_steps(held: mp.RoutingTrace, tokens: int, steps: int, devices: int) -> mp.Steps:
    """Steps of whole sequences, each at home on one device, as a data-parallel batch is."""
    drawn = held.prefill_steps(tokens, steps, seed=1)
    return replace(drawn, source=np.tile(homes(tokens, devices), steps))


def homes(tokens: int, devices: int) -> np.ndarray[Any, Any]:
    """[tokens] the device that each token of a step lives on."""
    return np.repeat(np.arange(devices), tokens // devices)


def solved(problem: mp.Problem, tokens: int, seconds: float) -> dict[str, mp.Plan]:
    """Every peer's plan and search's."""
    found = {}
    for name, options in PEERS:
        try:
            found[name] = mp.solve(problem, name, seconds=seconds, seed=0, **options)
        except mp.UnsupportedError:
            continue
    found["search"] = mp.solve(problem, "search", seconds=seconds, seed=0, batch="prefill", step_tokens=tokens)
    return found


def spread(problem: mp.Problem, best: mp.Plan) -> Iterator[tuple[str, mp.Plan]]:
    """Plans that nobody would choose, from a little to very unbalanced, so that predictions have something to tell apart."""
    for name in ("round_robin", "random"):
        yield name, mp.solve(problem, name, seed=0)
    for seed in (1, 2):
        yield f"random {seed}", mp.solve(problem, "random", seed=seed)
    load = problem.statistics.total_load
    sorted_by_load = np.argsort(-load, axis=1, kind="stable")
    yield "hottest together", _plan(problem, sorted_by_load)
    size = problem.model.experts // problem.num_devices
    for swapped in (2, 4):
        table = best.physical_to_logical.copy()
        for layer, row in enumerate(table):
            # The hottest experts of the last device change places with the coldest of the first.
            first, last = row[:size].copy(), row[-size:].copy()
            cold, hot = np.argsort(load[layer, first])[:swapped], np.argsort(-load[layer, last])[:swapped]
            row[:size][cold], row[-size:][hot] = last[hot], first[cold]
        yield f"search, {swapped} hot moved", _plan(problem, table)
    half = best.physical_to_logical.copy()
    half[::2] = sorted_by_load[::2]
    yield "every other layer hottest together", _plan(problem, half)


def _plan(problem: mp.Problem, table: np.ndarray[Any, Any]) -> mp.Plan:
    return mp.Plan(problem.model, problem.topology, table, problem.slot_device, np.empty(0))
