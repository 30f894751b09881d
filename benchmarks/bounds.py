"""How far from the optimum plans can be: bounds of single terms, after a little work, and certified, beside what was found.

    python benchmarks/bounds.py --data ../shared/data --out docs/results/bounds.md

gpt-oss-20b's recorded routing on clusters of 8, 16 and 32 devices, both execution modes, decode and prefill; transitions of
OLMoE (64 experts, top-8) and Mixtral (8, top-2) between the layers recorded; and steps of DeepSeek-V3's shape (58 layers, 256 experts, top-8) with
its recorded loads. DeepSeek's tokens are drawn: each takes its 8 experts by the layer's recorded loads, 4 of them among the 32
experts of one of 8 groups, so that experts of a group are used together as group-limited routing makes them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import moeplace as mp
from moeplace.solvers.base import Budget
from moeplace.solvers.certify.transitions import kept_at_most, spectral_kept
from moeplace.solvers.exflow_start import assignment_sweeps, local_weight

GPT_OSS = mp.ModelSpec(
    name="gpt-oss-20b", layers=24, experts=32, top_k=4, hidden_size=2880, ffn_size=2880, expert_dtype="mxfp4"
)
CLUSTERS = ((1, 8), (2, 4), (2, 8), (4, 8))
BATCHES = (("decode", 128), ("prefill", 4096))
MODES = ("dispatch_combine", "context_coherent")


def gpt_oss(data: Path) -> mp.RoutingStatistics:
    """Statistics of the recorded routing."""
    arrays = np.load(data / "gpt_oss_20b_routing.npz", allow_pickle=False)
    trace = mp.RoutingTrace.from_arrays(
        arrays["expert_ids"], num_experts=32, sequence=arrays["sequence"], position=arrays["position"]
    )
    return mp.RoutingStatistics.from_trace(trace)


def deepseek(data: Path, layers: int, tokens: int, seed: int = 0) -> tuple[mp.ModelSpec, mp.RoutingStatistics]:
    """DeepSeek-V3's shape with tokens drawn as the module says."""
    rng = np.random.default_rng(seed)
    counts = np.load(data / "deepseek_v3_counts.npz", allow_pickle=False)
    load = counts[sorted(counts.files)[0]].astype(np.float64)
    load = load[load.sum(axis=1) > 0][:layers]
    ids = np.empty((tokens, layers, 8), dtype=np.uint8)
    for layer, row in enumerate(load):
        # Gumbel keys draw without replacement in proportion to load.
        keys = np.log(row / row.sum() + 1e-9) + rng.gumbel(size=(tokens, 256))
        group = (keys.reshape(tokens, 8, 32).max(axis=2)).argmax(axis=1)
        inside = np.where(np.arange(256) // 32 == group[:, None], keys, -np.inf)
        first = np.argpartition(-inside, 4, axis=1)[:, :4]
        np.put_along_axis(keys, first, -np.inf, axis=1)
        ids[:, layer] = np.hstack([first, np.argpartition(-keys, 4, axis=1)[:, :4]])
    spec = mp.ModelSpec(
        name="deepseek-v3",
        layers=layers,
        experts=256,
        top_k=8,
        hidden_size=7168,
        ffn_size=2048,
        groups=8,
        expert_dtype="fp8",
    )
    trace = mp.RoutingTrace.from_arrays(ids, num_experts=256, sequence=np.arange(tokens) // 8)
    return spec, mp.RoutingStatistics.from_trace(trace)


def row(label: str, problem: mp.Problem, seconds: float, certify: float, batch: str, tokens: int) -> str:
    """A line of the table: the plan's step time, and the gap before, without and with time for the bound."""
    began = time.perf_counter()
    plan = mp.solve(problem, "search", seconds=seconds, batch=batch, step_tokens=tokens, certify=certify)
    took = time.perf_counter() - began
    assert plan.certificate is not None
    value, history = plan.certificate.value, plan.provenance.history
    bounds = [bound for _, _, bound in history if bound is not None]
    single = 1.0 - bounds[0] / value
    early = max(
        (bound for at, _, bound in history if bound is not None and at <= seconds + 0.25 * certify), default=bounds[0]
    )
    cells = [label, f"{batch} {tokens}", f"{value * 1e3:.3f}", f"{single:.1%}", f"{1.0 - early / value:.1%}"]
    return "| " + " | ".join([*cells, f"{plan.gap:.1%}", f"{took:.0f}"]) + " |"


def step_rows(data: Path, seconds: float, certify: float) -> Iterator[str]:
    """Lines of gpt-oss-20b."""
    statistics = gpt_oss(data)
    for nodes, devices in CLUSTERS:
        for mode in MODES:
            for batch, tokens in BATCHES:
                problem = mp.Problem(
                    model=GPT_OSS,
                    topology=mp.Topology.preset("h100-hgx", nodes=nodes, devices_per_node=devices),
                    statistics=statistics,
                    objective=mp.Objective(execution=mode),  # type: ignore[arg-type]
                )
                yield row(f"{nodes} x {devices}, {mode}", problem, seconds, certify, batch, tokens)


def deepseek_rows(data: Path, layers: int, seconds: float, certify: float) -> Iterator[str]:
    """Lines of DeepSeek-V3's shape, 288 slots on 32 devices."""
    spec, statistics = deepseek(data, layers, tokens=16_384)
    for batch, tokens in (("decode", 2048), ("prefill", 8192)):
        problem = mp.Problem(
            model=spec,
            topology=mp.Topology.preset("h100-hgx", nodes=4),
            statistics=statistics,
            slots=288,
            objective=mp.Objective(dispatch_dtype="fp8", split="free"),
        )
        yield row(f"4 x 8, dispatch_combine, {layers} layers", problem, seconds, certify, batch, tokens)


def transition_rows(data: Path, seconds: float) -> Iterator[str]:
    """Lines of kept transitions: found by sweeps of linear assignment, and at most by each bound."""
    counts = np.load(data / "olmoe_mixtral_counts.npz", allow_pickle=False)
    for key in sorted(name for name in counts.files if name.endswith("/transitions")):
        weights = counts[key].astype(np.float64)
        experts = weights.shape[1]
        for devices in (2, 4) if experts == 8 else (4, 8):
            slots = np.full(devices, experts // devices)
            total = float(weights.sum())
            found = local_weight(weights, assignment_sweeps(weights, slots, Budget(3.0))) / total
            began = time.perf_counter()
            spectral = sum(spectral_kept(matrix, slots) for matrix in weights) / total
            between = time.perf_counter()
            semidefinite = kept_at_most(weights, slots, seconds) / total
            after = time.perf_counter()
            gap = 1.0 - (1.0 - semidefinite) / (1.0 - found)
            cells = [key.removesuffix("/transitions"), str(devices), f"{found:.4f}", f"{min(spectral, 9.99):.4f}"]
            cells += [
                f"{semidefinite:.4f}",
                f"{gap:.1%}",
                f"{1e3 * (between - began):.0f} ms",
                f"{after - between:.1f} s",
            ]
            yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of recorded routing")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each search")
    parser.add_argument("--certify", type=float, default=20.0, help="seconds for each bound")
    parser.add_argument("--layers", type=int, default=58, help="of DeepSeek-V3's shape")
    parser.add_argument("--deepseek-seconds", type=float, default=120.0, help="of its search, and of its bound")
    arguments = parser.parse_args()
    header = "| {} | steps | found ms | gap, single terms | after a quarter of the time | certified | s |\n|---|---|---|---|---|---|---|"
    text = [
        "# Bounds",
        "",
        f"`search` for {arguments.seconds:g} s, then {arguments.certify:g} s for the bound, h100-hgx, mean risk, on 2 busy CPU cores. Found: the plan's",
        "predicted step time on the scenario steps. Gap: how far below it the optimum can be, by the bound of single terms and by relaxed",
        "Gram matrices ([bounds.md](../bounds.md)).",
        "",
        f"    python benchmarks/bounds.py --data DATA --out docs/results/bounds.md --seconds {arguments.seconds:g} "
        f"--certify {arguments.certify:g} --layers {arguments.layers} --deepseek-seconds {arguments.deepseek_seconds:g}",
        "",
        "## gpt-oss-20b: 24 layers, 32 experts, top-4",
        "",
        header.format("nodes x devices, mode"),
    ]

    def add(lines: Iterator[str]) -> None:
        for line in lines:
            print(line, flush=True)
            text.append(line)

    add(step_rows(arguments.data, arguments.seconds, arguments.certify))
    text += ["", f"## DeepSeek-V3's shape: {arguments.layers} layers, 256 experts, top-8, 288 slots", ""]
    text += [" ".join((__doc__ or "").split("DeepSeek's tokens are drawn:")[1].split()).capitalize(), ""]
    text += [
        f"{arguments.deepseek_seconds:g} s of search and as many for the bound.",
        "",
        header.format("nodes x devices, mode"),
    ]
    add(deepseek_rows(arguments.data, arguments.layers, arguments.deepseek_seconds, arguments.deepseek_seconds))
    text += [
        "",
        "## Transitions kept on a device, share of all",
        "",
        "OLMoE (64 experts) and Mixtral (8), recorded between layers 0, 7 and 15. Found by sweeps of linear assignment; the gap is that of the",
        "share that changes device.",
        "",
        "| model and text | devices | found | spectral | semidefinite | gap | spectral took | semidefinite took |",
        "|---|---|---|---|---|---|---|---|",
    ]
    add(transition_rows(arguments.data, arguments.certify))
    arguments.out.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
