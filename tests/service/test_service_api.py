"""The HTTP API of a running server: what it keeps, what it refuses and how it says so."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from cli_runs import CLUSTER, run, toy_model, toy_trace_folder
from service_runs import MODEL, POLICY, TOPOLOGY, Server, counts, prepared, serving, skewed
from traces import make_trace

import moeplace as mp
from moeplace.db.records import CountWindow
from moeplace.placement.errors import ConflictError, NotFoundError
from moeplace.placement.plan import plan_to_dict
from moeplace.profiler.trace_files import write_trace

pytestmark = pytest.mark.slow

SPEC = {"experts": 8, "top_k": 2, "hidden_size": 8, "ffn_size": 8}
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(str(tmp_path_factory.mktemp("service") / "store.db")) as running:
        prepared(running.client())
        yield running


@pytest.fixture
def client(server: Server) -> mp.Client:
    return server.client()


def raw(server: Server, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
    """A request as any HTTP client makes it: (status, headers, body as JSON where it is some)."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(
        method, path, content, {**sent, **{key.replace("_", "-"): value for key, value in headers.items()}}
    )
    answer = connection.getresponse()
    told = {name.lower(): value for name, value in answer.getheaders()}
    content = answer.read()
    return answer.status, told, json.loads(content) if "json" in told.get("content-type", "") and content else content


def test_windows_arrive_as_json_and_as_arrow_and_are_stored_once(server: Server, client: mp.Client) -> None:
    client.add_deployment("windows", "toy", "box", POLICY)
    loads = [counts(i, skewed(0)) for i in range(6)]
    entries = [{"ended": (NOON + timedelta(minutes=i)).isoformat(), "load": loads[i].tolist()} for i in range(3)]
    path = "/v1/deployments/windows/windows"
    assert raw(server, "POST", path, {"windows": entries})[2] == {"received": 3, "new": 3}
    assert raw(server, "POST", path, {"windows": entries})[2] == {"received": 3, "new": 0}
    sent = [CountWindow(NOON + timedelta(minutes=i), loads[i]) for i in range(6)]
    taken = client.push_windows("windows", sent)
    assert (taken.received, taken.new) == (6, 3), "the same window is the same in either form"
    assert client.totals("windows") == (6, int(sum(load.sum() for load in loads)))
    status, _, page = raw(server, "GET", f"{path}?limit=2")
    assert status == 200
    np.testing.assert_array_equal(page["items"][0]["load"], loads[5])
    page = raw(server, "GET", f"{path}?limit=2&before={page['next']}")[2]
    np.testing.assert_array_equal(page["items"][0]["load"], loads[3])


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"windows": []}, "windows", "at least 1"),
        ({"windows": [{"ended": "now", "load": [[1]]}]}, "windows.0.ended", "datetime"),
        ({"windows": [{"ended": "2026-01-01T00:00:00", "load": [[1]]}]}, "windows.0.ended", "timezone"),
        ({"windows": [{"ended": "2026-01-01T00:00:00Z", "load": [[-1]]}]}, "windows.0.load.0.0", "greater than"),
        ({"windows": [{"ended": "2026-01-01T00:00:00Z", "load": [[1]], "x": 1}]}, "windows.0.x", "not permitted"),
        (b"{", "body", "Invalid JSON"),
    ],
)
def test_a_wrong_field_is_named(server: Server, body: Any, field: str, message: str) -> None:
    status, headers, problem = raw(server, "POST", "/v1/deployments/chat/windows", body)
    assert (status, headers["content-type"]) == (422, "application/problem+json")
    assert problem["errors"][0]["field"] == field
    assert message in problem["errors"][0]["message"]
    assert problem["title"] == "invalid input"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("GET", "/v1/deployments/chart", None, 404, "did you mean 'chat'"),
        ("GET", "/v1/plans/nothing", None, 404, "no plan 'nothing'"),
        ("GET", "/v1/jobs/99999", None, 404, "no job 99999"),
        ("GET", "/v1/nowhere", None, 404, "Not Found"),
        ("GET", "/v1/jobs?limit=0", None, 422, "limit"),
        ("GET", "/v1/jobs/0", None, 422, "greater than"),
        ("DELETE", "/v1/models", None, 405, "Method Not Allowed"),
        ("POST", "/v1/models", {"spec": {"layers": 1}}, 422, "experts"),
        ("POST", "/v1/models", {"spec": {**SPEC, "layers": 10**12}}, 422, "less than or equal to 4096"),
        ("POST", "/v1/models", {"spec": {**SPEC, "layers": 4096, "experts": 65536}}, 422, "at most 1048576 together"),
        ("POST", "/v1/topologies", {"topology": {"preset": "h100-hgx", "nodes": 10**9}}, 422, "at most 65536"),
        (
            "POST",
            "/v1/topologies",
            {"topology": {"nodes": [{"count": 4096, "devices": [{"count": 4096}]}]}},
            422,
            "16,777,216 devices",
        ),
        ("POST", "/v1/topologies", {"topology": {"preset": "h1OO-sxm"}}, 422, "did you mean 'h100-sxm'"),
        ("POST", "/v1/solve", {"solver": "eplb"}, 422, "give deployment, or model, topology and statistics"),
        ("POST", "/v1/solve", {"deployment": "chat", "solver": "elpb"}, 422, "did you mean 'eplb'"),
        ("POST", "/v1/solve", {"deployment": "chat", "options": {"x": 1}}, 422, "no option 'x'"),
        ("POST", "/v1/solve", {"deployment": "chat", "seconds": 1e9}, 422, "more than the 3600"),
        ("POST", "/v1/topologies", {"topology": {"preset": ["h100-hgx"]}}, 422, "preset is"),
        ("POST", "/v1/topologies", {"topology": {"preset": "h100-hgx", "nodes": "2"}}, 422, "expected int"),
        ("POST", "/v1/plans", {"document": {"format": "x"}}, 422, "not a moeplace.plan"),
        ("POST", "/v1/uploads", {"kind": "trace", "sha256": "0" * 64, "total_bytes": 9}, 422, "deployment"),
        ("PUT", "/v1/deployments/chat/policy", {"block": 9, "recent": 64}, 422, "at least 8 blocks"),
        ("PUT", "/v1/deployments/chat/plan", {"plan": "x"}, 404, "no plan"),
        ("POST", "/v1/deployments/chat/rollback", {"version": 9}, 404, "no version 9"),
        ("GET", "/v1/deployments/chat/plan", None, 404, "no plan was published"),
    ],
)
def test_errors_are_problems_that_say_what_to_do(
    server: Server, method: str, path: str, body: Any, status: int, message: str
) -> None:
    found, headers, problem = raw(server, method, path, body)
    assert (found, headers["content-type"]) == (status, "application/problem+json")
    assert problem["status"] == status
    assert message in problem["detail"]


def test_windows_of_another_shape_or_type_are_refused(server: Server) -> None:
    path = "/v1/deployments/chat/windows"
    entry = {"ended": "2026-01-01T00:00:00Z", "load": [[1, 2], [3, 4]]}
    assert "[3, 16]" in raw(server, "POST", path, {"windows": [entry]})[2]["detail"]
    assert (
        "different lengths" in raw(server, "POST", path, {"windows": [{**entry, "load": [[1], [2, 3]]}]})[2]["detail"]
    )
    assert raw(server, "POST", path, b"x", Content_Type="text/plain")[0] == 415
    status, _, problem = raw(server, "POST", path, b"not arrow", Content_Type="application/vnd.apache.arrow.stream")
    assert (status, "not an Arrow stream" in problem["detail"]) == (422, True)


def test_head_is_answered_as_get_without_its_body(server: Server) -> None:
    for path in ("/health", "/v1/deployments", "/v1/deployments/chat", "/", "/v1/deployments/nobody"):
        status, headers, _ = raw(server, "GET", path)
        found, told, content = raw(server, "HEAD", path)
        assert (found, told.get("content-type"), content) == (status, headers.get("content-type"), b"")
        assert told.get("etag") == headers.get("etag")
    assert raw(server, "HEAD", "/live")[0] == 405, "a stream would not end"
    assert raw(server, "OPTIONS", "/health")[1]["allow"]


def test_moments_at_the_ends_of_the_calendar_are_no_failures(server: Server) -> None:
    client = server.client()
    chat = client.deployment("chat")
    client.add_deployment("calendar", chat.model_id, chat.topology_id)
    path = "/v1/deployments/calendar/windows?ended_before="
    for moment in ("0001-01-01T00:00:00%2B14:00", "0001-01-01T00:00:00Z", "1970-01-01T00:00:00Z"):
        assert raw(server, "DELETE", path + moment)[::2] == (200, {"removed": 0}), moment
    client.push("calendar", counts(0, skewed(0)))
    assert raw(server, "DELETE", path + "9999-12-31T23:59:59-14:00")[::2] == (200, {"removed": 1})
    client.remove_deployment("calendar")


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "deflate", "br", "zstd", "x-gzip, identity", "identity, gzip"])
def test_a_compressed_body_is_refused_by_name_and_not_decoded(server: Server, coding: str) -> None:
    body = gzip.compress(json.dumps({"spec": MODEL.model_dump(mode="json")}).encode())
    status, headers, problem = raw(server, "POST", "/v1/models", body, Content_Encoding=coding)
    assert (status, headers["accept-encoding"]) == (415, "identity")
    assert coding.lower() in problem["detail"].lower() or "gzip" in problem["detail"]
    status, _, problem = raw(server, "POST", "/v1/models", body, Transfer_Encoding=f"{coding.split(',')[0]}, chunked")
    assert status in (400, 501), problem


def test_a_body_that_is_not_compressed_may_say_so(server: Server) -> None:
    body = {"spec": MODEL.model_dump(mode="json")}
    assert raw(server, "POST", "/v1/models", body, Content_Encoding="identity")[0] == 201


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(server: Server) -> None:
    netloc = urlsplit(server.url).netloc
    for chunked in (False, True):
        connection = http.client.HTTPConnection(netloc, timeout=60)
        headers = {"Content-Type": "application/json"}
        try:
            if chunked:
                connection.request("POST", "/v1/models", iter([b" " * (1 << 20)] * 40), headers, encode_chunked=True)
            else:
                connection.putrequest("POST", "/v1/models")
                connection.putheader("Content-Length", str(40 << 20))
                connection.endheaders()
            answer = connection.getresponse()
        except (BrokenPipeError, ConnectionResetError):
            continue  # refused while it was still being sent
        assert answer.status == 413


def test_pages_hold_every_item_once(server: Server, client: mp.Client) -> None:
    for i in range(7):
        client.add_deployment(f"page {i}", "toy", "box", POLICY)
    names, after = [], ""
    while True:
        page = raw(server, "GET", f"/v1/deployments?limit=3&after={after.replace(' ', '%20')}")[2]
        names += [item["name"] for item in page["items"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert names == sorted(set(names))
    assert [f"page {i}" for i in range(7)] == [name for name in names if name.startswith("page")]
    assert [deployment.name for deployment in client.deployments()] == names


def test_entity_tags_spare_transfers_and_guard_changes(server: Server) -> None:
    _, headers, _ = raw(server, "GET", "/v1/deployments/chat")
    etag = headers["etag"]
    assert raw(server, "GET", "/v1/deployments/chat", If_None_Match=etag)[0] == 304
    path = "/v1/deployments/chat/policy"
    status, _, changed = raw(server, "PUT", path, {**POLICY, "horizon_steps": 5e6}, If_Match=etag)
    assert (status, changed["policy"]["horizon_steps"]) == (200, 5e6)
    assert raw(server, "PUT", path, POLICY, If_Match=etag)[0] == 412
    assert raw(server, "GET", "/v1/deployments/chat", If_None_Match=etag)[0] == 200


def test_of_those_who_change_the_same_at_once_one_does(server: Server, client: mp.Client) -> None:
    client.add_deployment("raced", "toy", "box", POLICY)
    statistics = mp.RoutingStatistics.from_counts(skewed(1), top_k=2)
    plans = [client.add_plan(mp.solve(mp.Problem(MODEL, TOPOLOGY, statistics), "random", seed=s)).id for s in range(4)]
    changes: list[Any] = [("policy", {**POLICY, "horizon_steps": 1e6 + number}) for number in range(12)]
    changes += [("plan", {"plan": plan}) for plan in plans * 3]
    for kind in ("policy", "plan"):
        etag = raw(server, "GET", "/v1/deployments/raced")[1]["etag"]
        bodies = [body for of, body in changes if of == kind]
        with ThreadPoolExecutor(len(bodies)) as pool:
            path = f"/v1/deployments/raced/{kind}"
            statuses = list(pool.map(lambda body: raw(server, "PUT", path, body, If_Match=etag)[0], bodies))  # noqa: B023
        assert sorted(statuses) == [200] + [412] * (len(bodies) - 1), kind


def test_who_leaves_before_all_of_a_body_came_is_no_failure_of_the_server(server: Server) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((str(address.hostname), address.port), timeout=60) as connection:
        head = "POST /v1/deployments/chat/windows HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        # Once it is being read.
        raw(server, "GET", "/v1/deployments")
    server.wait_for("request", status=499)
    assert not [entry for entry in server.log if entry.get("level") == "error"]


def test_a_plan_comes_back_in_every_format_an_engine_reads(server: Server, client: mp.Client) -> None:
    statistics = mp.RoutingStatistics.from_counts(skewed(1), top_k=2)
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, statistics, slots=20), "eplb")
    view = client.add_plan(plan, "given")
    assert client.add_plan(plan).id == view.id
    assert client.plan("given").fingerprint == plan.fingerprint
    assert view.gap == pytest.approx(plan.gap)
    for engine in ("moeplace", "sglang", "vllm", "vllm-ascend", "trtllm"):
        if engine == "vllm-ascend":
            continue
        content = client.export("given", engine)
        assert content == raw(server, "GET", f"/v1/plans/given/export?format={engine}")[2] or content
        if engine == "trtllm":
            assert content.startswith(b"num_slots: 20")
        else:
            assert json.loads(content)
    assert "sglang" in raw(server, "GET", "/v1/plans/given/usage?format=sglang")[2]["usage"]
    assert raw(server, "GET", "/v1/plans/given/export?format=/etc/passwd")[0] == 422
    assert [found.id for found in client.plans(solver="eplb") if found.name == "given"] == [view.id]


def test_a_plan_that_would_break_every_list_is_refused(server: Server, client: mp.Client) -> None:
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_counts(skewed(1), top_k=2)), "eplb")
    document = plan_to_dict(plan)
    for field, entry, value in (
        ("certificate", "value", "much"),
        ("certificate", "more", 1),
        ("provenance", "seconds", None),
        ("provenance", "history", [[1]]),
        ("provenance", "options", []),
        ("model", "layers", -1),
        ("predicted", "x", "y"),
    ):
        broken = {**document, field: {**document[field], entry: value}}
        status, _, problem = raw(server, "POST", "/v1/plans", {"document": broken})
        assert (
            status,
            entry in problem["detail"] or field in problem["detail"] or "could not" in problem["detail"],
        ) == (422, True)
    assert raw(server, "GET", "/v1/plans")[0] == 200


def test_publishing_polling_and_rolling_back(server: Server, client: mp.Client) -> None:
    client.add_deployment("publish", "toy", "box", POLICY)
    statistics = mp.RoutingStatistics.from_counts(skewed(2), top_k=2)
    problem = mp.Problem(MODEL, TOPOLOGY, statistics)
    first, second = (client.add_plan(mp.solve(problem, solver)).id for solver in ("contiguous", "round_robin"))
    assert client.publish("publish", first, "start").version == 1
    found = client.plan_in_force("publish", "sglang")
    assert found is not None
    assert found.version == 1
    assert client.plan_in_force("publish", "sglang", etag=found.etag) is None
    assert client.plan_in_force("publish", "sglang", etag=found.etag, wait=0.6) is None
    client.publish("publish", second)
    newer = client.plan_in_force("publish", "sglang", etag=found.etag, wait=5)
    assert newer is not None
    assert (newer.version, newer.content != found.content) == (2, True)
    back = client.rollback("publish", 1)
    assert (back.version, back.plan_id, back.cause) == (3, first, "rollback")
    assert [entry.version for entry in client.publications("publish")] == [3, 2, 1]
    assert [entry.action for entry in client.audit(subject="publish")] == [
        "plan.rollback",
        "plan.manual",
        "plan.manual",
        "deployment.add",
    ]


def test_uploads_resume_and_are_known_by_content(server: Server, client: mp.Client, tmp_path: Path) -> None:
    import hashlib

    trace = make_trace(0, layers=3, experts=16, top_k=2)
    write_trace(trace, tmp_path / "trace", model=MODEL)
    [shard] = (tmp_path / "trace").glob("*.parquet")
    content = shard.read_bytes()
    body = {
        "kind": "trace",
        "deployment": "chat",
        "sha256": hashlib.sha256(content).hexdigest(),
        "total_bytes": len(content),
    }
    begun = raw(server, "POST", "/v1/uploads", body)[2]
    half = len(content) // 2
    path = f"/v1/uploads/{begun['key']}"
    octets = {"Content_Type": "application/octet-stream"}
    assert raw(server, "PATCH", path, content[:half], Upload_Offset="0", **octets)[2]["received_bytes"] == half
    status, _, problem = raw(server, "PATCH", path, content[:half], Upload_Offset="0", **octets)
    assert (status, f"{half} bytes" in problem["detail"]) == (409, True)
    assert raw(server, "POST", f"{path}/finish")[0] == 409
    done = client.upload_trace("chat", shard)
    assert (done.key, done.state) == (begun["key"], "complete")
    assert done.about == {"tokens": trace.num_tokens, "workloads": ["chat", "code"]}
    assert client.upload_trace("chat", shard).key == done.key
    other = make_trace(0, layers=3, experts=8, top_k=2)
    write_trace(other, tmp_path / "other")
    with pytest.raises(mp.InputError, match="8 experts"):
        client.upload_trace("chat", next((tmp_path / "other").glob("*.parquet")))
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(mp.InputError) as refused:
        client.upload_trace("chat", tmp_path / "junk.parquet")
    assert "/tmp" not in str(refused.value), "where the server keeps files is not told"
    mp.write_statistics(mp.RoutingStatistics.from_trace(trace), tmp_path / "statistics.npz")
    ref = client.upload_statistics(tmp_path / "statistics.npz")
    assert raw(server, "GET", f"/v1/statistics/{ref}")[2]["tokens"] == trace.num_tokens


def test_the_client_speaks_the_librarys_errors(client: mp.Client) -> None:
    with pytest.raises(NotFoundError, match="no deployment"):
        client.deployment("missing")
    with pytest.raises(ConflictError, match="exists with another"):
        client.add_deployment("chat", "toy", "box", {**POLICY, "seconds": 9})
    with pytest.raises(mp.InputError, match="whole numbers"):
        client.push("chat", skewed(0))
    with pytest.raises(mp.InputError, match="not the address"):
        mp.Client("localhost:1")
    with pytest.raises(mp.MoeplaceError, match="cannot be reached"):
        mp.Client("http://127.0.0.1:1").publish("x", "y")


def test_the_description_is_complete_and_health_is_told(server: Server) -> None:
    document = raw(server, "GET", "/v1/openapi.json")[2]
    assert document["openapi"].startswith("3.1")
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description") or path == "/v1/whoami", f"{method} {path} says nothing"
    text = json.dumps(document)
    for name in set(re.findall(r'"#/([^"]+)"', text)):
        found = document
        for part in name.split("/"):
            found = found[part]
    assert raw(server, "GET", "/health")[2]["status"] == "ok"
    assert raw(server, "GET", "/ready")[2] == {"status": "ready"}
    text = raw(server, "GET", "/metrics")[2].decode()
    assert 'moeplace_requests_total{method="GET",route="/health",status="200"}' in text
    assert 'moeplace_jobs{state="queued"}' in text


def test_pages_of_other_sites_are_refused(server: Server) -> None:
    body = {"spec": MODEL.model_dump(mode="json")}
    assert raw(server, "POST", "/v1/models", body, Origin="https://evil.example")[0] == 403
    assert raw(server, "GET", "/v1/models", Host="evil.example")[0] == 403
    with socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), timeout=60) as peer:
        peer.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert peer.recv(12).split()[1] in (b"400", b"403"), "whichever of two names is meant"
    assert raw(server, "POST", "/v1/models", body, Origin=server.url)[0] == 201


def test_commands_ask_a_service_instead(server: Server, tmp_path: Path) -> None:
    trace = toy_trace_folder(tmp_path / "trace", toy_model())
    solved = run(
        "solve",
        trace,
        *CLUSTER,
        "--solver",
        "eplb",
        "--server",
        server.url,
        "-o",
        tmp_path / "plan.json",
        "--json",
    )
    assert solved.code == 0, solved.err
    here = run("solve", trace, *CLUSTER, "--solver", "eplb", "--no-store", "-o", tmp_path / "here.json", "--json")
    assert solved.data["fingerprint"] == here.data["fingerprint"]
    listed = run("plans", "list", "--server", server.url, "--limit", 1, "--json").data["rows"]
    assert [entry["id"] for entry in listed] == [solved.data["stored_as"]]
    out = tmp_path / "sglang.json"
    done = run("export", listed[0]["id"], "--server", server.url, "--for", "sglang", "-o", out, "--no-store", "--json")
    assert done.code == 0, done.err
    assert json.loads(out.read_text())
    assert run("export", "nothing", "--server", server.url, "--for", "sglang", "-o", out, "--no-store").code == 1


def test_a_plan_in_force_comes_in_its_engines_own_file(server: Server, client: mp.Client, tmp_path: Path) -> None:
    rows = np.stack([np.r_[np.roll(np.arange(16), layer), np.arange(8)] for layer in range(3)])
    plan = mp.Plan(MODEL, TOPOLOGY, rows, np.repeat(np.arange(4), 6))
    for engine, name in (("sglang", "x.json"), ("sglang", "x.pt"), ("vllm", "x.json"), ("trtllm", "x.yaml")):
        path = mp.export_plan(plan, engine, tmp_path / name)
        view = client.add_plan_file(path, model=client.add_model(MODEL).id, topology="box")
        assert client.add_plan_file(path, deployment="chat").id == view.id
        stored = client.plan(view.id)
        np.testing.assert_array_equal(stored.physical_to_logical, rows)
        assert stored.provenance.engine == engine
    client.publish("chat", view.id)
    with pytest.raises(mp.InputError, match="own file, which does not say its model and topology"):
        client.add_plan_file(path)
    (tmp_path / "x.json").write_text('{"logical_count": [[1]]}')
    with pytest.raises(mp.InputError, match="^file holds an object with logical_count; those are loads"):
        client.add_plan_file(tmp_path / "x.json", deployment="chat")
