"""Jobs: asked for once, held by one worker at a time, finished once.

A worker holds a job by a claim, and keeps it by beating. Who watches over workers compares beats with those seen
before, by a clock of its own that only runs forward: no clock of another machine matters, nor one that is set.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from ..placement.errors import ConflictError, InputError, NotFoundError
from ..placement.plan import Plan
from . import audit
from .catalogue import keep_plan, keep_statistics
from .content import ID_DIGITS, plain
from .database import Sessions
from .deployments import publish
from .records import Actor, ClaimedJob, Heartbeat, JobOutcome, JobRecord, Judgement
from .references import deployment_row
from .schema import CheckRow, DecisionRow, DeploymentRow, JobRow, PlanRow, StatisticsRow
from .webhooks import announce

SERVICE = Actor("service", "approve")
"""Who acts when a deployment's policy does."""
ENDED = ("done", "failed", "cancelled")


class Jobs:
    """Threads and processes: as `Store`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def submit(
        self,
        kind: str,
        request: Mapping[str, Any],
        by: Actor,
        *,
        deployment: str | None = None,
        idempotency: str | None = None,
        only: bool = False,
    ) -> JobRecord:
        """A new job, or the one submitted before under the same idempotency key. only: none while one of this kind
        is queued or running for the deployment; that one is returned.

        Raises:
            NotFoundError: no such deployment. ConflictError: the idempotency key was used for another request.
        """
        data = plain("request", dict(request))
        with self._sessions.writing() as session:
            owner = None if deployment is None else deployment_row(session, deployment)
            if idempotency is not None:
                row = session.scalar(select(JobRow).where(JobRow.idempotency == idempotency))
                if row is not None:
                    if (row.kind, row.request, row.actor) != (kind, data, by.name):
                        raise ConflictError("this Idempotency-Key was used for another request; make a new one")
                    return _record(session, row)
            if only and owner is not None:
                going = select(JobRow).where(
                    JobRow.deployment_key == owner.key, JobRow.kind == kind, JobRow.state.in_(("queued", "running"))
                )
                row = session.scalar(going.limit(1))
                if row is not None:
                    return _record(session, row)
            row = JobRow(
                kind=kind,
                state="queued",
                deployment_key=None if owner is None else owner.key,
                idempotency=idempotency,
                actor=by.name,
                created=datetime.now(UTC),
                attempts=0,
                claim="",
                worker="",
                beat=0,
                request=data,
                progress={},
            )
            session.add(row)
            session.flush()
            return _record(session, row)

    def get(self, key: int) -> JobRecord:
        """Raises NotFoundError where there is no such job."""
        with self._sessions.reading() as session:
            return _record(session, _row(session, key))

    def page(
        self,
        *,
        limit: int,
        before: int | None = None,
        deployment: str | None = None,
        state: str | None = None,
        kind: str | None = None,
    ) -> list[JobRecord]:
        """Newest first."""
        query = select(JobRow).order_by(JobRow.key.desc()).limit(limit)
        with self._sessions.reading() as session:
            if before is not None:
                query = query.where(JobRow.key < before)
            if deployment is not None:
                query = query.where(JobRow.deployment_key == deployment_row(session, deployment).key)
            if state is not None:
                query = query.where(JobRow.state == state)
            if kind is not None:
                query = query.where(JobRow.kind == kind)
            return [_record(session, row) for row in session.scalars(query)]

    def cancel(self, key: int, by: Actor) -> JobRecord:
        """Ends a job that has not ended; its worker learns at its next beat.

        Raises:
            NotFoundError: no such job. ConflictError: it has ended otherwise.
        """
        with self._sessions.writing() as session:
            row = _row(session, key)
            if row.state in ("done", "failed"):
                raise ConflictError(f"job {key} is {row.state} already")
            if row.state != "cancelled":
                row.state, row.claim, row.finished = "cancelled", "", datetime.now(UTC)
                audit.note(session, by, "job.cancel", str(key))
            return _record(session, row)

    def claim(self, worker: str) -> ClaimedJob | None:
        """The oldest queued job, now held by `worker`; None where none is queued."""
        oldest = select(JobRow).where(JobRow.state == "queued").order_by(JobRow.key).limit(1)
        with self._sessions.reading() as session:
            if session.scalar(oldest.with_only_columns(JobRow.key)) is None:
                return None
        with self._sessions.writing() as session:
            row = session.scalar(oldest)
            if row is None:
                return None
            row.state, row.worker, row.claim = "running", worker, secrets.token_hex(16)
            row.attempts, row.beat, row.started = row.attempts + 1, 0, datetime.now(UTC)
            name = _deployment(session, row)
            return ClaimedJob(row.key, row.kind, name, row.request, row.claim, row.attempts)

    def beat(self, job: ClaimedJob, progress: Mapping[str, Any] | None = None) -> bool:
        """A sign of life, with news where there are any; False when the job is no longer this worker's."""
        news = {} if progress is None else {"progress": plain("progress", dict(progress))}
        with self._sessions.writing() as session:
            mine = update(JobRow).where(JobRow.key == job.key, JobRow.claim == job.claim, JobRow.state == "running")
            return bool(cast(Any, session.execute(mine.values(beat=JobRow.beat + 1, **news))).rowcount)

    def finish(self, job: ClaimedJob, outcome: JobOutcome) -> bool:
        """Stores all a job leaves behind and ends it, in one transaction; False when it is no longer this worker's."""
        with self._sessions.writing() as session:
            row = _held(session, job)
            if row is None:
                return False
            row.result = plain("result", {**outcome.result, **apply(session, row, outcome)})
            row.state, row.claim, row.finished = "done", "", datetime.now(UTC)
            return True

    def fail(self, job: ClaimedJob, error: str) -> bool:
        """Ends a job that cannot be done; False when it is no longer this worker's."""
        with self._sessions.writing() as session:
            row = _held(session, job)
            if row is None:
                return False
            row.state, row.claim, row.finished, row.error = "failed", "", datetime.now(UTC), error[:2000]
            return True

    def release(self, job: ClaimedJob) -> bool:
        """Gives a job back undone, as if it had not been begun; False when it is no longer this worker's."""
        with self._sessions.writing() as session:
            row = _held(session, job)
            if row is None:
                return False
            row.state, row.claim, row.attempts, row.started = "queued", "", row.attempts - 1, None
            return True

    def heartbeats(self) -> list[Heartbeat]:
        """All running jobs."""
        with self._sessions.reading() as session:
            query = select(JobRow.key, JobRow.worker, JobRow.claim, JobRow.beat).where(JobRow.state == "running")
            return [Heartbeat(key, worker, claim, beat) for key, worker, claim, beat in session.execute(query)]

    def lost(self, heartbeat: Heartbeat, attempts: int) -> bool:
        """Takes a job from a worker that showed no life since `heartbeat`: queued again, or failed after so many
        attempts.

        False when the worker did show life, or the job ended.
        """
        with self._sessions.writing() as session:
            row = session.get(JobRow, heartbeat.key)
            if row is None or row.state != "running" or (row.claim, row.beat) != (heartbeat.claim, heartbeat.beat):
                return False
            row.claim = ""
            if row.attempts >= attempts:
                row.state, row.finished = "failed", datetime.now(UTC)
                row.error = f"its worker died {row.attempts} times (out of memory, or killed); ask for less, or retry"
            else:
                row.state, row.started = "queued", None
            return True

    def waiting(self) -> dict[str, int]:
        """Jobs queued and running, by state."""
        with self._sessions.reading() as session:
            states = session.scalars(select(JobRow.state).where(JobRow.state.in_(("queued", "running")))).all()
            return {state: states.count(state) for state in ("queued", "running")}


def _held(session: Session, job: ClaimedJob) -> JobRow | None:
    row = session.get(JobRow, job.key)
    return row if row is not None and row.state == "running" and row.claim == job.claim else None


def _row(session: Session, key: int) -> JobRow:
    row = session.get(JobRow, key) if 0 <= key < 1 << 31 else None
    if row is None:
        raise NotFoundError(f"no job {key}")
    return row


def _deployment(session: Session, row: JobRow) -> str | None:
    return None if row.deployment_key is None else session.get_one(DeploymentRow, row.deployment_key).name


def _record(session: Session, row: JobRow) -> JobRecord:
    columns = {name: getattr(row, name) for name in JobRecord.model_fields if name != "deployment"}
    return JobRecord(**columns, deployment=_deployment(session, row))


def apply(session: Session, job: JobRow, outcome: JobOutcome) -> dict[str, Any]:
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
