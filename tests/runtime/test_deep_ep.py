"""Dispatch by DeepEP, on a stand-in for its Buffer: real Gloo ranks, none of its kernels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from ranks import launch

pytestmark = pytest.mark.slow


def test_outputs_and_gradients_equal_one_process_within_bfloat16s_precision(tmp_path: Path) -> None:
    for worst in launch("deep_ep_stand_in:equality", 4, tmp_path):
        assert set(worst) == {"out", "x", "gate", "gate_up_proj", "down_proj"}
        assert max(worst.values()) < 0.02, worst


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is not None, reason="DeepEP is installed")
def test_where_it_is_missing_and_for_tokens_that_it_does_not_send_the_layer_says_so(tmp_path: Path) -> None:
    for missing, wide in launch("deep_ep_stand_in:refused", 2, tmp_path):
        assert "needs DeepEP, which cannot be imported" in missing
        assert "give 'flat' or 'node_aware'" in missing
        assert "DeepEP sends tokens in bfloat16, these are torch.float32" in wide


@pytest.fixture(scope="module")
def low_latency(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("deep_ep_stand_in:low_latency", 4, tmp_path_factory.mktemp("low_latency"))


def test_decoding_in_low_latency_mode_equals_one_process_within_the_rows_precision(low_latency: list[Any]) -> None:
    for found in low_latency:
        assert found["bfloat16"] < 0.02
        # Against experts that are given the rows as fp8 has them.
        assert found["fp8"] < 0.02


def test_low_latency_mode_refuses_gradients_and_what_its_buffers_do_not_hold(low_latency: list[Any]) -> None:
    for found in low_latency:
        assert "goes forward only: gradients would be lost" in found["gradients"]
        assert "9 tokens, DeepEPLowLatency was told of at most 8" in found["tokens"]
        assert "multiples of 128 values, tokens have 16" in found["width"]
        assert "has another one than rank" in found["one"]
        assert "tokens is 0; expected a whole number of at least 1" in found["none"]
        assert "with DeepEPDispatcher it would do nothing" in found["delayed"]


@pytest.mark.skipif(importlib.util.find_spec("deep_ep") is not None, reason="DeepEP is installed")
def test_low_latency_mode_says_that_deep_ep_is_missing(low_latency: list[Any]) -> None:
    assert all("DeepEPLowLatency needs DeepEP, which cannot be imported" in found["missing"] for found in low_latency)
