"""From rows to the frozen records callers get."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, Select, select

from ..placement.errors import StoreError
from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.plan import Certificate, Provenance
from ..placement.plan_file import plan_from_dict
from ..placement.topology import Topology
from .content import ID_DIGITS, plan_fingerprint
from .records import (
    EvaluationRecord,
    ExportRecord,
    ModelRecord,
    PlanRecord,
    PlanSummary,
    StatisticsRecord,
    TopologyRecord,
)
from .schema import EvaluationRow, ExportRow, ModelRow, Named, PlanRow, StatisticsRow, TopologyRow


def model_record(row: ModelRow) -> ModelRecord:
    return ModelRecord(**_named(row), spec=ModelSpec(**row.spec))


def topology_record(row: TopologyRow) -> TopologyRecord:
    return TopologyRecord(**_named(row), topology=Topology(**row.topology))


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


def plan_summary(found: Row[*tuple[Any, ...]]) -> PlanSummary:
    """The summary in a row of `select_plans`."""
    return PlanSummary(**_summary(found))


def plan_record(found: Row[*tuple[Any, ...]], document: dict[str, Any], origin: str) -> PlanRecord:
    """The plan in a row of `select_plans` and its document.

    Raises:
        StoreError: the document is not the one that was stored. FileFormatError: of a newer version.
    """
    row: PlanRow = found[0]
    if plan_fingerprint(document) != row.fingerprint:
        raise StoreError(f"{origin}: its content was changed or damaged after it was stored; restore a copy")
    return PlanRecord(**_summary(found), plan=plan_from_dict(document, origin=origin))


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


def _summary(found: Row[*tuple[Any, ...]]) -> dict[str, Any]:
    row: PlanRow = found[0]
    model, topology = found.model_fingerprint[:ID_DIGITS], found.topology_fingerprint[:ID_DIGITS]
    return {
        **_named(row),
        "model_id": model,
        "model": found.model_name or found.model_label or model,
        "topology_id": topology,
        "topology": found.topology_name or found.topology_label or topology,
        "statistics_id": found.statistics_fingerprint and found.statistics_fingerprint[:ID_DIGITS],
        "layers": found.layers,
        "experts": found.experts,
        "devices": found.devices,
        "slots": row.slots,
        "certificate": None if row.certificate is None else Certificate(**row.certificate),
        "provenance": Provenance(**row.provenance),
    }
