"""What failures, or another cluster, would do to a plan, with plans ready for them."""

from __future__ import annotations

from typing import Any

from ...db.content import id_of_plan
from ...db.service_records import ClaimedJob, Outcome
from ...db.store import Store
from ...placement.errors import InputError
from ...placement.objective import Objective
from ...placement.plan import Plan
from ...placement.problem import Problem
from ...placement.topology import Topology
from ...solvers.changes import changes_asked
from ...solvers.what_if import Change, what_if
from ...solvers.what_if import Outcome as Changed
from ...solvers.what_if_data import what_if_data
from .base import Report, steps_of
from .ground import ground
from .judge import default_plan


class AskWhatIf:
    """Request: plan (id, or null for experts in index order), changes (see `wanted_changes`), ready, max_moved_bytes, solver,
    options, seconds, seed, objective, and what `ground` reads."""

    kind = "what-if"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> Outcome:
        request = job.request
        plan = asked_plan(job, store)
        basis = ground(job, store, plan.model)
        problem = Problem(plan.model, plan.topology, basis.statistics, Objective(**request["objective"]))
        result = what_if(
            plan,
            problem,
            basis.steps,
            wanted_changes(plan.topology, request["changes"], store),
            ready=request["ready"],
            max_moved_bytes=request["max_moved_bytes"],
            solver=request["solver"],
            seconds=request["seconds"],
            seed=request["seed"],
            options=request["options"],
            progress=steps_of(report),
        )
        kept: list[Plan] = []

        def about(_: Changed, kind: str, found: Plan) -> dict[str, Any]:
            kept.append(found)
            return {"stored_as": id_of_plan(found)}

        return basis.outcome(what_if_data(plan, result, about), kept)


def asked_plan(job: ClaimedJob, store: Store) -> Plan:
    """The plan of a request, or experts in index order where a deployment has none in force."""
    if job.request["plan"] is not None:
        return store.plan(job.request["plan"]).plan
    if job.deployment is None:
        raise InputError("plan: name the plan to ask about, or a deployment")
    deployment = store.deployments.get(job.deployment)
    return default_plan(store.model(deployment.model_id).spec, store.topology(deployment.topology_id).topology)


def wanted_changes(cluster: Topology, wanted: Any, store: Store) -> list[Change]:
    """The changes of a request: lose, n_1, devices, nodes, topology (a stored one's id), slots.

    Raises:
        InputError: as `changes_asked`.
    """
    other = None if wanted["topology"] is None else store.topology(wanted["topology"]).topology
    return changes_asked(cluster, **{**wanted, "topology": other})
