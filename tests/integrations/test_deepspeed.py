"""AutoEP's placement descriptors, made and read by DeepSpeed's own code."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

import moeplace as mp

pytest.importorskip("torch")
if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: pip install 'moeplace[deepspeed]'", allow_module_level=True)

import torch

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
