"""Keeping results: recordings as files, and what commands made in the database."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .._lazy import missing_extra
from ..placement.errors import MoeplaceError, StoreError
from .output import os_reason

if TYPE_CHECKING:
    from ..db import Store
    from ..placement.evaluate import Evaluation
    from ..placement.plan import Plan
    from ..placement.statistics import RoutingStatistics
    from ..placement.steps import Steps
    from ..profiler.read import Recording


Kept = TypeVar("Kept")


def save_recording(recording: Recording, out: Path) -> None:
    """Writes a recording as this project's own files: a folder of shards, or a statistics file."""
    from ..profiler.statistics_file import write_statistics
    from ..profiler.trace_files import write_trace

    if recording.is_trace:
        write_trace(recording.trace, out, model=recording.model)
    else:
        write_statistics(recording.statistics(), out)


def check_store(db: str | None, name: str | None = None) -> None:
    """Looks whether a plan could be kept in the database, under a name: before the plan is made.

    Raises:
        StoreError: it could not. InputError: the name is taken, or cannot be one.
    """
    from ..db import Store

    with Store.open(db) as store:
        store.check("plan", name)


def attempted(keep: Callable[[], Kept]) -> tuple[Kept | None, str | None]:
    """What `keep` returns; or why nothing could be kept, for the end, when results are shown."""
    try:
        return keep(), None
    except MoeplaceError as error:
        return None, str(error)
    except OSError as error:
        return None, os_reason(error)
    except ImportError as error:
        # An engine's own environment has no database's libraries.
        reason = missing_extra(error)
        if reason is None:
            raise
        return None, f"{reason}, or leave storing out with --no-store"


def end_unkept(failure: str | None, file: Path | str | None) -> None:
    """Ends a command whose results are shown, but could not be kept.

    Raises:
        StoreError: there is a failure.
    """
    if failure is not None:
        where = f"it is in {file}" if file is not None else "it is only shown"
        raise StoreError(f"the result was not stored, {where}: {failure}")


def end_unwritten(failure: str | None, stored: str | None = None) -> None:
    """Ends a command whose results are shown, but could not be written. stored: id of the plan in the database.

    Raises:
        StoreError: there is a failure.
    """
    if failure is not None:
        where = f"it is stored as {stored}" if stored is not None else "it is only shown"
        raise StoreError(f"the result was not written, {where}: {failure}")


def keep_plan(plan: Plan, statistics: RoutingStatistics, db: str | None, name: str | None = None) -> str:
    """Stores a plan with the statistics it was solved on; returns the plan's id."""
    from ..db import Store

    with Store.open(db) as store:
        counted = store.add_statistics(statistics, statistics_bytes(statistics))
        return store.add_plan(plan, statistics=counted.id, name=name).id


def keep_judged_plans(
    judged: Sequence[tuple[Plan, Mapping[str, Evaluation]]],
    statistics: RoutingStatistics,
    steps: Mapping[str, Steps],
    db: str | None,
) -> list[str]:
    """Stores plans that were solved on the same statistics, each with its evaluations; returns the plans' ids."""
    from ..db import Store

    ids = []
    with Store.open(db) as store:
        counted = store.add_statistics(statistics, statistics_bytes(statistics))
        for plan, evaluations in judged:
            # A plan in force may have been solved on other routing.
            same = plan.provenance.trace_fingerprint == statistics.fingerprint
            record = store.add_plan(plan, statistics=counted.id if same else None)
            _add_evaluations(store, record.id, evaluations, steps)
            ids.append(record.id)
    return ids


def keep_statistics(statistics: RoutingStatistics, db: str | None, name: str | None = None) -> str:
    """Stores statistics; returns their id."""
    from ..db import Store

    with Store.open(db) as store:
        return store.add_statistics(statistics, statistics_bytes(statistics), name=name).id


def keep_evaluations(
    plan: Plan, evaluations: Mapping[str, Evaluation], steps: Mapping[str, Steps], db: str | None
) -> None:
    """Stores what a plan costs on each kind of steps, and the plan where it is not stored yet."""
    from ..db import Store

    with Store.open(db) as store:
        _add_evaluations(store, store.add_plan(plan).id, evaluations, steps)


def _add_evaluations(
    store: Store, plan: str, evaluations: Mapping[str, Evaluation], steps: Mapping[str, Steps]
) -> None:
    for kind, evaluation in evaluations.items():
        store.add_evaluation(
            plan,
            summary=evaluation.summary(),
            steps=f"{kind}, {steps[kind].num_steps} steps",
            steps_fingerprint=steps_fingerprint(steps[kind]),
            objective=evaluation.objective,
        )


def keep_export(plan: Plan, engine: str, path: Path, db: str | None, sha256: str = "") -> None:
    """Notes that a plan was written for an engine, and stores the plan where it is not stored yet."""
    from ..db import Store

    with Store.open(db) as store:
        store.add_export(store.add_plan(plan).id, format=engine, path=path.resolve(), sha256=sha256)


def steps_fingerprint(steps: Steps) -> str:
    """SHA-256 over the routing of the steps and where they end."""
    import hashlib

    import numpy as np

    digest = hashlib.sha256(repr((steps.expert_ids.shape, steps.num_experts, steps.moe_layers)).encode())
    for array in (steps.expert_ids, steps.offsets):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def statistics_bytes(statistics: RoutingStatistics) -> bytes:
    """The statistics as their file."""
    from ..profiler.statistics_file import write_statistics

    file = io.BytesIO()
    write_statistics(statistics, file)
    return file.getvalue()
