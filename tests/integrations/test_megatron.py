"""megatron-core's own model, schedule and optimizers with experts where a plan says, against one process. Real ranks,
on Gloo."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    pytest.skip("megatron-core is not installed: pip install 'moeplace[megatron]'", allow_module_level=True)

from ranks import launch

pytestmark = pytest.mark.slow


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_planned_run_equals_one_process_through_changes_of_plan_and_a_checkpoint(ranks: int, tmp_path: Path) -> None:
    found = launch("megatron_ranks:parity", ranks, tmp_path, seconds=850)
    alone = found[0].pop("alone")
    assert len(found) == ranks
    for cases in found:
        for run in cases.values():
            assert run["curve"] == pytest.approx(alone["curve"][:6], rel=2e-6)
            assert run["norms"] == pytest.approx(alone["norms"][:6], rel=2e-5)
            assert run["moved"] > 10
            assert run["replicas equal"]
            assert run["resumed"]["curve"] == pytest.approx(alone["curve"][6:], rel=2e-6)
            assert run["resumed"]["norms"] == pytest.approx(alone["norms"][6:], rel=2e-5)


@pytest.mark.timeout(900)
def test_bfloat16_with_32_bit_copies_goes_on_through_a_change_of_plan(tmp_path: Path) -> None:
    for rank in launch("megatron_ranks:half", 4, tmp_path, seconds=850):
        for case in rank.values():
            assert case["changed"] == pytest.approx(case["kept"], rel=2e-2)
            assert case["moved"] > 10
            assert case["replicas equal"]


@pytest.mark.timeout(900)
def test_a_run_finds_a_better_plan_beside_training_and_goes_on_under_it(tmp_path: Path) -> None:
    for rank in launch("megatron_ranks:rebalanced", 2, tmp_path, seconds=850):
        assert rank["applied"] == 1
        assert rank["changed"]
        both = min(len(curve) for curve in rank["curves"].values())
        assert rank["curves"]["rebalanced"][:both] == pytest.approx(rank["curves"]["kept"][:both], rel=1e-4)


@pytest.mark.timeout(900)
def test_what_plans_do_not_go_with_is_refused_by_name(tmp_path: Path) -> None:
    (said,) = launch("megatron_ranks:refused", 1, tmp_path, seconds=850)
    assert "its ffn_size is 48" in said["model"]
    assert "the plan is for 2 devices, expert parallelism has 1 ranks" in said["devices"]
    assert "layer 0: device 0 has expert 7 twice" in said["twice"]
    assert "moe_pad_expert_input_to_capacity=True does not go with a plan" in said["capacity"]
    assert "has no MoELayer" in said["dense"]
    assert "no planned layers" in said["unplanned"]
    for name in ("slots", "slots, not strictly"):
        assert "layer 0: this state has experts as another plan has them, slot by slot" in said[name]
    assert "same slots" not in said
    assert "'dp_reshardable' writes slots as they lie in buffers" in said["flat checkpoint"]
    assert "wrap the model in it" in said["unwrapped"]


@pytest.mark.timeout(900)
def test_the_how_to_page_leads_from_a_recorded_run_to_a_planned_one(tmp_path: Path) -> None:
    for rank in launch("megatron_ranks:page", 2, tmp_path, seconds=850):
        assert len(rank["curve"]) == 2
        assert rank["slots"] == 12
