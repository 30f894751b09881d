"""The best shares of replicas for a fixed placement: a linear program a layer, whose prices name the devices in the
way.

A device's arithmetic is linear in the shares it serves, so the least mean time of the slowest device over steps is a
linear program, solved exactly. Reading of weights is concave in shares and enters by its tangent at the shares given;
transfers are left out of the program and judged with the whole: shares that do not bring the step down are not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .._arguments import check_types
from .._types import FloatArray, IntArray
from ..placement.cost import ExpertCost
from ..placement.errors import SolveError
from ..placement.evaluate import evaluate
from ..placement.plan import EMPTY, Plan
from ..placement.problem import Problem
from ..placement.steps import Steps
from .base import Budget
from .mip.program import ProgramBuilder, solve_program

STRIDES = (1.0, 0.5, 0.25)
"""How far to go towards the program's shares; transfers and reading may turn on the way."""


@dataclass(frozen=True, eq=False)
class LayerShares:
    """shares: [P] of each slot. seconds: the program's least mean time of the slowest device. price: [G] what one more
    second of work on each device adds to it; they sum to 1, and devices never waited for have none."""

    shares: FloatArray
    seconds: float
    price: FloatArray


@dataclass(frozen=True, eq=False)
class OptimalShares:
    """plan: the given one with better shares, or as it was. price: [L, G] bottleneck prices at the program's
    optimum."""

    plan: Plan
    price: FloatArray


@check_types
def optimal_shares(plan: Plan, steps: Steps, problem: Problem) -> OptimalShares:
    """Shares that shorten the mean of `steps` for a plan's placement; never worse than the plan's own there.

    Raises:
        InputError: plan, steps and problem are not about the same model or devices. SolveError: the program failed.
    """
    best = evaluate(plan, steps, problem).mean_seconds
    layers = [
        layer_shares(loads, table, share, plan.slot_device, problem, steps.weight)
        for loads, table, share in zip(
            steps.loads().transpose(1, 0, 2).astype(np.float64), plan.physical_to_logical, plan.shares, strict=True
        )
    ]
    aim = np.stack([layer.shares for layer in layers])

    def seconds(shares: FloatArray) -> float:
        return evaluate(replace(plan, shares=shares), steps, problem).mean_seconds

    shares = towards(plan.shares, aim, best, seconds)
    return OptimalShares(
        plan if shares is None else replace(plan, shares=shares, certificate=None, predicted={}),
        np.stack([layer.price for layer in layers]),
    )


def towards(
    shares: FloatArray, aim: FloatArray, best: float, value: Callable[[FloatArray], float]
) -> FloatArray | None:
    """The best of a few points on the way from `shares` to `aim` ([L, P] each), or None where none is below `best`."""
    taken = None
    for stride in STRIDES:
        tried = shares + stride * (aim - shares)
        if (now := value(tried)) < best:
            best, taken = now, tried
    return taken


def layer_shares(
    loads: FloatArray,
    table: IntArray,
    shares: FloatArray,
    slot_device: IntArray,
    problem: Problem,
    weight: FloatArray | None = None,
) -> LayerShares:
    """One layer's program.

    Args:
        loads: [S, E] tokens of each expert in each step.
        table, shares, slot_device: [P], with empty slots or without; their shares stay 0.
        problem: Model and cluster.
        weight: [S] what steps count; None: alike.

    Raises:
        SolveError: HiGHS ended without an optimum.
    """
    model, topology = problem.model, problem.topology
    steps, devices = len(loads), problem.num_devices
    cost = ExpertCost.of(model, topology)
    filled = table != EMPTY
    result = np.zeros(len(table))
    table, shares, slot_device = table[filled], shares[filled], slot_device[filled]
    counts = loads[:, table]
    owner = (slot_device[:, None] == np.arange(devices)).astype(np.float64)
    idle = np.power(1.0 - shares, np.maximum(counts - 1.0, 0.0))
    slope = np.where(counts > 0, counts * idle, 0.0)
    hit = np.where(counts > 0, 1.0 - idle * (1.0 - shares), 0.0)
    # Of arithmetic and of reading: [S, P] seconds of each slot by its share, [S, G] those that no share changes.
    works = [
        counts * pair[slot_device] + slope * read[slot_device] for pair, read in zip(cost.pair, cost.read, strict=True)
    ]
    rests = [((hit - slope * shares) @ owner) * read for read in cost.read]
    # Sums of hundreds of tiny seconds: the program is solved in the unit of a typical one.
    unit = max(1e-300, *(float((work * shares @ owner + rest).max()) for work, rest in zip(works, rests, strict=True)))
    builder = ProgramBuilder("shares")
    share = builder.add_variables((len(table),))
    # No step's slowest device takes longer than all work and all reading of a device.
    most = max(float((work @ owner).max()) for work in works) + max(float(np.abs(rest).max()) for rest in rests)
    slowest = builder.add_variables(
        (steps,), upper=2.0 * most / unit + 1.0, cost=1.0 / steps if weight is None else weight
    )
    for work, rest in zip(works, rests, strict=True):
        step, slot = np.nonzero(work)
        builder.add_sparse_rows(
            steps * devices,
            np.concatenate([step * devices + slot_device[slot], np.arange(steps * devices)]),
            np.concatenate([share[slot], np.repeat(slowest, devices)]),
            np.concatenate([work[step, slot] / unit, np.full(steps * devices, -1.0)]),
            upper=-rest.ravel() / unit,
        )
    # One expert a slot or not, shares of the same expert sum to one.
    _, expert = np.unique(table, return_inverse=True)
    builder.add_sparse_rows(int(expert.max()) + 1, expert, share, 1.0, 1.0, 1.0)
    program = builder.build()
    outcome = solve_program(program, Budget(), backend="highs")
    if outcome.stop == "interrupted":
        raise KeyboardInterrupt
    if outcome.values is None or outcome.prices is None:
        raise SolveError(f"the program of shares ended without an optimum ({outcome.stop})")
    clipped = np.clip(outcome.values[share], 0.0, 1.0)
    sums = np.bincount(table, weights=clipped, minlength=model.experts)
    price = -outcome.prices[: 2 * steps * devices].reshape(2, steps, devices).sum(axis=(0, 1))
    result[filled] = clipped / sums[table]
    # What every device takes whatever it is given is in no row of the program.
    base = cost.base(loads.sum(axis=1)).min(axis=1)
    always = float(base.mean() if weight is None else weight @ base)
    return LayerShares(result, outcome.value * unit + always, np.maximum(price, 0.0))
