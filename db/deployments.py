"""Deployments: a model on a topology, its policy, and the plans put in force one after the other. Decisions about them,
and what people make of those that wait. The engine that is asked for a deployment's routing, by one server at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, cast

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from ..placement.engines import check_plan
from ..placement.errors import ConflictError, InputError, NotFoundError, UnsupportedError
from ..placement.plan import plan_from_dict
from ..placement.topology import Topology
from . import audit
from .database import Sessions, changed_rows
from .records import (
    Actor,
    Cause,
    CheckRecord,
    DecisionRecord,
    DeploymentOverview,
    DeploymentRecord,
    EngineHold,
    EngineRecord,
    PublicationRecord,
)
from .references import ID_DIGITS, check_name, deployment_row, find, id_of, numbered_row, plain, storable
from .schema import (
    CheckRow,
    DecisionRow,
    DeliveryRow,
    DeploymentRow,
    EngineRow,
    JobRow,
    JoinedRow,
    ModelRow,
    PlanRow,
    PublicationRow,
    StatisticsRow,
    TopologyRow,
    UploadPartRow,
    UploadRow,
    WebhookRow,
    WindowRow,
)
from .secrets import is_sealed, seal
from .webhooks import announce

MOST_REFUSED = 50
Condition = Callable[[DeploymentRecord], None]


class Deployments:
    """Threads and processes: as `Store`. References `name` are exact.

    Every method raises NotFoundError for a deployment that does not exist.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def add(self, name: str, model: str, topology: str, policy: Mapping[str, Any], by: Actor) -> DeploymentRecord:
        """A new deployment of a stored model on a stored topology.

        Raises:
            ConflictError: the name is taken by another model, topology or policy; the same again changes nothing.
        """
        check_name(name)
        if "/" in name:
            raise InputError(f"name {name!r} of a deployment must not hold a slash: it stands in addresses")
        with self._sessions.writing() as session:
            model_key, topology_key = find(session, ModelRow, model).key, find(session, TopologyRow, topology).key
            settings = plain("policy", dict(policy))
            row = session.scalar(select(DeploymentRow).where(DeploymentRow.name == name))
            if row is not None:
                if (row.model_key, row.topology_key, row.policy) != (model_key, topology_key, settings):
                    raise ConflictError(f"a deployment {name!r} exists with another model, topology or policy")
                return _record(session, row)
            row = DeploymentRow(
                name=name,
                created=datetime.now(UTC),
                model_key=model_key,
                topology_key=topology_key,
                policy=settings,
                reference_window=0,
                version=0,
                checked_key=0,
            )
            session.add(row)
            audit.note(session, by, "deployment.add", name, {"policy": settings})
            session.flush()
            return _record(session, row)

    def get(self, name: str) -> DeploymentRecord:
        with self._sessions.reading() as session:
            return _record(session, deployment_row(session, name))

    def page(
        self,
        *,
        limit: int,
        after: str = "",
        among: Sequence[str] | None = None,
        model: str | None = None,
        topology: str | None = None,
    ) -> list[DeploymentRecord]:
        """In order of their names, those behind `after`; of these names only, where they are given, of this model and
        on this topology."""
        with self._sessions.reading() as session:
            of: list[Any] = []
            if model is not None:
                of.append(DeploymentRow.model_key == find(session, ModelRow, model).key)
            if topology is not None:
                of.append(DeploymentRow.topology_key == find(session, TopologyRow, topology).key)
            rows = _page(session, limit, after, among, of)
            ids = _ids_of(session, rows)
            return [_record(session, row, ids) for row in rows]

    def overview(self, *, limit: int, after: str = "", among: Sequence[str] | None = None) -> list[DeploymentOverview]:
        """The same, each with what a list of them shows; a few questions for all of them."""
        with self._sessions.reading() as session:
            rows = _page(session, limit, after, among)
            keys = [row.key for row in rows]
            ids = _ids_of(session, rows)
            newest = select(func.max(CheckRow.key)).where(CheckRow.deployment_key.in_(keys))
            checks = {
                check.deployment_key: check
                for check in session.scalars(
                    select(CheckRow).where(CheckRow.key.in_(newest.group_by(CheckRow.deployment_key)))
                )
            }
            sums = select(WindowRow.deployment_key, func.sum(WindowRow.merged)).where(
                WindowRow.deployment_key.in_(keys)
            )
            windows = {key: int(total) for key, total in session.execute(sums.group_by(WindowRow.deployment_key))}
            alarms = _counted(session, CheckRow, keys, CheckRow.alarm.is_(True))
            waiting = _counted(session, DecisionRow, keys, DecisionRow.state == "waiting")
            jobs: dict[int, dict[str, int]] = {}
            for state in ("queued", "running"):
                for key, count in _counted(session, JobRow, keys, JobRow.state == state).items():
                    jobs.setdefault(key, {})[state] = count
            models = {
                key: name or label or digits[:ID_DIGITS]
                for key, name, label, digits in session.execute(
                    select(ModelRow.key, ModelRow.name, ModelRow.label, ModelRow.fingerprint).where(
                        ModelRow.key.in_({row.model_key for row in rows})
                    )
                )
            }
            sizes = select(TopologyRow.key, TopologyRow.devices).where(
                TopologyRow.key.in_({row.topology_key for row in rows})
            )
            devices = {key: count for key, count in session.execute(sizes)}  # noqa: C416 - rows are not pairs to mypy
            return [
                DeploymentOverview(
                    deployment=_record(session, row, ids),
                    model=models[row.model_key],
                    devices=devices[row.topology_key],
                    check=CheckRecord.model_validate(checks[row.key]) if row.key in checks else None,
                    windows=windows.get(row.key, 0),
                    regret=_regret(checks.get(row.key), row.alarm),
                    alarms=alarms.get(row.key, 0),
                    waiting=waiting.get(row.key, 0),
                    jobs=jobs.get(row.key, {}),
                )
                for row in rows
            ]

    def set_policy(
        self, name: str, policy: Mapping[str, Any], by: Actor, *, condition: Condition | None = None
    ) -> DeploymentRecord:
        """Replaces the policy. condition: raises where the deployment is not what the change was meant for."""
        with self._sessions.writing() as session:
            row = deployment_row(session, name)
            if condition is not None:
                condition(_record(session, row))
            before, row.policy = row.policy, plain("policy", dict(policy))
            audit.note(session, by, "deployment.policy", name, {"before": before, "after": row.policy})
            return _record(session, row)

    def remove(self, name: str, by: Actor) -> list[str]:
        """Removes a deployment with its windows, checks, decisions, publications, jobs, webhooks, engine and traces;
        plans, models and what the audit log says of it stay. Returns the places of traces that are kept elsewhere, for
        the caller to empty."""
        with self._sessions.writing() as session:
            row = deployment_row(session, name)
            key = row.key
            hooks = select(WebhookRow.key).where(WebhookRow.deployment_key == key)
            uploads = select(UploadRow.key).where(UploadRow.kind == "trace", UploadRow.owner == name)
            places = session.scalars(
                select(UploadRow.place).where(UploadRow.key.in_(uploads), UploadRow.place.is_not(None))
            )
            emptied = [place for place in places if place is not None]
            session.execute(delete(UploadPartRow).where(UploadPartRow.upload_key.in_(uploads)))
            session.execute(delete(UploadRow).where(UploadRow.kind == "trace", UploadRow.owner == name))
            session.execute(delete(DeliveryRow).where(DeliveryRow.webhook_key.in_(hooks)))
            for table in (
                WebhookRow,
                EngineRow,
                JoinedRow,
                WindowRow,
                CheckRow,
                PublicationRow,
                DecisionRow,
                JobRow,
            ):
                session.execute(delete(table).where(table.deployment_key == key))
            version = row.version
            session.delete(row)
            audit.note(session, by, "deployment.remove", name, {"version": version})
            return emptied

    def publish(
        self,
        name: str,
        plan: str,
        by: Actor,
        *,
        cause: Cause,
        comment: str = "",
        expected: int | None = None,
        condition: Condition | None = None,
    ) -> PublicationRecord:
        """Puts a stored plan in force. expected: the version it follows. condition: as of `set_policy`.

        Raises:
            ConflictError: another plan was published meanwhile. InputError: a plan for another model or topology.
            UnsupportedError: the policy's engine cannot run it.
        """
        with self._sessions.writing() as session:
            row = deployment_row(session, name)
            if expected is not None and row.version != expected:
                raise ConflictError(f"{name!r} is at version {row.version}, not {expected}: look at it and try again")
            if condition is not None:
                condition(_record(session, row))
            return _publication(session, publish(session, row, find(session, PlanRow, plan), by, cause, comment))

    def release(self, name: str, by: Actor) -> DeploymentRecord:
        """Lets automatic publication go on after a roll-back."""
        with self._sessions.writing() as session:
            row = deployment_row(session, name)
            if row.hold is not None:
                row.hold = None
                audit.note(session, by, "deployment.release", name)
            return _record(session, row)

    def version_of(self, name: str, version: int) -> PublicationRecord:
        """One publication.

        Raises:
            NotFoundError: no such version.
        """
        with self._sessions.reading() as session:
            row = deployment_row(session, name)
            query = select(PublicationRow).where(
                PublicationRow.deployment_key == row.key, PublicationRow.version == version
            )
            entry = session.scalar(query)
            if entry is None:
                raise NotFoundError(f"{name!r} has no version {version}; it is at version {row.version}")
            return _publication(session, entry)

    def publications(self, name: str, *, limit: int, before: int | None = None) -> list[PublicationRecord]:
        """Newest first, those of versions below `before`."""
        with self._sessions.reading() as session:
            row = deployment_row(session, name)
            query = select(PublicationRow).where(PublicationRow.deployment_key == row.key)
            if before is not None:
                query = query.where(PublicationRow.version < before)
            rows = session.scalars(query.order_by(PublicationRow.version.desc()).limit(limit))
            return [_publication(session, entry) for entry in rows]

    def drop_checks(self, created_before: datetime) -> int:
        """Removes drift checks older than a moment, but the newest of each deployment; returns how many."""
        newest = select(func.max(CheckRow.key)).group_by(CheckRow.deployment_key)
        old = delete(CheckRow).where(CheckRow.created < created_before, CheckRow.key.not_in(newest))
        with self._sessions.writing() as session:
            return changed_rows(session, old)

    def checks(
        self,
        name: str,
        *,
        limit: int,
        before: int | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[CheckRecord]:
        """Drift checks, newest first; of a span of time where one is given."""
        with self._sessions.reading() as session:
            row = deployment_row(session, name)
            query = select(CheckRow).where(CheckRow.deployment_key == row.key)
            if before is not None:
                query = query.where(CheckRow.key < before)
            if since is not None:
                query = query.where(CheckRow.created >= since)
            if until is not None:
                query = query.where(CheckRow.created <= until)
            rows = session.scalars(query.order_by(CheckRow.key.desc()).limit(limit))
            return [CheckRecord.model_validate(entry) for entry in rows]


def _is_same_cluster(session: Session, one: int, other: int) -> bool:
    if one == other:
        return True
    first, second = (Topology(**session.get_one(TopologyRow, key).topology) for key in (one, other))
    return first.is_same_cluster(second)


def publish(
    session: Session,
    row: DeploymentRow,
    plan: PlanRow,
    by: Actor,
    cause: Cause,
    comment: str,
    decision: DecisionRow | None = None,
) -> PublicationRow:
    """Puts a plan in force in the transaction at hand, tells webhooks, and closes what waits for approval."""
    storable("comment", comment)
    if plan.model_key != row.model_key or not _is_same_cluster(session, plan.topology_key, row.topology_key):
        raise InputError(f"plan {plan.fingerprint[:ID_DIGITS]} is for another model or topology than {row.name!r}")
    if row.policy.get("engine"):
        digits = plan.fingerprint[:ID_DIGITS]
        try:
            check_plan(plan_from_dict(plan.document, f"plan {digits}"), row.policy["engine"])
        except UnsupportedError as error:
            raise UnsupportedError(f"plan {digits} cannot be put in force for {row.name!r}: {error}") from None
    # Whoever puts a plan in force has acted on what was open; what was rolled back is not to come back by itself.
    row.hold = _held_back(session, row, by) if cause == "rollback" else None
    row.alarm = None
    supersede(session, row, by, decision)
    row.version, row.plan_key = row.version + 1, plan.key
    published = PublicationRow(
        deployment_key=row.key,
        version=row.version,
        plan_key=plan.key,
        decision_key=None if decision is None else decision.key,
        cause=cause,
        actor=by.name,
        comment=comment,
        created=datetime.now(UTC),
    )
    session.add(published)
    digits = plan.fingerprint[:ID_DIGITS]
    audit.note(session, by, f"plan.{cause}", row.name, {"version": row.version, "plan": digits, "comment": comment})
    announce(session, row, "plan.published", {"version": row.version, "plan": digits, "cause": cause})
    session.flush()
    return published


def supersede(session: Session, row: DeploymentRow, by: Actor, decision: DecisionRow | None = None) -> None:
    """Closes what waits for approval, but this decision."""
    waiting = select(DecisionRow).where(DecisionRow.deployment_key == row.key, DecisionRow.state == "waiting")
    for other in session.scalars(waiting):
        if other is not decision:
            other.state, other.closed, other.closed_by = "superseded", datetime.now(UTC), by.name


def _page(
    session: Session, limit: int, after: str, among: Sequence[str] | None, of: Sequence[Any] = ()
) -> Sequence[DeploymentRow]:
    query = select(DeploymentRow).where(DeploymentRow.name > after, *of).order_by(DeploymentRow.name).limit(limit)
    if among is not None:
        query = query.where(DeploymentRow.name.in_(among))
    return session.scalars(query).all()


def _counted(session: Session, table: Any, keys: Sequence[int], which: Any) -> dict[int, int]:
    """How many such rows of a table each deployment has."""
    query = select(table.deployment_key, func.count()).where(table.deployment_key.in_(keys), which)
    return {key: int(count) for key, count in session.execute(query.group_by(table.deployment_key))}


def _regret(check: CheckRow | None, alarm: Mapping[str, Any] | None) -> float | None:
    """What the plan in force was last known to lose: of the last check, or of the alarm that is open."""
    for figures in ({} if check is None else check.figures, {} if alarm is None else alarm.get("figures", {})):
        if isinstance(figures.get("regret"), float):
            return float(figures["regret"])
    return None


Ids = dict[tuple[str, int], str]
"""Of models, topologies, plans and statistics, by table and key."""


def _ids_of(session: Session, rows: Sequence[DeploymentRow]) -> Ids:
    """Ids of all that these rows refer to."""
    ids: Ids = {}
    for table, keys in (
        (ModelRow, {row.model_key for row in rows}),
        (TopologyRow, {row.topology_key for row in rows}),
        (PlanRow, {row.plan_key for row in rows if row.plan_key is not None}),
        (StatisticsRow, {row.reference_key for row in rows if row.reference_key is not None}),
    ):
        if keys:
            query = select(table.key, table.fingerprint).where(table.key.in_(keys))
            ids |= {(table.__tablename__, key): digits[:ID_DIGITS] for key, digits in session.execute(query)}
    return ids


def _held_back(session: Session, row: DeploymentRow, by: Actor) -> dict[str, Any]:
    """Why nothing is published by itself from now on."""
    refused = list((row.hold or {}).get("plans", []))
    in_force = id_of(session, PlanRow, row.plan_key)
    if in_force is not None and in_force not in refused:
        refused.append(in_force)
    return {"by": by.name, "since": datetime.now(UTC).isoformat(), "plans": refused[-MOST_REFUSED:]}


def _record(session: Session, row: DeploymentRow, ids: Ids | None = None) -> DeploymentRecord:
    known = _ids_of(session, [row]) if ids is None else ids
    return DeploymentRecord(
        key=row.key,
        name=row.name,
        created=row.created,
        model_id=known["models", row.model_key],
        topology_id=known["topologies", row.topology_key],
        policy=row.policy,
        plan_id=None if row.plan_key is None else known["plans", row.plan_key],
        reference_id=None if row.reference_key is None else known["statistics", row.reference_key],
        reference_window=row.reference_window,
        version=row.version,
        checked=row.checked_key,
        hold=row.hold,
        alarm=row.alarm,
    )


def _publication(session: Session, row: PublicationRow) -> PublicationRecord:
    return PublicationRecord(
        deployment=session.get_one(DeploymentRow, row.deployment_key).name,
        version=row.version,
        plan_id=id_of(session, PlanRow, row.plan_key) or "",
        decision=row.decision_key,
        cause=cast(Cause, row.cause),
        actor=row.actor,
        comment=row.comment,
        created=row.created,
    )


class Decisions:
    """Threads and processes: as `Store`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def get(self, key: int) -> DecisionRecord:
        """Raises NotFoundError where there is no such decision."""
        with self._sessions.reading() as session:
            return _decision_record(session, numbered_row(session, DecisionRow, "decision", key))

    def page(
        self,
        deployment: str | None = None,
        *,
        limit: int,
        before: int | None = None,
        state: str | None = None,
        among: Sequence[str] | None = None,
    ) -> list[DecisionRecord]:
        """Newest first, of one deployment or of all; of those of these names only, where they are given."""
        query = select(DecisionRow).order_by(DecisionRow.key.desc()).limit(limit)
        with self._sessions.reading() as session:
            if among is not None:
                named = select(DeploymentRow.key).where(DeploymentRow.name.in_(among))
                query = query.where(DecisionRow.deployment_key.in_(named))
            if deployment is not None:
                query = query.where(DecisionRow.deployment_key == deployment_row(session, deployment).key)
            if before is not None:
                query = query.where(DecisionRow.key < before)
            if state is not None:
                query = query.where(DecisionRow.state == state)
            return [_decision_record(session, row) for row in session.scalars(query)]

    def close(self, key: int, verdict: Literal["approve", "reject"], by: Actor, comment: str = "") -> DecisionRecord:
        """Approves or rejects a waiting decision; approving publishes its plan. The same verdict again changes nothing.

        Raises:
            NotFoundError: no such decision. ConflictError: it does not wait any more.
        """
        storable("comment", comment, 2000)
        outcome = "published" if verdict == "approve" else "rejected"
        with self._sessions.writing() as session:
            row = numbered_row(session, DecisionRow, "decision", key)
            if row.state == outcome and row.closed_by == by.name:
                return _decision_record(session, row)
            if row.state != "waiting":
                raise ConflictError(f"decision {key} is {row.state}; only a waiting one can be approved or rejected")
            row.state, row.closed, row.closed_by, row.comment = outcome, datetime.now(UTC), by.name, comment
            deployment = session.get_one(DeploymentRow, row.deployment_key)
            detail = {"decision": key, "comment": comment}
            audit.note(session, by, f"decision.{verdict}", deployment.name, detail)
            if verdict == "approve":
                plan = session.get_one(PlanRow, row.candidate_key)
                publish(session, deployment, plan, by, "approved", comment, row)
            else:
                deployment.alarm = None
                announce(session, deployment, "decision.rejected", {"decision": key})
            return _decision_record(session, row)


def _decision_record(session: Session, row: DecisionRow) -> DecisionRecord:
    names = ("key", "created", "action", "state", "reason", "figures", "closed", "closed_by", "comment")
    return DecisionRecord(
        **{name: getattr(row, name) for name in names},
        deployment=session.get_one(DeploymentRow, row.deployment_key).name,
        job=row.job_key,
        current_id=id_of(session, PlanRow, row.current_key),
        candidate_id=id_of(session, PlanRow, row.candidate_key) or "",
    )


class Engines:
    """Threads and processes: as `Store`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def set(
        self, deployment: str, by: Actor, *, url: str, recorder: str, every: float, span: float, secret: str | None
    ) -> EngineRecord:
        """The engine of a deployment, in place of any other. secret: its key."""
        settings: Mapping[str, Any] = {
            "url": url,
            "recorder": storable("recorder", recorder, 100),
            "every": every,
            "span": span,
        }
        with self._sessions.writing() as session:
            owner = deployment_row(session, deployment)
            row = session.scalar(select(EngineRow).where(EngineRow.deployment_key == owner.key))
            if row is None:
                row = EngineRow(deployment_key=owner.key, holder="", beat=0, windows=0)
                session.add(row)
            for name, value in settings.items():
                setattr(row, name, value)
            row.secret, row.created = None if secret is None else seal(secret), datetime.now(UTC)
            # Whoever asks the old one learns at its next beat.
            row.holder, row.failures, row.failed, row.error, row.polled = "", 0, None, None, None
            audit.note(session, by, "engine.set", deployment, {**settings, "key": secret is not None})
            session.flush()
            return _engine_record(row, deployment)

    def get(self, deployment: str) -> EngineRecord:
        """Raises NotFoundError where the deployment has none."""
        with self._sessions.reading() as session:
            return _engine_record(_engine_row(session, deployment), deployment)

    def page(self, *, limit: int, after: str = "", among: Sequence[str] | None = None) -> list[EngineRecord]:
        """In order of their deployments' names, those behind `after`; of these names only, where they are given."""
        query = select(EngineRow, DeploymentRow.name).join(DeploymentRow, EngineRow.deployment_key == DeploymentRow.key)
        query = query.where(DeploymentRow.name > after).order_by(DeploymentRow.name).limit(limit)
        if among is not None:
            query = query.where(DeploymentRow.name.in_(among))
        with self._sessions.reading() as session:
            return [_engine_record(row, name) for row, name in session.execute(query)]

    def remove(self, deployment: str, by: Actor) -> None:
        """Raises NotFoundError where the deployment has none."""
        with self._sessions.writing() as session:
            row = _engine_row(session, deployment)
            session.execute(delete(EngineRow).where(EngineRow.key == row.key))
            audit.note(session, by, "engine.remove", deployment, {"url": row.url})

    def all(self) -> list[EngineHold]:
        """Every engine, and who asks it."""
        query = select(EngineRow, DeploymentRow.name).join(DeploymentRow, EngineRow.deployment_key == DeploymentRow.key)
        with self._sessions.reading() as session:
            return [_hold(row, name) for row, name in session.execute(query)]

    def take(self, seen: EngineHold, holder: str) -> EngineHold | None:
        """Makes `holder` the one who asks, or shows that it still does; None when another came first since `seen`."""
        with self._sessions.writing() as session:
            row = session.get(EngineRow, seen.key)
            if row is None or (row.holder, row.beat) != (seen.holder, seen.beat):
                return None
            row.holder, row.beat = holder, row.beat + 1
            return _hold(row, seen.engine.deployment)

    def seal_all(self) -> None:
        """Encrypts keys that were stored before there was a key for them. See `secrets.seal`."""
        with self._sessions.writing() as session:
            for row in session.scalars(select(EngineRow).where(EngineRow.secret.is_not(None))):
                if row.secret is not None and not is_sealed(row.secret):
                    row.secret = seal(row.secret)

    def told(self, hold: EngineHold, windows: int, error: str | None) -> None:
        """Notes what came of asking; nothing when somebody else asks now."""
        with self._sessions.writing() as session:
            row = session.get(EngineRow, hold.key)
            if row is None or row.holder != hold.holder or row.url != hold.engine.url:
                return
            if error is None:
                row.polled, row.windows = datetime.now(UTC), row.windows + windows
                row.failures, row.failed, row.error = 0, None, None
            else:
                row.failures, row.failed, row.error = row.failures + 1, datetime.now(UTC), error[:2000]


def _engine_row(session: Session, deployment: str) -> EngineRow:
    owner = deployment_row(session, deployment)
    row = session.scalar(select(EngineRow).where(EngineRow.deployment_key == owner.key))
    if row is None:
        raise NotFoundError(f"no engine is asked for the routing of {deployment!r}")
    return row


def _engine_record(row: EngineRow, deployment: str) -> EngineRecord:
    columns = {name: getattr(row, name) for name in EngineRecord.model_fields if name != "deployment"}
    return EngineRecord(**columns, deployment=deployment)


def _hold(row: EngineRow, deployment: str) -> EngineHold:
    return EngineHold(_engine_record(row, deployment), row.key, row.holder, row.beat, row.secret)
