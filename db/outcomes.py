"""What a finished job leaves behind: its plan, its drift check, its decision, and where policy says so a new plan in force."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..placement.errors import InputError
from ..placement.plan import Plan
from . import audit
from .content import ID_DIGITS, plain
from .deployments import publish
from .keep import keep_plan, keep_statistics
from .schema import PlanRow, StatisticsRow
from .service_records import Actor, Judgement, Outcome
from .service_schema import CheckRow, DecisionRow, DeploymentRow, JobRow
from .webhooks import announce

SERVICE = Actor("service", "approve")
"""Who acts when a deployment's policy does."""


def apply(session: Session, job: JobRow, outcome: Outcome) -> dict[str, Any]:
    """Stores the outcome in the transaction at hand; returns the ids of what was stored."""
    stored: dict[str, Any] = {}
    source: StatisticsRow | None = None
    if outcome.statistics is not None:
        source = keep_statistics(session, outcome.statistics, outcome.content)
        stored["statistics"] = source.fingerprint[:ID_DIGITS]
    plan: PlanRow | None = None
    if outcome.plan is not None:
        plan = _keep(session, outcome.plan, source)
        stored["plan"] = plan.fingerprint[:ID_DIGITS]
    for other in outcome.plans:
        _keep(session, other, source)
    if job.deployment_key is None:
        return stored
    row = session.get_one(DeploymentRow, job.deployment_key)
    if outcome.finding is not None:
        found = outcome.finding
        figures = plain("figures", dict(found.figures))
        session.add(
            CheckRow(
                deployment_key=row.key,
                created=datetime.now(UTC),
                last_window=found.last_window,
                alarm=found.alarm,
                figures=figures,
            )
        )
        row.checked_key = max(row.checked_key, found.last_window)
        if found.alarm:
            announce(session, row, "drift.alarm", {"figures": figures})
    if outcome.rebase is not None and source is not None:
        row.reference_key, row.reference_window = source.key, outcome.rebase
    if outcome.judgement is not None:
        if plan is None:
            raise InputError("a judgement without the plan it judges")
        decision = _decide(session, row, job, plan, outcome.judgement)
        stored |= {"decision": decision.key, "decision_state": decision.state}
    return stored


def _keep(session: Session, plan: Plan, source: StatisticsRow | None) -> PlanRow:
    solved_here = source is not None and plan.provenance.trace_fingerprint == source.trace_fingerprint
    return keep_plan(session, plan, source.fingerprint if source is not None and solved_here else None, None)


def _decide(session: Session, row: DeploymentRow, job: JobRow, plan: PlanRow, judgement: Judgement) -> DecisionRow:
    now = datetime.now(UTC)
    for other in session.scalars(
        select(DecisionRow).where(DecisionRow.deployment_key == row.key, DecisionRow.state == "waiting")
    ):
        other.state, other.closed, other.closed_by = "superseded", now, SERVICE.name
    stale = judgement.version != row.version
    state = "superseded" if stale else "kept" if judgement.action == "keep" else "waiting"
    decision = DecisionRow(
        deployment_key=row.key,
        job_key=job.key,
        created=now,
        current_key=row.plan_key,
        candidate_key=plan.key,
        action=judgement.action,
        state=state,
        reason=judgement.reason,
        figures=plain("figures", dict(judgement.figures)),
        comment="",
    )
    session.add(decision)
    session.flush()
    by = SERVICE if job.actor == SERVICE.name else Actor(job.actor, "submit")
    told = {"decision": decision.key, "action": decision.action, "reason": decision.reason}
    audit.note(session, by, "decision.made", row.name, told)
    if state == "waiting" and judgement.publish:
        decision.state, decision.closed, decision.closed_by = "published", now, SERVICE.name
        publish(session, row, plan, SERVICE, "automatic", judgement.reason, decision)
    announce(session, row, "decision.made", {**told, "state": decision.state})
    return decision
