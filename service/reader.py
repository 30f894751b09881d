"""A process of bounded memory that reads what clients send: little on the wire may be much in memory, and whoever reads
it holds the interpreter meanwhile.

    python -m moeplace.service.reader MOST_BYTES [TRACES]

The database is named by MOEPLACE_DB. Requests come on standard input, answers go to standard output, one after the
other, each a frame: a document and a body. It ends with its standard input.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
from pydantic import ValidationError

from ..db.records import Actor, CountWindow
from ..db.references import ID_DIGITS, statistics_fingerprint
from ..db.store import Store
from ..db.windows import TEXT_LENGTH, check_shape
from ..placement.errors import FileFormatError, InputError, MoeplaceError
from ..placement.memory import bound_memory
from ..placement.plan import Plan, plan_from_dict
from ..placement.topology import Topology
from .counts import JSON, MOST_WINDOWS, read_windows
from .schemas import MOST_DEVICES, PlanIn, PlanView, TopologyFull, TopologyIn, fields_of
from .settings import configure
from .shards import Shards

log = logging.getLogger("moeplace.service.reader")

HEAD = struct.Struct(">IQ")
"""Bytes of a frame's document, and of its body."""
MOST_DOCUMENT = 1 << 28
ROUNDING = 1e-6
MOST_VALUES, MOST_LISTS = 3_000_000, 500_000
"""In a JSON document, numbers and texts, and lists and mappings: a plan for 1,024 devices has a tenth of them. Each
takes many times in memory what it does on the wire."""

Frame = tuple[Mapping[str, Any], bytes]


def write_frame(stream: BinaryIO, document: Mapping[str, Any], body: bytes = b"") -> None:
    """Sends a frame."""
    text = json.dumps(document).encode()
    stream.write(HEAD.pack(len(text), len(body)))
    stream.write(text)
    stream.write(body)
    stream.flush()


def read_frame(stream: BinaryIO) -> Frame:
    """The next frame. Raises EOFError at the end."""
    size, rest = HEAD.unpack(_exactly(stream, HEAD.size))
    if size > MOST_DOCUMENT:
        raise EOFError
    return json.loads(_exactly(stream, size)), _exactly(stream, rest)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if content is None or len(content) < size:
        raise EOFError
    return content


def pack_windows(windows: list[CountWindow]) -> Frame:
    """Count windows of one shape as a frame."""
    heads = [[window.ended.isoformat(), window.workload, window.source] for window in windows]
    # One copy: windows of the largest models are a fifth of what this process may take.
    loads = b"".join(np.ascontiguousarray(window.load, "<i8").data for window in windows)
    return {"windows": heads, "shape": (len(windows), *windows[0].load.shape)}, loads


class Operations:
    """What can be asked for, by name: each takes the request's document and body."""

    def __init__(self, store: Store, shards: Shards | None) -> None:
        self._store, self._shards = store, shards
        self._known: Mapping[str, Callable[[Mapping[str, Any], bytes], Frame]] = {
            "windows": self._windows,
            "topology": self._topology,
            "plan": self._plan,
            "plan file": self._plan_file,
            "finish": self._finish,
        }

    def answer(self, document: Mapping[str, Any], body: bytes) -> Frame:
        """Raises MoeplaceError, ValidationError: as the operation."""
        return self._known[document["operation"]](document, body)

    def _windows(self, request: Mapping[str, Any], body: bytes) -> Frame:
        layers, experts = request["shape"]
        if request["kind"] == JSON:
            texts = 2 * TEXT_LENGTH + 16
            _check_size(body, MOST_WINDOWS * (layers * (experts + 1) + texts), MOST_WINDOWS * (layers + texts))
        windows = read_windows(request["kind"], body, (layers, experts))
        for window in windows:
            check_shape(request["deployment"], window.load, (layers, experts))
        return pack_windows(windows)

    def _topology(self, request: Mapping[str, Any], body: bytes) -> Frame:
        _check_size(body)
        asked = TopologyIn.model_validate_json(body)
        cluster = Topology.from_dict(asked.topology, "topology")
        if cluster.num_devices > MOST_DEVICES:
            raise InputError(f"topology: {cluster.num_devices} devices, at most {MOST_DEVICES} are taken")
        record = self._store.add_topology(cluster, name=asked.name, by=_actor(request))
        return {}, TopologyFull.full(record).model_dump_json().encode()

    def _plan(self, request: Mapping[str, Any], body: bytes) -> Frame:
        _check_size(body)
        asked = PlanIn.model_validate_json(body)
        try:
            plan = plan_from_dict(asked.document, "document")
        except (AttributeError, KeyError, IndexError, OverflowError) as error:
            raise FileFormatError(f"document: not a plan ({type(error).__name__})") from None
        return self._claimed(plan, asked.name, request)

    def _plan_file(self, request: Mapping[str, Any], body: bytes) -> Frame:
        from ..runtime.exporters.export import read_plan_file

        model, topology = request["model"], request["topology"]
        if request["deployment"] is not None:
            deployment = self._store.deployments.get(request["deployment"])
            model, topology = deployment.model_id, deployment.topology_id
        with TemporaryDirectory() as folder:
            file = Path(folder) / "file"
            file.write_bytes(body)
            try:
                plan = read_plan_file(
                    file,
                    None if model is None else self._store.model(model).spec,
                    None if topology is None else self._store.topology(topology).topology,
                )
            except InputError as error:
                # Where it lay meanwhile is nobody's business.
                raise type(error)(str(error).replace(str(file), "file")) from None
        return self._claimed(plan, request["name"], request)

    def _claimed(self, plan: Plan, name: str | None, request: Mapping[str, Any]) -> Frame:
        """Keeps a plan whose certificate is its sender's word."""
        proof = plan.certificate
        if proof is not None and proof.bound is not None and proof.bound > proof.value + ROUNDING * abs(proof.value):
            raise InputError(
                f"certificate: a bound of {proof.bound:g} above the value {proof.value:g}; no plan is better than what "
                "is proven of all"
            )
        record = self._store.add_plan(plan, name=name, by=_actor(request), claimed=True)
        return {}, PlanView.of(record).model_dump_json().encode()

    def _finish(self, request: Mapping[str, Any], body: bytes) -> Frame:
        from .routing import check_trace, statistics_of

        store, record = self._store, self._store.uploads.get(request["upload"])

        def inspect(content: bytes) -> Mapping[str, Any]:
            if record.kind == "trace":
                return check_trace(content, store.model(store.deployments.get(record.owner).model_id).spec)
            statistics = statistics_of(content)
            store.add_statistics(statistics, content)
            return {"statistics": statistics_fingerprint(statistics)[:ID_DIGITS]}

        move = self._shards.put if self._shards is not None and record.kind == "trace" else None
        return {}, store.uploads.finish(record.key, inspect, move, _actor(request)).model_dump_json().encode()


def _check_size(body: bytes, values: int = MOST_VALUES, lists: int = MOST_LISTS) -> None:
    """Raises InputError for JSON of more values, or lists and mappings, than any right document has, before they are
    made. In texts, what looks like some is counted too."""
    opened = body.count(b"[") + body.count(b"{")
    if opened > lists or opened + body.count(b",") > values:
        raise InputError(
            f"body: {opened + body.count(b','):,} values, {opened:,} of them lists or mappings; at most {values:,} and "
            f"{lists:,} are read at once"
        )


def _actor(request: Mapping[str, Any]) -> Actor:
    """Who asks."""
    fields = dict(request["actor"])
    scope = fields.pop("deployments")
    return Actor(**fields, deployments=None if scope is None else tuple(scope))


def _guarded(operations: Operations, document: Mapping[str, Any], body: bytes) -> Frame:
    try:
        return operations.answer(document, body)
    except ValidationError as error:
        return {"error": "InputError", "fields": fields_of(error)}, b""
    except MoeplaceError as error:
        return {"error": type(error).__name__, "message": str(error)}, b""
    except MemoryError:
        return {"error": "MemoryError"}, b""
    except Exception:
        log.exception("unexpected error", extra={"operation": document.get("operation")})
        return {"error": "Exception"}, b""


def main() -> None:
    """Answers until standard input ends."""
    configure()
    # Nothing that prints may get between frames.
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with Store.open() as store:
        operations = Operations(store, Shards(sys.argv[2]) if len(sys.argv) > 2 else None)
        bound_memory(2 * int(sys.argv[1]))
        write_frame(stream, {"ready": True})
        while True:
            try:
                document, body = read_frame(sys.stdin.buffer)
            except EOFError:
                return
            answer = _guarded(operations, document, body)
            del document, body
            write_frame(stream, *answer)


if __name__ == "__main__":
    main()
