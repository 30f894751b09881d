"""Checkpoints written under one plan and number of ranks, read under others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return launch("checkpoint_ranks:write", 4, folder)[0], folder


@pytest.fixture(scope="module")
def loaded(saved: tuple[Any, Path]) -> list[Any]:
    for result in saved[1].glob("rank*.json"):
        result.unlink()
    return launch("checkpoint_ranks:read", 3, saved[1])


def test_weights_and_moments_are_the_same_under_other_plans_and_numbers_of_ranks(
    saved: tuple[Any, Path], loaded: list[Any]
) -> None:
    for found in loaded:
        assert found["rows"] == [saved[0]["rows"], saved[0]["rows"]]


def test_a_rank_writes_one_piece_a_tensor_and_the_plan_stands_beside_them(saved: tuple[Any, Path]) -> None:
    assert len(saved[0]["pieces"]) == 2 * 2 * 3  # layers, tensors, weights and two moments
    assert max(saved[0]["pieces"].values()) <= 4
    assert saved[0]["plan"]


def test_training_goes_on_the_same_whatever_the_plan(loaded: list[Any]) -> None:
    first, second = loaded[0]["curves"]
    assert first == pytest.approx(second, rel=1e-5)


def test_a_transformers_model_gives_the_same_logits_from_a_sharded_models_checkpoint(
    saved: tuple[Any, Path], loaded: list[Any]
) -> None:
    for found in loaded:
        np.testing.assert_allclose(found["logits"], saved[0]["logits"], rtol=1e-4, atol=1e-5)


def test_the_whole_model_reads_it_with_torch_alone(saved: tuple[Any, Path], loaded: list[Any]) -> None:
    for result in saved[1].glob("rank*.json"):
        result.unlink()
    logits = launch("checkpoint_ranks:alone", 1, saved[1])[0]
    np.testing.assert_allclose(logits, saved[0]["logits"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("nowhere", "no file .metadata"),
        ("other", "not a checkpoint of this model"),
        ("shapes", "not a checkpoint of this model"),
    ],
)
def test_what_is_no_checkpoint_of_the_model_is_refused(loaded: list[Any], case: str, words: str) -> None:
    assert all(words in found["said"][case] for found in loaded)
