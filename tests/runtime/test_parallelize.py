"""Transformers models over ranks: same logits, gradients and records as in one process."""

from __future__ import annotations

from typing import Any

import pytest

import moeplace as mp

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ranks import launch
from small_models import FAMILIES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("family_ranks:families", 4, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_whole_model(families: list[Any], family: str) -> None:
    for found in families:
        assert found[family]["logits"] < 1e-5
        assert found[family]["router"] < 1e-4
        assert found[family]["gradients"] < 1e-4


def test_what_was_frozen_stays_so_and_nothing_else_is(families: list[Any]) -> None:
    both = [("gate_up_proj", True), ("down_proj", False), ("gate_up_proj", True), ("down_proj", True)]
    assert all([tuple(entry) for entry in found["frozen"]] == both for found in families)


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


@pytest.mark.parametrize("case", ["seeds", "one_bit"])
def test_ranks_with_other_weights_are_told_whose_differ(families: list[Any], case: str) -> None:
    for rank, found in enumerate(families):
        said = found["refused"].get(case, "nothing was refused")
        assert said.startswith("weights of the model (one seed, or one checkpoint, on every rank): rank")
        assert f"has another one than rank {rank}" in said
        assert case == "seeds" or rank == 1 or "rank 1 has" in said


@pytest.mark.parametrize("case", ["layout", "meta"])
def test_experts_that_only_look_like_what_their_flags_declare_are_refused(families: list[Any], case: str) -> None:
    for found in families:
        said = found["refused"].get(case, "nothing was refused")
        assert "model.layers.0.mlp.experts (Halved) was taken for Fused(name='Halved'" in said
        assert "computes something else" in said


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("forward", "it has another forward than its class"),
        ("hook", "it has forward hooks, which would be lost"),
        ("quantised", "its weights are torch.int8"),
    ],
)
def test_what_would_be_lost_with_the_module_is_refused(families: list[Any], case: str, words: str) -> None:
    for found in families:
        assert words in found["refused"][case]


def test_every_flag_of_transformers_experts_is_declared() -> None:
    import inspect

    from transformers.integrations.moe import use_experts_implementation

    from moeplace.runtime.moe.expert_mlps import Fused

    names = set(inspect.signature(use_experts_implementation).parameters)
    assert {name for name in names if name.startswith(("has_", "is_"))} == Fused.FLAGS


def test_a_kind_that_one_rank_refuses_does_not_leave_the_others_waiting(families: list[Any]) -> None:
    for rank, found in enumerate(families):
        said = found["refused"].get("one_rank_only", "nothing was refused")
        if rank == 2:
            assert said.startswith("UnsupportedError: model.layers.1.mlp.experts (Halved) was taken for Fused")
        else:
            assert said.startswith("InputError: model and plan: rank 2 refused it")
