"""TensorRT-LLM's expert statistics, written as its recorder writes them."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import moeplace as mp
from moeplace.profiler.read import read_any
from moeplace.profiler.readers.trtllm import is_trtllm, read_trtllm

torch.set_num_threads(1)

EXPERTS, TOP_K = 6, 2
LAYERS = (3, 4, 60)


def routed(rank: int, iteration: int, layer: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank * 1000 + iteration * 100 + layer)
    return torch.rand(20, EXPERTS, generator=generator).topk(TOP_K).indices


def record(folder: Path, ranks: int = 2, iterations: tuple[int, ...] = (99, 100, 101), experts: int = EXPERTS) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": experts, "num_experts_per_token": TOP_K}))
    for rank in range(ranks):
        counts = {
            f"{i}_{layer}": torch.bincount(routed(rank, i, layer).flatten(), minlength=experts)
            for i in iterations
            for layer in LAYERS
        }
        save_file(counts, folder / f"rank{rank}.safetensors")
    return folder


def read(path: Path) -> mp.RoutingStatistics:
    statistics = read_any(path)
    assert isinstance(statistics, mp.RoutingStatistics)
    return statistics


def test_ranks_are_summed_and_layers_keep_their_absolute_index(tmp_path: Path) -> None:
    statistics = read(record(tmp_path / "s"))
    # By number, not by name: "99" comes before "100".
    for window, iteration in enumerate((99, 100, 101)):
        for at, layer in enumerate(LAYERS):
            both = torch.cat([routed(rank, iteration, layer).flatten() for rank in (0, 1)])
            np.testing.assert_array_equal(statistics.load[window, at], torch.bincount(both, minlength=EXPERTS).numpy())
    assert (statistics.moe_layers, statistics.top_k, statistics.experts) == (LAYERS, TOP_K, EXPERTS)
    assert statistics.tokens == 3 * 2 * 20


def test_an_iteration_cut_short_is_left_out(tmp_path: Path) -> None:
    folder = record(tmp_path / "s")
    for rank in (0, 1):
        counts = {f"{i}_{n}": torch.ones(EXPERTS, dtype=torch.int64) for i in (1, 2) for n in LAYERS}
        del counts["2_60"]
        save_file(counts, folder / f"rank{rank}.safetensors")
    assert read(folder).load.shape == (1, 3, EXPERTS)


def test_slots_of_a_load_balancer_map_back_to_experts(tmp_path: Path) -> None:
    folder = record(tmp_path / "s")
    slots = {3: [0, 1, 2, 3, 0, 1], 4: [3, 2, 1, 0, 3, 2], 60: [0, 0, 1, 1, 2, 3]}
    mapped, raw = read_trtllm(folder, assignments=slots), read(folder)
    assert mapped.experts == 4
    for at, layer in enumerate(LAYERS):
        for expert in range(4):
            mine = [slot for slot, e in enumerate(slots[layer]) if e == expert]
            np.testing.assert_array_equal(mapped.load[:, at, expert], raw.load[:, at, mine].sum(1))
    with pytest.raises(mp.InputError, match="assignments lack layer 60"):
        read_trtllm(folder, assignments={3: slots[3], 4: slots[4]})
    with pytest.raises(mp.InputError, match="layer 4 are not 6 expert ids"):
        read_trtllm(folder, assignments=slots | {4: [0, 1]})


def test_a_folder_without_the_record_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "meta_info.json").write_text("{}")
    assert not is_trtllm(tmp_path)
    with pytest.raises(mp.InputError, match="not a folder with meta_info.json"):
        read_trtllm(tmp_path / "nothing")


def tensors(**values: Any) -> Any:
    return lambda folder: save_file(values, folder / "rank1.safetensors")


def written(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


def header(entry: Any) -> Any:
    text = json.dumps({"1_3": entry}).encode()
    return written("rank1.safetensors", len(text).to_bytes(8, "little") + text + bytes(8 * EXPERTS))


BAD: dict[str, tuple[Any, str]] = {
    "a missing rank": (lambda folder: (folder / "rank0.safetensors").unlink(), "rank0.safetensors is missing"),
    "no experts": (written("meta_info.json", b'{"num_experts_per_token": 2}'), "num_experts is None"),
    "too many a token": (written("meta_info.json", b'{"num_experts": 6, "num_experts_per_token": 7}'), "from 1 to 6"),
    "meta of text": (written("meta_info.json", b"{"), "meta_info.json: not JSON, or truncated"),
    "a meta list": (written("meta_info.json", b"[]"), "a JSON list"),
    "another number of experts": (tensors(**{"1_3": torch.ones(7, dtype=torch.int64)}), r"1_3 is not I64 \[6\]"),
    "floats": (tensors(**{"1_3": torch.ones(6)}), r"1_3 is not I64 \[6\]"),
    "another name": (tensors(weight=torch.ones(6, dtype=torch.int64)), "named 'weight', expected iteration_layer"),
    "a layer never set": (tensors(**{"1_None": torch.ones(6, dtype=torch.int64)}), "'1_None'"),
    "negative counts": (tensors(**{"1_3": -torch.ones(6, dtype=torch.int64)}), "1_3 holds -1"),
    "an empty file": (written("rank1.safetensors", b""), "truncated"),
    "a header past the end": (written("rank1.safetensors", b"\xff" * 16), "truncated or not safetensors"),
    "offsets past the end": (
        header({"dtype": "I64", "shape": [6], "data_offsets": [8, 56]}),
        "lies at 8:56 of 48 bytes and takes 48",
    ),
    "offsets of text": (header({"dtype": "I64", "shape": [6], "data_offsets": "0:48"}), "data_offsets 0:48"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_record_is_said(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    folder = record(tmp_path / "s")
    change(folder)
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(folder)


def test_keys_scattered_over_layers_and_iterations_take_no_memory(tmp_path: Path) -> None:
    folder = record(tmp_path / "s", ranks=1)
    scattered = {f"{i}_{i}": torch.ones(EXPERTS, dtype=torch.int64) for i in range(3000)}
    save_file(scattered, folder / "rank0.safetensors")
    with pytest.raises(mp.FileFormatError, match="no iteration counted each of the 3000 layers"):
        read_any(folder)


with tempfile.TemporaryDirectory() as made:
    FILES = {file.name: file.read_bytes() for file in record(Path(made)).iterdir()}


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), max_size=4),
    st.floats(0, 2),
)
def test_changed_bytes_raise_only_the_typed_error(name: str, edits: list[tuple[float, bytes]], cut: float) -> None:
    content = bytearray(FILES[name])
    for place, change in edits:
        at = int(place * len(content))
        content[at : at + len(change)] = change
    del content[int(cut * len(content)) + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        for other, original in FILES.items():
            (Path(folder) / other).write_bytes(bytes(content) if other == name else original)
        with contextlib.suppress(mp.InputError):
            read_trtllm(folder)
