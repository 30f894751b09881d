"""Measured tables where `aiconfigurator-core` is installed, and tables of that form that are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import moeplace as mp
from moeplace.placement import kernels, transfers
from moeplace.placement.kernels import balanced, expert_fit, expert_rows, installed_root, read

MODEL = mp.ModelSpec(layers=1, experts=64, top_k=8, hidden_size=1024, ffn_size=512)
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]


def write_table(root: Path, seconds_factor: float = 1.0) -> Path:
    """A table of one shape, of 8 ranks and of 16 that take twice as long."""
    rows: dict[str, list[Any]] = {name: [] for name in kernels.COLUMNS}
    for ranks in (2, 4, 8, 16):
        for tokens in TOKENS:
            counts = balanced(tokens, 64, 8, ranks, False)
            pairs, hit = counts.sum(), (counts > 0).sum()
            read_seconds = hit * 3 * 1024 * 512 * 2 / 2e12
            arithmetic = (pairs + 16 * hit) * 6 * 1024 * 512 / 4e14
            seconds = (3e-5 + max(read_seconds, arithmetic)) * (2 if ranks == 16 else 1) * seconds_factor
            values = (1024, 512, 8, 64, ranks, tokens, 1e3 * seconds, "bfloat16", "plain", "balanced", 1)
            for name, value in zip(kernels.COLUMNS, values, strict=True):
                rows[name].append(value)
    path = root / "h100_sxm" / "moe" / "vllm" / "9.9.9" / "moe_perf.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That table as the installed one."""
    path = write_table(tmp_path)
    for module in (kernels, transfers):
        monkeypatch.setattr(module, "installed_root", lambda: tmp_path)
        module._fit.cache_clear()
    yield path
    for module in (kernels, transfers):
        module._fit.cache_clear()


def test_an_installed_table_of_the_shape_takes_the_place_of_what_is_shipped(own_tables: Path) -> None:
    topology = mp.Topology.preset("h100-sxm", engine="vllm")
    pairs, hit = balanced(512, 64, 8, 8, False).sum(), 8
    seconds = mp.expert_seconds(MODEL, gpu="h100-sxm", engine="vllm", tokens=[pairs] * 8, experts_hit=[hit] * 8)
    expected = 3e-5 + hit * 3 * 1024 * 512 * 2 / 2e12
    assert seconds == pytest.approx(np.full(8, expected), rel=0.05)
    assert "vllm 9.9.9 table of 8 ranks kernels on h100-sxm" in mp.prediction_basis(MODEL, topology).text
    sixteen = mp.expert_seconds(MODEL, gpu="h100-sxm", engine="vllm", tokens=[pairs] * 16, experts_hit=[hit] * 16)
    assert sixteen[0] > 1.8 * seconds[0]


def test_shapes_that_no_table_has_are_predicted_as_shipped(own_tables: Path) -> None:
    other = MODEL.replace(hidden_size=2880, ffn_size=2880, expert_dtype="mxfp4")
    fit = kernels.kernel_fit("h100-sxm", "vllm", other, 8)
    assert fit is not None
    assert "table" not in fit.version
    assert expert_fit(own_tables.parents[3], "h100-sxm", "sglang", "bf16", 1024, 512, 64, 8) is None


def test_tables_too_large_or_of_another_form_are_refused(own_tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MOST_ROWS", 10)
    with pytest.raises(mp.FileFormatError, match="at most 10"):
        read(own_tables)
    monkeypatch.undo()
    own_tables.write_bytes(b"PAR1 not a table")
    with pytest.raises(mp.FileFormatError, match="not a table of kernels"):
        expert_rows(own_tables, "vllm")
    pq.write_table(pa.table({"num_tokens": [1]}), own_tables)
    with pytest.raises(mp.FileFormatError):
        expert_rows(own_tables, "vllm")


NEEDED = pytest.mark.skipif(
    installed_root() is None, reason='aiconfigurator-core is not installed: pip install "moeplace[kernels]"'
)


@NEEDED
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_the_tables_of_the_package_predict_what_was_left_out(engine: str) -> None:
    model = mp.ModelSpec(layers=1, experts=256, top_k=8, hidden_size=7168, ffn_size=2048, expert_dtype="fp8")
    fit = kernels.kernel_fit("h100-sxm", engine, model, 8)
    assert fit is not None
    assert "table of 8 ranks" in fit.version
    assert fit.error <= 0.10
    for kind in ("normal", "low_latency"):
        transfer = transfers.transfer_fit("h100-sxm", "sglang", kind, 1, 7168)
        assert transfer is not None
        assert "at 7168" in transfer.library
        assert transfer.error <= 0.10
    topology = mp.Topology.preset("h100-sxm", engine="sglang")
    text = mp.prediction_basis(model, topology, mp.Objective(decode_dispatch="low_latency")).text
    assert "table of 8 ranks" in text
    assert "the table of DeepEP of sglang" in text


@NEEDED
def test_shipped_coefficients_are_those_of_the_tables() -> None:
    root = installed_root()
    assert root is not None
    found = expert_fit(root, "h100-sxm", "vllm", "mxfp4", 2880, 2880, 32, 8)
    shipped = kernels.kernel_data()["experts"]["h100-sxm"]["vllm"]["dtypes"]["mxfp4"]["2880x2880"]
    assert found is not None
    assert found.launch * 1e6 == pytest.approx(shipped[0], rel=0.5)
