"""Experts beside data parallelism: copies of all experts over ranks, against the whole model in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("data_parallel_ranks:training", 4, tmp_path_factory.mktemp("training"))


KINDS = ["1", "3", "1 cut", "3 cut"]
"""Micro-batches a step; whether copies have a part of each expert, not all of it."""


@pytest.mark.parametrize("parts", KINDS)
@pytest.mark.parametrize("what", ["losses", "norms", "resumed"])
def test_copies_of_experts_train_as_one_process_does(training: list[Any], parts: str, what: str) -> None:
    for found in training:
        mine, expected = found[parts][what]
        assert mine == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("parts", KINDS)
def test_weights_after_a_change_of_plan_and_a_resumption_are_those_of_one_process(
    training: list[Any], parts: str
) -> None:
    for found in training:
        assert found[parts]["weights"] < 1e-4
        assert found[parts]["resumed_weights"] < 1e-4


def test_copies_and_replicas_stay_the_same_bits(training: list[Any]) -> None:
    assert all(found[parts]["bits"] for found in training for parts in KINDS)


def test_experts_cut_over_two_copies_are_half_as_many_numbers(training: list[Any]) -> None:
    for found in training:
        assert 2 * found["1 cut"]["numbers"] == found["1"]["numbers"] > 0


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("data_parallel_ranks:cut", 4, tmp_path_factory.mktemp("cut"))


def test_no_whole_weights_wait_for_backward(cut: list[Any]) -> None:
    for found in cut:
        assert found["wholes"] > 0
        assert found["kept"] == 0


def test_what_needs_whole_experts_is_refused_where_they_are_cut(cut: list[Any]) -> None:
    for found in cut:
        assert found["narrow"]
        said = found["said"]
        assert "were changed between forward and backward, which joins them again" in said["changed"]
        assert "Muon makes whole matrices orthogonal" in said["muon"]
        assert "shard_experts and online_slots do not go together" in said["online"]
        assert "shard_experts and chunks (2) do not go together" in said["chunks"]
        assert "down_proj is [15, 24], whose first dimension 2 copies cannot share evenly" in said["uneven"]
        assert "moeplace.save_checkpoint" in said["torch.save"]


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("data_parallel_ranks:waiting", 4, tmp_path_factory.mktemp("waiting"))


def test_micro_batches_without_sync_are_summed_by_the_messages_of_one(waiting: list[Any]) -> None:
    for found in waiting:
        assert found["messages"][0] == found["messages"][1] > 0


def test_an_optimizer_step_on_unsummed_gradients_is_refused(waiting: list[Any]) -> None:
    assert all("gradients of micro-batches under no_sync wait" in found["said"] for found in waiting)


def test_the_order_of_summed_and_unsummed_micro_batches_does_not_matter(waiting: list[Any]) -> None:
    assert all(found["orders"] < 1e-6 for found in waiting)


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("data_parallel_ranks:meshes", 4, tmp_path_factory.mktemp("meshes"))


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("dp", lambda rank: [[0, 1], [2, 3]]),
        ("two", lambda rank: [[0], [1], [2], [3]]),
        ("nodes", lambda rank: [[0, 1], [2, 3]]),
        ("pp", lambda rank: [[0, 1]] if rank < 2 else [[2, 3]]),
        ("pp_dp", lambda rank: [[0], [1]] if rank < 2 else [[2], [3]]),
    ],
)
def test_dimensions_beside_the_experts_are_data_parallelism_or_stages(meshes: list[Any], name: str, grid: Any) -> None:
    for rank, found in enumerate(meshes):
        assert found[name] == grid(rank)


def test_meshes_that_cut_experts_or_stand_alone_are_refused(meshes: list[Any]) -> None:
    for rank, found in enumerate(meshes):
        assert "tensor parallelism inside experts does not exist here" in found["tp"]
        assert ("UnsupportedError: the mesh has the ranks [0, 1], but not [2, 3]" in found["alone"]) == (rank < 2)


def test_copies_with_different_plans_are_told(meshes: list[Any]) -> None:
    for rank, found in enumerate(meshes):
        others = "2, 3" if rank < 2 else "0, 1"
        assert f"rank {others} has another one than rank {rank}" in found["other_plan"]


def test_a_rank_that_dies_in_a_migration_leaves_the_plan_in_force_in_every_copy(tmp_path: Path) -> None:
    found = launch("data_parallel_ranks:killed", 4, tmp_path, dies=[1], seconds=100)
    for rank in (0, 2, 3):
        assert found[rank]["kept"]
        assert "rank 1" in found[rank]["said"]
        assert found[rank]["seconds"] < 30


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("data_parallel_ranks:norms", 4, tmp_path_factory.mktemp("norms"))


def test_norms_of_every_order_go_over_all_pipeline_stages(norms: list[Any]) -> None:
    for found in norms:
        for mine, expected in found["norms"].values():
            assert mine == pytest.approx(expected, rel=1e-5)
    assert all(found["norms"] == norms[0]["norms"] for found in norms)


def test_a_norm_that_is_not_finite_is_an_error_on_every_rank_and_clips_nothing(norms: list[Any]) -> None:
    assert norms[0]["held"]
    assert all("not finite, nothing clipped" in found["nonfinite"] and found["kept"] for found in norms)


def test_a_stage_given_the_whole_plan_is_told_to_select_its_layers(norms: list[Any]) -> None:
    for rank, found in enumerate(norms):
        assert f"plan.select([{(1, 4)[rank // 2]}])" in found["whole plan"]
