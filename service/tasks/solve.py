"""A solve: of a deployment's routing, or of stored statistics."""

from __future__ import annotations

from ...db.records import ClaimedJob, JobOutcome
from ...db.store import Store
from ...placement.errors import InputError
from ...placement.model import ModelSpec
from ...placement.problem import Problem
from ...placement.statistics import RoutingStatistics
from ...solvers import solve
from ..policy import Policy
from ..routing import from_windows, solving_traces, solving_windows, stored_statistics, to_bytes
from ..schemas import SolveJob
from . import Report


class SolveTask:
    """Request: a `SolveJob`."""

    kind = "solve"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome:
        request = SolveJob.of(job)
        model, topology = store.model(request.model).spec, store.topology(request.topology).topology
        statistics = _routing(request, store, model)
        plan = solve(
            Problem(
                model,
                topology,
                statistics,
                request.objective,
                slots=request.slots,
                engine=request.engine,
                batches=request.batches,
            ),
            request.solver,
            seconds=request.seconds,
            seed=request.seed,
            progress=report,
            **request.options,
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
        return JobOutcome(result, plan=plan, statistics=statistics, content=to_bytes(statistics))


def _routing(request: SolveJob, store: Store, model: ModelSpec) -> RoutingStatistics:
    if request.statistics is not None:
        return stored_statistics(store, request.statistics)
    if request.deployment is None:
        raise InputError("a solve needs a deployment or statistics")
    policy = Policy(**store.deployments.get(request.deployment).policy)
    if request.routing == "tokens":
        return solving_traces(store, request.deployment, policy)
    return from_windows(solving_windows(store, request.deployment, policy, request.windows), model)
