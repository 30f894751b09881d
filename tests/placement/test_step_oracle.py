"""Steps under measured kernels and transfers, against a loop that reads the coefficients' files and counts copies."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cost import Links, divided_serving, serving

import moeplace as mp
from moeplace.placement.bounds import step_seconds_bound
from moeplace.placement.kernels import installed_root
from moeplace.placement.topology import PRESETS

FILES = Path(mp.__file__).parent / "placement"
EXPERTS = json.loads((FILES / "kernels.json").read_text(encoding="utf-8"))["experts"]
TRANSFERS = json.loads((FILES / "transfers.json").read_text(encoding="utf-8"))["transfers"]
KINDS = ("normal", "low_latency", "all_to_all", "all_gather")
SMALL = 3
"""Tokens of a device that a decode step has at most, in place of 256."""


def transfer_row(gpu: str, engine: str, kind: str, nodes: int) -> tuple[dict[str, Any], int] | None:
    """The file's row, and the number of nodes that it was measured on."""
    for library in (engine, "sglang", "nccl"):
        rows = TRANSFERS.get(gpu, {}).get(library, {}).get(kind)
        if rows:
            fitting = [int(count) for count in rows if int(count) <= nodes]
            count = max(fitting) if fitting else min(map(int, rows))
            return rows[str(count)], count
    return None


def naive_step(plan: mp.Plan, steps: mp.Steps, problem: mp.Problem, s: int) -> float:
    """Seconds of one step."""
    model, topology, objective = problem.model, problem.topology, problem.objective
    tokens = range(int(steps.offsets[s]), int(steps.offsets[s + 1]))
    kind = objective.decode_dispatch if len(tokens) <= SMALL * topology.num_devices else objective.prefill_dispatch
    everywhere = dict.fromkeys(range(topology.num_devices), 1.0 / topology.num_devices)
    total = 0.0
    for layer in range(model.layers):
        links = Links(topology, kind == "all_gather" or (kind == "normal" and objective.node_dedup))
        work: defaultdict[int, float] = defaultdict(float)
        idle: defaultdict[tuple[int, int], float] = defaultdict(lambda: 1.0)
        whole = served = None
        if objective.replica_choice == "balanced":
            whole, served = divided_serving(plan, steps, s, layer, objective)
        for t in tokens:
            homes = everywhere if steps.source is None else {int(steps.source[t]): 1.0}
            takes: defaultdict[tuple[int, int], float] = defaultdict(float)
            for home, weight in homes.items():
                experts = [int(e) for e in steps.expert_ids[t, layer]]
                chances = [
                    serving(plan, layer, e, home, objective.replica_choice) if served is None else served(e, home)
                    for e in experts
                ]
                for e, chance in zip(experts, chances, strict=True):
                    for g, part in chance.items():
                        takes[e, g] += weight * part
                        if kind in ("low_latency", "all_to_all"):
                            links.send(home, {g}, weight * part)
                if kind == "normal":
                    for drawn in itertools.product(*(chance.items() for chance in chances)):
                        links.send(home, {g for g, _ in drawn}, weight * math.prod(part for _, part in drawn))
            for (e, g), part in takes.items():
                work[g] += part
                idle[e, g] *= 1.0 - part
        if whole is not None:
            # Nothing is drawn: a replica that gets any token is read.
            work = defaultdict(float, enumerate(whole.sum(axis=0).tolist()))
            idle = defaultdict(lambda: 1.0, dict.fromkeys(zip(*np.nonzero(whole), strict=True), 0.0))
        if kind == "all_gather":
            # Whoever holds them: as many tokens on every device.
            for home in everywhere:
                links.send(home, set(everywhere), len(tokens) / topology.num_devices)
        total += sum(naive_transfers(kind, links, len(tokens), problem)) + naive_compute(work, idle, problem)
    return total


def naive_transfers(kind: str, links: Links, tokens: int, problem: mp.Problem) -> list[float]:
    """Seconds of dispatch and of combine."""
    model, topology, objective = problem.model, problem.topology, problem.objective
    (gpu,) = set(topology.gpus)
    widths = {"bf16": 2, "fp8": 1}
    rows = [model.hidden_size * widths[dtype] for dtype in (objective.dispatch_dtype, objective.combine_dtype)]
    found = transfer_row(gpu, topology.engine, kind, topology.num_nodes) if topology.engine else None
    devices, nodes = topology.num_devices, topology.num_nodes
    if found is None:
        return [links.seconds(row) for row in rows]
    row, measured_nodes = found
    box = next(box for box in PRESETS.values() if box.gpu == gpu)
    inside_row = row if measured_nodes == 1 else transfer_row(gpu, topology.engine, kind, 1)[0]  # type: ignore[index]
    speeds = []
    for phase in ("dispatch", "combine"):
        intra = topology.intra_bandwidth[0] * inside_row[phase][6] * 1e9 / box.intra_bandwidth
        between = row[phase][7] * 1e9 * box.devices / box.inter_bandwidth if measured_nodes > 1 else 1.0
        speeds.append((intra, topology.inter_bandwidth[0] * between))
    inside = max(max(links.sent[g], links.received[g]) for g in range(devices))
    across = max(max(links.node_sent[n], links.node_received[n]) for n in range(nodes))
    out = max(inside * rows[0] / speeds[0][0], across * rows[0] / speeds[0][1])
    slower = int(nodes > 1)
    busy = [out, out * rows[1] / rows[0] * speeds[0][slower] / speeds[1][slower]]
    seconds = []
    for phase, width, on_links in zip(("dispatch", "combine"), rows, busy, strict=True):
        launch, expert, per_byte, token, peer, root, *_ = row[phase]
        wait = 1e-6 * (launch + peer * devices) + 1e-9 * (expert * model.experts + per_byte * width)
        wait += 1e-9 * token * tokens / devices
        share = tokens * width * (devices - 1) / devices
        sent = share if kind == "all_gather" else share * model.top_k / devices
        wait += 1e-9 * root * math.sqrt(sent)
        if measured_nodes == 1:
            wait += topology.inter_latency * (nodes - 1)
        seconds.append(wait + on_links)
    return seconds


def naive_compute(work: dict[int, float], idle: dict[tuple[int, int], float], problem: mp.Problem) -> float:
    """Seconds of the slowest device's experts."""
    model, topology = problem.model, problem.topology
    (gpu,) = set(topology.gpus)
    shapes = EXPERTS.get(gpu, {}).get(topology.engine, {}).get("dtypes", {}).get(model.expert_dtype, {})
    coefficients = shapes.get(f"{model.hidden_size}x{model.ffn_size}", shapes.get("any"))
    flops, size = 6 * model.hidden_size * model.ffn_size, model.bytes_per_expert
    slowest = 0.0
    for g in range(topology.num_devices):
        hit = sum(1.0 - chance for (_, device), chance in idle.items() if device == g)
        if coefficients is None:
            rate = topology.rate(model.expert_dtype)[g]
            slowest = max(slowest, work[g] * flops / rate, hit * size / topology.memory_bandwidth[g])
            continue
        launch, read, rate, rows, passing, _ = coefficients
        passed = sum(work.values()) * 2 * (model.hidden_size + model.ffn_size) / (passing * 1e9)
        arithmetic = (work[g] + rows * hit) * flops / (rate * 1e12)
        slowest = max(slowest, launch * 1e-6 + passed + max(arithmetic, hit * size / (read * 1e9)))
    return slowest


@st.composite
def cases(draw: st.DrawFn) -> tuple[mp.Plan, mp.Steps, mp.Problem]:
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    gpu = draw(st.sampled_from(["h100-sxm", "b200-sxm", "a100-sxm"]))
    nodes, each = draw(st.sampled_from([(1, 2), (1, 3), (2, 2)]))
    devices, experts, top_k = nodes * each, 6, 2
    topology = mp.Topology.preset(gpu, nodes, each, draw(st.sampled_from(["sglang", "vllm", "trtllm", ""])))
    model = mp.ModelSpec(
        layers=2,
        experts=experts,
        top_k=top_k,
        hidden_size=draw(st.sampled_from([2048, 4096])),
        ffn_size=768,
        expert_dtype=draw(st.sampled_from(["bf16", "fp8"])),
    )
    slots = devices * -(-(experts + draw(st.integers(0, 3))) // devices)
    slot_device = np.repeat(np.arange(devices), slots // devices)
    table = np.stack([_spread(rng, experts, slots, slot_device) for _ in range(2)])
    objective = mp.Objective(
        decode_dispatch=draw(st.sampled_from(KINDS)),
        prefill_dispatch=draw(st.sampled_from(KINDS)),
        replica_choice=draw(st.sampled_from(["share", "nearest", "balanced"])),
        dispatch_dtype=draw(st.sampled_from(["bf16", "fp8"])),
        node_dedup=draw(st.booleans()),
    )
    sizes = [int(rng.integers(1, SMALL * devices + 1)), SMALL * devices + 4]
    ids = np.stack([[rng.permutation(experts)[:top_k] for _ in range(2)] for _ in range(sum(sizes))]).astype(np.uint8)
    source = rng.integers(devices, size=sum(sizes)) if draw(st.booleans()) else None
    steps = mp.Steps(ids, np.array([0, sizes[0], sum(sizes)]), experts, (0, 1), source)
    problem = mp.Problem(model, topology, mp.RoutingStatistics.from_counts(np.ones((2, experts))), objective, slots)
    return mp.Plan(model, topology, table, slot_device), steps, problem


def _spread(rng: np.random.Generator, experts: int, slots: int, slot_device: np.ndarray) -> np.ndarray:
    """A row of slots, no expert twice on a device."""
    while True:
        row = rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, slots - experts)]))
        held = set(zip(slot_device.tolist(), row.tolist(), strict=True))
        if len(held) == slots:
            return row


@pytest.mark.slow
@pytest.mark.skipif(installed_root() is not None, reason="installed tables take the place of the files read here")
@settings(max_examples=120, deadline=None)
@given(cases())
def test_a_step_costs_what_a_loop_over_tokens_says(case: tuple[mp.Plan, mp.Steps, mp.Problem]) -> None:
    plan, steps, problem = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeplace.placement.cost.MOST_DECODE_TOKENS", SMALL)
        judged = mp.evaluate(plan, steps, problem).step_seconds
        bound = step_seconds_bound(steps, problem)
    assert judged == pytest.approx([naive_step(plan, steps, problem, s) for s in range(2)], rel=1e-5)
    assert (bound <= judged * (1 + 1e-6)).all()
