"""What serving on Ascend writes: intervals become windows, ranks' columns one table, slots are no experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.profiler.read import open_routing, read_any, reader_of
from moeplace.profiler.readers.ascend import read_mindie, read_omni_placement, read_vllm_ascend_log

CONFIG = {
    "num_moe_layers": 2,
    "collection_Interval": 8,
    "num_of_experts": 6,
    "num_of_selected_experts": [2],
    "num_dangling_shared_experts": 0,
}
COUNTS = np.random.default_rng(0).integers(0, 50, (3, 2, 6))


def hotspots(folder: Path, phase: str, counts: Any, config: dict[str, Any] | None = CONFIG, ranks: int = 2) -> Path:
    """Counts [W, L, E] as MindIE's ranks write them."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, own in enumerate(np.split(counts, ranks, axis=2)):
        rows = own.reshape(-1, own.shape[2])
        (folder / f"{phase}_{rank}.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows.tolist()))
    if config is not None:
        (folder / "model_gen_config.json").write_text(json.dumps(config))
    return folder


def test_mindies_intervals_are_windows_and_phases_workloads(tmp_path: Path) -> None:
    hotspots(tmp_path / "decode", "decode", COUNTS)
    hotspots(tmp_path / "prefill", "prefill", COUNTS[:1] * 7)
    assert reader_of(tmp_path).read is read_mindie
    read = read_any(tmp_path)
    assert isinstance(read, mp.RoutingStatistics)
    np.testing.assert_array_equal(read.load, np.concatenate([COUNTS[:1] * 7, COUNTS]))
    assert (read.workloads, read.window_workload.tolist(), read.top_k) == (("prefill", "decode"), [0, 1, 1, 1], 2)
    # One phase alone is no workload of its own.
    alone = read_any(tmp_path / "decode")
    assert isinstance(alone, mp.RoutingStatistics)
    assert (alone.workloads, len(alone.load)) == (("",), 3)


def test_mindies_last_interval_may_be_cut_off_and_its_config_missing(tmp_path: Path) -> None:
    folder = hotspots(tmp_path, "decode", COUNTS)
    path = folder / "decode_1.csv"
    path.write_text("\n".join(path.read_text().split("\n")[:5]))
    recording = open_routing(folder)
    assert recording.header.num_experts == 6
    assert len(recording.statistics().load) == 2
    assert any("not every rank wrote in full" in note for note in recording.notes)
    (folder / "model_gen_config.json").unlink()
    hotspots(folder, "decode", COUNTS[:1], None)
    recording = open_routing(folder)
    assert any("each of its 2 rows was taken for a layer" in note for note in recording.notes)
    np.testing.assert_array_equal(recording.statistics().load, COUNTS[:1])


@pytest.mark.parametrize("one_file", [True, False])
def test_omni_placements_steps_are_windows_in_order(one_file: bool, tmp_path: Path) -> None:
    for step, counts in zip((9, 10, 2), COUNTS, strict=True):
        parts = [counts] if one_file else np.split(counts, 3, axis=1)
        for rank, own in enumerate(parts):
            text = "".join("".join(f"{count}\t" for count in row) + "\n" for row in own.tolist())
            (tmp_path / f"activation_counts_recordstep_{step}_rank_{rank}.txt").write_text(text)
    assert reader_of(tmp_path).read is read_omni_placement
    read = read_any(tmp_path)
    assert isinstance(read, mp.RoutingStatistics)
    np.testing.assert_array_equal(read.load, COUNTS[[2, 0, 1]])
    with pytest.raises(mp.FileFormatError, match="6 columns over all ranks, of 4 experts: with redundant"):
        read_any(tmp_path, num_experts=4)


def logged(counts: Any, layers: tuple[int, ...] = (1, 2), ranks: int = 2, more: str = "") -> str:
    """Counts [W, L, E] as vLLM-Ascend's first rank logs them."""
    lines, total = [], np.zeros(counts.shape[1:], dtype=int)
    experts = np.array_split(np.arange(counts.shape[2]), ranks)
    for window, own in enumerate(counts, 1):
        total = total + own
        for index, layer in enumerate(layers):
            for rank, ids in enumerate(experts):
                work = [f"{e}:{total[index, e]}" for e in ids]
                lines.append(
                    f"(Worker_DP0 pid=7) INFO 09-17 12:00:00 [runtime.py:160] [EPLB experts] stage=0 "
                    f"layer=model.layers.{layer}.mlp.experts rank={rank} window={window} "
                    f"window_work={own[index, ids].sum()} cumulative_work={total[index, ids].sum()} {more}"
                    f"expert_work={work}"
                )
            lines.append(f"INFO [EPLB diagnostic] stage=0 layer=model.layers.{layer}.mlp.experts window={window}")
    return "\n".join(["INFO starting", *lines, ""])


@pytest.mark.parametrize("more", ["", "window_expert_work={0: 3, 1: 4} "])
def test_vllm_ascends_windows_are_what_they_counted_since_the_last(more: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.log"
    path.write_text(logged(COUNTS, more=more))
    assert reader_of(path).read is read_vllm_ascend_log
    read = read_any(path)
    assert isinstance(read, mp.RoutingStatistics)
    np.testing.assert_array_equal(read.load, COUNTS)
    assert read.moe_layers == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + text, "less than before; are there two runs in one log"),
        (lambda text: text.replace("window=2 ", ""), "line 8 is no \\[EPLB experts\\] of stage"),
        (
            lambda text: "".join(line for line in text.splitlines(True) if "rank=0" not in line),
            "3 of 6 experts are in no",
        ),
        (lambda text: text.replace("expert_work=['0:", "expert_work=['x:", 1), "expert_work is"),
    ],
)
def test_logs_that_are_not_understood_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(change(logged(COUNTS)))
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(tmp_path / "a.log")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "decode_0.csv").unlink(), "no file of rank 0"),
        (lambda folder: (folder / "decode_0.csv").write_text("1,2,3\n1,2\n"), "line 2 has 2 counts, the first 3"),
        (lambda folder: (folder / "decode_0.csv").write_text("1,-2,3\n"), "expected counts"),
        (lambda folder: (folder / "decode_0.csv").write_text("\n"), "nothing in it"),
        (lambda folder: (folder / "decode_0.csv").write_text("1,2,3\n"), "fewer rows than the 2 MoE layers"),
        (lambda folder: (folder / "model_gen_config.json").write_text("[]"), "expected a JSON object"),
        (
            lambda folder: (folder / "model_gen_config.json").write_text(json.dumps(CONFIG | {"num_of_experts": 5})),
            "6 columns over all ranks, of 5 experts",
        ),
        (
            lambda folder: (folder / "model_gen_config.json").write_text(json.dumps(CONFIG | {"num_moe_layers": "2"})),
            "num_moe_layers is '2'",
        ),
        (lambda folder: hotspots(folder, "decode", COUNTS * 0), "every count is 0"),
    ],
)
def test_hotspots_that_cannot_be_are_named(change: Any, message: str, tmp_path: Path) -> None:
    folder = hotspots(tmp_path, "decode", COUNTS)
    change(folder)
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(folder)
