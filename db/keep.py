"""Adding rows: each is kept once, by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from ..placement.errors import InputError
from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.plan import Plan, plan_to_dict
from ..placement.statistics import RoutingStatistics
from ..placement.topology import Topology
from .content import (
    ID_DIGITS,
    fingerprint,
    plain,
    plan_fingerprint,
    sha256_digits,
    statistics_about,
    statistics_fingerprint,
    storable,
)
from .references import claim_name, find
from .schema import EvaluationRow, ExportRow, ModelRow, PlanRow, StatisticsPartRow, StatisticsRow, TopologyRow

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


def keep_plan(session: Session, plan: Plan, statistics: str | None, name: str | None) -> PlanRow:
    """See `Store.add_plan`."""
    document = plain("plan", plan_to_dict(plan))
    made = {key: value for key, value in document["provenance"].items() if key != "history"}

    def build() -> PlanRow:
        return PlanRow(
            model_key=keep_model(session, plan.model).key,
            topology_key=keep_topology(session, plan.topology).key,
            solver=storable("plan solver", plan.provenance.solver, 100),
            slots=plan.num_slots,
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
