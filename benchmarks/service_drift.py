"""Replays traffic whose topics change and compares three ways to run it: one fixed plan, a plan by EPLB every window, and the
service's watch with automatic publishing. Recorded routing of gpt-oss-20b, sequences drawn by data set.

    python benchmarks/service_drift.py --routing gpt_oss_20b_routing.npz --out docs/results/service_drift.md

Each phase draws its windows from the sequences of one data set; phases come back, so that some changes lead to known traffic. A
true change is a phase that begins. Each window is priced with the plan in force before it was seen (`window_seconds`), against a
plan that EPLB makes from that very window: its regret. The service's tasks run as its workers run them, on an SQLite file.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

import moeplace as mp
from moeplace.db import Store
from moeplace.db.service_records import Actor, CountWindow
from moeplace.placement.migration import migration
from moeplace.placement.window_cost import window_seconds
from moeplace.service.policy import Policy
from moeplace.service.tasks import task_of

LAYERS, EXPERTS, TOP_K, SLOTS = 24, 32, 4, 40
BLOCK, RECENT, TOKENS, STEP = 4, 64, 4096, 4096
WHO = Actor("benchmark", "approve")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--routing", type=Path, required=True)
    arguments.add_argument("--phases", type=int, default=8)
    arguments.add_argument("--windows", type=int, default=64, help="a phase")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    windows, changes, names = traffic(given)
    model = mp.ModelSpec(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=2880,
        ffn_size=2880,
        expert_dtype="mxfp4",
        name="gpt-oss-20b",
    )
    topology = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=4)
    rows = {
        "fixed plan": fixed(windows, model, topology),
        "EPLB every window": eplb(windows, model, topology),
        "service": service(windows, model, topology),
    }
    report = text(given, rows, changes, names, len(windows))
    print(report)
    if given.out:
        given.out.write_text(report)


def traffic(given: argparse.Namespace) -> tuple[np.ndarray, list[int], list[str]]:
    """Loads [S, L, E], where phases begin, and the data set of each phase."""
    arrays = np.load(given.routing, allow_pickle=False)
    ids, sequence = arrays["expert_ids"], arrays["sequence"]
    dataset = arrays["sequence_dataset"][sequence]
    rng = np.random.default_rng(given.seed)
    sets, sizes = np.unique(dataset, return_counts=True)
    sets = sets[np.argsort(-sizes)][:4]
    order = [str(sets[phase % len(sets)]) for phase in range(given.phases)]
    windows, changes = [], []
    for phase, name in enumerate(order):
        members = np.unique(sequence[dataset == name])
        changes.append(phase * given.windows)
        # Sequences come and go: half of those served stay from one window to the next.
        served = rng.choice(members, size=min(32, len(members)))
        for _ in range(given.windows):
            stay = rng.random(len(served)) < 0.5
            served = np.where(stay, served, rng.choice(members, size=len(served)))
            tokens = rng.choice(np.flatnonzero(np.isin(sequence, served)), size=TOKENS)
            chosen = ids[tokens] + (np.arange(LAYERS) * EXPERTS)[:, None]
            windows.append(np.bincount(chosen.ravel(), minlength=LAYERS * EXPERTS).reshape(LAYERS, EXPERTS))
    return np.array(windows), changes, order


def problem_of(load: np.ndarray, model: mp.ModelSpec, topology: mp.Topology) -> mp.Problem:
    return mp.Problem(model, topology, mp.RoutingStatistics.from_counts(load, top_k=TOP_K), slots=SLOTS)


def best(load: np.ndarray, model: mp.ModelSpec, topology: mp.Topology) -> mp.Plan:
    return mp.solve(problem_of(load, model, topology), "eplb")


def regret(plan: mp.Plan, load: np.ndarray, model: mp.ModelSpec, topology: mp.Topology) -> float:
    problem = problem_of(load, model, topology)
    one = load[None].astype(np.float64)
    paid, possible = (float(window_seconds(p, one, problem, STEP)[0]) for p in (plan, best(load, model, topology)))
    return paid / possible - 1.0


def fixed(windows: np.ndarray, model: mp.ModelSpec, topology: mp.Topology) -> dict[str, Any]:
    plan = best(windows[:RECENT], model, topology)
    return {"regret": [regret(plan, load, model, topology) for load in windows[RECENT:]], "moves": 0, "bytes": 0.0}


def eplb(windows: np.ndarray, model: mp.ModelSpec, topology: mp.Topology) -> dict[str, Any]:
    plan = best(windows[:RECENT], model, topology)
    found, moved, times = [], 0.0, 0
    for number, load in enumerate(windows[RECENT:], RECENT):
        found.append(regret(plan, load, model, topology))
        new = best(windows[number - RECENT + 1 : number + 1], model, topology)
        step = migration(plan, new)
        moved, times, plan = moved + step.bytes_moved, times + (step.moves > 0), new
    return {"regret": found, "moves": times, "bytes": moved}


def service(windows: np.ndarray, model: mp.ModelSpec, topology: mp.Topology) -> dict[str, Any]:
    policy = Policy(
        solver="eplb",
        block=BLOCK,
        recent=RECENT,
        step_tokens=STEP,
        publish="automatic",
        slots=SLOTS,
        min_regret=0.02,
        horizon_steps=1e6,
    )
    found, moved, times, alarms = [], 0.0, 0, []
    with tempfile.TemporaryDirectory() as folder, Store.open(f"{folder}/store.db") as store:
        store.add_model(model)
        store.add_topology(topology, name="box")
        store.deployments.add("d", model.name, "box", policy.as_document(), WHO)
        start = datetime(2026, 1, 1, tzinfo=UTC)
        plan: mp.Plan | None = None
        for number, load in enumerate(windows):
            if number >= RECENT:
                assert plan is not None
                found.append(regret(plan, load, model, topology))
            store.windows.add({"d": [CountWindow(start + timedelta(minutes=number), load)]})
            if (number + 1) % (RECENT // 4) or number + 1 < RECENT:
                continue
            store.jobs.submit("watch", {}, WHO, deployment="d")
            job = store.jobs.claim("benchmark")
            assert job is not None
            store.jobs.finish(job, task_of("watch").run(job, store, lambda _: None))
            [check] = store.deployments.checks("d", limit=1)
            if check.alarm:
                alarms.append(number)
            in_force = store.deployments.get("d")
            assert in_force.plan_id is not None
            new = store.plan(in_force.plan_id).plan
            if plan is not None and new.fingerprint != plan.fingerprint:
                moved, times = moved + migration(plan, new).bytes_moved, times + 1
            plan = new
    return {"regret": found, "moves": times, "bytes": moved, "alarms": alarms}


def text(given: argparse.Namespace, rows: dict[str, Any], changes: list[int], names: list[str], count: int) -> str:
    alarms = rows["service"]["alarms"]
    # A change is found by an alarm before the next one; any further alarm in the phase is not a change of ours.
    bounds = [*changes[1:], count]
    spans = list(zip(changes[1:], bounds[1:], strict=False))
    found = [next((a - first for a in alarms if first <= a < last), None) for first, last in spans]
    extra = len(alarms) - sum(delay is not None for delay in found)
    delays = [delay for delay in found if delay is not None]
    lines = [
        "# Plans while traffic drifts",
        "",
        f"{given.phases} phases of {given.windows} windows of {TOKENS:,} tokens, each of one data set ({', '.join(dict.fromkeys(names))}, in "
        f"turn), gpt-oss-20b with {SLOTS} slots a layer on 8 H100 in 2 nodes, predicted steps of {STEP:,} tokens. Regret is against "
        "an EPLB plan made from each window itself, so nobody reaches zero.",
        "",
        f"    python benchmarks/service_drift.py --routing gpt_oss_20b_routing.npz --phases {given.phases} --windows {given.windows} "
        f"--seed {given.seed}",
        "",
        "| way | mean regret | p95 | changes of plan | bytes moved, GB |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {np.mean(row['regret']):.2%} | {np.percentile(row['regret'], 95):.2%} | {row['moves']} | {row['bytes'] / 1e9:.1f} |"
            for name, row in rows.items()
        ),
        "",
        f"Alarms of the service: {len(alarms)} in {count} windows. Of {len(found)} true changes {len(delays)} were found, "
        f"{np.mean(delays) if delays else float('nan'):.0f} windows after they began on average; {extra} further alarms.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
