"""Decoding over ranks, in both modes: the tokens and logits of the whole model. Real Gloo processes, many checks a
spawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moeplace as mp

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ranks import launch
from small_models import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.long]

NEW, SEQUENCES, LAYERS = 6, 6, 2


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("decoder_ranks:families", 4, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("mode", ["ContextCoherentDecoder", "DispatchCombineDecoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_and_logits_are_those_of_the_whole_model(families: list[Any], family: str, mode: str) -> None:
    for found in families:
        for dimensions in (1, 2):
            assert found[family][f"{mode} {dimensions}"]["equal"]
        assert found[family][f"{mode} 2"]["logits"] < 1e-5
    # A model that repeats one token would agree with anything.
    assert max(found[family]["distinct"] for found in families) > NEW


@pytest.mark.long
def test_generated_tokens_are_those_of_the_whole_model_under_random_plans(tmp_path: Path) -> None:
    for found in launch("decoder_ranks:plans", 4, tmp_path):
        assert found["different"] == []


@pytest.fixture(scope="module")
def behaviours(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("decoder_ranks:behaviours", 4, tmp_path_factory.mktemp("behaviours"))


def test_copies_between_ranks_are_those_that_the_cost_model_counts(behaviours: list[Any]) -> None:
    for found in behaviours:
        assert len(found["copies"]) == 16
        for what, (sent, counted) in found["copies"].items():
            assert sent == counted, what
        assert sum(map(sum, found["copies"]["context_coherent top-1 1 combine"][0])) == 0
        assert sum(map(sum, found["copies"]["context_coherent top-4 2 combine"][0])) > 0


def test_one_expert_a_token_takes_one_all_to_all_a_layer(behaviours: list[Any]) -> None:
    for found in behaviours:
        counted = {what: entry["all_to_alls"] for what, entry in found["exchanges"].items()}
        assert counted["ContextCoherentDecoder top-1 1"] == {"dispatch": 1}
        assert counted["ContextCoherentDecoder top-1 2"] == {"dispatch": 1}
        assert counted["ContextCoherentDecoder top-2 1"] == {"dispatch": 1, "combine": 1}
        assert counted["DispatchCombineDecoder top-1 1"] == {"dispatch": 1, "combine": 1}
        assert counted["DispatchCombineDecoder top-2 2"] == {"dispatch": 2, "combine": 2}


def test_keys_and_values_of_every_new_token_reach_every_rank_and_cross_to_a_node_once(behaviours: list[Any]) -> None:
    for mesh in (1, 2):
        entries = [found["exchanges"][f"ContextCoherentDecoder top-2 {mesh}"] for found in behaviours]
        made = sum(entry["tokens"] for entry in entries)
        assert made == SEQUENCES * entries[0]["iterations"]
        sent = [entry["gathered"] for entry in entries]
        assert sum(map(sum, sent)) == made * LAYERS * 3
        between_nodes = sum(sent[a][b] for a in range(4) for b in range(4) if a // 2 != b // 2)
        assert between_nodes == made * LAYERS * (2 if mesh == 1 else 1)
        assert {entry["row_bytes"] for entry in entries if sum(entry["gathered"])} == {2 * 16 * 4 + 8}


def test_time_is_accounted_by_part(behaviours: list[Any]) -> None:
    for found in behaviours:
        assert found["exchanges"]["ContextCoherentDecoder top-2 1"]["seconds"] == [
            "attention",
            "combine",
            "context",
            "dispatch",
            "experts",
            "gather",
            "head",
            "ids",
        ]


def test_all_tokens_to_the_same_experts_give_the_logits_of_dispatch_and_combine(behaviours: list[Any]) -> None:
    assert all(max(found["one_expert"]) < 1e-4 for found in behaviours)


def test_sequences_end_at_their_end_token_while_others_go_on(behaviours: list[Any]) -> None:
    assert all(found["ends"]["equal"] for found in behaviours)
    assert 1 <= behaviours[0]["ends"]["ended"] < SEQUENCES
    assert sum(found["ends"]["tokens"] for found in behaviours) < SEQUENCES * (NEW - 1)


def test_bfloat16_is_as_near_as_its_precision(behaviours: list[Any]) -> None:
    assert all(found["half_precision"] < 0.03 for found in behaviours)


def test_a_plan_applied_between_two_generations_changes_no_token(behaviours: list[Any]) -> None:
    assert all(found["new_plan"] for found in behaviours)


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("training", "InputError", "training mode; call model.eval"),
        ("family", "UnsupportedError", "LlamaForCausalLM \\(llama\\) cannot be decoded"),
        ("headless", "UnsupportedError", "OlmoeModel"),
        ("attention", "UnsupportedError", "'flex_attention' takes no mask"),
        ("rope", "UnsupportedError", "'dynamic' change with the longest sequence"),
        ("other", "InputError", "its hidden_size is 32, this model's 16"),
        ("ranks", "InputError", "for 5 devices, the mesh has 4 ranks"),
        ("layer", "InputError", "its moe_layers is \\(0,\\), this model's \\(0, 1\\)"),
        ("spread", "InputError", "spread by another plan"),
        (
            "compressed",
            "UnsupportedError",
            "sent by CompressedDispatcher, compression=LSH.*sends them whole",
        ),
        ("quantized", "UnsupportedError", "compression=QuantizedRows.*sends them whole"),
        ("compressing", "UnsupportedError", "sends tokens whole"),
        ("none", "InputError", "no rank has a prompt"),
        ("no_new", "InputError", "new tokens \\(0\\) must be at least 1"),
        ("shape", "InputError", "shape \\[4\\], expected \\[prompts, tokens\\]"),
        ("mask", "InputError", "pad prompts on the left"),
        ("empty", "InputError", "prompt 0 of this rank is empty"),
        ("full", "InputError", "the context holds 5 tokens"),
        ("float", "InputError", "input_ids is torch.float32, expected whole numbers"),
        ("fraction", "InputError", "new tokens \\(2.5\\) must be"),
        ("negative token", "InputError", "input_ids has the token -\\d+, the model's are 0 to"),
        ("step tokens", "InputError", "token_B has the token 1000"),
        ("step shape", "InputError", "token_B has shape \\[1\\], expected \\[8\\]"),
        ("step routing", "InputError", "routing names expert -1, the layers have 0 to 7"),
        ("step routing shape", "InputError", "routing has ids of shape \\[1, 8, 2\\]"),
    ],
)
def test_what_would_give_other_tokens_is_refused_on_every_rank(
    behaviours: list[Any], case: str, error: str, words: str
) -> None:
    for found in behaviours:
        kind, said = found["refusals"].get(case, ["", "nothing was refused"])
        assert kind == error
        with pytest.raises(mp.InputError, match=words):
            raise mp.InputError(said)


@pytest.mark.parametrize("case", ["different", "unequal"])
def test_ranks_with_different_plans_or_settings_are_told_whose_differ(behaviours: list[Any], case: str) -> None:
    for rank, found in enumerate(behaviours):
        named = "rank 0, 1, 3 has another one than rank 2" if rank == 2 else f"rank 2 has another one than rank {rank}"
        assert named in found["refusals"][case][1]


def test_a_rank_that_refuses_does_not_leave_the_others_waiting(behaviours: list[Any]) -> None:
    for rank, found in enumerate(behaviours):
        assert ("rank 3 refused it" in found["refusals"]["one_refuses"][1]) == (rank != 3)
        words = "input_ids has the token" if rank == 1 else "rank 1 refused it"
        assert words in found["refusals"]["unknown token"][1]


def test_a_rank_that_dies_is_named_by_the_others_within_the_timeout(tmp_path: Path) -> None:
    found = launch("decoder_ranks:killed", 4, tmp_path, dies=[2], seconds=100)
    for rank in (0, 1, 3):
        assert found[rank]["said"].startswith("rank 2 did not answer")
        assert found[rank]["seconds"] < 15
