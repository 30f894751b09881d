"""What commands do on a service instead of on this machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..placement.errors import UnsupportedError
from .progress import Update

if TYPE_CHECKING:
    from ..db.service_records import JobRecord
    from ..placement.plan import Plan
    from ..placement.problem import Problem
    from ..service.client import Client

TOKEN = "MOEPLACE_TOKEN"


@contextmanager
def service(url: str) -> Iterator[Client]:
    """A client of the service, with the environment's token."""
    from ..service.client import Client

    with Client(url, os.environ.get(TOKEN) or None) as client:
        yield client


def solve_remotely(
    url: str,
    problem: Problem,
    solver: str,
    seconds: float,
    seed: int,
    options: dict[str, Any],
    name: str | None,
    update: Update,
) -> tuple[Plan, str]:
    """Has a service solve the problem; returns the plan and its id there.

    Raises:
        UnsupportedError: the problem has constraints that the service is not told of.
    """
    from ..profiler.statistics_file import write_statistics

    if problem.pinned or problem.forbidden or problem.current is not None or problem.device_slots is not None:
        raise UnsupportedError(
            "a service solves without a plan in force, pinned devices or slots by device; solve here"
        )
    with service(url) as client, tempfile.TemporaryDirectory() as folder:
        update("sending the routing", None)
        path = Path(folder) / "statistics.npz"
        write_statistics(problem.statistics, path)
        job = client.solve(
            model=client.add_model(problem.model).id,
            topology=client.add_topology(problem.topology).id,
            statistics=client.upload_statistics(path),
            solver=solver,
            options=options,
            seconds=seconds,
            seed=seed,
            slots=problem.slots,
            objective=problem.objective,
        )

        def tell(found: JobRecord) -> None:
            value, done = found.progress.get("value"), found.progress.get("seconds", 0.0)
            shown = "" if value is None else f" {value:.5g}"
            update(f"job {found.key} on {url}: {found.state}{shown}", min(1.0, done / seconds))

        result = client.wait(job, progress=tell).result
        assert result is not None
        plan = client.plan(result["plan"])
        if name is not None:
            client.add_plan(plan, name)
        return plan, str(result["plan"])
