"""One plan for all batch sizes: what search makes when nobody says which steps run, against every peer at each size.

    pip install mtkahypar
    python -m benchmarks default_plan --write

gpt-oss-20b on two nodes of four H100, for SGLang: its measured kernels, its choice of the nearest replica; beside them
the same plans by a roofline. Peers know only routing. Plans are judged on held-out sequences, at each size and on the
mix that is solved for by default.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace

import recordings
from published.hypergraph import mt_kahypar
from published.routing import Routing
from runner import Report, data_argument
from search_peers import plan_of

import moeplace as mp

SIZES = (("decode", 16), ("decode", 64), ("decode", 256), ("prefill", 512), ("prefill", 4096), ("prefill", 16384))
"""Phase and tokens a device."""
JUDGED_TOKENS, FEWEST = 32_768, 2
ALONE = mp.Batch("decode", tokens=4096)
PEER_TOKENS = 8192


def problem_of(slots: int, statistics: mp.RoutingStatistics, engine: str | None = "sglang") -> mp.Problem:
    """engine: None for a roofline, with replicas chosen as SGLang does."""
    cluster = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=4)
    objective = mp.Objective() if engine is not None else mp.Objective(replica_choice="nearest")
    return mp.Problem(recordings.GPT_OSS, cluster, statistics, objective, slots=slots, engine=engine)


def steps_by_size(held: mp.RoutingTrace, problem: mp.Problem) -> dict[str, mp.Steps]:
    """Held-out steps of each size, and of the mix of the defaults."""
    steps = {}
    for phase, tokens in SIZES:
        batch = mp.Batch("decode" if phase == "decode" else "prefill", tokens_per_device=tokens)
        alone = replace(problem, batches=(batch,))
        count = max(FEWEST, JUDGED_TOKENS // batch.step_tokens(problem.num_devices))
        steps[f"{phase} {tokens}"] = mp.problem_steps(held, alone, count=min(count, 64), seed=1)
    return steps | {"the mix": mp.problem_steps(held, problem, most_tokens=JUDGED_TOKENS, seed=1)}


def peer_plans(
    slots: int, statistics: mp.RoutingStatistics, train: mp.RoutingTrace, seconds: float
) -> dict[str, mp.Plan]:
    """Of those that can use so many slots."""
    problem = problem_of(slots, statistics)
    plans = {name: mp.solve(problem, name) for name in ("contiguous", "eplb")}
    if problem.has_replicas:
        return plans
    plans["moetuner"] = mp.solve(replace(problem, engine=None), "moetuner", seconds=seconds)
    routing = Routing(
        train.expert_ids[:: max(1, train.num_tokens // PEER_TOKENS)][:PEER_TOKENS],
        problem.model.experts,
        problem.slots_per_device,
        problem.topology.node_of,
        seed=0,
    )
    for setting, device_of in mt_kahypar(routing).items():
        plans[f"mt-kahypar, {setting}"] = plan_of(problem, device_of, "mt-kahypar")
    return plans


def judged(plans: Mapping[str, mp.Plan], steps: mp.Steps, problem: mp.Problem) -> dict[str, mp.Evaluation]:
    return {name: mp.evaluate(plan, steps, problem) for name, plan in plans.items()}


def all_sizes(report: Report, slots: int, plans: Mapping[str, mp.Plan], held: mp.RoutingTrace, basis: str) -> None:
    """Times to contiguous placement, and how far the default plan is from the best peer."""
    statistics = mp.RoutingStatistics.from_trace(held, 0)
    problem = problem_of(slots, statistics, "sglang" if basis == "kernels" else None)
    steps = steps_by_size(held, problem)
    columns = {"plan": "", "contiguous ms": ".3f", **dict.fromkeys(steps, ".3f"), "of the ideal": ".1%"}
    table = report.table(f"{slots} slots, {basis}", tuple(columns), columns)
    figures = {size: judged(plans, made, problem) for size, made in steps.items()}
    base = {size: found["contiguous"].mean_seconds for size, found in figures.items()}
    for name in plans:
        mix = figures["the mix"][name]
        ratios = [figures[size][name].mean_seconds / base[size] for size in steps]
        table.row(name, base["the mix"] * 1e3 if name == "contiguous" else None, *ratios, mix.ideal_share)
    others = [name for name in plans if name != "search"]
    best = {size: min(found[name].mean_seconds for name in others) for size, found in figures.items()}
    change = [f"{figures[size]['search'].mean_seconds / best[size] - 1:+.1%}" for size in steps]
    table.row("search to the best peer", None, *change, None)


def first_case(
    report: Report, plans: Mapping[str, mp.Plan], train: mp.RoutingStatistics, held: mp.RoutingTrace, seconds: float
) -> None:
    """What `solve --for sglang` gives with its defaults at 4,096 concurrent sequences, beside what it gives when
    it is told that these run."""
    statistics = mp.RoutingStatistics.from_trace(held, 0)
    columns = {"plan": "", "SGLang's kernels, ms": ".3f", "of the ideal": ".1%", "a roofline, ms": ".3f"}
    table = report.table("4,096 tokens", tuple(columns), columns)
    fitted, plain = (replace(problem_of(40, statistics, engine), batches=(ALONE,)) for engine in ("sglang", None))
    steps = mp.problem_steps(held, fitted, count=16, seed=1)
    told = {
        f"search, told so, by {basis}": mp.solve(
            replace(problem_of(40, train, engine), batches=(ALONE,)), "search", seconds=seconds
        )
        for basis, engine in (("kernels", "sglang"), ("a roofline", None))
    }
    for name, plan in (plans | told).items():
        known, line = mp.evaluate(plan, steps, fitted), mp.evaluate(plan, steps, plain)
        table.row(name, known.mean_seconds * 1e3, known.ideal_share, line.mean_seconds * 1e3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="of search, and of moetuner")


def run(options: argparse.Namespace, report: Report) -> None:
    train, held = recordings.gpt_oss(options.data).split("sequence", 0.25, 0)
    statistics = mp.RoutingStatistics.from_trace(train)
    for slots in (32, 40):
        plans = peer_plans(slots, statistics, train, options.seconds)
        plans["search"] = mp.solve(problem_of(slots, statistics), "search", seconds=options.seconds)
        if slots == 40:
            first_case(report, plans, statistics, held, options.seconds)
        for basis in ("kernels", "roofline"):
            all_sizes(report, slots, plans, held, basis)
