"""Whatever is solved for an engine, its own export accepts: from solves, failures, other clusters, fronts, policies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.engines import engine_profile, target_names
from moeplace.placement.objective import Objective
from moeplace.placement.plan import Provenance
from moeplace.runtime.exporters.running import check_map, compare_map, read_running
from moeplace.solvers.what_if import parse_changes

ENGINES = target_names()
QUICK = {"solver": "search", "options": {"proposals": 50, "steps": 4}}


def recorded(experts: int = 24, groups: int = 1, devices: int = 8, **changes: Any) -> tuple[mp.Problem, mp.Steps]:
    rng = np.random.default_rng(0)
    model = mp.ModelSpec(layers=2, experts=experts, top_k=2, hidden_size=8, ffn_size=8, groups=groups)
    ids = np.argsort(rng.random((400, 2, experts)) * rng.random(experts), axis=2)[:, :, :2]
    trace = mp.RoutingTrace.from_arrays(ids, experts)
    topology = mp.Topology.preset("gb200-nvl72", devices_per_node=devices)
    problem = mp.Problem(model, topology, mp.RoutingStatistics.from_trace(trace), **changes)
    return problem, trace.decode_steps(16, 4, 0)


def accepted(plan: mp.Plan, engine: str, folder: Path) -> bool:
    """Whether the engine's own export takes the plan, and says so in the plan."""
    mp.check_export(plan, engine)
    if engine != "permute":
        mp.export_plan(plan, engine, folder / "plan.json")
    return plan.provenance.engine == engine


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("experts", "groups"), [(24, 1), (24, 4)])
@pytest.mark.long
def test_every_plan_solved_for_an_engine_is_one_it_runs(engine: str, experts: int, groups: int, tmp_path: Path) -> None:
    problem, steps = recorded(experts, groups, engine=engine)
    spare = 0 if engine == "permute" else 8
    plan = mp.solve(replace(problem, slots=experts + spare), "search", proposals=50, steps=4)
    assert accepted(plan, engine, tmp_path)
    # The plan keeps its engine: what asks about it need not name it again.
    changes = parse_changes(plan.topology, lose=["device:1", "device:0+device:5"], devices=6)
    unnamed = replace(problem, engine=None, objective=Objective())
    result = mp.what_if(plan, unnamed, steps, changes, **QUICK)
    for outcome in result.outcomes:
        judged = [each for each in (outcome.repaired, outcome.ready) if each is not None]
        assert judged or "do not divide over" in outcome.reason
        assert all(accepted(each.plan, engine, tmp_path) for each in judged)
    front = mp.pareto(unnamed, steps, current=plan, max_moved=[None], **QUICK)
    assert len(front.points) > 1
    assert all(accepted(point.plan, engine, tmp_path) for point in front.points)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [name for name in ENGINES if engine_profile(name).equal_slots])
def test_experts_that_do_not_divide_get_the_next_slots_that_do(engine: str) -> None:
    if engine == "permute":
        with pytest.raises(mp.UnsupportedError, match="10 experts do not divide over 8 devices; use 5"):
            recorded(10, engine=engine)
        return
    problem, steps = recorded(10, engine=engine)
    front = mp.pareto(problem, steps, tolerate=[None], **QUICK)
    assert [point.plan.num_slots for point in front.points] == [16, 24]
    refused = mp.pareto(problem, steps, redundant=[5], tolerate=[None], **QUICK).refused
    assert "15 do not divide over 8 devices; use 16" in refused[0][1]


@pytest.mark.slow
def test_a_change_that_names_slots_is_refused_before_anything_is_solved() -> None:
    problem, steps = recorded(engine="vllm")
    plan = mp.solve(problem, "contiguous")
    changes = parse_changes(plan.topology, devices=6, slots=26)
    with pytest.raises(mp.UnsupportedError, match="6 devices: vllm cannot run such a plan.*use 24 or 30"):
        mp.what_if(plan, problem, steps, changes, **QUICK)


@pytest.mark.slow
def test_lost_ranks_keep_their_numbers_where_the_engine_masks_them(tmp_path: Path) -> None:
    problem, steps = recorded(engine="sglang", slots=32)
    plan = mp.solve(problem, "search", proposals=50, steps=4)
    changes = parse_changes(plan.topology, lose=["device:2"])
    outcome = mp.what_if(plan, replace(problem, slots=None), steps, changes, keep_ranks=True, **QUICK).outcomes[0]
    assert outcome.ready is not None
    ready = outcome.ready.plan
    counts = ready.slots_per_device[0].tolist()
    assert (len(counts), counts[2], len(set(counts))) == (8, 0, 2)
    # A rank lost before stays lost when another goes.
    second = mp.what_if(
        ready,
        replace(problem, slots=None),
        steps,
        parse_changes(plan.topology, lose=["device:5"]),
        keep_ranks=True,
        **QUICK,
    ).outcomes[0]
    assert second.ready is not None
    twice = second.ready.plan.slots_per_device[0]
    assert (twice[2], twice[5], len(set(np.delete(twice, [2, 5]).tolist()))) == (0, 0, 1)
    mp.check_export(second.ready.plan, "sglang")
    # Lost ranks send no tokens: judged as the plan of the ranks left is.
    left = np.delete(np.arange(8), 2)
    small = plan.topology.without([2])
    renumbered = mp.Plan(plan.model, small, ready.physical_to_logical, np.searchsorted(left, ready.slot_device))
    apart = replace(problem, slots=None, topology=small)
    np.testing.assert_allclose(
        mp.evaluate(ready, steps, replace(problem, slots=None)).step_seconds,
        mp.evaluate(renumbered, steps, apart).step_seconds,
    )
    # What SGLang's own elasticity-aware EPLB leaves in the slots of a lost rank is expert 0: read back, it has none.
    path = mp.export_plan(ready, "sglang", tmp_path / "p.json")
    rows = np.array(json.loads(path.read_text())["physical_to_logical_map"])
    np.testing.assert_array_equal(np.split(rows[0], 8)[2], 0)
    with pytest.warns(UserWarning, match="ranks 2 hold expert 0 alone: taken for lost ranks"):
        back = mp.read_exported(path, "sglang", plan.model, plan.topology)
    np.testing.assert_array_equal(back.physical_to_logical, ready.physical_to_logical)
    np.testing.assert_array_equal(back.slot_device, ready.slot_device)
    running = read_running(path, plan.model)
    assert check_map(running, 24, 8, lost=[2]) == compare_map(running, ready) == []
    assert {finding.kind for finding in check_map(running, 24, 8)} == {"twice"}
    assert compare_map(running, plan)
    for engine in ("vllm", "trtllm"):
        with pytest.raises(mp.UnsupportedError, match="from 0 to 4"):
            mp.check_export(ready, engine)
        with pytest.raises(mp.UnsupportedError, match=f"{engine} knows no masked ranks"):
            mp.what_if(plan, replace(problem, engine=engine, slots=None), steps, changes, keep_ranks=True, **QUICK)


@pytest.mark.slow
def test_decide_takes_no_candidate_that_the_engine_cannot_run() -> None:
    problem, steps = recorded(10)
    plan = mp.solve(problem, "contiguous")
    with pytest.raises(mp.UnsupportedError, match="candidate 0: trtllm cannot express this plan"):
        mp.decide(plan, [plan], steps, replace(problem, engine="trtllm"))


@pytest.mark.slow
def test_an_engine_that_spreads_replicas_refuses_solvers_that_do_not_before_they_run() -> None:
    problem, _ = recorded(engine="vllm-ascend", slots=32)
    for solver in ("eplb", "random"):
        with pytest.raises(mp.UnsupportedError, match=f"'{solver}' does not support replicas each on a device"):
            mp.solve(problem, solver)
    for solver in ("contiguous", "round_robin"):
        mp.check_export(mp.solve(problem, solver), "vllm-ascend")
    with pytest.raises(mp.UnsupportedError, match="25 slots a device for 24 experts"):
        recorded(engine="vllm-ascend", slots=200)


def test_a_plan_of_an_unknown_engine_is_named() -> None:
    problem, steps = recorded()
    plan = mp.solve(problem, "contiguous")
    strange = replace(plan, provenance=Provenance("contiguous", "0", engine="sglan"))
    with pytest.raises(mp.InputError, match="did you mean 'sglang'"):
        mp.what_if(strange, problem, steps, **QUICK)
