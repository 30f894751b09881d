"""The front of step time against memory, bytes moved and survivable failures."""

from __future__ import annotations

from ...db.content import id_of_plan
from ...db.service_records import ClaimedJob, Outcome
from ...db.store import Store
from ...placement.objective import Objective
from ...placement.problem import Problem
from ...solvers.front_data import front_data
from ...solvers.pareto import pareto
from .base import Report, steps_of
from .ground import ground


class SweepFront:
    """Request: model, topology (ids), current (a plan's id, or null), redundant, tolerate, max_moved (see `pareto`), solver,
    options, seconds, seed, objective, and what `ground` reads."""

    kind = "pareto"

    def run(self, job: ClaimedJob, store: Store, report: Report) -> Outcome:
        request = job.request
        model, topology = store.model(request["model"]).spec, store.topology(request["topology"]).topology
        basis = ground(job, store, model)
        problem = Problem(model, topology, basis.statistics, Objective(**request["objective"]))
        front = pareto(
            problem,
            basis.steps,
            redundant=request["redundant"],
            tolerate=request["tolerate"],
            current=None if request["current"] is None else store.plan(request["current"]).plan,
            max_moved=request["max_moved"],
            solver=request["solver"],
            seconds=request["seconds"],
            seed=request["seed"],
            options=request["options"],
            progress=steps_of(report),
        )
        plans = [point.plan for point in front.points]
        data = front_data(front, problem, [], [id_of_plan(plan) for plan in plans])
        return basis.outcome(data, plans)
