"""Released models are read as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moeplace as mp
from moeplace.placement.cost import combine_bytes, dispatch_bytes
from moeplace.placement.model import DTYPE_BYTES
from moeplace.placement.model_config import read_config
from tests.support.released_configs import INT4_GROUP_32, NVIDIA, RELEASED, compressed, deepseek


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
    ],
)  # fmt: skip
def test_storage_counts_bits_and_scales(quantisation: object, stored: tuple[str, float]) -> None:
    assert _stored(quantisation) == stored


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
