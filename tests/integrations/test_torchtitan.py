"""torchtitan's own trainer with experts where a plan says, against torchtitan in one process. Real ranks, on Gloo."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("torchtitan") is None:
    pytest.skip("torchtitan is not installed: pip install 'moeplace[torchtitan]'", allow_module_level=True)

from ranks import launch

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_a_planned_run_equals_one_process_through_changes_of_plan_and_a_checkpoint(tmp_path: Path) -> None:
    found = launch("torchtitan_ranks:parity", 5, tmp_path, seconds=570)
    alone = found[-1]
    for rank in found[:-1]:
        for case in ("two by two, uneven rows", "four"):
            run = rank[case]
            assert run["curve"] == pytest.approx(alone["curve"][:6], rel=2e-6)
            assert run["norms"] == pytest.approx(alone["norms"][:6], rel=2e-5)
            assert run["moved"] > 10
            assert run["replicas equal"]
            assert run["resumed"]["from"] == 6
            assert len(run["slots"]) == 2
            assert all("rows of experts, expected 8: one of each" in words for words in run["slots"])
            assert run["resumed"]["curve"] == pytest.approx(alone["curve"][6:], rel=2e-6)
    for case in ("two by two, uneven rows", "four"):
        assert found[0][case]["names"] == [], "a checkpoint has the names that torchtitan's own has"
        assert found[0][case]["apart"] < 1e-3
    said = found[0]["refused"]
    assert "the plan is for 4 devices, expert parallelism has 2 ranks" in said["devices"]
    assert "4 to 6 slots on a device" in said["slots"]
    assert "its ffn_size is 48" in said["model"]
    assert "expert_parallel_degree to the plan's 2 devices" in said["no expert parallelism"]
    assert "sends tokens by HybridEPTokenDispatcher" in said["dispatcher"]


@pytest.mark.timeout(600)
def test_a_run_finds_a_better_plan_beside_training_and_goes_on_under_it(tmp_path: Path) -> None:
    for rank in launch("torchtitan_ranks:rebalanced", 2, tmp_path, seconds=570):
        assert rank["applied"] == 1
        assert rank["changed"]
        assert rank["saved"]
        both = min(len(curve) for curve in rank["curves"].values())
        assert rank["curves"]["rebalanced"][:both] == pytest.approx(rank["curves"]["kept"][:both], rel=1e-4)


@pytest.mark.timeout(600)
def test_the_how_to_page_leads_from_a_recorded_run_to_a_planned_one(tmp_path: Path) -> None:
    for rank in launch("torchtitan_ranks:page", 2, tmp_path, seconds=570):
        assert len(rank["curve"]) == 2
        assert rank["slots"] == 12
        assert rank["every"] == 500
