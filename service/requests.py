"""What can be told of a solve before it runs: whether it can be at all, and whether its steps fit into a job's
memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..placement.errors import InputError, UnsupportedError
from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.problem import Problem
from ..placement.statistics import RoutingStatistics
from ..placement.topology import Topology
from ..solvers.solve import check_options, required_features, solver_named, solvers_for
from .policy import Policy, SlotCounts
from .schemas import SolveRequest, StudyRequest
from .settings import Settings

BYTES_PER_CHOICE = 24
"""Memory that a chosen expert of a step's token takes in search: its id, its device, and what is counted of both."""
USUAL_STEPS = 16
LARGEST_OPTION = 10**9
MEMORY_SHARE = 0.75


def check_solve(
    model: ModelSpec,
    topology: Topology,
    solver: str,
    options: Mapping[str, Any],
    *,
    objective: Objective,
    slots: SlotCounts | None = None,
    engine: str | None = None,
    job_bytes: int,
) -> None:
    """Raises InputError, UnsupportedError for a solve that could not be: an unknown solver or option, slots of another
    size than the model and the topology's, what the engine or solver does not do, steps that no memory holds."""
    chosen = solver_named(solver)
    check_options(chosen, options)
    for name, value in options.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > LARGEST_OPTION:
            raise InputError(f"solver {solver!r}: option {name} is {value:g}; at most {LARGEST_OPTION:,} is taken")
    check_steps(model, options.get("step_tokens"), options.get("steps"), job_bytes, "options")
    flat = RoutingStatistics.from_counts(np.ones((model.layers, model.experts)), model.moe_layers, model.top_k)
    problem = Problem(model, topology, flat, objective, slots=slots, engine=engine)
    asked = required_features(problem)
    missing = asked - chosen.supports
    if missing:
        does = ", ".join(solvers_for(asked)) or "none"
        words = " and ".join(sorted(feature.value for feature in missing))
        raise UnsupportedError(f"solver {solver!r} does not support {words}; these do: {does}")


def solver_asked(body: SolveRequest | StudyRequest, policy: Policy) -> dict[str, Any]:
    """The solver and its options, the objective and the engine of a request: the policy's where it leaves them out."""
    return {
        "solver": policy.solver if body.solver is None else body.solver,
        # Another solver than the policy's does not know the policy's options.
        "options": body.options if body.options is not None else policy.options if body.solver is None else {},
        "objective": body.objective or policy.objective,
        "engine": body.engine or policy.engine,
    }


def check_policy(policy: Policy, model: ModelSpec, topology: Topology, settings: Settings) -> None:
    """The same of all that a policy has the service solve."""
    check_solve(
        model,
        topology,
        policy.solver,
        policy.options,
        objective=policy.objective,
        slots=policy.slots,
        engine=policy.engine,
        job_bytes=job_bytes(settings),
    )
    check_steps(model, policy.step_tokens, 1, job_bytes(settings), "policy")
    if policy.seconds > settings.max_seconds:
        raise InputError(
            f"seconds: {policy.seconds:g} is more than the {settings.max_seconds:g} that this server grants"
        )


def check_steps(model: ModelSpec, tokens: int | None, steps: int | None, most: int, where: str) -> None:
    """Raises InputError for steps of so many tokens whose experts do not fit into so many bytes."""
    if tokens is None and steps is None:
        return
    each = (tokens or 1) * model.layers * model.top_k * BYTES_PER_CHOICE
    total = each * (steps or USUAL_STEPS)
    if total > most:
        raise InputError(
            f"{where}: {steps or USUAL_STEPS} steps of {tokens or 1:,} tokens over {model.layers} layers of top-"
            f"{model.top_k} take about {total / 1e9:.3g} GB, a job has {most / 1e9:.3g}; ask for fewer or smaller ones"
        )


def job_bytes(settings: Settings) -> int:
    """Memory that one job may take: as the operator says, else three quarters of this machine's or container's, divided
    among workers."""
    if settings.job_bytes is not None:
        return settings.job_bytes
    workers = settings.workers if isinstance(settings.workers, int) and settings.workers > 0 else 1
    return max(1 << 30, int(MEMORY_SHARE * _machine_bytes() / workers))


def _machine_bytes() -> int:
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")] if hasattr(os, "sysconf") else [16 << 30]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return min(size for size in sizes if size > 0)
