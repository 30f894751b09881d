"""Who may do what on a server that asks for tokens: every route, role by role; rates; sign-ins that fail."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from cli_runs import run
from service_runs import Server, prepared, serving

import moeplace as mp
from moeplace.db import Store
from moeplace.placement.errors import InputError
from moeplace.service.settings import Settings

pytestmark = pytest.mark.slow

ROLES = ("read", "submit", "approve")
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
        ("POST", "/v1/decisions/{key}/approve"),
        ("POST", "/v1/decisions/{key}/reject"),
        ("POST", "/v1/deployments/{name}/webhooks"),
        ("DELETE", "/v1/deployments/{name}/webhooks/{key}"),
        ("PUT", "/v1/deployments/{name}/engine"),
        ("DELETE", "/v1/deployments/{name}/engine"),
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
        path = re.sub(r"\{key\}", "99999", re.sub(r"\{(name|ref)\}", "missing", template))
        needed = next((role for role in ("approve", "submit") if (method, template) in NEEDS[role]), "read")
        if (method, template) in OPEN:
            assert status(server, method, path, None) == 200
            continue
        for wrong in (None, "mp_wrong", tokens["read"][:-1]):
            assert status(server, method, path, wrong) == 401, (method, template)
        for role in ROLES:
            answer = status(server, method, path, tokens[role])
            allowed = ROLES.index(role) >= ROLES.index(needed)
            assert (answer not in (401, 403)) == allowed, (method, template, role, answer)
            assert answer < 500, (method, template, role)


def test_a_revoked_token_ends_and_who_did_what_is_kept(server: Server, tokens: dict[str, str]) -> None:
    made = run("tokens", "add", "gone", "--role", "read", "--db", tokens["db"]).out.strip()
    assert run("tokens", "revoke", "gone", "--db", tokens["db"]).code == 0
    assert status(server, "GET", "/v1/models", made) == 401
    listed = run("tokens", "list", "--db", tokens["db"], "--json").data
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
    assert not Settings(host="127.0.0.1").asks_for_tokens
    assert Settings(host="::1", auth=True).asks_for_tokens
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
