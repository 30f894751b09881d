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


@pytest.mark.long
def test_changed_records_raise_only_the_typed_error_take_little_memory_and_run_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="SGLang's records are read with torch")
    done = subprocess.run(
        [sys.executable, BENCHMARKS, "fuzz_readers", "--count", "200", "--json", tmp_path / "rows"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(results) > 20
    # Changes that were all refused, or all harmless, would test nothing.
    assert all(result["read"] and result["refused"] for result in results), results
