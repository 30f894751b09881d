"""Dispatch by DeepEP, on a stand-in for its Buffer: real Gloo ranks, none of its kernels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
