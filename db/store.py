"""The store: what was recorded, solved, judged and exported, in an SQLite file or a PostgreSQL database."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Self, TypeVar

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..placement.errors import InputError, StoreError
from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.plan import Plan
from ..placement.statistics import RoutingStatistics
from ..placement.topology import Topology
from . import audit, catalogue
from .audit import Audit
from .database import Listener, Sessions, resolve, shown
from .deployments import Decisions, Deployments, Engines
from .jobs import Jobs
from .records import (
    Actor,
    EvaluationRecord,
    ExportRecord,
    ModelRecord,
    PlanRecord,
    PlanSummary,
    StatisticsRecord,
    StoreDescription,
    TopologyRecord,
    TopologySummary,
)
from .references import ID_DIGITS, Kind, check_free, find, kind_of, matches, set_name, storable
from .schema import (
    AuditRow,
    CheckRow,
    DecisionRow,
    DeploymentRow,
    EvaluationRow,
    ExportRow,
    JobRow,
    ModelRow,
    PlanRow,
    StatisticsRow,
    TopologyRow,
)
from .secrets import Tokens
from .uploads import Uploads
from .webhooks import Webhooks
from .windows import Windows

AT_ONCE = 500
"""Keys in one question."""


class Store:
    """Models, topologies, statistics, plans, evaluations and exports, kept by content.

    Adding what is stored already returns the record that is there, so a caller that is not sure whether it succeeded
    adds again. Plans never change. References (`ref`) are a name, at least 4 first digits of an id, or for models and
    topologies the label they carry (`ModelSpec.name`, `Topology.name`).

    Threads and processes: one Store may be used from many threads, and by processes forked after it was opened; any
    number of Stores, in any processes, may be open on one database. Every method is one transaction: all of it is
    stored or nothing, also when the process is killed or the disk is full. Writers take turns, so none is lost or
    doubled; one that waits longer than `lock_seconds` raises StoreError. Readers see the last committed state and do
    not wait.

    Every method raises StoreError when the database is locked, full, damaged, unreachable or refuses, and InputError
    for a reference that means nothing or several things.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.audit = Audit(sessions)
        self.decisions = Decisions(sessions)
        self.deployments = Deployments(sessions)
        self.engines = Engines(sessions)
        self.jobs = Jobs(sessions)
        self.tokens = Tokens(sessions)
        self.uploads = Uploads(sessions)
        self.webhooks = Webhooks(sessions)
        self.windows = Windows(sessions)

    @classmethod
    def open(cls, url: str | os.PathLike[str] | None = None, *, lock_seconds: float = 30.0) -> Self:
        """Opens a database, creating or upgrading its tables on first use.

        url: a file path, `sqlite:///file`, or `postgresql://user@host/database`; by default the environment's
        MOEPLACE_DB, else a file in the user's data folder. lock_seconds: how long to wait for other writers.

        Raises:
            StoreError: no such folder, no permission, not a database, another program's, migrated by a newer release,
                or the server cannot be reached; passwords are not shown.
        """
        if not 0 <= lock_seconds <= 86400:
            raise InputError(f"lock_seconds ({lock_seconds}) must be between 0 and 86400")
        return cls(Sessions(resolve(url), lock_seconds))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes idle connections. The store opens new ones when it is used again."""
        self._sessions.close()

    @property
    def url(self) -> str:
        """The database, without its password."""
        return shown(self._sessions.url)

    def add_model(self, spec: ModelSpec, *, name: str | None = None, by: Actor | None = None) -> ModelRecord:
        """Keeps a model. Raises InputError when the name is taken or the model is stored under another."""
        with self._sessions.writing() as session:
            return catalogue.model_record(_noted(session, catalogue.keep_model(session, spec, name), by))

    def model(self, ref: str) -> ModelRecord:
        """The model `ref` means."""
        with self._sessions.reading() as session:
            return catalogue.model_record(find(session, ModelRow, ref))

    def models(self, *, limit: int | None = None, before: str | None = None) -> list[ModelRecord]:
        """Models, newest first. before: only those stored before this one."""
        with self._sessions.reading() as session:
            return [catalogue.model_record(row) for row in _newest(session, ModelRow, limit, before)]

    def add_topology(self, topology: Topology, *, name: str | None = None, by: Actor | None = None) -> TopologyRecord:
        """Keeps a topology. Raises InputError when the name is taken or the topology is stored under another."""
        with self._sessions.writing() as session:
            return catalogue.topology_record(_noted(session, catalogue.keep_topology(session, topology, name), by))

    def topology(self, ref: str) -> TopologyRecord:
        """The topology `ref` means."""
        with self._sessions.reading() as session:
            return catalogue.topology_record(find(session, TopologyRow, ref))

    def topologies(self, *, limit: int | None = None, before: str | None = None) -> list[TopologyRecord]:
        """Topologies, newest first. before: only those stored before this one."""
        with self._sessions.reading() as session:
            return [catalogue.topology_record(row) for row in _newest(session, TopologyRow, limit, before)]

    def topology_summaries(self, *, limit: int | None = None, before: str | None = None) -> list[TopologySummary]:
        """The same without their devices, which may be thousands of each."""
        with self._sessions.reading() as session:
            return [catalogue.topology_summary(row) for row in _newest(session, TopologyRow, limit, before)]

    def add_statistics(
        self, statistics: RoutingStatistics, content: bytes, *, name: str | None = None, by: Actor | None = None
    ) -> StatisticsRecord:
        """Keeps statistics: `content` is their file (`.npz`), whose format belongs to those who write and read it.

        Raises:
            InputError: the content is empty or larger than 1 GiB; the name is taken, or the statistics are stored
                under another.
        """
        with self._sessions.writing() as session:
            row = catalogue.keep_statistics(session, statistics, content, name)
            return catalogue.statistics_record(_noted(session, row, by))

    def statistics(self, ref: str) -> StatisticsRecord:
        """What the statistics `ref` means hold."""
        with self._sessions.reading() as session:
            return catalogue.statistics_record(find(session, StatisticsRow, ref))

    def statistics_content(self, ref: str) -> bytes:
        """The file of the statistics `ref` means.

        Raises:
            StoreError: it is not what was stored.
        """
        with self._sessions.reading() as session:
            row = find(session, StatisticsRow, ref)
            content = catalogue.statistics_content(session, row)
        if hashlib.sha256(content).hexdigest() != row.content_sha256:
            raise StoreError(f"database {self.url}: statistics {ref!r} were changed or damaged after they were stored")
        return content

    def statistics_records(self, *, limit: int | None = None, before: str | None = None) -> list[StatisticsRecord]:
        """What stored statistics hold, newest first. before: only those stored before these."""
        with self._sessions.reading() as session:
            return [catalogue.statistics_record(row) for row in _newest(session, StatisticsRow, limit, before)]

    def add_plan(
        self,
        plan: Plan,
        *,
        statistics: str | None = None,
        name: str | None = None,
        by: Actor | None = None,
        claimed: bool = False,
    ) -> PlanRecord:
        """Keeps a plan, with its model and topology.

        Two plans are the same when all but the solver's running time is: placement, topology, certificate, solver,
        seed, options and trace. The first is kept. statistics: the stored ones it was solved on; once given they stay.
        by: who adds it, for the audit log. claimed: its certificate is what they say, and proven nowhere here.

        Raises:
            InputError: the name is taken or the plan is stored under another; its options are not plain data; the
                statistics are of another trace than the plan's.
        """
        with self._sessions.writing() as session:
            claimed_by = by.name if claimed and by is not None else None
            row = catalogue.keep_plan(session, plan, statistics, name, claimed_by)
            return self._plan(session, _noted(session, row, by))

    def plan(self, ref: str) -> PlanRecord:
        """The plan `ref` means, with its tables.

        Raises:
            StoreError: it is not what was stored. FileFormatError: it is of a version this release does not read.
        """
        with self._sessions.reading() as session:
            return self._plan(session, find(session, PlanRow, ref))

    def plans(
        self,
        *,
        model: str | None = None,
        solver: str | None = None,
        limit: int | None = None,
        offset: int = 0,
        before: str | None = None,
    ) -> list[PlanSummary]:
        """Plans without their tables, newest first.

        model: only those of the models this may mean (a label may stand for several). solver: only those it made.
        before: only those stored before this one.
        """
        if offset < 0 or (limit is not None and limit < 0):
            raise InputError(f"limit ({limit}) and offset ({offset}) must not be negative")
        query = catalogue.select_plans().order_by(PlanRow.key.desc()).limit(limit).offset(offset)
        with self._sessions.reading() as session:
            if model is not None:
                query = query.where(PlanRow.model_key.in_([row.key for row in matches(session, ModelRow, model)]))
            if before is not None:
                query = query.where(PlanRow.key < find(session, PlanRow, before).key)
            if solver is not None:
                query = query.where(PlanRow.solver == storable("solver", solver))
            return [catalogue.plan_summary(result) for result in session.execute(query)]

    def add_evaluation(
        self,
        plan: str,
        *,
        summary: Mapping[str, float],
        steps: str,
        steps_fingerprint: str,
        objective: Objective | None = None,
    ) -> EvaluationRecord:
        """Keeps what a plan costs on steps. plan: a reference. summary: figures by name (`Evaluation.summary()`).

        steps: how they were made, in words. steps_fingerprint: SHA-256 of them, empty when unknown.

        Raises:
            InputError: no such plan, a figure that is not a finite number, no figures, or not a fingerprint.
        """
        with self._sessions.writing() as session:
            owner = find(session, PlanRow, plan)
            row = catalogue.keep_evaluation(session, owner, summary, steps, steps_fingerprint, objective)
            return catalogue.evaluation_record(row, owner.fingerprint)

    def evaluations(self, plan: str) -> list[EvaluationRecord]:
        """All evaluations of a plan, oldest first."""
        with self._sessions.reading() as session:
            owner = find(session, PlanRow, plan)
            query = select(EvaluationRow).where(EvaluationRow.plan_key == owner.key).order_by(EvaluationRow.key)
            return [catalogue.evaluation_record(row, owner.fingerprint) for row in session.scalars(query)]

    def add_export(self, plan: str, *, format: str, path: str | os.PathLike[str], sha256: str = "") -> ExportRecord:  # noqa: A002
        """Notes that a plan was written for an engine; each call is one event.

        plan: a reference. format: the engine's. path: where it was written. sha256: of the file, empty for a folder.

        Raises:
            InputError: no such plan, or not a SHA-256.
        """
        with self._sessions.writing() as session:
            owner = find(session, PlanRow, plan)
            row = catalogue.keep_export(session, owner, format, os.fspath(path), sha256)
            return catalogue.export_record(row, owner.fingerprint)

    def exports(self, plan: str) -> list[ExportRecord]:
        """All exports of a plan, oldest first."""
        with self._sessions.reading() as session:
            owner = find(session, PlanRow, plan)
            query = select(ExportRow).where(ExportRow.plan_key == owner.key).order_by(ExportRow.key)
            return [catalogue.export_record(row, owner.fingerprint) for row in session.scalars(query)]

    def check(self, kind: Kind, name: str | None = None) -> None:
        """Whether something new of a kind could be stored, under a name where one is given.

        Raises:
            StoreError: the database takes no writes. InputError: the name is taken, or cannot be one.
        """
        with self._sessions.writing() as session:
            if name is not None:
                check_free(session, catalogue.table(kind), name)

    def rename(self, kind: Kind, ref: str, name: str) -> None:
        """Gives what `ref` means another name.

        Raises:
            InputError: unknown kind; the name is taken, or cannot be one.
        """
        with self._sessions.writing() as session:
            set_name(session, find(session, catalogue.table(kind), ref), name)

    def delete(self, kind: Kind, ref: str, *, dependants: bool = False) -> None:
        """Removes what `ref` means.

        dependants: also remove what belongs to it: a plan's evaluations and exports; the plans of a model, of a
        topology or solved on statistics, with theirs.

        Raises:
            InputError: unknown kind, or it has dependants and `dependants` is False; they are counted.
        """
        with self._sessions.writing() as session:
            catalogue.drop(session, kind, ref, dependants)

    def remove(self, kind: Kind, ref: str, by: Actor) -> None:
        """The same as `delete` without dependants, in the audit log."""
        with self._sessions.writing() as session:
            row = find(session, catalogue.table(kind), ref)
            subject = row.name or row.fingerprint[:ID_DIGITS]
            catalogue.drop(session, kind, ref, dependants=False)
            audit.note(session, by, f"{kind}.remove", subject, {"fingerprint": row.fingerprint})

    def drop_statistics(self, created_before: datetime) -> int:
        """Removes statistics older than a moment that have no name, and that no plan or deployment refers to; returns
        how many."""
        with self._sessions.writing() as session:
            return catalogue.drop_statistics(session, created_before)

    def signs(
        self, deployments: Sequence[str], jobs: Sequence[int], pages: Sequence[str] = ()
    ) -> dict[tuple[str, str | int], Hashable]:
        """What changes when a deployment's plan or a job does, by ("deployment", name) and ("job", key), or anything
        that a deployment's page shows, by ("page", name), with "" for all. Those that do not exist are left out."""
        plans = select(DeploymentRow.name, DeploymentRow.version, DeploymentRow.plan_key)
        states = select(JobRow.key, JobRow.state, JobRow.attempts, JobRow.beat)
        result: dict[tuple[str, str | int], Hashable] = {}
        with self._sessions.reading() as session:
            for start in range(0, len(deployments), AT_ONCE):
                part = plans.where(DeploymentRow.name.in_(deployments[start : start + AT_ONCE]))
                result |= {("deployment", name): (version, plan) for name, version, plan in session.execute(part)}
            for start in range(0, len(jobs), AT_ONCE):
                of_jobs = states.where(JobRow.key.in_(jobs[start : start + AT_ONCE]))
                result |= {("job", key): (state, tries, beat) for key, state, tries, beat in session.execute(of_jobs)}
            if "" in pages:
                result["page", ""] = tuple(session.execute(select(*_latest())).one())
            names = [name for name in pages if name]
            for start in range(0, len(names), AT_ONCE):
                latest = _latest(DeploymentRow.key)
                shown = select(
                    DeploymentRow.name, DeploymentRow.version, DeploymentRow.hold, DeploymentRow.alarm, *latest
                )
                for name, *sign in session.execute(shown.where(DeploymentRow.name.in_(names[start : start + AT_ONCE]))):
                    result["page", name] = str(sign)
        return result

    def version(self) -> int | None:
        """Changes with every commit of other processes and threads, told at next to no cost; None where that cannot be
        told (PostgreSQL, which `listen` is for)."""
        return self._sessions.version()

    def listen(self, changed: Callable[[], None]) -> Listener | None:
        """Has `changed` called, from a thread, when what `signs` tells may be other than before; None where the
        database cannot tell (SQLite)."""
        return self._sessions.listen(changed)

    def describe(self) -> StoreDescription:
        """Where the store is, the revision of its tables, how many of each kind it holds, and their size."""
        with self._sessions.reading() as session:
            return catalogue.describe(session, self.url)

    def _plan(self, session: Session, row: PlanRow) -> PlanRecord:
        result = session.execute(catalogue.select_plans().where(PlanRow.key == row.key)).one()
        return catalogue.plan_record(result, row.document, f"database {self.url}: plan {row.fingerprint[:12]}")


def _latest(of: Any = None) -> list[Any]:
    """What tells that pages look other than before: the newest of each kind and how many are open, of the deployment
    of this key or of all."""

    def chosen(value: Any, table: Any, *which: Any) -> Any:
        query = select(value).where(*which)
        return (query if of is None else query.where(table.deployment_key == of)).scalar_subquery()

    waiting, open_jobs = DecisionRow.state == "waiting", JobRow.state.in_(("queued", "running"))
    running = JobRow.state == "running"
    latest = [
        chosen(func.max(CheckRow.key), CheckRow),
        chosen(func.max(DecisionRow.key), DecisionRow),
        chosen(func.count(), DecisionRow, waiting),
        chosen(func.max(JobRow.key), JobRow),
        chosen(func.sum(JobRow.key), JobRow, open_jobs),
        chosen(func.sum(JobRow.key), JobRow, running),
    ]
    return [*latest, select(func.max(AuditRow.key)).scalar_subquery()] if of is None else latest


N = TypeVar("N", ModelRow, TopologyRow, StatisticsRow, PlanRow)


def _newest(session: Session, table: type[N], limit: int | None, before: str | None) -> Iterable[N]:
    """Rows one after the other: each may be large."""
    query = select(table).order_by(table.key.desc()).limit(limit)
    if before is not None:
        query = query.where(table.key < find(session, table, before).key)
    return session.scalars(query.execution_options(yield_per=1))


def _noted(session: Session, row: N, by: Actor | None) -> N:
    """The row, in the audit log with who added it."""
    if by is not None:
        detail = {"id": row.fingerprint[:ID_DIGITS]}
        audit.note(session, by, f"{kind_of(type(row))}.add", row.name or row.fingerprint[:ID_DIGITS], detail)
    return row
