"""Checkpoints from elsewhere: truncated files, headers that lie, indexes that do not fit, and memory while
streaming."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.runtime.permute.checkpoint import expert_order, permute_checkpoint, read_header

EXPERTS, WIDTH = 4, 2


def write_safetensors(path: Path, tensors: dict[str, Any], edit: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """The format written by hand, so that any part of it can be made wrong."""
    entries: dict[str, Any] = {}
    data = b""
    for name, array in tensors.items():
        entries[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    if edit is not None:
        edit(entries)
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def layer_tensors(layer: int) -> dict[str, Any]:
    rng = np.random.default_rng(layer)
    names = [f"experts.{e}.{part}" for e in range(EXPERTS) for part in ("gate_proj", "up_proj", "down_proj")]
    shapes = {"gate": (EXPERTS, WIDTH)} | dict.fromkeys(names, (WIDTH, WIDTH))
    return {
        f"model.layers.{layer}.mlp.{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two layers in two shards that share an expert tensor's layer, with an index."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = layer_tensors(0) | layer_tensors(1)
    names = list(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, members in parts.items():
        write_safetensors(folder / file, {name: tensors[name] for name in members})
    weight_map = {name: file for file, members in parts.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "olmoe", "num_hidden_layers": 2, "num_experts": EXPERTS, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": WIDTH, "intermediate_size": WIDTH}))
    return folder


def plan_for(folder: Path) -> mp.Plan:
    spec = mp.ModelSpec.from_config(folder)
    topology = mp.Topology.preset("h100-hgx", devices_per_node=2)
    return mp.Plan(spec, topology, np.array([[3, 1, 0, 2], [1, 2, 3, 0]]), np.array([0, 0, 1, 1]))


def test_bytes_move_between_shards_and_headers_stay(checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_for(checkpoint)
    permute_checkpoint(checkpoint, plan, tmp_path / "out")
    before = {t.name: (h, t) for h in map(read_header, sorted(checkpoint.glob("*.safetensors"))) for t in h.tensors}
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        header = read_header(file)
        assert header.raw == read_header(checkpoint / file.name).raw
        data = file.read_bytes()
        for tensor in header.tensors:
            layer, rest = int(tensor.name.split(".")[2]), tensor.name.split(".")[4:]
            got = np.frombuffer(data[tensor.start : tensor.start + tensor.nbytes], np.float32).reshape(tensor.shape)
            original = layer_tensors(layer)
            if rest[0] == "gate":
                expected = original[tensor.name][plan.physical_to_logical[layer]]
            else:
                expert = plan.physical_to_logical[layer, int(rest[1])]
                expected = original[tensor.name.replace(f"experts.{rest[1]}.", f"experts.{expert}.")]
            assert np.array_equal(got, expected)
            assert tensor.name in before
    permute_checkpoint(tmp_path / "out", plan, tmp_path / "back", invert=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir()} == {
        p.name: p.read_bytes() for p in checkpoint.iterdir()
    }


def set_entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda entries: entries[name].update(fields)


A, B = "first.weight", "second.weight"
TWO = {A: np.zeros((2, 3), np.float32), B: np.ones((4,), np.float32)}
LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a larger shape": (set_entry(A, shape=[2, 30]), r"first\.weight: 24 bytes, its shape \[2, 30\]"),
    "a vast shape": (set_entry(A, shape=[1 << 62, 1 << 62]), r"first\.weight: 24 bytes"),
    "a negative dimension": (set_entry(A, shape=[-2, -3]), "non-negative"),
    "a fractional dimension": (set_entry(A, shape=[2.0, 3]), "whole numbers"),
    "too many dimensions": (set_entry(A, shape=[1] * 17), "at most 16"),
    "an unknown dtype": (set_entry(A, dtype="F33"), "dtype 'F33' is unknown"),
    "a dtype that is no text": (set_entry(A, dtype=["F32"]), "is unknown"),
    "offsets past the end": (set_entry(B, data_offsets=[24, 4000], shape=[994]), "bytes, the header describes"),
    "offsets before the start": (set_entry(A, data_offsets=[-24, 0]), "non-negative"),
    "offsets reversed": (set_entry(A, data_offsets=[24, 0]), "-24 bytes"),
    "overlapping tensors": (set_entry(B, data_offsets=[20, 36]), r"second\.weight starts at byte"),
    "a hole": (set_entry(B, data_offsets=[28, 44]), r"second\.weight starts at byte"),
    "one offset": (set_entry(B, data_offsets=[24]), "two non-negative"),
    "a missing field": (lambda entries: entries[B].pop("shape"), "expected dtype, shape and data_offsets"),
    "a tensor that is no object": (lambda entries: entries.update({B: 3}), "expected dtype"),
    "a tensor unlisted": (lambda entries: entries.pop(B), "the header describes"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    edit, message = LIES[case]
    write_safetensors(tmp_path / "x.safetensors", TWO, edit)
    with pytest.raises(mp.FileFormatError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = f'{{"a":{entry},"a":{entry}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(mp.FileFormatError, match="stands twice"):
        read_header(tmp_path / "x.safetensors")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "whole.safetensors", TWO)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert len(read_header(tmp_path / "whole.safetensors").tensors) == 2
    for end in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:end])
        with pytest.raises(mp.FileFormatError):
            read_header(tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole + b"\0")
    with pytest.raises(mp.FileFormatError):
        read_header(tmp_path / "cut.safetensors")


def test_a_header_length_beyond_the_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 1 << 63) + b"{}")
    with pytest.raises(mp.FileFormatError, match="header said to take"):
        read_header(tmp_path / "x.safetensors")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_a_header_that_fits_it_or_the_typed_error(data: Any, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", TWO)
    content = bytearray((tmp_path / "x.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    (tmp_path / "x.safetensors").write_bytes(content)
    try:
        header = read_header(tmp_path / "x.safetensors")
    except mp.FileFormatError:
        return
    assert len(header.raw) + sum(tensor.nbytes for tensor in header.tensors) == len(content)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    data = json.loads(path.read_text())
    change(data["weight_map"])
    path.write_text(json.dumps(data))


NAME = "model.layers.0.mlp.gate.weight"
FOLDERS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "a missing shard": (lambda f: (f / "b.safetensors").unlink(), mp.FileFormatError, r"b\.safetensors is missing"),
    "a cut shard": (
        lambda f: (f / "b.safetensors").write_bytes((f / "b.safetensors").read_bytes()[:-4]),
        mp.FileFormatError,
        "truncated",
    ),
    "a tensor in another shard": (
        lambda f: edit_index(f, lambda m: m.update({NAME: "b.safetensors"})),
        mp.FileFormatError,
        rf"disagree about tensor {NAME}",
    ),
    "a tensor the index lacks": (
        lambda f: edit_index(f, lambda m: m.pop(NAME)),
        mp.FileFormatError,
        "disagree about tensor",
    ),
    "a shard outside the folder": (
        lambda f: edit_index(f, lambda m: m.update({NAME: "../a.safetensors"})),
        mp.FileFormatError,
        "not a shard of this folder",
    ),
    "a shard that is no text": (
        lambda f: edit_index(f, lambda m: m.update({NAME: 3})),
        mp.FileFormatError,
        "not a shard of this folder",
    ),
    "an empty index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        mp.FileFormatError,
        "no weight_map",
    ),
    "a cut index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map'),
        mp.FileFormatError,
        "not JSON, or truncated",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        mp.InputError,
        "neither model.safetensors nor",
    ),
    "two forms at once": (
        lambda f: write_safetensors(f / "model.safetensors", TWO),
        mp.InputError,
        "remove the stale one",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), mp.InputError, "no config.json"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), mp.FileFormatError, "a JSON object"),
    "a config without layers": (
        lambda f: (f / "config.json").write_text('{"model_type": "olmoe"}'),
        mp.FileFormatError,
        "num_hidden_layers",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_not_whole_is_refused_and_nothing_written(case: str, checkpoint: Path, tmp_path: Path) -> None:
    change, error, message = FOLDERS[case]
    plan = plan_for(checkpoint)
    change(checkpoint)
    with pytest.raises(error, match=message):
        permute_checkpoint(checkpoint, plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(mp.InputError, match="no such folder"):
        permute_checkpoint(tmp_path / "absent", plan_for(checkpoint), tmp_path / "out")


def grouped_plan(row: list[int], groups: int, devices: int) -> mp.Plan:
    experts = len(row)
    model = mp.ModelSpec(layers=1, experts=experts, top_k=1, hidden_size=8, ffn_size=8, groups=groups)
    topology = mp.Topology.preset("gb200-nvl72", devices_per_node=devices)
    owner = np.repeat(np.arange(devices), experts // devices)
    return mp.Plan(model, topology, np.array([row]), owner)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_an_order_exists_exactly_when_some_exchange_inside_devices_keeps_groups(data: Any) -> None:
    from itertools import permutations, product

    groups, devices = data.draw(st.sampled_from([(2, 2), (2, 3), (3, 2), (2, 1), (3, 3), (2, 6)]))
    row = list(data.draw(st.permutations(range(6))))
    plan, size, per = grouped_plan(row, groups, devices), 6 // groups, 6 // devices

    def keeps(candidate: list[int]) -> bool:
        blocks = np.array(candidate).reshape(groups, size) // size
        return bool((blocks == blocks[:, :1]).all())

    parts = [row[d * per : (d + 1) * per] for d in range(devices)]
    possible = any(keeps([e for part in choice for e in part]) for choice in product(*map(permutations, parts)))
    try:
        order = expert_order(plan)[0].tolist()
    except mp.UnsupportedError:
        assert not possible
        return
    assert possible
    assert keeps(order)
    assert [sorted(order[d * per : (d + 1) * per]) for d in range(devices)] == [sorted(part) for part in parts]
    if keeps(row):
        assert order == row


STREAM = """
import json, re, sys
from pathlib import Path
import numpy as np
import moeplace as mp
from moeplace.runtime.permute.checkpoint import permute_checkpoint
def peak():  # kilobytes; unlike ru_maxrss it does not inherit the parent's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
spec = mp.ModelSpec.from_config(folder)
table = np.stack([np.random.default_rng(layer).permutation(spec.experts) for layer in range(spec.layers)])
plan = mp.Plan(spec, mp.Topology.preset("h100-hgx"), table, np.repeat(np.arange(8), spec.experts // 8))
before = peak()
permute_checkpoint(folder, plan, out)
print(json.dumps({"before": before, "after": peak()}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory of a process is read from /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Files of 134 MB in all, with tensors of 17 MB, go through in less memory than one tensor takes."""
    folder = tmp_path / "model"
    folder.mkdir()
    shapes = {
        "experts.gate_up_proj": [32, 256, 512],
        "experts.down_proj": [32, 256, 512],
        "gate.weight": [32, 512],
    }
    weight_map = {}
    for shard in range(4):
        entries, end = {}, 0
        for name, shape in shapes.items():
            size = int(np.prod(shape)) * 4
            full = f"model.layers.{shard}.mlp.{name}"
            entries[full] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            weight_map[full] = f"{shard}.safetensors"
            end += size
        header = json.dumps(entries).encode()
        with (folder / f"{shard}.safetensors").open("wb") as handle:
            handle.write(struct.pack("<Q", len(header)) + header)
            handle.truncate(8 + len(header) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "olmoe", "num_hidden_layers": 4, "num_experts": 32, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 512, "intermediate_size": 256}))
    done = subprocess.run(
        [sys.executable, "-c", STREAM, folder, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    figures = json.loads(done.stdout)
    assert (figures["after"] - figures["before"]) * 1024 < 14e6
    assert (tmp_path / "out" / "3.safetensors").stat().st_size == (folder / "3.safetensors").stat().st_size
