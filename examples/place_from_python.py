"""From recorded routing to a judged plan, in Python.

python examples/place_from_python.py                # on the trace in examples/data
python examples/place_from_python.py my/trace       # on a trace you recorded with mp.profile
"""

from __future__ import annotations

import sys
from pathlib import Path

import moeplace as mp

RECORDED = Path(__file__).resolve().parent / "data" / "olmoe_small"


def main(path: str) -> None:
    trace = mp.read_trace(path)
    train, held = trace.split(by="sequence", held_out=0.25, seed=0)
    steps = held.decode_steps(concurrency=128, steps=200, seed=0)

    problem = mp.Problem(train, mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=4))
    today = mp.solve(problem, solver="contiguous")
    plan = mp.solve(problem, solver="search", seconds=10, seed=0)
    assert plan.certificate is not None

    for name, candidate in (("contiguous", today), ("search", plan)):
        figures = mp.evaluate(candidate, steps, problem).summary()
        print(
            f"{name:<12} step {figures['step_seconds_mean'] * 1e3:.3f} ms, p99 {figures['step_seconds_p99'] * 1e3:.3f} "
            f"ms, load max/mean {figures['load_max_mean']:.2f}, devices a token {figures['devices_per_token']:.2f}"
        )
    print(f"proven: {plan.certificate.objective} is at most {plan.gap:.1%} above what any plan can reach")
    print(plan)
    plan.save("plan.json")
    assert mp.Plan.load("plan.json").fingerprint == plan.fingerprint
    print("wrote plan.json")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(RECORDED))
