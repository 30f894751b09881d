"""Model shapes: checks on construction, and reading Transformers configs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import moeplace as mp
from moeplace.placement.model_config import read_config

SHAPE = {"layers": 2, "experts": 8, "top_k": 2, "hidden_size": 64, "ffn_size": 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, r"top_k \(9\) must not exceed experts \(8\)"),
        ({"layers": 0}, r"ModelSpec.layers: .*given: 0"),
        ({"experts": "many"}, r"ModelSpec.experts: .*given: 'many'"),
        ({"groups": 3}, r"experts \(8\) must be divisible by groups \(3\)"),
        ({"expert_dtype": "int3"}, "'int3'.*fp8"),
        ({"moe_layers": (1, 2, 3)}, "names 3 layers, layers is 2"),
        ({"moe_layers": (2, 1)}, "increasing"),
        ({"depth": 2}, "ModelSpec.depth"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_given(change: dict[str, Any], message: str) -> None:
    with pytest.raises(mp.InputError, match=message):
        mp.ModelSpec(**SHAPE | change)


def test_bytes_and_flops_of_an_expert_count_its_three_matrices() -> None:
    model = mp.ModelSpec(**SHAPE)
    assert model.bytes_per_expert == 3 * 64 * 32 * 2
    assert model.flops_per_token == 2 * 3 * 64 * 32
    assert model.replace(expert_dtype="fp8").bytes_per_expert == 3 * 64 * 32


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        {"num_hidden_layers": 32, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336},
        {"layers": 32, "experts": 8, "top_k": 2, "ffn_size": 14336},
    ),
    "deepseek_v3": (
        {
            "num_hidden_layers": 61,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "intermediate_size": 18432,
            "n_group": 8,
            "first_k_dense_replace": 3,
            "quantization_config": {"quant_method": "fp8"},
        },
        {
            "layers": 58,
            "experts": 256,
            "top_k": 8,
            "ffn_size": 2048,
            "groups": 8,
            "expert_dtype": "fp8",
            "moe_layers": tuple(range(3, 61)),
        },
    ),
    "qwen3_moe": (
        {
            "num_hidden_layers": 48,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [0, 5],
        },
        {"layers": 46, "experts": 128, "ffn_size": 768, "moe_layers": tuple(i for i in range(48) if i not in (0, 5))},
    ),
    "qwen2_moe, every second layer": (
        {
            "num_hidden_layers": 4,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "decoder_sparse_step": 2,
        },
        {"layers": 2, "moe_layers": (1, 3)},
    ),
    "gpt_oss": (
        {
            "num_hidden_layers": 24,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "intermediate_size": 2880,
            "quantization_config": {"quant_method": "mxfp4"},
        },
        {"layers": 24, "experts": 32, "top_k": 4, "expert_dtype": "mxfp4"},
    ),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_published_configs_are_read(family: str, tmp_path: Path) -> None:
    fields, expected = CONFIGS[family]
    fields = fields | {"hidden_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for given in (fields, tmp_path, tmp_path / "config.json"):
        model = mp.ModelSpec.from_config(given)
        assert {name: getattr(model, name) for name in expected} == expected


def test_a_config_without_experts_says_which_fields_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(mp.InputError, match="num_local_experts.*mixture-of-experts"):
        mp.ModelSpec.from_config({"num_hidden_layers": 2, "hidden_size": 8})
    with pytest.raises(mp.InputError, match="no such file"):
        mp.ModelSpec.from_config(tmp_path / "nowhere.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(mp.InputError, match="not JSON"):
        mp.ModelSpec.from_config(tmp_path)


ROUTED = {"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 8, "intermediate_size": 16}


def test_a_zero_or_one_for_each_layer_says_which_layers_hold_experts() -> None:
    """As MiMo-V2-Flash and MiniMax-M3 write moe_layer_freq."""
    assert mp.ModelSpec.from_config({**ROUTED, "moe_layer_freq": [0, 1, 1, 1]}).moe_layers == (1, 2, 3)
    both = {**ROUTED, "moe_layer_freq": [1, 1, 0, 1], "first_k_dense_replace": 1}
    assert mp.ModelSpec.from_config(both).moe_layers == (1, 3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("moe_layer_freq", [0, 1, 1]),
        ("moe_layer_freq", [0, 1, 2, 1]),
        ("moe_layer_freq", "every"),
        ("n_group", [4]),
        ("num_expert_groups", "two"),
        ("first_k_dense_replace", [1]),
        ("decoder_sparse_step", [2, 2]),
        ("mlp_only_layers", 1),
        ("mlp_only_layers", [[0, 1]]),
    ],
)
def test_a_field_that_is_not_understood_is_named_with_its_value(field: str, value: object) -> None:
    with pytest.raises(mp.InputError) as caught:
        mp.ModelSpec.from_config({**ROUTED, field: value})
    assert f"{field} is {value}" in str(caught.value)


def test_a_config_whose_layers_are_all_dense_is_no_moe_model() -> None:
    with pytest.raises(mp.InputError, match="none of its 4 layers holds experts"):
        mp.ModelSpec.from_config({**ROUTED, "first_k_dense_replace": 4})


def test_layer_numbers_that_nobody_gave_are_told_from_given_ones() -> None:
    guessed = mp.ModelSpec(layers=2, experts=4, top_k=1, hidden_size=8, ffn_size=8)
    given = guessed.replace(moe_layers=(0, 1))
    assert guessed == given
    assert (guessed.names_layers, given.names_layers) == (False, True)
    assert guessed.replace(layers=3).moe_layers == (0, 1, 2)
    assert guessed.of_routing(4, (5, 6)).moe_layers == (5, 6)
    with pytest.raises(mp.InputError, match="moe_layers is"):
        given.of_routing(4, (5, 6))
    with pytest.raises(mp.InputError, match="experts is 8, ModelSpec.experts is 4"):
        guessed.of_routing(8, (0, 1))


def test_layers_that_differ_are_refused_in_one_way() -> None:
    blocks = [
        {"block_type": "mamba"},
        {"block_type": "moe", "moe_intermediate_size": 4, "num_experts_per_tok": 2},
        {"block_type": "moe", "moe_intermediate_size": 8, "num_experts_per_tok": 2},
    ]
    puzzle = {"model_type": "nemotron_h_puzzle", "hidden_size": 8, "n_routed_experts": 8, "block_configs": blocks}
    alike = {**puzzle, "block_configs": [blocks[0], blocks[1], blocks[1]]}
    assert mp.ModelSpec.from_config(alike).moe_layers == (1, 2)
    differing: dict[str, dict[str, Any]] = {
        "moe_intermediate_size": puzzle,
        "num_experts": {**ROUTED, "num_experts": [8, 6, 8, 8]},
        "num_local_experts": {**ROUTED, "per_layer_config": {"2": {"num_local_experts": 6}}},
    }
    for field, config in differing.items():
        with pytest.raises(mp.InputError, match=rf"{field} differs between layers .*Nemotron-3 Puzzle.*vLLM"):
            mp.ModelSpec.from_config(config)
    assert mp.ModelSpec.from_config({**ROUTED, "num_experts": [8, 8, 8, 8]}).experts == 8


SCHEDULES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "a step": ({"interleave_moe_layer_step": 2}, (1, 3)),
    "a list of layers": ({"moe_layers": [1, 3], "interleave_moe_layer_step": 1}, (1, 3)),
    "layers in words": ({"moe_layers_enum": "1, 3"}, (1, 3)),
    "a letter a layer": ({"hybrid_override_pattern": "ME*E"}, (1, 3)),
    "a word a layer": ({"layers_block_type": ["mamba", "moe", "attention", "moe"]}, (1, 3)),
    "words of attention alone": ({"layers_block_type": ["mamba", "attention"] * 2}, (0, 1, 2, 3)),
    "a period": ({"expert_layer_period": 2, "expert_layer_offset": 1}, (1, 3)),
    "dense at the start": ({"num_dense_layers": 2}, (2, 3)),
    "hashed, and a layer for more tokens": (
        {"mlp_layer_types": ["hash_moe", "moe", "dense", "moe", "moe"], "num_nextn_predict_layers": 1},
        (0, 1, 3),
    ),
    "between two": ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, (1, 2)),
    "to the end": ({"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 2}, (1, 3)),
    "flags and a layer for more tokens": ({"moe_layer_freq": [0, 1, 1, 1, 1], "num_mtp_layers": 1}, (1, 2, 3)),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_say_which_layers_hold_experts(kind: str) -> None:
    fields, layers = SCHEDULES[kind]
    assert mp.ModelSpec.from_config({**ROUTED, **fields}).moe_layers == layers


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mlp_layer_types", ["sparse", "odd", "sparse", "sparse"]),
        ("mlp_layer_types", ["sparse"] * 6),
        ("hybrid_override_pattern", "MEXE"),
        ("moe_layers", [1, 9]),
        ("moe_layers_enum", "1,b"),
        ("interleave_moe_layer_step", 0),
        ("num_experts_per_tok", [1, 2]),
        ("moe_latent_size", "wide"),
        ("num_hidden_layers", 10**9),
    ],
)
def test_schedules_and_sizes_that_are_not_understood_are_named(field: str, value: object) -> None:
    with pytest.raises(mp.InputError, match=field):
        mp.ModelSpec.from_config({**ROUTED, field: value})


def test_groups_count_where_they_limit_the_choice() -> None:
    def groups(**fields: object) -> int:
        return mp.ModelSpec.from_config({**ROUTED, **fields}).groups

    assert groups(n_group=4, topk_group=2) == 4
    assert groups(num_expert_group=4, topk_group=2) == 4
    assert groups(n_group=4, topk_group=4) == 1
    assert groups(n_group=4, topk_group=2, topk_method="greedy") == 1
    assert groups(num_expert_group=4, topk_group=2, use_grouped_topk=False) == 1


def test_of_how_many_groups_a_token_chooses_is_read_and_must_hold_its_experts() -> None:
    limited = mp.ModelSpec.from_config({**ROUTED, "n_group": 4, "topk_group": 2})
    assert (limited.top_groups, limited.limits_groups) == (2, True)
    assert mp.ModelSpec.model_validate(limited.model_dump(mode="json")) == limited
    assert mp.ModelSpec.from_config({**ROUTED, "n_group": 4, "topk_group": 4}).limits_groups is False
    unsaid = mp.ModelSpec.from_config({**ROUTED, "n_group": 4})
    assert (unsaid.groups, unsaid.top_groups, unsaid.limits_groups) == (4, 0, False)
    assert "top_groups" not in unsaid.model_dump(mode="json")
    sizes = {"layers": 1, "experts": 8, "top_k": 4, "hidden_size": 8, "ffn_size": 8, "groups": 4}
    for top_groups, words in ((5, "must not exceed groups"), (1, "do not fit into top_groups")):
        with pytest.raises(mp.InputError, match=words):
            mp.ModelSpec(**sizes, top_groups=top_groups)
    with pytest.raises(mp.InputError, match="topk_group"):
        mp.ModelSpec.from_config({**ROUTED, "n_group": 8, "topk_group": 1})


def test_what_was_not_read_or_was_assumed_is_told() -> None:
    notes = read_config({**ROUTED, "model_type": "novel", "moe_every": 3, "quant_table": "a.bin"}).notes
    said = " ".join(notes)
    for what in ("'novel' is not one", "not read: moe_every, quant_table", "taken to be gated", "bf16 was taken"):
        assert what in said
    assert read_config({**ROUTED, "model_type": "mixtral", "dtype": "bfloat16"}).notes == ()
    both = read_config({**ROUTED, "n_routed_experts": 16}).notes
    assert "n_routed_experts is 16, num_experts is 8; n_routed_experts was taken" in both


@pytest.mark.slow
def test_changed_configs_raise_only_the_typed_error() -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).parents[2] / "benchmarks", "fuzz_configs", "--count", "400"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
