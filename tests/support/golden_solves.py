"""What the package answers to some hundred small questions, written down: a change of structure must not change an
answer.

Run with `--write FILE` to write the answers down and with `--compare FILE` to print those that differ. All cases are
given a seed and a number of proposals, and none a clock.

A case is a function that gives figures by name. Arrays are written as SHA-256 of their shape and values (floats rounded
to 12 significant digits), numbers as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import moeplace as mp
from moeplace.compat.eplb import rebalance_experts
from moeplace.placement.decide import decide_on_counts
from moeplace.placement.drift import drift
from moeplace.placement.migration import migration
from moeplace.placement.step_mix import sample_steps

ANSWERS = Path(__file__).with_name("golden_solves.json")
TOLERANCE = 1e-9
PROGRAM_TOLERANCE = 1e-6
"""Of solvers that hand integer programs to others, whose maps may change where several are best: only figures are
compared."""
BOUND_TOLERANCE = 1e-4
"""Of bounds by long sums of matrix products, which differ in rounding with the number of threads of the algebra
library."""

Entry = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """group: cases that a test runs together. loose: relative tolerance of figures that are not held to `TOLERANCE`."""

    name: str
    group: str
    answer: Callable[[], Entry]
    loose: Mapping[str, float]

    def tolerance(self, figure: str) -> float:
        return self.loose.get(figure, self.loose.get("*", TOLERANCE))


CASES: dict[str, Case] = {}


def case(name: str, group: str, **loose: float) -> Callable[[Callable[[], Entry]], Callable[[], Entry]]:
    def add(answer: Callable[[], Entry]) -> Callable[[], Entry]:
        if name in CASES:
            raise ValueError(f"two cases are called {name!r}")
        CASES[name] = Case(name, group, answer, loose)
        return answer

    return add


# Digests


def digest(*arrays: Any) -> str:
    """SHA-256 of shapes and values: integers as int64, floats to 12 significant digits."""
    result = hashlib.sha256()
    for given in arrays:
        array = np.asarray(given)
        if array.dtype.kind == "f":
            result.update(repr(array.shape).encode())
            result.update(",".join(f"{value + 0.0:.11e}" for value in array.ravel().tolist()).encode())
        else:
            result.update(repr(array.shape).encode())
            result.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return result.hexdigest()


def plan_figures(plan: mp.Plan) -> Entry:
    assert plan.certificate is not None
    return {
        "plan": digest(plan.physical_to_logical, plan.slot_device),
        "shares": digest(plan.shares),
        "value": plan.certificate.value,
        "bound": plan.certificate.bound,
        "solver": plan.provenance.solver,
        "stop": plan.provenance.stop,
    }


def evaluation_figures(evaluation: mp.Evaluation) -> Entry:
    return {**evaluation.summary(), "risk": evaluation.risk()}


# Routing, clusters, models


@cache
def routing(
    seed: int = 0,
    tokens: int = 960,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    sources: int = 0,
    moe_layers: tuple[int, ...] | None = None,
) -> mp.RoutingTrace:
    """Tokens of two workloads that walk a Markov chain over experts: loads, co-activation and transitions are uneven.

    sources: devices on which tokens live, 0 for not known.
    """
    rng = np.random.default_rng(seed)
    follow = np.log(rng.dirichlet(np.full(experts, 0.4), size=(2, layers, experts)) + 0.02)
    sequence = np.arange(tokens) // 24
    kind = sequence % 2
    favourite = rng.integers(experts, size=tokens)
    ids = np.empty((tokens, layers, top_k), dtype=np.int64)
    for layer in range(layers):
        drawn = follow[kind, layer, favourite] + rng.gumbel(size=(tokens, experts))
        ids[:, layer] = np.argsort(-drawn, axis=1)[:, :top_k]
        favourite = ids[:, layer, 0]
    return mp.RoutingTrace.from_arrays(
        ids,
        num_experts=experts,
        sequence=sequence,
        workload=np.where(kind == 0, "chat", "code"),
        source=rng.integers(sources, size=tokens) if sources else None,
        moe_layers=moe_layers,
    )


@cache
def windows(
    seed: int = 0, count: int = 6, layers: int = 3, experts: int = 16, moe_layers: tuple[int, ...] | None = None
) -> mp.RoutingStatistics:
    """Counts of two workloads in windows, and nothing else."""
    rng = np.random.default_rng(seed)
    load = np.round(rng.gamma(0.8, size=(2, 1, layers, experts)) * rng.gamma(8.0, 20.0, (2, count, layers, experts)))
    return mp.RoutingStatistics.from_counts({"chat": load[0], "code": load[1]}, moe_layers=moe_layers, top_k=2)


def device(compute: float = 9e11, memory_bandwidth: float = 4e11, intra_bandwidth: float = 4e9) -> mp.Device:
    """Links, arithmetic and reading so slow that each of them is waited for at times, in steps of a few dozen
    tokens."""
    return mp.Device(compute=compute, memory=8e10, memory_bandwidth=memory_bandwidth, intra_bandwidth=intra_bandwidth)


LATENCIES = {"intra_latency": 5e-7, "inter_latency": 1e-6}


def cluster(*nodes: int) -> mp.Topology:
    return mp.Topology(
        nodes=tuple(mp.Node(devices=(device(),) * size, inter_bandwidth=1e9 * size) for size in nodes), **LATENCIES
    )


MIXED = mp.Topology(
    nodes=(
        mp.Node(devices=(device(), device(5e11, 3e11, 2e9), device(2e12)), inter_bandwidth=2e9),
        mp.Node(devices=(device(9e11, 4e11),), inter_bandwidth=1e9),
    ),
    **LATENCIES,
)
ONE_NODE, TWO_NODES = cluster(4), cluster(2, 2)


def model(layers: int = 3, experts: int = 8, top_k: int = 2, **fields: Any) -> mp.ModelSpec:
    return mp.ModelSpec(layers=layers, experts=experts, top_k=top_k, hidden_size=512, ffn_size=256, **fields)


def problem(
    topology: mp.Topology = TWO_NODES,
    trace: mp.RoutingTrace | None = None,
    statistics: mp.RoutingStatistics | None = None,
    groups: int = 1,
    **fields: Any,
) -> mp.Problem:
    """On tokens unless statistics are given. Fields of the objective and of the problem, by their names."""
    names = mp.Objective.model_fields
    objective = mp.Objective(**{name: fields.pop(name) for name in [*fields] if name in names})
    if statistics is None:
        statistics = mp.RoutingStatistics.from_trace(routing() if trace is None else trace)
    spec = model(
        statistics.num_layers,
        statistics.experts,
        statistics.top_k or 2,
        groups=groups,
        moe_layers=statistics.moe_layers,
    )
    return mp.Problem(spec, topology, statistics, objective, **fields)


def held_steps(asked: mp.Problem) -> mp.Steps | None:
    """Steps of other sequences than those solved on."""
    if asked.statistics.sample is None:
        return None
    spec = asked.model
    other = routing(100, 480, spec.layers, spec.experts, spec.top_k, moe_layers=spec.moe_layers)
    return other.decode_steps(24, steps=10, seed=5)


# Solves

QUICK = {"proposals": 240, "step_tokens": 24, "steps": 8}
"""Of search: some tenths of a second."""
COUNTS = {"proposals": 1200}


def solve_case(
    name: str,
    solver: str | None,
    asked: Callable[[], mp.Problem],
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    group: str | None = None,
    **loose: float,
) -> None:
    external = solver in ("exflow", "moetuner")

    def answer() -> Entry:
        given = asked()
        plan = mp.solve(given, solver, seed=seed, **(options or {}))
        figures = plan_figures(plan)
        if external:
            return {name: figures[name] for name in ("value", "bound", "solver", "stop")}
        steps = held_steps(given)
        if steps is not None:
            evaluation = mp.evaluate(plan, steps, given)
            # Regret needs references, which one plan alone does not have.
            regret = given.objective.risk == "regret"
            figures["held_out"] = float(evaluation.step_seconds.mean()) if regret else evaluation.risk()
        if given.current is not None:
            figures["moves"] = migration(given.current, plan).moves
            figures["bytes_moved"] = migration(given.current, plan).bytes_moved
        return figures

    case(name, group or solver or "chosen", **({"*": PROGRAM_TOLERANCE} if external else loose))(answer)


for baseline in ("contiguous", "round_robin", "random"):
    solve_case(f"{baseline}: one slot an expert", baseline, problem, seed=3)
    solve_case(
        f"{baseline}: replicas, layers with slots of their own",
        baseline,
        lambda: problem(MIXED, slots=[9, 12, 14]),
        seed=4,
    )
    solve_case(
        f"{baseline}: counts", baseline, lambda: problem(statistics=windows(), device_slots=[4, 6, 6, 3]), seed=5
    )

solve_case("eplb: global", "eplb", lambda: problem(slots=12), {"hierarchical": False})
solve_case(
    "eplb: hierarchical",
    "eplb",
    lambda: problem(cluster(4, 4), statistics=windows(), groups=4, slots=24),
    {"hierarchical": True},
)
solve_case("eplb: the form that fits", "eplb", lambda: problem(statistics=windows(1), groups=4, slots=[16, 20, 24]))
solve_case("eplb: uneven slots", "eplb", lambda: problem(MIXED, statistics=windows(2), device_slots=[8, 3, 7, 2]))

ROUTED_ONCE = {"tokens": 600, "layers": 4, "experts": 8, "top_k": 1}
for backend in ("highs", "cbc"):
    solve_case(
        f"exflow: direct, {backend}",
        "exflow",
        lambda: problem(cluster(2), routing(1, 300, 3, 6, 1), execution="context_coherent"),
        {"backend": backend},
    )
    solve_case(
        f"moetuner: {backend}",
        "moetuner",
        lambda: problem(cluster(2), routing(1, 300, 3, 6, 2)),
        {"backend": backend, "tolerance": 0.0, "program2": "ilp"},
    )
for form in ("staged", "bisect"):
    solve_case(
        f"exflow: {form}",
        "exflow",
        lambda: problem(TWO_NODES, routing(2, 300, 3, 8, 1), execution="context_coherent"),
        {"form": form},
    )
solve_case("exflow: uneven slots", "exflow", lambda: problem(cluster(2), routing(3, 300, 3, 6, 2), device_slots=[4, 2]))
solve_case(
    "moetuner: chain on devices of several speeds",
    "moetuner",
    lambda: problem(MIXED, routing(2, 300)),
    {"tolerance": 0.0, "program2": "chain"},
)
solve_case(
    "moetuner: uneven slots",
    "moetuner",
    lambda: problem(cluster(3), routing(3, 300), device_slots=[4, 2, 2]),
    {"tolerance": 0.0},
)

STEPS = {"step_tokens": 24, "steps": 6}
solve_case("chain: step, one node", "chain", lambda: problem(cluster(2)), STEPS)
solve_case("chain: step, several speeds", "chain", lambda: problem(MIXED, routing(2, 480, 3, 6)), STEPS, seed=2)
solve_case("chain: step, two nodes, flat copies", "chain", lambda: problem(node_dedup=False), STEPS)
solve_case(
    "chain: step, context-coherent",
    "chain",
    lambda: problem(cluster(2), routing(4, 480, 3, 6), execution="context_coherent"),
    {"minimise": "step", **STEPS},
)
solve_case(
    "chain: prefill, pinned and forbidden",
    "chain",
    lambda: problem(cluster(2), pinned={(0, 3): 1, (2, 0): 0}, forbidden={(1, 5): [0]}),
    {"batch": "prefill", "step_tokens": 64, "steps": 5},
)
solve_case(
    "chain: transitions", "chain", lambda: problem(cluster(2), routing(**ROUTED_ONCE), execution="context_coherent")
)
solve_case(
    "chain: transitions, uneven slots",
    "chain",
    lambda: problem(cluster(3), routing(5), device_slots=[2, 3, 3]),
    {"minimise": "transitions"},
)

solve_case("chosen: chain where it proves", None, lambda: problem(cluster(2)), STEPS)
solve_case("chosen: search where chain cannot", None, lambda: problem(MIXED, slots=12), QUICK)
solve_case("chosen: search on counts", None, lambda: problem(statistics=windows(), slots=20), COUNTS)
solve_case(
    "chosen: context-coherent", None, lambda: problem(cluster(2), routing(**ROUTED_ONCE), execution="context_coherent")
)

RISKS = ("mean", "cvar:0.75", "worst_workload", "regret")
WIDE = {"seed": 7, "tokens": 1200, "layers": 4, "experts": 16, "top_k": 4}


def risk_cases(risk: str) -> None:
    group = f"search, {risk}"
    solve_case(f"search: {risk}, one slot an expert", "search", lambda: problem(risk=risk), QUICK, group=group)
    solve_case(f"search: {risk}, replicas", "search", lambda: problem(slots=12, risk=risk), QUICK, group=group)
    solve_case(
        f"search: {risk}, free shares",
        "search",
        lambda: problem(MIXED, slots=11, risk=risk, split="free"),
        QUICK,
        group=group,
        seed=1,
    )
    solve_case(
        f"search: {risk}, nearest replica",
        "search",
        lambda: problem(slots=12, risk=risk, replica_choice="nearest"),
        QUICK,
        group=group,
    )
    solve_case(
        f"search: {risk}, context-coherent",
        "search",
        lambda: problem(execution="context_coherent", risk=risk),
        QUICK,
        group=group,
    )
    solve_case(
        f"search: {risk}, context-coherent replicas",
        "search",
        lambda: problem(execution="context_coherent", slots=12, split="free", risk=risk),
        QUICK,
        group=group,
        seed=2,
    )
    solve_case(
        f"search: {risk}, counts",
        "search",
        lambda: problem(statistics=windows(3), slots=20, risk=risk),
        COUNTS,
        group=group,
    )
    solve_case(
        f"search: {risk}, counts, free shares",
        "search",
        lambda: problem(MIXED, statistics=windows(4), slots=20, risk=risk, split="free"),
        COUNTS,
        group=group,
    )
    solve_case(
        f"search: {risk}, moves limited",
        "search",
        lambda: from_contiguous(9, slots=10, risk=risk),
        QUICK,
        group=group,
    )


def from_contiguous(most: float, **fields: Any) -> mp.Problem:
    """A problem whose answer may move so many experts from the contiguous plan."""
    asked = problem(**fields)
    start = mp.solve(asked, "contiguous")
    return replace(asked, current=start, max_moved_bytes=most * asked.model.bytes_per_expert)


for one in RISKS:
    risk_cases(one)

solve_case("search: default steps", "search", problem, {"proposals": 120})
solve_case("search: another seed", "search", lambda: problem(slots=12), QUICK, seed=11)
solve_case(
    "search: prefill", "search", lambda: problem(slots=12), {"batch": "prefill", "proposals": 200, "step_tokens": 96}
)
solve_case(
    "search: four of sixteen experts", "search", lambda: problem(cluster(4, 4), routing(**WIDE), slots=24), QUICK
)
solve_case(
    "search: flat copies, fp8 out",
    "search",
    lambda: problem(slots=12, node_dedup=False, dispatch_dtype="fp8"),
    QUICK,
)
solve_case(
    "search: prefill, nearest replica, flat copies",
    "search",
    lambda: problem(slots=12, replica_choice="nearest", node_dedup=False),
    {"batch": "prefill", "proposals": 200, "step_tokens": 48, "steps": 6},
)
solve_case(
    "search: nearest, homes not recorded",
    "search",
    lambda: problem(slots=12, replica_choice="nearest", split="free"),
    QUICK,
)
solve_case(
    "search: nearest, counts",
    "search",
    lambda: problem(statistics=windows(), slots=20, replica_choice="nearest"),
    COUNTS,
)
solve_case("search: devices of several speeds", "search", lambda: problem(MIXED, slots=10), QUICK)
solve_case("search: uneven slots", "search", lambda: problem(MIXED, device_slots=[4, 2, 3, 1]), QUICK)
solve_case("search: layers with slots of their own", "search", lambda: problem(slots=[8, 11, 14], split="free"), QUICK)
solve_case(
    "search: layers with slots of their own by device",
    "search",
    lambda: problem(device_slots=[[2, 2, 2, 2], [4, 3, 1, 2], [3, 3, 3, 3]], execution="context_coherent"),
    QUICK,
)
solve_case(
    "search: layers with slots of their own, counts",
    "search",
    lambda: problem(statistics=windows(moe_layers=(1, 2, 5)), slots=[16, 19, 24]),
    COUNTS,
)
solve_case(
    "search: pinned and forbidden",
    "search",
    lambda: problem(slots=12, pinned={(0, 0): 3, (1, 4): 2}, forbidden={(2, 1): [0, 1], (0, 5): [3]}),
    QUICK,
)
solve_case(
    "search: pinned and forbidden, counts",
    "search",
    lambda: problem(statistics=windows(), slots=20, pinned={(0, 0): 3}, forbidden={(2, 1): [0, 1]}),
    COUNTS,
)
solve_case(
    "search: tolerates devices",
    "search",
    lambda: problem(slots=16, tolerates=mp.single_failures(TWO_NODES, ("device",))),
    QUICK,
)
solve_case(
    "search: tolerates a node, context-coherent",
    "search",
    lambda: problem(
        slots=16, tolerates=mp.single_failures(TWO_NODES, ("node",)), execution="context_coherent", split="free"
    ),
    QUICK,
)
solve_case(
    "search: tolerates nodes, counts",
    "search",
    lambda: problem(statistics=windows(), slots=32, tolerates=mp.single_failures(TWO_NODES, ("node",))),
    COUNTS,
)
solve_case("search: few moves", "search", lambda: from_contiguous(3), QUICK)
solve_case("search: no move", "search", lambda: from_contiguous(0, slots=12, split="free"), QUICK)
solve_case("search: moves limited, free shares", "search", lambda: from_contiguous(6, slots=12, split="free"), QUICK)
solve_case(
    "search: moves limited, context-coherent",
    "search",
    lambda: from_contiguous(6, execution="context_coherent"),
    QUICK,
)
solve_case("search: moves limited, counts", "search", lambda: from_contiguous(8, statistics=windows(), slots=20), QUICK)
solve_case(
    "search: current without a limit",
    "search",
    lambda: replace(from_contiguous(1, slots=12), max_moved_bytes=None),
    QUICK,
)
solve_case(
    "search: one window of counts",
    "search",
    lambda: problem(statistics=windows(5, 1), slots=20, split="free"),
    COUNTS,
)
for most in (0.0, 0.1):
    solve_case(
        f"search: counts, groups, {most} off home",
        "search",
        lambda most=most: problem(cluster(2, 2), statistics=windows(6), groups=4, slots=20),
        {**COUNTS, "off_home": most},
    )
solve_case("search: groups, on tokens", "search", lambda: problem(groups=4, slots=12), QUICK)
solve_case(
    "search: tokens drawn from transitions",
    "search",
    lambda: problem(
        statistics=replace(mp.RoutingStatistics.from_trace(routing(8)), sample=None, coactivation=None),
        execution="context_coherent",
    ),
    QUICK,
)
solve_case("search: one device", "search", lambda: problem(cluster(1)), QUICK)

# Time enough that nothing is left to gain: then it is the work and not the clock that decides.
LONG = 1e5
solve_case("search: certified by all placements", "search", lambda: problem(cluster(2)), {**QUICK, "certify": LONG})
solve_case(
    "search: certified by sets and relaxations",
    "search",
    lambda: problem(cluster(2), routing(9, 240, 2, 6), slots=7),
    {**QUICK, "certify": LONG},
    bound=BOUND_TOLERANCE,
)
solve_case(
    "search: certified, context-coherent",
    "search",
    lambda: problem(cluster(2), routing(9, 240, 2, 6), slots=7, execution="context_coherent"),
    {**QUICK, "certify": LONG},
    bound=BOUND_TOLERANCE,
)
solve_case(
    "search: certified, two nodes, tail",
    "search",
    lambda: problem(TWO_NODES, routing(9, 240, 2, 6), slots=7, risk="cvar:0.5"),
    {**QUICK, "certify": LONG},
    bound=BOUND_TOLERANCE,
)


# Beside solves


@case("statistics: counted from a trace", "judging")
def _() -> Entry:
    counted = mp.RoutingStatistics.from_trace(routing(), sample_tokens=500)
    sample = counted.require_sample()
    return {
        "load": digest(counted.load, counted.window_workload),
        "pairs": digest(counted.total_coactivation, counted.total_transitions),
        "sample": digest(sample.expert_ids, sample.sequence, sample.position, sample.workload),
    }


@case("steps: decode, prefill, recorded, split", "judging")
def _() -> Entry:
    trace = routing(sources=4)
    parts = {
        "decode": trace.decode_steps(24, 10, seed=1),
        "prefill": trace.prefill_steps(96, 5, seed=2),
        "recorded": replace(trace, step=np.arange(trace.num_tokens) // 80).recorded_steps(),
    }
    entry: Entry = {}
    for name, steps in parts.items():
        entry[name] = digest(steps.expert_ids, steps.offsets, steps.workload)
        entry[f"{name}_source"] = None if steps.source is None else digest(steps.source)
    for by in ("sequence", "time"):
        entry[f"split_{by}"] = digest(*(part.expert_ids for part in trace.split(by=by, held_out=0.3)))
    return entry


@case("steps: drawn from counts", "judging")
def _() -> Entry:
    statistics = windows()
    steps = sample_steps(statistics.load, 2, statistics.moe_layers, step_tokens=32, steps=6, seed=3)
    return {"steps": digest(steps.expert_ids, steps.offsets)}


def judged(asked: mp.Problem, steps: mp.Steps | None = None) -> tuple[mp.Plan, mp.Steps, mp.Evaluation]:
    plan = mp.solve(asked, "random", seed=2)
    steps = held_steps(asked) if steps is None else steps
    assert steps is not None
    return plan, steps, mp.evaluate(plan, steps, asked)


@case("evaluate: a plan with replicas, either execution", "judging")
def _() -> Entry:
    entry: Entry = {}
    for execution in ("dispatch_combine", "context_coherent"):
        for name, topology in (("even", TWO_NODES), ("mixed", MIXED)):
            found = judged(problem(topology, slots=12, execution=execution))[2]
            entry |= {f"{execution}.{name}.{key}": value for key, value in evaluation_figures(found).items()}
            entry[f"{execution}.{name}.binds"] = digest(found.dispatch_at, found.compute_at, found.combine_at)
    return entry


@case("evaluate: homes, nearest replicas, flat copies, fp8 out", "judging")
def _() -> Entry:
    asked = problem(slots=12, replica_choice="nearest", node_dedup=False, dispatch_dtype="fp8", risk="cvar:0.8")
    steps = replace(
        routing(101, 240).decode_steps(24, 10, seed=5), source=np.random.default_rng(0).integers(4, size=240)
    )
    return evaluation_figures(judged(asked, steps)[2])


@case("evaluate: shares given, empty slots", "judging")
def _() -> Entry:
    asked = problem(MIXED, slots=[9, 12, 14], risk="worst_workload")
    plan = mp.solve(asked, "search", seed=1, **QUICK)
    rng = np.random.default_rng(4)
    weight = np.where(plan.filled, rng.random(plan.shares.shape) + 0.1, 0.0)
    for row, share in zip(plan.physical_to_logical, weight, strict=True):
        held = row >= 0
        share[held] /= np.bincount(row[held], share[held], asked.model.experts)[row[held]]
    steps = held_steps(asked)
    assert steps is not None
    return evaluation_figures(mp.evaluate(replace(plan, shares=weight), steps, asked))


@case("binding_terms", "judging")
def _() -> Entry:
    entry: Entry = {}
    for execution in ("dispatch_combine", "context_coherent"):
        found = mp.bottleneck_terms(judged(problem(MIXED, slots=12, execution=execution))[2])
        entry |= {f"{execution}.{term}": seconds for term, seconds in found.term_seconds().items()}
        entry[f"{execution}.tables"] = digest(found.steps, found.seconds, found.device_steps, found.node_steps)
    return entry


@case("optimal_shares", "judging")
def _() -> Entry:
    entry: Entry = {}
    for name, topology in (("even", ONE_NODE), ("mixed", MIXED)):
        asked = problem(topology, slots=12, split="free")
        plan, steps, before = judged(asked)
        found = mp.optimal_shares(plan, steps, asked)
        entry |= {
            f"{name}.shares": digest(found.plan.shares),
            f"{name}.prices": digest(np.round(found.price, 9)),
            f"{name}.before": float(before.step_seconds.mean()),
            f"{name}.after": float(mp.evaluate(found.plan, steps, asked).step_seconds.mean()),
        }
    return entry


def verdict_figures(decision: mp.Decision) -> Entry:
    entry: Entry = {"action": decision.action, "chosen": decision.chosen}
    for number, verdict in enumerate(decision.verdicts):
        names = ("current", "candidate", "gain", "gain_low", "gain_high", "payback_steps", "payback_steps_high")
        entry |= {f"{number}.{name}": float(getattr(verdict, name)) for name in names}
        moves = verdict.migration
        entry |= {f"{number}.bytes_moved": moves.bytes_moved, f"{number}.migration_seconds": moves.seconds}
        entry[f"{number}.moves"] = digest(moves.layer, moves.expert, moves.source, moves.target)
    return entry


def alternatives(asked: mp.Problem) -> tuple[mp.Plan, list[mp.Plan]]:
    options = QUICK if asked.statistics.sample is not None else COUNTS
    plans = [mp.solve(asked, "eplb"), mp.solve(asked, "search", **options)]
    return mp.solve(asked, "contiguous"), plans


@case("decide: on a trace", "judging")
def _() -> Entry:
    asked = problem(slots=12)
    current, candidates = alternatives(asked)
    return verdict_figures(
        mp.decide(current, candidates, routing(102), asked, concurrency=16, resamples=40, seed=3, horizon_steps=1e4)
    )


@case("decide: on steps, by regret and by tail", "judging")
def _() -> Entry:
    entry: Entry = {}
    for risk in ("regret", "cvar:0.8"):
        asked = problem(MIXED, slots=12, risk=risk)
        current, candidates = alternatives(asked)
        steps = held_steps(asked)
        assert steps is not None
        decision = mp.decide(current, candidates, steps, asked, resamples=60, seed=4, bytes_per_expert=1e6)
        entry |= {f"{risk}.{name}": value for name, value in verdict_figures(decision).items()}
    return entry


@case("decide: on counts", "judging")
def _() -> Entry:
    asked = problem(statistics=windows(), slots=20)
    current, candidates = alternatives(asked)
    held = windows(20, 24).load[:24]
    return verdict_figures(
        decide_on_counts(current, candidates, held, asked, step_tokens=64, resamples=80, seed=5, horizon_steps=1e6)
    )


@case("what_if: every single failure", "planning")
def _() -> Entry:
    asked = problem(slots=12)
    plan = mp.solve(asked, "search", **QUICK)
    steps = held_steps(asked)
    assert steps is not None
    return outcome_figures(mp.what_if(plan, asked, steps, seconds=None, seed=1, options=QUICK))


@case("what_if: failures that every expert survives, few moves", "planning")
def _() -> Entry:
    asked = problem(slots=16, tolerates=mp.single_failures(TWO_NODES), split="free")
    plan = mp.solve(asked, "search", **QUICK)
    steps = held_steps(asked)
    assert steps is not None
    limit = 4 * asked.model.bytes_per_expert
    return outcome_figures(mp.what_if(plan, asked, steps, seconds=None, seed=1, options=QUICK, max_moved_bytes=limit))


@case("what_if: growing, shrinking and moving away", "planning")
def _() -> Entry:
    asked = problem(slots=10)
    plan = mp.solve(asked, "eplb")
    steps = held_steps(asked)
    assert steps is not None
    changes = [
        mp.Change.resizing("six", TWO_NODES, TWO_NODES.resized(devices=6)),
        mp.Change.resizing("three", TWO_NODES, TWO_NODES.resized(devices=3), slots=9),
        mp.Change.moving("mixed", MIXED, slots=[9, 10, 11]),
    ]
    return outcome_figures(mp.what_if(plan, asked, steps, changes, seconds=None, seed=2, options=QUICK))


def outcome_figures(found: mp.WhatIf) -> Entry:
    entry: Entry = {"before": found.before.risk()}
    for outcome in found.outcomes:
        name = outcome.change.name
        entry |= {f"{name}.lost": digest(outcome.lost), f"{name}.lost_load": outcome.lost_load}
        entry[f"{name}.extra_slots"] = outcome.extra_slots
        for kind in ("degraded", "repaired", "ready"):
            result = getattr(outcome, kind)
            entry[f"{name}.{kind}"] = None if result is None else result.evaluation.risk()
            if result is not None:
                entry[f"{name}.{kind}.plan"] = digest(result.plan.physical_to_logical, result.plan.shares)
                entry[f"{name}.{kind}.moved"] = result.migration.bytes_moved
                entry[f"{name}.{kind}.reloaded"] = result.migration.bytes_reloaded
    return entry


@case("pareto: slots, failures and bytes moved", "planning")
def _() -> Entry:
    asked = problem(split="free")
    steps = held_steps(asked)
    assert steps is not None
    start = mp.solve(asked, "contiguous")
    front = mp.pareto(
        asked, steps, redundant=[0, 4, 8], current=start, max_moved=[None, 6e6], seconds=None, seed=1, options=QUICK
    )
    return {
        "best": digest(front.best),
        "refused": len(front.refused),
        "plans": digest(
            *(array for point in front.points for array in (point.plan.physical_to_logical, point.plan.shares))
        ),
        "seconds": [point.seconds for point in front.points],
        "memory": [point.memory for point in front.points],
        "moved": [point.bytes_moved for point in front.points],
        "survived": [sum(point.survived.values()) for point in front.points],
    }


@case("survives", "planning")
def _() -> Entry:
    plan = mp.solve(problem(slots=14), "search", **QUICK)
    return {"survives": digest(mp.survives(plan, mp.single_failures(TWO_NODES)))}


@case("drift: change, none, and slow traffic", "planning")
def _() -> Entry:
    rng = np.random.default_rng(0)
    skew = rng.dirichlet(np.ones(8), size=3)
    stream = [rng.multinomial(300, row, size=40) for row in (*skew, *np.roll(skew, 1, axis=1))]
    before, after = np.stack(stream[:3], axis=1).astype(float), np.stack(stream[3:], axis=1).astype(float)
    slow = before * (1.0 + np.sin(np.arange(40) / 6.0)[:, None, None])
    entry: Entry = {}
    for name, windows_before, since in (
        ("change", before[:24], np.concatenate([before[24:], after[:8]])),
        ("none", before[:24], before[24:]),
        ("slow", slow[:20], slow[20:]),
    ):
        found = drift(windows_before, since, block=2, permutations=999, seed=1)
        names = ("p", "since", "divergence", "layer", "layer_divergence", "dependence")
        entry |= {f"{name}.{figure}": getattr(found, figure) for figure in names}
    return entry


@case("rebalance_experts: the published example and others", "planning")
def _() -> Entry:
    published = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ]
    )
    drawn = windows(30, 1, 4, 16).load[0]
    return {
        "published": digest(*rebalance_experts(published, 16, 4, 2, 8)),
        "global": digest(*rebalance_experts(drawn, 24, 1, 1, 4)),
        "groups": digest(*rebalance_experts(drawn, 24, 4, 2, 8)),
        "no spare": digest(*rebalance_experts(drawn, 16, 3, 2, 4)),
    }


# Writing and comparing


def answered(chosen: Case) -> Entry:
    """The case's figures as JSON holds them."""
    return {name: _plain(value) for name, value in chosen.answer().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    # JSON has no infinity.
    return float(value) if math.isfinite(value) else str(float(value))


def differences(chosen: Case, recorded: Entry | None, now: Entry) -> list[str]:
    """What differs, a line a figure."""
    if recorded is None:
        return [f"{chosen.name}: not recorded"]
    return [
        f"{chosen.name}: {name} was {recorded.get(name, 'not there')}, is {now.get(name, 'not there')}"
        for name in sorted({*recorded, *now})
        if name not in recorded or name not in now or not _same(recorded[name], now[name], chosen.tolerance(name))
    ]


def _same(first: Any, second: Any, tolerance: float) -> bool:
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(_same(a, b, tolerance) for a, b in zip(first, second, strict=True))
    if isinstance(first, float) or isinstance(second, float):
        if not isinstance(first, (int, float)) or not isinstance(second, (int, float)):
            return False
        # Seconds of a step are small: what is nothing beside them is no difference.
        return math.isclose(first, second, rel_tol=tolerance, abs_tol=1e-15)
    return bool(first == second)


def recorded_answers(path: Path = ANSWERS) -> dict[str, Entry]:
    answers: dict[str, Entry] = json.loads(path.read_text(encoding="utf-8"))
    return answers


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="write the answers of all cases")
    what.add_argument("--compare", type=Path, metavar="FILE", help="print the answers that differ; exit 1 if any does")
    given = parser.parse_args(arguments)
    if given.write is not None:
        answers = {name: answered(each) for name, each in CASES.items()}
        given.write.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{len(answers)} cases written to {given.write}")
        return 0
    recorded = recorded_answers(given.compare)
    lines = [f"{name}: recorded, but no case any more" for name in recorded if name not in CASES]
    for name, each in CASES.items():
        lines += differences(each, recorded.get(name), answered(each))
    print("\n".join([*lines, f"{len(CASES)} cases compared, {len(lines)} differences"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
