"""Jobs: asked for once, held by one worker at a time, finished once.

A worker holds a job by a claim, and keeps it by beating. Who watches over workers compares beats with those seen
before, by a clock of its own that only runs forward: no clock of another machine matters, nor one that is set.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from ..placement.errors import ConflictError, InputError, MoeplaceError
from ..placement.plan import Plan
from . import audit
from .catalogue import keep_plan, keep_statistics
from .database import ForbiddenError, Sessions, changed_rows
from .deployments import publish, supersede
from .records import Actor, ClaimedJob, Heartbeat, JobOutcome, JobRecord, Judgement
from .references import ID_DIGITS, deployment_row, numbered_row, plain
from .schema import CheckRow, DecisionRow, DeploymentRow, JobRow, PlanRow, StatisticsRow
from .webhooks import announce

SERVICE = Actor("service", "approve")
"""Who acts when a deployment's policy does."""
WATCH = "watch"
"""The kind of drift checks."""
Lane = Literal["any", "watch"]
MOST_QUEUED, MOST_QUEUED_SECONDS = 50, 4 * 3600.0
"""Jobs that one who asks may have in the queue, and the seconds of their solves."""
ASKED = "asked_seconds"


class QuotaError(MoeplaceError):
    """Whoever asks has asked for too much already."""


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
        seconds: float = 0.0,
    ) -> JobRecord:
        """A new job, or the one that the same caller submitted before under this idempotency key. only: none while one
        of this kind is queued or running for the deployment; that one is returned. seconds: what its solves may take
        together.

        Raises:
            NotFoundError: no such deployment. ConflictError: the idempotency key was used for another request.
            QuotaError: too much of the same one's is queued.
        """
        data = plain("request", dict(request))
        with self._sessions.writing() as session:
            owner = None if deployment is None else deployment_row(session, deployment)
            own = None if idempotency is None else _own_key(by, idempotency)
            if idempotency is not None:
                # As it is, too: earlier releases kept it so.
                known = JobRow.idempotency.in_((own, idempotency))
                row = session.scalar(select(JobRow).where(known, JobRow.actor == by.name))
                if row is not None:
                    if (row.kind, row.request) != (kind, data):
                        raise ConflictError("this Idempotency-Key was used for another request; make a new one")
                    return _record(session, row)
            if only and owner is not None:
                going = select(JobRow).where(
                    JobRow.deployment_key == owner.key, JobRow.kind == kind, JobRow.state.in_(("queued", "running"))
                )
                row = session.scalar(going.limit(1))
                if row is not None:
                    return _record(session, row)
            if by != SERVICE:
                _refuse_excess(session, by, seconds)
            row = JobRow(
                kind=kind,
                state="queued",
                deployment_key=None if owner is None else owner.key,
                idempotency=own,
                actor=by.name,
                created=datetime.now(UTC),
                attempts=0,
                claim="",
                worker="",
                beat=0,
                request=data,
                progress={ASKED: seconds} if seconds else {},
            )
            session.add(row)
            session.flush()
            if by != SERVICE:
                audit.note(session, by, f"{kind}.ask", deployment or str(row.key), {"job": row.key})
            return _record(session, row)

    def get(self, key: int) -> JobRecord:
        """Raises NotFoundError where there is no such job."""
        with self._sessions.reading() as session:
            return _record(session, numbered_row(session, JobRow, "job", key))

    def page(
        self,
        *,
        limit: int,
        before: int | None = None,
        deployment: str | None = None,
        state: str | None = None,
        kind: str | None = None,
        among: Sequence[str] | None = None,
    ) -> list[JobRecord]:
        """Newest first; of deployments of these names, and of none, only, where they are given."""
        query = select(JobRow).order_by(JobRow.key.desc()).limit(limit)
        with self._sessions.reading() as session:
            if among is not None:
                named = select(DeploymentRow.key).where(DeploymentRow.name.in_(among))
                query = query.where(or_(JobRow.deployment_key.is_(None), JobRow.deployment_key.in_(named)))
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
            NotFoundError: no such job. ConflictError: it has ended otherwise. ForbiddenError: it is another one's, and
                the role does not allow that.
        """
        with self._sessions.writing() as session:
            row = numbered_row(session, JobRow, "job", key)
            if by.role != "approve" and row.actor != by.name:
                raise ForbiddenError(f"job {key} was asked for by {row.actor!r}; cancelling it needs role 'approve'")
            if row.state in ("done", "failed"):
                raise ConflictError(f"job {key} is {row.state} already")
            if row.state != "cancelled":
                row.state, row.claim, row.finished = "cancelled", "", datetime.now(UTC)
                audit.note(session, by, "job.cancel", str(key))
            return _record(session, row)

    def remove(self, key: int, by: Actor) -> None:
        """Removes a job that has ended; what it left behind stays.

        Raises:
            NotFoundError: no such job. ConflictError: it has not ended, or a decision tells of it.
        """
        with self._sessions.writing() as session:
            row = numbered_row(session, JobRow, "job", key)
            if row.state not in ENDED:
                raise ConflictError(f"job {key} is {row.state}; cancel it first")
            if session.scalar(select(DecisionRow.key).where(DecisionRow.job_key == key)) is not None:
                raise ConflictError(f"job {key} belongs to a decision, which is kept")
            session.delete(row)
            audit.note(session, by, "job.remove", str(key), {"kind": row.kind, "actor": row.actor})

    def drop(self, ended_before: datetime) -> int:
        """Removes jobs that ended before a moment, but those that decisions tell of; returns how many."""
        decided = select(DecisionRow.key).where(DecisionRow.job_key == JobRow.key).exists()
        old = delete(JobRow).where(JobRow.state.in_(ENDED), JobRow.finished < ended_before, ~decided)
        with self._sessions.writing() as session:
            return changed_rows(session, old)

    def claim(self, worker: str, lane: Lane = "any") -> ClaimedJob | None:
        """A queued job, now held by `worker`; None where none is queued. lane: "watch" for drift checks alone.

        Drift checks come first. Of those who ask for others, the one with the fewest jobs under way is served, then the
        one that was served longest ago; of theirs, the oldest job.
        """
        queued = (JobRow.state == "queued", *((JobRow.kind == WATCH,) if lane == "watch" else ()))
        with self._sessions.reading() as session:
            if session.scalar(select(JobRow.key).where(*queued).limit(1)) is None:
                return None
        with self._sessions.writing() as session:
            row = _next(session, queued)
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
            return bool(changed_rows(session, mine.values(beat=JobRow.beat + 1, **news)))

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


def _next(session: Session, queued: Sequence[Any]) -> JobRow | None:
    """The job that is to be begun next."""
    oldest = select(JobRow).where(*queued).order_by(JobRow.key).limit(1)
    check = session.scalar(oldest.where(JobRow.kind == WATCH))
    if check is not None:
        return check
    waiting = session.execute(select(JobRow.actor, func.min(JobRow.key)).where(*queued).group_by(JobRow.actor)).all()
    if not waiting:
        return None
    actors = [actor for actor, _ in waiting]
    running = select(JobRow.actor, func.count()).where(JobRow.state == "running", JobRow.actor.in_(actors))
    under_way = {actor: count for actor, count in session.execute(running.group_by(JobRow.actor))}  # noqa: C416
    served = select(JobRow.actor, func.max(JobRow.started)).where(JobRow.actor.in_(actors)).group_by(JobRow.actor)
    last = {actor: moment for actor, moment in session.execute(served)}  # noqa: C416 - rows are not pairs to mypy
    never = datetime(1, 1, 1, tzinfo=UTC)
    _, _, key = min((under_way.get(actor, 0), last.get(actor) or never, key) for actor, key in waiting)
    return session.get(JobRow, key)


def _own_key(by: Actor, idempotency: str) -> str:
    """A key as it is kept: each caller's are his own, whatever others choose."""
    return hashlib.sha256(repr((by.name, idempotency)).encode()).hexdigest()


def _refuse_excess(session: Session, by: Actor, seconds: float) -> None:
    """Raises QuotaError where one who asks has too much in the queue already."""
    waiting = session.scalars(
        select(JobRow.progress).where(JobRow.state == "queued", JobRow.actor == by.name).limit(MOST_QUEUED)
    ).all()
    total = seconds + sum(float(each.get(ASKED, 0.0)) for each in waiting)
    if len(waiting) >= MOST_QUEUED or total > MOST_QUEUED_SECONDS:
        raise QuotaError(
            f"{by.name!r} has {len(waiting)} jobs in the queue, and with this one they take {total:,.0f} s; at most "
            f"{MOST_QUEUED} and {MOST_QUEUED_SECONDS:,.0f} s are taken of one: wait for some, or cancel them"
        )


def _held(session: Session, job: ClaimedJob) -> JobRow | None:
    row = session.get(JobRow, job.key)
    return row if row is not None and row.state == "running" and row.claim == job.claim else None


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
        finding = outcome.finding
        figures = plain("figures", dict(finding.figures))
        if finding.alarm:
            row.alarm = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "figures": figures}
        elif row.alarm is not None:
            # Nothing new, and nobody has acted on what was found.
            figures |= {"open_alarm": row.alarm["at"]}
        session.add(
            CheckRow(
                deployment_key=row.key,
                created=datetime.now(UTC),
                last_window=finding.last_window,
                alarm=finding.alarm,
                figures=figures,
            )
        )
        row.checked_key = max(row.checked_key, finding.last_window)
        if finding.alarm:
            announce(session, row, "drift.alarm", {"figures": figures})
    if outcome.rebase is not None and source is not None:
        row.reference_key, row.reference_window = source.key, outcome.rebase
    if outcome.judgement is not None:
        if plan is None:
            raise InputError("a judgement without the plan it judges")
        alarm = outcome.finding is not None and outcome.finding.alarm
        decision = _decide(session, row, job, plan, outcome.judgement, alarm)
        stored |= {"decision": decision.key, "decision_state": decision.state}
    return stored


def _is_held(row: DeploymentRow, plan: PlanRow, alarm: bool) -> bool:
    """Whether a roll-back keeps this plan from being put in force by the service: the very plans that were rolled back,
    and any other until traffic has changed."""
    if row.hold is None:
        return False
    return not alarm or plan.fingerprint[:ID_DIGITS] in row.hold.get("plans", [])


def _keep(session: Session, plan: Plan, source: StatisticsRow | None) -> PlanRow:
    solved_here = source is not None and plan.provenance.trace_fingerprint == source.trace_fingerprint
    return keep_plan(session, plan, source.fingerprint if source is not None and solved_here else None, None)


def _decide(
    session: Session, row: DeploymentRow, job: JobRow, plan: PlanRow, judgement: Judgement, alarm: bool
) -> DecisionRow:
    now = datetime.now(UTC)
    supersede(session, row, SERVICE)
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
    about = {"decision": decision.key, "action": decision.action, "reason": decision.reason}
    audit.note(session, by, "decision.made", row.name, about)
    if state == "kept":
        row.alarm = None
    if state == "waiting" and judgement.publish and not _is_held(row, plan, alarm):
        decision.state, decision.closed, decision.closed_by = "published", now, SERVICE.name
        publish(session, row, plan, SERVICE, "automatic", judgement.reason, decision)
    announce(session, row, "decision.made", {**about, "state": decision.state})
    return decision
