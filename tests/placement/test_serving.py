"""What steps take beside their MoE layers, for models that are known."""

from __future__ import annotations

import pytest

import moeplace as mp
from moeplace.placement.decide import Saving, whole_step_text
from moeplace.placement.serving import OTHER, TERMS, known_architecture, other_work, serving_data
from moeplace.placement.topology import PRESETS

DEEPSEEK = mp.ModelSpec(layers=58, experts=256, top_k=8, hidden_size=7168, ffn_size=2048, expert_dtype="fp8")
GPT_OSS = mp.ModelSpec(layers=24, experts=32, top_k=4, hidden_size=2880, ffn_size=2880, expert_dtype="mxfp4")
H200 = mp.Topology.preset("h200-sxm", engine="sglang")
BATCHES = (mp.Batch("decode", tokens_per_device=64), mp.Batch("prefill", tokens_per_device=4096))


def test_models_are_known_by_their_experts() -> None:
    found = known_architecture(DEEPSEEK)
    assert found is not None
    assert found[0] == "DeepSeek-V3"
    # 671 B parameters, of which 654 B are routed experts.
    assert found[1].dense_weights == pytest.approx(17e9, rel=0.1)
    assert found[1].expert_weights * 256 * 58 == pytest.approx(654e9, rel=0.01)
    assert found[1].kv_values == 61 * 576
    small = known_architecture(GPT_OSS)
    assert small is not None
    assert small[0] == "gpt-oss-20b"
    assert known_architecture(GPT_OSS.replace(layers=12, moe_layers=tuple(range(12)))) is None


def test_other_work_is_of_the_batches_and_says_how_sure_it_is() -> None:
    found = other_work(DEEPSEEK, H200, BATCHES)
    assert found is not None
    # Every device reads 17 GB of weights at 3.8 TB/s for each step of decode.
    assert 3 < found.ms["decode"] < 40
    assert found.ms["prefill"] > found.ms["decode"]
    assert 0 < found.error["decode"] < 0.3
    assert "DeepSeek-V3" in found.text
    assert f"TPOT ±{found.error['decode'] * 100:.0f} %" in found.text
    longer = other_work(DEEPSEEK, H200, BATCHES, context=65_536)
    assert longer is not None
    assert longer.ms["decode"] >= found.ms["decode"]
    assert longer.ms["prefill"] > found.ms["prefill"]
    larger = other_work(DEEPSEEK, H200, [mp.Batch("decode", tokens_per_device=256)])
    assert larger is not None
    assert set(larger.ms) == {"decode"}
    assert larger.ms["decode"] > found.ms["decode"]


def test_what_is_not_known_is_left_to_be_given() -> None:
    assert other_work(DEEPSEEK.replace(ffn_size=1024), H200, BATCHES) is None
    assert other_work(DEEPSEEK, mp.Topology.preset("h200-sxm"), BATCHES) is None
    assert other_work(DEEPSEEK, mp.Topology.preset("a100-sxm", engine="sglang"), BATCHES) is None


def test_a_verdict_takes_it() -> None:
    found = other_work(GPT_OSS, H200, BATCHES[:1])
    assert found is not None
    saved = Saving(0.1, 0.05, 0.15, None, {"decode 512": (0.009, 0.010)})
    text = whole_step_text(saved, found.ms, 0.05)
    assert f"TPOT {10 + found.ms['decode']:.4g} to {9 + found.ms['decode']:.4g} ms" in text


def test_all_that_is_known_of_served_steps_is_sane() -> None:
    data = serving_data()
    gpus = {box.gpu for box in PRESETS.values()}
    for engine, by_gpu in data["engines"].items():
        assert engine in ("vllm", "sglang", "trtllm")
        assert set(by_gpu) <= gpus
        for phases in by_gpu.values():
            for phase, (coefficients, error) in phases.items():
                assert len(coefficients) == len(TERMS[phase])
                assert min(coefficients) >= 0
                assert 0 < error <= 40
                names = dict(zip(TERMS[phase], coefficients, strict=True))
                assert any(names[name] > 0 for name in OTHER[phase])
