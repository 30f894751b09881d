"""Transformers models over ranks: same logits, gradients and records as in one process."""

from __future__ import annotations

from typing import Any

import pytest

import moeplace as mp

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ranks import launch
from small_models import FAMILIES


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("family_ranks:families", 4, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_whole_model(families: list[Any], family: str) -> None:
    for found in families:
        assert found[family]["logits"] < 1e-5
        assert found[family]["router"] < 1e-4
        assert found[family]["gradients"] < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_names_and_modes_stay(families: list[Any], family: str) -> None:
    for found in families:
        assert found[family]["names"] == []
        assert not any(found[family]["training"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_recorded_like_the_original(families: list[Any], family: str) -> None:
    for found in families:
        rows, tokens, spec = found[family]["recorded"]
        assert rows == tokens
        assert spec


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("plain", "Linear has no MoE block that is known"),
        ("other", "its hidden_size is 32, this model's 16"),
        ("layers", "its moe_layers is \\(0,\\), this model's \\(0, 1\\)"),
        ("function", "its function is not known"),
    ],
)
def test_models_and_plans_that_do_not_fit_are_refused(families: list[Any], case: str, words: str) -> None:
    for found in families:
        with pytest.raises(mp.InputError, match=words):
            raise mp.InputError(found["refused"].get(case, "nothing was refused"))
