"""Whatever stands in for an argument of the public API, the answer is a result or an error of this library by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp

MISTAKES: tuple[Any, ...] = (
    *("5", "", -1, 0, 1.5, float("nan"), float("inf"), True, [], {}, (), b"x"),
    *(object(), np.zeros(0), np.array(3), ["a"], {"a": 1}, lambda: 0),
)


def toy() -> tuple[mp.RoutingTrace, mp.Problem, mp.Plan]:
    rng = np.random.default_rng(0)
    spec = mp.ModelSpec(layers=2, experts=8, top_k=2, hidden_size=64, ffn_size=32)
    ids = np.argsort(rng.random((256, 2, 8)), axis=2)[..., :2]
    trace = mp.RoutingTrace.from_arrays(ids, 8, sequence=np.arange(256) // 8, model=spec)
    problem = mp.Problem(trace, mp.Topology.preset("h100-sxm", devices_per_node=4))
    return trace, problem, mp.solve(problem, "contiguous")


TRACE, PROBLEM, PLAN = toy()
STEPS = mp.problem_steps(TRACE, PROBLEM, count=2)
LOAD = np.arange(32.0).reshape(2, 2, 8) + 1
PATH = Path(__file__)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Batch": (mp.Batch, {"phase": "decode", "tokens_per_device": 8, "weight": 1.0}),
    "Client": (mp.Client, {"url": "http://127.0.0.1:9", "token": None, "timeout": 1.0}),
    "EplbOptions": (mp.EplbOptions, {"hierarchical": None}),
    "Failure": (mp.Failure, {"name": "device:0", "devices": (0,)}),
    "Plan.load": (mp.Plan.load, {"path": PATH}),
    "Plan.select": (PLAN.select, {"layers": [0]}),
    "Problem": (mp.Problem, {"routing": TRACE, "topology": PROBLEM.topology, "slots": 8, "max_moved_bytes": None}),
    "RoutingStatistics.from_counts": (mp.RoutingStatistics.from_counts, {"counts": LOAD, "top_k": 2}),
    "RoutingTrace.split": (TRACE.split, {"by": "sequence", "held_out": 0.25, "seed": 0}),
    "SearchOptions": (mp.SearchOptions, {"batch": None, "proposals": 100, "certify": 0.0}),
    "Topology.load": (mp.Topology.load, {"path": PATH}),
    "Topology.preset": (mp.Topology.preset, {"name": "h100-sxm", "nodes": 1, "devices_per_node": 4}),
    "TraceWriter": (mp.TraceWriter, {"folder": PATH, "num_experts": 8, "top_k": 2, "moe_layers": [0]}),
    "aggregate": (mp.aggregate, {"path": PATH, "sample_tokens": 10, "workers": 1}),
    "check_export": (mp.check_export, {"plan": PLAN, "engine": "vllm"}),
    "decide": (
        mp.decide,
        {
            "current": PLAN,
            "candidates": [PLAN],
            "held_out": STEPS,
            "problem": PROBLEM,
            "resamples": 5,
        },
    ),
    "device_load_certificate": (
        mp.device_load_certificate,
        {"problem": PROBLEM, "table": PLAN.physical_to_logical, "shares": None},
    ),
    "device_loads": (
        mp.device_loads,
        {
            "load": LOAD[0],
            "table": PLAN.physical_to_logical,
            "shares": PLAN.shares,
            "slot_device": PLAN.slot_device,
            "devices": 4,
        },
    ),
    "evaluate": (mp.evaluate, {"plan": PLAN, "held_out": STEPS, "problem": PROBLEM, "seed": 0}),
    "expert_seconds": (
        mp.expert_seconds,
        {"model": PROBLEM.model, "gpu": "h100-sxm", "engine": "vllm", "tokens": [1.0], "experts_hit": [1.0]},
    ),
    "export_plan": (mp.export_plan, {"plan": PLAN, "engine": "no such engine", "path": PATH}),
    "least_device_load": (mp.least_device_load, {"load": LOAD[0], "slots": np.full(4, 2)}),
    "pareto": (
        mp.pareto,
        {
            "problem": PROBLEM,
            "held_out": STEPS,
            "redundant": [0],
            "tolerate": [None],
            "solver": "eplb",
        },
    ),
    "plan_online": (mp.plan_online, {"counts": np.ones((4, 8), int), "homes": np.repeat(np.arange(4), 2), "slots": 1}),
    "problem_steps": (mp.problem_steps, {"routing": TRACE, "problem": PROBLEM, "count": 1, "most_tokens": 99}),
    "read_any": (mp.read_any, {"path": PATH}),
    "read_config": (mp.read_config, {"config": {}, "expert_dtype": None}),
    "read_exported": (
        mp.read_exported,
        {"path": PATH, "engine": "vllm", "model": PROBLEM.model, "topology": PROBLEM.topology},
    ),
    "read_statistics": (mp.read_statistics, {"path": PATH, "limit": 1000}),
    "sample_steps": (
        mp.sample_steps,
        {"load": LOAD, "top_k": 2, "moe_layers": (0, 1), "step_tokens": 4, "steps": 2, "groups": (1, 1)},
    ),
    "sample_tokens": (mp.sample_tokens, {"statistics": PROBLEM.statistics, "top_k": 2, "tokens": 8, "seed": 0}),
    "single_failures": (mp.single_failures, {"topology": PROBLEM.topology, "kinds": ("device",)}),
    "slot_front": (mp.slot_front, {"problem": PROBLEM, "memory_budget": 1e6, "solver": "eplb", "seconds": 1.0}),
    "solve": (mp.solve, {"problem": PROBLEM, "solver": "eplb", "seconds": 1.0, "seed": 0}),
    "what_if": (mp.what_if, {"plan": PLAN, "problem": PROBLEM, "held_out": STEPS, "changes": [], "solver": "eplb"}),
    "write_statistics": (mp.write_statistics, {"statistics": PROBLEM.statistics, "path": PATH / "no folder"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "plan_online" else name for name in CALLS]
)
def test_a_mistaken_argument_ends_in_an_error_of_this_library(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function, right = CALLS[name]
    right = {argument: tmp_path / "none" if value is PATH else value for argument, value in right.items()}
    for argument in right:
        for mistake in MISTAKES:
            try:
                function(**right | {argument: mistake})
            except mp.MoeplaceError:
                continue
            except Exception as error:
                raise AssertionError(
                    f"{name}({argument}={mistake!r}) ends in {type(error).__name__}: {error}"
                ) from error


@pytest.mark.slow
def test_every_public_function_checks_the_types_of_its_arguments() -> None:
    unchecked = []
    for name in mp.__all__:
        try:
            value = getattr(mp, name)
        except ModuleNotFoundError:
            continue
        if inspect.isfunction(value) and inspect.signature(value).parameters and not checks(value):
            unchecked.append(name)
    assert not unchecked


def checks(function: Any) -> bool:
    while not hasattr(function, "checks_types") and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return hasattr(function, "checks_types")


def test_messages_say_what_was_given_expected_and_to_do() -> None:
    with pytest.raises(mp.ArgumentTypeError, match="solve: seconds is '5' .str., expected a number"):
        mp.solve(PROBLEM, seconds="5")  # type: ignore[arg-type]
    with pytest.raises(mp.InputError, match="Batch: phase 'prefil' is unknown; did you mean 'prefill'"):
        mp.Batch("prefil", tokens=8)  # type: ignore[arg-type]
    with pytest.raises(mp.InputError, match="evaluate: plan is missing, expected Plan; get one by solve"):
        mp.evaluate(None, TRACE, PROBLEM)  # type: ignore[arg-type]
    with pytest.raises(mp.InputError, match=r"decide: candidates is .*, expected a sequence of Plan"):
        mp.decide(PLAN, [PLAN, 3], STEPS, PROBLEM)  # type: ignore[list-item]
    with pytest.raises(mp.InputError, match="read_trace: path is '' .str., expected text that names a file"):
        mp.read_trace("")


def test_numbers_of_numpy_are_numbers() -> None:
    options = mp.SearchOptions(proposals=np.int64(9), certify=np.float32(0.5))  # type: ignore[arg-type]
    assert options.changed() == {"proposals": 9, "certify": 0.5}
    assert len(mp.solve(PROBLEM, "random", seed=np.int32(3)).physical_to_logical) == 2  # type: ignore[arg-type]
    assert mp.Batch("decode", tokens=np.uint16(5)).tokens == 5  # type: ignore[arg-type]
