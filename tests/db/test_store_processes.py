"""Real processes on one database: writing together, and killed while they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from moeplace.db import Store
from moeplace.db.schema import REVISION

# One interpreter imports, its forks do the work: starting an interpreter for each would take most of the time.
COMMON = """
import importlib.util, json, os, random, signal, sys, time
import alembic.command
import numpy as np
import sqlalchemy.dialects.postgresql.psycopg
import sqlalchemy.dialects.sqlite.pysqlite
import moeplace as mp
from moeplace.db import Store, catalogue
if importlib.util.find_spec("psycopg"):
    import psycopg

url, log, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
spec = mp.ModelSpec(layers=24, experts=64, top_k=4, hidden_size=64, ffn_size=128, name="model")
topology = mp.Topology.preset("h100-hgx")

def make_plan(seed):
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(64) for _ in range(24)])
    return mp.Plan(model=spec, topology=topology, physical_to_logical=table, slot_device=np.repeat(np.arange(8), 8),
                   provenance=mp.Provenance(solver="random", version="0", seed=seed))

def make_statistics(seed):
    load = np.random.default_rng(seed).random((24, 64))
    return mp.RoutingStatistics.from_counts(load), np.random.default_rng(seed).bytes(4 << 20)

handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(*entry):
    os.write(handle, (json.dumps(entry) + "\\n").encode())

def fork(work, *given):
    process = os.fork()
    if process == 0:
        try:
            work(*given)
        except BaseException as error:
            note("failed", repr(error))
            os._exit(1)
        os._exit(0)
    return process
"""

TOGETHER = (
    COMMON
    + """
def work(worker):
    store = Store.open(url)
    for i in range(rounds):
        plan = store.add_plan(make_plan(1000 * worker + i), name=f"worker {worker} plan {i}")
        note("plan", plan.fingerprint)
        shared = store.add_plan(make_plan(i))
        note("plan", shared.fingerprint)
        store.add_evaluation(shared.id, summary={"worker": worker, "round": i}, steps="s", steps_fingerprint="")
        note("evaluation", worker, i)

processes = [fork(work, worker) for worker in range(1, 6)]
for process in processes:
    os.waitpid(process, 0)
"""
)

KILLED = (
    COMMON
    + """
# Many small pieces, so that most kills fall between two of them.
catalogue.PART_BYTES = 1 << 14

def work(turn):
    store = Store.open(url)
    i = 1000 * turn
    while True:
        i += 1
        note("start", i)
        note("statistics", store.add_statistics(*make_statistics(i)).fingerprint)
        plan = store.add_plan(make_plan(i), name=f"plan {i}")
        note("plan", plan.fingerprint)
        store.add_evaluation(plan.id, summary={"seed": i}, steps="s", steps_fingerprint="")
        note("end", i)

def lines():
    with open(log) as written:
        return sum(1 for _ in written)

rng = random.Random(0)
for turn in range(rounds):
    # A third is killed while it opens or migrates the database, a third in its first round of four notes, the rest later.
    wanted, before = (0, 1, 4)[turn % 3], lines()
    deadline = time.monotonic() + 60
    process = fork(work, turn)
    while lines() - before < wanted and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(rng.uniform(0.0, 0.3))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
"""
)

INHERITED = (
    COMMON
    + """
store = Store.open(url)
store.add_plan(make_plan(0))

def work(worker):
    for i in range(rounds):
        note("plan", store.add_plan(make_plan(1000 * worker + i)).fingerprint)

processes = [fork(work, worker) for worker in range(1, 4)]
work(4)
for process in processes:
    os.waitpid(process, 0)
"""
)


def run(script: str, url: str, folder: Path, rounds: int) -> list[list[object]]:
    """What the script's processes noted, in order."""
    log = folder / "log"
    subprocess.run([sys.executable, "-c", script, url, str(log), str(rounds)], check=True, timeout=240)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry for entry in entries if entry[0] == "failed"] == []
    return entries


def noted(entries: list[list[object]], kind: str) -> set[object]:
    return {entry[1] for entry in entries if entry[0] == kind}


def test_processes_that_open_and_write_together_lose_and_double_nothing(url: str, tmp_path: Path) -> None:
    rounds = 6
    entries = run(TOGETHER, url, tmp_path, rounds)
    with Store.open(url) as store:
        plans = store.plans()
        assert {plan.fingerprint for plan in plans} == noted(entries, "plan")
        assert len(plans) == 5 * rounds + rounds
        shared = [plan for plan in plans if plan.name is None]
        found = {(int(e.summary["worker"]), int(e.summary["round"])) for p in shared for e in store.evaluations(p.id)}
        assert found == {(worker, i) for worker in range(1, 6) for i in range(rounds)}
        counts = store.describe().counts
        assert (counts["models"], counts["topologies"], counts["evaluations"]) == (1, 1, 5 * rounds)


def test_a_process_killed_while_writing_leaves_whole_rows_and_keeps_what_it_confirmed(url: str, tmp_path: Path) -> None:
    entries = run(KILLED, url, tmp_path, rounds=15)
    assert len(noted(entries, "start")) > len(noted(entries, "end")), "no process was killed in the middle of a round"
    with Store.open(url, lock_seconds=10) as store:
        assert store.describe().revision == REVISION
        plans = {plan.fingerprint: store.plan(plan.fingerprint) for plan in store.plans()}
        statistics = {record.fingerprint: record for record in store.statistics_records()}
        assert noted(entries, "plan") <= set(plans)
        assert noted(entries, "statistics") <= set(statistics)
        for record in plans.values():
            assert record.plan.physical_to_logical.shape == (24, 64)
            assert record.name == f"plan {record.plan.provenance.seed}"
        for record in statistics.values():
            assert len(store.statistics_content(record.fingerprint)) == 4 << 20
        evaluated = {seed for seed in noted(entries, "end") if store.evaluations(f"plan {seed}")}
        assert evaluated == noted(entries, "end")
        store.add_model(next(iter(plans.values())).plan.model, name="still writable")


def test_a_store_opened_before_a_fork_serves_parent_and_children(url: str, tmp_path: Path) -> None:
    rounds = 5
    entries = run(INHERITED, url, tmp_path, rounds)
    with Store.open(url) as store:
        assert noted(entries, "plan") <= {plan.fingerprint for plan in store.plans()}
        assert len(store.plans()) == 1 + 4 * rounds
