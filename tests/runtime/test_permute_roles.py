"""Which part of a layer a tensor is, where a family stores more than experts and a router of as many rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.model_config import read_config
from moeplace.runtime.permute.checkpoint import (
    Role,
    StoredTensor,
    experts_by_place,
    file_ranges,
    permute_checkpoint,
    read_header,
    tensor_roles,
)

SIZES: dict[str, Any] = {
    "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 1, "dtype": "bfloat16",
    "num_experts_per_tok": 2,
}  # fmt: skip
BLOCK = "model.layers.0.mlp"


def roles(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Role | None]:
    reading = read_config({**SIZES, **config})
    tensors = [StoredTensor(Path("x"), f"{BLOCK}.{name}", "F32", shape, 0, 0) for name, shape in shapes.items()]
    found = tensor_roles(tensors, mp.ModelSpec(**reading.fields), reading)
    return {name.removeprefix(f"{BLOCK}."): role for name, role in found.items()}


EXPERTS = {"experts.gate_up_proj": (8, 64, 64), "experts.down_proj": (8, 64, 32)}


def test_rows_of_shared_experts_behind_the_router_s_stay() -> None:
    inkling = {"model_type": "inkling", "n_routed_experts": 8, "n_shared_experts": 2}
    router = {"gate.weight": (10, 64), "gate.e_score_correction_bias": (8,), "gate.global_scale": (1,)}
    found = roles(inkling, {**EXPERTS, **router, "shared_experts.gate_proj": (2, 32, 64)})
    assert found["gate.weight"] == found["gate.e_score_correction_bias"] == Role("router", 0)
    assert found["gate.global_scale"] is found["shared_experts.gate_proj"] is None
    with pytest.raises(mp.UnsupportedError, match="expected 8 experts in dimension 0"):
        roles({"model_type": "qwen3_moe", "num_experts": 8, "n_shared_experts": 2}, {**EXPERTS, **router})


def test_a_router_of_several_matrices_may_choose_none_of_the_experts() -> None:
    zaya = {"model_type": "zaya", "num_experts": 8, "num_experts_per_tok": 1}
    router = {
        "gate.down_proj.weight": (16, 64),
        "gate.router_mlp.out_proj.weight": (9, 16),
        "gate.balancing_biases": (9,),
    }
    found = roles(zaya, {**EXPERTS, **router})
    assert found["gate.router_mlp.out_proj.weight"] == found["gate.balancing_biases"] == Role("router", 0)
    assert found["gate.down_proj.weight"] is None


def test_a_norm_of_all_experts_stays() -> None:
    muse = {"model_type": "muse_spark", "num_local_experts": 8, "moe_hidden_size": 32}
    shapes = {"gate.weight": (8, 64), "experts.gate_up_proj": (8, 64, 32), "experts.down_proj": (8, 32, 32)}
    assert roles(muse, {**shapes, "experts.post_expert_norm.weight": (32,)})["experts.post_expert_norm.weight"] is None
    narrow = {"gate.weight": (8, 64), "experts.down_proj": (8, 8, 32), "experts.post_expert_norm.weight": (8,)}
    with pytest.raises(mp.UnsupportedError, match=r"post_expert_norm.*as long as an expert's output"):
        roles({**muse, "moe_hidden_size": 8}, narrow)


def ernie() -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    config = {"model_type": "ernie4_5_moe_vl", "moe_num_experts": [4, 4], "moe_intermediate_size": [2, 1], "moe_k": 2,
              "num_hidden_layers": 1, "hidden_size": 3, "moe_layer_start_index": 0, "dtype": "float32"}  # fmt: skip
    shapes = {
        f"experts.{e}.{part}.weight": (2 if e < 4 else 1, 3) for e in range(8) for part in ("gate_proj", "up_proj")
    }
    shapes |= {"gate.weight": (3, 4), "gate.weight_1": (3, 4), "moe_statics.e_score_correction_bias": (2, 4)}
    return config, {f"{BLOCK}.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_experts_of_the_other_set_stay(tmp_path: Path) -> None:
    """ERNIE-VL: experts for text, and behind them those for vision, with a router of their own."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    config, tensors = ernie()
    save_file(tensors, tmp_path / "model.safetensors")
    reading, header = read_config(config), read_header(tmp_path / "model.safetensors")
    found = tensor_roles(header.tensors, mp.ModelSpec(**reading.fields), reading)
    experts = experts_by_place([header], found, 4, {4, 8})
    rows = np.array([2, 0, 3, 1])
    data = b"".join(
        part.data
        if hasattr(part, "data")
        else (tmp_path / "model.safetensors").read_bytes()[part.start :][: part.nbytes]
        for part in file_ranges(header, found, experts, {0: rows})
    )
    (tmp_path / "moved.safetensors").write_bytes(header.raw + data)
    moved = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "moved.safetensors")
    for name, value in tensors.items():
        expert = int(name.split(".")[5]) if ".experts." in name else None
        expected = value
        if expert is not None and expert < 4:
            expected = tensors[name.replace(f"experts.{expert}.", f"experts.{rows[expert]}.")]
        elif name.endswith("gate.weight"):
            expected = value[:, rows]
        elif name.endswith("e_score_correction_bias"):
            expected = np.stack([value[0][rows], value[1]])
        np.testing.assert_array_equal(moved[name], expected)


@pytest.mark.slow
def test_a_model_whose_experts_run_by_number_alone_is_refused_with_the_cause(tmp_path: Path) -> None:
    tf = pytest.importorskip("transformers")
    config = tf.NllbMoeConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8, num_experts=4,
        encoder_attention_heads=1, decoder_attention_heads=1, encoder_sparse_step=1, decoder_sparse_step=1,
        vocab_size=16,
    )  # fmt: skip
    tf.NllbMoeForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    spec = mp.ModelSpec.from_config(tmp_path / "model")
    plan = mp.Plan(spec, mp.Topology.preset("h100-hgx", devices_per_node=2), [[3, 1, 2, 0]] * 2, [0, 0, 1, 1])
    with pytest.raises(
        mp.UnsupportedError, match="mask of chosen experts for their numbers.*experts 0 and 1 alone run"
    ):
        permute_checkpoint(tmp_path / "model", plan, tmp_path / "permuted")


@pytest.mark.slow
def test_a_plan_may_be_of_the_decoder_alone(tmp_path: Path) -> None:
    tf = pytest.importorskip("transformers")
    load_file = pytest.importorskip("safetensors.numpy").load_file
    config = tf.SwitchTransformersConfig(
        d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=2, num_decoder_layers=2, num_experts=4, vocab_size=16,
        encoder_sparse_step=2, decoder_sparse_step=2,
    )  # fmt: skip
    tf.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    spec = mp.ModelSpec.from_config(tmp_path / "model")
    assert spec.moe_layers == (1, 3)
    decoder = spec.replace(layers=1, moe_layers=(3,))
    plan = mp.Plan(decoder, mp.Topology.preset("h100-hgx", devices_per_node=2), [[3, 1, 2, 0]], [0, 0, 1, 1])
    done = permute_checkpoint(tmp_path / "model", plan, tmp_path / "permuted", verify=True)
    assert "logits of drawn prompts are those of the original" in done.verified
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "permuted"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("decoder.block.1.") for name in changed)


@pytest.mark.slow
def test_a_model_that_draws_in_its_forward_is_compared_on_equal_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import families

    families.build(*families.families()["diffusion_gemma"]).save_pretrained(tmp_path / "model")
    plan = families._plan(mp.ModelSpec.from_config(tmp_path / "model"), 2)
    done = permute_checkpoint(tmp_path / "model", plan, tmp_path / "permuted", verify=True)
    assert "logits of drawn prompts are those of the original" in done.verified
