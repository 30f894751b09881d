"""Errors are pages for browsers and problem details for programs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from service_runs import prepared, send, serving

from moeplace.service.pages.templating import wants_page
from moeplace.service.problems import problem

CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("accept", "page"),
    [
        (CHROME, True),
        ("text/html", True),
        ("application/json;q=0.5, TEXT/HTML", True),
        ("*/*", False),
        ("", False),
        ("application/json, text/html;q=0.9", False),
        ("text/html;q=0", False),
        ("text/html;q=much", False),
    ],
)
def test_who_names_html_before_json_gets_a_page(accept: str, page: bool) -> None:
    assert wants_page({"headers": [(b"accept", accept.encode())]}) is page


@pytest.mark.parametrize("status", [400, 403, 404, 409, 413, 415, 422, 429, 500, 503])
def test_every_error_has_a_page_that_no_header_breaks_out_of(status: int) -> None:
    sent: list[dict[str, Any]] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    async def nothing() -> Any:
        return {"type": "http.request", "body": b""}

    headers = [
        (b"accept", CHROME.encode()),
        (b"host", b"here:8311"),
        (b"referer", b"http://here:8311//elsewhere.example/?x=%22%3E<b>"),
    ]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "//else\udcff where",
        "query_string": b"a=<b>",
        "headers": headers,
    }
    asyncio.run(problem(status, "what <b>happened</b>", headers={"Retry-After": "2"})(scope, nothing, keep))
    text = sent[1]["body"].decode()
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert sent[0]["status"] == status
    assert told["content-type"].startswith("text/html")
    assert (told["retry-after"], told["vary"]) == ("2", "Accept")
    assert "default-src 'none'" in told["content-security-policy"]
    assert problem(status, "").headers["content-security-policy"] == told["content-security-policy"]
    assert f"Status {status}" in text
    assert "what &lt;b&gt;happened&lt;/b&gt;" in text
    assert "<b>" not in text
    assert 'href="//' not in text
    assert ("Try again</a>" in text) == (status in (429, 500, 503))


@pytest.mark.slow
def test_browsers_get_pages_and_programs_problem_details(tmp_path: Path) -> None:
    with serving(str(tmp_path / "store.db"), "--no-auth") as running:
        prepared(running.client())
        origin = {"Accept": CHROME, "Referer": f"{running.url}/deployments/chat?x=1"}
        for method, path, body, status, words in (
            ("GET", "/nowhere", None, 404, "There is nothing at this address"),
            ("GET", "/deployments/none", None, 404, "none"),
            ("GET", "/jobs/many", None, 422, "key"),
            ("GET", "/decisions/7", None, 404, "decision"),
            ("GET", "/v1/plans/none/export", None, 404, "none"),
            ("PUT", "/deployments/chat", b"", 405, "does not answer such a request"),
            ("POST", "/deployments/chat/rollback", b"version=9", 404, "version"),
            ("POST", "/deployments/chat/rollback", b"version=<b>", 422, "version"),
            ("POST", "/deployments/chat/studies", b"kind=" + b"x" * 300_000, 413, "more than"),
        ):
            kind = FORM if body is not None else "application/json"
            got, content = send(running, method, path, body, kind, **origin)
            text = content.decode()
            assert got == status, (path, text)
            for part in ("<!doctype html>", f"Status {status}", words, 'href="/deployments/chat?x=1"'):
                assert part in text, (path, text)
            got, content = send(running, method, path, body, kind, Accept="*/*")
            assert (got, json.loads(content)["status"]) == (status, status), path
