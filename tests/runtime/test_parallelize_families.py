"""Families that differ in more than sizes, over two ranks: logits, gradients and names are those of one process."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from many_family_ranks import FAMILIES
from ranks import launch

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("many_family_ranks:every_family", 2, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_names_are_those_of_one_process(ranks: list[Any], family: str) -> None:
    for found in ranks:
        assert found[family]["logits"] < 1e-5
        assert found[family]["gradients"] < 1e-4
        assert found[family]["names"] == 0
        assert bool(found[family]["shared"]) is (family == "muse_spark")


@pytest.mark.parametrize("family", ["diffusion_gemma", "muse_spark"])
def test_checkpoints_hold_weights_under_every_name_that_a_model_has_for_them(ranks: list[Any], family: str) -> None:
    """Its encoder and decoder share experts; a norm of all experts stands among them."""
    assert [found[family]["checkpoint"] for found in ranks] == [0, 0]


@pytest.mark.parametrize("read", ["checkpoint", "spread", "files", "spread_files"])
def test_experts_that_compute_nothing_keep_the_rows_that_one_process_wants(ranks: list[Any], read: str) -> None:
    """LongCat's: torch.distributed.checkpoint and from_pretrained refuse experts without them."""
    for found in ranks:
        assert found["longcat_flash"][read] < 1e-5
