"""The distributed layer against the layer in one process: real Gloo processes, many checks a spawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moeplace as mp

pytest.importorskip("torch")

from ranks import launch

pytestmark = pytest.mark.slow

ROUNDING = 2e-5
"""Of float32 sums of some hundred terms."""


@pytest.fixture(scope="module")
def equality(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("expert_ranks:equality", 4, tmp_path_factory.mktemp("equality"))


def test_outputs_and_gradients_equal_the_single_process_layer_under_random_plans(equality: list[Any]) -> None:
    for found in equality:
        assert {"out", "x", "gate", "gate_up_proj", "down_proj", "up_proj", "gate_up_proj_bias"} <= set(found["worst"])
        assert max(found["worst"].values()) < ROUNDING, found["worst"]


def test_gradients_of_replicas_are_the_same_bits_everywhere(equality: list[Any]) -> None:
    assert all(found["equal_replicas"] for found in equality)


def test_balanced_replicas_level_every_batch_as_far_as_it_goes(equality: list[Any]) -> None:
    assert all(found["level"] for found in equality)


@pytest.fixture(scope="module")
def behaviours(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("expert_ranks:behaviours", 4, tmp_path_factory.mktemp("behaviours"))


def test_one_copy_a_token_travels_to_a_device_and_with_nodes_one_to_a_node(behaviours: list[Any]) -> None:
    for found in behaviours:
        flat, deep = found["copies"]["flat"], found["copies"]["node_aware"]
        assert flat["sent"] == [flat["devices"]]
        assert deep["sent"][0] == deep["nodes"]
    handed_on = sum(sum(found["copies"]["node_aware"]["sent"][1]) for found in behaviours)
    assert handed_on == sum(sum(found["copies"]["node_aware"]["devices"]) for found in behaviours)


def test_bfloat16_is_as_near_as_its_precision(behaviours: list[Any]) -> None:
    assert all(found["half_precision"] < 0.015 for found in behaviours)


def test_odd_inputs_give_what_the_reference_gives(behaviours: list[Any]) -> None:
    for found in behaviours:
        odd = found["odd_inputs"]
        assert max(odd["strided"], odd["one"]) < ROUNDING
        assert odd["none"] == [[0, 16], [0, 16]]
        assert all("layer 4: top_k_index has experts outside 0 to 5" in said for said in odd["outside"])
        assert len(odd["outside"]) == 2


def test_ranks_of_which_some_need_gradients_are_told_before_backward_waits(behaviours: list[Any]) -> None:
    words = "some ranks need gradients of this batch and others do not"
    assert all(words in found["odd_inputs"]["gradients"] for found in behaviours)


def test_nan_stays_with_its_token(behaviours: list[Any]) -> None:
    for rank, found in enumerate(behaviours):
        expected = [rank == 1 and token == 2 for token in range(6)]
        assert found["odd_inputs"]["nan"] == found["odd_inputs"]["nan_routed"] == expected


def test_activation_checkpointing_changes_nothing(behaviours: list[Any]) -> None:
    assert all(found["checkpointing"] < ROUNDING for found in behaviours)


def test_a_first_forward_may_be_a_checkpointed_one(tmp_path: Path) -> None:
    for found in launch("expert_ranks:checkpointed_first", 2, tmp_path):
        assert found == {"built": 0.0, "converted": 0.0}


def test_shared_experts_run_while_tokens_travel(behaviours: list[Any]) -> None:
    for found in behaviours:
        assert found["shared"]["order"] == ["sent", "shared", "waited"]
        assert found["shared"]["error"] < ROUNDING


def test_a_chunk_travels_while_another_is_computed_forward_and_backward(behaviours: list[Any]) -> None:
    there = ["dispatch", "dispatch", "receive", "experts", "start_combine"]
    forward = [*there, "receive", "experts", "start_combine", "finish_combine"]
    back = ["start", "start", "wait", "experts", "start", "wait", "experts", "start", "wait", "wait"]
    for found in behaviours:
        assert found["chunked"] == [*forward, "backward", *back]


def test_ddp_averages_the_router_and_leaves_experts_alone(behaviours: list[Any]) -> None:
    for found in behaviours:
        assert found["ddp"]["router"] < ROUNDING
        assert found["ddp"]["experts"] < ROUNDING


def test_replicas_stay_the_same_bits_over_training(behaviours: list[Any]) -> None:
    assert all(found["ddp"]["replicas"] for found in behaviours)


def test_fully_shard_of_the_rest_gives_the_same_gradients(behaviours: list[Any]) -> None:
    for found in behaviours:
        assert found["sharded"]["loss"] < ROUNDING
        assert found["sharded"]["grads"] < 1e-4
        kinds = found["sharded"]["kinds"]
        assert kinds["gate.weight"] == "DTensor"
        assert kinds["experts.down_proj"] == "ExpertParameter"


def test_a_compiled_model_around_the_layer_gives_the_same_and_one_graph_is_refused(behaviours: list[Any]) -> None:
    for found in behaviours:
        assert found["compiled"]["loss"] < ROUNDING
        assert found["compiled"]["grads"] < 1e-4
        assert "ExpertParallelMoE" in found["compiled"]["fullgraph"]


def test_the_gradient_norm_counts_every_expert_once(behaviours: list[Any]) -> None:
    for found in behaviours:
        clipping = found["clipping"]
        assert clipping["norm"] == pytest.approx(clipping["expected"], rel=1e-5)
        assert clipping["after"] < 1.01e-8
        assert clipping["equal"]
    assert len({found["clipping"]["norm"] for found in behaviours}) == 1


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("model", "another model: its experts is 6, this model's 8"),
        ("ranks", "for 5 devices, the mesh has 4 ranks"),
        ("nodes", "nodes of \\[4\\] devices"),
        ("layer", "layers \\[1, 4\\], not layer 2"),
        ("dispatch", "did you mean 'flat'"),
        ("two_stage", "needs a mesh of two dimensions"),
        ("gradients", "known: mean, sum"),
        ("replica_choice", "replica_choice 'nearest' is unknown; did you mean 'share'"),
        ("one_balances", "has another one than rank"),
        ("chunks", "chunks is 0; expected a whole number of at least 1"),
        ("one_cuts", "has another one than rank"),
        ("router", "did you mean 'softmax'"),
        ("names", "no weights 'gate_up_proj'"),
        ("shapes", "expected \\(6, 48, 16\\)"),
    ],
)
def test_wrong_settings_are_refused_on_every_rank(behaviours: list[Any], case: str, words: str) -> None:
    for found in behaviours:
        with pytest.raises(mp.InputError, match=words):
            raise mp.InputError(found["refusals"].get(case, "nothing was refused"))


def test_ranks_with_different_plans_are_told_whose_differ(behaviours: list[Any]) -> None:
    for rank, found in enumerate(behaviours):
        named = "rank 0, 1, 3 has another one than rank 2" if rank == 2 else f"rank 2 has another one than rank {rank}"
        assert named in found["refusals"]["different"]


@pytest.mark.parametrize(("case", "culprit"), [("one_refuses", 3), ("one_mistypes", 0)])
def test_a_rank_that_refuses_does_not_leave_the_others_waiting(behaviours: list[Any], case: str, culprit: int) -> None:
    for rank, found in enumerate(behaviours):
        said = found["refusals"][case]
        assert (f"rank {culprit} refused it" in said) == (rank != culprit)


def test_nodes_of_one_device_work(behaviours: list[Any]) -> None:
    assert all(found["one_device_a_node"] < ROUNDING for found in behaviours)


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("expert_ranks:left_out", 4, tmp_path_factory.mktemp("left_out"))


def test_a_mesh_that_leaves_ranks_out_is_refused_unless_sliced_from_one_of_all(left_out: list[Any]) -> None:
    for rank, found in enumerate(left_out):
        mine, others = ("[0, 1]", "[2, 3]") if rank < 2 else ("[2, 3]", "[0, 1]")
        assert f"the mesh has the ranks {mine}, but not {others}" in found["alone"]
        assert found["pp"] == found["dp"] == [5, 16]


@pytest.mark.parametrize(
    ("case", "by"),
    [
        ("fully_shard", "fully_shard,"),
        ("fsdp", "FullyShardedDataParallel"),
        ("fsdp_orig", "FullyShardedDataParallel"),
        ("tensor_parallel", "a tensor-parallel plan,"),
    ],
)
def test_experts_taken_over_by_a_sharding_wrapper_are_refused(left_out: list[Any], case: str, by: str) -> None:
    for found in left_out:
        assert f"gate_up_proj was taken over by {by}" in found[case]
        assert "ignored_params=expert_parameters(model)" in found[case]


def test_zero_redundancy_over_experts_is_refused_at_its_first_step(left_out: list[Any]) -> None:
    for found in left_out:
        assert found["zero"].startswith("ZeroRedundancyOptimizer gives every parameter to one rank")
        assert found["zero_of_the_rest"] == ""


@pytest.mark.parametrize("accident", ["killed", "stopped"])
@pytest.mark.long
def test_a_rank_that_is_lost_is_named_by_the_others_within_the_timeout(accident: str, tmp_path: Path) -> None:
    found = launch(f"expert_ranks:{accident}", 4, tmp_path, dies=[2], seconds=60)
    for rank in (0, 1, 3):
        assert found[rank]["said"].startswith("rank 2 did not answer")
        assert found[rank]["seconds"] < 15


def test_a_layer_of_64_ranks_builds_and_dispatches_deepseek_v3_shapes(tmp_path: Path) -> None:
    found = launch("expert_ranks:wide", 1, tmp_path)[0]
    for name, stages in (("flat", 1), ("node_aware", 2)):
        assert found[name]["out"] == [16, 7168]
        assert found[name]["x_grad"] == [16, 7168]
        assert found[name]["grads"]
        assert found[name]["rows"] in (4, 5)
        assert len(found[name]["copies"]) == stages
    assert found["node_aware"]["copies"][0] < found["flat"]["copies"][0] <= 8.0
