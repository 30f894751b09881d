"""Changed records give a result or the typed error, in bounded memory, and run nothing: a short run of the
benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    "records",
    [
        ("sglang stat", "sglang per_pass", "sglang per_token"),
        ("sglang responses", "vllm responses", "routed array", "exflow"),
        ("trtllm", "megatron", "load history"),
        ("moeplace trace", "moeplace statistics"),
        ("loads npy", "loads npz", "loads json", "loads csv"),
        ("loads pt", "token imbalance", "rollout"),
    ],
)
def test_changed_records_raise_only_the_typed_error_take_little_memory_and_run_nothing(
    records: tuple[str, ...],
    tmp_path: Path,
) -> None:
    pytest.importorskip("torch", reason="SGLang's records are read with torch")
    done = subprocess.run(
        [sys.executable, BENCHMARKS, "fuzz_readers", "--count", "250", "--json", tmp_path / "rows", "--only", *records],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [result["record"] for result in results] == list(records)
    # Changes that were all refused, or all harmless, would test nothing.
    assert all(result["read"] and result["refused"] for result in results), results
