"""Routing of models whose tokens, layers or router are not those of plain decoders: real classes, tiny sizes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp

torch = pytest.importorskip("torch")
tf = pytest.importorskip("transformers")

torch.set_num_threads(1)

DECODER = {"input_ids": torch.arange(22).view(2, 11), "decoder_input_ids": torch.arange(14).view(2, 7)}


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    import families

    return families


def switch(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 2, "num_decoder_layers": 4}
    steps = {"encoder_sparse_step": 2, "decoder_sparse_step": 2, "decoder_start_token_id": 0}
    config = tf.SwitchTransformersConfig(vocab_size=32, num_experts=4, **(sizes | steps | changes))
    return tf.SwitchTransformersForConditionalGeneration(config).eval()


def chosen(model: Any) -> list[Any]:
    """Hears what the decoder's routers return."""
    heard: list[Any] = []
    for name, module in model.named_modules():
        if name.startswith("decoder.") and name.endswith("router"):
            module.register_forward_hook(lambda _, args, output: heard.append(output[0]))
    return heard


def test_of_an_encoder_and_a_decoder_the_decoder_s_tokens_are_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = switch()
    heard = chosen(model)
    with caplog.at_level(logging.WARNING), mp.profile(model, tmp_path / "trace") as recorder, torch.no_grad():
        model(**DECODER)
    assert r"the decoder is recorded; routers=r'encoder\..*experts$' records the encoder" in caplog.text
    trace = mp.read_trace(tmp_path / "trace")
    assert trace.expert_ids.shape == (14, 2, 1)
    np.testing.assert_array_equal(trace.expert_ids[:, :, 0].T, [part.argmax(-1).flatten() for part in heard])
    # Counted on from the encoder's two layers, as the model's spec and permuted checkpoints count.
    assert trace.moe_layers == recorder.moe_layers == (3, 5)
    assert mp.ModelSpec.from_config(model.config).moe_layers == (1, 3, 5)
    np.testing.assert_array_equal(trace.position, np.tile(np.arange(7), 2))


def test_an_encoder_is_recorded_where_it_is_named(tmp_path: Path) -> None:
    model = switch()
    with mp.profile(model, tmp_path / "trace", routers=r"encoder\..*experts$"), torch.no_grad():
        model(**DECODER)
    trace = mp.read_trace(tmp_path / "trace")
    assert (trace.expert_ids.shape, trace.moe_layers) == ((22, 1, 1), (1,))


def test_generated_and_labelled_tokens_of_a_decoder_are_followed(tmp_path: Path) -> None:
    model = switch(num_layers=4)
    with mp.profile(model, tmp_path / "trace") as recorder, torch.no_grad():
        model(input_ids=DECODER["input_ids"], labels=DECODER["decoder_input_ids"])
        model.generate(DECODER["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert recorder.steps == 4
    trace = mp.read_trace(tmp_path / "trace")
    np.testing.assert_array_equal(trace.position[14:], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(trace.sequence[14:], [2, 3, 2, 3, 2, 3])


def test_tokens_past_an_expert_s_capacity_are_counted_nowhere(tmp_path: Path) -> None:
    model = switch(expert_capacity=1)
    heard = chosen(model)
    with mp.profile(model, tmp_path / "counts.npz", mode="counts"), torch.no_grad():
        model(**DECODER)
    expected = np.stack([part.sum((0, 1)) for part in heard])
    assert expected.sum() < 2 * 14
    np.testing.assert_array_equal(mp.read_statistics(tmp_path / "counts.npz").total_load, expected)
    with (
        pytest.raises(mp.UnsupportedError, match=r"model layer 3 gave a token no expert.*mode='counts'"),
        mp.profile(model, tmp_path / "trace"),
        torch.no_grad(),
    ):
        model(**DECODER)


def test_a_mask_over_experts_is_not_taken_for_their_numbers(tmp_path: Path) -> None:
    config = tf.NllbMoeConfig(
        d_model=8, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=8, decoder_ffn_dim=8, num_experts=4,
        encoder_attention_heads=1, decoder_attention_heads=1, encoder_sparse_step=2, decoder_sparse_step=2,
        vocab_size=32,
    )  # fmt: skip
    model = tf.NllbMoeForConditionalGeneration(config).eval()
    for routers in (r"decoder.*experts$", r"decoder.*router$"):
        with (
            pytest.raises(mp.InputError, match=r"\[14, 4\] has a number for every expert, a mask perhaps"),
            mp.profile(model, tmp_path / routers[-8:-1], mode="counts", routers=routers),
            torch.no_grad(),
        ):
            model(**DECODER)


def test_tokens_sorted_by_expert_are_put_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.JetMoeConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_key_value_heads=2, kv_channels=8, intermediate_size=8,
        num_local_experts=5, num_experts_per_tok=2,
    )  # fmt: skip
    model = tf.JetMoeForCausalLM(config).eval()
    logits: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.router.register_forward_hook(lambda _, args, output: logits.append(output[4]))
    with mp.profile(model, tmp_path / "trace"), torch.no_grad():
        model(input_ids=torch.arange(22).view(2, 11))
    trace = mp.read_trace(tmp_path / "trace")
    values, ids = torch.stack(logits).topk(2, dim=-1)
    np.testing.assert_array_equal(trace.expert_ids, ids.transpose(0, 1))
    np.testing.assert_allclose(trace.gate_weights, values.softmax(-1).transpose(0, 1), atol=1e-3)


def test_tokens_that_skip_a_layer_are_not_the_first_expert_s(tmp_path: Path, families: Any) -> None:
    model = families.build(*families.families()["zaya"])
    for layer in model.model.layers:
        layer.mlp.gate.balancing_biases[-1] = 0.1
    skipped: list[int] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: skipped.append(int((args[2] == 0).sum())))
    with pytest.raises(mp.UnsupportedError, match="1 zero-computation experts.*mode='counts'"):
        mp.profile(model, tmp_path / "trace")
    with mp.profile(model, tmp_path / "counts.npz", mode="counts"), torch.no_grad():
        model(input_ids=torch.arange(66).view(2, 33))
    load = mp.read_statistics(tmp_path / "counts.npz").total_load
    assert 0 < sum(skipped) < 66 * len(skipped)
    np.testing.assert_array_equal(load.sum(axis=1), 66 - np.array(skipped))


def test_a_model_that_runs_layers_again_is_counted_and_a_trace_refused_with_the_cause(
    tmp_path: Path, families: Any
) -> None:
    model = families.build(*families.families()["inkling2_loop"])
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    ids = torch.arange(22).view(2, 11)
    with mp.profile(model, tmp_path / "counts.npz", mode="counts"), torch.no_grad():
        model(input_ids=ids)
    assert set(calls.values()) == {1, 2}
    load = mp.read_statistics(tmp_path / "counts.npz").total_load
    np.testing.assert_array_equal(load.sum(axis=1), [22 * 2 * count for count in calls.values()])
    with (
        pytest.raises(mp.UnsupportedError, match=r"ran more than once in one forward call: the model loops"),
        mp.profile(model, tmp_path / "trace"),
        torch.no_grad(),
    ):
        model(input_ids=ids)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ernie4_5_vl_moe", "dots3_note"])
def test_experts_beside_the_language_model_are_left_out(family: str, tmp_path: Path, families: Any) -> None:
    model = families.build(*families.families()[family])
    assert families.check_profile(model, tmp_path) == families.EXACT
