"""How far from the optimum plans can be, at every size: what was found, what is proven, and how long both took.

    python -m benchmarks bounds --write

Tables of Mixtral's size (8 experts, 2 and 4 devices), one and two experts a device and layer (gpt-oss on 32 and 16
devices, OLMoE on 64 and 32), gpt-oss-20b on 8 devices, OLMoE's size on 8, DeepSeek-V3's, and of transitions alone; each
in both execution modes where these differ, on decode and prefill steps. `--tables` makes some of them only, for as many
runs as the machine can be had for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from bound_cases import MIXTRAL, OLMOE, deepseek, gpt_oss, of_recorded_transitions
from recordings import GPT_OSS
from runner import Report, data_argument

import moeplace as mp
from moeplace._types import FloatArray
from moeplace.placement.cost import ExpertCost, Transfers
from moeplace.placement.replay import replay
from moeplace.solvers.base import Budget
from moeplace.solvers.certify.device_sets import DeviceSets, least_over_partitions
from moeplace.solvers.certify.set_pairs import least_over_pairs
from moeplace.solvers.certify.step_time import PAIR_GROUPS
from moeplace.solvers.exflow import assignment_sweeps, kept_at_most, local_weight, spectral_kept
from moeplace.solvers.search.scenario import scenario_from

DECODE, PREFILL = ("decode", 128), ("prefill", 4096)
MODES = ("dispatch_combine", "context_coherent")
STEP_COLUMNS = {
    "devices, mode": "",
    "steps": "",
    "solver": "",
    "found ms": ".3f",
    "at least ms": ".3f",
    "gap by single terms": ".1%",
    "gap": ".1%",
    "s": ".2f",
}
TRANSITION_COLUMNS = {
    "model and text": "",
    "devices": "",
    "found": ".4f",
    "spectral": ".4f",
    "semidefinite": ".4f",
    "gap": ".1%",
    "spectral ms": ".0f",
    "semidefinite s": ".1f",
}
EXACT_COLUMNS = {
    "devices": "",
    "solver": "",
    "found ms": ".3f",
    "gap": ".1%",
    "CPU s": ".2f",
    "s": ".2f",
    "loop CPU s": ".2f",
}
LAYER_COLUMNS = {
    "nodes x devices": "",
    "layers": "",
    "found ms": ".4f",
    "at least ms before": ".4f",
    "at least ms": ".4f",
    "gap before": ".1%",
    "gap": ".1%",
    "CPU s": ".0f",
}
PROPOSALS = 20_000
"""A layer, of search where it has long and for layers' plan; its own default."""
COLUMNS = {"transitions": TRANSITION_COLUMNS, "layers": LAYER_COLUMNS, "exact": EXACT_COLUMNS}
Row = tuple[object, ...]


@dataclass(frozen=True)
class Effort:
    """Seconds of a search and of its bound."""

    search: float
    bound: float


EFFORT = {
    "mixtral": Effort(0.0, 0.0),
    "exact": Effort(0.0, 0.0),
    "few": Effort(6.0, 8.0),
    "gpt-oss": Effort(15.0, 30.0),
    "long": Effort(1.0, 900.0),
    "olmoe": Effort(15.0, 25.0),
    "layers": Effort(1.0, 600.0),
    "deepseek": Effort(30.0, 30.0),
    "transitions": Effort(3.0, 10.0),
}


def step_row(
    label: str,
    problem: mp.Problem,
    effort: Effort,
    batch: str,
    tokens: int,
    solver: str | None = "search",
    proposals: int | None = None,
) -> Row:
    """A line of a table: the plan's step time, what none is below, and the gap by single terms and in the end.

    proposals: of search in place of seconds.
    """
    budget = {"seconds": effort.search} if proposals is None else {"proposals": proposals}
    options = {} if solver is None else {**budget, "certify": effort.bound}
    began = time.perf_counter()
    plan = mp.solve(problem, solver, batch=batch, step_tokens=tokens, **options)
    took = time.perf_counter() - began
    assert plan.certificate is not None
    assert plan.bound is not None
    value = plan.certificate.value
    first = next(bound for _, _, bound in plan.provenance.history if bound is not None)
    single = None if plan.provenance.solver == "chain" else 1.0 - first / value
    return label, f"{batch} {tokens}", plan.provenance.solver, 1e3 * value, 1e3 * plan.bound, single, plan.gap, took


def rows(
    model: mp.ModelSpec,
    statistics: mp.RoutingStatistics,
    clusters: tuple[tuple[int, int], ...],
    effort: Effort,
    solver: str | None = "search",
    preset: str = "h100-hgx",
) -> Iterator[Row]:
    """Lines of a model on some clusters, (nodes, devices in each), in both modes, decode and prefill."""
    for nodes, devices in clusters:
        for mode in MODES:
            problem = mp.Problem(
                model=model,
                topology=mp.Topology.preset(preset, nodes=nodes, devices_per_node=devices),
                statistics=statistics,
                objective=mp.Objective(execution=mode),  # type: ignore[arg-type]
            )
            for batch, tokens in (DECODE, PREFILL):
                yield step_row(f"{nodes} x {devices}, {mode}", problem, effort, batch, tokens, solver)


def mixtral_rows(data: Path, effort: Effort) -> Iterator[Row]:
    """Lines of Mixtral's size; the solver is not named."""
    statistics = of_recorded_transitions(data, MIXTRAL, "mixtral_8x7b")
    yield from rows(MIXTRAL, statistics, ((1, 2), (1, 4)), effort, solver=None, preset="h200-hgx")


def exact_rows(data: Path, effort: Effort) -> Iterator[Row]:
    """Lines of Mixtral's size with one expert a token, context-coherent, solved as by default after a first solve; and
    how long this machine takes for five million steps of a loop."""
    model = MIXTRAL.replace(top_k=1)
    statistics = of_recorded_transitions(data, model, "mixtral_8x7b")
    for devices in (2, 4):
        problem = mp.Problem(
            model=model,
            topology=mp.Topology.preset("h200-hgx", devices_per_node=devices),
            statistics=statistics,
            objective=mp.Objective(execution="context_coherent"),
        )
        mp.solve(problem)
        spent = []
        for _ in range(5):
            wall, processor = time.perf_counter(), time.process_time()
            plan = mp.solve(problem)
            spent.append((time.perf_counter() - wall, time.process_time() - processor))
        began, total = time.process_time(), 0
        for step in range(5_000_000):
            total += step * step
        loop = time.process_time() - began
        assert plan.certificate is not None
        wall, processor = np.median(spent, axis=0)
        yield devices, plan.provenance.solver, 1e3 * plan.certificate.value, plan.gap, processor, wall, loop


def few_rows(data: Path, effort: Effort) -> Iterator[Row]:
    """Lines of one and two experts a device and layer."""
    olmoe = of_recorded_transitions(data, OLMOE, "olmoe_1b_7b")
    for label, *figures in rows(GPT_OSS, gpt_oss(data), ((4, 8), (2, 8)), effort):
        yield (f"gpt-oss, 32 experts on {label}", *figures)
    for label, *figures in rows(OLMOE, olmoe, ((8, 8), (4, 8)), effort):
        yield (f"OLMoE's size, 64 experts on {label}", *figures)


def gpt_oss_rows(data: Path, effort: Effort) -> Iterator[Row]:
    """Lines of gpt-oss-20b on 8 devices."""
    yield from rows(GPT_OSS, gpt_oss(data), ((1, 8), (2, 4)), effort)


def long_rows(data: Path, effort: Effort) -> Iterator[Row]:
    """Lines of gpt-oss-20b's prefill steps with time for pairs of sets in every layer on one node, and for relaxed
    nodes on two; search makes as many proposals as it does where no limit is given."""
    for nodes, devices, mode in ((1, 8, "context_coherent"), (2, 4, "dispatch_combine"), (2, 4, "context_coherent")):
        problem = mp.Problem(
            model=GPT_OSS,
            topology=mp.Topology.preset("h100-hgx", nodes=nodes, devices_per_node=devices),
            statistics=gpt_oss(data),
            objective=mp.Objective(execution=mode),  # type: ignore[arg-type]
        )
        label, proposals = f"{nodes} x {devices}, {mode}", round(PROPOSALS * effort.search)
        yield step_row(label, problem, effort, *PREFILL, proposals=proposals)


def layer_rows(data: Path, effort: Effort) -> Iterator[Row]:
    """Lines of some layers of gpt-oss-20b's prefill steps, context-coherent, on one node: the same plan's time and
    bounds without and with what leaders' devices send."""
    problem = mp.Problem(
        model=GPT_OSS,
        topology=mp.Topology.preset("h100-hgx"),
        statistics=gpt_oss(data),
        objective=mp.Objective(execution="context_coherent"),
    )
    scenario = scenario_from(problem, "prefill", 4096, None, 0)
    steps, weight = scenario.steps, scenario.step_weight
    assert steps is not None
    plan = mp.solve(problem, "search", batch="prefill", step_tokens=4096, proposals=round(PROPOSALS * effort.search))
    seconds = layer_seconds(plan, problem, steps)
    sets, pairs = DeviceSets(problem, steps, weight), DeviceSets(problem, steps, weight, PAIR_GROUPS)
    for layer in (5, 11, 17, 23):
        began = time.process_time()
        found = float(weight @ seconds[:, layer])
        figures = np.concatenate([sets.work(layer), sets.transfers(layer)])
        before = least_over_partitions(sets.members, figures, sets.devices, effort.bound)
        costs, waits = pairs.pairs(layer)
        after = max(before, waits + least_over_pairs(costs, sets.devices, effort.bound))
        spent = time.process_time() - began
        gaps = 1.0 - before / found, 1.0 - after / found
        yield "1 x 8", f"{layer}", 1e3 * found, 1e3 * before, 1e3 * after, *gaps, spent


def layer_seconds(plan: mp.Plan, problem: mp.Problem, steps: mp.Steps) -> FloatArray:
    """[S, L] seconds of each layer: the dispatch into it, its work and its combine."""
    topology, seconds = problem.topology, []
    cost, waits = ExpertCost.of(problem.model, topology), Transfers.of(problem.model, topology, problem.objective)
    for demand in replay(plan, steps, topology, problem.objective):
        out, back = demand.travelling
        transfer = demand.transfer
        seconds.append(transfer.links(out.flows(topology, transfer.dedup)).max(axis=-1))
        seconds[-1] = seconds[-1] + cost.seconds(demand.tokens, demand.experts_hit).max(axis=-1)
        if back is not None:
            seconds[-1] = seconds[-1] + transfer.back * transfer.links(back.flows(topology, transfer.dedup)).max(
                axis=-1
            )
    wait_out, wait_back = waits.waits(steps)
    return np.concatenate(seconds) + (wait_out + wait_back)[:, None]


def olmoe_rows(data: Path, effort: Effort) -> Iterator[Row]:
    """Lines of OLMoE's size on 8 devices."""
    yield from rows(OLMOE, of_recorded_transitions(data, OLMOE, "olmoe_1b_7b"), ((1, 8), (2, 4)), effort)


def deepseek_rows(data: Path, effort: Effort) -> Iterator[Row]:
    """Lines of DeepSeek-V3's shape, 288 slots on 32 devices."""
    spec, statistics = deepseek(data, layers=58, tokens=16_384)
    for batch, tokens in (("decode", 2048), ("prefill", 8192)):
        problem = mp.Problem(
            model=spec,
            topology=mp.Topology.preset("h100-hgx", nodes=4),
            statistics=statistics,
            slots=288,
            objective=mp.Objective(dispatch_dtype="fp8", split="free"),
        )
        yield step_row("4 x 8, dispatch_combine", problem, effort, batch, tokens)


def transition_rows(data: Path, effort: Effort) -> Iterator[Row]:
    """Lines of kept transitions: found by sweeps of linear assignment, and at most by each bound."""
    counts = np.load(data / "olmoe_mixtral_counts.npz", allow_pickle=False)
    for key in sorted(name for name in counts.files if name.endswith("/transitions")):
        weights = counts[key].astype(np.float64)
        experts = weights.shape[1]
        for devices in (2, 4) if experts == 8 else (4, 8):
            slots = np.full(devices, experts // devices)
            total = float(weights.sum())
            found = local_weight(weights, assignment_sweeps(weights, slots, Budget(effort.search))) / total
            began = time.perf_counter()
            spectral = sum(spectral_kept(matrix, slots) for matrix in weights) / total
            between = time.perf_counter()
            semidefinite = kept_at_most(weights, slots, effort.bound) / total
            after = time.perf_counter()
            gap = 1.0 - (1.0 - semidefinite) / (1.0 - found)
            name, spent = key.removesuffix("/transitions"), (1e3 * (between - began), after - between)
            yield (name, devices, found, spectral, semidefinite, gap, *spent)


TABLES: dict[str, tuple[str, Callable[[Path, Effort], Iterator[Row]]]] = {
    "mixtral": ("Mixtral's size: 32 layers, 8 experts, top-2", mixtral_rows),
    "exact": ("Mixtral's size with one expert a token, context_coherent", exact_rows),
    "few": ("One and two experts a device and layer", few_rows),
    "gpt-oss": ("gpt-oss-20b on 8 devices: 24 layers, 32 experts, top-4", gpt_oss_rows),
    "long": ("gpt-oss-20b's prefill steps on 8 devices, up to 15 minutes for the bound", long_rows),
    "layers": ("gpt-oss-20b on 8 devices, prefill 4096, context_coherent: some layers", layer_rows),
    "olmoe": ("OLMoE's size on 8 devices: 16 layers, 64 experts, top-8", olmoe_rows),
    "deepseek": ("DeepSeek-V3's shape: 58 layers, 256 experts, top-8, 288 slots", deepseek_rows),
    "transitions": ("Transitions kept on a device, share of all", transition_rows),
}


TWO = mp.Topology.preset("h100-hgx", devices_per_node=2)


def warm_up() -> None:
    """Compiled code is built at its first use, on a new machine for up to a minute, which belongs to no row."""
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8), (64, 3, 1)), axis=2)[:, :, :2]
    trace = mp.RoutingTrace.from_arrays(ids, num_experts=8)
    for mode in MODES:
        problem = mp.Problem(
            model=mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=64, ffn_size=64),
            topology=mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=2),
            statistics=mp.RoutingStatistics.from_trace(trace),
            objective=mp.Objective(execution=mode),  # type: ignore[arg-type]
        )
        mp.solve(problem, "search", proposals=100, step_tokens=16, certify=2.0)
        mp.solve(replace(problem, topology=TWO), "chain", minimise="step", step_tokens=16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="make these only")
    parser.add_argument("--scale", type=float, default=1.0, help="of all seconds spent")


def run(options: argparse.Namespace, report: Report) -> None:
    if options.tables != ["exact"]:
        warm_up()
    for name in options.tables:
        title, rows_of = TABLES[name]
        columns = COLUMNS.get(name, STEP_COLUMNS)
        table = report.table(title, columns, columns)
        effort = Effort(EFFORT[name].search * options.scale, EFFORT[name].bound * options.scale)
        for row in rows_of(options.data, effort):
            table.row(*row)
