"""Gradients of experts' weights behind those of their inputs: Gloo ranks against one process and the plain layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from ranks import launch

pytestmark = pytest.mark.slow

ROUNDING = 2e-5


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_equal_one_process_under_random_plans_checkpointed_and_in_chunks(world: int, tmp_path: Path) -> None:
    for found in launch("delayed_ranks:equality", world, tmp_path):
        assert {"x", "gate", "gate_up_proj", "down_proj", "up_proj", "gate_up_proj_bias"} <= set(found["worst"])
        assert max(found["worst"].values()) < ROUNDING, found["worst"]
        assert found["equal_replicas"]


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("delayed_ranks:ways", 4, tmp_path_factory.mktemp("ways"))


def test_every_way_to_gradients_gives_the_bits_of_the_layer_without_delay(ways: list[Any]) -> None:
    for found in ways:
        assert {"once", "once chunks", "once padded", "once lsh", "accumulated", "hooked"} <= set(found["same"])
        assert {name: differ for name, differ in found["same"].items() if differ} == {}


def test_weights_gradients_are_computed_while_those_of_inputs_travel(ways: list[Any]) -> None:
    for found in ways:
        assert found["order"] == ["start", "wait", "start", "weights", "wait"]
        there = ["start", "start", "wait", "start", "wait", "start"]
        assert found["chunked order"] == [*there, "weights", "wait", "weights", "wait"]


def test_evaluation_is_as_it_was(ways: list[Any]) -> None:
    assert all(found["evaluation"] for found in ways)


def test_what_it_cannot_be_used_with_is_refused_by_name(ways: list[Any]) -> None:
    for found in ways:
        said = found["refused"]
        assert "shard_experts and delay_weight_gradients do not go together" in said["shards"]
        assert "with Own it would do nothing" in said["own"]
        assert "has another one than rank" in said["one"]
