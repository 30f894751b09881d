"""Balance on counts alone, side by side with EPLB: one workload, all workloads, unseen workloads, groups on nodes.

    python -m benchmarks load_balance --eplb eplb.py --write

--eplb: the file of github.com/deepseek-ai/EPLB, timed beside ours; without it our port stands for it. Times are taken
in turns within this run, after kernels are loaded.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from published.published_eplb import published_eplb
from runner import Report, data_argument
from scipy.optimize import linear_sum_assignment

import moeplace as mp
from moeplace.placement.bounds import device_loads
from moeplace.placement.step_mix import sample_tokens
from moeplace.solvers.eplb import rebalance

Array = npt.NDArray[np.float64]
Table = npt.NDArray[np.int64]
CLUSTERS = ((288, 4), (320, 8))
"""Slots, and nodes of 8 devices."""
PARTS = ("one", "all", "groups", "languages", "domains")
DOMAIN_PROPOSALS = 6000
EXPECTED_LARGEST = {32: 2.07, 64: 2.35}
"""Of so many independent standard normal numbers, the mean of the largest."""


def deepseek(workloads: dict[str, Array], slots: int, nodes: int, **objective: Any) -> mp.Problem:
    layers = len(next(iter(workloads.values())))
    model = mp.ModelSpec(
        layers=layers, experts=256, top_k=8, hidden_size=7168, ffn_size=2048, groups=8, expert_dtype="fp8"
    )
    topology = mp.Topology.preset("h200-hgx", nodes=nodes)
    return mp.Problem(
        model, topology, mp.RoutingStatistics.from_counts(workloads), mp.Objective(**objective), slots=slots
    )


def imbalance(load: Array, table: Table, devices: int, shares: Array | None = None) -> float:
    """Largest device load over the mean, mean over layers; slots dealt evenly."""
    if shares is None:
        counts = np.stack([np.bincount(row, minlength=load.shape[1]) for row in table])
        shares = 1.0 / np.take_along_axis(counts, table, axis=1)
    owner = np.repeat(np.arange(devices), table.shape[1] // devices)
    loads = device_loads(load, table, shares, owner, devices)
    return float((loads.max(axis=1) / loads.mean(axis=1)).mean())


def of_plan(plan: mp.Plan, load: Array) -> float:
    return imbalance(load, plan.physical_to_logical, plan.topology.num_devices, plan.shares)


def scaled(load: Array) -> Array:
    """Each layer's loads summing to 1, so that workloads of any length weigh the same in a mean."""
    return np.asarray(load / load.sum(axis=1, keepdims=True))


Eplb = Callable[[Array, int, int], Table]


def published(path: Path | None) -> tuple[str, Eplb]:
    """(its name, EPLB's global form: loads, slots and devices to a slot table)."""
    if path is None:
        return "eplb (our port)", lambda load, slots, devices: rebalance(load, slots, 1, 1, devices)
    rebalance_published = published_eplb(path)
    # Groups that do not divide over nodes: the global form.
    return "eplb (published)", lambda load, slots, devices: rebalance_published(load, slots, 3, 2, devices)


def fractions(*columns: str) -> dict[str, str]:
    """Columns with four digits after the point."""
    return dict.fromkeys(columns, ".4f")


def one_workload(report: Report, data: dict[str, Array], eplb: tuple[str, Eplb], repeats: int) -> None:
    name, run = eplb
    formats = fractions("slots, devices", "workload", name, "search", "search, free splits", "bound")
    formats |= {"time search / EPLB": ".2f", "EPLB s": ".2f"}
    table = report.table("One workload, fitted and judged on itself", formats, formats)
    for slots, nodes in CLUSTERS:
        devices = 8 * nodes
        mp.solve(deepseek({"": next(iter(data.values()))}, slots, nodes), "search", proposals=12)
        for workload, load in data.items():
            ratios, seconds = [], []
            problem = deepseek({workload: load}, slots, nodes)
            for _ in range(repeats):
                start = time.perf_counter()
                dealt = run(load, slots, devices)
                between = time.perf_counter()
                plan = mp.solve(problem, "search")
                ratios.append((time.perf_counter() - between) / (between - start))
                seconds.append(between - start)
            free = mp.solve(deepseek({workload: load}, slots, nodes, split="free"), "search")
            table.row(
                f"{slots}, {devices}",
                workload,
                imbalance(load, dealt, devices),
                of_plan(plan, load),
                of_plan(free, load),
                plan.bound,
                statistics.median(ratios),
                statistics.median(seconds),
            )


def all_workloads(report: Report, data: dict[str, Array], run: Eplb, seconds: float) -> None:
    formats = fractions("slots, devices", "workload", "EPLB on the mean", "EPLB on the scaled mean", "search")
    table = report.table("One plan for all workloads", formats, formats)
    folds: list[tuple[object, ...]] = []
    for slots, nodes in CLUSTERS:
        devices = 8 * nodes
        plan, recorded, even = fits(data, slots, nodes, run, seconds)
        judged = {
            w: (imbalance(x, recorded, devices), imbalance(x, even, devices), of_plan(plan, x)) for w, x in data.items()
        }
        for workload, figures in judged.items():
            table.row(f"{slots}, {devices}", workload, *figures)
        table.row(f"{slots}, {devices}", "**worst**", *[max(column) for column in zip(*judged.values(), strict=True)])
        left: list[tuple[float, ...]] = []
        for out, load in data.items():
            rest = {name: other for name, other in data.items() if name != out}
            plan, recorded, even = fits(rest, slots, nodes, run, seconds)
            fitted = max(of_plan(plan, other) for other in rest.values())
            figures = (imbalance(load, recorded, devices), imbalance(load, even, devices), of_plan(plan, load))
            left.append((*figures, fitted, *unforeseen(load, rest, slots, devices)))
            folds.append((f"{slots}, {devices}", out, *left[-1]))
        folds.append((f"{slots}, {devices}", "**worst**", *[max(column) for column in zip(*left, strict=True)]))
        folds.append((f"{slots}, {devices}", "mean", *[float(np.mean(column)) for column in zip(*left, strict=True)]))
    formats = fractions(
        "slots, devices",
        "left out",
        "EPLB on the mean",
        "EPLB on the scaled mean",
        "search",
        "search, worst of the four",
        "new in it",
        "expected with its variances known",
    )
    table = report.table("Fitted to four, judged on the fifth", formats, formats)
    for fold in folds:
        table.row(*fold)


def fits(data: dict[str, Array], slots: int, nodes: int, run: Eplb, seconds: float) -> tuple[mp.Plan, Table, Table]:
    plan = mp.solve(deepseek(data, slots, nodes, risk="worst_workload"), "search", seconds=seconds)
    recorded = run(np.asarray(np.mean(list(data.values()), axis=0)), slots, 8 * nodes)
    even = run(np.asarray(np.mean([scaled(load) for load in data.values()], axis=0)) * 1e6, slots, 8 * nodes)
    return plan, recorded, even


def unforeseen(load: Array, rest: dict[str, Array], slots: int, devices: int) -> tuple[float, float]:
    """What a plan that balances the rest and all their combinations, and knows each expert's variance, must expect of a
    load.

    Returns: (rms of what the rest do not explain, in mean expert loads; the largest device load to expect; both over
    layers)."""
    experts = load.shape[1]
    others = np.stack([scaled(other) for other in rest.values()]) * experts
    rms, largest = [], []
    for layer, target in enumerate(scaled(load) * experts):
        base = others[0, layer]
        directions = (others[1:, layer] - base).T
        found = np.linalg.lstsq(directions, target - base, rcond=None)[0]
        variance = (target - base - directions @ found) ** 2
        rms.append(np.sqrt(variance.mean()))
        replicas = np.ones(experts)
        for _ in range(slots - experts):
            replicas[int((variance / replicas - variance / (replicas + 1)).argmax())] += 1
        deviation = np.sqrt((variance / replicas).sum() / devices) * devices / experts
        largest.append(1 + EXPECTED_LARGEST[devices] * deviation)
    return float(np.mean(rms)), float(np.mean(largest))


def groups_on_nodes(report: Report, data: dict[str, Array], seconds: float) -> None:
    formats = fractions(
        "slots, devices", "plan", "one workload: off home", "max/mean", "all workloads: off home", "worst max/mean"
    )
    table = report.table("Groups on nodes: node traffic against balance", formats, formats)
    first = next(iter(data))
    mean = np.asarray(np.mean([scaled(load) for load in data.values()], axis=0))
    for slots, nodes in CLUSTERS:
        devices = 8 * nodes
        for name, groups in (("eplb hierarchical", 8), ("eplb global", 1)):
            alone = rebalance(data[first], slots, groups, nodes if groups > 1 else 1, devices)
            shared = rebalance(mean, slots, groups, nodes if groups > 1 else 1, devices)
            table.row(
                f"{slots}, {devices}",
                name,
                off_home(data[first], alone, nodes),
                imbalance(data[first], alone, devices),
                off_home(mean, shared, nodes),
                max(imbalance(load, shared, devices) for load in data.values()),
            )
        for most in (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5):
            alone_plan = mp.solve(
                deepseek({first: data[first]}, slots, nodes), "search", seconds=seconds, off_home=most
            )
            shared_plan = mp.solve(
                deepseek(data, slots, nodes, risk="worst_workload"), "search", seconds=seconds, off_home=most
            )
            table.row(
                f"{slots}, {devices}",
                f"search, off_home={most:g}",
                off_home(data[first], alone_plan.physical_to_logical, nodes),
                of_plan(alone_plan, data[first]),
                off_home(mean, shared_plan.physical_to_logical, nodes),
                max(of_plan(shared_plan, load) for load in data.values()),
            )


def off_home(load: Array, table: Table, nodes: int, groups: int = 8) -> float:
    """Share of the load served off its group's home node, for the best choice of homes, as many groups a node; mean
    over layers.

    Splits are equal. A token of top-8 visits on average at most 8 times that many more nodes than its groups' homes.
    """
    result = []
    for amount, held in zip(load, table, strict=True):
        served = amount[held] / np.bincount(held, minlength=len(amount))[held]
        at = np.zeros((groups, nodes))
        np.add.at(at, (held // (len(amount) // groups), np.repeat(np.arange(nodes), len(held) // nodes)), served)
        spread = np.repeat(at, groups // nodes, axis=1)
        chosen = linear_sum_assignment(-spread)
        # Rounding may leave a little below nothing.
        result.append(max(0.0, 1 - spread[chosen].sum() / amount.sum()))
    return float(np.mean(result))


def losses(figures: dict[str, float], own: dict[str, float]) -> dict[str, float]:
    return {name: figures[name] / own[name] - 1 for name in own}


def languages(report: Report, path: Path, seconds: float) -> None:
    """English and Hebrew, fitted on two question sets, judged on the third.

    Loss: device load max/mean over that of the language's own plan fitted on the same two sets.
    """
    with np.load(path) as file:
        data = {key: np.asarray(file[key], dtype=np.float64) for key in file.files}
    sets = sorted({key.split("/")[0] for key in data})
    tongues = sorted({key.split("/")[1] for key in data})
    model = mp.ModelSpec(layers=48, experts=128, top_k=8, hidden_size=2048, ffn_size=768)
    topology = mp.Topology.preset("h100-hgx")

    def fit(counts: dict[str, Array], risk: str) -> mp.Plan:
        problem = mp.Problem(
            model, topology, mp.RoutingStatistics.from_counts(counts), mp.Objective(risk=risk), slots=136
        )
        return mp.solve(problem, "search", seconds=seconds)

    formats = fractions("judged on", "plan", *(f"{t}: max/mean" for t in tongues))
    formats |= {"worst loss": ".2%", "to the mean's": ".2f"}
    table = report.table("Robustness: Qwen3-30B-A3B in two languages", formats, formats)
    for out in sets:
        fitted = {t: np.asarray(sum(scaled(data[f"{s}/{t}"]) for s in sets if s != out)) for t in tongues}
        for judged, name in ((out, "left out"), ("", "fitted")):
            loads = {t: data[f"{judged}/{t}"] if judged else fitted[t] for t in tongues}
            own = {t: of_plan(fit({t: fitted[t]}, "mean"), loads[t]) for t in tongues}
            mean = np.asarray(sum(fitted.values()))
            eplb = rebalance(mean, 136, 1, 1, 8)
            by_plan = {
                "eplb on the mean": {t: imbalance(x, eplb, 8) for t, x in loads.items()},
                "search on the mean": {t: of_plan(fit({"": mean}, "mean"), x) for t, x in loads.items()},
            }
            plan = fit(fitted, "regret")
            by_plan["search, regret"] = {t: of_plan(plan, x) for t, x in loads.items()}
            base = max(losses(by_plan["search on the mean"], own).values())
            for label, figures in by_plan.items():
                worst = max(losses(figures, own).values())
                table.row(
                    f"{out}, {name}" if judged else f"the other two, {name}",
                    label,
                    *[figures[t] for t in tongues],
                    worst,
                    worst / base,
                )


def domains(report: Report, path: Path) -> None:
    """Transitions and loads of top-1 experts: what a context-coherent layer with one expert a token moves by.

    Steps are drawn from the transitions, others to judge than to fit. Loss: predicted step time over that of the
    domain's own plan, the better of two seeds.
    """
    names = ("c4", "book", "wikipedia")
    with np.load(path) as file:
        recorded = {n: np.asarray(file[f"olmoe_1b_7b/{n}/transitions_top1"], dtype=np.float64) for n in names}
    model = mp.ModelSpec(layers=3, experts=64, top_k=1, hidden_size=2048, ffn_size=1024)
    topology, coherent = mp.Topology.preset("h100-hgx"), mp.Objective(execution="context_coherent")

    def known(parts: dict[str, Array]) -> mp.RoutingStatistics:
        moves = np.stack(list(parts.values()))
        load = np.concatenate([moves.sum(axis=3), moves[:, -1:].sum(axis=2)], axis=1)
        return mp.RoutingStatistics(
            64, (0, 1, 2), load, np.arange(len(parts)), tuple(parts), top_k=1, transitions=moves
        )

    steps = {n: sample_tokens(known({n: m}), 1, 65_536, seed=1).prefill_steps(4096, 16, 1) for n, m in recorded.items()}
    for slots in (64, 72):

        def fit(parts: dict[str, Array], risk: str, seed: int = 0, slots: int = slots) -> dict[str, float]:
            problem = mp.Problem(model, topology, known(parts), coherent.replace(risk=risk), slots=slots)
            plan = mp.solve(problem, "search", seed=seed, batch="prefill", step_tokens=4096, proposals=DOMAIN_PROPOSALS)
            return {n: float(mp.evaluate(plan, judged, problem).step_seconds.mean()) for n, judged in steps.items()}

        own = {n: min(fit({n: m}, "mean", seed)[n] for seed in (0, 1)) for n, m in recorded.items()}
        percent = dict.fromkeys((*(f"loss on {n}" for n in names), "worst loss"), ".1%")
        table = report.table(
            f"OLMoE, {slots} slots",
            ("fitted on", "plan", *percent, "to the mean's"),
            percent | {"to the mean's": ".2f"},
        )
        for out in ("", *names):
            parts = {n: m for n, m in recorded.items() if n != out}
            lost = {
                "the mean": losses(fit({"mean": np.asarray(sum(parts.values()))}, "mean"), own),
                "regret": losses(fit(parts, "regret"), own),
            }
            base = lost["the mean"][out] if out else max(lost["the mean"].values())
            for label, each in lost.items():
                worst = each[out] if out else max(each.values())
                table.row(
                    f"all but {out} (worst: on {out})" if out else "all",
                    label,
                    *[each[n] for n in names],
                    worst,
                    worst / base,
                )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--eplb", type=Path, help="eplb.py of github.com/deepseek-ai/EPLB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="a solve that has no end of its own")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)


def run(options: argparse.Namespace, report: Report) -> None:
    with np.load(options.data / "deepseek_v3_counts.npz") as file:
        data = {key: np.asarray(file[key][3:], dtype=np.float64) for key in file.files}
    eplb = published(options.eplb)
    if "one" in options.parts:
        one_workload(report, data, eplb, options.repeats)
    if "all" in options.parts:
        all_workloads(report, data, eplb[1], options.seconds)
    if "groups" in options.parts:
        groups_on_nodes(report, data, options.seconds / 4)
    if "languages" in options.parts:
        languages(report, options.data / "qwen3_30b_load.npz", options.seconds / 4)
    if "domains" in options.parts:
        domains(report, options.data / "olmoe_mixtral_counts.npz")
