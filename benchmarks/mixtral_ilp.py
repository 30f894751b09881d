"""ExFlow's integer program on a model of Mixtral's shape: what HiGHS and CBC reach, beside the proven optimum.

    python -m benchmarks mixtral_ilp --seconds 60 --write

32 layers of 8 experts on 2 and 4 devices. Recorded are Mixtral-8x7B's highest-weight experts at layers 0, 7 and 15 only
(205k tokens of each of C4, books and Wikipedia), so the 31 neighbouring pairs are made from those two transition matrices:
pair t mixes the three domains' matrices of 0 to 7 (t even) or 7 to 15 (t odd) with random weights, scales each row to the
tokens that the previous pair brought its expert, so that flows join up, and renames the experts of every layer at random.
Rows "cold" run the program alone; "warm" start it from assignment sweeps, as the solver does unless told otherwise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from runner import Report, data_argument

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


def recorded_transitions(data: Path, model: str, *, top1: bool = False) -> npt.NDArray[np.float64]:
    """[domain, pair, E, E] recorded between layers 0, 7 and 15, of all choices or of the highest-weight ones."""
    counts = np.load(data / "olmoe_mixtral_counts.npz", allow_pickle=False)
    kind = "transitions_top1" if top1 else "transitions"
    return np.stack([counts[f"{model}/{domain}/{kind}"] for domain in DOMAINS]).astype(np.float64)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data_argument(parser)
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of each solve")
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seed", type=int, default=0, help="of the made transitions and of the solvers")


def run(options: argparse.Namespace, report: Report) -> None:
    transitions = transitions_of_a_whole_model(
        recorded_transitions(options.data, "mixtral_8x7b", top1=True), options.seed
    )
    columns = {
        "devices": "",
        "solver": "",
        "transitions local": ".4f",
        "proven at most": ".4f",
        "gap": ".2%",
        "proven optimal": "",
        "seconds": ".3f",
    }
    table = report.table("ExFlow's integer program on Mixtral's shape", columns, columns)
    for devices in options.devices:
        problem = problem_of(transitions, devices)
        for name, (solver, own) in RUNS.items():
            try:
                plan = mp.solve(problem, solver, seconds=options.seconds, seed=options.seed, **own)
            except mp.SolveError as error:
                table.row(devices, name, str(error), None, None, None, None)
                continue
            assert plan.certificate is not None
            assert plan.bound is not None
            local, most = 1.0 - plan.certificate.value, 1.0 - plan.bound
            proven = "yes" if plan.proven_optimal else "no"
            table.row(devices, name, local, most, plan.gap, proven, plan.provenance.seconds)
