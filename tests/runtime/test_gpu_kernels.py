"""The measurement of kernels runs where there is no GPU, in small, and says so where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.slow

KERNELS = [sys.executable, str(Path(__file__).resolve().parents[2] / "benchmarks"), "gpu_kernels"]


@pytest.mark.long
def test_the_small_mode_measures_every_kernel_and_finds_bfloat16_near_float32(tmp_path: Path) -> None:
    command = [*KERNELS, "--device", "cpu", "--seconds", "0.001", "--json", str(tmp_path / "rows")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    kernels = {row["kernel"]: row for row in rows if "kernel" in row}
    assert "unpermute with its gradients" in kernels
    assert {"permute", "unpermute", "LSH: hashes and clusters", "grouped product", "SwiGLU experts"} <= set(kernels)
    assert all(row["ms"] > 0 and row["bound ms"] > 0 for row in kernels.values())
    assert all(row["error"] is None or row["error"] < 0.02 for row in kernels.values()), kernels
    plans = [row for row in rows if row.get("table") == "plans"]
    assert len({row["plan"] for row in plans}) == 6
    assert {row["step"] for row in plans} == {"decode", "prefill"}
    assert all(row["measured us"] > 0 and row["here us"] > 0 for row in plans)
    for step in ("decode", "prefill"):
        places = [row["order"] for row in plans if row["step"] == step]
        assert sorted(place.split(",")[0] for place in places) == [str(place) for place in range(1, 7)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_how_to_run_it_small() -> None:
    done = subprocess.run(KERNELS, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert "--device cpu" in done.stderr
