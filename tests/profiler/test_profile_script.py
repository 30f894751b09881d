"""Commands recorded without an edit: real processes, by file, by module, under torchrun, compiled, failing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from small_models import olmoe, tokens  # noqa: E402

from moeplace.profiler.profile import profile  # noqa: E402
from moeplace.profiler.run_script import run_recorded  # noqa: E402
from moeplace.profiler.statistics_file import read_statistics  # noqa: E402
from moeplace.profiler.trace_files import read_header, read_trace  # noqa: E402

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parents[1] / "support"
SCRIPT = str(HERE / "recorded_script.py")


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is there stays: it may say which checkout is tested.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def expected(tmp_path: Path, rank: int = 0) -> mp.RoutingTrace:
    model = olmoe(use_cache=False).train()
    with profile(model, tmp_path / f"expected{rank}"), torch.no_grad():
        for step in range(3):
            model(input_ids=tokens(2, 6, seed=10 * rank + step))
    return read_trace(tmp_path / f"expected{rank}")


def test_a_script_that_fails_keeps_its_exit_code_its_arguments_and_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'own')!r}, 'w').close()")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    code = run_recorded([sys.executable, SCRIPT, "failing", str(tmp_path)], tmp_path / "out")
    assert code == 3
    assert (tmp_path / "finished0").exists()
    assert (tmp_path / "own").exists()  # the user's own sitecustomize still ran
    trace = read_trace(tmp_path / "out")
    np.testing.assert_array_equal(trace.expert_ids, expected(tmp_path).expert_ids)
    assert trace.step is not None
    np.testing.assert_array_equal(trace.step, np.repeat([0, 1, 2], 12))


@pytest.mark.long
def test_ranks_of_torchrun_are_counted_together_though_they_end_their_process_group(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command = [*launch, "--rdzv-endpoint=127.0.0.1:0", SCRIPT, "ranks", str(tmp_path)]
    assert run_recorded(command, tmp_path / "counts.npz", mode="counts") == 0
    assert (tmp_path / "finished1").exists()
    statistics = read_statistics(tmp_path / "counts.npz")
    both = [mp.RoutingStatistics.from_trace(expected(tmp_path, rank)).total_load for rank in range(2)]
    np.testing.assert_array_equal(statistics.total_load, both[0] + both[1])


@pytest.mark.long
def test_a_module_with_a_compiled_model_is_recorded_once_a_sequence(tmp_path: Path) -> None:
    assert run_recorded([sys.executable, "-m", "recorded_script", "compiled", str(tmp_path)], tmp_path / "out") == 0
    trace = read_trace(tmp_path / "out")
    np.testing.assert_array_equal(trace.expert_ids, expected(tmp_path).expert_ids)


def test_a_recording_that_fails_lets_the_script_finish_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_recorded([sys.executable, SCRIPT, "spoiled", str(tmp_path)], tmp_path / "out") == 1
    assert (tmp_path / "finished0").exists()
    assert "recording failed: process" in caplog.text
    assert "already holds a trace" in caplog.text


def test_a_config_that_cannot_be_read_is_told_and_the_script_recorded_without_the_model_s_sizes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_recorded([sys.executable, SCRIPT, "odd", str(tmp_path)], tmp_path / "out") == 0
    assert "n_group is [4], expected a whole number" in capfd.readouterr().err
    assert read_header(tmp_path / "out").model is None
    np.testing.assert_array_equal(read_trace(tmp_path / "out").expert_ids, expected(tmp_path).expert_ids)


def test_a_command_without_a_model_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(mp.InputError, match="no forward call of a Transformers MoE model was seen"):
        run_recorded([sys.executable, "-c", "print('hello')"], tmp_path / "out")


def test_a_command_that_fails_by_itself_gives_its_own_code(tmp_path: Path) -> None:
    assert run_recorded([sys.executable, "-c", "raise SystemExit(7)"], tmp_path / "out") == 7
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert run_recorded([sys.executable, "-c", killed], tmp_path / "out") == 128 + 15


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ([], {}, "no command"),
        (["no-such-command-at-all"], {}, "no such command"),
        (["true"], {"mode": "token"}, "tokens or counts"),
        (["true"], {"sample": 2.0}, "sample"),
    ],
)
def test_commands_and_settings_that_cannot_work_are_refused(
    command: list[str], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(mp.InputError, match=message):
        run_recorded(command, tmp_path / "out", **settings)


def test_out_that_holds_a_recording_is_refused_before_the_command_runs(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "rank00000-00000.parquet").write_bytes(b"")
    with pytest.raises(mp.InputError, match="already holds"):
        run_recorded([sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w')"], tmp_path / "out")
    assert not (tmp_path / "ran").exists()


ODD = str(HERE / "odd_script.py")


@pytest.mark.long
def test_llama_4_is_recorded_without_an_extraction_of_one_s_own(tmp_path: Path) -> None:
    assert run_recorded([sys.executable, ODD, "llama4"], tmp_path / "out") == 0
    trace = read_trace(tmp_path / "out")
    assert (trace.moe_layers, trace.expert_ids.shape) == ((1, 3), (22, 2, 1))
    assert len(np.unique(trace.expert_ids)) > 1


def test_an_encoder_and_decoder_that_generate_are_recorded_as_a_whole(tmp_path: Path) -> None:
    """`generate` calls the encoder by itself first."""
    assert run_recorded([sys.executable, ODD, "switch"], tmp_path / "out") == 0
    trace = read_trace(tmp_path / "out")
    assert (trace.moe_layers, trace.expert_ids.shape) == ((5, 7), (6, 2, 1))


@pytest.mark.long
def test_a_model_that_loops_over_its_layers_is_told_so_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_recorded([sys.executable, ODD, "looped"], tmp_path / "out") == 1
    assert "ran more than once in one forward call: the model loops over these layers" in caplog.text
    assert "mode='counts' (--mode counts)" in caplog.text
    assert run_recorded([sys.executable, ODD, "looped"], tmp_path / "counts.npz", mode="counts") == 0
    load = read_statistics(tmp_path / "counts.npz").total_load.sum(axis=1)
    assert load.max() == 2 * load.min() == 2 * 22 * 2


def test_a_mixture_of_experts_that_is_not_recorded_is_told_with_the_cause(tmp_path: Path) -> None:
    with pytest.raises(mp.InputError, match="nothing was recorded.*NllbMoeForConditionalGeneration has no MoE layer"):
        run_recorded([sys.executable, ODD, "masked"], tmp_path / "out")
