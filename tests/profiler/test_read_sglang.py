"""SGLang's expert distribution records, written as its recorder writes them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import moeplace as mp
from moeplace.profiler.read import open_routing, read_any, reader_of
from moeplace.profiler.readers.sglang import is_sglang, read_sglang

torch.set_num_threads(1)

LAYERS, EXPERTS, SLOTS, TOP_K, WIDTH = 4, 6, 8, 2, 8
DENSE = 1
MAPS = torch.tensor(
    [[0, 1, 2, 3, 4, 5, 0, 1], [2, 3, 4, 5, 0, 1, 2, 3], [5, 4, 3, 2, 1, 0, 5, 4], [0, 2, 4, 1, 3, 5, 5, 0]]
)


def counts(seed: int, rows: int = 1, width: int = EXPERTS) -> torch.Tensor:
    table = torch.randint(
        1, 50, (rows, LAYERS, width), generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    table[:, :DENSE] = 0
    return table


def stat(path: Path, logical_count: Any, **more: Any) -> Path:
    torch.save({"rank": 0, "logical_count": logical_count, "average_utilization_rate_over_window": None} | more, path)
    return path


def statistics(path: Path) -> mp.RoutingStatistics:
    record = read_any(path)
    assert isinstance(record, mp.RoutingStatistics)
    return record


def detail(path: Path, records: list[dict[str, Any]], mapping: torch.Tensor = MAPS) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": mapping}, path)
    return path


def forward_pass(step: int, rank: int, table: torch.Tensor) -> dict[str, Any]:
    return {"forward_pass_id": step, "rank": rank, "gatherer_key": "primary", "global_physical_count": table}


def token_pass(
    step: int, rank: int, ids: torch.Tensor, positions: list[int], lengths: list[int] | None = None
) -> dict[str, Any]:
    """ids: [T, MoE layers, k] physical."""
    buffer = torch.full((LAYERS, len(positions), WIDTH), -1, dtype=torch.int32)
    buffer[DENSE:, : len(ids), : ids.shape[2]] = ids.transpose(0, 1)
    return {
        "forward_pass_id": step,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": [7 + position for position in positions],
        "positions": positions,
        "extend_seq_lens": lengths,
        "forward_mode": 1 if lengths else 2,
        "topk_ids_of_layer": buffer,
        "misc_objects": [],
        "global_physical_count": counts(0, width=SLOTS)[0],
    }


def drawn(tokens: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    ids = [[rng.permutation(6)[:TOP_K] for _ in range(LAYERS - DENSE)] for _ in range(tokens)]
    return torch.tensor(np.array(ids).reshape(tokens, LAYERS - DENSE, TOP_K), dtype=torch.int32)


def logical(ids: torch.Tensor) -> np.ndarray[Any, Any]:
    maps = MAPS.numpy()[DENSE:]
    return np.array([[[maps[layer, e] for e in chosen] for layer, chosen in enumerate(token)] for token in ids.numpy()])


# stat and stat_approx


@pytest.mark.parametrize("more", [{}, {"average_utilization_rate_over_window": 0.7}])
def test_stat_drops_unused_rows_and_dense_layers_and_keeps_absolute_layers(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    table = torch.cat([counts(1, 3), torch.zeros(5, LAYERS, EXPERTS, dtype=torch.int32)])
    read = statistics(stat(tmp_path / "expert_distribution_recorder_1.5.pt", table, **more))
    assert read.moe_layers == (1, 2, 3)
    np.testing.assert_array_equal(read.load, table[:3, DENSE:].numpy())


def test_a_record_without_utilisation_reads(tmp_path: Path) -> None:
    torch.save({"rank": 0, "logical_count": counts(1, 2)}, tmp_path / "a.bin")
    assert statistics(tmp_path / "a.bin").load.shape == (2, 3, EXPERTS)


def test_a_buffer_begun_in_the_middle_comes_in_order_of_time(tmp_path: Path) -> None:
    # The recorder's reset zeroes the rows but keeps its index: a second recording starts where the first ended.
    rows = counts(2, 4)
    buffer = torch.zeros(7, LAYERS, EXPERTS, dtype=torch.int32)
    for i, row in enumerate(rows):
        buffer[(5 + i) % 7] = row
    np.testing.assert_array_equal(statistics(stat(tmp_path / "a.pt", buffer)).load, rows[:, DENSE:].numpy())


def test_a_wrapped_buffer_keeps_every_row_once(tmp_path: Path) -> None:
    rows = counts(3, 9)
    buffer = torch.zeros(4, LAYERS, EXPERTS, dtype=torch.int32)
    for i, row in enumerate(rows):
        buffer[i % 4] = row
    read = statistics(stat(tmp_path / "a.pt", buffer))
    np.testing.assert_array_equal(read.total_load, rows[5:, DENSE:].sum(0).numpy())
    assert len(read.load) == 4


def test_idle_passes_among_the_rows_do_not_matter(tmp_path: Path) -> None:
    buffer = counts(4, 6)
    buffer[2] = 0
    buffer[5] = 0
    assert statistics(stat(tmp_path / "a.pt", buffer)).load.shape[0] == 4


def test_several_dumps_in_a_folder_follow_each_other(tmp_path: Path) -> None:
    stat(tmp_path / "expert_distribution_recorder_10.5.pt", counts(1, 2))
    stat(tmp_path / "expert_distribution_recorder_20.5.pt", counts(2, 3))
    (tmp_path / "notes.pt").write_text("no record")
    expected = torch.cat([counts(1, 2), counts(2, 3)])[:, DENSE:]
    np.testing.assert_array_equal(statistics(tmp_path).load, expected.numpy())


def test_a_table_without_windows_reads(tmp_path: Path) -> None:
    assert statistics(stat(tmp_path / "a.pt", counts(1)[0])).load.shape == (1, 3, EXPERTS)


# per_pass


def test_per_pass_maps_slots_to_experts_and_sums_the_ranks(tmp_path: Path) -> None:
    parts = {(step, rank): counts(10 * step + rank, width=SLOTS)[0] for step in (5, 6) for rank in (0, 1)}
    for rank in (0, 1):
        records = [forward_pass(step, rank, parts[step, rank]) for step in (5, 6)]
        detail(tmp_path / f"expert_distribution_recorder_{1.5 + rank}_{rank}.pt", records)
    expected = np.zeros((2, LAYERS, EXPERTS))
    for (step, _), table in parts.items():
        for layer in range(LAYERS):
            for slot in range(SLOTS):
                expected[step - 5, layer, MAPS[layer, slot]] += int(table[layer, slot])
    read = statistics(tmp_path)
    np.testing.assert_array_equal(read.load, expected[:, DENSE:])
    assert read.moe_layers == (1, 2, 3)


def test_passes_of_one_rank_alone_are_told(tmp_path: Path) -> None:
    detail(tmp_path / "a_0.pt", [forward_pass(1, 0, counts(1, width=SLOTS)[0])])
    assert "forward passes of rank 0 alone" in open_routing(tmp_path).notes[0]
    detail(tmp_path / "a_1.pt", [forward_pass(1, 1, counts(2, width=SLOTS)[0])])
    assert not open_routing(tmp_path).notes


def test_passes_that_a_rank_missed_are_left_out(tmp_path: Path) -> None:
    table = counts(1, width=SLOTS)[0]
    detail(tmp_path / "a_0.pt", [forward_pass(step, 0, table) for step in (1, 2, 3)])
    detail(tmp_path / "a_1.pt", [forward_pass(step, 1, table) for step in (2, 3, 4)])
    assert len(statistics(tmp_path).load) == 2


def test_each_dump_is_mapped_by_its_own_map(tmp_path: Path) -> None:
    table = torch.zeros(LAYERS, SLOTS, dtype=torch.int32)
    table[1, 0] = 9
    detail(tmp_path / "a_1.pt", [forward_pass(1, 0, table)])
    detail(tmp_path / "a_2.pt", [forward_pass(2, 0, table)], MAPS.flip(1))
    np.testing.assert_array_equal(statistics(tmp_path).load[:, 0].argmax(1), [MAPS[1, 0], MAPS[1, -1]])


def test_two_runs_in_a_folder_are_refused(tmp_path: Path) -> None:
    detail(tmp_path / "a_1.pt", [forward_pass(1, 0, counts(1, width=SLOTS)[0])])
    detail(tmp_path / "b_1.pt", [forward_pass(1, 0, counts(2, width=SLOTS)[0])])
    with pytest.raises(mp.FileFormatError, match="forward pass 1 of rank 0, which a_1.pt holds too"):
        read_any(tmp_path)


def test_processes_that_share_a_rank_count_once(tmp_path: Path) -> None:
    # Expert parallelism narrower than tensor parallelism: every process of rank 0 writes the same file.
    table = counts(1, width=SLOTS)[0]
    for kind in ("stat", "per_pass", "per_token"):
        folder = tmp_path / kind
        folder.mkdir()
        for name in ("a_0.pt", "b_0.pt"):
            if kind == "stat":
                stat(folder / name, counts(1, 3))
            else:
                pass_ = forward_pass(1, 0, table) if kind == "per_pass" else token_pass(1, 0, drawn(2), [0, 1], [2])
                detail(folder / name, [pass_])
    assert statistics(tmp_path / "stat").load.shape[0] == 3
    assert statistics(tmp_path / "per_pass").total_load.sum() == table[DENSE:].sum()
    trace = read_sglang(tmp_path / "per_token")
    assert isinstance(trace, mp.RoutingTrace)
    assert trace.num_tokens == 2


# per_token


def test_per_token_drops_padding_and_maps_slots(tmp_path: Path) -> None:
    ids = drawn(5)
    path = detail(
        tmp_path / "a.pt", [token_pass(3, 0, ids[:4], [0, 1, 2, 0, 1, 2], [3, 3]), token_pass(4, 0, ids[4:], [9])]
    )
    trace = read_any(path)
    assert isinstance(trace, mp.RoutingTrace)
    np.testing.assert_array_equal(trace.expert_ids, logical(ids))
    assert (trace.num_experts, trace.top_k, trace.moe_layers) == (EXPERTS, TOP_K, (1, 2, 3))
    assert trace.position.tolist() == [0, 1, 2, 0, 9]
    assert trace.sequence.tolist() == [0, 0, 0, 1, 2]
    assert trace.step is not None
    assert trace.step.tolist() == [3, 3, 3, 3, 4]
    assert trace.gate_weights is None


def test_prompts_continue_into_decoding_lane_by_lane(tmp_path: Path) -> None:
    path = detail(
        tmp_path / "a.pt",
        [
            token_pass(1, 0, drawn(5), [0, 1, 2, 0, 1], [3, 2]),
            token_pass(2, 0, drawn(2, 1), [3, 2]),
            token_pass(3, 0, drawn(2, 2), [4, 3]),
            token_pass(4, 0, drawn(3, 3), [5, 4, 0]),
        ],
    )
    trace = read_sglang(path)
    assert isinstance(trace, mp.RoutingTrace)
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 1, 2, 3, 4]


def test_tokens_of_all_ranks_come_together_and_copies_count_once(tmp_path: Path) -> None:
    for rank, seed in ((0, 0), (1, 0), (2, 1)):
        detail(tmp_path / f"a_{rank}.pt", [token_pass(1, rank, drawn(4, seed), [0, 1, 2, 3], [4])])
    trace = read_sglang(tmp_path)
    assert isinstance(trace, mp.RoutingTrace)
    assert trace.source is not None
    assert trace.source.tolist() == [0] * 4 + [2] * 4
    np.testing.assert_array_equal(trace.expert_ids, logical(torch.cat([drawn(4, 0), drawn(4, 1)])))


# Files that are wrong


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


BAD: dict[str, tuple[Any, str]] = {
    "code": ({"records": [Exploit()]}, "holds (posix|os) abort"),
    "a large allocation": ({"records": [bytearray(9)]}, "holds .* refused"),
    "counts as floats": ({"logical_count": torch.ones(1, 2, 3)}, "logical_count is torch.float32"),
    "negative counts": ({"logical_count": -torch.ones(1, 2, 3, dtype=torch.int32)}, "window 0, layer 0, expert 0"),
    "a shape that claims more": ({"logical_count": torch.ones(1, dtype=torch.int32).expand(9, 9, 9)}, "claims shape"),
    "no counts": ({"logical_count": torch.zeros(4, 2, 3, dtype=torch.int32)}, "0 everywhere"),
    "no map": ({"records": [forward_pass(1, 0, counts(1)[0])]}, "last_physical_to_logical_map is a NoneType"),
    "a map of another shape": (
        {"records": [forward_pass(1, 0, counts(1)[0])], "last_physical_to_logical_map": MAPS},
        r"global_physical_count has shape \(4, 6\)",
    ),
    "a map past its slots": (
        {"records": [forward_pass(1, 0, counts(1)[0])], "last_physical_to_logical_map": MAPS + 9},
        "fewer experts than slots|of at least 0",
    ),
    "records as text": ({"records": "x", "last_physical_to_logical_map": MAPS}, "records is not a list"),
    "no records": ({"records": [], "last_physical_to_logical_map": MAPS}, "no forward pass"),
    "a list": (["records"], "a list, expected a record"),
    "a step of text": (
        {
            "records": [{**forward_pass(1, 0, counts(1)[0]), "forward_pass_id": "x"}],
            "last_physical_to_logical_map": MAPS,
        },
        r"records\[0\].forward_pass_id is 'x'",
    ),
    "fused shared experts": (
        {"records": [token_pass(1, 0, drawn(2) + 6, [0, 1])], "last_physical_to_logical_map": MAPS},
        "disable-shared-experts-fusion",
    ),
    "positions of other tokens": (
        {"records": [{**token_pass(1, 0, drawn(2), [0, 1]), "positions": [0]}], "last_physical_to_logical_map": MAPS},
        r"records\[0\].positions is not a list of 2",
    ),
    "only padding": (
        {"records": [token_pass(1, 0, drawn(0), [0, 1])], "last_physical_to_logical_map": MAPS},
        "no token chose any expert",
    ),
    "one expert through two slots": (
        {"records": [token_pass(1, 0, torch.tensor([[[0, 6]] * 3]), [0])], "last_physical_to_logical_map": MAPS},
        "same expert twice",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = tmp_path / "a.pt"
    torch.save(content, path)
    assert is_sglang(path)
    with pytest.raises(mp.FileFormatError, match=message) as caught:
        read_any(path)
    assert str(path) in str(caught.value)


def test_a_compressed_archive_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    stat(tmp_path / "a.pt", counts(1, 2))
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            compress = zipfile.ZIP_STORED if name.endswith("data.pkl") else zipfile.ZIP_DEFLATED
            new.writestr(name, old.read(name), compress_type=compress)
    with pytest.raises(mp.FileFormatError, match="unpack to more than the file"):
        read_any(tmp_path / "b.pt")


def test_a_member_that_claims_more_than_the_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    content = bytearray(stat(tmp_path / "a.pt", counts(1, 2)).read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 20 : directory + 24] = (0x7FFFFFFF).to_bytes(4, "little")
    (tmp_path / "b.pt").write_bytes(content)
    with pytest.raises(mp.FileFormatError, match="members claim more than"):
        read_sglang(tmp_path / "b.pt")


def test_no_error_advises_to_load_the_file_without_care(tmp_path: Path) -> None:
    stat(tmp_path / "a.pt", counts(1, 2))
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:-20] + b"." if name.endswith("data.pkl") else content)
    with pytest.raises(mp.FileFormatError) as caught:
        read_sglang(tmp_path / "b.pt")
    assert "weights_only" not in str(caught.value)


def test_modes_are_not_mixed(tmp_path: Path) -> None:
    stat(tmp_path / "a.pt", counts(1))
    detail(tmp_path / "b.pt", [forward_pass(1, 0, counts(1, width=SLOTS)[0])])
    with pytest.raises(mp.FileFormatError, match=r"stat \(a.pt\) and per_pass \(b.pt\)"):
        read_any(tmp_path)


def test_other_torch_files_and_folders_are_not_taken(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    assert not is_sglang(tmp_path / "model.pt")
    assert not is_sglang(tmp_path)
    with pytest.raises(mp.FileFormatError, match="a torch.save file of a dict with weight .*Known: .*SGLang"):
        reader_of(tmp_path / "model.pt")
