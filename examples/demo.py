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
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

import moeplace as mp
from moeplace.db import CountWindow, DecisionRecord

TRACE = Path(__file__).resolve().parent / "data" / "olmoe_small"
CLUSTER = "--topology a100-pcie --nodes 2 --devices-per-node 4 --slots 40 --for sglang --prefill 4096"
MODEL = "--hidden-size 2048 --ffn-size 1024"
MOVED_TO = "math"
"""The one domain that all traffic comes from in the end."""

T = TypeVar("T")


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
    command = f"serve --no-auth --db {shlex.quote(str(database))}"
    print(f"\n$ moeplace {command}", flush=True)
    log = (out / "service.log").open("w+")
    port = "8311" if _free(8311) else "0"
    arguments = [sys.executable, "-m", "moeplace.cli", *shlex.split(command), "--port", port]
    server = subprocess.Popen(arguments, stderr=log)
    try:
        url = _address(server, out / "service.log")
        decision = _fill(url)
        with urllib.request.urlopen(f"{url}/ready", timeout=60) as answer:
            print(f"The service is ready ({answer.status}): {url}")
        if decision is not None:
            print(f"Its traffic has become {MOVED_TO} alone, and a plan for that waits for you. It {decision.reason}.")
            print(f"Decide: {url}/decisions/{decision.key} or `moeplace approve {decision.key} --server {url}`")
        if sys.stdin.isatty() and sys.stdout.isatty() and not os.environ.get("CI"):
            print("Ctrl-C stops it.", flush=True)
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


def _fill(url: str) -> DecisionRecord | None:
    """Counts of the trace's tokens, window by window: all domains, whose first plan is approved, and then one of them.

    A deployment that has windows already is left as it is. Comes back with the decision that waits, if any.
    """
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

    def count(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[layers, experts] of 2,000 of these tokens."""
        ids = trace.expert_ids[rng.choice(tokens, 2000)].astype(np.int64)
        return np.stack([np.bincount(layer.ravel(), minlength=model.experts) for layer in ids.transpose(1, 0, 2)])

    one_domain = np.flatnonzero(trace.workload == trace.workloads.index(MOVED_TO))
    with mp.Client(url) as client:
        if any(entry.name == "demo" for entry in client.deployments()) and client.totals("demo")[0]:
            return next(client.decisions("demo", state="waiting"), None)
        client.add_model(model, "demo")
        client.add_topology(mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=4), "demo")
        policy = {
            "engine": "sglang",
            "slots": 40,
            "batches": [{"phase": "prefill", "tokens": 4096}],
            "seconds": 2,
            "min_regret": 0.005,
            "horizon_steps": 1e6,
        }
        client.add_deployment("demo", "demo", "demo", policy)
        everything = np.arange(trace.num_tokens)
        began = datetime.now(UTC) - timedelta(minutes=100)
        # A part at a time: each is looked at before the next one comes.
        for part, tokens in enumerate((everything, everything, one_domain)):
            minutes = [began + timedelta(minutes=32 * part + minute) for minute in range(32)]
            client.push_windows("demo", [CountWindow(ended, count(tokens), source="demo.py") for ended in minutes])
            if part == 0:
                client.approve(_waiting(client).key, "the demo's first plan")
            _await(lambda: len(list(client.checks("demo"))) > part)  # noqa: B023 (called before the next part)
        return _waiting(client)


def _waiting(client: mp.Client) -> DecisionRecord:
    """The decision that the windows sent so far lead to."""
    return _await(lambda: next(client.decisions("demo", state="waiting"), None))


def _await(look: Callable[[], T | None]) -> T:
    """What the service comes to say."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if seen := look():
            return seen
        time.sleep(0.2)
    sys.exit("the service decided nothing within four minutes; the dashboard's list of checks says why")


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
    run(f"report {trace} {CLUSTER} {MODEL} --solvers contiguous,eplb,search --seconds 10 -o {report}", out)
    run(f"solve {trace} {CLUSTER} {MODEL} --solver search --seconds 10 -o {plan}", out)
    run(f"evaluate {plan} {trace} --prefill 4096", out)
    run(f"export {plan} --for sglang -o {placed}", out)
    gain = _gain(out / "plan.json")
    print(f"\n{time.monotonic() - started:.0f} s.", end=" ")
    print(f"Held-out steps of 4,096 tokens take {gain:.1%} less time than in index order.")
    print(f"The report: {(out / 'report.html').as_uri()}")
    print("`. .venv/bin/activate` puts moeplace on the path; `moeplace advise RECORD --topology NAME` asks for yours.")


def _gain(file: Path) -> float:
    """Of the plan over experts in index order, with the same slots, on steps that its solver did not see."""
    plan = mp.Plan.load(file)
    train, held = mp.read_trace(TRACE).split(by="sequence", held_out=0.25, seed=plan.provenance.seed)
    problem = mp.Problem(
        model=plan.model,
        topology=plan.topology,
        statistics=mp.RoutingStatistics.from_trace(train),
        slots=plan.num_slots,
        engine="sglang",
    )
    steps = held.prefill_steps(4096, 32)
    placed, index = (mp.evaluate(each, steps, problem) for each in (plan, mp.solve(problem, "contiguous")))
    return float(1.0 - placed.step_seconds.mean() / index.step_seconds.mean())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        # What a shell reports of a command that Ctrl-C ended.
        sys.exit(128 + signal.SIGINT)
