"""The combine's Triton kernels in Triton's interpreter, against torch's own operations."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")
if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install triton", allow_module_level=True)

from ranks import launch

pytestmark = pytest.mark.slow


def test_sums_and_gradients_are_those_of_torchs_own_operations_and_the_same_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (found,) = launch("gather_ranks:sums", 1, tmp_path)
    assert found["float32"] == [True] * 4
    assert max(found["bfloat16"]) <= 2**-7, "one unit: the interpreter cuts where GPUs round"
    assert all(found["again"])
    assert max(found["weights"]) < 1e-5


def test_a_batch_comes_back_through_the_kernels_as_through_torchs_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for apart in launch("gather_ranks:combined", 2, tmp_path):
        assert max(apart) < 1e-5
