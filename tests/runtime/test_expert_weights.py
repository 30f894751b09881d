"""Models that no rank could hold: from their files on the meta device, a rank its own experts, and out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ranks import launch
from small_models import FAMILIES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("weight_ranks:families", 3, tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_read_from_its_files_on_the_meta_device_gives_the_same_logits(families: list[Any], family: str) -> None:
    assert all(found[family]["meta"] < 1e-5 for found in families)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_save_pretrained_writes(families: list[Any], family: str) -> None:
    for found in families:
        assert found[family]["again"] == []
        assert found[family]["names"] == []
        assert "config.json" in found[family]["files"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_reads_its_own_experts_and_the_rest_once(families: list[Any], family: str) -> None:
    compared = [found[family] for found in families if found[family]["expected"]]
    assert compared
    for found in compared:
        own, rest = found["expected"]
        assert own + rest <= found["read"] <= own + rest + 4096  # buffers of routers are stored as well


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", "expected one an expert"),
        ("shape", "shape"),
        ("quantised", "F8_E4M3, a quantised type"),
        ("folder", "holds weights already"),
    ],
)
def test_files_that_do_not_fit_are_refused(families: list[Any], case: str, words: str) -> None:
    told = [found["refused"].get(case, "nothing was refused") for found in families]
    assert any(words in said for said in told)
    assert all(words in said or "refused it; see the error there" in said for said in told)


def test_a_checkpoint_is_read_into_a_model_on_the_meta_device(tmp_path: Path) -> None:
    assert all(error < 1e-5 for error in launch("weight_ranks:meta_checkpoint", 2, tmp_path))


def test_experts_cut_over_copies_are_read_from_whole_ones_and_written_as_such(tmp_path: Path) -> None:
    for found in launch("weight_ranks:cut", 4, tmp_path):
        assert found["error"] < 1e-5
        assert found["same"]
