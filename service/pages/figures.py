"""What the pages show of plans on routing: loads and traffic by device, and what a change of plan moves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ..._types import FloatArray
from ...db.records import DeploymentRecord
from ...db.store import Store
from ...placement.bounds import device_loads
from ...placement.cost import dispatch_bytes, slot_shares
from ...placement.migration import migration
from ...placement.objective import Objective
from ...placement.plan import Plan
from ...placement.replay import traffic_from_counts
from ...placement.step_mix import step_mix
from ..policy import Policy
from ..routing import from_windows
from ..tasks.decide import default_plan, problem_of

SHOWN_MOVES = 200
MOST_COUNTS = 1 << 22
"""Of the windows that a page is drawn from: for models of today hundreds of windows."""


@dataclass(frozen=True)
class LoadComparison:
    """Two plans of a deployment on its newest windows. before, after: [L, G] device load over the layer's mean device
    load. traffic: [G, G] bytes a step from each device to each other under `plan`, of dispatch, as copies travel.
    """

    plan: Plan
    before_name: str
    after_name: str
    before: FloatArray
    after: FloatArray
    traffic: FloatArray


def compare(store: Store, deployment: DeploymentRecord, candidate: str | None) -> LoadComparison | None:
    """The plan in force against a candidate, or without one, index order against the plan in force; None without any
    plan or window."""
    if deployment.plan_id is None and candidate is None:
        return None
    base = index_order(store, deployment)
    in_force = store.plan(deployment.plan_id).plan if deployment.plan_id else base
    if candidate is None:
        return compared(store, deployment, (base, "index order"), (in_force, "in force"))
    name = "in force" if deployment.plan_id else "index order"
    return compared(store, deployment, (in_force, name), (store.plan(candidate).plan, f"candidate {candidate}"))


def index_order(store: Store, deployment: DeploymentRecord) -> Plan:
    """What the deployment's engine does without a plan."""
    return default_plan(store.model(deployment.model_id).spec, store.topology(deployment.topology_id).topology)


def compared(
    store: Store, deployment: DeploymentRecord, before: tuple[Plan, str], after: tuple[Plan, str]
) -> LoadComparison | None:
    """Two plans, with what to call them, on the newest windows; None without any."""
    policy = Policy(**deployment.policy)
    layers, experts = store.windows.shape(deployment.name)
    most = max(1, MOST_COUNTS // (layers * experts))
    windows = store.windows.page(deployment.name, limit=min(policy.recent, most))
    if not windows:
        return None
    model = store.model(deployment.model_id).spec
    problem = problem_of(after[0], from_windows(windows, model), policy.objective, policy.engine, policy.asked)
    load, objective, tokens = problem.statistics.total_load, problem.objective, step_mix(problem).mean_tokens
    traffic = traffic_from_counts(after[0], load, round(tokens), objective)
    return LoadComparison(
        plan=after[0],
        before_name=before[1],
        after_name=after[1],
        before=_relative(before[0], load, objective),
        after=_relative(after[0], load, objective),
        traffic=traffic.dispatch * dispatch_bytes(after[0].model, objective),
    )


@dataclass(frozen=True)
class ExpertMoves:
    """What going from one plan to another moves. by_pair: (source, target, experts), most first. listed: (layer,
    expert, source, target), the first of them. matrix: [G, G] experts from each device to each."""

    count: int
    bytes_moved: float
    seconds: float
    by_pair: list[tuple[int, int, int]]
    by_layer: list[tuple[int, int]]
    listed: list[tuple[int, int, int, int]]
    matrix: FloatArray


def moves(current: Plan, candidate: Plan) -> ExpertMoves:
    """Which experts move where."""
    moved = migration(current, candidate)
    layers = [candidate.moe_layers[layer] for layer in moved.layer]
    pairs = Counter(zip(moved.source.tolist(), moved.target.tolist(), strict=True))
    listed = list(zip(layers, moved.expert.tolist(), moved.source.tolist(), moved.target.tolist(), strict=True))
    matrix = np.zeros((candidate.topology.num_devices,) * 2)
    np.add.at(matrix, (moved.source, moved.target), 1.0)
    return ExpertMoves(
        moved.moves,
        moved.bytes_moved,
        moved.seconds,
        [(source, target, count) for (source, target), count in pairs.most_common(32)],
        sorted(Counter(layers).items()),
        listed[:SHOWN_MOVES],
        matrix,
    )


def _relative(plan: Plan, load: FloatArray, objective: Objective) -> FloatArray:
    devices, shares = plan.topology.num_devices, slot_shares(plan, load, objective)
    loads = device_loads(load, plan.physical_to_logical, shares, plan.slot_device, devices)
    mean = loads.mean(axis=1, keepdims=True)
    return np.asarray(loads / np.where(mean > 0, mean, 1.0))
