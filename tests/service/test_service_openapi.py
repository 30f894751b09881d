"""The whole API as its description tells it, with what fits the description and what does not: the server never fails.

What is asked for is there: ids in paths and bodies are those of stored objects, beside others that are made up.
MOEPLACE_TEST_EXAMPLES requests of each kind a route, 3 by default: more for a longer run, which also goes through the
limits of every value.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from cli_runs import run
from service_runs import MODEL, POLICY, TOPOLOGY, counts, serving, skewed

import moeplace as mp
from moeplace.db import Store
from moeplace.db.records import Actor, CountWindow, Finding, JobOutcome, Judgement
from moeplace.placement.plan import plan_to_dict
from moeplace.service.routing import to_bytes

pytestmark = pytest.mark.slow

EXAMPLES = os.environ.get("MOEPLACE_TEST_EXAMPLES", "3")
PHASES = "examples,coverage,fuzzing" if "MOEPLACE_TEST_EXAMPLES" in os.environ else "examples,fuzzing"
COMMAND = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
ANN = Actor("ann", "approve")
MANY = 8
"""Deployments, decisions, uploads, webhooks: some are deleted on the way."""
WITH_WEBHOOKS = "chat-0"
STORED = ("model", "topology", "statistics", "held_out")
"""What a solve or a study is asked of, where not of a deployment."""
NOWHERE = "http://127.0.0.1:1/"
LONGEST_WAIT = 0.1
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def scene(url: str) -> dict[str, list[Any]]:
    """Fills a database; returns what to ask for, by the name of a parameter or field, and of the path before it."""
    known: dict[str, list[Any]] = defaultdict(list)
    with Store.open(url) as store:
        store.add_model(MODEL, name="toy")
        store.add_topology(TOPOLOGY, name="box")
        statistics = mp.RoutingStatistics.from_counts(counts(0, skewed(0)), top_k=2)
        store.add_statistics(statistics, to_bytes(statistics), name="counted")
        problem = mp.Problem(MODEL, TOPOLOGY, statistics)
        # Others than what is asked for by name: with a deployment goes all that is its.
        spare = [f"spare-{number}" for number in range(MANY)]
        for number, name in enumerate(spare):
            store.add_model(MODEL.model_copy(update={"ffn_size": MODEL.ffn_size + number + 1}), name=name)
            store.add_topology(TOPOLOGY.model_copy(update={"inter_latency": 1e-6 * (number + 1)}), name=name)
            store.deployments.add(name, "toy", "box", POLICY, ANN)
        for number in range(MANY):
            name = f"chat-{number}"
            store.deployments.add(name, "toy", "box", POLICY, ANN)
            store.windows.add({name: [CountWindow(NOON, counts(number, skewed(0)))]})
            known["deployment"].append(name)
            plan = store.add_plan(mp.solve(problem, "random", seed=number)).id
            known["plan"].append(plan)
            store.deployments.publish(name, plan, ANN, cause="manual", comment="")
            store.jobs.submit("watch", {}, ANN, deployment=name)
            held = store.jobs.claim("w")
            assert held is not None
            candidate = mp.solve(problem, "random", seed=100 + number)
            finding, judgement = Finding(0, False, {"p": 0.5}), Judgement(1, "apply", "because", {"gain": 0.1}, False)
            assert store.jobs.finish(held, JobOutcome({}, plan=candidate, finding=finding, judgement=judgement))
            known["decisions"] += [entry.key for entry in store.decisions.page(name, limit=1)]
            upload = store.uploads.begin("trace", name, f"{number:064x}", 1000)
            store.uploads.append(upload.key, 0, bytes(10))
            known["uploads"].append(upload.key)
            store.engines.set(name, ANN, url=NOWHERE, recorder="default", every=86_400.0, span=1.0, secret=None)
        known["webhooks"] = [store.webhooks.add(WITH_WEBHOOKS, NOWHERE, ANN)[0].key for _ in range(MANY)]
        known["deliveries"] = [store.webhooks.test(WITH_WEBHOOKS, key, ANN).key for key in known["webhooks"]]
        known["jobs"] = [store.jobs.submit("solve", {}, ANN, deployment=name).key for name in known["deployment"]]
        unused = [store.add_plan(mp.solve(problem, "random", seed=200 + number)).id for number in range(MANY)]
        plans = [plan_to_dict(store.plan(ref).plan) for ref in known["plan"][:2]]
    known |= {"model": ["toy"], "topology": ["box"], "statistics": ["counted"], "held_out": ["counted"]}
    known |= {"candidate": known["plan"], "current": known["plan"], "version": [1], "url": [NOWHERE]}
    known |= {"solver": ["eplb", "contiguous"], "options": [{}], "seconds": [0.5, 2.0], "document": plans}
    known |= {"TopologyIn.topology": [{"preset": "h100-hgx", "nodes": 2}, TOPOLOGY.model_dump(mode="json")]}
    known |= {
        "load": [counts(number, skewed(1)).tolist() for number in range(3)],
        "if-match": ["*"],
    }
    known |= {"models": known["model"], "topologies": known["topology"], "plans": known["plan"]}
    known |= {"deployments": known["deployment"]}
    known |= {"deleted plans": unused, "deleted deployments": spare}
    known |= {"deleted models": spare, "deleted topologies": spare}
    return known


def fed(document: dict[str, Any], known: dict[str, list[Any]]) -> dict[str, Any]:
    """The description with values to ask with, and no `wait` that is long. What does not fit it is still sent too."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", []):
                name = parameter["name"].lower()
                if parameter["in"] == "path":
                    before = path.partition("{" + name)[0].strip("/").rpartition("/")[2]
                    deleted = method == "delete" and path.endswith("}")
                    values = known.get(f"deleted {before}" if deleted else before) or known[before]
                    if before == "deployments" and "/webhooks/{" in path:
                        values = [WITH_WEBHOOKS]
                    assert values, f"the scene has nothing for {path}"
                    parameter["schema"] = {"enum": values}
                elif name == "wait":
                    parameter["schema"]["maximum"] = LONGEST_WAIT
                elif name in known and parameter["in"] == "header":
                    parameter["schema"] = {"enum": known[name]}
    schemas = document["components"]["schemas"]
    for title, schema in list(schemas.items()):
        fields = schema.get("properties", {})
        for name, field in fields.items() if title.endswith(("In", "Request")) else ():
            values = known.get(f"{title}.{name}", known.get(name))
            if values:
                optional = any(part.get("type") == "null" for part in field.get("anyOf", []))
                fields[name] = {"enum": values + [None] * optional}
        if {"deployment", "statistics"} <= set(fields):
            # One or the other, of which the description tells in words.
            schemas[title] = {"anyOf": [without(schema, *STORED), without(schema, "deployment")]}
    return document


def without(schema: dict[str, Any], *fields: str) -> dict[str, Any]:
    """An object's schema in which some fields are not there, and those that stand for them must be, with a value."""
    kept = {name: field for name, field in schema["properties"].items() if name not in fields}
    needed = [name for name in (*STORED, "deployment") if name in kept]
    for name in needed:
        kept[name] = {"enum": [value for value in kept[name]["enum"] if value is not None]}
    return {**schema, "properties": kept, "required": [*schema.get("required", []), *needed]}


def answers(url: str, token: str) -> dict[str, dict[int, int]]:
    """How many of each status every operation gave, as the service itself counts them."""
    asked = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked, timeout=100) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for line in lines:
        if labels := re.match(r"moeplace_requests_total\{(.*)\} (\S+)", line):
            told = dict(re.findall(r'(\w+)="([^"]*)"', labels[1]))
            found[f"{told['method']} {told['route']}"][int(told["status"])] = int(float(labels[2]))
    return found


@pytest.mark.skipif(COMMAND is None, reason="schemathesis is not installed")
@pytest.mark.timeout(3000)
@pytest.mark.long
def test_no_request_makes_the_server_fail(tmp_path: Path) -> None:
    url = str(tmp_path / "store.db")
    token = run("tokens", "add", "ann", "--role", "approve", "--db", url).out.strip()
    known = scene(url)
    with serving(url, "--auth", "--workers", "0", "--recorder", f"default={tmp_path}") as server:
        asked = urllib.request.Request(f"{server.url}/v1/openapi.json", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(asked, timeout=100) as answer:
            description = fed(json.load(answer), known)
        document = tmp_path / "openapi.json"
        document.write_text(json.dumps(description))
        command = [str(COMMAND), "run", str(document), "--url", server.url, "-H", f"Authorization: Bearer {token}"]
        command += ["--checks", "not_a_server_error,content_type_conformance,response_schema_conformance"]
        command += ["--phases", PHASES, "--max-examples", EXAMPLES, "--seed", "1"]
        command += ["--generation-database", "none", "--request-timeout", "30", "--continue-on-failure", "--no-color"]
        # A stream of a job that no worker takes has no end.
        command += ["--exclude-path-regex", "/events$"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        found = answers(server.url, token)
        print(done.stdout, *(f"{operation} {statuses}" for operation, statuses in found.items()), sep="\n")
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
        assert re.search(r"\d{3,} passed|Test cases:\s+\d", done.stdout), done.stdout
        assert server.stop() == 0
    failures = [entry for entry in server.log if entry.get("status", 0) >= 500]
    assert not failures
    assert {200, 422} <= {status for statuses in found.values() for status in statuses}
    operations = [f"{method.upper()} {path}" for path, methods in description["paths"].items() for method in methods]
    missed = {operation for operation in operations if not any(status < 400 for status in found[operation])}
    # Pieces of made-up uploads are rarely those that come next, and what is decided or deleted first is not there for
    # the other.
    assert len(missed) <= 6, missed
