"""AutoEP's engine with experts where a plan says, against one process, and its placement descriptors. Real ranks, on
Gloo."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import moeplace as mp

pytest.importorskip("torch")
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: pip install 'moeplace[deepspeed]'", allow_module_level=True)

import torch
from ranks import launch

SPEC = mp.ModelSpec(layers=2, experts=6, top_k=2, hidden_size=8, ffn_size=4, moe_layers=(1, 3))
TOPOLOGY = mp.Topology.preset("a100-pcie", devices_per_node=3)


def test_a_rank_reads_its_own_experts_of_a_whole_tensor_by_the_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.checkpoint import autoep_affine

    from moeplace.integrations.deepspeed import placement_descriptors

    table = np.array([[3, 0, 5, 1, 2, 4, 0, -1], [5, 4, 3, 2, 1, 0, 5, 4]])
    plan = mp.Plan(SPEC, TOPOLOGY, table, slot_device=np.array([0, 0, 1, 1, 1, 2, 2, 2]))
    whole = torch.arange(6 * 4 * 8.0).view(6, 4, 8)
    found = placement_descriptors(plan)
    assert list(found) == [1, 3]
    for row, layer in enumerate(found):
        affine = autoep_affine.autoep_placement_to_affine_map(found[layer], whole.shape)
        for rank in range(3):
            own = [int(e) for e in table[row][plan.slot_device == rank] if e >= 0]
            assert autoep_affine.autoep_experts_for_rank(found[layer], rank) == own
            assert torch.equal(autoep_affine.extract_autoep_rank_tensor(whole, affine, rank), whole[own])


def test_an_expert_twice_on_a_device_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from moeplace.integrations.deepspeed import placement_descriptors

    table = np.tile([0, 1, 2, 3, 4, 5, 5, 5], (2, 1))
    plan = mp.Plan(SPEC, TOPOLOGY, table, slot_device=np.array([0, 0, 0, 1, 1, 1, 2, 2]))
    with pytest.raises(mp.UnsupportedError, match="layer 1: device 2 has expert 5 twice"):
        placement_descriptors(plan)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_planned_run_equals_one_process_in_each_stage_through_a_change_and_a_checkpoint(
    ranks: int, tmp_path: Path
) -> None:
    for found in launch("deepspeed_ranks:parity", ranks, tmp_path, seconds=500):
        assert list(found["curves"]) == ["stage 0", "stage 1", "stage 2", "changed", "resumed"]
        for curve in found["curves"].values():
            assert curve == pytest.approx(found["alone"], rel=1e-5)
        assert found["moves"] > 0
        assert all(found["replicas"])
        assert "the checkpoint was written under plan" in found["other plan"]
        assert "the checkpoint does not say under which plan it was written" in found["no plan"]
        recorded, chosen = found["recorded"]
        assert recorded == chosen


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_finds_a_better_plan_beside_training_and_goes_on_under_it(tmp_path: Path) -> None:
    for rank in launch("deepspeed_ranks:rebalanced", 2, tmp_path, seconds=500):
        assert rank["applied"] == 1
        assert rank["changed"]
        both = min(len(curve) for curve in rank["curves"].values())
        assert rank["curves"]["rebalanced"][:both] == pytest.approx(rank["curves"]["steady"][:both], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_plans_do_not_go_with_is_refused_by_name(tmp_path: Path) -> None:
    for said in launch("deepspeed_ranks:refused", 2, tmp_path, seconds=500):
        assert "its ffn_size is 48, that of model.layers.0.mlp 24" in said["model"]
        assert "model.layers.1.mlp is none of the layers [0, 3] of the plan" in said["layer"]
        assert "AutoEP gives every rank as many rows of experts" in said["uneven"]
        assert "ZeRO stage 3 cuts experts in parts" in said["stage 3"]
        assert "keeps experts in flat copies" in said["flat"]
