"""Changing the plan of a model in training: real Gloo processes; what moves, what stays, what happens when a rank
fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moeplace as mp

pytest.importorskip("torch")

from ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def moves(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("migration_ranks:moves", 4, tmp_path_factory.mktemp("moves"))


@pytest.mark.parametrize("what", ["kept", "fewest", "placed", "bytes"])
def test_weights_and_moments_arrive_bit_for_bit_by_the_fewest_moves_and_come_back(moves: list[Any], what: str) -> None:
    for found in moves:
        assert {"down_proj", "down_proj.exp_avg", "down_proj.exp_avg_sq"} <= set(found["back_and_forth"]["names"])
        assert found["back_and_forth"][what]


def test_going_to_the_plan_in_force_moves_nothing(moves: list[Any]) -> None:
    assert all(found["back_and_forth"]["again"] == 0 for found in moves)


@pytest.mark.parametrize("how", ["at_once", "spread"])
def test_training_follows_the_same_loss_curve_through_migrations(moves: list[Any], how: str) -> None:
    for found in moves:
        curves = found["spread"]
        assert curves[how]["curve"] == pytest.approx(curves["none"]["curve"], rel=1e-4)
        assert curves["none"]["curve"][-1] < curves["none"]["curve"][0]
        assert curves[how]["plans"]


def test_a_spread_migration_flips_after_its_last_part_only(moves: list[Any]) -> None:
    for found in moves:
        assert found["spread"]["spread"]["rounds"] >= 6
        assert found["spread"]["spread"]["old_until_last"]
        assert found["spread"]["at_once"]["rounds"] == 2


def test_a_rank_that_fails_half_way_leaves_the_old_plan_and_all_weights(moves: list[Any]) -> None:
    for found in moves:
        assert found["failing"]["said"].startswith(
            "migration given up, the plan in force stays: rank 1: OSError: no buffer"
        )
        assert found["failing"]["kept"]
        assert found["failing"]["seconds"] < 15


def test_a_migration_that_failed_can_be_tried_again(moves: list[Any]) -> None:
    assert all(found["failing"]["later"] for found in moves)


def test_a_cancelled_migration_leaves_nothing_behind(moves: list[Any]) -> None:
    assert all(found["cancelled"] for found in moves)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other", "another model: its experts is 7"),
        ("larger", "for 6 devices, the mesh has 4 ranks"),
        ("different", "has another one than rank"),
        ("without_state", "has another one than rank"),
        ("nothing", "Linear has no layer of placed experts"),
        ("chunk", "chunk_bytes \\(0\\) must be at least 1"),
        ("gradient", "has a gradient|refused it"),
        ("state", "keeps 'norm' of shape \\[99\\]"),
    ],
)
def test_what_cannot_be_applied_is_refused_on_every_rank(moves: list[Any], case: str, words: str) -> None:
    for found in moves:
        with pytest.raises(mp.InputError, match=words):
            raise mp.InputError(found["refused"].get(case, "nothing was refused"))


@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_a_rank_killed_during_a_migration_leaves_the_survivors_with_one_plan_and_all_weights(
    delay: float, tmp_path: Path
) -> None:
    (tmp_path / "delay").write_text(str(delay))
    found = launch("migration_ranks:killed", 4, tmp_path, dies=[1], seconds=90)
    survivors = [found[rank] for rank in (0, 2, 3)]
    assert len({tuple(rank["plans"]) for rank in survivors}) == 1
    assert all(len(rank["plans"]) == 1 and rank["intact"] for rank in survivors)
    assert all("1" in rank["said"] or not rank["said"] for rank in survivors)
