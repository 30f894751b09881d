"""The course of a search: start, references for regret, rounds of annealing, and the best placement seen."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.errors import SolveError, UnsupportedError
from ...placement.failures import failure_mask
from ...placement.plan import Certificate, Stop
from ...placement.problem import Problem
from ...placement.risk import tail_weight, weighted_mean
from ..base import Budget, Solution
from ..chain import Chain, fastest_step
from ..shares import layer_shares, towards
from . import Batch
from .annealer import TASTE, Engine
from .count_search import search_loads
from .evaluator import Judge
from .kernel_types import Aim, Moves
from .move_budget import MoveBudget
from .multistart import Pace, Start, race
from .scenario import Scenario, mean_aims, rates_for, scenario_from, weighted_aims, with_homes, worst_aims
from .starts import aligned, allowed_devices, can_align, current_placement, first_placements, homes_of, made_placements

# The shares of a search's answer, made the best its placement can have.


Answer = tuple[IntArray, Certificate, FloatArray]

PART = 0.05
"""Of a time limit, that may go into programs of shares."""


def polished(judge: Judge, answer: Answer, budget: Budget) -> Answer:
    """The answer (slot table [L, P], certificate, shares [L, P]) with shares from linear programs where replicas may share
    freely and that lowers the risk's value; see `layer_shares`. Ctrl-C leaves it as it is."""
    problem, scenario = judge.problem, judge.scenario
    objective = problem.objective
    # Programs know shares that count alike from every home.
    if objective.split != "free" or not problem.has_replicas or objective.replica_choice != "share":
        return answer
    table, certificate, shares = answer
    brief = Budget(None if budget.seconds is None else PART * budget.seconds)
    aim, weights = shares.copy(), scenario.layer_weights(scenario.step_weight)
    with suppress(KeyboardInterrupt):
        for layer in range(len(table)):
            if brief.spent:
                break
            loads = scenario.loads[:, layer]
            aim[layer] = layer_shares(
                loads, table[layer], shares[layer], problem.slot_device, problem, weights[:, layer]
            ).shares
        better = towards(shares, aim, certificate.value, lambda tried: judge.certificate(table, tried).value)
        if better is not None:
            answer = table, judge.certificate(table, better), better
            budget.report(answer[1].value, answer[1].bound, "shares")
    return answer


# A search's answer with its certificate: the bound that the time given can prove.


UNASKED = 0.05
"""Part of a time limit that may go into the bound when no time for it was asked."""
QUICK_SECONDS = 0.5
"""Estimated seconds a proof may take that nobody asked for, without a time limit."""


def certified(judge: Judge, answer: Answer, budget: Budget, seconds: float) -> Answer:
    """The answer (slot table [L, P], certificate, shares [L, P]) after `seconds` spent on its bound; with 0, little.

    Where a layer has few placements they are all gone through, and the answer is the best of them. Ctrl-C ends it with what
    is proven so far. Tells of better bounds as they are found.
    """
    scenario, problem = judge.scenario, judge.problem
    table, _, shares = answer
    if scenario.steps is None:
        return answer
    from ..certify.step_time import risk_bound

    # Replaying a large model takes seconds, and the plan stays the same while its bound rises.
    found = judge.certificate(table, shares)

    def tell(bound: float) -> None:
        judge.proven = max(judge.proven, bound)
        budget.report(found.value, min(found.value, max(found.bound or bound, bound)), "bound")

    unasked = None if budget.seconds is None else UNASKED * budget.seconds
    given = seconds if seconds > 0 else unasked
    with suppress(KeyboardInterrupt):
        if (best := _best_of_all(judge, given)) is not None:
            tell(best[1])
            better = judge.figures(best[0], np.ones(best[0].shape)).mean() < judge.figures(table, shares).mean()
            if better and _within_reach(problem, best[0]):
                table, shares = best[0], np.ones(best[0].shape)
        else:
            figures = judge.figures(table, shares)
            tell(risk_bound(problem, scenario.steps, scenario.workload, figures, judge.reference, given, tell))
    return table, judge.certificate(table, shares), shares


def _within_reach(problem: Problem, table: IntArray) -> bool:
    """Whether a placement [L, P] moves no more from the plan in force than allowed."""
    if problem.current is None or problem.max_moves is None:
        return True
    held = problem.current.holds[np.arange(len(table))[:, None], table, problem.slot_device]
    return int((~held).sum()) <= problem.max_moves


def _best_of_all(judge: Judge, seconds: float | None) -> tuple[IntArray, float] | None:
    """(slot table, mean step time) of the best of all placements, if there is time to go through them."""
    problem, steps = judge.problem, judge.scenario.steps
    if steps is None or steps.source is not None or problem.objective.risk != "mean":
        return None
    if problem.has_replicas or problem.tolerates or not problem.layers_alike:
        return None
    work = Chain().work(problem, steps=steps.num_steps)
    if work is None or work > (QUICK_SECONDS if seconds is None else seconds):
        return None
    try:
        found = fastest_step(problem, Budget(seconds), steps, "scenario")
    except SolveError:
        return None
    # What certifies is the sum along the path, which its own replay only meets up to rounding.
    bound = found.certificate.bound
    return None if bound is None else (found.physical_to_logical, bound)


HOT, COLD = 1.0, 1e-3
"""Temperatures, in what a proposal typically changes: at the first many that worsen are taken, at the last none."""
PATIENCE = 100
"""Proposals a slot that a cooling from `HOT` takes to end better than it began."""
PROPOSALS = 20_000
"""A layer, when neither they nor seconds are given."""
COOLINGS = 4
"""Coolings where moves are limited, so that what one learns of layers' worth serves the next."""
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
    if scenario.steps is None and problem.max_moves is None:
        homes = None if off_home is None else homes_of(problem, scenario.loads, moves, off_home)
        tables = made_placements(problem, allowed, budget)[0] if homes is None else homes.tables
        current = current_placement(problem, allowed)
        return search_loads(problem, budget, scenario, moves, tables, current, proposals, homes)
    if off_home is not None:
        raise UnsupportedError(
            "off_home and Problem.max_moved_bytes do not go together; leave one of them out"
            if scenario.steps is None
            else "off_home limits what counts alone can tell of node traffic; these statistics hold a token sample, or the "
            "transitions context-coherent steps are drawn from, on which the traffic itself is priced"
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
    allowed: BoolArray,
    proposals: int,
    certify: float,
) -> Solution:
    stop: Stop
    judge = Judge(problem, scenario)
    starts, limited = first_placements(problem, allowed, budget), problem.max_moves is not None
    # Layers of one placement cannot be mixed with another's where neighbours matter.
    whole = problem.objective.execution == "context_coherent"
    aims = _first_aims(problem, scenario)
    first, price = starts[0], 0.0
    try:
        if whole and scenario.steps is not None:
            relaxed, price = _as_dispatched(problem, scenario, allowed, budget, proposals, first)
            if can_align(problem, allowed):
                starts += [aligned(problem, scenario, relaxed, True), aligned(problem, scenario, first, False)]
            starts.append(relaxed)
        if whole:
            quick = Judge(problem, scenario.beginning)
            first = min(starts, key=lambda start: quick.value(*start))
        engine.start(*first, aims, taste=0 if limited else TASTE)
    except KeyboardInterrupt:
        engine.start(*first, aims, taste=0)
        table, certificate, shares = _or_current(problem, judge, allowed, _answer(problem, engine, judge))
        return Solution(table, certificate, shares=shares, stop="interrupted")
    best = _answer(problem, engine, judge)
    moved: MoveBudget | None = None
    moving_aims, tail = problem.objective.tail is not None, scenario.step_weight
    try:
        if not whole and len(starts) > 1:
            first = race(engine, starts, aims, budget, proposals)
            engine.start(*first, aims)
            best = min(best, _answer(problem, engine, judge), key=lambda answer: answer[1].value)
        if problem.objective.risk == "regret":
            judge.reference, aims = _regret(problem, scenario, engine, judge, proposals, budget)
            engine.start(*first, aims, taste=0 if limited else TASTE)
            best = _answer(problem, engine, judge)
        if limited:
            # References of regret are each workload's own best, whatever moves.
            moved = MoveBudget(problem, engine, whole, price)
            engine.start(*first, aims)
        budget.report(best[1].value, best[1].bound, "start")
        pace = Pace(budget, proposals, reserve=judge.seconds)
        for round_ in range(ROUNDS):
            with pace.timing():
                _round(engine, aims, pace, round_, problem, moved)
            last = round_ == ROUNDS - 1 or budget.spent
            if last or budget.seconds is None or judge.due:
                answer = _answer(problem, engine, judge, moving_aims, moved)
                if answer[1].value < best[1].value:
                    best = answer
            budget.report(best[1].value, best[1].bound, f"round {round_ + 1} of {ROUNDS}")
            if last:
                break
            aims, tail = _tail_aims(scenario, problem, engine, aims, tail)
        stop = "finished" if budget.seconds is None else "time limit"
    except KeyboardInterrupt:
        stop = "interrupted"
        best = min(best, _answer(problem, engine, judge, moving_aims, moved), key=lambda answer: answer[1].value)
    best = _or_current(problem, judge, allowed, best)
    if stop != "interrupted":
        best = certified(judge, polished(judge, best, budget), budget, certify)
    return Solution(best[0], best[1], shares=best[2], stop=stop)


def _round(
    engine: Engine, aims: list[Aim], pace: Pace, round_: int, problem: Problem, moved: MoveBudget | None = None
) -> None:
    rounds = ROUNDS
    if moved is not None and moved.coupled:
        moved.deal()
    elif moved is not None:
        # Several coolings, each from the best mix so far with limits around it.
        rounds //= COOLINGS
        moving_aims = problem.objective.tail is not None
        if round_ and (moving_aims or round_ % rounds == 0):
            best = moved.answer()
            tables, shares = [layer.slot_expert for layer in best], [layer.share for layer in best]
            engine.start(tables, shares, aims, taste=0)
            moved.deal()
            if moving_aims:
                # What was remembered under other weights of steps does not compare.
                moved.forget()
            engine.start(tables, shares, aims)
    temperatures = _temperatures(round_ % rounds, rounds, pace.expected / problem.num_slots * rounds / ROUNDS)
    engine.run(aims, pace.proposals(round_), *temperatures)


def _temperatures(round_: int, rounds: int, proposals_a_slot: float) -> tuple[float, float]:
    """(from, to) of a round, in typical changes. Too few proposals to cool down from far: begin nearer."""
    hot = HOT * min(1.0, max(COLD / HOT, proposals_a_slot / PATIENCE))
    ratio = COLD / hot
    return hot * ratio ** (round_ / rounds), hot * ratio ** ((round_ + 1) / rounds)


def _moves(problem: Problem, allowed: BoolArray) -> list[Moves]:
    failures = failure_mask(problem.tolerates, problem.num_devices)
    return [Moves(mask, problem.objective.split == "free", failures) for mask in allowed]


def _as_dispatched(
    problem: Problem,
    scenario: Scenario,
    allowed: BoolArray,
    budget: Budget,
    proposals: int,
    start: Start,
) -> tuple[Start, float]:
    """A start for context-coherent search: a third of the effort as if tokens returned home. Work and copies a token
    are the same there and layers do not depend on each other, so that a proposal costs a tenth. Also what a move is
    worth, where moves are limited."""
    relaxed = replace(problem, objective=problem.objective.replace(execution="dispatch_combine"))
    brief = Budget(None if budget.left is None else budget.left / 3, budget.seed)
    moves = _moves(problem, allowed)
    engine = Engine(relaxed, scenario, rates_for(relaxed, scenario), moves, budget.seed)
    try:
        aims = _first_aims(problem, scenario)
        engine.start(*start, aims, taste=0)
        moved = None if problem.max_moves is None else MoveBudget(problem, engine, coupled=False)
        engine.start(*start, aims)
        pace = Pace(brief, proposals)
        for round_ in range(ROUNDS):
            with pace.timing():
                _round(engine, aims, pace, round_, problem, moved)
        placed = engine.answer(aims_changed=False) if moved is None else moved.answer()
    finally:
        engine.close()
    price = 0.0 if moved is None else moved.price
    return ([layer.slot_expert for layer in placed], [layer.share for layer in placed]), price


def _first_aims(problem: Problem, scenario: Scenario) -> list[Aim]:
    return worst_aims(scenario) if problem.objective.risk == "worst_workload" else mean_aims(scenario)


def _tail_aims(
    scenario: Scenario, problem: Problem, engine: Engine, aims: list[Aim], weight: FloatArray
) -> tuple[list[Aim], FloatArray]:
    """Under cvar, steps that are slow over all layers weigh more than by `weight` [S] in the next round; other aims stay."""
    tail = problem.objective.tail
    if tail is None:
        return aims, weight
    figures = scenario.over_layers(np.stack([state.now.cost for state in engine.states], axis=1))
    slow = tail_weight(figures, tail, None if scenario.weight is None else scenario.step_weight)
    # Half of the last weights stay, else two sets of steps would take turns at being slow.
    weight = 0.5 * weight + 0.5 * slow
    return weighted_aims(scenario, weight), weight


def _regret(
    problem: Problem, scenario: Scenario, engine: Engine, judge: Judge, proposals: int, budget: Budget
) -> tuple[FloatArray, list[Aim]]:
    """Each workload solved alone first: what it loses by sharing a plan is measured against that, layer by layer."""
    present = np.unique(scenario.workload)
    layers = problem.model.layers
    reference = np.zeros(len(scenario.workloads))
    best = np.zeros((len(present), layers))
    for w, code in enumerate(present):
        mine = np.where(scenario.workload == code, scenario.step_weight, 0.0)
        aims = weighted_aims(scenario, mine)
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
        reference[code] = weighted_mean(judge.figures(table, shares), mine)
    return reference, worst_aims(scenario, best)


def _or_current(problem: Problem, judge: Judge, allowed: BoolArray, best: Answer) -> Answer:
    """The plan in force where it fits the problem and is better than what was found: a race may pass over it, and what is
    best of each layer by proposals' tokens need not be best on the whole."""
    current = current_placement(problem, allowed, exact=True)
    if current is None:
        return best
    table, shares = problem.slot_table(current[0]), problem.slot_shares(*current)
    certificate = judge.certificate(table, shares)
    return (table, certificate, shares) if certificate.value < best[1].value else best


def _answer(
    problem: Problem, engine: Engine, judge: Judge, aims_changed: bool = False, moved: MoveBudget | None = None
) -> tuple[IntArray, Certificate, FloatArray]:
    """(slot table [L, P], certificate, shares [L, P]) of the engine's answer, within the budget of moves if any."""
    placed = engine.answer(aims_changed) if moved is None else moved.answer()
    rows = [layer.slot_expert for layer in placed]
    table, shares = problem.slot_table(rows), problem.slot_shares(rows, [layer.share for layer in placed])
    return table, judge.certificate(table, shares), shares
