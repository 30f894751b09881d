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

BALANCED = "search, balanced"
"""A plan that runs with each batch divided among replicas."""

CONTEXT = {"latent attention's context": 0.08, "grouped-query context": 0.25, "full attention's context": 2.0}
"""Keys and values of a token in a layer over the hidden size: of DeepSeek-V3, of Qwen3-235B, and without sharing of
heads."""


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


def decode_steps(held: mp.RoutingTrace, tokens: int, steps: int, devices: int) -> mp.Steps:
    """Steps of one token of each of `tokens` sequences, each at home on one device."""
    drawn = held.decode_steps(tokens, steps, seed=1)
    return replace(drawn, source=np.tile(homes(tokens, devices), steps))


def homes(tokens: int, devices: int) -> np.ndarray[Any, Any]:
    """[tokens] the device that each token of a step lives on."""
    return np.repeat(np.arange(devices), tokens // devices)


def solved(
    topology: mp.Topology, train: mp.RoutingTrace, tokens: int, seconds: float, extra: int = 0
) -> dict[str, mp.Plan]:
    """Every peer's plan and search's, which knows that the runtime takes replicas near the token."""
    found = {}
    problem = problem_for(topology, train, extra)
    for name, options in PEERS:
        try:
            found[name] = mp.solve(problem, name, seconds=seconds, seed=0, **options)
        except mp.UnsupportedError:
            continue
    near = problem_for(topology, train, extra, replica_choice="nearest")
    options: dict[str, Any] = {"seconds": seconds, "seed": 0, "batch": "prefill", "step_tokens": tokens}
    found["search"] = mp.solve(near, "search", **options)
    if extra:
        divided = problem_for(topology, train, extra, replica_choice="balanced")
        found[BALANCED] = mp.solve(divided, "search", **options)
    return found


def divided(
    topology: mp.Topology, train: mp.RoutingTrace, tokens: int, seconds: float, extra: int
) -> dict[str, mp.Plan]:
    """Search's plans with the same slots for each way of taking replicas."""
    options: dict[str, Any] = {"seconds": seconds, "seed": 0, "batch": "prefill", "step_tokens": tokens}
    ways = {"search, shares": "share", "search, nearest": "nearest", BALANCED: "balanced"}
    return {
        label: mp.solve(problem_for(topology, train, extra, replica_choice=way), "search", **options)
        for label, way in ways.items()
    }


def decoding(
    topology: mp.Topology, train: mp.RoutingTrace, tokens: int, seconds: float
) -> tuple[dict[str, mp.Plan], dict[str, int]]:
    """Plans for decode steps in both modes, solved for flat dispatch, and the values of context a token and layer of
    those that are coherent."""
    options: dict[str, Any] = {"seconds": seconds, "seed": 0, "batch": "decode", "step_tokens": tokens}
    named: dict[str, mp.Plan] = {}
    coherent: dict[str, int] = {}
    for extra, slots in ((0, ""), (2, ", 2 more slots a device")):
        home = problem_for(topology, train, extra, node_dedup=False, replica_choice="nearest")
        stay = problem_for(topology, train, extra, node_dedup=False, execution="context_coherent")
        named[f"search{slots}"] = mp.solve(home, "search", **options)
        affine = {f"coherent, search{slots}": mp.solve(stay, "search", **options)}
        if not extra:
            named["contiguous"] = mp.solve(home, "contiguous")
            affine["coherent, contiguous"] = named["contiguous"]
            affine["coherent, exflow"] = mp.solve(stay, "exflow", seconds=seconds, seed=0, form="staged")
        named |= affine
        coherent |= dict.fromkeys(affine, 0)
        for label, part in CONTEXT.items():
            named[f"coherent, search{slots}, {label}"] = affine[f"coherent, search{slots}"]
            coherent[f"coherent, search{slots}, {label}"] = round(part * SPEC.hidden_size)
    return named, coherent


def spread(problem: mp.Problem, best: mp.Plan) -> Iterator[tuple[str, mp.Plan]]:
    """Plans that nobody would choose, from a little to very unbalanced, so that predictions have something to tell
    apart."""
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
