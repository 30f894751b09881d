"""Draws the figures of these pages: python docs/figures/draw.py [name ...]. Needs matplotlib, which nothing else does.

Every figure is computed by moeplace on routing generated here, with the skew and affinity of a trained model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import moeplace as mp
from moeplace.placement.cost import ExpertCost
from moeplace.placement.files import replacing

HERE = Path(__file__).resolve().parent
SPEC = mp.ModelSpec(layers=4, experts=32, top_k=4, hidden_size=2880, ffn_size=2880)
PARTS = ("compute", "dispatch", "combine")
BESIDE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "va": "center"}
INK, BLUE, ORANGE, GREEN, GREY = "#222222", "#3b6fb6", "#d9822b", "#4f9a5f", "#9a9a9a"


def routing(sequences: int = 200, length: int = 400, layers: int = 4, experts: int = 32, top_k: int = 4) -> Any:
    """Tokens of 200 kinds, each kind with likings for experts in every layer that kinds of one theme share.

    With 32 experts, top-4: expert load max/mean 2 to 3 a layer, and an expert's four likeliest successors take 44 % of
    its tokens, as in gpt-oss-20b.
    """
    rng = np.random.default_rng(0)
    kinds, themes, topics = 200, 12, 4
    mix = rng.dirichlet(np.full(kinds, 0.15), size=topics)
    topic = rng.integers(topics, size=sequences)
    kind = np.concatenate([rng.choice(kinds, size=length, p=mix[t]) for t in topic])
    theme = rng.integers(themes, size=kinds)
    ids = np.empty((len(kind), layers, top_k), dtype=np.int64)
    for layer in range(layers):
        liking = 3.5 * rng.normal(size=(themes, experts))[theme] + rng.normal(size=(kinds, experts))
        liking += 0.5 * rng.normal(size=experts)
        noisy = liking[kind] + rng.gumbel(size=(len(kind), experts))
        ids[:, layer] = np.argsort(-noisy, axis=1)[:, :top_k]
    return mp.RoutingTrace.from_arrays(ids, num_experts=experts, sequence=np.repeat(np.arange(sequences), length))


def problem_on(preset: str, nodes: int, devices: int, train: mp.RoutingTrace, **changes: Any) -> mp.Problem:
    topology = mp.Topology.preset(preset, nodes=nodes, devices_per_node=devices)
    statistics = mp.RoutingStatistics.from_trace(train)
    return mp.Problem(model=SPEC, topology=topology, statistics=statistics, **changes)


def cost_knee(plt: Any) -> Any:
    """Where the step time goes as steps grow, and what a placement changes of it."""
    train, held = routing().split(held_out=0.25, seed=0)
    sizes = [16, 64, 256, 1024, 4096, 16384]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6))
    for preset, colour in (("h100-hgx", BLUE), ("a100-pcie", ORANGE)):
        problem = problem_on(preset, 2, 4, train, objective=mp.Objective(dispatch_dtype="fp8"))
        plans = {name: mp.solve(problem, name) for name in ("contiguous", "eplb")}
        parts: list[list[float]] = []
        saved: dict[str, list[float]] = {"eplb": [], "search": []}
        for tokens in sizes:
            steps = held.decode_steps(tokens, max(4, 4096 // tokens), seed=0)
            plans["search"] = mp.solve(problem, "search", step_tokens=tokens, proposals=3000)
            judged = {name: mp.evaluate(plan, steps, problem) for name, plan in plans.items()}
            base = judged["contiguous"]
            parts.append([part.sum(axis=1).mean() * 1e3 for part in (base.compute, base.dispatch, base.combine)])
            for name, values in saved.items():
                values.append(100 * (1 - judged[name].step_seconds.mean() / base.step_seconds.mean()))
        if preset == "h100-hgx":
            left.plot(sizes, np.sum(parts, axis=1), color=INK, linewidth=2, label="step")
            for values, name, tone in zip(np.transpose(parts), PARTS, (GREY, BLUE, ORANGE), strict=True):
                left.plot(sizes, values, "o-", markersize=3, color=tone, label=name)
            left.axvline(knee(problem), color=INK, linewidth=0.8, linestyle=":")
            left.annotate("knee", (knee(problem) * 1.06, 0.03), xycoords=left.get_xaxis_transform())
        for name, values in saved.items():
            style = {"eplb": "--", "search": "-"}[name]
            right.plot(sizes, values, style, marker="o", markersize=3, color=colour, label=f"{name}, {preset}")
    left.set_title("index order on h100-hgx")
    left.set_ylabel("ms a step")
    left.set_yscale("log")
    left.set_yticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    right.set_title("step time saved against index order")
    right.set_ylabel("%")
    right.axhline(0, color=INK, linewidth=0.6)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.set_xlabel("tokens a step")
        axes.legend(loc="upper left")
    return figure


def knee(problem: mp.Problem) -> float:
    """Tokens a step from which an expert of average load computes for longer than its weights are read."""
    work = ExpertCost.of(SPEC, problem.topology)
    return float(work.read[1, 0] / work.pair[0, 0] * SPEC.experts / SPEC.top_k)


def solvers(plt: Any) -> Any:
    """What each solver's plan trades, and what of it the step time shows."""
    train, held = routing().split(held_out=0.25, seed=0)
    steps = held.decode_steps(128, 100, seed=0)
    objectives = (mp.Objective(execution="dispatch_combine"), mp.Objective(execution="context_coherent"))
    problems = [problem_on("a100-pcie", 2, 4, train, objective=objective) for objective in objectives]
    options: dict[str, dict[str, Any]] = {
        "contiguous": {},
        "random": {},
        "eplb": {},
        "moetuner": {"seconds": 60},
        "exflow": {"seconds": 60},
        "search": {"proposals": 8000},
    }
    colours = dict(zip(options, (INK, GREY, ORANGE, "#b8860b", GREEN, BLUE), strict=True))
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 3.5), gridspec_kw={"width_ratios": [1, 1, 1.1]})
    base = [0.0, 0.0]
    for row, name in enumerate(options):
        plan = mp.solve(problems[0], name, **options[name])
        plans = [plan, mp.solve(problems[1], name, **options[name]) if name == "search" else plan]
        judged = [mp.evaluate(*args) for args in zip(plans, (steps, steps), problems, strict=True)]
        for mode, evaluation in enumerate(judged):
            mean = float(evaluation.step_seconds.mean())
            base[mode] = base[mode] or mean
            saved = 100 * (1 - mean / base[mode])
            axes[2].barh(row + 0.36 * mode, saved, 0.34, color=colours[name], alpha=(1.0, 0.45)[mode])
            axes[2].annotate(f"{saved:.1f}", (max(saved, 0), row + 0.36 * mode), (3, 0), **BESIDE)
        figures = judged[0].summary()
        for panel, key in enumerate(("devices_per_token", "nodes_per_token")):
            axes[panel].plot(figures[key], figures["load_max_mean"], "o", color=colours[name])
            offset = (-6, 5) if name == "moetuner" else (5, 3)
            side = "right" if name == "moetuner" else "left"
            axes[panel].annotate(
                name, (figures[key], figures["load_max_mean"]), offset, **(BESIDE | {"ha": side, "va": "bottom"})
            )
    for panel, key in enumerate(("devices", "nodes")):
        axes[panel].set_xlabel(f"{key} a token")
        axes[panel].set_ylabel("device load max/mean a step")
        axes[panel].margins(x=0.3, y=0.12)
    axes[2].set_yticks([row + 0.18 for row in range(len(options))], list(options))
    axes[2].invert_yaxis()
    axes[2].margins(x=0.15)
    axes[2].set_xlabel("% of step time saved against contiguous\ndark: dispatch_combine\nlight: context_coherent")
    return figure


def bounds(plt: Any) -> Any:
    """Values of plans and their proven bounds as problems grow."""
    train = routing(sequences=60)
    figure, (load, step, crossing) = plt.subplots(1, 3, figsize=(10.4, 3.5))
    devices = [2, 4, 8, 16, 32]
    for slots, colour in ((32, BLUE), (64, ORANGE)):
        plans = [
            mp.solve(problem_on("h100-hgx", max(1, count // 8), min(8, count), train, slots=slots), "eplb")
            for count in devices
        ]
        _value_and_bound(load, devices, plans, colour, f"eplb, {slots} slots")
    load.set_title("average load")
    load.set_ylabel("device load max/mean")
    for tokens, colour in ((128, BLUE), (8192, ORANGE)):
        plans = []
        for count in devices:
            problem = problem_on("h100-hgx", max(1, count // 8), min(8, count), train)
            plans.append(mp.solve(problem, "search", proposals=2000, step_tokens=tokens))
        _value_and_bound(step, devices, plans, colour, f"search, {tokens:,} tokens", 1e3)
    step.set_title("step time")
    step.set_yscale("log")
    step.set_yticks([0.4, 1, 2, 4], ["0.4", "1", "2", "4"])
    step.minorticks_off()
    step.set_ylabel("ms")
    for axes in (load, step):
        axes.set_xscale("log", base=2)
        axes.set_xticks(devices, [str(count) for count in devices])
        axes.set_xlabel("devices, 8 a node")
    experts = [8, 12, 16, 24, 32]
    plans = []
    for count in experts:
        few = routing(sequences=60, experts=count, top_k=2)
        problem = mp.Problem(
            model=SPEC.replace(experts=count, top_k=2),
            topology=mp.Topology.preset("h100-hgx", devices_per_node=4),
            statistics=mp.RoutingStatistics.from_trace(few),
            objective=mp.Objective(execution="context_coherent"),
        )
        plans.append(mp.solve(problem, "exflow", seconds=10))
        if count == experts[0]:
            exact = mp.solve(problem, "chain")
            crossing.plot(count, exact.bound, "D", markersize=8, fillstyle="none", color=INK, label="chain, proven")
    _value_and_bound(crossing, experts, plans, GREEN, "exflow")
    crossing.set_title("transitions, 4 devices")
    crossing.set_xlabel("experts a layer")
    crossing.set_ylabel("share that changes device")
    crossing.set_ylim(0, 0.8)
    for axes in (load, step, crossing):
        axes.legend(fontsize=8)
    return figure


def _value_and_bound(axes: Any, x: list[int], plans: list[mp.Plan], colour: str, name: str, scale: float = 1.0) -> None:
    values, least = [], []
    for plan in plans:
        assert plan.certificate is not None
        assert plan.bound is not None
        values.append(plan.certificate.value * scale)
        least.append(plan.bound * scale)
    axes.plot(x, values, "o-", markersize=4, color=colour, label=name)
    axes.plot(x, least, "--", color=colour, label="bound")
    axes.fill_between(x, least, values, color=colour, alpha=0.12, linewidth=0)


def what_if(plt: Any) -> Any:
    """What a lost device costs a plan as is, repaired and solved anew; and what surviving it costs beforehand."""
    train, held = mp.read_trace(HERE.parents[1] / "examples" / "data" / "olmoe_small").split(held_out=0.25, seed=0)
    model = mp.ModelSpec(layers=8, experts=32, top_k=2, hidden_size=2048, ffn_size=1024)
    topology = mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=4)
    statistics = mp.RoutingStatistics.from_trace(train)
    steps = held.decode_steps(128, 100, seed=0)
    quick: dict[str, Any] = {"seconds": None, "options": {"proposals": 6000}}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6))
    problem = mp.Problem(model, topology, statistics, mp.Objective(split="free"))
    styles = {
        None: ("o", BLUE, "nothing asked"),
        "device": ("D", ORANGE, "device failures"),
        "node": ("s", GREEN, "node failures"),
    }
    front = mp.pareto(problem, steps, **quick)
    for kind, (mark, colour, label) in styles.items():
        points = [point for point in front.points if point.config is not None and point.config.tolerate == kind]
        memory, times = [point.memory / 1e9 for point in points], [point.seconds * 1e3 for point in points]
        left.plot(memory, times, mark, color=colour, label=label)
        for point, x, y in zip(points, memory, times, strict=True):
            if kind is not None:
                left.annotate(
                    f"{point.survived['device']}/8, {point.survived['node']}/2",
                    (x, y),
                    xytext=(6, 5 if kind == "device" else -6),
                    **BESIDE,
                )
    left.set_title("asked to survive (devices, nodes survived)")
    left.set_xlabel("expert weights on a device (GB)")
    left.set_ylabel("step ms")
    left.margins(x=0.22, y=0.35)
    left.legend(loc="upper right")
    plan = mp.solve(replace(problem, slots=40), "search", proposals=6000)
    result = mp.what_if(plan, replace(problem, slots=40), steps, **quick)
    names = [outcome.change.name.replace(":", " ") for outcome in result.outcomes]
    for offset, part, colour in ((-0.2, "repaired", ORANGE), (0.2, "ready", BLUE)):
        found = [getattr(outcome, part) for outcome in result.outcomes]
        times = [judged.evaluation.step_seconds.mean() * 1e3 for judged in found]
        right.bar(np.arange(len(names)) + offset, times, 0.4, color=colour, label=part)
    right.axhline(result.before.step_seconds.mean() * 1e3, color=INK, linewidth=0.8, linestyle=":", label="now")
    right.set_xticks(range(len(names)), names, rotation=45, ha="right")
    right.set_title("40 slots, one failure at a time")
    right.set_ylabel("step ms")
    right.margins(y=0.2)
    right.legend(loc="upper right", ncols=3)
    return figure


FIGURES: dict[str, Callable[[Any], Any]] = {
    "cost_knee": cost_knee,
    "solvers": solvers,
    "bounds": bounds,
    "what_if": what_if,
}


def main(names: Iterable[str]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            # The same figures give the same file, byte for byte.
            "svg.hashsalt": "moeplace",
            "svg.fonttype": "path",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
    for name in names or FIGURES:
        figure = FIGURES[name](plt)
        figure.tight_layout()
        with replacing(HERE / f"{name}.svg") as scratch:
            figure.savefig(scratch, format="svg", metadata={"Date": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])
