"""Plans by name, wherever they are kept, and what commands do on a service instead of on this machine."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..placement.errors import InputError, MoeplaceError, UnsupportedError
from .command_line import refuse_idle
from .options import PlanFileOptions, StudyOptions
from .output import Update
from .parse import SolverChoice, plan_topology
from .routing_split import RoutingSplit

if TYPE_CHECKING:
    from ..db.records import CountWindow, JobRecord
    from ..placement.degraded import Kind
    from ..placement.model import ModelSpec
    from ..placement.plan import Plan
    from ..placement.problem import Problem
    from ..placement.statistics import RoutingStatistics
    from ..placement.topology import Topology
    from ..profiler.read import Recording
    from ..service.client import Client

TOKEN = "MOEPLACE_TOKEN"
SENT_AT_ONCE = 128


@contextmanager
def service(url: str) -> Iterator[Client]:
    """A client of the service, with the environment's token."""
    from ..service.client import Client

    with Client(url, os.environ.get(TOKEN) or None) as client:
        yield client


PLAN_FILES = (".json", ".jsonl", ".pt", ".yaml", ".yml")


def read_plan(
    reference: str,
    db: str | None,
    server: str | None = None,
    *,
    model: ModelSpec | None = None,
    topology: Topology | None = None,
) -> Plan:
    """A plan from a file, or else from the database, or the service where one is named, by name or id.

    model, topology: what an engine's own file is for, which does not say it.

    Raises:
        InputError: none of them has it; both are named. FileFormatError: no plan's file.
    """
    from ..runtime.exporters.export import read_plan_file

    if is_file(reference):
        return read_plan_file(reference, model, topology)
    try:
        if server is not None:
            with service(server) as client:
                return client.plan(reference)
        from ..db import Store

        with Store.open(db) as store:
            return store.plan(reference).plan
    except MoeplaceError as error:
        raise InputError(f"{reference!r} is not a file, and not a stored plan either: {error}") from None


def is_file(reference: str) -> bool:
    """Whether a file is named, not a stored plan."""
    return Path(reference).is_file() or reference.endswith(PLAN_FILES)


def is_engines_own(reference: str) -> bool:
    """Whether the reference is an engine's own file, which does not say its model and cluster.

    Raises:
        FileFormatError: a file that holds no plan.
    """
    from ..runtime.exporters.export import recognised

    return Path(reference).is_file() and recognised(Path(reference)).name != "moeplace"


def check_plan_options(references: Sequence[str], server: str | None = None) -> None:
    """Refuses options that say nothing about these plans.

    server: that is asked for plans that are no files.

    Raises:
        typer.BadParameter: some were given. FileFormatError: a file that holds no plan.
    """
    if not any(is_engines_own(each) for each in references):
        refuse_idle("where plans say their own model and cluster: it is for engines' own files", *PLAN_FILE_OPTIONS)
    if server is not None:
        refuse_idle(f"with the service {server}, which has its own", "db")


PLAN_FILE_OPTIONS = tuple(field.name for field in fields(PlanFileOptions))


def plan_context(options: PlanFileOptions, opened: Callable[[], Recording] | None = None) -> dict[str, Any]:
    """What is known of a plan in an engine's own file, for `read_plan`: model and topology. opened: opens the routing,
    where --plan-model does not say the model."""
    from ..placement.model import ModelSpec

    model = None
    if options.plan_model is not None:
        model = ModelSpec.from_config(options.plan_model)
    elif opened is not None:
        model = opened().model
    topology = None if options.plan_topology is None else plan_topology(options.plan_topology)
    return {"model": model, "topology": topology}


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
    if (
        problem.pinned
        or problem.forbidden
        or problem.tolerates
        or problem.current is not None
        or problem.device_slots is not None
    ):
        raise UnsupportedError(
            "a service solves without a plan in force, pinned devices, failures to survive or slots by device; "
            "solve here"
        )
    with service(url) as client:
        update("sending the routing", None)
        job = client.solve(
            model=client.add_model(problem.model).id,
            topology=client.add_topology(problem.topology).id,
            statistics=send_statistics(client, problem.statistics),
            solver=solver,
            options=options,
            seconds=seconds,
            seed=seed,
            slots=problem.slots,
            objective=problem.objective,
            engine=problem.engine,
            batches=written_batches(problem),
        )

        def tell(news: JobRecord) -> None:
            value, done = news.progress.get("value"), news.progress.get("seconds", 0.0)
            shown = "" if value is None else f" {value:.5g}"
            update(f"job {news.key} on {url}: {news.state}{shown}", min(1.0, done / seconds))

        result = client.wait(job, progress=tell).result
        assert result is not None
        plan = client.plan(result["plan"])
        if name is not None:
            client.add_plan(plan, name)
        return plan, str(result["plan"])


@dataclass(frozen=True)
class Study:
    """What a what-if or a front is judged on, and who solves for it."""

    split: RoutingSplit
    options: StudyOptions
    choice: SolverChoice

    def request(self, client: Client, problem: Problem) -> dict[str, Any]:
        """Sends the routing, in the part that solvers see and the part that is replayed; what a `StudyRequest` has."""
        from ..placement.statistics import RoutingStatistics

        assert self.choice.solver is not None
        judged = RoutingStatistics.from_trace(self.split.judged, sample_tokens=self.split.judged.num_tokens)
        return {
            "statistics": send_statistics(client, problem.statistics),
            "held_out": send_statistics(client, judged),
            "steps": {"batches": written_batches(problem), "count": self.options.steps},
            "solver": self.choice.solver,
            "options": self.choice.options,
            "seconds": self.options.seconds,
            "seed": self.options.seed,
            "objective": problem.objective,
            "engine": problem.engine,
        }


def written_batches(problem: Problem) -> list[dict[str, Any]]:
    """The problem's batches as a service takes them."""
    return [asdict(batch) for batch in problem.batches]


def what_if_remotely(
    url: str,
    plan: Plan,
    problem: Problem,
    study: Study,
    asked: Mapping[str, Any],
    ready: bool,
    max_moved: float | None,
    update: Update,
) -> dict[str, Any]:
    """Has a service look at the changes; returns its answer. asked: as `parse_changes` takes it."""
    with service(url) as client:
        update("sending the routing", None)
        other = None if asked["topology"] is None else client.add_topology(asked["topology"]).id
        request = study.request(client, problem)
        job = client.what_if(
            plan=client.add_plan(plan).id,
            changes={**asked, "topology": other},
            ready=ready,
            max_moved_bytes=max_moved,
            **request,
        )
        return _answer(client, job, url, update)


def sweep_remotely(
    url: str,
    problem: Problem,
    study: Study,
    current: Plan | None,
    redundant: Sequence[int] | None,
    tolerate: Sequence[Kind | None],
    max_moved: Sequence[float | None] | None,
    update: Update,
) -> dict[str, Any]:
    """Has a service sweep the front; returns its answer."""
    with service(url) as client:
        update("sending the routing", None)
        request = study.request(client, problem)
        job = client.pareto(
            model=client.add_model(problem.model).id,
            topology=client.add_topology(problem.topology).id,
            current=None if current is None else client.add_plan(current).id,
            redundant=redundant,
            tolerate=tolerate,
            max_moved=max_moved,
            **request,
        )
        return _answer(client, job, url, update)


def send_statistics(client: Client, statistics: RoutingStatistics) -> str:
    """Keeps statistics on the service; returns their id."""
    from ..profiler.statistics_file import write_statistics

    file = io.BytesIO()
    write_statistics(statistics, file)
    return client.upload_statistics(file)


def send_record(url: str, recording: Recording, statistics: RoutingStatistics, deployment: str | None) -> str:
    """Sends a recording to a service; returns what it is there. Sent again, it is not stored again.

    A deployment gets a trace as shards, and counts as windows, which end a second after one another, the last when the
    record was written. Without a deployment the service keeps the statistics.
    """
    import numpy as np

    from ..profiler.trace_files import ROWS_PER_SHARD, write_trace

    with service(url) as client:
        if deployment is None:
            return f"statistics {send_statistics(client, statistics)}"
        if recording.is_trace:
            tokens = np.arange(recording.trace.num_tokens)
            shards = [tokens[start : start + ROWS_PER_SHARD] for start in range(0, len(tokens), ROWS_PER_SHARD)]
            for shard in shards:
                file = io.BytesIO()
                write_trace(recording.trace.select(shard), file, model=recording.model)
                client.upload_trace(deployment, file)
            return f"{len(shards)} trace shard{'s' if len(shards) > 1 else ''} to {deployment!r}"
        windows = windows_of(statistics, recording.path)
        new = 0
        for first in range(0, len(windows), SENT_AT_ONCE):
            new += client.push_windows(deployment, windows[first : first + SENT_AT_ONCE]).new
        return f"{len(windows)} windows to {deployment!r}, {new} of them new"


def windows_of(statistics: RoutingStatistics, path: Path) -> list[CountWindow]:
    """The windows of a record of counts.

    Raises:
        InputError: counts that are no whole numbers.
    """
    import numpy as np

    from ..db.records import CountWindow

    whole = np.rint(statistics.load)
    if not np.array_equal(whole, statistics.load):
        raise InputError(f"{path} holds fractions of tokens; a service takes whole counts")
    newest = max(file.stat().st_mtime for file in [path, *(path.rglob("*") if path.is_dir() else [])])
    last = datetime.fromtimestamp(int(newest), UTC)
    count = len(whole)
    return [
        CountWindow(
            last - timedelta(seconds=count - 1 - i),
            window.astype(np.int64),
            statistics.workloads[int(statistics.window_workload[i])],
            statistics.fingerprint[:12],
        )
        for i, window in enumerate(whole)
    ]


def _answer(client: Client, job: JobRecord, url: str, update: Update) -> dict[str, Any]:
    def tell(news: JobRecord) -> None:
        update(f"job {news.key} on {url}: {news.progress.get('message') or news.state}", None)

    result = client.wait(job, progress=tell).result
    assert result is not None
    return dict(result)
