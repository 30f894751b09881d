"""Deployments: a model on a topology, its policy, and the plans put in force one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..placement.engines import check_plan
from ..placement.errors import ConflictError, InputError, NotFoundError, UnsupportedError
from ..placement.plan import plan_from_dict
from ..placement.topology import Topology
from . import audit
from .content import ID_DIGITS, plain
from .database import Sessions
from .records import Actor, Cause, CheckRecord, DeploymentRecord, PublicationRecord
from .references import check_name, deployment_row, find, id_of
from .schema import CheckRow, DecisionRow, DeploymentRow, ModelRow, PlanRow, PublicationRow, StatisticsRow, TopologyRow
from .webhooks import announce


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

    def page(self, *, limit: int, after: str = "") -> list[DeploymentRecord]:
        """In order of their names, those behind `after`."""
        query = select(DeploymentRow).where(DeploymentRow.name > after).order_by(DeploymentRow.name).limit(limit)
        with self._sessions.reading() as session:
            return [_record(session, row) for row in session.scalars(query)]

    def set_policy(self, name: str, policy: Mapping[str, Any], by: Actor) -> DeploymentRecord:
        """Replaces the policy."""
        with self._sessions.writing() as session:
            row = deployment_row(session, name)
            before, row.policy = row.policy, plain("policy", dict(policy))
            audit.note(session, by, "deployment.policy", name, {"before": before, "after": row.policy})
            return _record(session, row)

    def publish(
        self, name: str, plan: str, by: Actor, *, cause: Cause, comment: str = "", expected: int | None = None
    ) -> PublicationRecord:
        """Puts a stored plan in force. expected: the version it follows.

        Raises:
            ConflictError: another plan was published meanwhile. InputError: a plan for another model or topology.
            UnsupportedError: the policy's engine cannot run it.
        """
        with self._sessions.writing() as session:
            row = deployment_row(session, name)
            if expected is not None and row.version != expected:
                raise ConflictError(f"{name!r} is at version {row.version}, not {expected}: look at it and try again")
            return _publication(session, publish(session, row, find(session, PlanRow, plan), by, cause, comment))

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
            found = session.scalar(query)
            if found is None:
                raise NotFoundError(f"{name!r} has no version {version}; it is at version {row.version}")
            return _publication(session, found)

    def publications(self, name: str, *, limit: int, before: int | None = None) -> list[PublicationRecord]:
        """Newest first, those of versions below `before`."""
        with self._sessions.reading() as session:
            row = deployment_row(session, name)
            query = select(PublicationRow).where(PublicationRow.deployment_key == row.key)
            if before is not None:
                query = query.where(PublicationRow.version < before)
            rows = session.scalars(query.order_by(PublicationRow.version.desc()).limit(limit))
            return [_publication(session, found) for found in rows]

    def checks(self, name: str, *, limit: int, before: int | None = None) -> list[CheckRecord]:
        """Drift checks, newest first."""
        with self._sessions.reading() as session:
            row = deployment_row(session, name)
            query = select(CheckRow).where(CheckRow.deployment_key == row.key)
            if before is not None:
                query = query.where(CheckRow.key < before)
            rows = session.scalars(query.order_by(CheckRow.key.desc()).limit(limit))
            return [CheckRecord.model_validate(found) for found in rows]


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
    if plan.model_key != row.model_key or not _is_same_cluster(session, plan.topology_key, row.topology_key):
        raise InputError(f"plan {plan.fingerprint[:ID_DIGITS]} is for another model or topology than {row.name!r}")
    if row.policy.get("engine"):
        digits = plan.fingerprint[:ID_DIGITS]
        try:
            check_plan(plan_from_dict(plan.document, f"plan {digits}"), row.policy["engine"])
        except UnsupportedError as error:
            raise UnsupportedError(f"plan {digits} cannot be put in force for {row.name!r}: {error}") from None
    waiting = select(DecisionRow).where(DecisionRow.deployment_key == row.key, DecisionRow.state == "waiting")
    for other in session.scalars(waiting):
        if other is not decision:
            other.state, other.closed, other.closed_by = "superseded", datetime.now(UTC), by.name
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


def _record(session: Session, row: DeploymentRow) -> DeploymentRecord:
    return DeploymentRecord(
        key=row.key,
        name=row.name,
        created=row.created,
        model_id=id_of(session, ModelRow, row.model_key) or "",
        topology_id=id_of(session, TopologyRow, row.topology_key) or "",
        policy=row.policy,
        plan_id=id_of(session, PlanRow, row.plan_key),
        reference_id=id_of(session, StatisticsRow, row.reference_key),
        reference_window=row.reference_window,
        version=row.version,
        checked=row.checked_key,
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
