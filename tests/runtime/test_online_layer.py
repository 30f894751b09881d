"""Experts copied for one batch, in the distributed layer: equal to the layer in one process, and level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from ranks import launch

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROUNDING = 2e-5
"""Of float32 sums of some hundred terms."""


@pytest.fixture(scope="module")
def equality(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("online_ranks:equality", 4, tmp_path_factory.mktemp("online"))


def test_outputs_and_gradients_equal_the_single_process_layer(equality: list[Any]) -> None:
    for found in equality:
        assert {"out", "x", "gate", "gate_up_proj", "down_proj", "up_proj", "gate_up_proj_bias"} <= set(found["worst"])
        assert max(found["worst"].values()) < ROUNDING, found["worst"]


def test_ranks_compute_about_as_many_rows_each(equality: list[Any]) -> None:
    for found in equality:
        assert found["copied"] == equality[0]["copied"] > 30
        assert found["even"] == equality[0]["even"]
        assert all(largest <= native for largest, native in found["even"])
        assert sum(largest for largest, _ in found["even"]) < 0.75 * sum(native for _, native in found["even"])


def test_homes_move_activations_are_recomputed_and_misfits_refused(tmp_path: Path) -> None:
    for found in launch("online_ranks:moved_and_checkpointed", 2, tmp_path):
        assert found["moved"] < ROUNDING
        assert found["checkpointed"] < ROUNDING
        assert found["gradients"] < ROUNDING
        replicas, compressed, negative, differing, moved = found["refused"]
        assert "one slot that each has" in replicas
        assert "LSHCompression and online_slots" in compressed
        assert "online_slots is -1" in negative
        assert "plan and settings of MoE layer" in differing
        assert "one slot that each has" in moved
