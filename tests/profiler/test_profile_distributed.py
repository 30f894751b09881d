"""Several ranks record one model: real processes under torchrun, Gloo, one spawn for all checks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moeplace as mp

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from record_ranks import batch  # noqa: E402
from small_models import olmoe  # noqa: E402

from moeplace.profiler.profile import profile  # noqa: E402
from moeplace.profiler.recorders import merge_counts  # noqa: E402
from moeplace.profiler.statistics_file import read_statistics  # noqa: E402
from moeplace.profiler.trace_files import read_trace  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.long]

RANKS = 2
HERE = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0", str(HERE / "record_ranks.py"), str(folder), f"file://{folder}/rendezvous",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks as well as the launcher
        pytest.fail(f"the ranks did not end: {process.communicate()[1][-4000:]}")
    assert process.returncode == 0, said[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], mp.RoutingTrace]:
    """{(rank, step): the routing of that batch in one process}."""
    folder = tmp_path_factory.mktemp("alone")
    model = olmoe(use_cache=False)
    result = {}
    for rank in range(RANKS):
        for step in range(3 + rank):
            with profile(model, folder / f"{rank}-{step}"), torch.no_grad():
                model(input_ids=batch(rank, step))
            result[rank, step] = read_trace(folder / f"{rank}-{step}")
    return result


def load(trace: mp.RoutingTrace) -> np.ndarray:
    return mp.RoutingStatistics.from_trace(trace).total_load


def test_fully_sharded_models_are_recorded_like_whole_ones(out: Path, alone: dict) -> None:
    trace = read_trace(out / "sharded")
    for rank in range(RANKS):
        whole = np.concatenate([alone[rank, step].expert_ids for step in range(3)])
        np.testing.assert_array_equal(trace.expert_ids[trace.source == rank], whole)


def test_each_rank_writes_its_own_shards_and_they_read_as_one_trace(out: Path, alone: dict) -> None:
    assert {path.name.split("-")[0] for path in (out / "tokens").iterdir()} == {f"rank{r:05d}" for r in range(RANKS)}
    trace = read_trace(out / "tokens")
    assert trace.source is not None
    assert trace.step is not None
    for rank in range(RANKS):
        for step in range(3):
            mine = trace.select((trace.source == rank) & (trace.step == step))
            np.testing.assert_array_equal(mine.expert_ids, alone[rank, step].expert_ids)
            assert {mine.workloads[code] for code in mine.workload} == {"even" if step % 2 == 0 else "odd"}
    assert len(np.unique(trace.sequence)) == RANKS * 3 * 2


def test_counts_are_the_sum_over_ranks_of_each_window_and_workload(out: Path, alone: dict) -> None:
    statistics = read_statistics(out / "counts" / "statistics.npz")
    expected: dict[str, dict[int, np.ndarray]] = {}
    for (rank, step), trace in alone.items():
        workload = f"rank{rank}" if step == 2 else "shared"
        windows = expected.setdefault(workload, {})
        windows[step // 2] = windows.get(step // 2, 0) + load(trace)
    assert set(statistics.workloads) == set(expected)
    for code, workload in enumerate(statistics.workloads):
        found = statistics.load[statistics.window_workload == code]
        np.testing.assert_array_equal(found, np.stack([expected[workload][w] for w in sorted(expected[workload])]))
    assert statistics.tokens == sum(trace.num_tokens for trace in alone.values())


@pytest.mark.parametrize("name", ["apart", "failing"])
def test_ranks_that_were_not_brought_together_are_summed_from_their_files(name: str, out: Path, alone: dict) -> None:
    path = out / name / "statistics.npz"
    assert not path.exists()
    merged = merge_counts(path)
    np.testing.assert_array_equal(merged.total_load, sum(load(alone[rank, 0]) for rank in range(RANKS)))
    np.testing.assert_array_equal(read_statistics(path).load, merged.load)
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_parts_that_are_damaged_or_of_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    with pytest.raises(mp.InputError, match="no counts of ranks"):
        merge_counts(path)
    (tmp_path / "statistics-rank00000.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(mp.FileFormatError, match="rank00000.npz: not the counts of a rank"):
        merge_counts(path)


@pytest.mark.parametrize("given", [{"RANK": "one"}, {"RANK": "4", "WORLD_SIZE": "4"}])
def test_a_rank_that_is_no_rank_is_refused(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(mp.InputError, match="RANK="), profile(olmoe(), tmp_path / "t"):
        pass
