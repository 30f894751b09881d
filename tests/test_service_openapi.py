"""The whole API as its description tells it, with what fits the description and what does not: the server never fails.

MOEPLACE_TEST_EXAMPLES requests of each kind a route, 3 by default: more for a longer run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from cli_runs import run
from service_runs import counts, prepared, serving, skewed

EXAMPLES = os.environ.get("MOEPLACE_TEST_EXAMPLES", "3")
COMMAND = shutil.which("schemathesis", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(COMMAND is None, reason="schemathesis is not installed")
@pytest.mark.timeout(3000)
def test_no_request_makes_the_server_fail(tmp_path: Path) -> None:
    url = str(tmp_path / "store.db")
    token = run("tokens", "add", "ann", "--role", "approve", "--db", url).out.strip()
    with serving(url, "--auth", "--workers", "0") as server:
        with server.client(token) as client:
            prepared(client)
            client.push("chat", counts(0, skewed(0)))
        document = tmp_path / "openapi.json"
        asked = urllib.request.Request(f"{server.url}/v1/openapi.json", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(asked, timeout=100) as answer:
            document.write_bytes(answer.read())
        command = [str(COMMAND), "run", str(document), "--url", server.url, "-H", f"Authorization: Bearer {token}"]
        command += ["--checks", "not_a_server_error,content_type_conformance,response_schema_conformance"]
        command += ["--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES, "--seed", "1"]
        command += ["--generation-database", "none", "--request-timeout", "30", "--continue-on-failure", "--no-color"]
        # A stream of a job that no worker takes has no end.
        command += ["--exclude-path-regex", "/events$"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
        print(done.stdout)
        assert re.search(r"\d{3,} passed|Test cases:\s+\d", done.stdout), done.stdout
        assert server.stop() == 0
    failures = [entry for entry in server.log if entry.get("status", 0) >= 500]
    assert not failures
    answered = {entry["status"] for entry in server.log if entry["message"] == "request"}
    assert {200, 422} <= answered
