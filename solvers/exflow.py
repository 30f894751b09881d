"""ExFlow: place experts by an integer program so that tokens change device between layers as seldom as possible.

From top to bottom: the solver; the program it states, in two forms; the order in which it divides devices; a quick good
placement to begin from; and a bound that needs no search.

The bound is of how many transitions between neighbouring layers a placement can keep on a device. With X the Gram
matrix of both layers' experts, the kept weight is the sum of the transition matrix times X's cross block. Without any
dual variables the bound is spectral: for equal slots C on G devices, total / G + C times the sum of the G - 1 largest
singular values of the doubly centred matrix. The semidefinite program adds what is known of X's entries (Zhao, Karisch,
Rendl and Wolkowicz, J. Comb. Optim. 2, 1998, for partitioning) and of triangles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .._types import FloatArray, IntArray
from ..placement.errors import InputError, UnsupportedError, nearest
from ..placement.plan import RELATIVE_TOLERANCE, Certificate, Stop
from ..placement.problem import Problem
from ..placement.validation import generator
from .base import Budget, Feature, Needs, Solution, fill_slots
from .certify.sdp import (
    CHUNK,
    MAX_ITERATIONS,
    THREADS,
    TRIANGLE_ITEMS,
    Entries,
    GramSpace,
    Linear,
    PrimalDual,
    RowSums,
    Term,
    Triangles,
)
from .chain import TRANSITIONS_OBJECTIVE
from .mip.program import Program, ProgramBuilder, Result, check_backend, forbidden_names, renaming, solve_program

SCALE = 1e6
"""Objective of a program whose every transition crosses: tolerances of 1e-6 then are a part in 1e12."""
MAX_PAIRS = 5_000_000
"""Pair variables beyond which the program and HiGHS's copy of it take more than 2.5 GB."""
BOUND_SHARE = 0.2
"""Part of the time left that goes into the semidefinite bound before the program."""
UNLIMITED_ITERATIONS = 300
"""Iterations of that bound where no time limit is given."""
PLAN_SHARE = 0.6
"""Part of a program's time that a portfolio gives to CP-SAT for a plan; HiGHS gets the rest for a bound."""
FORMS = ("direct", "staged", "bisect")
RESTARTS = 8
"""Random starts of assignment sweeps."""


class Exflow:
    """The integer program of Yao et al., "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts
    Model Inference" (ExFlow, arXiv 2401.08383): as many experts on a device as it has slots, fewest transitions
    between devices. Its variables are by expert pair, exactly equivalent to the paper's by token (see
    `exflow_program`); with top-k routing every pair of a token's experts in neighbouring layers counts 1/k.
    """

    name = "exflow"
    supports = frozenset({Feature.UNEVEN_SLOTS})
    needs = frozenset({Needs.TRANSITIONS})

    def solve(
        self,
        problem: Problem,
        budget: Budget,
        *,
        backend: str = "portfolio",
        form: str = "direct",
        warm_start: bool = True,
    ) -> Solution:
        """Places the experts; see `Solver` for the contract.

        Args:
            problem, budget: As of every solver.
            backend: A name of `mip.BACKENDS`. "portfolio" shares the time between CP-SAT, for plans, and HiGHS, for
                bounds.
            form: "direct" divides all devices at once; "staged" nodes first, then the devices of each node, so that the
                slow links count most; "bisect" in halves.
            warm_start: Begin from assignment sweeps, so that there is always a plan and never a worse one, nor one
                worse than `Problem.current`; False is the program alone.

        Returns:
            The plan, with a certificate of the share of transitions that cross devices.

        The bound holds for any placement, whatever the form: the best of a transportation bound (`local_weight_bound`),
        a semidefinite one (`kept_at_most`) and what the backend proved of the first program, since what crosses between
        groups of devices crosses between devices. Later programs only see what earlier ones left together; their bounds
        prove nothing about the whole and are not used. So only a form of one program can prove its plan optimal.

        Raises:
            InputError: unknown backend or form. UnsupportedError: no transitions, or too large a program.
            SolveError: no placement in time (without warm_start).
        """
        check_backend(backend)
        transitions, slots = problem.statistics.total_transitions, problem.slots_per_device
        stage = stages(problem.topology.node_of, slots, form)
        total = float(transitions.sum())
        if stage is None or total == 0.0:
            table = np.tile(np.arange(problem.model.experts), (problem.model.layers, 1))
            return Solution(table, Certificate(TRANSITIONS_OBJECTIVE, 0.0, 0.0))
        check_size(transitions, stage.group_slots(slots))
        most_local = min(
            local_weight_bound(transitions, slots, budget), _semidefinite_bound(transitions, slots, budget)
        )
        floor = max(0.0, 1.0 - most_local / total)
        run = _Run(slots, floor, backend, warm_start, budget, stage.total_effort(slots))
        device_of = run.place(transitions, stage, first=True)
        current = _current_devices(problem) if warm_start else None
        if current is not None and local_weight(transitions, current) > local_weight(transitions, device_of):
            device_of = current
        value = max(0.0, 1.0 - local_weight(transitions, device_of) / total)
        bound = min(run.bound, value)
        budget.report(value, bound)
        return Solution(
            fill_slots(device_of),
            Certificate(TRANSITIONS_OBJECTIVE, value, bound),
            stop=run.stop,
        )


def _current_devices(problem: Problem) -> IntArray | None:
    """[L, E] device of each expert in the plan in force, or None where there is none with these slots and one of
    each."""
    current = problem.current
    if current is None or not np.array_equal(current.slots_per_device, problem.layer_slots):
        return None
    return np.asarray(current.holds.argmax(axis=2)) if (current.replicas == 1).all() else None


def _semidefinite_bound(transitions: FloatArray, slots: IntArray, budget: Budget) -> float:
    """Most weight kept, in a fifth of the time left, or without a limit in a number of iterations that brings most of
    it."""
    # Compiled kernels: loading them takes a second, which importing the package must not.

    if budget.left is None:
        return kept_at_most(transitions, slots, np.inf, UNLIMITED_ITERATIONS)
    return kept_at_most(transitions, slots, BOUND_SHARE * budget.left)


@dataclass
class _Run:
    """One solve going through its stages. bound: of the whole problem's crossing share, raised as more is proven."""

    slots: IntArray
    bound: float
    backend: str
    warm_start: bool
    budget: Budget
    effort_left: float
    stop: Stop = "finished"

    def place(self, transitions: FloatArray, stage: Stage, first: bool = False) -> IntArray:
        """[L, n] device of each of the n experts a layer that this stage and those after it divide."""
        group_of = self.divide(transitions, stage, first)
        if not any(stage.parts):
            return np.array([group[0] for group in stage.groups])[group_of]
        device_of = np.empty_like(group_of)
        layers = len(group_of)
        for index, (group, part) in enumerate(zip(stage.groups, stage.parts, strict=True)):
            members = np.nonzero(group_of == index)[1].reshape(layers, -1)
            if part is None or not members.size:
                inner = np.full(members.shape, group[0], dtype=np.int64)
            else:
                inside = [w[np.ix_(a, b)] for w, a, b in zip(transitions, members, members[1:], strict=False)]
                inner = self.place(np.array(inside), part)
            np.put_along_axis(device_of, members, inner, axis=1)
        return device_of

    def divide(self, transitions: FloatArray, stage: Stage, first: bool) -> IntArray:
        """[L, n] group of each expert, by one integer program."""
        slots, budget, whole = stage.group_slots(self.slots), self.budget, first and not any(stage.parts)
        effort = stage.effort(self.slots)
        stop_at = None if budget.left is None else budget.elapsed + budget.left * effort / self.effort_left
        self.effort_left -= effort
        if not whole:
            budget.report(None, self.bound, f"dividing {int(slots.sum())} experts a layer among {len(slots)} groups")
        total = float(transitions.sum())
        if total == 0.0:
            return np.tile(np.repeat(np.arange(len(slots)), slots), (len(transitions) + 1, 1))
        start = assignment_sweeps(transitions, slots, budget) if self.warm_start else None
        if start is not None and whole:
            value = 1.0 - local_weight(transitions, start) / total
            budget.report(value, self.bound, "assignment sweeps")
            if value <= self.bound * (1.0 + RELATIVE_TOLERANCE):
                return start
        if start is not None and self.stop == "interrupted":
            return start
        seconds = None if stop_at is None else max(0.0, stop_at - budget.elapsed)
        device_of, bound, stop = divide(
            transitions, slots, budget, self.backend, seconds, start, self.tell if whole else None
        )
        if self.stop == "finished" or stop == "interrupted":
            self.stop = stop
        if first:
            self.bound = max(self.bound, bound)
        return device_of

    def tell(self, value: float, bound: float | None) -> None:
        """News from inside the program, where it is the only one."""
        self.budget.report(value, max(self.bound, bound or 0.0))


def divide(
    transitions: FloatArray,
    slots: IntArray,
    budget: Budget,
    backend: str,
    seconds: float | None,
    start: IntArray | None,
    report: Callable[[float, float | None], None] | None = None,
) -> tuple[IntArray, float, Stop]:
    """[L, n] device of each expert, a bound of the crossing share, and why the last program stopped.

    A portfolio with a limit of time gives HiGHS a moment, in which small programs end, then CP-SAT the program of one
    variable a pair, then HiGHS the rest. Any other backend solves its own program.
    """
    end = None if seconds is None else budget.elapsed + seconds
    turns: list[tuple[str, float]] = [(backend, 1.0)]
    if backend == "portfolio":
        turns = [("highs", 1.0)] if seconds is None else [("highs", 0.1), ("cpsat", 0.1 + PLAN_SHARE), ("highs", 1.0)]
    programs: dict[str, ExflowProgram] = {}
    bound, best = -math.inf, math.inf
    result: Result | None = None
    program: ExflowProgram | None = None

    def tell(value: float, proven: float | None) -> None:
        nonlocal best
        if report is not None and program is not None and value * program.unit < best:
            best = value * program.unit
            report(best, None if proven is None else max(bound, proven * program.unit))

    for name, share in turns:
        if name not in programs:
            programs[name] = (together_program if name == "cpsat" else exflow_program)(transitions, slots)
        program = programs[name]
        left = None if seconds is None or end is None else end - budget.elapsed - (1.0 - share) * seconds
        result = solve_program(
            program.program,
            budget,
            backend=name,
            seconds=None if left is None else max(0.0, left),
            start=None if start is None else program.start(start),
            report=tell,
        )
        bound = max(bound, result.bound * program.unit)
        if result.values is not None:
            start = program.placement(result.values)
        if result.stop == "interrupted" or result.infeasible or result.status == "optimal":
            break
    assert result is not None
    assert program is not None
    if start is None:
        start = program.placement(result.solution(program.program))
    return start, bound, result.stop


@dataclass(frozen=True, eq=False)
class ExflowProgram:
    """The program and its meaning. Its objective times `unit` is the share of transitions that cross devices.

    Args:
        program: What to solve.
        transitions: [L-1, n, n] weights.
        slots: [G].
        unit: See above.
        x: [L, n, U] numbers of the variables that say which of the U devices with slots an expert is on.
        z: [pairs, U] those that say that both experts of a pair are on a device, or [pairs, 1] that they are on the
            same one.
        pairs: [pairs, 3] layer, expert and successor of each.
        break_layer, break_order: The layer whose experts name interchangeable devices, in that order.
    """

    program: Program
    transitions: FloatArray
    slots: IntArray
    unit: float
    x: IntArray
    z: IntArray
    pairs: IntArray
    break_layer: int
    break_order: IntArray

    def start(self, device_of: IntArray) -> FloatArray:
        """[variables] values of a placement [L, n]."""
        device_of = renaming(device_of[self.break_layer, self.break_order], self.slots.tolist())[device_of]
        values = np.zeros(self.program.variables)
        on = device_of[..., None] == np.flatnonzero(self.slots)
        values[self.x] = on
        layer, i, j = self.pairs.T
        both = on[layer, i] & on[layer + 1, j]
        values[self.z] = both if self.z.shape[1] == both.shape[1] else both.any(axis=1, keepdims=True)
        return values

    def placement(self, values: FloatArray) -> IntArray:
        """[L, n] device of each expert."""
        return np.asarray(np.flatnonzero(self.slots)[values[self.x].argmax(axis=2)], dtype=np.int64)


def check_size(transitions: FloatArray, slots: IntArray) -> None:
    """Refuses transitions [L-1, n, n] on devices of slots [G] whose program would be too large.

    Raises:
        UnsupportedError: more than MAX_PAIRS pair variables.
    """
    pairs = int(np.count_nonzero(transitions)) * int(np.count_nonzero(slots))
    if pairs > MAX_PAIRS:
        raise UnsupportedError(
            f"ExFlow's program would have {pairs:,} pair variables (limit {MAX_PAIRS:,}): too large for an integer "
            "program; use form='staged' or form='bisect' if those are smaller, or the search solver"
        )


def exflow_program(transitions: FloatArray, slots: IntArray) -> ExflowProgram:
    """The program for transitions [L-1, n, n] (L >= 2, not all zero) and device slots [G] that sum to n.

    ExFlow (arXiv 2401.08383) has one variable a token and layer that says whether the token's two experts are apart.
    Tokens with the same pair have the same constraints, so one variable a pair, weighted by its tokens, is the same
    program. x[l,i,g]: expert i of layer l is on device g. z[l,i,j,g]: i and its successor j both are. Then

        minimise    share of transitions (i, j) without a z
        subject to  sum_g x[l,i,g] = 1,  sum_i x[l,i,g] = slots[g],  z <= x[l,i,g],  z <= x[l+1,j,g]
                    sum_j z[l,i,j,g] <= slots[g] x[l,i,g],   sum_i z[l,i,j,g] <= slots[g] x[l+1,j,g]

    The last two are products of the slot constraint with an x (reformulation-linearisation): no placement breaks
    them, and without them the relaxation is vacuous (x = 1/G keeps every transition local). Both the pairwise and the
    summed rows are kept: with either alone the search tree grew several times. Devices with equal slots can be
    renamed, so the experts of a middle layer take them in order of traffic.

    Raises:
        UnsupportedError: more than MAX_PAIRS pair variables.
    """
    check_size(transitions, slots)
    builder, x, pairs = _placements(transitions, slots, "exflow")
    used = slots[slots > 0]
    layer, i, j = pairs.T
    scale = SCALE / float(transitions.sum())
    z = builder.add_variables((len(pairs), len(used)), cost=-scale * transitions[layer, i, j][:, None], implied=True)
    builder.constant = SCALE
    for mine in (x[layer, i], x[layer + 1, j]):
        builder.add_rows(np.stack([z.ravel(), mine.ravel()], axis=1), [1.0, -1.0], upper=0.0)
    experts = transitions.shape[1]
    for expert, holder in ((i, x[:-1]), (j, x[1:])):
        # The pairs of each (layer, expert), with a row a device where more of them than it has slots could be together.
        key = layer * experts + expert
        many = np.bincount(key, minlength=holder.shape[0] * experts)[:, None] > used
        row = np.cumsum(many.ravel()).reshape(many.shape) - 1
        which, device = np.nonzero(many[key])
        holders = holder.reshape(-1, len(used))[many]
        slots_of = np.broadcast_to(used, many.shape)[many].astype(np.float64)
        rows = len(holders)
        builder.add_sparse_rows(
            rows,
            np.concatenate([row[key[which], device], np.arange(rows)]),
            np.concatenate([z[which, device], holders]),
            np.concatenate([np.ones(len(which)), -slots_of]),
            upper=0.0,
        )
    return _named(builder, transitions, slots, 1.0 / SCALE, x, z, pairs)


def together_program(transitions: FloatArray, slots: IntArray) -> ExflowProgram:
    """The same problem with one variable a pair, whichever device it is on: what CP-SAT finds the best plans of.

    z[l,i,j] + x[l,i,g] - x[l+1,j,g] <= 1 and the other way round: experts together are on the same device. Sums of z by
    expert are at most max(slots): with these rows CP-SAT's bound on 16 experts and 4 devices rose from 0.20 to 0.32 of
    all transitions in 30 s, and its plans got better. It has a G-th of the other's variables and a weaker relaxation.
    The objective counts transitions, whole numbers where the transitions are.
    """
    builder, x, pairs = _placements(transitions, slots, "exflow, one variable a pair")
    layer, i, j = pairs.T
    weights = transitions[layer, i, j]
    z = builder.add_variables((len(pairs), 1), cost=-weights[:, None], implied=True)
    builder.constant = float(weights.sum())
    here, there = x[layer, i], x[layer + 1, j]
    columns = np.stack([np.broadcast_to(z, here.shape).ravel(), here.ravel(), there.ravel()], axis=1)
    builder.add_rows(columns, [1.0, 1.0, -1.0], upper=1.0)
    builder.add_rows(columns, [1.0, -1.0, 1.0], upper=1.0)
    experts, largest = transitions.shape[1], float(slots.max())
    for expert in (i, j):
        # An expert shares its device with no more of the next layer's, or the last one's, than the device has slots.
        key = layer * experts + expert
        builder.add_sparse_rows(len(transitions) * experts, key, z.ravel(), 1.0, upper=largest)
    return _named(builder, transitions, slots, 1.0 / float(weights.sum()), x, z, pairs)


def _placements(transitions: FloatArray, slots: IntArray, name: str) -> tuple[ProgramBuilder, IntArray, IntArray]:
    """A program of placements alone: the builder, x [L, n, U], and the pairs [pairs, 3] that have transitions."""
    used = slots[slots > 0]
    layers, experts = len(transitions) + 1, transitions.shape[1]
    builder = ProgramBuilder(name)
    upper = np.ones((layers, experts, len(used)))
    layer, order = _break(transitions)
    place = np.cumsum(slots > 0) - 1
    for rank, g in forbidden_names(experts, slots.tolist()):
        if slots[g]:
            upper[layer, order[rank], place[g]] = 0.0
    x = builder.add_variables(upper.shape, upper=upper, integral=True)
    builder.add_rows(x.reshape(-1, len(used)), 1.0, 1.0, 1.0)
    per_device = np.tile(used.astype(np.float64), layers)
    builder.add_rows(x.transpose(0, 2, 1).reshape(-1, experts), 1.0, per_device, per_device)
    return builder, x, np.argwhere(transitions > 0).astype(np.int64)


def _break(transitions: FloatArray) -> tuple[int, IntArray]:
    """The layer whose experts name interchangeable devices, and its experts by traffic."""
    layer = min((len(transitions) + 1) // 2, len(transitions) - 1)
    return layer, np.argsort(-transitions[layer].sum(axis=1), kind="stable")


def _named(
    builder: ProgramBuilder,
    transitions: FloatArray,
    slots: IntArray,
    unit: float,
    x: IntArray,
    z: IntArray,
    pairs: IntArray,
) -> ExflowProgram:
    return ExflowProgram(builder.build(), transitions, slots, unit, x, z, pairs, *_break(transitions))


@dataclass(frozen=True)
class Stage:
    """One program: experts go to groups of devices. parts: the next stage of each group, None for a single device."""

    groups: tuple[tuple[int, ...], ...]
    parts: tuple[Stage | None, ...]

    def effort(self, slots: IntArray) -> float:
        """Relative size of this stage's program: pair variables a layer pair."""
        return float(len(self.groups) * self.group_slots(slots).sum() ** 2)

    def total_effort(self, slots: IntArray) -> float:
        """The same, of this stage and all after it."""
        return self.effort(slots) + sum(part.total_effort(slots) for part in self.parts if part is not None)

    def group_slots(self, slots: IntArray) -> IntArray:
        """Slots of each group, from those of each device [G]."""
        return np.array([slots[list(group)].sum() for group in self.groups], dtype=np.int64)


def stages(node_of: IntArray, slots: IntArray, form: str) -> Stage | None:
    """The stages of a form for devices in nodes node_of [G] with slots [G]; None when there is only one device.

    direct: every device at once. staged: nodes, then the devices of each node. bisect: two halves of the nodes, and
    so on down to two halves of a node's devices, cut where the slots are most nearly halved.

    Raises:
        InputError: unknown form; the nearest is named.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} is unknown; {nearest(form, FORMS)}")
    devices = tuple(range(len(node_of)))
    if form == "direct":
        return _divided([(device,) for device in devices], {})
    nodes = [tuple(np.flatnonzero(node_of == node).tolist()) for node in np.unique(node_of)]
    if form == "staged":
        inside = {node: _divided([(device,) for device in node], {}) for node in nodes}
        return _divided(nodes, inside) if len(nodes) > 1 else inside[nodes[0]]
    return _bisected(nodes, slots)


def _divided(groups: list[tuple[int, ...]], parts: dict[tuple[int, ...], Stage | None]) -> Stage | None:
    if len(groups) == 1:
        return None
    return Stage(tuple(groups), tuple(parts.get(group) for group in groups))


def _bisected(units: list[tuple[int, ...]], slots: IntArray) -> Stage | None:
    if len(units) == 1:
        if len(units[0]) == 1:
            return None
        return _bisected([(device,) for device in units[0]], slots)
    filled = np.cumsum([slots[list(unit)].sum() for unit in units])
    cut = 1 + int(np.abs(filled[:-1] - filled[-1] / 2).argmin())
    halves = [units[:cut], units[cut:]]
    groups = tuple(tuple(device for unit in half for device in unit) for half in halves)
    return Stage(groups, tuple(_bisected(half, slots) for half in halves))


def local_weight(transitions: FloatArray, device_of: IntArray) -> float:
    """Weight of transitions [L-1, n, n] whose two experts share a device, by device_of [L, n]."""
    together = device_of[:-1, :, None] == device_of[1:, None, :]
    return float(transitions[together].sum())


def assignment_sweeps(transitions: FloatArray, slots: IntArray, budget: Budget, restarts: int = RESTARTS) -> IntArray:
    """[L, n] device of each expert; slots [G] sum to n.

    With both neighbour layers fixed, one layer's best placement is a linear assignment of experts to slots, solved
    exactly; layers take turns until none improves. The best of several random starts is returned, of fewer when the
    budget is spent.
    """
    layers = len(transitions) + 1
    slot_device = np.repeat(np.arange(len(slots)), slots)
    rng = generator(budget.seed)
    best: IntArray = np.tile(slot_device, (layers, 1))
    best_weight = local_weight(transitions, best)
    for _ in range(restarts):
        device_of = np.tile(rng.permutation(slot_device), (layers, 1))
        for layer in range(1, layers):
            device_of[layer] = _best_layer(transitions[:layer], device_of[: layer + 1], layer, slot_device)
        weight = local_weight(transitions, device_of)
        while not budget.spent:
            for layer in range(layers):
                device_of[layer] = _best_layer(transitions, device_of, layer, slot_device)
            before, weight = weight, local_weight(transitions, device_of)
            if weight <= before:
                break
        if weight > best_weight:
            best, best_weight = device_of, weight
        if budget.spent:
            break
    return best


def _best_layer(transitions: FloatArray, device_of: IntArray, layer: int, slot_device: IntArray) -> IntArray:
    """[n] the best devices of one layer's experts while its neighbours stay."""
    from scipy.optimize import linear_sum_assignment

    member = np.eye(int(slot_device.max()) + 1)
    gain = np.zeros((len(slot_device), len(member)))
    if layer > 0:
        gain += transitions[layer - 1].T @ member[device_of[layer - 1]]
    if layer < len(transitions):
        gain += transitions[layer] @ member[device_of[layer + 1]]
    _, columns = linear_sum_assignment(gain[:, slot_device], maximize=True)
    return np.asarray(slot_device[columns])


def local_weight_bound(transitions: FloatArray, slots: IntArray, budget: Budget) -> float:
    """An upper bound of the weight of transitions [L-1, n, n] that any placement on devices of `slots` [G] keeps local.

    An expert shares its device with at most C = max(slots) experts of the next layer, and the other way round: the
    heaviest choice of pairs under that rule is a transportation problem a layer pair. Its optimum equals the root
    relaxation of `exflow_program` for equal slots. Each is solved as a linear program and the bound taken from its
    dual values by weak duality, so rounding cannot make it invalid. Layer pairs past a fifth of what is left of the
    budget get the looser bound of the heaviest C successors of each expert.
    """
    limit = None if budget.left is None else budget.elapsed + 0.2 * budget.left
    largest = int(slots.max())
    total = 0.0
    for weights in transitions:
        late = limit is not None and budget.elapsed > limit
        loose = min(_heaviest(weights, largest), _heaviest(weights.T, largest))
        total += loose if late else min(loose, _transport_bound(weights, largest))
    return total


def _heaviest(weights: FloatArray, count: int) -> float:
    return float(np.sort(weights, axis=1)[:, -count:].sum())


def _transport_bound(weights: FloatArray, count: int) -> float:
    """Upper bound of max sum w y, rows and columns of y summing to at most `count`, 0 <= y <= 1."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    rows, columns = np.nonzero(weights)
    if not len(rows):
        return 0.0
    experts, pairs = len(weights), np.arange(len(rows))
    limits = csr_array(
        (np.ones(2 * len(rows)), (np.concatenate([rows, experts + columns]), np.concatenate([pairs, pairs]))),
        shape=(2 * experts, len(rows)),
    )
    scale = float(weights.max())
    solved = linprog(  # type: ignore[call-overload]  # sparse A_ub is documented, the stubs lack it
        -weights[rows, columns] / scale,
        A_ub=limits,
        b_ub=np.full(2 * experts, float(count)),
        bounds=(0, 1),
        method="highs",
    )
    if solved.status != 0:
        return float(weights.sum())
    price = np.maximum(0.0, -np.asarray(solved.ineqlin.marginals)) * scale
    rest = np.maximum(0.0, weights - price[:experts, None] - price[None, experts:])
    return float(count * price.sum() + rest.sum())


def spectral_kept(weights: FloatArray, slots: IntArray) -> float:
    """Upper bound of the weight [E, E] kept between two layers, by one decomposition. slots: [G]."""
    return -GramSpace.of(np.tile(slots, (2, 1)), len(weights)).least(_cost(weights))


def kept_at_most(
    transitions: FloatArray,
    slots: IntArray,
    seconds: float,
    iterations: int = MAX_ITERATIONS,
    report: Callable[[float], None] = lambda _: None,
) -> float:
    """Upper bound of the weight of transitions that any placement keeps on a device.

    Pairs of layers are bounded apart. Ends when the seconds are spent (each pair is bounded spectrally even so), or
    when nothing is left to gain.

    Args:
        transitions: [L-1, E, E] weight of each transition between neighbouring layers.
        slots: [G] of each device.
        seconds: to spend.
        iterations: of each pair, at most.
        report: called with the bound as it falls.
    """
    end = time.perf_counter() + seconds
    spectral = np.array([min(spectral_kept(weights, slots), float(weights.sum())) for weights in transitions])
    if time.perf_counter() >= end:
        return float(spectral.sum())
    pairs = [_relaxation(weights, slots) for weights in transitions]

    def iterate(pair: PrimalDual) -> None:
        if time.perf_counter() < end:
            pair.run(CHUNK)

    best = spectral
    with ThreadPoolExecutor(THREADS) as pool:
        while unsolved := [pair for pair in pairs if not pair.solved(iterations)]:
            if time.perf_counter() >= end:
                break
            list(pool.map(iterate, unsolved))
            best = np.minimum(best, [-pair.bound for pair in pairs])
            report(float(best.sum()))
    return float(best.sum())


def _relaxation(weights: FloatArray, slots: IntArray) -> PrimalDual:
    both = np.tile(slots, (2, 1))
    space = GramSpace.of(both, len(weights))
    terms: list[Term] = [Linear(_cost(weights)), Entries.of(space, both)]
    if not space.even:
        terms.append(RowSums.of(space, both))
    if space.items <= TRIANGLE_ITEMS:
        terms.append(Triangles(space.items, space.holders))
    return PrimalDual(space, terms)


def _cost(weights: FloatArray) -> FloatArray:
    """[2E, 2E] symmetric, so that <cost, X> is what is kept, negative."""
    nothing = np.zeros_like(weights)
    return -0.5 * np.block([[nothing, weights], [weights.T, nothing]])
