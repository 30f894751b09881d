"""Who may do what on a server that asks for tokens: every route, role by role; rates; sign-ins that fail."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from cli_runs import run
from fastapi import HTTPException, Request
from service_runs import Server, prepared, serving
from sqlalchemy import update
from sqlalchemy.event import listen

import moeplace as mp
from moeplace.db import Store
from moeplace.db.records import Actor
from moeplace.db.schema import TokenRow
from moeplace.placement.errors import ConflictError, InputError
from moeplace.service.access import Gate
from moeplace.service.settings import Settings

pytestmark = pytest.mark.slow

ROLES = ("read", "submit", "approve")
SHORT = timedelta(seconds=2)
OPEN = {("GET", "/health"), ("GET", "/ready")}
NEEDS = {
    "read": {"GET"},
    "submit": {
        ("POST", "/v1/models"),
        ("POST", "/v1/topologies"),
        ("POST", "/v1/plans"),
        ("POST", "/v1/plans/file"),
        ("POST", "/v1/deployments/{name}/windows"),
        ("POST", "/v1/uploads"),
        ("PATCH", "/v1/uploads/{key}"),
        ("POST", "/v1/uploads/{key}/finish"),
        ("POST", "/v1/solve"),
        ("POST", "/v1/decide"),
        ("POST", "/v1/what-if"),
        ("POST", "/v1/pareto"),
        ("POST", "/v1/jobs/{key}/cancel"),
    },
    "approve": {
        ("GET", "/v1/audit"),
        ("GET", "/v1/deployments/{name}/webhooks"),
        ("POST", "/v1/deployments"),
        ("PUT", "/v1/deployments/{name}/policy"),
        ("PUT", "/v1/deployments/{name}/plan"),
        ("POST", "/v1/deployments/{name}/rollback"),
        ("POST", "/v1/deployments/{name}/release"),
        ("POST", "/v1/decisions/{key}/approve"),
        ("POST", "/v1/decisions/{key}/reject"),
        ("POST", "/v1/deployments/{name}/webhooks"),
        ("DELETE", "/v1/deployments/{name}/webhooks/{key}"),
        ("PUT", "/v1/deployments/{name}/engine"),
        ("DELETE", "/v1/deployments/{name}/engine"),
        ("DELETE", "/v1/deployments/{name}"),
        ("POST", "/v1/deployments/{name}/webhooks/{key}/rotate"),
        ("POST", "/v1/deployments/{name}/webhooks/{key}/test"),
        ("GET", "/v1/deployments/{name}/webhooks/{key}/deliveries"),
        ("POST", "/v1/deployments/{name}/webhooks/{key}/deliveries/{delivery}"),
        ("DELETE", "/v1/deployments/{name}/windows"),
        ("DELETE", "/v1/jobs/{key}"),
        ("DELETE", "/v1/models/{ref}"),
        ("DELETE", "/v1/topologies/{ref}"),
        ("DELETE", "/v1/statistics/{ref}"),
        ("DELETE", "/v1/plans/{ref}"),
    },
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = str(tmp_path_factory.mktemp("service") / "store.db")
    made = {role: run("tokens", "add", role, "--role", role, "--db", path, "--json").data["token"] for role in ROLES}
    return {**made, "db": path}


@pytest.fixture(scope="module")
def server(tokens: dict[str, str]) -> Iterator[Server]:
    with serving(tokens["db"], "--auth", "--workers", "0") as running:
        prepared(running.client(tokens["approve"]))
        yield running


def status(server: Server, method: str, path: str, token: str | None, **headers: str) -> int:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    sent = {"Authorization": f"Bearer {token}"} if token else {}
    body = b"{}" if method in ("POST", "PUT", "PATCH") else None
    if body:
        sent["Content-Type"] = "application/json"
    connection.request(method, path, body, {**sent, **headers})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def routes(server: Server, token: str) -> list[tuple[str, str]]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("GET", "/v1/openapi.json", headers={"Authorization": f"Bearer {token}"})
    document = json.loads(connection.getresponse().read())
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


def test_every_route_asks_for_the_role_it_needs(server: Server, tokens: dict[str, str]) -> None:
    found = routes(server, tokens["read"])
    assert len(found) > 35
    unknown = set(found) - OPEN - NEEDS["submit"] - NEEDS["approve"]  # type: ignore[operator]
    assert {method for method, _ in unknown} == NEEDS["read"], "a new route that changes something: say who may"
    for method, template in found:
        path = re.sub(r"\{(key|delivery)\}", "99999", re.sub(r"\{(name|ref)\}", "missing", template))
        needed = next((role for role in ("approve", "submit") if (method, template) in NEEDS[role]), "read")
        if (method, template) in OPEN:
            assert status(server, method, path, None) == 200
            continue
        assert status(server, method, path, None) == 401, (method, template)
        # Who sends wrong ones too often has to wait.
        for wrong in ("mp_wrong", tokens["read"][:-1]):
            assert status(server, method, path, wrong) in (401, 429), (method, template)
        for role in ROLES:
            answer = status(server, method, path, tokens[role])
            allowed = ROLES.index(role) >= ROLES.index(needed)
            assert (answer not in (401, 403)) == allowed, (method, template, role, answer)
            assert answer < 500, (method, template, role)


def test_a_revoked_token_ends_and_who_did_what_is_kept(server: Server, tokens: dict[str, str]) -> None:
    made = run("tokens", "add", "gone", "--role", "read", "--db", tokens["db"]).out.strip()
    assert [status(server, "GET", "/v1/models", made) for _ in range(2)] == [200, 200]
    assert run("tokens", "revoke", "gone", "--db", tokens["db"]).code == 0
    assert status(server, "GET", "/v1/models", made) in (401, 429)
    listed = run("tokens", "list", "--db", tokens["db"], "--json").data["rows"]
    assert [(entry["name"], entry["revoked"] is None) for entry in listed] == [
        ("read", True),
        ("submit", True),
        ("approve", True),
        ("gone", False),
    ]
    with server.client(tokens["approve"]) as client:
        assert {"token.add", "token.revoke", "deployment.add"} <= {entry.action for entry in client.audit()}
    with Store.open(tokens["db"]) as store:
        assert made not in repr(store.audit.entries(limit=50))
        assert tokens["read"] not in Path(tokens["db"]).read_bytes().decode(errors="ignore")
        store.close()


def test_tokens_cannot_be_turned_off_where_others_can_reach(tmp_path: Path) -> None:
    refused = run("serve", "--db", tmp_path / "x.db", "--host", "0.0.0.0", "--no-auth")
    assert refused.code == 1
    assert "tokens cannot be turned off there" in refused.err
    assert Settings(host="0.0.0.0").asks_for_tokens
    assert Settings(host="127.0.0.1").asks_for_tokens
    assert not Settings(host="::1", auth=False).asks_for_tokens
    for wrong in ({"root_path": "moeplace"}, {"root_path": "/a/"}, {"proxies": ("nginx",)}):
        with pytest.raises(InputError, match=next(iter(wrong))[:4]):
            Settings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="workers"):
        Settings(workers=-1)


def test_callers_that_are_too_fast_are_told_when_to_come_again(tmp_path: Path) -> None:
    with serving(str(tmp_path / "x.db"), "--workers", "0", "--rate", "1") as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
        answers = []
        for _ in range(30):
            connection.request("GET", "/v1/models")
            answer = connection.getresponse()
            answers.append((answer.status, answer.getheader("retry-after")))
            answer.read()
        assert (200, None) in answers
        assert (429, "1") in answers
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        with mp.Client(server.url) as client:
            assert list(client.plans()) == [], "the client waits and asks again"


PROXIED = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP", "Via")


def test_without_tokens_only_this_machine_itself_is_served(
    tmp_path: Path, server: Server, tokens: dict[str, str]
) -> None:
    def told(url: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection.request("GET", "/v1/whoami", headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    with serving(str(tmp_path / "x.db"), "--workers", "0") as without:
        assert told(without.url)[0] == 200
        assert told(without.url, Host=f"localhost:{urlsplit(without.url).port}")[0] == 200
        assert told(without.url, Host="[::1]:80")[0] == 200
        for headers in (*({name: "for=10.0.0.7"} for name in PROXIED), {"Host": "evil.example"}, {"Host": "[bad"}):
            status_, problem = told(without.url, **headers)
            assert status_ == 403, headers
            assert "moeplace tokens add" in problem, "says what to do"
    for name in PROXIED:
        assert told(server.url, **{name: "https", "Authorization": f"Bearer {tokens['read']}"})[0] == 200


def asked(url: str, path: str, token: str | None = None, method: str = "GET", **headers: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    sent = {"Authorization": f"Bearer {token}"} if token else {}
    connection.request(method, path, headers={**sent, **headers})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.getheader("location") or ""


def test_tokens_are_asked_for_and_the_first_is_printed_once(tmp_path: Path) -> None:
    """On a loopback address too: any other user of the machine, and any proxy on it, reaches that."""
    command = [sys.executable, "-m", "moeplace.cli", "serve", "--port", "0", "--workers", "0"]
    environment = {**os.environ, "MOEPLACE_DB": str(tmp_path / "x.db")}
    printed = []
    for _ in range(2):
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            lines = []
            while "serving" not in (line := process.stderr.readline()):
                lines.append(line)
            url = str(json.loads(line)["url"])
            while "startup complete" not in (line := process.stderr.readline()):
                lines.append(line)
            time.sleep(0.3)
            assert asked(url, "/v1/models")[0] == 401
            if printed:
                assert asked(url, "/v1/models", printed[0])[0] == 200
            process.terminate()
            out, rest = process.communicate(timeout=100)
            found = re.findall(r"mp_[A-Za-z0-9_-]{20,}", out)
            assert not re.findall(r"mp_[A-Za-z0-9_-]{20,}", "".join(lines) + rest), "in no log"
            printed += found
    assert len(printed) == 1


def test_a_token_of_some_deployments_sees_no_others(tmp_path: Path) -> None:
    path = str(tmp_path / "x.db")
    with serving(path, "--auth", "--workers", "0") as server:
        whole = run("tokens", "add", "me", "--role", "approve", "--db", path).out.strip()
        client = server.client(whole)
        for name in ("chat", "search"):
            prepared(client, name)
        with Store.open(path) as store:
            own = store.jobs.submit("watch", {}, Actor("me", "approve"), deployment="chat").key
            other = store.jobs.submit("watch", {}, Actor("me", "approve"), deployment="search").key
        missing = run("tokens", "add", "one", "--deployment", "chta", "--db", path)
        assert "did you mean 'chat'" in missing.err
        made = run("tokens", "add", "one", "--role", "approve", "--deployment", "chat", "--db", path).out.strip()
        scoped = server.client(made)
        assert [entry.name for entry in scoped.deployments()] == ["chat"]
        assert scoped.totals("chat") == (0, 0)
        assert [job.key for job in scoped.jobs()] == [own]
        assert scoped.job(own).deployment == "chat"
        assert list(scoped.decisions()) == []
        for call in (
            lambda: scoped.deployment("search"),
            lambda: scoped.push("search", np.ones((3, 16), int)),
            lambda: scoped.solve("search"),
            lambda: scoped.job(other),
            lambda: scoped.cancel(other),
            lambda: list(scoped.events(other)),
            lambda: scoped.pareto("search"),
            lambda: list(scoped.audit()),
            lambda: scoped.remove_deployment("search"),
            lambda: list(scoped.jobs(deployment="search")),
            lambda: prepared(scoped, "third"),
        ):
            with pytest.raises(mp.MoeplaceError, match="is not for deployment|is for chat only"):
                call()
        for page in ("/deployments/search", f"/jobs/{other}"):
            assert asked(server.url, page, Cookie=f"moeplace_token={made}")[0] == 403
        page = asked(server.url, "/", Cookie=f"moeplace_token={made}")[1]
        assert "chat" in page
        assert "search" not in page
        submitter = server.client(run("tokens", "add", "sub", "--role", "submit", "--db", path).out.strip())
        with pytest.raises(mp.MoeplaceError, match="asked for by 'me'"):
            submitter.cancel(own)
        mine = submitter.solve("chat", solver="eplb")
        assert submitter.cancel(mine.key).state == "cancelled"
        actions = {entry.action: entry for entry in client.audit()}
        assert {"model.add", "topology.add", "solve.ask", "job.cancel", "deployment.add"} <= set(actions)
        assert (actions["solve.ask"].actor, actions["solve.ask"].client) == ("sub", "127.0.0.1")
        assert server.stop() == 0
    entry = next(entry for entry in server.log if entry.get("path", "").endswith("/windows/totals"))
    assert (entry["actor"], entry["client"]) == ("one", "127.0.0.1")


def test_tokens_end_are_used_again_and_say_when_they_were_used(url: str) -> None:
    with Store.open(url) as store:
        by = Actor("ann", "approve")
        first = store.tokens.add("ci", "read", by, lifetime=timedelta(hours=1))
        assert store.tokens.actor(first) == Actor("ci", "read")
        with pytest.raises(ConflictError, match="revoke it first"):
            store.tokens.add("ci", "read", by)
        # An hour later.
        with store._sessions.writing() as session:
            session.execute(update(TokenRow).values(expires=TokenRow.created))
        assert store.tokens.actor(first) is None
        second = store.tokens.add("ci", "submit", by)
        assert store.tokens.actor(second) == Actor("ci", "submit")
        store.tokens.revoke("ci", by)
        assert store.tokens.actor(second) is None
        third = store.tokens.add("ci", "read", by)
        assert store.tokens.actor(third) is not None
        listed = store.tokens.all()
        assert [entry.revoked is None for entry in listed] == [False, False, True]
        assert all(entry.used is not None for entry in listed)
        with pytest.raises(InputError, match="lifetime"):
            store.tokens.add("x", "read", by, lifetime=timedelta(0))


def test_who_guesses_tokens_has_to_wait_and_is_noted(tmp_path: Path) -> None:
    path = str(tmp_path / "x.db")
    with serving(path, "--auth", "--workers", "0") as server:
        token = run("tokens", "add", "me", "--role", "approve", "--db", path).out.strip()
        assert asked(server.url, "/v1/audit", token)[0] == 200
        answers = [asked(server.url, "/v1/models", f"mp_guess{number}")[0] for number in range(14)]
        assert answers == [401] * 10 + [429] * 4
        assert asked(server.url, "/v1/models", "mp_another")[0] == 429
        other = run("tokens", "add", "you", "--role", "approve", "--db", path).out.strip()
        assert asked(server.url, "/v1/audit", other)[0] == 200, "who has a token is served"
        entries = json.loads(asked(server.url, "/v1/audit?action=token.refused", token)[1])["items"]
        assert [entry["client"] for entry in entries] == ["127.0.0.1"] * 10
        assert "mp_guess" not in json.dumps(entries)


def test_behind_a_named_proxy_clients_are_told_apart_and_links_lead_back(tmp_path: Path) -> None:
    path = str(tmp_path / "x.db")
    with serving(path, "--auth", "--workers", "0", "--proxy", "127.0.0.0/8", "--root-path", "/moe") as server:
        token = run("tokens", "add", "me", "--role", "approve", "--db", path).out.strip()
        for number in range(11):
            asked(server.url, "/v1/models", f"mp_{number}", **{"X-Forwarded-For": "10.0.0.7"})
        assert asked(server.url, "/v1/models", "mp_x", **{"X-Forwarded-For": "10.0.0.7"})[0] == 429
        assert asked(server.url, "/v1/models", "mp_x", **{"X-Forwarded-For": "10.0.0.8"})[0] == 401
        assert asked(server.url, "/")[::2] == (303, "/moe/sign-in")
        page = asked(server.url, "/", Cookie=f"moeplace_token={token}")[1]
        links = re.findall(r'(?:href|action|src)="(/[^"]*)"', page)
        assert links
        assert all(link.startswith("/moe/") for link in links), links
    with serving(path, "--auth", "--workers", "0") as server:
        for number in range(11):
            asked(server.url, "/v1/models", f"mp_{number}", **{"X-Forwarded-For": f"10.0.0.{number}"})
        assert asked(server.url, "/v1/models", "mp_x", **{"X-Forwarded-For": "10.0.9.9"})[0] == 429, "not believed"


def test_a_revoked_token_is_known_no_longer_and_one_that_is_over_neither(url: str) -> None:
    """Without a look at the database at every request, and without waiting until it is looked up again."""

    async def run() -> None:
        request = Request({"type": "http", "method": "GET", "path": "/", "headers": [], "client": ("127.0.0.1", 1)})
        asked: list[object] = []
        listen(server._sessions._own_engine(), "before_cursor_execute", lambda *a: asked.append(a[2]))
        by = Actor("ann", "approve")
        token, short = (other.tokens.add("ci", "read", by), other.tokens.add("s", "read", by, lifetime=SHORT))
        listener = server.listen(gate.told)
        while listener is not None and not listener.hears:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(gate.look)
        for _ in range(2):
            # The first time it is noted that they were used, which changes a file.
            assert (await gate.actor(request, token)).name == "ci"
            assert (await gate.actor(request, short)).name == "s"
        asked.clear()
        assert gate.remembered(request, token) is not None
        assert asked == []
        other.tokens.revoke("ci", by)
        if listener is not None:
            await asyncio.to_thread(gate.look)
        assert gate.remembered(request, token) is None
        with pytest.raises(HTTPException, match="send a token"):
            await gate.actor(request, token)
        await asyncio.sleep(SHORT.total_seconds())
        assert gate.remembered(request, short) is None
        if listener is not None:
            listener.close()

    with Store.open(url) as server, Store.open(url) as other:
        gate = Gate(server, Settings())
        asyncio.run(run())


def test_a_stream_ends_when_its_token_is_revoked(tmp_path: Path) -> None:
    path = str(tmp_path / "x.db")
    with serving(path, "--auth", "--workers", "0") as server:
        whole, gone = (
            run("tokens", "add", name, "--role", "approve", "--db", path).out.strip() for name in ("ann", "gone")
        )
        client = server.client(whole)
        prepared(client)
        client.push("chat", np.ones((3, 16), int))
        job = client.solve("chat", solver="eplb").key
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=100)
        connection.request("GET", f"/v1/jobs/{job}/events", headers={"Authorization": f"Bearer {gone}"})
        stream = connection.getresponse()
        assert stream.readline().startswith(b"event: job")
        assert run("tokens", "revoke", "gone", "--db", path).code == 0
        client.cancel(job)
        assert b"cancelled" not in stream.read()
