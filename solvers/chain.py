"""Exact placement of models with few placements a layer: the optimum is the cheapest path through all of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..placement.errors import InputError, UnsupportedError, nearest
from ..placement.evaluate import evaluate_on
from ..placement.plan import Certificate, Plan
from ..placement.problem import Problem
from ..placement.steps import Steps
from ..placement.trace import RoutingTrace
from .base import Budget, Feature, Needs, Solution, fill_slots
from .layer_chain import allowed_states, by_pairs, cheapest_placements, check_time
from .placements import PlacementSpace, device_sets
from .step_costs import StepCosts
from .viterbi import cheapest_path

__all__ = ["Chain", "cheapest_path"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Minimise = Literal["transitions", "step"]
Batch = Literal["decode", "prefill"]

TRANSITIONS_OBJECTIVE = "cross-device transitions, share of all"

SAMPLE_TOKENS = 16_384
"""Tokens replayed when the number of steps is not given."""

MAX_STATES = 500_000
"""Placements of a layer up to renaming devices: what memory holds."""
MAX_PLACEMENTS = 400_000
"""Placements of a layer where neighbours are compared: 9 experts on 9 devices are 362,880."""
MAX_PAIRS = 250_000_000
"""Pairs of neighbouring placements compared a layer."""
MAX_STEP_SECONDS = 120
"""Work for the step objective, as `step_work` estimates it."""
MAX_COUNTS = 50_000_000
"""Counts of tokens by pairs of expert sets and step that are held at a time."""


class Chain:
    """Proves its plan optimal, where a layer has few placements (8 experts on 2, 4 or 8 devices, not 32 on 4).

    minimise: "transitions", the share of transitions between layers that change device; or "step", the mean predicted
    step time under the problem's objective, replayed on `steps` steps of `step_tokens` tokens that the seed draws from
    the statistics' token sample (batch: "decode" or "prefill"). By default "step" under dispatch_combine, where
    transitions cost nothing, and "transitions" under context_coherent, where they are what costs.
    """

    name = "chain"
    supports = frozenset({Feature.UNEVEN_SLOTS, Feature.PINNED})
    needs = frozenset({Needs.TRANSITIONS})

    def solve(
        self,
        problem: Problem,
        budget: Budget,
        *,
        minimise: Minimise | None = None,
        batch: Batch = "decode",
        step_tokens: int = 128,
        steps: int | None = None,
    ) -> Solution:
        """steps: by default as many as 16,384 tokens make, from 4 to 64.

        Raises:
            UnsupportedError: too many placements a layer, or figures to compute; a risk other than "mean" under
                "step"; statistics without transitions, or, for "step", without a token sample.
            SolveError: no placement respects the constraints, or the time limit came before the end.
            InputError: an unknown value of minimise or batch, or a size that is not positive.
        """
        if minimise is None:
            minimise = "transitions" if problem.objective.execution == "context_coherent" else "step"
        if minimise == "transitions":
            return _fewest_transitions(problem, budget)
        if minimise != "step":
            raise InputError(f"chain: minimise is {minimise!r}; {nearest(str(minimise), ('transitions', 'step'))}")
        if problem.objective.risk != "mean":
            raise UnsupportedError(
                f"chain minimises the mean step time: risk {problem.objective.risk!r} does not add up over layers, so "
                "the cheapest path need not be its optimum; use Objective(risk='mean') or minimise='transitions'"
            )
        if steps is None:
            steps = _default_steps(step_tokens)
        drawn = _draw(problem.statistics.require_sample(), batch, step_tokens, steps, budget.seed)
        return fastest_step(problem, budget, drawn, f"{steps} sampled {batch} steps of {step_tokens} tokens")

    def work(self, problem: Problem, step_tokens: int | None = None, steps: int | None = None) -> float | None:
        """Estimated seconds of minimising step time on drawn steps, or None where it would be refused."""
        count = steps or _default_steps(step_tokens or 128)
        space = _space(problem, _device_kinds(problem))
        if _too_many(space, neighbours=problem.objective.execution == "context_coherent"):
            return None
        work = step_work(problem, space, count)
        return work if _steps_that_fit(problem, space, count, work) >= count else None


def _default_steps(step_tokens: int) -> int:
    return max(4, min(64, SAMPLE_TOKENS // max(1, step_tokens)))


def _draw(sample: RoutingTrace, batch: Batch, step_tokens: int, steps: int, seed: int) -> Steps:
    if batch not in ("decode", "prefill"):
        raise InputError(f"chain: batch is {batch!r}; {nearest(str(batch), ('decode', 'prefill'))}")
    if step_tokens < 1 or steps < 1:
        raise InputError(f"chain: step_tokens ({step_tokens}) and steps ({steps}) must be at least 1")
    if batch == "decode":
        return sample.decode_steps(step_tokens, steps, seed)
    return sample.prefill_steps(min(step_tokens, sample.num_tokens), steps, seed)


def _fewest_transitions(problem: Problem, budget: Budget) -> Solution:
    transitions = problem.statistics.total_transitions
    space = _space(problem, ["any"] * problem.num_devices)
    _check_placements(space, neighbours=True)
    sets = device_sets(space.representatives, problem.num_devices).astype(np.float64)

    def crossing(layer: int, left: IntArray, relabellings: IntArray) -> FloatArray:
        expected = sets @ transitions[layer].T
        renamed = expected[:, np.argsort(relabellings, axis=1)].transpose(1, 0, 2, 3)
        width = sets.shape[1] * sets.shape[2]
        kept = sets[left].reshape(-1, width) @ renamed.reshape(-1, width).T
        cost = transitions[layer].sum() - kept
        return np.asarray(cost.reshape(len(left), len(relabellings), len(sets)).transpose(1, 0, 2))

    unary = np.where(allowed_states(problem, space), 0.0, np.inf)
    device_of, _ = cheapest_placements(space, list(unary), by_pairs(space, crossing), budget)
    crossed = sum(
        float(matrix[here[:, None] != after].sum())
        for matrix, here, after in zip(transitions, device_of[:-1], device_of[1:], strict=True)
    )
    value = crossed / float(transitions.sum()) if crossed else 0.0
    budget.report(value, value)
    return Solution(fill_slots(device_of), Certificate(TRANSITIONS_OBJECTIVE, value, value))


def fastest_step(problem: Problem, budget: Budget, steps: Steps, kind: str) -> Solution:
    """The plan of least mean step time on `steps`, whose tokens have no known homes, with its proof; `kind` names them.

    Raises:
        UnsupportedError, SolveError: as `Chain.solve`.
    """
    topology, layers = problem.topology, problem.model.layers
    coherent = problem.objective.execution == "context_coherent"
    space = _space(problem, _device_kinds(problem))
    _check_placements(space, neighbours=coherent)
    _check_step_size(problem, space, steps.num_steps)
    allowed = allowed_states(problem, space)
    costs = StepCosts(problem, steps, space)
    unary = np.empty(allowed.shape)
    for layer in range(layers):
        check_time(budget, layer, layers)
        unary[layer] = np.where(allowed[layer], costs.unary(layer), np.inf)
    if coherent:
        device_of, value = cheapest_placements(space, list(unary), costs.cheapest_before, budget)
    else:
        device_of, value = space.representatives[unary.argmin(axis=1)], float(unary.min(axis=1).sum())
    table = fill_slots(device_of)
    plan = Plan(problem.model, topology, table, problem.slot_device)
    replayed = float(evaluate_on(plan, steps, problem.model, topology, problem.objective).step_seconds.mean())
    # The path's own sum differs from the replay by rounding alone, and no bound may lie above its value.
    certificate = Certificate(f"mean predicted step seconds, {kind}", replayed, min(value, replayed))
    budget.report(certificate.value, certificate.bound)
    return Solution(table, certificate)


def _device_kinds(problem: Problem) -> list[Hashable]:
    """What tells devices apart in a step whose tokens have no known homes: node and rates."""
    return [(number, device) for number, node in enumerate(problem.topology.nodes) for device in node.devices]


def _space(problem: Problem, kinds: Sequence[Hashable]) -> PlacementSpace:
    """The placements of a layer; a device named by a constraint is like no other."""
    named = set(problem.pinned.values()).union(*problem.forbidden.values())
    kind = tuple(("named", g) if g in named else kind for g, kind in enumerate(kinds))
    return PlacementSpace(tuple(problem.slots_per_device.tolist()), kind)


def _too_many(space: PlacementSpace, neighbours: bool) -> bool:
    """Whether a space has too many placements to hold, or, with `neighbours`, to compare with one another."""
    states = space.count_representatives
    return states > MAX_STATES or (neighbours and (space.count > MAX_PLACEMENTS or space.count * states > MAX_PAIRS))


def _check_placements(space: PlacementSpace, neighbours: bool) -> None:
    if _too_many(space, neighbours):
        raise UnsupportedError(
            f"chain: {sum(space.slots)} experts fill slots {list(space.slots)} in {space.count:,} ways a layer "
            f"({space.count_representatives:,} up to renaming devices), too many to go through; use search, exflow or "
            "moetuner"
        )


def step_work(problem: Problem, space: PlacementSpace, steps: int) -> float:
    """Estimated seconds of the step objective on one core, from what was measured: 0.1 us a device's figure of a layer's
    own placements; for pairs 1.5 ns a device, and one pair in twenty priced in full, device by device and step."""
    devices, layers, states = problem.num_devices, problem.model.layers, space.count_representatives
    seconds = 1e-7 * states * steps * devices * layers
    if problem.objective.execution == "context_coherent":
        seconds += 1.5e-9 * states * space.count * (layers - 1) * (devices + steps * devices**2 / 20)
    return seconds


def _steps_that_fit(problem: Problem, space: PlacementSpace, steps: int, work: float) -> int:
    fit = int(steps * MAX_STEP_SECONDS / work)
    if problem.objective.execution == "context_coherent":
        fit = min(fit, MAX_COUNTS // _set_count(problem, space) ** 2)
    return fit


def _check_step_size(problem: Problem, space: PlacementSpace, steps: int) -> None:
    work = step_work(problem, space, steps)
    fit = _steps_that_fit(problem, space, steps, work)
    if fit < steps:
        raise UnsupportedError(
            f"chain: {space.count:,} placements a layer ({space.count_representatives:,} up to renaming devices) on "
            f"{steps} steps and {problem.model.layers} layers are too many to price (near {work:,.0f} s of work, "
            f"{MAX_STEP_SECONDS} s at most, and {MAX_COUNTS:,} counts at a time); "
            + (f"ask for fewer steps (steps={fit} fits), " if fit else "")
            + "minimise='transitions', or use search, exflow or moetuner"
        )


def _set_count(problem: Problem, space: PlacementSpace) -> int:
    """Distinct sets of experts that a device or a node can hold."""
    first = np.concatenate([[0], np.cumsum(problem.topology.node_size)[:-1]])
    node_slots = np.add.reduceat(np.array(space.slots), first)
    sizes = [*set(space.slots), *set(node_slots.tolist())]
    return sum(math.comb(problem.model.experts, size) for size in sizes)
