"""A typed client of the service: what it takes and gives are the library's own objects."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypeVar
from urllib.parse import quote, urlencode

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError
from urllib3 import Retry

from .._arguments import check_fields, check_methods
from .._http import Answer, Connections, UnansweredError, check_address
from ..db.jobs import ENDED
from ..db.records import (
    Actor,
    AuditRecord,
    CheckRecord,
    CountWindow,
    DecisionRecord,
    DeliveryRecord,
    DeploymentRecord,
    EngineRecord,
    JobRecord,
    ModelRecord,
    PublicationRecord,
    StatisticsRecord,
    UploadRecord,
    WebhookRecord,
)
from ..db.uploads import PIECE_LIMIT
from ..placement.errors import ConflictError, InputError, MoeplaceError, NotFoundError, SolveError, StoreError
from ..placement.model import ModelSpec
from ..placement.plan import Plan, plan_from_dict, plan_to_dict
from ..placement.topology import Topology
from ..placement.validation import check_range, describe
from .counts import ARROW, to_arrow
from .policy import Policy
from .schemas import (
    DecideRequest,
    JobBody,
    ParetoRequest,
    PlanView,
    SolveRequest,
    Taken,
    TopologyView,
    WebhookMade,
    WhatIfRequest,
    WindowView,
)

ERRORS: Mapping[int, type[MoeplaceError]] = {404: NotFoundError, 409: ConflictError, 422: InputError, 503: StoreError}
MOST_WAIT = 20
"""Seconds between two attempts."""
RETRIES = Retry(
    4,
    allowed_methods=None,
    status_forcelist=(429, 500, 502, 503, 504),
    raise_on_status=False,
    backoff_factor=0.4,
    backoff_jitter=0.4,
    backoff_max=MOST_WAIT,
    retry_after_max=MOST_WAIT,
)


class Transport:
    """One service: its address, the token, and how what it answers becomes an error. Threads: any number."""

    def __init__(self, url: str, token: str | None, timeout: float) -> None:
        parts = check_address(url)
        if parts.scheme == "http" and token and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            # Said once, here: a token sent in the clear is anybody's.
            warnings.warn(f"the token goes to {parts.hostname} unencrypted; use https", stacklevel=3)
        self._root, self._netloc = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", parts.netloc
        self._token, self._timeout = token, timeout
        self._connections = Connections(RETRIES)

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        again: bool = False,
        timeout: float | None = None,
    ) -> Answer:
        """One request. again: it may be sent several times, when the service is away or busy.

        Raises:
            NotFoundError, ConflictError, InputError, StoreError: as the service says. MoeplaceError: any other refusal,
                or the service cannot be reached.
        """
        try:
            answer = self._connections.request(
                method,
                self._root + path,
                body,
                self._headers(headers or {}),
                timeout=timeout or self._timeout,
                again=again,
            )
        except UnansweredError as error:
            raise self._unreachable(error) from None
        if answer.status >= 300 and answer.status != 304:
            raise _error(answer.status, answer.body)
        return answer

    @contextmanager
    def lines(self, path: str) -> Iterator[Iterator[bytes]]:
        """An answer line by line, while it comes."""
        try:
            with self._connections.stream(self._root + path, self._headers({}), idle=self._timeout) as stream:
                if stream.status != 200:
                    raise _error(stream.status, stream.read())
                yield iter(stream)
        except UnansweredError as error:
            raise self._unreachable(error) from None

    def close(self) -> None:
        """Closes connections."""
        self._connections.close()

    def _unreachable(self, error: UnansweredError) -> MoeplaceError:
        return MoeplaceError(f"the service at {self._netloc} cannot be reached ({error})")

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        own = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return {"Accept": "application/json", **own, **headers}


def _error(status: int, body: bytes) -> MoeplaceError:
    try:
        detail = str(json.loads(body)["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        detail = f"the service answered {status}"
    return ERRORS.get(status, MoeplaceError)(detail)


T = TypeVar("T")
ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


@dataclass(frozen=True)
class PlanFile:
    """A plan in force as its engine reads it. etag: give it to be told only of another one."""

    version: int
    etag: str
    content: bytes


@check_methods
@check_fields
class Client:
    """Speaks to a service at `url`. Threads: any number.

    token: made by `moeplace tokens add`. timeout: seconds an answer may take.

    Every method raises NotFoundError, ConflictError, InputError or StoreError as the service says, and MoeplaceError
    when it cannot be reached. What can be sent twice without harm is sent again when the service is away for a moment.
    """

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 60.0) -> None:
        check_range("timeout", timeout, 1e-3, 1e6)
        self._transport = Transport(url, token, timeout)
        self._timeout = timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._transport.close()

    def add_model(self, spec: ModelSpec, name: str | None = None) -> ModelRecord:
        """Keeps a model."""
        body = {"spec": spec.model_dump(mode="json"), "name": name}
        return self._ask(ModelRecord, "POST", "/v1/models", body, again=True)

    def add_topology(self, topology: Topology, name: str | None = None) -> TopologyView:
        """Keeps a cluster."""
        body = {"topology": topology.model_dump(mode="json"), "name": name}
        answer = self._json("POST", "/v1/topologies", body, again=True)
        return TopologyView(**{field: answer[field] for field in TopologyView.model_fields})

    def models(self) -> Iterator[ModelRecord]:
        """Newest first."""
        return self._pages(ModelRecord, "/v1/models")

    def topologies(self) -> Iterator[TopologyView]:
        """Newest first, without their devices."""
        return self._pages(TopologyView, "/v1/topologies")

    def topology(self, ref: str) -> Topology:
        """A stored cluster, by name or id."""
        return Topology(**self._json("GET", f"/v1/topologies/{quote(ref, safe='')}")["topology"])

    def statistics(self) -> Iterator[StatisticsRecord]:
        """Newest first."""
        return self._pages(StatisticsRecord, "/v1/statistics")

    def add_deployment(
        self, name: str, model: str, topology: str, policy: Policy | Mapping[str, Any] | None = None
    ) -> DeploymentRecord:
        """A model on a topology, both by name or id, to be kept under watch."""
        document = policy if isinstance(policy, Policy) else Policy(**(policy or {}))
        body = {"name": name, "model": model, "topology": topology, "policy": document.as_document()}
        return self._ask(DeploymentRecord, "POST", "/v1/deployments", body, again=True)

    def deployment(self, name: str) -> DeploymentRecord:
        """One deployment."""
        return self._ask(DeploymentRecord, "GET", _deployment(name))

    def deployments(self) -> Iterator[DeploymentRecord]:
        """All, in order of their names."""
        return self._pages(DeploymentRecord, "/v1/deployments", cursor="after")

    def set_policy(self, name: str, policy: Policy) -> DeploymentRecord:
        """Replaces a deployment's policy."""
        return self._ask(DeploymentRecord, "PUT", _deployment(name, "policy"), policy.as_document())

    def push(
        self,
        deployment: str,
        load: npt.ArrayLike,
        *,
        ended: datetime | None = None,
        workload: str = "",
        source: str = "",
    ) -> Taken:
        """Sends one count window: tokens each expert got, [L, E]. ended: when its span of traffic did, default now.

        Stored once, also when the answer is lost and it is sent again.
        """
        counts = np.asarray(load)
        if not np.issubdtype(counts.dtype, np.integer):
            raise InputError(f"load holds {counts.dtype}; whole numbers of tokens are wanted")
        return self.push_windows(deployment, [CountWindow(ended or datetime.now(UTC), counts, workload, source)])

    def push_windows(self, deployment: str, windows: Sequence[CountWindow]) -> Taken:
        """Sends up to 512 count windows."""
        path, headers = _deployment(deployment, "windows"), {"Content-Type": ARROW}
        answer = self._transport.call("POST", path, to_arrow(windows), headers, again=True)
        return Taken(**answer.json())

    def release(self, name: str) -> DeploymentRecord:
        """Lets automatic publication go on after a roll-back."""
        return self._ask(DeploymentRecord, "POST", _deployment(name, "release"), again=True)

    def remove_deployment(self, name: str) -> None:
        """Ends it, with its windows, checks, decisions, publications, jobs, webhooks, engine and traces; plans stay."""
        self._transport.call("DELETE", _deployment(name))

    def remove_windows(self, deployment: str, *, ended_before: datetime | None = None) -> int:
        """Removes count windows, those that ended before a moment or all; returns how many."""
        query = "" if ended_before is None else "?" + urlencode({"ended_before": ended_before.isoformat()})
        return int(self._json("DELETE", _deployment(deployment, "windows") + query)["removed"])

    def remove(self, kind: Literal["model", "topology", "statistics", "plan"], ref: str) -> None:
        """Removes what is stored under a name or id, where nothing refers to it."""
        lists = {"model": "models", "topology": "topologies", "statistics": "statistics", "plan": "plans"}
        self._transport.call("DELETE", f"/v1/{lists[kind]}/{quote(ref, safe='')}")

    def remove_job(self, key: int) -> None:
        """Removes a job that has ended; its plans stay."""
        self._transport.call("DELETE", f"/v1/jobs/{key}")

    def windows(self, deployment: str) -> Iterator[WindowView]:
        """Newest first, with their loads."""
        return self._pages(WindowView, _deployment(deployment, "windows"), limit=64)

    def totals(self, deployment: str) -> tuple[int, int]:
        """(windows kept, token-expert pairs they count)."""
        record = self._json("GET", _deployment(deployment, "windows/totals"))
        return record["windows"], record["pairs"]

    def upload_trace(self, deployment: str, path: str | Path | BinaryIO) -> UploadRecord:
        """Sends a Parquet shard of routing, from a path or a binary file; goes on where an earlier attempt stopped."""
        return self._upload({"kind": "trace", "deployment": deployment}, _content(path))

    def upload_statistics(self, path: str | Path | BinaryIO) -> str:
        """Sends a statistics file, from a path or a binary file; returns the statistics' id."""
        done = self._upload({"kind": "statistics"}, _content(path))
        return str((done.about or {})["statistics"])

    def solve(self, deployment: str | None = None, **request: Any) -> JobRecord:
        """Asks for a solve; request: what a `SolveRequest` has. `wait` gives its end."""
        return self._submit("/v1/solve", SolveRequest, {"deployment": deployment, **request})

    def decide(self, deployment: str, candidate: str, **request: Any) -> JobRecord:
        """Asks whether a stored plan is worth applying; request: what a `DecideRequest` has."""
        return self._submit("/v1/decide", DecideRequest, {"deployment": deployment, "candidate": candidate, **request})

    def what_if(self, deployment: str | None = None, **request: Any) -> JobRecord:
        """Asks what failures or another cluster do to a plan; request: what a `WhatIfRequest` has. The result has a row
        a change."""
        return self._submit("/v1/what-if", WhatIfRequest, {"deployment": deployment, **request})

    def pareto(self, deployment: str | None = None, **request: Any) -> JobRecord:
        """Asks for the front of step time against its price; request: what a `ParetoRequest` has. The result has a row
        a point."""
        return self._submit("/v1/pareto", ParetoRequest, {"deployment": deployment, **request})

    def job(self, key: int) -> JobRecord:
        """How far a job is."""
        return self._ask(JobRecord, "GET", f"/v1/jobs/{key}")

    def jobs(self, **filters: Any) -> Iterator[JobRecord]:
        """Newest first. filters: deployment, state, kind."""
        return self._pages(JobRecord, "/v1/jobs", filters)

    def cancel(self, key: int) -> JobRecord:
        """Ends a job."""
        return self._ask(JobRecord, "POST", f"/v1/jobs/{key}/cancel", again=True)

    def events(self, key: int) -> Iterator[JobRecord]:
        """A job as it changes, until it ends."""
        with self._transport.lines(f"/v1/jobs/{key}/events") as lines:
            for line in lines:
                if line.startswith(b"data: "):
                    yield adapter(JobRecord).validate_json(line[6:])

    def wait(
        self, job: JobRecord | int, *, timeout: float = 3600.0, progress: Callable[[JobRecord], None] | None = None
    ) -> JobRecord:
        """The job once it is done. progress: called with it whenever it changed.

        Raises:
            SolveError: it failed, was cancelled, or did not end in time.
        """
        key = job if isinstance(job, int) else job.key
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                for record in self.events(key):
                    if progress is not None:
                        progress(record)
                    if record.state in ENDED or time.monotonic() > deadline:
                        break
            except (OSError, ValueError):
                pass
            except MoeplaceError as error:
                if isinstance(error, InputError):
                    raise
            record = self.job(key)
            if record.state == "done":
                return record
            if record.state in ENDED:
                raise SolveError(f"job {key} {record.state}: {record.error or 'by request'}")
            time.sleep(0.2)
        raise SolveError(f"job {key} did not end within {timeout:g} s; it goes on")

    def add_plan(self, plan: Plan, name: str | None = None) -> PlanView:
        """Keeps a plan made elsewhere."""
        body = {"document": plan_to_dict(plan), "name": name}
        return self._ask(PlanView, "POST", "/v1/plans", body, again=True)

    def add_plan_file(
        self,
        path: str | Path,
        *,
        model: str | None = None,
        topology: str | None = None,
        deployment: str | None = None,
        name: str | None = None,
    ) -> PlanView:
        """Keeps the plan in an engine's own file. Of a stored model on a stored topology, or a deployment's."""
        names = {"model": model, "topology": topology, "deployment": deployment, "name": name}
        query = urlencode({key: value for key, value in names.items() if value is not None})
        content = Path(path).read_bytes()
        headers = {"Content-Type": "application/octet-stream"}
        answer = self._transport.call("POST", f"/v1/plans/file?{query}", content, headers, again=True)
        return PlanView.model_validate(answer.json())

    def plan(self, ref: str) -> Plan:
        """A stored plan, by name or id."""
        record = self._json("GET", f"/v1/plans/{quote(ref, safe='')}")
        return plan_from_dict(record["document"], f"plan {ref!r}")

    def plans(self, **filters: Any) -> Iterator[PlanView]:
        """Newest first, without their tables. filters: model, solver."""
        return self._pages(PlanView, "/v1/plans", filters)

    def export(self, ref: str, engine: str = "moeplace") -> bytes:
        """A stored plan as the file an engine reads."""
        return self._transport.call("GET", f"/v1/plans/{quote(ref, safe='')}/export?format={engine}", again=True).body

    def plan_in_force(
        self, deployment: str, engine: str = "moeplace", *, etag: str = "", wait: float = 0.0
    ) -> PlanFile | None:
        """The plan in force as an engine reads it; None while it is the one `etag` names, for which `wait` seconds are
        waited."""
        path = f"{_deployment(deployment, 'plan')}?{urlencode({'format': engine, 'wait': wait})}"
        headers = {"If-None-Match": etag} if etag else {}
        answer = self._transport.call("GET", path, headers=headers, again=True, timeout=self._timeout + wait)
        if answer.status == 304:
            return None
        return PlanFile(int(answer.headers["x-moeplace-version"]), answer.headers["etag"], answer.body)

    def publish(self, deployment: str, plan: str, comment: str = "") -> PublicationRecord:
        """Puts a stored plan in force."""
        body = {"plan": plan, "comment": comment}
        return self._ask(PublicationRecord, "PUT", _deployment(deployment, "plan"), body)

    def rollback(self, deployment: str, version: int, comment: str = "") -> PublicationRecord:
        """Puts an earlier version's plan in force again."""
        body = {"version": version, "comment": comment}
        return self._ask(PublicationRecord, "POST", _deployment(deployment, "rollback"), body)

    def publications(self, deployment: str) -> Iterator[PublicationRecord]:
        """Every plan that was in force, newest first."""
        return self._pages(PublicationRecord, _deployment(deployment, "publications"))

    def checks(self, deployment: str) -> Iterator[CheckRecord]:
        """Drift checks, newest first."""
        return self._pages(CheckRecord, _deployment(deployment, "checks"))

    def decisions(self, deployment: str | None = None, state: str | None = None) -> Iterator[DecisionRecord]:
        """Newest first."""
        return self._pages(DecisionRecord, "/v1/decisions", {"deployment": deployment, "state": state})

    def decision(self, key: int) -> DecisionRecord:
        """One decision, with its figures."""
        return self._ask(DecisionRecord, "GET", f"/v1/decisions/{key}")

    def approve(self, decision: int, comment: str = "") -> DecisionRecord:
        """Puts a waiting decision's plan in force."""
        return self._ask(DecisionRecord, "POST", f"/v1/decisions/{decision}/approve", {"comment": comment}, again=True)

    def reject(self, decision: int, comment: str = "") -> DecisionRecord:
        """Keeps the plan in force."""
        return self._ask(DecisionRecord, "POST", f"/v1/decisions/{decision}/reject", {"comment": comment}, again=True)

    def add_webhook(self, deployment: str, url: str, *, events: Sequence[str] | None = None) -> WebhookMade:
        """Has events sent to an address, signed with the secret that is told here only. events: kinds; None for all."""
        body = {"url": url, "events": None if events is None else list(events)}
        return self._ask(WebhookMade, "POST", _deployment(deployment, "webhooks"), body)

    def rotate_webhook(self, deployment: str, key: int) -> WebhookMade:
        """A new secret; the former one signs beside it for 24 hours."""
        return self._ask(WebhookMade, "POST", _deployment(deployment, f"webhooks/{key}/rotate"))

    def test_webhook(self, deployment: str, key: int) -> DeliveryRecord:
        """Has an event sent that tells of nothing."""
        return self._ask(DeliveryRecord, "POST", _deployment(deployment, f"webhooks/{key}/test"))

    def deliveries(self, deployment: str, key: int) -> Iterator[DeliveryRecord]:
        """Events of a webhook, newest first, and what came of sending them."""
        return self._pages(DeliveryRecord, _deployment(deployment, f"webhooks/{key}/deliveries"))

    def redeliver(self, deployment: str, key: int, delivery: int) -> DeliveryRecord:
        """Has an event sent again, with the same id."""
        return self._ask(DeliveryRecord, "POST", _deployment(deployment, f"webhooks/{key}/deliveries/{delivery}"))

    def webhooks(self, deployment: str) -> list[WebhookRecord]:
        """Without their secrets."""
        return self._ask(list[WebhookRecord], "GET", _deployment(deployment, "webhooks"))

    def remove_webhook(self, deployment: str, key: int) -> None:
        """Ends a webhook."""
        self._transport.call("DELETE", _deployment(deployment, f"webhooks/{key}"))

    def set_engine(
        self,
        deployment: str,
        url: str,
        *,
        recorder: str = "default",
        every: float = 60.0,
        span: float = 10.0,
        key: str | None = None,
    ) -> EngineRecord:
        """Has the deployment's engine, an SGLang, asked for its routing; see `PUT /v1/deployments/{name}/engine`."""
        body = {"url": url, "recorder": recorder, "every": every, "span": span, "key": key}
        return self._ask(EngineRecord, "PUT", _deployment(deployment, "engine"), body)

    def engine(self, deployment: str) -> EngineRecord:
        """The engine that is asked, and what came of it."""
        return self._ask(EngineRecord, "GET", _deployment(deployment, "engine"))

    def remove_engine(self, deployment: str) -> None:
        """Asks it no more."""
        self._transport.call("DELETE", _deployment(deployment, "engine"))

    def whoami(self) -> Actor:
        """Name and role of the token."""
        return self._ask(Actor, "GET", "/v1/whoami")

    def audit(self, **filters: Any) -> Iterator[AuditRecord]:
        """Who did what, newest first. filters: action, subject."""
        return self._pages(AuditRecord, "/v1/audit", filters)

    def _submit(self, path: str, kind: type[JobBody], request: Mapping[str, Any]) -> JobRecord:
        try:
            body = kind.model_validate({key: value for key, value in request.items() if value is not None})
        except ValidationError as error:
            raise InputError(describe(kind.__name__, error)) from None
        # A key of its own makes sending it again safe.
        headers = {"Idempotency-Key": secrets.token_hex(16), "Content-Type": "application/json"}
        content = body.model_dump_json(exclude_unset=True).encode()
        answer = self._transport.call("POST", path, content, headers, again=True)
        record: JobRecord = adapter(JobRecord).validate_json(answer.body)
        return record

    def _upload(self, announced: Mapping[str, Any], content: bytes) -> UploadRecord:
        body = {**announced, "sha256": hashlib.sha256(content).hexdigest(), "total_bytes": len(content)}
        record = self._ask(UploadRecord, "POST", "/v1/uploads", body, again=True)
        while record.state == "open" and record.received_bytes < len(content):
            start = record.received_bytes
            headers = {"Content-Type": "application/octet-stream", "Upload-Offset": str(start)}
            piece = content[start : start + PIECE_LIMIT]
            try:
                self._transport.call("PATCH", f"/v1/uploads/{record.key}", piece, headers)
            except InputError:
                raise
            except MoeplaceError:
                # Perhaps it arrived, perhaps the service is away: ask how far it is.
                time.sleep(0.5)
            record = self._ask(UploadRecord, "GET", f"/v1/uploads/{record.key}")
        return self._ask(UploadRecord, "POST", f"/v1/uploads/{record.key}/finish", again=True)

    def _pages(
        self,
        kind: type[T],
        path: str,
        filters: Mapping[str, Any] | None = None,
        cursor: str = "before",
        limit: int = 200,
    ) -> Iterator[T]:
        query = {key: value for key, value in (filters or {}).items() if value is not None}
        while True:
            page = self._json("GET", f"{path}?{urlencode({**query, 'limit': limit})}")
            for item in page["items"]:
                yield adapter(kind).validate_python(item)
            if page["next"] is None:
                return
            query[cursor] = page["next"]

    def _ask(self, kind: type[T], method: str, path: str, body: Any = None, *, again: bool = False) -> T:
        record: T = adapter(kind).validate_python(self._json(method, path, body, again=again))
        return record

    def _json(self, method: str, path: str, body: Any = None, *, again: bool = False) -> Any:
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        return self._transport.call(method, path, content, headers, again=again or method == "GET").json()


def _content(file: str | Path | BinaryIO) -> bytes:
    if isinstance(file, str | Path):
        return Path(file).read_bytes()
    file.seek(0)
    return file.read()


def _deployment(name: str, what: str = "") -> str:
    return f"/v1/deployments/{quote(name, safe='')}" + (f"/{what}" if what else "")


def adapter(kind: Any) -> TypeAdapter[Any]:
    """Reads a kind of record from plain data."""
    if kind not in ADAPTERS:
        ADAPTERS[kind] = TypeAdapter(kind)
    return ADAPTERS[kind]
