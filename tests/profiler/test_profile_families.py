"""Recorded routing is what each model family computed: real classes, compared with their own routers' outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import moeplace as mp

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from small_models import FAMILIES, RouterWitness, deepseek_v3, tokens  # noqa: E402

from moeplace.profiler.profile import profile  # noqa: E402
from moeplace.profiler.trace_files import read_header, read_trace  # noqa: E402

torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_weights_are_those_the_routers_returned(family: str, tmp_path: Path) -> None:
    build, layers = FAMILIES[family]
    model = build()
    witness = RouterWitness(model)
    with profile(model, tmp_path / "trace") as recorder, torch.no_grad():
        model(input_ids=tokens(3, 11))
        model(input_ids=tokens(2, 7, seed=1))
    trace = read_trace(tmp_path / "trace")
    ids, weights = witness.routing()
    assert witness.layers == layers == trace.moe_layers
    assert trace.gate_weights is not None
    np.testing.assert_array_equal(trace.expert_ids, ids)
    np.testing.assert_array_equal(trace.gate_weights, weights)
    assert trace.step is not None
    np.testing.assert_array_equal(trace.step, np.repeat([0, 1], [33, 14]))
    np.testing.assert_array_equal(trace.position, np.concatenate([np.tile(np.arange(11), 3), np.tile(np.arange(7), 2)]))
    assert len(set(trace.sequence.tolist())) == 5
    assert (recorder.steps, recorder.tokens) == (2, 47)


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_the_sums_of_what_the_routers_returned(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family][0]()
    witness = RouterWitness(model)
    with profile(model, tmp_path / "counts.npz", mode="counts", window_steps=2) as recorder, torch.no_grad():
        for seed in range(3):
            model(input_ids=tokens(2, 9, seed))
    statistics = recorder.statistics()
    experts = statistics.experts
    expected = np.stack(
        [
            [np.bincount(layer.ravel(), minlength=experts) for layer in witness.routing(calls)[0].transpose(1, 0, 2)]
            for calls in (slice(0, 2), slice(2, 3))
        ]
    )
    np.testing.assert_array_equal(statistics.load, expected)
    assert (statistics.tokens, statistics.top_k) == (54, witness.routing()[0].shape[2])
    assert statistics.moe_layers == witness.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_spec_comes_from_the_config_and_travels_with_the_trace(family: str, tmp_path: Path) -> None:
    build, layers = FAMILIES[family]
    model = build()
    with profile(model, tmp_path / "trace") as recorder, torch.no_grad():
        model(input_ids=tokens(1, 4))
    config = model.config
    spec = recorder.model_spec
    assert spec is not None
    assert (spec.moe_layers, spec.hidden_size, spec.ffn_size) == (layers, 16, 24)
    assert spec.experts == recorder.num_experts == (16 if family == "deepseek_v3" else 8)
    assert spec.top_k == config.num_experts_per_tok
    assert spec.groups == (4 if family == "deepseek_v3" else 1)
    assert read_header(tmp_path / "trace").model == spec


def test_deepseek_routing_here_is_not_what_plain_top_k_would_give(tmp_path: Path) -> None:
    """Guards the test above: group limits and the correction bias must really decide in this model."""
    model = deepseek_v3()
    logits = []
    router = model.model.layers[1].mlp.gate
    router.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    with profile(model, tmp_path / "trace"), torch.no_grad():
        model(input_ids=tokens(4, 16))
    plain = logits[0].sigmoid().topk(4, dim=-1).indices.sort(-1).values.numpy()
    recorded = np.sort(read_trace(tmp_path / "trace").expert_ids[:, 0], axis=1)
    assert (plain != recorded).any(axis=1).mean() > 0.2


def test_the_decoder_inside_a_causal_model_may_be_called_itself(tmp_path: Path) -> None:
    model = FAMILIES["olmoe"][0]()
    with profile(model, tmp_path / "trace") as recorder, torch.no_grad():
        model.model(input_ids=tokens(2, 5))
        model(input_ids=tokens(2, 5))
    assert (recorder.steps, recorder.tokens) == (2, 20)
    trace = read_trace(tmp_path / "trace")
    np.testing.assert_array_equal(trace.expert_ids[:10], trace.expert_ids[10:])


def test_a_model_without_moe_layers_is_refused_with_the_way_out() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    )
    with pytest.raises(mp.InputError, match=r"LlamaForCausalLM has no MoE layer.*top_k_index.*routers="):
        profile(model, "unused")


def test_rank_local_experts_are_refused(tmp_path: Path) -> None:
    model = FAMILIES["mixtral"][0]()
    for layer in model.model.layers:
        layer.mlp.experts.num_experts = 4
    with pytest.raises(mp.UnsupportedError, match="expert-parallel"):
        profile(model, tmp_path / "trace")


def test_experts_that_compute_nothing_are_counted_apart_and_end_no_forward(tmp_path: Path) -> None:
    """LongCat's router chooses among experts and identity experts, numbered after them."""
    import transformers as tf

    torch.manual_seed(0)
    sizes = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
    config = tf.LongcatFlashConfig(
        vocab_size=97, hidden_size=16, num_layers=2, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, ffn_hidden_size=24, expert_ffn_hidden_size=8, n_routed_experts=8, zero_expert_num=4, moe_topk=3,
        **sizes,
    )  # fmt: skip
    model = tf.LongcatFlashForCausalLM(config).eval()
    with pytest.raises(mp.UnsupportedError, match="4 zero-computation experts.*mode='counts'"):
        profile(model, tmp_path / "trace")
    with pytest.raises(mp.UnsupportedError, match="the last 4 .* compute nothing and are not placed"):
        profile(model, tmp_path / "all.npz", mode="counts", num_experts=12)
    with profile(model, tmp_path / "counts.npz", mode="counts") as recorder, torch.no_grad():
        model(input_ids=tokens(3, 11))
    load = recorder.statistics().load
    assert load.shape == (1, 2, 8)
    assert 0 < load.sum() < 2 * 33 * 3
    assert recorder.model_spec is not None
    assert (recorder.model_spec.experts, recorder.model_spec.zero_experts) == (8, 4)
