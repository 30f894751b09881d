"""Dispatch through torch's symmetric memory, on a stand-in for its operator: real processes that read late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from ranks import launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("world", [2, 3, 4])
def test_outputs_and_gradients_equal_one_process_with_two_batches_under_way(tmp_path: Path, world: int) -> None:
    for found in launch("symmetric_stand_in:equality", world, tmp_path):
        assert {"out", "x", "gate", "gate_up_proj", "down_proj", "gate_up_proj_bias"} <= set(found["worst"])
        assert max(found["worst"].values()) < 2e-5, found["worst"]
        assert found["equal_replicas"]


def test_a_rank_that_reads_late_finds_its_rows_and_would_not_in_a_single_set_of_buffers(tmp_path: Path) -> None:
    found = launch("symmetric_stand_in:turns", 2, tmp_path)
    assert max(one["2"] for one in found) < 2e-5
    assert max(one["1"] for one in found) > 0.01


def test_the_host_asks_the_device_for_nothing_forward_and_backward(tmp_path: Path) -> None:
    for found in launch("symmetric_stand_in:unread", 2, tmp_path):
        assert found["symmetric"] == found["place for some"] == ""
        assert "Tensor.tolist makes the host wait" in found["flat"]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("symmetric_stand_in:refused", 2, tmp_path_factory.mktemp("refused"))


def test_a_batch_that_a_rank_has_no_place_for_ends_in_an_error_on_all_before_rows_are_sent(refused: list[Any]) -> None:
    for found in refused:
        assert "a rank would get more than the 24 token-expert pairs that rank_capacity_factor (1.0)" in found["place"]
        assert found["calls"] == 0


def test_what_does_not_go_with_it_is_refused_by_name(refused: list[Any]) -> None:
    for found in refused:
        assert "needs symmetric memory of NVSHMEM, this process has that of CUDA; call" in found["backend"]
        assert "has another one than rank" in found["other"]
        assert "chunks (2) are sent by flat and node_aware dispatch, not with SymmetricDispatcher" in found["chunks"]
        assert "with SymmetricDispatcher it would do nothing" in found["delayed"]
        assert "tokens is 0; expected a whole number of at least 1" in found["none"]
        assert "rank_capacity_factor is 0.5; expected a number of at least 1" in found["factor"]
        assert "is not for CUDA graphs" in found["graph"]
        assert "9 tokens, SymmetricMemory was told of at most 8" in found["tokens"]


def test_dropped_tokens_biases_and_bfloat16_are_as_with_flat_dispatch(refused: list[Any]) -> None:
    for found in refused:
        assert found["all"]
        assert found["dropped"] < 1e-6
        assert found["half"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operator may be there")
def test_where_torch_has_no_such_operator_the_layer_says_so(refused: list[Any]) -> None:
    for found in refused:
        assert "has no all_to_all_vdev for 'cpu'; it comes with builds for CUDA with NVSHMEM" in found["missing"]
