"""The policy that serves a plan inside vLLM, against both forms of vLLM's policy interface.

The interface is stood in for by the two forms its releases have; `python -m benchmarks engine_parsers` runs the real
ones.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import moeplace as mp

torch = pytest.importorskip("torch")

from moeplace.runtime.exporters.vllm import (  # noqa: E402
    PLAN_VARIABLE,
    install,
    install_policy,
    logical_maps,
    plan_rebalancer,
    policy_class,
)


class OneMap:
    @classmethod
    def rebalance_experts(
        cls, weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int, current: Any = None
    ) -> torch.Tensor:
        return torch.full((weight.shape[0], num_replicas), -7)


class ThreeMaps:
    @classmethod
    def rebalance_experts(
        cls, weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int, current: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (torch.full((weight.shape[0], num_replicas), -7), torch.zeros(1), torch.zeros(1))


@pytest.fixture
def plan() -> mp.Plan:
    model = mp.ModelSpec(layers=2, experts=4, top_k=2, hidden_size=8, ffn_size=8)
    topology = mp.Topology.preset("h100-hgx", devices_per_node=2)
    table = np.array([[3, 0, 1, 2, 0, 0], [1, 2, 3, 3, 0, 1]])
    return mp.Plan(model, topology, table, np.array([0, 0, 0, 1, 1, 1]))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    policies: dict[str, Any] = {"default": OneMap}
    for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb", "vllm.distributed.eplb.policy"):
        module = ModuleType(name)
        module.EPLB_POLICIES = policies  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    return policies


def test_the_plan_is_served_in_the_form_the_release_wants(plan: mp.Plan) -> None:
    load = torch.rand(2, 4)
    current = torch.zeros(2, 6, dtype=torch.long)
    one = policy_class(plan_rebalancer(plan), OneMap).rebalance_experts(load, 6, 1, 1, 2, current)
    assert one.dtype == torch.int64
    assert one.tolist() == plan.physical_to_logical.tolist()
    table, slots, counts = policy_class(plan_rebalancer(plan), ThreeMaps).rebalance_experts(load, 6, 1, 1, 2, current)
    assert table.tolist() == plan.physical_to_logical.tolist()
    assert slots.tolist() == plan.logical_to_physical.tolist()
    assert counts.tolist() == plan.replicas.tolist()


def test_logical_maps_list_every_slot_of_every_expert() -> None:
    rng = np.random.default_rng(0)
    table = np.stack([rng.permutation(np.concatenate([np.arange(5), rng.integers(5, size=4)])) for _ in range(20)])
    slots, counts = logical_maps(table, 5)
    for layer, row in enumerate(table):
        for expert in range(5):
            expected = np.flatnonzero(row == expert).tolist()
            assert [slot for slot in slots[layer, expert] if slot >= 0] == expected
            assert counts[layer, expert] == len(expected)


def test_another_model_is_left_to_vllm_with_a_warning(plan: mp.Plan, caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_class(plan_rebalancer(plan), OneMap)
    with caplog.at_level(logging.WARNING):
        table = policy.rebalance_experts(torch.rand(1, 4), 6, 1, 1, 2)
    assert table.tolist() == [[-7] * 6]
    assert "leaving (1, 4) to vLLM" in caplog.text


@pytest.mark.parametrize(
    ("slots", "ranks", "message"), [(4, 2, "4 physical experts"), (6, 3, "3 expert-parallel ranks")]
)
def test_a_deployment_the_plan_is_not_for_is_refused(plan: mp.Plan, slots: int, ranks: int, message: str) -> None:
    policy = policy_class(plan_rebalancer(plan), OneMap)
    with pytest.raises(mp.InputError, match=rf"{message}.*num_redundant_experts to 2"):
        policy.rebalance_experts(torch.rand(2, 4), slots, 1, 1, ranks)


def test_a_plan_vllm_cannot_express_is_refused_at_start(plan: mp.Plan) -> None:
    uneven = mp.Plan(plan.model, plan.topology, plan.physical_to_logical, np.array([0, 0, 1, 1, 1, 1]))
    with pytest.raises(mp.UnsupportedError, match="same number of slots"):
        plan_rebalancer(uneven)


def test_a_rebalancer_of_ones_own_gets_the_load_as_numbers() -> None:
    seen: list[Any] = []

    def rebalance(load: Any, slots: int, groups: int, nodes: int, ranks: int) -> Any:
        seen.append((load.tolist(), slots, groups, nodes, ranks))
        return np.array([[1, 0, 1]])

    table = policy_class(rebalance, OneMap).rebalance_experts(torch.tensor([[3, 9]], dtype=torch.int32), 3, 8, 2, 1)
    assert seen == [([[3.0, 9.0]], 3, 8, 2, 1)]
    assert table.tolist() == [[1, 0, 1]]


def test_the_plugin_serves_the_plan_the_environment_names(
    plan: mp.Plan, vllm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PLAN_VARIABLE, raising=False)
    install()
    assert vllm["default"] is OneMap
    plan.save(tmp_path / "plan.json")
    monkeypatch.setenv(PLAN_VARIABLE, str(tmp_path / "plan.json"))
    install()
    install()
    assert issubclass(vllm["default"], OneMap)
    assert vllm["default"].replaced is OneMap
    assert vllm["default"].rebalance_experts(torch.rand(2, 4), 6, 1, 1, 2).tolist() == plan.physical_to_logical.tolist()


@pytest.mark.parametrize("form", ["49572", "41141"])
def test_the_plugin_reads_the_export_as_well_as_the_plan(
    form: str, plan: mp.Plan, vllm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mp.export_plan(plan, "vllm", tmp_path / "map.json", form=form)
    monkeypatch.setenv(PLAN_VARIABLE, str(path))
    install()
    served = vllm["default"].rebalance_experts(torch.rand(2, 4), 6, 1, 1, 2)
    assert served.tolist() == plan.physical_to_logical.tolist()
    path.write_text("[[0, 1, 2, 3, 0, 1], [0, 1, 2, 2, 0, 1]]")
    with pytest.raises(mp.FileFormatError, match="row 1 is no list of every expert's slots"):
        install()


def test_a_missing_plan_stops_the_start(vllm: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLAN_VARIABLE, str(tmp_path / "absent.json"))
    with pytest.raises(mp.InputError, match="no such file"):
        install()


def test_without_vllm_or_with_an_unknown_interface_the_error_says_so(
    vllm: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        @classmethod
        def rebalance_experts(cls, weight: Any) -> int:
            return 0

    with pytest.raises(mp.UnsupportedError, match="one tensor"):
        policy_class(lambda *_: None, Other)
    monkeypatch.setitem(sys.modules, "vllm.distributed.eplb.policy", None)
    with pytest.raises(mp.UnsupportedError, match=r"no vLLM with vllm\.distributed\.eplb\.policy"):
        install_policy(lambda *_: None)
