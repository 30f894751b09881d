"""What a plan is solved on and replayed on: a deployment's routing, or stored statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...db.service_records import ClaimedJob, Outcome
from ...db.store import Store
from ...placement.drawn_steps import draw_steps
from ...placement.errors import InputError, UnsupportedError
from ...placement.model import ModelSpec
from ...placement.objective import Objective
from ...placement.plan import Plan
from ...placement.statistics import RoutingStatistics
from ...placement.steps import Steps
from ...placement.trace import RoutingTrace
from ..policy import Policy
from ..routing import from_windows, stored_statistics, to_bytes
from .split import judging_trace, judging_windows, solving_traces, solving_windows

DECODE_STEPS, PREFILL_STEPS, DRAWN_STEPS = 200, 32, 16


@dataclass(frozen=True, eq=False)
class Ground:
    """statistics: for solvers. steps: held out of them. described: what the steps are, in words."""

    statistics: RoutingStatistics
    steps: Steps
    described: str

    def outcome(self, data: Mapping[str, Any], plans: Sequence[Plan]) -> Outcome:
        """What a study on it leaves behind: its figures, its plans, and what they were solved on."""
        return Outcome(
            {**data, "steps": self.described},
            plans=tuple(plans),
            statistics=self.statistics,
            content=to_bytes(self.statistics),
        )


def ground(job: ClaimedJob, store: Store, model: ModelSpec) -> Ground:
    """Of request: statistics and held_out (ids), or routing and windows of the deployment; steps (batch, tokens, count);
    objective, seed.

    Raises:
        InputError: too little is recorded. UnsupportedError: counts do not tell what is asked.
    """
    request = job.request
    if request["statistics"] is not None or job.deployment is None:
        held = stored_statistics(store, request["held_out"]).require_sample()
        return Ground(stored_statistics(store, request["statistics"]), *_replayed(held, request))
    policy = Policy(**store.deployments.get(job.deployment).policy)
    if request["routing"] == "tokens":
        trace = judging_trace(store, job.deployment)
        return Ground(solving_traces(store, job.deployment, policy), *_replayed(trace, request))
    if Objective(**request["objective"]).execution == "context_coherent":
        raise UnsupportedError("context-coherent step times depend on transitions, counts tell of none; upload traces")
    windows = judging_windows(store, job.deployment, policy)
    if not windows:
        raise InputError("there are too few count windows to hold some out to judge on; send more to the deployment")
    known = from_windows(solving_windows(store, job.deployment, policy, request["windows"]), model)
    tokens = request["steps"]["tokens"] or policy.step_tokens
    count = request["steps"]["count"] or DRAWN_STEPS
    load = from_windows(windows, model).load
    steps = draw_steps(load, model.top_k, model.moe_layers, step_tokens=tokens, steps=count, seed=request["seed"])
    return Ground(known, steps, f"{count} steps of {tokens} tokens drawn from the newest {len(windows)} count windows")


def _replayed(trace: RoutingTrace, request: Mapping[str, Any]) -> tuple[Steps, str]:
    wanted, seed = request["steps"], request["seed"]
    tokens = wanted["tokens"]
    if wanted["batch"] == "prefill":
        count = wanted["count"] or PREFILL_STEPS
        return trace.prefill_steps(tokens or 4096, count, seed), f"prefill {tokens or 4096}: {count} steps, held out"
    count = wanted["count"] or DECODE_STEPS
    return trace.decode_steps(tokens or 128, count, seed), f"decode {tokens or 128}: {count} steps, held out"
