"""Content as plain data, and its fingerprint: what makes two stored things the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from sqlalchemy import Row, Select, select

from ..placement.errors import InputError, StoreError
from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.plan import Certificate, Plan, Provenance, plan_from_dict, plan_to_dict
from ..placement.statistics import RoutingStatistics
from ..placement.topology import Topology
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

ID_DIGITS = 12


def plain(what: str, data: Any) -> Any:
    """`data` as it comes back from JSON, so that it has the same fingerprint before and after storing.

    Raises:
        InputError: not plain data, or holds NaN or an infinity.
    """
    try:
        return json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{what} cannot be stored: {error}; expected finite numbers, text, lists and mappings"
        ) from None


def fingerprint(data: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plan_fingerprint(document: dict[str, Any]) -> str:
    """What makes two plans the same: all but how long the solver took, so that solving again adds no second plan."""
    made = {key: value for key, value in document["provenance"].items() if key not in ("seconds", "history")}
    return fingerprint({**document, "provenance": made})


def id_of_plan(plan: Plan) -> str:
    """The id a plan has where it is stored, before it is."""
    return plan_fingerprint(plain("plan", plan_to_dict(plan)))[:ID_DIGITS]


def statistics_fingerprint(statistics: RoutingStatistics) -> str:
    """What makes two statistics the same: the counts and the sample, not the bytes of the file they are in."""
    sample = statistics.sample.fingerprint if statistics.sample is not None else ""
    digest = hashlib.sha256(repr((statistics_about(statistics), statistics.fingerprint, sample)).encode())
    for array in (statistics.load, statistics.window_workload, statistics.coactivation, statistics.transitions):
        if array is not None:
            digest.update(repr((array.dtype.str, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def statistics_about(statistics: RoutingStatistics) -> dict[str, Any]:
    """The figures of `StatisticsRecord` by name."""
    return {
        "experts": int(statistics.experts),
        "moe_layers": [int(layer) for layer in statistics.moe_layers],
        "top_k": None if statistics.top_k is None else int(statistics.top_k),
        "workloads": list(statistics.workloads),
        "windows": len(statistics.load),
        "tokens": int(statistics.tokens),
        "has_coactivation": statistics.coactivation is not None,
        "has_transitions": statistics.transitions is not None,
        "sample_tokens": 0 if statistics.sample is None else statistics.sample.num_tokens,
    }


def storable(what: str, text: str, limit: int | None = None) -> str:
    """`text` when every backend can keep it.

    Raises:
        InputError: longer than `limit`, or holds a zero byte or half a surrogate pair.
    """
    if limit is not None and len(text) > limit:
        raise InputError(f"{what} has {len(text)} characters, at most {limit} are stored")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} ({text!r}) is not valid Unicode text") from None
    if "\0" in text:
        raise InputError(f"{what} ({text!r}) holds a zero byte")
    return text


def sha256_digits(what: str, text: str) -> str:
    """`text` when it is empty or a SHA-256 in hexadecimal.

    Raises:
        InputError: it is neither.
    """
    if text and (len(text) != 64 or set(text) - set("0123456789abcdef")):
        raise InputError(f"{what} ({text!r}) must be 64 hexadecimal digits (a SHA-256), or empty")
    return text


# From rows to the frozen records callers get.


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
