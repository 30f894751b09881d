"""The main job on recorded routing of a small OLMoE-style model: look, compare, solve, judge, export, report, serve.

    python examples/demo.py --out demo

At a terminal the service runs at the end until Ctrl-C; elsewhere, and where CI is set, it is started, asked whether it
is ready, and stopped. Every step is a `moeplace` command, printed before it runs. The trace was recorded by
examples/train_moe.py; its expert sizes are replaced by those of OLMoE-1B-7B, so that predicted times are those of a
model people run.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import moeplace as mp

TRACE = Path(__file__).resolve().parent / "data" / "olmoe_small"
CLUSTER = "--topology a100-pcie --nodes 2 --devices-per-node 4"
MODEL = "--hidden-size 2048 --ffn-size 1024"


def run(command: str, out: Path) -> None:
    """Runs one moeplace command as a user would type it."""
    print(f"\n$ moeplace {command}", flush=True)
    environment = os.environ | {"MOEPLACE_DB": f"sqlite:///{out / 'moeplace.db'}"}
    done = subprocess.run([sys.executable, "-m", "moeplace.cli", *shlex.split(command)], env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def show_service(out: Path) -> None:
    """Starts the service on the demo's data: a deployment whose traffic changes from all domains to one of them."""
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client")):
        print("\nThe service is not installed: pip install 'moeplace[service]', and run this again.")
        return
    database = out / "moeplace.db"
    command = f"serve --db {shlex.quote(str(database))}"
    print(f"\n$ moeplace {command}", flush=True)
    log = (out / "service.log").open("w+")
    port = "8311" if _free(8311) else "0"
    arguments = [sys.executable, "-m", "moeplace.cli", *shlex.split(command), "--port", port]
    server = subprocess.Popen(arguments, stderr=log)
    try:
        url = _address(server, out / "service.log")
        _fill(url)
        with urllib.request.urlopen(f"{url}/ready", timeout=60) as answer:
            print(f"The service is ready ({answer.status}): {url}")
        if sys.stdin.isatty() and sys.stdout.isatty() and not os.environ.get("CI"):
            print("Look at the deployment and its decision there. Ctrl-C stops it.", flush=True)
            server.wait()
            print(f"The service ended; {log.name} says why.")
        else:
            print(f"Stopped again, since nobody is at a terminal. To start it: moeplace {command}")
    except KeyboardInterrupt:
        print(f"\nStopped. To start it again: moeplace {command}")
        raise
    finally:
        _end(server)
        log.close()


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(60)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        server.kill()
        server.wait()


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server answers, once it does."""
    while server.poll() is None:
        entries = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        if any("startup complete" in entry["message"] for entry in entries):
            return str(next(entry["url"] for entry in entries if entry["message"] == "serving"))
        time.sleep(0.1)
    sys.exit(f"the service did not start; {log} says why")


def _fill(url: str) -> None:
    """Counts of the trace's tokens, window by window, and the first decisions."""
    trace = mp.read_trace(TRACE)
    model = mp.ModelSpec(
        layers=len(trace.moe_layers),
        experts=trace.num_experts,
        top_k=trace.top_k,
        hidden_size=2048,
        ffn_size=1024,
        name="demo",
    )
    rng = np.random.default_rng(0)
    first = trace.workload == 0
    with mp.Client(url) as client:
        if any(entry.name == "demo" for entry in client.deployments()) and client.totals("demo")[0]:
            return
        client.add_model(model, "demo")
        client.add_topology(mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=4), "demo")
        policy = {"solver": "search", "seconds": 2, "step_tokens": 16_384, "min_regret": 0.005, "horizon_steps": 1e6}
        client.add_deployment("demo", "demo", "demo", policy)
        began = datetime.now(UTC) - timedelta(minutes=100)
        for number in range(96):
            mine = np.flatnonzero(first) if number >= 64 else np.arange(trace.num_tokens)
            ids = trace.expert_ids[rng.choice(mine, 2000)].astype(np.int64)
            load = [np.bincount(ids[:, layer].ravel(), minlength=model.experts) for layer in range(model.layers)]
            client.push("demo", load, ended=began + timedelta(minutes=number), source="demo.py")
            if number % 32 == 31:
                _decided(client, number // 32 + 1)


def _decided(client: mp.Client, checks: int) -> None:
    """Waits for a look at the new windows, and approves the first plan: what comes later waits for you."""
    deadline = time.monotonic() + 120
    while len(list(client.checks("demo"))) < checks and time.monotonic() < deadline:
        time.sleep(0.2)
    for decision in client.decisions("demo", state="waiting"):
        if client.deployment("demo").version == 0:
            client.approve(decision.key, "the demo's first plan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for plans and the report")
    parser.add_argument("--only-service", action="store_true", help="go to the last step")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not given.only_service:
        place(out)
    show_service(out)


def place(out: Path) -> None:
    """From a trace to a plan, a report and a file for an engine."""
    started = time.monotonic()

    trace = shlex.quote(str(TRACE))
    plan, report = shlex.quote(str(out / "plan.json")), shlex.quote(str(out / "report.html"))
    placed = shlex.quote(str(out / "init_expert_location.json"))
    run(f"stats {trace}", out)
    run(
        f"report {trace} {CLUSTER} {MODEL} --decode 512 --solvers contiguous,eplb,exflow,moetuner,search "
        f"--seconds 10 -o {report}",
        out,
    )
    run(f"solve {trace} {CLUSTER} {MODEL} --decode 512 --solver search --seconds 10 -o {plan}", out)
    run(f"evaluate {plan} {trace} --decode 512", out)
    run(f"export {plan} --for sglang -o {placed}", out)
    print(f"\n{time.monotonic() - started:.0f} s. Open {out / 'report.html'} in a browser.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        # What a shell reports of a command that Ctrl-C ended.
        sys.exit(128 + signal.SIGINT)
