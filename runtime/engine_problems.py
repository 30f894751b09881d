"""A problem narrowed to what an engine can run, so that its solution needs no repair at export."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..placement.errors import InputError, UnsupportedError, nearest
from ..placement.layer_slots import spanned
from ..placement.plan import Plan
from ..placement.problem import Problem
from .exporters.base import Constraint
from .exporters.export import check_export
from .exporters.registry import engine_names, exporter_named
from .permute.rows import PERMUTE_CONSTRAINTS, expert_order

PERMUTE = "permute"
"""A permuted checkpoint or model, beside the engines that read a file."""


def target_names() -> tuple[str, ...]:
    """Names accepted by `problem_for`."""
    return (*engine_names(), PERMUTE)


def problem_for(problem: Problem, engine: str) -> Problem:
    """The problem within the engine's limits.

    Where the problem does not say how many slots there are, and the engine wants as many on every device, it gets the
    fewest that do. For a permuted model with group-limited routing experts stay in the rows of their group: on a device
    or run of devices each.

    Args:
        problem: as it was asked.
        engine: a name of `target_names()`.

    Raises:
        InputError: unknown engine.
        UnsupportedError: the problem asks for what the engine cannot run; says what to change.
    """
    if engine not in target_names():
        raise InputError(f"engine {engine!r} is unknown; {nearest(engine, target_names())}")
    constraints = PERMUTE_CONSTRAINTS if engine == PERMUTE else exporter_named(engine).constraints
    requires = "a permuted checkpoint" if engine == PERMUTE else exporter_named(engine).requires
    devices, experts = problem.num_devices, problem.model.experts

    def refused(problem_and_change: str) -> UnsupportedError:
        return UnsupportedError(f"{engine} cannot run such a plan ({requires}): {problem_and_change}")

    if Constraint.EQUAL_SHARES in constraints and problem.objective.split != "equal":
        raise refused(
            f"replicas take equal shares there, the objective says split={problem.objective.split!r}; use equal"
        )
    if Constraint.NO_REPLICAS in constraints:
        if problem.has_replicas:
            slots = spanned(problem.layer_slots.sum(axis=1))
            raise refused(f"{slots} slots a layer for {experts} experts make replicas; use {experts}")
        if experts % devices:
            fitting = [count for count in range(1, devices) if experts % count == 0]
            raise refused(f"{experts} experts do not divide over {devices} devices; use {fitting[-1]}")
    if Constraint.EQUAL_SLOTS in constraints:
        if problem.slots is None and problem.device_slots is None:
            problem = replace(problem, slots=-(-experts // devices) * devices)
        if not problem.layers_alike:
            slots = spanned(problem.layer_slots.sum(axis=1))
            raise refused(
                f"every layer has the same slots there, this problem's have {slots}; use one number for all, a "
                f"multiple of {devices}"
            )
        if len(set(problem.slots_per_device.tolist())) > 1:
            below, above = problem.num_slots // devices * devices, -(-problem.num_slots // devices) * devices
            choices = [str(slots) for slots in dict.fromkeys((below, above)) if slots >= experts]
            raise refused(
                f"every device has the same number of slots there, {problem.num_slots} do not divide over {devices} "
                f"devices; use {' or '.join(choices)}"
            )
    return _grouped(problem) if engine == PERMUTE and problem.model.groups > 1 else problem


def check_plan_for(plan: Plan, engine: str) -> None:
    """Checks that the engine can run the plan.

    Raises:
        InputError: unknown engine. UnsupportedError: it cannot; says what to change.
    """
    if engine == PERMUTE:
        expert_order(plan)
    else:
        check_export(plan, engine)


def _grouped(problem: Problem) -> Problem:
    """Forbids every device but those whose block of rows meets the expert's group's."""
    model, devices = problem.model, problem.num_devices
    row = np.arange(model.experts)
    here = np.zeros((model.groups, devices), np.bool_)
    here[row * model.groups // model.experts, row * devices // model.experts] = True
    forbidden = {
        (layer, expert): sorted(
            {
                *np.flatnonzero(~here[expert * model.groups // model.experts]).tolist(),
                *problem.forbidden.get((layer, expert), ()),
            }
        )
        for layer in range(model.layers)
        for expert in range(model.experts)
    }
    return replace(problem, forbidden={place: away for place, away in forbidden.items() if away})
