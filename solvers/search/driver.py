"""A search: starts, rounds of annealing, whole placements evaluated, the best one kept and certified."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.degraded import failure_mask
from ...placement.errors import SolveError, UnsupportedError
from ...placement.objective import tail_weight, weighted_mean
from ...placement.plan import Stop
from ...placement.problem import Problem
from ...placement.steps import Phase
from ..base import Budget, Solution
from ..certify.step_time import risk_bound
from ..chain import Chain, fastest_step
from ..shares import layer_shares, towards
from .annealer import CALIBRATION, Annealer, CoolingSchedule, MoveBudget, Start, multistart
from .count_search import balance_windows, search_counts, tables_by_steps
from .evaluator import Answer, Evaluator, better
from .moves import MoveRules, RiskWeights
from .online_homes import check_online, search_homes
from .scenario import Scenario, mean_risks, rates_for, scenario_from, weighted_risks, with_sources, worst_risks
from .starts import (
    aligned,
    allowed_devices,
    can_align,
    current_placement,
    even_shares,
    first_placements,
    homes_of,
    made_placements,
)

HOT, COLD = 1.0, 1e-3
"""Temperatures, in what a proposal typically changes: at the first many that worsen are taken, at the last none."""
PATIENCE = 100
"""Proposals a slot that a cooling from `HOT` takes to end better than it began."""
PROPOSALS = 20_000
"""A layer, when neither they nor seconds are given."""
COOLINGS = 4
"""Coolings where moves are limited, so that what one learns of layers' worth serves the next."""
BALANCED_PART, BALANCED_PROPOSALS = 0.2, 4
"""Of the time, and proposals for each one that counts traffic, for a start that balances loads alone."""
ROUNDS = 12
"""Rounds one cooling is cut into; between rounds the clock, the keyboard and the risk weights are looked at."""


def run_search(
    problem: Problem,
    budget: Budget,
    batch: Phase | None,
    step_tokens: int | None,
    steps: int | None,
    proposals: int | None,
    certify: float,
    off_home: float | None,
) -> Solution:
    """Searches on scenario steps, or where only counts are known on these; see `Search` for the arguments."""
    scenario = with_sources(scenario_from(problem, batch, step_tokens, steps, budget.seed), problem, budget.seed)
    allowed = allowed_devices(problem)
    rules = _rules(problem, allowed)
    if problem.objective.online:
        check_online(problem, scenario)
        # What is best without copies keeps tokens near, which exchanges for few copies do not look at.
        plain = replace(problem, objective=problem.objective.replace(online=0))
        brief = Budget(None if budget.left is None else budget.left / 2, budget.seed)
        solution = run_search(plain, brief, batch, step_tokens, steps, proposals, 0.0, off_home)
        plain_start = _even_start(problem, solution.physical_to_logical)
        starts = [plain_start, *first_placements(problem, allowed, budget)]
        return search_homes(problem, budget, scenario, allowed, starts, proposals or PROPOSALS)
    if scenario.steps is None and problem.max_moves is None:
        homes = None if off_home is None else homes_of(problem, scenario.loads, rules, off_home)
        tables = homes.tables if homes is not None else tables_by_steps(problem, scenario, allowed)
        if tables is None:
            tables = made_placements(problem, allowed, budget)[0]
        current = current_placement(problem, allowed)
        return search_counts(problem, budget, scenario, rules, tables, current, proposals, homes)
    if off_home is not None:
        raise UnsupportedError(
            "off_home and Problem.max_moved_bytes do not go together; leave one of them out"
            if scenario.steps is None
            else "off_home limits what counts alone can tell of node traffic; these statistics hold a token sample, or "
            "the transitions context-coherent steps are drawn from, on which the traffic itself is priced"
        )
    annealer = Annealer(problem, scenario, rates_for(problem, scenario), rules, budget.seed)
    try:
        return _search(problem, budget, scenario, annealer, allowed, proposals or PROPOSALS, certify)
    finally:
        annealer.close()


def _search(
    problem: Problem,
    budget: Budget,
    scenario: Scenario,
    annealer: Annealer,
    allowed: BoolArray,
    proposals: int,
    certify: float,
) -> Solution:
    evaluator = Evaluator(problem, scenario)
    coherent, limited = problem.objective.execution == "context_coherent", problem.max_moves is not None
    calibration = 0 if limited else CALIBRATION
    tail, weight, price = problem.objective.tail is not None, scenario.step_weight, 0.0
    risks = _first_risks(problem, scenario)
    moves: MoveBudget | None = None
    stop: Stop = "finished" if budget.seconds is None else "time limit"

    def present(risk_changed: bool = False) -> Answer:
        placed = annealer.answer(risk_changed) if moves is None else moves.answer()
        return evaluator.answer([layer.slot_expert for layer in placed], [layer.share for layer in placed])

    starts = first_placements(problem, allowed, budget)
    start = starts[0]
    # The first answer needs no compiled code, which a new installation has to wait for.
    best = evaluator.answer(*start)
    budget.report(best.value, best.bound, "first placement")
    try:
        if not coherent and not limited and problem.objective.replica_choice != "balanced":
            balanced, interrupted = _balanced_start(problem, scenario, allowed, budget, proposals, start)
            starts.append(balanced)
            if interrupted:
                best = better(best, evaluator.answer(*balanced))
                raise KeyboardInterrupt
        # Layers of one placement cannot be mixed with another's where neighbours matter.
        if coherent and scenario.steps is not None:
            start, price = _coherent_start(problem, scenario, allowed, budget, proposals, starts)
        annealer.start(*start, risks, calibration)
        best = better(present(), best)
        if not coherent and len(starts) > 1:
            start = multistart(annealer, starts, risks, budget, proposals)
            annealer.start(*start, risks)
            best = better(best, present())
        if problem.objective.risk == "regret":
            evaluator.reference, risks = _references(problem, scenario, annealer, evaluator, proposals, budget)
            annealer.start(*start, risks, calibration)
            best = present()
        if limited:
            # References of regret are each workload's own best, whatever moves.
            moves = MoveBudget(problem, annealer, coherent, price)
            annealer.start(*start, risks)
        budget.report(best.value, best.bound, "start")
        schedule = CoolingSchedule(budget, proposals, ROUNDS, reserve=_reserve(budget, evaluator.seconds, certify))
        for round_ in range(ROUNDS):
            with schedule.timing():
                _anneal_round(annealer, risks, schedule, round_, problem, moves)
            last = round_ == ROUNDS - 1 or budget.spent
            if last or budget.seconds is None or evaluator.due:
                best = better(best, present(risk_changed=tail))
            budget.report(best.value, best.bound, f"round {round_ + 1} of {ROUNDS}")
            if last:
                break
            risks, weight = _tail_risks(scenario, problem, annealer, risks, weight)
    except KeyboardInterrupt:
        stop = "interrupted"
        if annealer.states:
            best = better(best, present(risk_changed=tail))
    best = _or_current(problem, evaluator, allowed, best)
    if stop != "interrupted":
        best = certify_answer(evaluator, optimise_shares(evaluator, best, budget), budget, certify)
        stop = "interrupted" if budget.interrupted else stop
    return Solution(best.table, best.certificate, shares=best.shares, stop=stop, separable=True)


def _reserve(budget: Budget, evaluation: float, certify: float) -> float:
    """Seconds of a time limit that the answer wants after the last round: it is evaluated then, before its bound and
    after it; shares and a bound that nobody asked for have parts of the limit."""
    if budget.seconds is None:
        return 0.0
    parts = SHARES_PART + (0.0 if certify > 0 else UNASKED)
    return min(0.5 * budget.seconds, EVALUATIONS * evaluation + parts * budget.seconds)


# Starts.


def _rules(problem: Problem, allowed: BoolArray) -> list[MoveRules]:
    failures = failure_mask(problem.tolerates, problem.num_devices)
    # Where each step is divided anew shares count for nothing.
    free = problem.objective.split == "free" and problem.objective.replica_choice != "balanced"
    return [MoveRules(mask, free, failures) for mask in allowed]


def _balanced_start(
    problem: Problem, scenario: Scenario, allowed: BoolArray, budget: Budget, proposals: int, start: Start
) -> tuple[Start, bool]:
    """The steps' loads alone balanced, from what packs them all, and whether Ctrl-C ended that. A proposal costs
    a tenth of one that counts traffic, and a soft maximum leads across plateaus of step times, where no exchange of two
    experts changes any."""
    # What a workload loses is measured against plans that nobody has yet.
    risk = "mean" if problem.objective.risk == "regret" else problem.objective.risk
    even = replace(problem, objective=problem.objective.replace(risk=risk))
    evaluator = Evaluator(even, scenario.windows)
    brief = Budget(None if budget.left is None else BALANCED_PART * budget.left, budget.seed)
    tables = tables_by_steps(even, evaluator.scenario, allowed) or start[0]
    rules = _rules(problem, allowed)
    best, stop = balance_windows(even, brief, evaluator, rules, tables, None, BALANCED_PROPOSALS * proposals, None)
    return _even_start(problem, best.table), stop == "interrupted"


def _even_start(problem: Problem, table: IntArray) -> Start:
    """A slot table [L, P] with equal shares, to begin from."""
    own = [row[slots] for row, slots in zip(table, problem.own_slots, strict=True)]
    return own, even_shares(problem, own)


def _coherent_start(
    problem: Problem, scenario: Scenario, allowed: BoolArray, budget: Budget, proposals: int, starts: list[Start]
) -> tuple[Start, float]:
    """The best of the starts, of one found as if tokens returned home, and of both renamed for what tokens do next; and
    what a move is worth, where moves are limited."""
    relaxed, price = _as_dispatched(problem, scenario, allowed, budget, proposals, starts[0])
    more = [relaxed]
    if can_align(problem, allowed):
        more = [aligned(problem, scenario, relaxed, True), aligned(problem, scenario, starts[0], False), relaxed]
    quick = Evaluator(problem, scenario.beginning)
    return min(starts + more, key=lambda start: quick.answer(*start).value), price


def _as_dispatched(
    problem: Problem, scenario: Scenario, allowed: BoolArray, budget: Budget, proposals: int, start: Start
) -> tuple[Start, float]:
    """A start for context-coherent search: a third of the effort as if tokens returned home. Work and copies a token
    are the same there and layers do not depend on each other, so that a proposal costs a tenth. Also what a move is
    worth, where moves are limited."""
    relaxed = replace(problem, objective=problem.objective.replace(execution="dispatch_combine"))
    brief = Budget(None if budget.left is None else budget.left / 3, budget.seed)
    rules = _rules(problem, allowed)
    annealer = Annealer(relaxed, scenario, rates_for(relaxed, scenario), rules, budget.seed)
    try:
        risks = _first_risks(problem, scenario)
        annealer.start(*start, risks, calibration=0)
        moves = None if problem.max_moves is None else MoveBudget(problem, annealer, coupled=False)
        annealer.start(*start, risks)
        schedule = CoolingSchedule(brief, proposals)
        for round_ in range(ROUNDS):
            with schedule.timing():
                _anneal_round(annealer, risks, schedule, round_, problem, moves)
        placed = annealer.answer(risk_changed=False) if moves is None else moves.answer()
    finally:
        annealer.close()
    price = 0.0 if moves is None else moves.price
    return ([layer.slot_expert for layer in placed], [layer.share for layer in placed]), price


def _or_current(problem: Problem, evaluator: Evaluator, allowed: BoolArray, best: Answer) -> Answer:
    """The plan in force where it fits the problem and is better than what was found: starts are compared briefly, and
    what is best of each layer by proposals' tokens need not be best on the whole."""
    current = current_placement(problem, allowed, exact=True)
    return best if current is None else better(best, evaluator.answer(*current))


# Rounds.


def _anneal_round(
    annealer: Annealer,
    risks: list[RiskWeights],
    schedule: CoolingSchedule,
    round_: int,
    problem: Problem,
    moves: MoveBudget | None = None,
) -> None:
    """Where moves are limited, limits are dealt anew first."""
    rounds = ROUNDS
    if moves is not None and moves.coupled:
        moves.deal()
    elif moves is not None:
        # Several coolings, each from the best mix so far with limits around it.
        rounds //= COOLINGS
        moving_risk = problem.objective.tail is not None
        if round_ and (moving_risk or round_ % rounds == 0):
            best = moves.answer()
            tables, shares = [layer.slot_expert for layer in best], [layer.share for layer in best]
            annealer.start(tables, shares, risks, calibration=0)
            moves.deal()
            if moving_risk:
                # What was remembered under other weights of steps does not compare.
                moves.forget()
            annealer.start(tables, shares, risks)
    temperatures = _temperatures(round_ % rounds, rounds, schedule.expected / problem.num_slots * rounds / ROUNDS)
    annealer.run(risks, schedule.proposals(round_), *temperatures)


def _temperatures(round_: int, rounds: int, proposals_a_slot: float) -> tuple[float, float]:
    """(from, to) of a round, in typical changes. Too few proposals to cool down from far: begin nearer."""
    hot = HOT * min(1.0, max(COLD / HOT, proposals_a_slot / PATIENCE))
    ratio = COLD / hot
    return hot * ratio ** (round_ / rounds), hot * ratio ** ((round_ + 1) / rounds)


# What of the steps counts.


def _first_risks(problem: Problem, scenario: Scenario) -> list[RiskWeights]:
    return worst_risks(scenario) if problem.objective.risk == "worst_workload" else mean_risks(scenario)


def _tail_risks(
    scenario: Scenario, problem: Problem, annealer: Annealer, risks: list[RiskWeights], weight: FloatArray
) -> tuple[list[RiskWeights], FloatArray]:
    """Under cvar, steps that are slow over all layers weigh more than by `weight` [S] in the next round; other risks
    stay."""
    tail = problem.objective.tail
    if tail is None:
        return risks, weight
    figures = scenario.over_layers(np.stack([state.now.cost for state in annealer.states], axis=1))
    slow = tail_weight(figures, tail, scenario.risk_weight, scenario.kind)
    # Half of the last weights stay, else two sets of steps would take turns at being slow.
    weight = 0.5 * weight + 0.5 * slow
    return weighted_risks(scenario, weight), weight


def _references(
    problem: Problem, scenario: Scenario, annealer: Annealer, evaluator: Evaluator, proposals: int, budget: Budget
) -> tuple[FloatArray, list[RiskWeights]]:
    """Each workload solved alone first: what it loses by sharing a plan is measured against that, layer by layer."""
    present = np.unique(scenario.workload)
    layers = problem.model.layers
    reference = np.zeros(len(scenario.workloads))
    best = np.zeros((len(present), layers))
    for w, code in enumerate(present):
        mine = np.where(scenario.workload == code, scenario.step_weight, 0.0)
        risks = weighted_risks(scenario, mine)
        now = [state.now for state in annealer.states]
        annealer.start([layer.slot_expert for layer in now], [layer.share for layer in now], risks)
        # A quarter of all effort, over all workloads; with a time limit, a first short walk tells how much that is.
        timed = budget.seconds is not None
        rounds = 4 * (len(present) - w) + 1 if timed else 1
        schedule = CoolingSchedule(budget, max(1, proposals // 4), rounds=rounds)
        for turn in range(2 if timed else 1):
            with schedule.timing():
                annealer.run(risks, schedule.proposals(turn), HOT, COLD)
        best[w] = [state.value for state in annealer.states]
        placed = annealer.answer(risk_changed=False)
        answer = evaluator.answer([layer.slot_expert for layer in placed], [layer.share for layer in placed])
        reference[code] = weighted_mean(evaluator.figures(answer.table, answer.shares), mine)
    return reference, worst_risks(scenario, best)


# What is done to the best placement in the end: shares and bound.

EVALUATIONS = 3
"""Of the whole answer, after the last round."""
SHARES_PART = 0.05
"""Of a time limit, that may go into programs of shares."""
UNASKED = 0.05
"""Part of a time limit that may go into the bound when no time for it was asked."""
QUICK_SECONDS = 0.5
"""Estimated seconds a proof may take that nobody asked for, without a time limit."""


def optimise_shares(evaluator: Evaluator, answer: Answer, budget: Budget) -> Answer:
    """The answer with shares from linear programs where replicas may share freely and that lowers the risk's value; see
    `layer_shares`. Ctrl-C leaves it as it is."""
    problem, scenario = evaluator.problem, evaluator.scenario
    objective = problem.objective
    # Programs know shares that count alike from every source rank.
    if objective.split != "free" or not problem.has_replicas or objective.replica_choice != "share":
        return answer
    table, certificate, shares = answer
    brief = Budget(None if budget.seconds is None else SHARES_PART * budget.seconds)
    aim, weights = shares.copy(), scenario.layer_weights(scenario.step_weight)
    with budget.until_interrupted():
        for layer in range(len(table)):
            if brief.spent:
                break
            loads = scenario.loads[:, layer]
            aim[layer] = layer_shares(
                loads, table[layer], shares[layer], problem.slot_device, problem, weights[:, layer]
            ).shares
        lower = towards(shares, aim, certificate.value, lambda tried: evaluator.certificate(table, tried).value)
        if lower is not None:
            answer = Answer(table, evaluator.certificate(table, lower), lower)
            budget.report(answer.value, answer.bound, "shares")
    return answer


def certify_answer(evaluator: Evaluator, answer: Answer, budget: Budget, seconds: float) -> Answer:
    """The answer after `seconds` spent on its bound; with 0, little.

    Where a layer has few placements they are all gone through, and the answer is the best of them. Ctrl-C ends it with
    what is proven so far. Tells of better bounds as they are found.
    """
    scenario, problem = evaluator.scenario, evaluator.problem
    table, _, shares = answer
    if scenario.steps is None:
        return answer
    # Replaying a large model takes seconds, and the plan stays the same while its bound rises.
    first = evaluator.certificate(table, shares)

    def tell(bound: float) -> None:
        evaluator.proven = max(evaluator.proven, bound)
        budget.report(first.value, min(first.value, max(first.bound or bound, bound)), "bound")

    unasked = None if budget.seconds is None else UNASKED * budget.seconds
    limit = seconds if seconds > 0 else unasked
    with budget.until_interrupted():
        if (best := _best_of_all(evaluator, limit)) is not None:
            tell(best[1])
            even = np.ones(best[0].shape)
            improves = evaluator.certificate(best[0], even).value < evaluator.certificate(table, shares).value
            if improves and _within_reach(problem, best[0]):
                table, shares = best[0], even
        else:
            figures = evaluator.figures(table, shares)
            tell(risk_bound(problem, scenario.steps, scenario.workload, figures, evaluator.reference, limit, tell))
    return Answer(table, evaluator.certificate(table, shares), shares)


def _within_reach(problem: Problem, table: IntArray) -> bool:
    """Whether a placement [L, P] moves no more from the plan in force than allowed."""
    if problem.current is None or problem.max_moves is None:
        return True
    stays = problem.current.holds[np.arange(len(table))[:, None], table, problem.slot_device]
    return int((~stays).sum()) <= problem.max_moves


def _best_of_all(evaluator: Evaluator, seconds: float | None) -> tuple[IntArray, float] | None:
    """(slot table, mean step time) of the best of all placements, if there is time to go through them."""
    problem, steps = evaluator.problem, evaluator.scenario.steps
    if steps is None or steps.source is not None or problem.objective.risk != "mean":
        return None
    if problem.has_replicas or problem.tolerates or not problem.layers_alike:
        return None
    work = Chain().work_on(problem, steps.num_steps)
    if work is None or work > (QUICK_SECONDS if seconds is None else seconds):
        return None
    try:
        fastest = fastest_step(problem, Budget(seconds), steps, "scenario")
    except SolveError:
        return None
    # What certifies is the sum along the path, which its own replay only meets up to rounding.
    bound = fastest.certificate.bound
    return None if bound is None else (fastest.physical_to_logical, bound)
