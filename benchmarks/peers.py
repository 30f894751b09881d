"""Policies of placement and planners of copies, each run on the same inputs as ours, in one run.

    python -m benchmarks peers --eplb eplb.py --vllm default.py --sglang deepseek_vec.py --deepinfer policy.py \
        --tensorrt moeLoadBalancer.cpp --flashlb policy_flashlb.py --swift policy_swift_balancer.py \
        --levi result_snapshot.json --moonep planning_reference.py --llep gpt_oss_llep.py --write

Peers are files of their repositories, fetched by whoever runs this: github.com/deepseek-ai/EPLB; vllm (the wheel's
vllm/distributed/eplb/policy/default.py); sglang (the wheel's sglang/srt/eplb/eplb_algorithms/deepseek_vec.py);
deepinfer (its sdist's deepinfer/model_executor/eplb/policy.py); NVIDIA/TensorRT-LLM
(cpp/tensorrt_llm/runtime/moeLoadBalancer/moeLoadBalancer.cpp; needs g++); vllm-project/vllm-ascend
(vllm_ascend/eplb/core/policy/policy_flashlb.py and policy_swift_balancer.py); ttanv/levi
(examples/ADRS/eplb/result_snapshot.json); MoonEP (tests/planning_reference.py); SalesforceAIResearch/LeastLoadedEP
(llep/gpt_oss_llep.py). Those that are not named are left out. Times are seconds of the processor, the least of turns
taken one after the other, on one thread, kernels compiled before: ratios within a run count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import recordings
from published import online_planners, window_policies
from published.published_eplb import published_eplb
from runner import Report, data_argument

import moeplace as mp
from moeplace.compat.eplb import rebalance_experts
from moeplace.compat.windows import PROPOSALS, rebalance_experts_global
from moeplace.placement.online import plan_online
from moeplace.solvers.eplb import rebalance
from moeplace.solvers.table_packing import largest_loads, pack_steps

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Policy = Callable[[Array, int, int], IntArray]

SHAPES = ((60, 384, 448, 64), (92, 128, 160, 32), (48, 128, 144, 16), (26, 64, 72, 8), (24, 32, 40, 8))
"""Layers, experts, slots and devices of tables drawn from a gamma distribution, beside DeepSeek-V3's."""
STEPS, STEP_PAIRS = 100, 32_768
"""Steps of a window, and token-expert pairs of a step and layer."""
CLUSTERS = ((288, 32), (320, 64))
DEVICES, SPARE = 8, 2
TOLD = "told the nearest mix of the four"
"""No policy: planned for what the four could tell of the one left out, at most."""
PARTS = ("tables", "windows", "workloads", "copies")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to run (default: all)")
    parser.add_argument("--turns", type=int, default=3, help="of each measurement")
    for name in ("eplb", "vllm", "sglang", "deepinfer", "tensorrt", "flashlb", "swift", "levi", "moonep", "llep"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help="a peer's file")


def run(options: argparse.Namespace, report: Report) -> None:
    import torch

    torch.set_num_threads(1)
    parts = options.only or PARTS
    if "tables" in parts:
        tables(report, options)
    if "windows" in parts:
        windows(report, options)
    if "workloads" in parts:
        workloads(report, options)
    if "copies" in parts:
        copies(report, options)


def deepseek_load(data: Path) -> Array:
    """[L, E] counts of DeepSeek-V3's MoE layers under its first workload."""
    counts = np.load(data / "deepseek_v3_counts.npz")
    load = counts[counts.files[0]].astype(np.float64)
    return load[load.sum(axis=1) > 0]


# One load table.


def tables(report: Report, options: argparse.Namespace) -> None:
    load = deepseek_load(options.data)
    rng = np.random.default_rng(0)
    cases = [(load, slots, devices) for slots, devices in CLUSTERS]
    cases += [(rng.gamma(1.0, 1000.0, size=shape[:2]), *shape[2:]) for shape in SHAPES]
    policies: dict[str, Policy] = {}
    if options.eplb:
        published = published_eplb(options.eplb)
        policies["DeepSeek EPLB"] = lambda load, slots, devices: published(load, slots, 1, 1, devices)
    if options.vllm:
        policies["vLLM"] = window_policies.vllm(options.vllm)
    if options.sglang:
        by_steps = window_policies.sglang(options.sglang)
        policies["SGLang, deepseek_vec"] = lambda load, slots, devices: by_steps(load[None], slots, devices)
    if options.tensorrt:
        policies["TensorRT-LLM"] = window_policies.tensorrt(options.tensorrt)
    if options.deepinfer:
        one_step = window_policies.deepinfer(options.deepinfer)
        policies["DeepInfer"] = lambda load, slots, devices: one_step(load[None], slots, devices)
    if options.flashlb:
        tree = window_policies.flashlb(options.flashlb)
        policies["FlashLB"] = lambda load, slots, devices: tree(load[None], slots, devices)
    if options.swift:
        policies["SwiftBalancer"] = window_policies.swift(options.swift)
    if options.levi:
        policies["LEVI's program"] = window_policies.levi(options.levi)
    policies["ours, improve=False"] = lambda load, slots, devices: rebalance_experts(
        load, slots, 1, 1, devices, improve=False
    )[0]
    policies["ours"] = lambda load, slots, devices: rebalance_experts(load, slots, 1, 1, devices)[0]
    shapes = [f"{load.shape[0]}x{load.shape[1]}, {slots} on {devices}" for load, slots, devices in cases]
    spent = report.table("One load table: ms", ("policy", *shapes), dict.fromkeys(shapes, ".1f"))
    level = report.table("One load table: load max/mean", ("policy", *shapes), dict.fromkeys(shapes, ".4f"))
    found = [measured(policies, case, options.turns) for case in cases]
    for name, of_policy in zip(policies, zip(*found, strict=True), strict=True):
        spent.row(name, *(milliseconds for milliseconds, _ in of_policy))
        level.row(name, *(balance(c[0][None], made, c[2]) for c, (_, made) in zip(cases, of_policy, strict=True)))


# Windows of steps.


def policies_of_windows(options: argparse.Namespace) -> dict[str, Policy]:
    """Of loads [S, L, E], by name: EPLB, and those whose files are named."""
    policies: dict[str, Policy] = {"EPLB on the mean": lambda load, s, d: rebalance(load.mean(axis=0), s, 1, 1, d)}
    if options.deepinfer:
        policies["DeepInfer"] = window_policies.deepinfer(options.deepinfer)
    if options.flashlb:
        policies["FlashLB"] = window_policies.flashlb(options.flashlb)
    return policies


def windows(report: Report, options: argparse.Namespace) -> None:
    policies = policies_of_windows(options)
    policies |= {
        f"ours, {name}": lambda load, s, d, proposals=proposals: pack_steps(load, s, d, proposals)
        for name, proposals in (("greedy", 0), ("compat", PROPOSALS), ("longer", 3 * PROPOSALS))
    }
    columns = ("window", "policy", "ms", "on itself", "held out")
    table = report.table("Windows of steps", columns, {"ms": ".0f", "on itself": ".4f", "held out": ".4f"})
    for name, window, held, slots, devices in window_cases(options.data):
        for (policy, _), (milliseconds, made) in zip(
            policies.items(), measured(policies, (window, slots, devices), options.turns), strict=True
        ):
            figures = (balance(each, made, devices) for each in (window, held))
            table.row(f"{name}, {slots} on {devices}", policy, milliseconds, *figures)


def window_cases(data: Path) -> list[tuple[str, Array, Array, int, int]]:
    """(name, [S, L, E] to fit, the same to judge, slots, devices)."""
    load = deepseek_load(data)
    chance = load / load.sum(axis=1, keepdims=True)
    drawn = [
        np.stack([np.stack([rng.multinomial(STEP_PAIRS, row) for row in chance]) for _ in range(STEPS)]).astype(float)
        for rng in map(np.random.default_rng, (1, 2))
    ]
    cases = [("DeepSeek-V3, drawn steps", *drawn, *cluster) for cluster in CLUSTERS]
    train, held = recordings.gpt_oss(data).split()
    prefill = [part.prefill_steps(4096).loads().astype(float) for part in (train, held)]
    decode = [part.decode_steps(128, STEPS).loads().astype(float) for part in (train, held)]
    cases.append(("gpt-oss-20b, prefill 4,096", prefill[0], prefill[1], 40, DEVICES))
    cases.append(("gpt-oss-20b, decode 128", decode[0], decode[1], 40, DEVICES))
    return cases


# One plan for five workloads, one left out.


def workloads(report: Report, options: argparse.Namespace) -> None:
    counts = np.load(options.data / "deepseek_v3_counts.npz")
    data = {name: counts[name].astype(np.float64) for name in counts.files}
    busy = np.all([load.sum(axis=1) > 0 for load in data.values()], axis=0)
    scaled = {name: load[busy] / load[busy].sum(axis=1, keepdims=True) * 1e6 for name, load in data.items()}
    policies = policies_of_windows(options)
    policies["ours, steps"] = lambda load, s, d: for_windows(load, s, d)
    policies["ours, workloads=True"] = lambda load, s, d: for_windows(load, s, d, workloads=True)
    columns = ("slots, devices", "policy", "ms", "mean of left out", "worst of left out", "worst of the four")
    table = report.table("One plan for five workloads, one left out", columns, dict.fromkeys(columns[3:], ".4f"))
    table.formats["ms"] = ".0f"
    for slots, devices in CLUSTERS:
        times, unseen, seen = defaultdict(list), defaultdict(list), defaultdict(list)
        for out, load in scaled.items():
            rest = np.stack([other for name, other in scaled.items() if name != out])
            for name, (milliseconds, made) in zip(policies, measured(policies, (rest, slots, devices), 1), strict=True):
                times[name].append(milliseconds)
                unseen[name].append(balance(load[None], made, devices))
                seen[name].append(max(balance(other[None], made, devices) for other in rest))
            mixed = pack_steps(nearest_mix(rest, load)[None], slots, devices, 20_000)
            unseen[TOLD].append(balance(load[None], mixed, devices))
            seen[TOLD].append(max(balance(other[None], mixed, devices) for other in rest))
        for name in unseen:
            figures = np.mean(unseen[name]), np.max(unseen[name]), np.max(seen[name])
            table.row(f"{slots}, {devices}", name, min(times[name], default=None), *map(float, figures))


def nearest_mix(workloads: Array, load: Array) -> Array:
    """[L, E] the mix of workloads [W, L, E], of any weights that sum to 1, that lies nearest to a load [L, E]."""
    mean = workloads.mean(axis=0)
    mix = np.empty_like(load)
    for layer, row in enumerate(load):
        apart = (workloads[1:, layer] - mean[layer]).T
        mix[layer] = mean[layer] + apart @ np.linalg.lstsq(apart, row - mean[layer], rcond=None)[0]
    return np.maximum(mix, 0.0)


def for_windows(load: Array, slots: int, devices: int, workloads: bool = False) -> IntArray:
    import torch

    tokens = torch.from_numpy(load)
    made = rebalance_experts_global(tokens, slots, slots // devices, workloads=workloads)
    return np.asarray(made[0].numpy(), dtype=np.int64)


# Copies for one microbatch.


def copies(report: Report, options: argparse.Namespace) -> None:
    train, held = recordings.gpt_oss(options.data).split()
    model, experts = recordings.GPT_OSS, recordings.GPT_OSS.experts
    own = np.arange(experts)[:, None] // (experts // DEVICES) == np.arange(DEVICES)
    planners: dict[str, online_planners.Planner] = {}
    if options.moonep:
        planners["MoonEP"] = online_planners.moonep(options.moonep)
    if options.llep:
        planners["LLEP, 10 % above"] = online_planners.llep(options.llep, 1.1, 1)
    planners["UltraEP's first rule"] = online_planners.ultraep(SPARE)
    for slack in (0.0, 0.015, 0.1):
        planners[f"ours, {slack:.1%} above"] = ours(experts, slack)
    columns = ("steps", "homes", "planner", "experts copied", "load max/mean", "ms a layer")
    formats = {"experts copied": ".2f", "load max/mean": ".3f", "ms a layer": ".3f"}
    table = report.table("Copies for one microbatch, gpt-oss-20b, 8 ranks, 2 spare slots", columns, formats)
    routing = mp.RoutingStatistics.from_trace(train), mp.RoutingStatistics.from_trace(held)
    cluster = mp.Topology.preset("h100-hgx")
    for phase, tokens in (("decode", 128), ("decode", 512), ("prefill", 4096)):
        steps = held.decode_steps(tokens, 10) if phase == "decode" else held.prefill_steps(tokens)
        counts = by_source(steps)
        for name, homes in homes_for(model, cluster, *routing, phase, tokens).items():
            placed = np.stack([counts[:, layer][:, :, row] for layer, row in enumerate(homes)], axis=1)
            batches = placed.reshape(-1, DEVICES, experts)
            for planner, plan in planners.items():
                begin = time.perf_counter()
                quotas = np.stack([plan(batch) for batch in batches])
                seconds = time.perf_counter() - begin
                load = quotas.sum(axis=1)
                copied = ((quotas > 0) & ~own).sum(axis=(1, 2)).mean()
                level = (load.max(axis=1) / load.mean(axis=1)).mean()
                table.row(f"{phase} {tokens}", name, planner, copied, level, 1e3 * seconds / len(batches))
    rng = np.random.default_rng(0)
    share = rng.gamma(0.7, size=(8, 256))
    batch = np.stack([rng.multinomial(4096, row / row.sum(), size=64) for row in share])
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        plan_online(batch, np.arange(256) // 4, SPARE)
        times.append((time.perf_counter() - begin) / len(batch))
    report.note("planner", f"64 ranks x 256 experts, 8 layers at once: {1e3 * statistics.median(times):.3f} ms a layer")


def ours(experts: int, slack: float) -> online_planners.Planner:
    homes = np.arange(experts) // (experts // DEVICES)
    plan_online(np.ones((DEVICES, experts), dtype=np.int64), homes, SPARE)
    return lambda counts: plan_online(counts, homes, SPARE, slack=slack).quotas[0].astype(np.int64)


def homes_for(
    model: mp.ModelSpec,
    cluster: mp.Topology,
    routing: mp.RoutingStatistics,
    unseen: mp.RoutingStatistics,
    phase: str,
    tokens: int,
) -> dict[str, IntArray]:
    """[L, E] experts in the order of slots, by name. unseen: of the steps that homes are judged on."""
    plain = mp.Problem(model, cluster, routing)
    online = mp.Objective(online=SPARE, online_slack=0.1)
    asked, told = (mp.Problem(model, cluster, each, online) for each in (routing, unseen))
    arguments: dict[str, Any] = {"batch": phase, "step_tokens": tokens, "proposals": 4000}
    return {
        "index order": np.tile(np.arange(model.experts), (model.layers, 1)),
        "EPLB": mp.solve(plain, "eplb").physical_to_logical,
        "search": mp.solve(plain, "search", **arguments).physical_to_logical,
        "search, online": mp.solve(asked, "search", **arguments).physical_to_logical,
        "search, online, told what comes": mp.solve(told, "search", **arguments).physical_to_logical,
    }


def by_source(steps: Any) -> IntArray:
    """[S, L, ranks, E] tokens of each source rank that chose each expert; tokens are dealt in turn."""
    result = np.zeros((steps.num_steps, steps.num_layers, DEVICES, steps.num_experts), dtype=np.int64)
    for counts, ids in zip(result, steps.blocks(), strict=True):
        source = np.arange(len(ids)) % DEVICES
        for layer in range(steps.num_layers):
            np.add.at(counts[layer], (source[:, None], ids[:, layer]), 1)
    return result


# Measuring.


def measured(policies: dict[str, Policy], arguments: tuple[Any, ...], turns: int) -> list[tuple[float, IntArray]]:
    """(least milliseconds of the processor, table) of each policy."""
    times: dict[str, list[float]] = {name: [] for name in policies}
    made: dict[str, IntArray] = {}
    for turn in range(turns + 1):
        for name, policy in policies.items():
            begin = time.process_time()
            made[name] = policy(*arguments)
            if turn:
                times[name].append(1e3 * (time.process_time() - begin))
    return [(min(times[name]), made[name]) for name in policies]


def balance(load: Array, table: IntArray, devices: int) -> float:
    """Largest device load over the mean, mean over steps and layers, of loads [S, L, E]."""
    total = load.sum(axis=2)
    busy = total > 0
    return float((largest_loads(load, table, devices)[busy] / (total[busy] / devices)).mean())
