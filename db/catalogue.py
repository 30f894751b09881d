"""Models, topologies, statistics and plans: rows kept once, by their content; what callers get of them; deleting
them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import Row, Select, delete, func, insert, select, text
from sqlalchemy.orm import Session

from ..placement.errors import InputError, StoreError, nearest
from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.plan import Certificate, Plan, Provenance, plan_from_dict, plan_to_dict
from ..placement.statistics import RoutingStatistics
from ..placement.topology import Topology
from .database import revision
from .records import (
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
from .references import (
    ID_DIGITS,
    ROWS,
    Kind,
    claim_name,
    find,
    fingerprint,
    plain,
    plan_fingerprint,
    sha256_digits,
    statistics_about,
    statistics_fingerprint,
    storable,
)
from .schema import (
    Base,
    DecisionRow,
    DeploymentRow,
    EvaluationRow,
    ExportRow,
    ModelRow,
    Named,
    PlanRow,
    PublicationRow,
    StatisticsPartRow,
    StatisticsRow,
    TopologyRow,
)

R = TypeVar("R", ModelRow, TopologyRow, StatisticsRow, PlanRow)

CONTENT_LIMIT = 1 << 30
"""Bytes of one stored statistics file. Other writers wait while it is written."""

PART_BYTES = 8 << 20


def keep_model(session: Session, spec: ModelSpec, name: str | None = None) -> ModelRow:
    """See `Store.add_model`."""
    data = spec.model_dump(mode="json")

    def build() -> ModelRow:
        label = storable("ModelSpec.name", spec.name)
        return ModelRow(label=label, layers=spec.layers, experts=spec.experts, spec=data)

    return _keep(session, ModelRow, fingerprint(data), name, build)


def keep_topology(session: Session, topology: Topology, name: str | None = None) -> TopologyRow:
    """See `Store.add_topology`."""
    data = topology.model_dump(mode="json")

    def build() -> TopologyRow:
        label = storable("Topology.name", topology.name)
        return TopologyRow(label=label, devices=topology.num_devices, topology=data)

    return _keep(session, TopologyRow, fingerprint(data), name, build)


def keep_statistics(
    session: Session, statistics: RoutingStatistics, content: bytes, name: str | None = None
) -> StatisticsRow:
    """See `Store.add_statistics`."""
    if not 0 < len(content) <= CONTENT_LIMIT:
        raise InputError(
            f"statistics of {len(content):,} bytes cannot be stored, 1 to {CONTENT_LIMIT:,} can; "
            "keep a smaller token sample"
        )
    about = plain("statistics", statistics_about(statistics))

    def build() -> StatisticsRow:
        return StatisticsRow(
            trace_fingerprint=storable("statistics fingerprint", statistics.fingerprint, 64),
            about=about,
            content_bytes=len(content),
            content_sha256=hashlib.sha256(content).hexdigest(),
        )

    row = _keep(session, StatisticsRow, statistics_fingerprint(statistics), name, build)
    parts = select(StatisticsPartRow.position).where(StatisticsPartRow.statistics_key == row.key).limit(1)
    if session.scalar(parts) is None:
        for position, start in enumerate(range(0, len(content), PART_BYTES)):
            part = content[start : start + PART_BYTES]
            session.execute(
                insert(StatisticsPartRow), {"statistics_key": row.key, "position": position, "content": part}
            )
    return row


def statistics_content(session: Session, row: StatisticsRow) -> bytes:
    """The file put together again, not checked."""
    parts = select(StatisticsPartRow.content).where(StatisticsPartRow.statistics_key == row.key)
    ordered = parts.order_by(StatisticsPartRow.position).execution_options(yield_per=1)
    return b"".join(session.scalars(ordered))


def keep_plan(
    session: Session, plan: Plan, statistics: str | None, name: str | None, claimed_by: str | None = None
) -> PlanRow:
    """See `Store.add_plan`. claimed_by: whose word its certificate is, where it was not stored before."""
    document = plain("plan", plan_to_dict(plan))
    made = {key: value for key, value in document["provenance"].items() if key != "history"}

    def build() -> PlanRow:
        return PlanRow(
            model_key=keep_model(session, plan.model).key,
            topology_key=keep_topology(session, plan.topology).key,
            solver=storable("plan solver", plan.provenance.solver, 100),
            slots=plan.num_slots,
            claimed_by=claimed_by,
            certificate=document["certificate"],
            provenance=made,
            document=document,
        )

    source = None if statistics is None else find(session, StatisticsRow, statistics)
    trace = plan.provenance.trace_fingerprint
    if source is not None and trace and source.trace_fingerprint != trace:
        raise InputError(
            f"statistics {statistics!r} count trace {source.trace_fingerprint[:ID_DIGITS]}, "
            f"the plan was solved on trace {trace[:ID_DIGITS]}; give the statistics it was solved on"
        )
    row = _keep(session, PlanRow, plan_fingerprint(document), name, build)
    if row.statistics_key is None and source is not None:
        row.statistics_key = source.key
        session.flush()
    return row


def keep_evaluation(
    session: Session,
    owner: PlanRow,
    summary: Mapping[str, float],
    steps: str,
    steps_fingerprint: str,
    objective: Objective | None,
) -> EvaluationRow:
    """See `Store.add_evaluation`."""
    if not summary:
        raise InputError("an evaluation needs at least one figure, summary is empty")
    figures = plain("evaluation summary", {str(key): _figure(key, value) for key, value in summary.items()})
    settings = None if objective is None else objective.model_dump(mode="json")
    storable("steps", steps)
    sha256_digits("steps_fingerprint", steps_fingerprint)
    digits = fingerprint([owner.fingerprint, steps, steps_fingerprint, settings, figures])
    row = session.scalar(select(EvaluationRow).where(EvaluationRow.fingerprint == digits))
    if row is None:
        row = EvaluationRow(
            fingerprint=digits,
            plan_key=owner.key,
            created=datetime.now(UTC),
            steps=steps,
            steps_fingerprint=steps_fingerprint,
            objective=settings,
            summary=figures,
        )
        session.add(row)
    return row


def _figure(name: str, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"evaluation summary: {name!r} is {value!r}, expected a number") from None


def keep_export(session: Session, owner: PlanRow, engine_format: str, path: str, sha256: str) -> ExportRow:
    """See `Store.add_export`."""
    row = ExportRow(
        plan_key=owner.key,
        created=datetime.now(UTC),
        format=storable("export format", engine_format, 100),
        path=storable("export path", path),
        sha256=sha256_digits("sha256", sha256),
    )
    session.add(row)
    return row


def _keep(session: Session, table: type[R], digits: str, name: str | None, build: Callable[[], R]) -> R:
    """The row with this fingerprint, built where it is not there yet, under `name` where one is given."""
    row = session.scalar(select(table).where(table.fingerprint == digits))
    if row is None:
        row = build()
        row.fingerprint, row.created = digits, datetime.now(UTC)
        # Named before it is written: changing a row later rewrites all of it, large content included.
        claim_name(session, row, name)
        session.add(row)
        session.flush()
    else:
        claim_name(session, row, name)
    return row


def model_record(row: ModelRow) -> ModelRecord:
    return ModelRecord(**_named(row), spec=ModelSpec(**row.spec))


def topology_record(row: TopologyRow) -> TopologyRecord:
    return TopologyRecord(**_named(row), topology=Topology(**row.topology))


def topology_summary(row: TopologyRow) -> TopologySummary:
    return TopologySummary(
        **_named(row), devices=row.devices, nodes=len(row.topology["nodes"]), label=row.topology["name"]
    )


def statistics_record(row: StatisticsRow) -> StatisticsRecord:
    about = {**row.about, "moe_layers": tuple(row.about["moe_layers"]), "workloads": tuple(row.about["workloads"])}
    return StatisticsRecord(
        **_named(row),
        **about,
        trace_fingerprint=row.trace_fingerprint,
        content_bytes=row.content_bytes,
        content_sha256=row.content_sha256,
    )


def select_plans() -> Select[*tuple[Any, ...]]:
    """Plans without their tables, each with what its summary tells of model, topology and statistics."""
    return (
        select(
            PlanRow,
            ModelRow.fingerprint.label("model_fingerprint"),
            ModelRow.name.label("model_name"),
            ModelRow.label.label("model_label"),
            ModelRow.layers,
            ModelRow.experts,
            TopologyRow.fingerprint.label("topology_fingerprint"),
            TopologyRow.name.label("topology_name"),
            TopologyRow.label.label("topology_label"),
            TopologyRow.devices,
            StatisticsRow.fingerprint.label("statistics_fingerprint"),
        )
        .join(ModelRow, PlanRow.model_key == ModelRow.key)
        .join(TopologyRow, PlanRow.topology_key == TopologyRow.key)
        .outerjoin(StatisticsRow, PlanRow.statistics_key == StatisticsRow.key)
    )


def plan_summary(entry: Row[*tuple[Any, ...]]) -> PlanSummary:
    """The summary in a row of `select_plans`."""
    return PlanSummary(**_summary(entry))


def plan_record(entry: Row[*tuple[Any, ...]], document: dict[str, Any], origin: str) -> PlanRecord:
    """The plan in a row of `select_plans` and its document.

    Raises:
        StoreError: the document is not the one that was stored. FileFormatError: of a newer version.
    """
    row: PlanRow = entry[0]
    if plan_fingerprint(document) != row.fingerprint:
        raise StoreError(f"{origin}: its content was changed or damaged after it was stored; restore a copy")
    return PlanRecord(**_summary(entry), plan=plan_from_dict(document, origin=origin))


def evaluation_record(row: EvaluationRow, plan: str) -> EvaluationRecord:
    return EvaluationRecord(
        id=row.fingerprint[:ID_DIGITS],
        plan_id=plan[:ID_DIGITS],
        created=row.created,
        steps=row.steps,
        steps_fingerprint=row.steps_fingerprint,
        objective=None if row.objective is None else Objective(**row.objective),
        summary=row.summary,
    )


def export_record(row: ExportRow, plan: str) -> ExportRecord:
    return ExportRecord(
        plan_id=plan[:ID_DIGITS], created=row.created, format=row.format, path=row.path, sha256=row.sha256
    )


def _named(row: Named) -> dict[str, Any]:
    return {
        "id": row.fingerprint[:ID_DIGITS],
        "fingerprint": row.fingerprint,
        "name": row.name,
        "created": row.created,
    }


def _summary(entry: Row[*tuple[Any, ...]]) -> dict[str, Any]:
    row: PlanRow = entry[0]
    model, topology = entry.model_fingerprint[:ID_DIGITS], entry.topology_fingerprint[:ID_DIGITS]
    return {
        **_named(row),
        "model_id": model,
        "model": entry.model_name or entry.model_label or model,
        "topology_id": topology,
        "topology": entry.topology_name or entry.topology_label or topology,
        "statistics_id": entry.statistics_fingerprint and entry.statistics_fingerprint[:ID_DIGITS],
        "layers": entry.layers,
        "experts": entry.experts,
        "devices": entry.devices,
        "slots": row.slots,
        "certificate": None if row.certificate is None else _certificate(row.certificate),
        "claimed_by": row.claimed_by,
        "provenance": Provenance(**row.provenance),
    }


def table(kind: Kind) -> Any:
    """The rows of a kind.

    Raises:
        InputError: unknown kind; the nearest is named.
    """
    if kind not in ROWS:
        raise InputError(f"kind {kind!r} is unknown; {nearest(str(kind), ROWS)}")
    return ROWS[kind]


def drop(session: Session, kind: Kind, ref: str, dependants: bool) -> None:
    """See `Store.delete`."""
    row = find(session, table(kind), ref)
    owner = {"model": PlanRow.model_key, "topology": PlanRow.topology_key, "statistics": PlanRow.statistics_key}
    plans = select(PlanRow.key).where(owner.get(kind, PlanRow.key) == row.key)
    children = (EvaluationRow, ExportRow)
    losers = {
        child.__tablename__: _count(session, select(child.key).where(child.plan_key.in_(plans))) for child in children
    }
    if kind != "plan":
        losers = {"plans": _count(session, plans), **losers}
    if any(losers.values()) and not dependants:
        listed = ", ".join(f"{count} {name}" for name, count in losers.items() if count)
        raise InputError(
            f"{kind} {ref!r} has {listed} that would lose it; delete those first, or all of it with dependants=True"
        )
    _refuse_used(session, kind, ref, row, plans)
    for child in children:
        session.execute(delete(child).where(child.plan_key.in_(plans)))
    if kind != "plan":
        session.execute(delete(PlanRow).where(PlanRow.key.in_(plans)))
    session.delete(row)


def drop_statistics(session: Session, created_before: datetime) -> int:
    """See `Store.drop_statistics`."""
    solved = select(PlanRow.key).where(PlanRow.statistics_key == StatisticsRow.key).exists()
    watched = select(DeploymentRow.key).where(DeploymentRow.reference_key == StatisticsRow.key).exists()
    unused = (StatisticsRow.created < created_before, StatisticsRow.name.is_(None), ~solved, ~watched)
    keys = list(session.scalars(select(StatisticsRow.key).where(*unused)))
    session.execute(delete(StatisticsPartRow).where(StatisticsPartRow.statistics_key.in_(keys)))
    session.execute(delete(StatisticsRow).where(StatisticsRow.key.in_(keys)))
    return len(keys)


def _refuse_used(session: Session, kind: Kind, ref: str, row: Any, plans: Any) -> None:
    """What a deployment runs on, or ran on, stays: its history tells of it."""
    uses = {
        "model": [DeploymentRow.model_key == row.key],
        "topology": [DeploymentRow.topology_key == row.key],
        "statistics": [DeploymentRow.reference_key == row.key],
        "plan": [],
    }
    for use in [
        *uses[kind],
        DeploymentRow.plan_key.in_(plans),
        DeploymentRow.key.in_(select(PublicationRow.deployment_key).where(PublicationRow.plan_key.in_(plans))),
        DeploymentRow.key.in_(select(DecisionRow.deployment_key).where(DecisionRow.candidate_key.in_(plans))),
    ]:
        name = session.scalar(select(DeploymentRow.name).where(use).limit(1))
        if name is not None:
            raise InputError(f"{kind} {ref!r} belongs to the history of deployment {name!r}, which is kept")


def describe(session: Session, url: str) -> StoreDescription:
    """See `Store.describe`."""
    tables = list(Base.metadata.tables)
    counted = [name for name in tables if not name.endswith("_parts")]
    counts = select(
        *(
            select(func.count()).select_from(Base.metadata.tables[name]).scalar_subquery().label(name)
            for name in counted
        )
    )
    connection = session.connection()
    backend = connection.dialect.name
    if backend == "sqlite":
        size = text("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()")
    else:
        sizes = " + ".join(f"pg_total_relation_size('{name}')" for name in tables)
        size = text(f"SELECT {sizes}")
    return StoreDescription(
        url=url,
        backend=backend,
        revision=revision(connection) or "",
        counts=dict(session.execute(counts).one()._mapping),
        size_bytes=int(session.execute(size).scalar_one()),
    )


def _count(session: Session, query: Any) -> int:
    return int(session.execute(select(func.count()).select_from(query.subquery())).scalar_one())


def _certificate(stored: dict[str, Any]) -> Certificate:
    """Without the map that a plan's document binds it to."""
    return Certificate(**{name: value for name, value in stored.items() if name != "map"})
