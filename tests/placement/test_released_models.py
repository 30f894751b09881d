"""Released models are read as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moeplace as mp
from moeplace.placement.cost import combine_bytes, dispatch_bytes
from moeplace.placement.model import DTYPE_BYTES
from moeplace.placement.model_config import read_config
from tests.support.released_configs import FP8_CHANNEL, INT4_GROUP_32, NVIDIA, RELEASED, compressed, deepseek


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_wholly_right(name: str) -> None:
    config, facts = RELEASED[name]
    spec = mp.ModelSpec.from_config(config)
    expected = {field: value for field, value in facts.items() if field != "bytes_per_weight"}
    assert {field: getattr(spec, field) for field in expected} == expected
    weights = facts["ffn_size"] * ((facts["matrices"] - 1) * facts["expert_input_size"] + facts["expert_output_size"])
    assert spec.flops_per_token == 2 * weights
    stored = facts["bytes_per_weight"]
    assert (spec.bytes_per_weight or DTYPE_BYTES[spec.expert_dtype]) == pytest.approx(stored, rel=1e-9)
    # Biases, where there are any, are less than a hundredth.
    assert spec.bytes_per_expert == pytest.approx(weights * stored, rel=1e-2 if spec.expert_bias else 1e-9)


def test_experts_that_cross_links_are_as_wide_as_they_travel() -> None:
    """Latent rows: dispatch and combine carry the experts' width, not that of the residual stream."""
    latent = mp.ModelSpec.from_config(RELEASED["Kimi-K3"][0])
    objective = mp.Objective()
    assert dispatch_bytes(latent, objective) == combine_bytes(latent, objective) == 3584 * 2
    plain = latent.replace(expert_input_size=0, expert_output_size=0)
    assert dispatch_bytes(plain, objective) == 7168 * 2
    assert latent.bytes_per_expert == plain.bytes_per_expert / 2
    assert mp.ModelSpec(**latent.model_dump()) == latent
    assert "expert_input_size" not in plain.model_dump(), "releases before this one read such a plan"


BASE = deepseek("deepseek_v3", 512, 4, 16, 2, 256, 1)


def _stored(quantisation: object, **fields: object) -> tuple[str, float]:
    spec = mp.ModelSpec.from_config({**BASE, "quantization_config": quantisation, **fields})
    return spec.expert_dtype, spec.bytes_per_weight or DTYPE_BYTES[spec.expert_dtype]


HALF = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}


ROWS = (2 / 512 + 1 / 256) / 3
"""One a row of each matrix, a weight."""


GROUPS_OF_64 = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 64}}


def torchao(kind: str, weight_dtype: str, **fields: object) -> dict[str, object]:
    data = {"weight_dtype": {"_type": "torch.dtype", "_data": weight_dtype}, **fields}
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 1, "_data": data}}}


@pytest.mark.parametrize(
    ("quantisation", "stored"),
    [
        (None, ("bf16", 2.0)),
        (compressed(INT4_GROUP_32, ["re:.*mlp.experts.*"]), ("bf16", 2.0)),
        (compressed(INT4_GROUP_32, [f"model.layers.{i}.mlp.experts" for i in range(4)]), ("bf16", 2.0)),
        (compressed(INT4_GROUP_32, [], target="re:.*self_attn.*"), ("bf16", 2.0)),
        (compressed(INT4_GROUP_32, [], target="re:.*experts\\.\\d+\\..*_proj$"), ("int4", 0.5625)),
        (compressed(HALF, []), ("int4", 0.5 + 2 / 64)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, ("int8", pytest.approx(1 + 2 / 512 + 1 / 256))),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*experts.*": {}}}, ("bf16", 2.0)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:.*experts.*": {"bits": 8}}},
         ("int8", pytest.approx(1 + 3 / 128))),
        ({"quant_method": "fp8", "ignored_layers": [f"some.model.layers.{i}.mlp.experts" for i in range(4)]},
         ("bf16", 2.0)),
        ({"quant_method": "fp8", "ignored_layers": ["mtp.layers.1.mlp.experts", "visual.layers.1.mlp.experts"]},
         ("fp8", 1.0)),
        ({"quant_method": "fp8", "ignored_layers": ["re:.*feed_forward\\.experts\\.\\d+\\.w[123]$"]}, ("bf16", 2.0)),
        (compressed(INT4_GROUP_32, [f"model.layers.{i}.mlp.experts.{name}_proj" for i in range(4)
                                    for name in ("gate_up", "down")]), ("bf16", 2.0)),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}},
         ("int4", 0.5 + 4 / 64)),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True},
         ("int8", pytest.approx(1 + 4 * (2 / 512 + 1 / 256) / 3))),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, ("nf4", 0.5 + (1 + 4 / 256) / 64)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["experts"]}, ("bf16", 2.0)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ("fp8", 1.0)),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*.experts.*"]}, ("bf16", 2.0)),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            f"model.layers.{i}.mlp.experts.0.{name}_proj": {"quant_algo": "NVFP4", "group_size": 16}
            for i in range(4) for name in ("up", "down")}}, ("nvfp4", 0.5625)),
        ({"quant_method": "mxfp8"}, ("mxfp8", 1 + 1 / 32)),
        ({"quant_method": "quanto", "weights": "int8"}, ("int8", pytest.approx(1 + 2 * (2 / 512 + 1 / 256) / 3))),
        ({"quant_method": "torchao", "quant_type": {"default": {
            "_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}}}, ("int4", 0.5 + 4 / 64)),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}},
         ("fp8", 1.0)),
        ({"quant_method": "w4afp8"}, ("int4", 0.5 + 2 / 128)),
        ({"quant_method": "w4afp8", "group_size": 64, "ignored_layers": ["lm_head"]}, ("int4", 0.5 + 2 / 64)),
        ({"quant_method": "w4afp8", "moe_weight_format": "mxfp4"}, ("mxfp4", 0.5 + 1 / 32)),
        ({"quant_method": "exl3", "bits": 4.0, "head_bits": 6}, ("int4", pytest.approx(0.5 + 4 * ROWS))),
        ({"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}, ("int8", 1 + 4 / 128**2)),
        ({"quant_method": "w8a8_fp8"}, ("fp8", pytest.approx(1 + 4 * ROWS))),
        ({"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}, ("fp8", 1.0)),
        ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}, ("bf16", 2.0)),
        ({"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
         ("bf16", 2.0)),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            "*self_attn*": {"quant_algo": "FP8"}, "model.layers.*.mlp.experts.*": {"quant_algo": "NVFP4"}}},
         ("nvfp4", 0.5625)),
        (compressed({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x128"}, []),
         ("fp8", 1 + 4 / 128**2)),
        ({"group_size": 64, "bits": 4, **{f"model.layers.{i}.mlp.switch_mlp.{name}_proj": {"group_size": 64, "bits": 8}
                                          for i in range(4) for name in ("up", "down")}}, ("int8", 1 + 4 / 64)),
        ({"quant_method": "hqq", "quant_config": {
            "self_attn.q_proj": {"weight_quant_params": {"nbits": 8, "group_size": 64}}, **{
                f"mlp.experts.{name}_proj": {"weight_quant_params": {"nbits": 4, "group_size": 64}}
                for name in ("gate", "up", "down")}}}, ("int4", 0.5 + 4 / 64)),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": {
            "re:.*self_attn.*": None, "_default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 64}}}}}}},
         ("int4", 0.5 + 4 / 64)),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": {
            "re:.*experts.*": None, "_default": {"_type": "Int4WeightOnlyConfig"}}}}}}, ("bf16", 2.0)),
        (torchao("Int8DynamicActivationIntxWeightConfig", weight_dtype="int4", weight_granularity=GROUPS_OF_64),
         ("int4", 0.5 + 4 / 64)),
        (torchao("IntxWeightOnlyConfig", weight_dtype="int8", granularity={"_type": "PerAxis", "_data": {"axis": 0}}),
         ("int8", pytest.approx(1 + 4 * ROWS))),
        ({"quant_method": "torchao", "quant_type": "int8_dynamic_activation_int4_weight"}, ("int4", 0.5 + 4 / 32)),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, ("int8", pytest.approx(1 + 2 * ROWS))),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "modules_in_block_to_quantize": [
            ["self_attn.q_proj", "self_attn.k_proj"], ["self_attn.o_proj"]]}, ("bf16", 2.0)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "modules_in_block_to_quantize": [
            ["self_attn.o_proj"], ["mlp.experts.0.up_proj"], ["mlp.experts.0.down_proj"]]},
         ("int4", 0.5 + 2.5 / 128)),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128, "block_name_to_quantize": "model.visual.blocks"},
         ("bf16", 2.0)),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 128,
          "to_quant_block_names": ["model.visual.blocks", "model.language_model.layers"]},
         ("int4", 0.5 + 2.5 / 128)),
    ],
)  # fmt: skip
def test_storage_counts_bits_and_scales(quantisation: object, stored: tuple[str, float]) -> None:
    assert _stored(quantisation) == stored


def test_the_dtype_of_mixed_experts_is_that_of_most_weights() -> None:
    groups = {
        name: {"targets": [f"re:.*experts.*{matrix}_proj"], "weights": weights}
        for name, matrix, weights in (("a", "down", FP8_CHANNEL), ("b", "(gate|up)", INT4_GROUP_32))
    }
    mixed = {"quant_method": "compressed-tensors", "config_groups": groups}
    assert _stored(mixed) == ("int4", pytest.approx((2 * 0.5625 + 1 + 2 / 256) / 3))


def test_a_part_of_the_model_may_say_how_the_part_in_it_is_stored() -> None:
    text = {**BASE, "quantization_config": None}
    for config in (
        {"thinker_config": {"quantization_config": NVIDIA, "text_config": text}},
        {"text_config": text, "quantization_config": NVIDIA},
        {"text_config": {**text, "quantization_config": NVIDIA}, "quantization_config": {"quant_method": "fp8"}},
    ):
        assert mp.ModelSpec.from_config(config).expert_dtype == "nvfp4"
    beside = {"text_config": text, "vision_config": {"quantization_config": NVIDIA}}
    assert mp.ModelSpec.from_config(beside).expert_dtype == "bf16"


def test_mistral_s_step_between_layers_with_experts_is_read() -> None:
    moe = {"route_every_n": 2, "num_experts": 16, "num_experts_per_tok": 4, "expert_hidden_dim": 64}
    reading = read_config({"dim": 256, "n_layers": 8, "hidden_dim": 512, "moe": moe})
    assert (reading.fields["moe_layers"], reading.fields["ffn_size"]) == ((0, 2, 4, 6), 64)


def test_exclusions_of_single_experts_are_told() -> None:
    single = compressed(INT4_GROUP_32, ["model.layers.1.mlp.experts.7.up_proj"])
    assert "single experts" in " ".join(read_config({**BASE, "quantization_config": single}).notes)


def test_layers_whose_experts_are_left_as_they_were_count_in_the_mean() -> None:
    some = compressed(INT4_GROUP_32, ["re:model\\.layers\\.1\\..*"])
    reading = read_config({**BASE, "quantization_config": some})
    assert reading.fields["bytes_per_weight"] == pytest.approx((0.5625 * 2 + 2.0) / 3)
    assert any("bf16 and int4 in different layers" in note for note in reading.notes)


@pytest.mark.parametrize(
    "quantisation",
    [
        {"quant_method": "secret"},
        {"quant_method": "gptq", "bits": 3, "group_size": 128},
        {"quant_method": "gguf"},
        {"bits": 4},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 3, "type": "int"}}}},
        {"quant_method": "modelopt", "quant_algo": "NF5"},
        {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "posit"}}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": 3, "weights": INT4_GROUP_32}}},
        compressed(INT4_GROUP_32, ["re:(a+)+$"]),
        compressed(INT4_GROUP_32, ["re:(unbalanced"]),
        compressed(INT4_GROUP_32, []) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        compressed({**HALF, "group_size": None}, []),
        {"quant_method": "gptq", "bits": 4, "group_size": "128"},
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        {"quant_method": "mxfp4", "dequantize": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False},
        {"quant_method": "w4afp8", "moe_weight_format": "int2"},
        {"quant_method": "exl3", "bits": 3.5},
        {"quant_method": "exl3", "bits": 4.0, "layer_bits": {"0": 3, "1": 5}},
        {"quant_method": "exl3", "bits": [4]},
        torchao("Int8DynamicActivationIntxWeightConfig", weight_dtype="int3", weight_granularity=GROUPS_OF_64),
        torchao("Int8DynamicActivationUIntxWeightConfig", weight_dtype="int4"),
        torchao("Float8DynamicActivationFloat8SemiSparseWeightConfig", weight_dtype="float8_e4m3fn"),
        compressed(INT4_GROUP_32, [], "marlin-24"),
        compressed(INT4_GROUP_32, [], "dense"),
        "int4",
        ["fp8"],
    ],
)
def test_a_quantisation_that_is_not_understood_says_what_to_give(quantisation: object) -> None:
    config = {**BASE, "quantization_config": quantisation}
    with pytest.raises(mp.InputError, match="--expert-dtype"):
        mp.ModelSpec.from_config(config)
    assert mp.ModelSpec.from_config(config, expert_dtype="nvfp4").bytes_per_expert == 3 * 512 * 256 * 0.5625


def test_the_quantisation_may_stand_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(NVIDIA))
    assert mp.ModelSpec.from_config(tmp_path).expert_dtype == "nvfp4"
    (tmp_path / "hf_quant_config.json").write_text("[")
    with pytest.raises(mp.InputError, match="hf_quant_config.json"):
        mp.ModelSpec.from_config(tmp_path)


def test_another_dtype_has_its_own_bytes() -> None:
    spec = mp.ModelSpec.from_config({**BASE, "quantization_config": compressed(HALF, [])})
    assert spec.replace(expert_dtype="float32").bytes_per_expert == 4 * spec.weights_per_expert
    assert spec.replace(name="renamed").bytes_per_expert == spec.bytes_per_expert


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (BASE | {"n_routed_experts": 1, "num_experts_per_tok": 1}, "one expert a layer"),
        (
            {
                "model_type": "yuan",
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "moe_config": {
                    "moe_num_experts": 32,
                    "moe_top_k": 2,
                    "ffn_hidden_size": 128,
                    "per_layer_experts_blocks": [32, 32, 24, 32],
                },
            },
            "per_layer_experts_blocks differs between layers",
        ),
        (BASE | {"use_moe": False}, "use_moe is False, such a deepseek_v3 has no experts"),
        (BASE | {"experts_shared_frequency": 3}, "3 layers in a row use the same experts"),
        (
            BASE | {"model_type": "llama_moe", "num_selects": 2, "size_experts": [[688, 690]] * 4},
            "size_experts is .* expected the same of all experts of a layer",
        ),
        (
            BASE | {"model_type": "zaya", "num_experts": 8, "moe_intermediate_size": None, "ffn_hidden_size": 511},
            "ffn_hidden_size is 511, expected an even number, for gate and up",
        ),
        (BASE | {"model_type": "zaya", "zaya_layers": ["a", 16, "b", 16]}, "zaya_layers is .* expected"),
    ],
)
def test_what_no_plan_can_be_of_is_refused(config: dict[str, object], why: str) -> None:
    with pytest.raises(mp.InputError, match=why):
        mp.ModelSpec.from_config(config)


DESCRIPTION = {
    "model_quant_type": "W8A8_DYNAMIC",
    "group_size": 0,
    "model.embed_tokens.weight": "FLOAT",
    "model.layers.1.self_attn.q_proj.weight": "W8A8",
}


@pytest.mark.parametrize(
    ("experts", "group", "stored"),
    [
        ("W8A8_DYNAMIC", 0, ("int8", 1 + 8 * (2 / 512 + 1 / 256) / 3)),
        ("W4A8_DYNAMIC", 256, ("int4", 0.5 + 8 / 256)),
        ("W8A8_MXFP8", 32, ("mxfp8", 1 + 1 / 32)),
        ("W4A4_MXFP4", 32, ("mxfp4", 0.5 + 1 / 32)),
        ("FLOAT", 0, ("bf16", 2.0)),
    ],
)
def test_ascend_s_description_beside_the_config_says_how_experts_are_stored(
    experts: str, group: int, stored: tuple[str, float], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{m}_proj.weight" for i in range(4) for e in range(16) for m in ("up", "down")
    ]
    said = DESCRIPTION | {"group_size": group} | dict.fromkeys(names, experts)
    (tmp_path / "quant_model_description.json").write_text(json.dumps(said))
    spec = mp.ModelSpec.from_config(tmp_path)
    assert spec.expert_dtype == stored[0]
    assert (spec.bytes_per_weight or DTYPE_BYTES[spec.expert_dtype]) == pytest.approx(stored[1])


def test_ascend_s_type_of_the_model_is_read_and_one_not_known_refused(tmp_path: Path) -> None:
    for fields in ({"quantize": "w8a8_dynamic"}, {"quantization_config": {"model_quant_type": "W8A8_DYNAMIC"}}):
        assert mp.ModelSpec.from_config(BASE | fields).expert_dtype == "int8"
    with pytest.raises(mp.InputError, match="msModelSlim's type is 'W2A8'.*--expert-dtype"):
        mp.ModelSpec.from_config(BASE | {"quantize": "W2A8"})
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    for name in ("quant_model_description_w8a8.json", "quant_model_description_w4a8.json"):
        (tmp_path / name).write_text(json.dumps(DESCRIPTION))
    with pytest.raises(mp.InputError, match="w4a8.json, quant_model_description_w8a8.json describe different weights"):
        mp.ModelSpec.from_config(tmp_path)


def test_lists_that_tell_layers_by_words_are_named_where_they_are_not_read() -> None:
    known = {"hidden_size": 64, "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2}
    new = {"model_type": "new", "moe_intermediate_size": 32, "glu": False} | known
    reading = read_config({**new, "ffn_kinds": ["mlp", "moe", "moe", "moe"]})
    assert "not read: ffn_kinds" in reading.notes
    assert (reading.fields["matrices"], reading.fields["layers"]) == (2, 4)
    assert read_config({**new, "is_moe_layer": [False, True, True, True]}).fields["moe_layers"] == (1, 2, 3)


def test_fields_that_say_what_is_quantised_are_named_where_they_are_not_read() -> None:
    fp8 = {"quant_method": "fp8", "ignored_layers": ["lm_head"], "experts_to_skip": ["experts"]}
    assert read_config({**BASE, "quantization_config": fp8}).notes == ("not read: quantization_config.experts_to_skip",)
    mlx = {"group_size": 64, "bits": 4, "model.layers.1.mlp.gate": {"group_size": 64, "bits": 8}}
    assert read_config({**BASE, "quantization": mlx}).notes == ()


def test_what_is_no_config_is_refused_by_its_type() -> None:
    with pytest.raises(mp.InputError, match="a config is a path, a dict or a PretrainedConfig, not a list"):
        mp.ModelSpec.from_config([1, 2])  # type: ignore[arg-type]
