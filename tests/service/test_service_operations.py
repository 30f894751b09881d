"""Running the service: its documentation, its log, back-up and restore."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

pytest.importorskip("fastapi", reason="the service is an extra")
from service_runs import MODEL, TOPOLOGY, counts, prepared, serving, skewed

import moeplace as mp
from moeplace.db import Store
from moeplace.db.records import Actor, CountWindow
from moeplace.service import middleware

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parents[2] / "docs" / "service.md"


def test_the_documented_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"^```py\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    with serving(str(tmp_path / "store.db")) as server:
        exec(code, {"URL": server.url, "TOKEN": None})  # noqa: S102 - our own page
        assert capsys.readouterr().out == "1\n16\n"
        assert server.stop() == 0
    requests = [entry for entry in server.log if entry["message"] == "request"]
    assert {"method", "path", "status", "ms", "time", "level"} <= set(requests[0])


def test_the_documented_policy_defaults_are_the_real_ones() -> None:
    from moeplace.service.policy import Policy

    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    for row in rows:
        names, values = (cell.strip() for cell in row.strip("|").split("|")[:2])
        fields = re.findall(r"`(\w+)`", names)
        defaults = [getattr(Policy(), field) for field in fields]
        for field, default in zip(fields, defaults, strict=True):
            if isinstance(default, int | float | str):
                assert f"{default:g}".replace("+", "") if isinstance(default, float) else str(default)
                told = str(int(default)) if isinstance(default, float) and default.is_integer() else str(default)
                assert told in values, (field, told, values)


def test_a_back_up_made_while_serving_restores_everything(url: str, tmp_path: Path) -> None:
    """The documented commands, with windows coming in meanwhile."""
    postgres = url.startswith("postgres")
    tools = ("pg_dump", "pg_restore") if postgres else ("sqlite3",)
    if any(shutil.which(tool) is None for tool in tools):
        pytest.skip(f"{' and '.join(tools)} not installed")
    copy = tmp_path / "copy"
    with serving(url, "--workers", "0") as server, server.client() as client:
        prepared(client)
        statistics = mp.RoutingStatistics.from_counts(skewed(0), top_k=2)
        view = client.add_plan(mp.solve(mp.Problem(MODEL, mp.Topology.preset("h100-hgx", 2, 2), statistics), "eplb"))
        client.publish("chat", view.id)
        client.push_windows("chat", [CountWindow(datetime.now(UTC), counts(i, skewed(0))) for i in range(5)])
        before = (client.totals("chat"), client.deployment("chat"), [p.id for p in client.plans()])
        if postgres:
            schema = url.rpartition("%3D")[2]
            base = url.partition("?")[0]
            subprocess.run(["pg_dump", "-Fc", "-n", schema, "-f", str(copy), base], check=True)
        else:
            subprocess.run(["sqlite3", url, f".backup {copy}"], check=True)
        client.push("chat", counts(9, skewed(0)))
    if postgres:
        subprocess.run(["pg_restore", "--clean", "--if-exists", "-d", base, str(copy)], check=True)
    else:
        for leftover in (url, f"{url}-wal", f"{url}-shm"):
            Path(leftover).unlink(missing_ok=True)
        os.rename(copy, url)
    with Store.open(url) as store:
        assert store.windows.totals("chat") == before[0]
    with serving(url, "--workers", "0") as server, server.client() as client:
        assert (client.totals("chat"), client.deployment("chat"), [p.id for p in client.plans()]) == before


def test_the_deployment_files_run_what_exists(tmp_path: Path) -> None:
    """Containers start `moeplace` with arguments it takes, probe routes it has, and name the variable it reads."""
    import yaml

    from moeplace.cli.document import commands
    from moeplace.db.database import VARIABLE
    from moeplace.db.secrets import KEY

    folder = DOCS.parents[1] / "deploy"
    compose = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["service"]
    manifests = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    containers = [
        container
        for manifest in manifests
        if manifest["kind"] == "Deployment"
        for container in manifest["spec"]["template"]["spec"]["containers"]
    ]
    assert len(containers) == 2
    serve = dict(commands())["moeplace serve"]
    for words in [compose["command"], *(container["args"] for container in containers)]:
        assert words[0] == "serve"
        serve.make_context("serve", [str(word) for word in words[1:]])
    assert list(compose["environment"]) == [VARIABLE, KEY]
    with serving(str(tmp_path / "store.db"), "--workers", "0") as server:
        import urllib.request

        for container in containers:
            assert [entry["name"] for entry in container["env"]] == [VARIABLE, KEY, "NUMBA_CACHE_DIR"]
            for probe in ("readinessProbe", "livenessProbe"):
                with urllib.request.urlopen(server.url + container[probe]["httpGet"]["path"]) as answer:
                    assert answer.status == 200
    dockerfile = (folder / "Dockerfile").read_text()
    [extras] = re.findall(r"^ARG EXTRAS=(.+)$", dockerfile, re.MULTILINE)
    known = tomllib.loads((folder.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)
    serve.make_context("serve", json.loads(re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE)[-1])[1:])
    assert 'ENTRYPOINT ["moeplace"]' in dockerfile
    assert "/health" in dockerfile


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_steps_that_build_the_image_make_a_service_that_is_healthy(tmp_path: Path) -> None:
    """Run in an environment instead of a container, without torch, as its comment says it may be."""
    root = DOCS.parents[1]
    dockerfile = (root / "deploy" / "Dockerfile").read_text()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: what is copied into the image is not told from what is not")
    source = tmp_path / "source"
    for name in filter(None, tracked.stdout.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, source / name)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    places = {"/wheels": str(tmp_path / "wheels"), "/opt/numba": str(tmp_path / "numba")}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOEPLACE"))},
        "PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}",
        "EXTRAS": "service,postgres,traces",
        "MOEPLACE_DB": str(tmp_path / "x.db"),
        "NUMBA_CACHE_DIR": places["/opt/numba"],
    }

    def placed(text: str) -> str:
        for inside, outside in places.items():
            text = text.replace(inside, outside)
        # Which torch alone comes from.
        return re.sub(r"--extra-index-url \S+ ", "", text)

    steps = re.findall(r"^RUN (.+)$", dockerfile, re.MULTILINE)
    assert len(steps) == 4
    for step in steps:
        for command in step.split(" && "):
            # Users are the container's.
            if not command.startswith(("useradd", "chown")):
                subprocess.run(["sh", "-ec", placed(command)], cwd=source, env=environment, check=True)
    ports = {"8311": str(free_port()), "9311": str(free_port())}
    [entry], [command] = (re.findall(rf"^{word} (\[.+\])$", dockerfile, re.MULTILINE) for word in ("ENTRYPOINT", "CMD"))
    words = [ports.get(word, word) for word in [*json.loads(entry), *json.loads(command)]]
    [health] = re.findall(r"^HEALTHCHECK .* CMD (\[.+\])$", dockerfile, re.MULTILINE)
    look = [word.replace("8311", ports["8311"]) for word in json.loads(health)]
    with subprocess.Popen([*words, "--port", ports["8311"]], env=environment, cwd=tmp_path) as service:
        try:
            for _ in range(600):
                if subprocess.run(look, env=environment, capture_output=True, check=False).returncode == 0:
                    break
                assert service.poll() is None
                time.sleep(0.2)
            subprocess.run(look, env=environment, check=True)
            figures = look[-1].replace(ports["8311"] + "/health", ports["9311"] + "/metrics")
            subprocess.run([*look[:-1], figures], env=environment, check=True)
        finally:
            service.terminate()
        assert service.wait(100) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_deployment_files_are_what_compose_and_kubernetes_take() -> None:
    """By their schemas: fields that they do not know are refused."""
    import yaml

    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    compose_spec = pytest.importorskip("compose_spec")
    folder = DOCS.parents[1] / "deploy"
    compose = compose_spec.PyCompose.from_yaml((folder / "compose.yaml").read_text())
    compose.validate()
    compose.validate_volumes()
    manifests = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    kinds = [manifest["kind"] for manifest in manifests]
    assert kinds == ["Deployment", "Deployment", "Service", "Ingress", "NetworkPolicy"]
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_what_the_manifests_name_fits_together() -> None:
    """Volumes that are mounted exist; Prometheus finds what is annotated, and the policy lets it and the ingress in."""
    import yaml

    folder = DOCS.parents[1] / "deploy"
    manifests = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    policy = manifests[-1]["spec"]
    let_in = {entry["port"] for rule in policy["ingress"] for entry in rule["ports"]}
    for manifest in manifests[:2]:
        pod, labels = manifest["spec"]["template"]["spec"], manifest["spec"]["template"]["metadata"]["labels"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in [*pod["initContainers"], *pod["containers"]]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        [container] = pod["containers"]
        ports = {entry["name"]: entry["containerPort"] for entry in container["ports"]}
        annotated = manifest["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"]
        assert str(ports["metrics"]) == annotated == container["args"][container["args"].index("--metrics-port") + 1]
        assert set(ports.values()) == let_in
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    rule = manifests[3]["spec"]["rules"][0]
    assert rule["http"]["paths"][0]["backend"]["service"]["name"] == manifests[2]["metadata"]["name"]
    assert manifests[3]["spec"]["tls"][0]["hosts"] == [rule["host"]]


def test_prometheus_is_told_of_all_deployments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "AT_ONCE", 2)
    with Store.open(tmp_path / "x.db") as store:
        ids = store.add_model(MODEL).id, store.add_topology(TOPOLOGY).id
        for number in range(5):
            store.deployments.add(f"chat {number}", *ids, {}, Actor("ann", "approve"))
        told = middleware.Metrics(store).text().decode()
    assert set(re.findall(r'moeplace_plan_version\{deployment="([^"]*)"', told)) == {f"chat {n}" for n in range(5)}


def test_prometheus_needs_no_token_on_a_port_of_its_own(tmp_path: Path) -> None:
    import urllib.error
    import urllib.request

    port = free_port()
    with serving(str(tmp_path / "x.db"), "--auth", "--workers", "0", "--metrics-port", str(port)) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert b"moeplace_jobs" in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(server.url + "/metrics")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/deployments")
        # Whoever reaches this port takes neither its place nor the service's.
        half_open = []
        for _ in range(300):
            with contextlib.suppress(OSError):
                opened = socket.create_connection(("127.0.0.1", port), timeout=60, source_address=("127.0.0.9", 0))
                half_open.append(opened)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            assert b"moeplace_jobs" in answer.read()
        assert urllib.request.urlopen(server.url + "/health", timeout=60).status == 200
        assert len(psutil.Process(server.process.pid).net_connections()) < 100
        for opened in half_open:
            opened.close()
        assert server.stop() == 0
