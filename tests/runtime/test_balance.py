"""Balance by the router and Muon, over copies of experts on ranks, against one process."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ranks import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def balance(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("balance_ranks:balance", 4, tmp_path_factory.mktemp("balance"))


def test_a_bias_moves_by_the_tokens_of_all_ranks_counted_once(balance: list[Any]) -> None:
    assert all(found["bias"] == {"counts": True, "bias": True, "moved": True} for found in balance)


def test_the_bias_of_transformers_routers_moves(balance: list[Any]) -> None:
    for found in balance:
        *moved, counted = found["transformers"]
        assert min(moved) > 0
        assert counted == 4 * 2 * 6 * 4 * 2  # ranks, sequences, positions, experts a token, layers


@pytest.mark.parametrize("over", ["batch", "sequence"])
def test_auxiliary_losses_are_those_of_one_process_to_the_gradient(balance: list[Any], over: str) -> None:
    for found in balance:
        assert found["losses"][f"{over} loss"] < 1e-6
        assert found["losses"][f"{over} gradient"] < 1e-6


def test_muon_moves_each_expert_as_torchs_does_alone_through_a_change_of_plan(balance: list[Any]) -> None:
    assert all(found["muon"]["worst"] < 1e-3 for found in balance)


def test_muons_state_moves_from_a_plan_that_leaves_a_rank_without_experts(balance: list[Any]) -> None:
    assert all(found["muon"]["rows"] == 0 for found in balance)


@pytest.mark.parametrize("kind", ["capacity", "padded"])
def test_an_expert_takes_no_more_than_its_capacity_those_with_the_largest_weights(
    balance: list[Any], kind: str
) -> None:
    for found in balance:
        assert found[kind]["worst"] < 1e-4
    assert sum(found[kind]["dropped"] for found in balance) > 0


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("bias", "no router with a buffer"),
        ("scope", "did you mean 'sequence'"),
        ("length", "sequence_length goes with"),
        ("unseen", "saw no forward pass"),
        ("factor", "must be above 0"),
        ("no factor", "padded_tokens needs capacity_factor"),
        ("no tokens", "padded_tokens is 0; expected a whole number"),
        ("two stages", "leave out dispatch ('node_aware')"),
        ("too many", "9 tokens, padded_tokens is 4"),
        ("muon", "give vectors and biases to AdamW"),
    ],
)
def test_wrong_settings_are_refused(balance: list[Any], case: str, words: str) -> None:
    assert all(words in found["refused"].get(case, "nothing was refused") for found in balance)
