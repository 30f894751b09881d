"""ExFlow's integer program on a model of Mixtral's shape: what HiGHS and CBC reach, beside the proven optimum.

    python benchmarks/mixtral_ilp.py --data DATA --seconds 60

32 layers of 8 experts on 2 and 4 devices. Recorded are Mixtral-8x7B's highest-weight experts at layers 0, 7 and 15 only
(205k tokens of each of C4, books and Wikipedia), so the 31 neighbouring pairs are made from those two transition matrices:
pair t mixes the three domains' matrices of 0 to 7 (t even) or 7 to 15 (t odd) with random weights, scales each row to the
tokens that the previous pair brought its expert, so that flows join up, and renames the experts of every layer at random.
Rows "cold" run the program alone; "warm" start it from assignment sweeps, as the solver does unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import moeplace as mp

LAYERS, EXPERTS = 32, 8
DOMAINS = ("c4", "book", "wikipedia")
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "chain": ("chain", {"minimise": "transitions"}),
    "HiGHS, cold": ("exflow", {"backend": "highs", "warm_start": False}),
    "CBC, cold": ("exflow", {"backend": "cbc", "warm_start": False}),
    "HiGHS, warm": ("exflow", {"backend": "highs"}),
    "CBC, warm": ("exflow", {"backend": "cbc"}),
}


def transitions_of_a_whole_model(
    recorded: npt.NDArray[np.float64], seed: int, layers: int = LAYERS
) -> npt.NDArray[np.float64]:
    """[layers - 1, E, E] transitions in whole tokens from recorded ones [domain, pair, E, E], as the module says."""
    rng, experts = np.random.default_rng(seed), recorded.shape[-1]
    share = recorded / recorded.sum(axis=(2, 3), keepdims=True)
    arriving = recorded[:, 0].sum(axis=(0, 2))
    names = rng.permutation(experts)
    result = np.zeros((layers - 1, experts, experts))
    for t in range(layers - 1):
        mixed = np.tensordot(rng.dirichlet(np.ones(len(recorded))), share[:, t % 2], axes=1)
        flow = arriving[:, None] * mixed / mixed.sum(axis=1, keepdims=True)
        arriving, after = flow.sum(axis=0), rng.permutation(experts)
        result[t][np.ix_(names, after)] = np.rint(flow)
        names = after
    return result


def problem_of(transitions: npt.NDArray[np.float64], devices: int) -> mp.Problem:
    statistics = mp.RoutingStatistics(
        experts=EXPERTS,
        moe_layers=tuple(range(LAYERS)),
        load=np.concatenate([transitions.sum(axis=2), transitions[-1:].sum(axis=1)])[None],
        window_workload=np.zeros(1, np.int64),
        transitions=transitions[None],
        top_k=1,
    )
    model = mp.ModelSpec(
        name="mixtral-shape", layers=LAYERS, experts=EXPERTS, top_k=1, hidden_size=4096, ffn_size=14336
    )
    return mp.Problem(
        model,
        mp.Topology.preset("h200-hgx", devices_per_node=devices),
        statistics,
        mp.Objective(execution="context_coherent"),
    )


def run(problem: mp.Problem, name: str, seconds: float, seed: int) -> dict[str, Any]:
    solver, options = RUNS[name]
    row: dict[str, Any] = {"devices": problem.num_devices, "solver": name}
    try:
        plan = mp.solve(problem, solver, seconds=seconds, seed=seed, **options)
    except mp.SolveError as error:
        return row | {"error": str(error)}
    assert plan.certificate is not None
    assert plan.bound is not None
    return row | {
        "local": 1.0 - plan.certificate.value,
        "at_most": 1.0 - plan.bound,
        "gap": plan.gap,
        "proven_optimal": plan.proven_optimal,
        "stop": plan.provenance.stop,
        "seconds": plan.provenance.seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| devices | solver | transitions local | proven at most | gap | proven optimal | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['devices']} | {row['solver']} | "
        if "error" in row:
            lines.append(f"{start}{row['error']} | | | | |")
            continue
        lines.append(
            f"{start}{row['local']:.4f} | {row['at_most']:.4f} | {row['gap']:.2%} | "
            f"{'yes' if row['proven_optimal'] else 'no'} | {row['seconds']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with olmoe_mixtral_counts.npz")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of each solve")
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seed", type=int, default=0, help="of the made transitions and of the solvers")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    options = parser.parse_args()
    counts = np.load(options.data / "olmoe_mixtral_counts.npz", allow_pickle=False)
    recorded = np.stack([counts[f"mixtral_8x7b/{domain}/transitions_top1"] for domain in DOMAINS]).astype(np.float64)
    transitions = transitions_of_a_whole_model(recorded, options.seed)
    rows = []
    for devices in options.devices:
        problem = problem_of(transitions, devices)
        for name in RUNS:
            print(f"{devices} devices: {name}", file=sys.stderr)
            rows.append(run(problem, name, options.seconds, options.seed))
    print(json.dumps(rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
