"""A solve: of a deployment's routing, or of stored statistics."""

from __future__ import annotations

from typing import Any

from ...db.records import ClaimedJob, Outcome
from ...db.store import Store
from ...placement.model import ModelSpec
from ...placement.objective import Objective
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics
from ...placement.topology import Topology
from ...solvers import solve
from ..policy import Policy
from ..routing import from_windows, stored_statistics, to_bytes
from .base import Report, solving_traces, solving_windows


class Solve:
    """Request: model, topology, statistics (ids) or routing and windows of a deployment; solver, options, seconds, seed,
    slots, objective."""

    kind = "solve"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> Outcome:
        request = job.request
        model = store.model(request["model"]).spec
        topology = store.topology(request["topology"]).topology
        statistics = _routing(job, store, model)
        plan = solve(
            _problem(model, topology, statistics, request),
            request["solver"],
            seconds=request["seconds"],
            seed=request["seed"],
            progress=report,
            **request["options"],
        )
        certificate = plan.certificate
        result = {
            "value": certificate.value if certificate else None,
            "bound": plan.bound,
            "gap": plan.gap,
            "objective": certificate.objective if certificate else None,
            "seconds": plan.provenance.seconds,
            "stop": plan.provenance.stop,
        }
        return Outcome(result, plan=plan, statistics=statistics, content=to_bytes(statistics))


def _routing(job: ClaimedJob, store: Store, model: ModelSpec) -> RoutingStatistics:
    request = job.request
    if request["statistics"] is not None or job.deployment is None:
        return stored_statistics(store, request["statistics"])
    policy = Policy(**store.deployments.get(job.deployment).policy)
    if request["routing"] == "tokens":
        return solving_traces(store, job.deployment, policy)
    return from_windows(solving_windows(store, job.deployment, policy, request["windows"]), model)


def _problem(model: ModelSpec, topology: Topology, statistics: RoutingStatistics, request: Any) -> Problem:
    return Problem(model, topology, statistics, Objective(**request["objective"]), slots=request["slots"])
