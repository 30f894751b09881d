"""Recording while training: checkpointed layers, errors inside the block, copies of the model, disk trouble."""

from __future__ import annotations

import copy
import resource
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from small_models import RouterWitness, olmoe, tokens

import moeplace as mp
from moeplace.profiler.profile import profile
from moeplace.profiler.trace_files import read_trace

torch.set_num_threads(1)


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_run_again_by_checkpointing_are_recorded_once(reentrant: bool, tmp_path: Path) -> None:
    model = olmoe(use_cache=False).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    witness = RouterWitness(model)
    with profile(model, tmp_path / "t") as recorder:
        losses = [model(input_ids=tokens(2, 5, seed), labels=tokens(2, 5, seed)).loss for seed in range(2)]
        sum(losses).backward()
        # A backward pass between two forwards, as with gradient accumulation.
        model(input_ids=tokens(2, 5, 2), labels=tokens(2, 5)).loss.backward()
    assert len(witness.calls[0]) == 6  # the layers really ran again
    assert (recorder.steps, recorder.tokens) == (3, 30)
    trace = read_trace(tmp_path / "t")
    np.testing.assert_array_equal(trace.expert_ids[:10], witness.routing(0)[0])
    np.testing.assert_array_equal(trace.expert_ids[10:20], witness.routing(1)[0])


def test_a_whole_model_run_again_by_checkpointing_is_recorded_once(tmp_path: Path) -> None:
    model = olmoe(use_cache=False).train()
    embedded = model.get_input_embeddings()(tokens(2, 5))
    with profile(model, tmp_path / "t") as recorder:

        def forward(x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = model(inputs_embeds=x).logits
            return result

        torch.utils.checkpoint.checkpoint(forward, embedded, use_reentrant=False).sum().backward()
    assert (recorder.steps, recorder.tokens) == (1, 10)


def test_gradients_are_those_without_recording(tmp_path: Path) -> None:
    model = olmoe(use_cache=False).train()
    model(input_ids=tokens(2, 5), labels=tokens(2, 5)).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with profile(model, tmp_path / "t"):
        model(input_ids=tokens(2, 5), labels=tokens(2, 5)).loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))
    assert hooks_of(model) == 0


@pytest.mark.parametrize("mode", ["tokens", "counts"])
def test_an_error_inside_the_block_keeps_the_steps_before_it(mode: str, tmp_path: Path) -> None:
    model = olmoe()
    recorder = profile(model, tmp_path / "t", mode=mode)  # type: ignore[arg-type]

    def script() -> None:
        with recorder, torch.no_grad():
            model(input_ids=tokens(2, 5))
            model.model.layers[1].mlp.gate.register_forward_pre_hook(_fail)
            model(input_ids=tokens(2, 5))

    with pytest.raises(RuntimeError, match="the script's own"):
        script()
    assert (recorder.steps, recorder.tokens) == (1, 10)
    assert recorder.statistics().tokens == 10
    assert hooks_of(model) == 1  # the test's own
    assert not [path for path in tmp_path.rglob("*") if ".tmp" in path.name]


def test_a_forward_that_fails_and_is_tried_again_counts_once(tmp_path: Path) -> None:
    model = olmoe()
    with profile(model, tmp_path / "t") as recorder, torch.no_grad():
        handle = model.model.layers[1].mlp.gate.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="the script's own"):
            model(input_ids=tokens(4, 5))
        handle.remove()
        model(input_ids=tokens(2, 5))
    assert (recorder.steps, recorder.tokens) == (1, 10)


def _fail(*_: object) -> None:
    raise RuntimeError("the script's own error")


def test_a_disk_that_fails_ends_the_recording_and_not_the_model(tmp_path: Path) -> None:
    model = olmoe(use_cache=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    forwards = []

    def script() -> None:
        with profile(model, tmp_path / "t"), torch.no_grad():
            for number in range(60):
                model(input_ids=tokens(64, 64), logits_to_keep=1)
                forwards.append(number)

    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # what a disk that fills up looks like
    try:
        with pytest.raises(OSError, match="File too large"):
            script()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 16 <= len(forwards) < 60  # a row group of 65,536 tokens, and not many more
    assert hooks_of(model) == 0
    assert not (tmp_path / "t").exists(), "nothing is left of it"


def test_a_copy_of_the_model_made_inside_the_block_is_not_recorded(tmp_path: Path) -> None:
    model = olmoe()
    with profile(model, tmp_path / "t") as recorder, torch.no_grad():
        model(input_ids=tokens(1, 3))
        copied = copy.deepcopy(model)
        copied(input_ids=tokens(1, 3))
    assert recorder.steps == 1


def test_a_block_without_forward_calls_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(mp.InputError, match=r"no forward call of the OlmoeForCausalLM"),
        profile(olmoe(), tmp_path / "t"),
    ):
        pass
    assert not (tmp_path / "t").exists()


def test_out_that_holds_a_recording_is_refused(tmp_path: Path) -> None:
    model = olmoe()
    for mode, out in (("tokens", tmp_path / "t"), ("counts", tmp_path / "c.npz")):
        with profile(model, out, mode=mode), torch.no_grad():  # type: ignore[arg-type]
            model(input_ids=tokens(1, 3))
        with pytest.raises(mp.InputError, match="already"), profile(model, out, mode=mode):  # type: ignore[arg-type]
            pass
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "token"}, "did you mean 'tokens'"),
        ({"sample": 0.0}, r"sample \(0.0\)"),
        ({"sample": 1.5}, r"sample \(1.5\)"),
        ({"window_steps": 0}, "window_steps"),
        ({"extract": print}, "routers="),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(mp.InputError, match=message):
        profile(olmoe(), "unused", **settings)  # type: ignore[arg-type]


def test_a_recorder_records_once_and_has_no_statistics_before_the_end(tmp_path: Path) -> None:
    model = olmoe()
    with profile(model, tmp_path / "t") as recorder, torch.no_grad():
        model(input_ids=tokens(1, 3))
        with pytest.raises(mp.InputError, match="not complete"):
            recorder.statistics()
    assert recorder.statistics().tokens == 3
    with pytest.raises(mp.InputError, match="records once"):
        recorder.__enter__()
