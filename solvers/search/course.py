"""The course of a search: start, references for regret, rounds of annealing, and the best placement seen."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ...placement.errors import SolveError, UnsupportedError
from ...placement.failures import failure_mask
from ...placement.plan import Certificate, Stop
from ...placement.problem import Problem
from ..base import Budget, Solution, fill_slots
from ..exflow_start import assignment_sweeps
from . import Batch
from .certified import certified
from .engine import Engine
from .group_homes import homes_of
from .group_start import groups_on_nodes
from .homes import with_homes
from .judge import Judge
from .layout import Aim, Moves
from .load_course import search_loads
from .near_start import near_layer
from .pace import Pace
from .race import race
from .scenario import Scenario, mean_aim, rates_for, scenario_from, weighted_aim, worst_aim
from .starts import balanced_layer, even_shares
from .tolerant_start import tolerant_layer

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

HOT, COLD = 1.0, 1e-3
"""Temperatures, in what a proposal typically changes: at the first many that worsen are taken, at the last none."""
PATIENCE = 100
"""Proposals a slot that a cooling from `HOT` takes to end better than it began."""
PROPOSALS = 20_000
"""A layer, when neither they nor seconds are given."""
ROUNDS = 12
"""Rounds one cooling is cut into; between rounds the clock, the keyboard and the risk weights are looked at."""


def run_search(
    problem: Problem,
    budget: Budget,
    batch: Batch,
    step_tokens: int,
    steps: int | None,
    proposals: int | None,
    certify: float,
    off_home: float | None,
) -> Solution:
    """Anneals every layer on scenario steps; see `Search` for the arguments."""
    scenario = with_homes(scenario_from(problem, batch, step_tokens, steps, budget.seed), problem, budget.seed)
    allowed = allowed_devices(problem)
    moves = _moves(problem, allowed)
    if scenario.steps is None:
        homes = None if off_home is None else homes_of(problem, scenario.loads, moves, off_home)
        tables = _starts(problem, allowed, budget)[0] if homes is None else homes.tables
        return search_loads(problem, budget, scenario, moves, tables, proposals, homes)
    if off_home is not None:
        raise UnsupportedError(
            "off_home limits what counts alone can tell of node traffic; these statistics hold a token sample, on which "
            "the traffic itself is priced"
        )
    engine = Engine(problem, scenario, rates_for(problem, scenario), moves, budget.seed)
    try:
        return _search(problem, budget, scenario, engine, allowed, proposals or PROPOSALS, certify)
    finally:
        engine.close()


def _search(
    problem: Problem,
    budget: Budget,
    scenario: Scenario,
    engine: Engine,
    allowed: npt.NDArray[np.bool_],
    proposals: int,
    certify: float,
) -> Solution:
    stop: Stop
    judge = Judge(problem, scenario)
    starts = [
        (tables, [even_shares(problem, table) for table in tables]) for tables in _starts(problem, allowed, budget)
    ]
    if problem.objective.split == "free" and problem.has_replicas:
        starts.append((starts[0][0], _one_serves(problem, starts[0][0])))
    if problem.objective.execution == "context_coherent" and scenario.steps is not None:
        starts.append(_as_dispatched(problem, scenario, allowed, budget, proposals, starts[0]))
    aims = [_first_aim(problem, scenario)] * problem.model.layers
    # Layers of one placement cannot be mixed with another's where neighbours matter.
    whole = problem.objective.execution == "context_coherent"
    first = min(starts, key=lambda start: judge.value(*start)) if whole else starts[0]
    engine.start(*first, aims)
    best = _answer(problem, engine, judge)
    moving_aims = problem.objective.tail is not None
    try:
        if not whole and len(starts) > 1:
            first = race(engine, starts, aims, budget, proposals)
            engine.start(*first, aims)
            best = min(best, _answer(problem, engine, judge), key=lambda answer: answer[1].value)
        if problem.objective.risk == "regret":
            judge.reference, aims = _regret(problem, scenario, engine, judge, proposals, budget)
            engine.start(*first, aims)
            best = _answer(problem, engine, judge)
        budget.report(best[1].value, best[1].bound, "start")
        pace = Pace(budget, proposals)
        for round_ in range(ROUNDS):
            if budget.spent:
                break
            with pace.timing():
                engine.run(aims, pace.proposals(round_), *_temperatures(round_, pace.expected / problem.num_slots))
            answer = _answer(problem, engine, judge, moving_aims)
            if answer[1].value < best[1].value:
                best = answer
            budget.report(best[1].value, best[1].bound, f"round {round_ + 1} of {ROUNDS}")
            aims = _tail_aims(problem, engine, aims)
        stop = "finished" if budget.seconds is None else "time limit"
    except KeyboardInterrupt:
        stop = "interrupted"
    if stop != "interrupted":
        best = certified(judge, best, budget, certify)
    return Solution(best[0], best[1], shares=best[2], stop=stop)


def _temperatures(round_: int, proposals_a_slot: float) -> tuple[float, float]:
    """(from, to) of a round, in typical changes. Too few proposals to cool down from far: begin nearer."""
    hot = HOT * min(1.0, max(COLD / HOT, proposals_a_slot / PATIENCE))
    ratio = COLD / hot
    return hot * ratio ** (round_ / ROUNDS), hot * ratio ** ((round_ + 1) / ROUNDS)


def allowed_devices(problem: Problem) -> npt.NDArray[np.bool_]:
    """[L, E, G] where each expert may stand, from pinned and forbidden devices.

    A pinned expert keeps its pinned device and gets no replica elsewhere.
    """
    mask = np.ones((problem.model.layers, problem.model.experts, problem.num_devices), dtype=bool)
    for (layer, expert), devices in problem.forbidden.items():
        mask[layer, expert, list(devices)] = False
    for (layer, expert), device in problem.pinned.items():
        mask[layer, expert] = False
        mask[layer, expert, device] = True
    return mask


def _moves(problem: Problem, allowed: npt.NDArray[np.bool_]) -> list[Moves]:
    failures = failure_mask(problem.tolerates, problem.num_devices)
    return [Moves(mask, problem.objective.split == "free", failures) for mask in allowed]


def _starts(problem: Problem, allowed: npt.NDArray[np.bool_], budget: Budget) -> list[list[IntArray]]:
    """First placements, [P] experts a layer: balanced, and where transitions count, swept for them."""
    statistics, speed = problem.statistics, problem.topology.compute / problem.topology.compute.mean()
    load = statistics.workload_load
    # Workloads weigh the same whatever was recorded of them, as they do under a risk that compares them.
    if problem.objective.risk in ("worst_workload", "regret"):
        load = load / np.maximum(load.sum(axis=2, keepdims=True), 1e-300)
    total = load.sum(axis=0)
    failures = failure_mask(problem.tolerates, problem.num_devices)
    if len(failures):
        return [
            [
                tolerant_layer(layer_load, problem.slots_per_device, mask, failures)
                for layer_load, mask in zip(total, allowed, strict=True)
            ]
        ]
    tables = [
        balanced_layer(total[layer], problem.slots_per_device, speed, allowed[layer])
        for layer in range(problem.model.layers)
    ]
    starts = [tables]
    if statistics.sample is not None and allowed.all():
        grouped = groups_on_nodes(problem, total)
        starts += [grouped] if grouped is not None else []
    near = problem.objective.replica_choice == "nearest" and problem.has_replicas and problem.topology.num_nodes > 1
    if near and allowed.all():
        slots, node_of = problem.slots_per_device, problem.topology.node_of
        # Where slots are so many that dealing ends in a corner, the balanced start has to do.
        with contextlib.suppress(SolveError):
            starts.append([near_layer(layer_load, slots, speed, node_of) for layer_load in total])
    coherent = problem.objective.execution == "context_coherent"
    if (
        coherent
        and statistics.sample is not None
        and allowed.all()
        and not problem.has_replicas
        and statistics.transitions is not None
    ):
        # A tenth of the time is plenty: sweeps converge in a second at 64 experts.
        brief = Budget(None if budget.left is None else budget.left / 10, budget.seed)
        swept = assignment_sweeps(statistics.total_transitions, problem.slots_per_device, brief)
        starts.append(list(fill_slots(swept)))
        if problem.topology.num_nodes > 1:
            starts.append(list(fill_slots(_nodes_first(problem, statistics.total_transitions, brief))))
    return starts


def _nodes_first(problem: Problem, transitions: FloatArray, budget: Budget) -> IntArray:
    """[L, E] devices swept in two stages, nodes and then the devices inside each, so that slow links count most."""
    slots, node_of = problem.slots_per_device, problem.topology.node_of
    nodes = assignment_sweeps(transitions, np.bincount(node_of, weights=slots).astype(np.int64), budget)
    device_of = np.empty_like(nodes)
    for node in range(problem.topology.num_nodes):
        mine = np.stack([np.flatnonzero(row == node) for row in nodes])
        devices = np.flatnonzero(node_of == node)
        inside = np.stack([t[np.ix_(a, b)] for t, a, b in zip(transitions, mine[:-1], mine[1:], strict=True)])
        np.put_along_axis(device_of, mine, devices[assignment_sweeps(inside, slots[devices], budget)], axis=1)
    return device_of


def _as_dispatched(
    problem: Problem,
    scenario: Scenario,
    allowed: npt.NDArray[np.bool_],
    budget: Budget,
    proposals: int,
    start: tuple[list[IntArray], list[FloatArray]],
) -> tuple[list[IntArray], list[FloatArray]]:
    """A start for context-coherent search: a third of the effort as if tokens returned home. Work and copies a token
    are the same there and layers do not depend on each other, so that a proposal costs a tenth."""
    relaxed = replace(problem, objective=problem.objective.replace(execution="dispatch_combine"))
    brief = Budget(None if budget.left is None else budget.left / 3, budget.seed)
    moves = _moves(problem, allowed)
    engine = Engine(relaxed, scenario, rates_for(relaxed, scenario), moves, budget.seed)
    try:
        aims = [_first_aim(problem, scenario)] * problem.model.layers
        engine.start(*start, aims)
        pace = Pace(brief, proposals)
        for round_ in range(ROUNDS):
            with pace.timing():
                engine.run(aims, pace.proposals(round_), *_temperatures(round_, pace.expected / problem.num_slots))
        placed = engine.answer(aims_changed=False)
    finally:
        engine.close()
    return [layer.slot_expert for layer in placed], [layer.share for layer in placed]


def _one_serves(problem: Problem, tables: list[IntArray]) -> list[FloatArray]:
    """[E, G] a layer: one replica of each expert serves all its tokens, heaviest first to the least loaded device, and the
    others stand by. Where weights are read rather than computed with, every replica that serves costs as much again."""
    result = []
    for table, load in zip(tables, problem.statistics.total_load, strict=True):
        share = np.zeros((problem.model.experts, problem.num_devices))
        loaded = np.zeros(problem.num_devices)
        holds = np.zeros(share.shape, dtype=bool)
        holds[table, problem.slot_device] = True
        for expert in np.argsort(-load, kind="stable"):
            device = int(np.argmin(np.where(holds[expert], loaded, np.inf)))
            share[expert, device] = 1.0
            loaded[device] += load[expert] / problem.topology.compute[device]
        result.append(share)
    return result


def _first_aim(problem: Problem, scenario: Scenario) -> Aim:
    return worst_aim(scenario) if problem.objective.risk == "worst_workload" else mean_aim(scenario)


def _tail_aims(problem: Problem, engine: Engine, aims: list[Aim]) -> list[Aim]:
    """Under cvar, steps that are slow over all layers weigh more in the next round; other aims stay."""
    tail = problem.objective.tail
    if tail is None:
        return aims
    seconds = np.sum([state.now.cost for state in engine.states], axis=0)
    count = max(1, round(len(seconds) * (1.0 - tail)))
    slow = np.zeros(len(seconds))
    slow[np.argsort(seconds)[-count:]] = 1.0 / count
    # Half of the last weights stay, else two sets of steps would take turns at being slow.
    weight = 0.5 * aims[0].weight + 0.5 * slow
    return [weighted_aim(weight)] * len(aims)


def _regret(
    problem: Problem, scenario: Scenario, engine: Engine, judge: Judge, proposals: int, budget: Budget
) -> tuple[FloatArray, list[Aim]]:
    """Each workload solved alone first: what it loses by sharing a plan is measured against that, layer by layer."""
    present = np.unique(scenario.workload)
    layers = problem.model.layers
    reference = np.zeros(len(scenario.workloads))
    best = np.zeros((len(present), layers))
    for w, code in enumerate(present):
        mine = scenario.workload == code
        aims = [weighted_aim(mine.astype(np.float64))] * layers
        now = [state.now for state in engine.states]
        engine.start([layer.slot_expert for layer in now], [layer.share for layer in now], aims)
        # A quarter of all effort, over all workloads; with a time limit, a first taste tells how much that is.
        timed = budget.seconds is not None
        pace = Pace(budget, max(1, proposals // 4), rounds=4 * (len(present) - w) + 1 if timed else 1)
        for taste in range(2 if timed else 1):
            with pace.timing():
                engine.run(aims, pace.proposals(taste), HOT, COLD)
        best[w] = [state.value for state in engine.states]
        table, _, shares = _answer(problem, engine, judge)
        reference[code] = judge.figures(table, shares)[mine].mean()
    return reference, [worst_aim(scenario, best[:, layer].copy()) for layer in range(layers)]


def _answer(
    problem: Problem, engine: Engine, judge: Judge, aims_changed: bool = False
) -> tuple[IntArray, Certificate, FloatArray]:
    """(slot table [L, P], certificate, shares [L, P]) of the engine's answer."""
    placed = engine.answer(aims_changed)
    table = np.stack([layer.slot_expert for layer in placed])
    shares = np.stack([layer.share[layer.slot_expert, problem.slot_device] for layer in placed])
    return table, judge.certificate(table, shares), shares
