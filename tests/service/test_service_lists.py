"""Pages that list everything of a kind, what they lead to, and who may see them."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from typing import get_args
from urllib.parse import urlencode

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from cli_runs import run
from service_runs import MODEL, TOPOLOGY, Server, prepared, send, serving, skewed

import moeplace as mp
from moeplace.db.records import Actor
from moeplace.db.store import Store
from moeplace.service.policy import Policy
from moeplace.service.routes.catalogue import Engine

pytestmark = pytest.mark.slow
HTML = "text/html"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, dict[str, str], str]]:
    """Two deployments, one in force, a job, a webhook, an engine, 230 audit entries; tokens by what they are for."""
    path = str(tmp_path_factory.mktemp("lists") / "store.db")
    by = Actor("ann", "approve")
    with Store.open(path) as store:
        for entry in range(230):
            store.audit.add(by, "test.entry", f"entry <{entry}>")
    tokens = {
        "whole": run("tokens", "add", "ann", "--role", "approve", "--db", path).out.strip(),
        "reader": run("tokens", "add", "bob", "--role", "read", "--db", path).out.strip(),
    }
    statistics = mp.RoutingStatistics.from_counts(skewed(0) * 1e6, top_k=2)
    plan = mp.solve(mp.Problem(MODEL, TOPOLOGY, statistics), "contiguous")
    with serving(path, "--auth", "--workers", "0", "--peer", "127.0.0.0/8") as running:
        with running.client(tokens["whole"]) as client:
            for name in ("chat <b>", "other"):
                prepared(client, name)
            stored = client.add_plan(plan)
            client.publish("chat <b>", stored.id)
        with Store.open(path) as store:
            for name in ("chat <b>", "other"):
                store.webhooks.add(name, f"https://example.org/{len(name)}", by)
                engine = f"http://127.0.0.1:{len(name)}"
                store.engines.set(name, by, url=engine, recorder="none", every=1e6, span=1.0, secret=None)
        scoped = run("tokens", "add", "cyd", "--role", "approve", "--deployment", "other", "--db", path).out.strip()
        yield running, {**tokens, "scoped": scoped}, stored.id


def seen(server: Server, token: str, path: str) -> tuple[int, str]:
    status, content = send(server, "GET", path, Accept=HTML, Cookie=f"moeplace_token={token}")
    return status, content.decode(errors="replace")


def test_every_link_of_every_page_leads_somewhere(server: tuple[Server, dict[str, str], str]) -> None:
    running, tokens, plan = server
    visited, waiting = set(), {"/"}
    while waiting:
        path = waiting.pop()
        visited.add(path)
        status, text = seen(running, tokens["whole"], path)
        assert status == 200 or ("export?format" in path and status == 422), (path, text)
        waiting |= {link.replace("&amp;", "&") for link in re.findall(r'href="(/[^"]*)"', text)} - visited
    sections = {"/decisions", "/plans", "/jobs", "/policies", "/engines", "/webhooks", "/audit"}
    assert sections <= visited
    assert {f"/plans/{plan}", "/deployments/chat%20%3Cb%3E", "/deployments/other"} <= visited


def test_a_plan_is_had_in_every_format_or_told_why_not(server: tuple[Server, dict[str, str], str]) -> None:
    running, tokens, plan = server
    _, text = seen(running, tokens["reader"], f"/plans/{plan}")
    for engine in get_args(Engine):
        status, _ = seen(running, tokens["reader"], f"/v1/plans/{plan}/export?format={engine}")
        assert (status == 200) == (f"Download for {engine}" in text), engine
        assert status in (200, 422)
    assert "Download for vllm" in text
    assert seen(running, tokens["reader"], "/plans/none")[0] == 404


def test_lists_come_in_pages(server: tuple[Server, dict[str, str], str]) -> None:
    running, tokens, _ = server
    path, found, pages = "/audit", [], 0
    while path:
        _, text = seen(running, tokens["whole"], path)
        found += re.findall(r"entry &lt;(\d+)&gt;", text)
        following = re.search(r'href="(/audit\?before=\d+)">Next page', text)
        path, pages = following[1] if following else "", pages + 1
    assert (found, pages >= 3) == ([str(entry) for entry in reversed(range(230))], True)
    for wrong in ("/jobs?before=x", "/audit?before=0", "/decisions?before=99999999999", "/plans?before=none"):
        assert seen(running, tokens["whole"], wrong)[0] in (404, 422), wrong


def test_visitors_see_what_their_tokens_are_for(server: tuple[Server, dict[str, str], str]) -> None:
    running, tokens, _ = server
    for path in ("/engines", "/webhooks"):
        _, text = seen(running, tokens["scoped"], path)
        assert "other" in text, path
        assert "chat" not in text, path
    allowed = {
        (token, path): seen(running, tokens[token], path)[0]
        for token in ("reader", "scoped")
        for path in ("/webhooks", "/audit", "/engines")
    }
    refused = {key for key, status in allowed.items() if status == 403}
    assert refused == {("reader", "/webhooks"), ("reader", "/audit"), ("scoped", "/audit")}
    for token in ("reader", "scoped"):
        text = seen(running, tokens[token], "/engines")[1]
        for path in ("/webhooks", "/audit"):
            assert (f'href="{path}"' in text) == ((token, path) not in refused), (token, path)
    assert send(running, "GET", "/plans", Accept=HTML)[0] == 303


def test_a_policy_is_read_and_changed_on_its_page_where_nothing_changed_meanwhile(
    server: tuple[Server, dict[str, str], str],
) -> None:
    running, tokens, _ = server
    path = "/deployments/other/policy"
    _, text = seen(running, tokens["reader"], path)
    for field in Policy.model_fields:
        assert f'<th scope="row">{field}</th>' in text, field
    assert "<strong>eplb</strong>" in text
    assert "<textarea" not in text

    def save(token: str, policy: str, tag: str) -> int:
        form, kind = urlencode({"policy": policy, "tag": tag}).encode(), "application/x-www-form-urlencoded"
        return send(running, "POST", path, form, kind, Cookie=f"moeplace_token={tokens[token]}", Accept=HTML)[0]

    _, text = seen(running, tokens["whole"], path)
    tag = html.unescape(re.findall(r'name="tag" value="([^"]*)"', text)[0])
    shown = json.loads(html.unescape(re.findall(r"<textarea[^>]*>(.*?)</textarea>", text, re.DOTALL)[0]))
    assert shown["solver"] == "eplb"
    changed = json.dumps({**shown, "min_regret": 0.05})
    wrong = [("reader", changed, tag), ("whole", "{", tag), ("whole", '{"solver": "serach"}', tag), ("whole", "{}", "")]
    assert [save(*each) for each in wrong] == [403, 422, 422, 412]
    assert save("whole", changed, tag) == 303
    assert save("whole", changed, tag) == 412
    with running.client(tokens["whole"]) as client:
        assert client.deployment("other").policy["min_regret"] == 0.05
    assert "5.00%" in seen(running, tokens["reader"], "/policies")[1]


def test_a_plan_is_published_from_its_page_where_nothing_changed_meanwhile(
    server: tuple[Server, dict[str, str], str],
) -> None:
    running, tokens, plan = server
    _, text = seen(running, tokens["reader"], f"/plans/{plan}")
    assert "What it would move" in text
    assert "Publish" not in text

    def publish(token: str, version: str) -> int:
        form = f"plan={plan}&version={version}".encode()
        kind, cookie = "application/x-www-form-urlencoded", f"moeplace_token={tokens[token]}"
        return send(running, "POST", "/deployments/other/publish", form, kind, Cookie=cookie, Accept=HTML)[0]

    _, text = seen(running, tokens["whole"], f"/plans/{plan}")
    assert 'aria-label="Publish for other"' in text
    wrong = [publish("reader", "0"), publish("whole", "7"), publish("whole", "x"), publish("whole", "\u0661")]
    assert wrong == [403, 409, 422, 422]
    assert publish("whole", "0") == 303
    with running.client(tokens["whole"]) as client:
        assert client.deployment("other").plan_id == plan
    assert 'aria-label="Publish for other"' not in seen(running, tokens["whole"], f"/plans/{plan}")[1]
