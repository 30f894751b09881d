"""Running engines recorded over HTTP: SGLang's recorder, and the routing that vLLM and SGLang answer requests with."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from cli_runs import run
from engine_endpoints import EXPERTS, LAYERS, TOP_K, VLLM, Other, SGLang, routed, serving

import moeplace as mp
from moeplace.profiler import engine_servers as recorder
from moeplace.profiler.engine_servers import EngineServer, record_sglang


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "SETTLED", 0.15)
    monkeypatch.delenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "dumps"
    path.mkdir()
    (path / "expert_distribution_recorder_1.5.pt").write_bytes(b"of an earlier recording")
    return path


def config(path: Path) -> Path:
    fields = {"model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "num_experts": EXPERTS, "mlp_only_layers": [0]}
    sizes = {"num_experts_per_tok": TOP_K, "hidden_size": 8, "moe_intermediate_size": 8}
    path.write_text(json.dumps(fields | sizes))
    return path


# SGLang's recorder


def test_counts_are_recorded_and_only_the_new_file_is_read(folder: Path, tmp_path: Path) -> None:
    engine = SGLang(folder, "stat")
    with serving(engine) as url:
        done = run("record", "--sglang", url, "--seconds", 0.1, "--folder", folder, "-o", tmp_path / "c.npz", "--json")
    assert (done.code, done.err) == (0, "")
    assert engine.called == [
        "/server_info",
        *(f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump")),
    ]
    statistics = mp.read_statistics(tmp_path / "c.npz")
    assert statistics.moe_layers == (1, 2, 3)
    np.testing.assert_array_equal(statistics.load, np.tile(np.arange(1.0, EXPERTS + 1), (3, 3, 1)))
    assert done.data["mode"] == "stat"


@pytest.mark.parametrize("mode", ["per_pass", "per_token"])
def test_the_files_of_all_ranks_are_waited_for(folder: Path, tmp_path: Path, mode: str) -> None:
    engine = SGLang(folder, mode, ranks=3)
    engine.late = 0.6
    with serving(engine) as url:
        done = run("record", "--sglang", url, "--seconds", 0, "--folder", folder, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert len(done.data["read"].split(", ")) == 3
    if mode == "per_pass":
        assert mp.read_statistics(tmp_path / "out").total_load.sum() == 3 * 3 * 3 * 8
    else:
        trace = mp.read_trace(tmp_path / "out")
        assert trace.source is not None
        assert trace.num_tokens == 3 * 3 * 2
        assert set(trace.source.tolist()) == {0, 1, 2}


def test_the_folder_comes_from_sglangs_own_variable(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", str(folder))
    with serving(SGLang(folder)) as url:
        assert run("record", "--sglang", url, "--seconds", 0, "-o", tmp_path / "c.npz").code == 0


def test_a_recorder_that_is_off_is_never_started(folder: Path, tmp_path: Path) -> None:
    engine = SGLang(folder, None)
    with serving(engine) as url:
        ended = run("record", "--sglang", url, "--seconds", 0, "--folder", folder, "-o", tmp_path / "c.npz")
        assert ended.code == 1
        assert "recorder is off; start the server with --expert-distribution-recorder-mode stat" in ended.err
    assert engine.called == ["/server_info"]
    assert not engine.dead


@pytest.mark.parametrize(
    ("mode", "wanted", "advice"), [("stat", "tokens", "mode per_token"), ("per_token", "counts", "mode stat")]
)
def test_a_recorder_in_the_wrong_mode_is_refused(
    folder: Path, tmp_path: Path, mode: str, wanted: str, advice: str
) -> None:
    engine = SGLang(folder, mode)
    with serving(engine) as url:
        ended = run(
            "record", "--sglang", url, "--seconds", 0, "--mode", wanted, "--folder", folder, "-o", tmp_path / "x"
        )
    assert ended.code == 1
    assert f"{wanted} are wanted; start the server with --expert-distribution-recorder-{advice}" in ended.err
    assert engine.called == ["/server_info"]


def test_a_mode_of_a_later_sglang_is_refused(folder: Path) -> None:
    with (
        serving(SGLang(folder, "per_layer")) as url,
        pytest.raises(mp.EngineError, match="mode 'per_layer', known are"),
    ):
        record_sglang(EngineServer(url), 0, folder)


def test_files_that_do_not_come_are_asked_for_in_a_shared_folder(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with serving(SGLang(elsewhere)) as url:
        ended = run(
            "record", "--sglang", url, "--seconds", 0, "--folder", folder, "--timeout", 0.5, "-o", tmp_path / "x"
        )
    assert ended.code == 1
    assert "no file came in 0.5 s after the dump; set the server's SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR" in ended.err
    with (
        serving(SGLang(folder, "per_pass", ranks=2, tp_size=4)) as url,
        pytest.raises(mp.EngineError, match="2 whole files of 4"),
    ):
        record_sglang(EngineServer(url), 0, folder, patience=0.6)
    with serving(SGLang(folder)) as url:
        ended = run("record", "--sglang", url, "--seconds", 0, "--folder", tmp_path / "none", "-o", tmp_path / "x")
        assert "no such folder; the server's SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR" in ended.err


def test_a_key_is_sent_and_asked_for(folder: Path, tmp_path: Path) -> None:
    engine = SGLang(folder)
    engine.key = "open sesame"
    with serving(engine) as url:
        common = ("record", "--sglang", url, "--seconds", 0, "--folder", folder, "-o", tmp_path / "c.npz")
        ended = run(*common)
        assert ended.code == 1
        assert "answered 401 Unauthorized" in ended.err
        assert "pass the server's key" in ended.err
        assert run(*common, "--api-key", "open sesame").code == 0


def test_an_interrupted_recording_is_stopped_on_the_server(folder: Path) -> None:
    engine = SGLang(folder)

    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    with serving(engine) as url, pytest.raises(KeyboardInterrupt):
        record_sglang(EngineServer(url), 5, folder, progress=interrupt)
    assert engine.called[-1] == "/stop_expert_distribution_record"
    assert not engine.recording


def test_a_rebalancing_server_is_recorded_with_a_note(folder: Path, tmp_path: Path) -> None:
    with serving(SGLang(folder, enable_eplb=True)) as url:
        done = run("record", "--sglang", url, "--seconds", 0, "--folder", folder, "-o", tmp_path / "c.npz")
    assert done.code == 0
    assert "note: the server rebalances experts" in done.err


def test_older_servers_tell_of_themselves_under_another_path(folder: Path) -> None:
    class Older(SGLang):
        def answer(self, method: str, path: str, headers: Any, body: Any) -> tuple[int, bytes]:
            if path == "/server_info":
                return 404, b"{}"
            return super().answer(method, path.replace("/get_server_info", "/server_info"), headers, body)

    with serving(Older(folder)) as url:
        assert record_sglang(EngineServer(url), 0, folder).mode == "stat"


# Servers that are not there, or something else


def test_a_server_that_is_not_there_or_is_none_is_said(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for option in (("--sglang", closed), ("--vllm", closed)):
            prompts = tmp_path / "p.txt"
            prompts.write_text("a b c\n")
            ended = run("record", *option, "--prompts", prompts, "-o", tmp_path / "x")
            assert ended.code == 1
            assert "is the engine running there, and reachable from here?" in ended.err
    replies: dict[str, Any] = {
        "it is no SGLang server": lambda: (404, b"nothing"),
        "does not say expert_distribution_recorder_mode": lambda: (200, b"{}"),
        "answered no JSON object": lambda: (200, b"<html>"),
        "answered 500": lambda: (500, b"broken"),
    }
    for message, reply in replies.items():
        with serving(Other(reply)) as url, pytest.raises(mp.EngineError, match=message):
            record_sglang(EngineServer(url), 0, folder)


def test_a_server_that_does_not_answer_is_given_up_on(folder: Path) -> None:
    release, waited_out = threading.Event(), []

    def stuck() -> tuple[int, bytes]:
        if not release.wait(60):
            waited_out.append(True)
        return 200, b"{}"

    with serving(Other(stuck)) as url:
        with pytest.raises(mp.EngineError, match=r"no answer in 0\.3 s"):
            record_sglang(EngineServer(url, timeout=0.3), 0, folder)
        assert not waited_out
        release.set()


@pytest.mark.parametrize("url", ["localhost:30000", "file:///etc/passwd", "http://", "http://host/?x=1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(mp.InputError, match="is not the address of a server"):
        EngineServer(url)


def test_an_answer_without_end_is_refused(folder: Path) -> None:
    with (
        serving(Other(lambda: (200, b"x" * 2000))) as url,
        pytest.raises(mp.EngineError, match="more than 1,000 bytes"),
    ):
        record_sglang(EngineServer(url, most=1000), 0, folder)


# Requests


def test_vllms_answers_become_a_trace(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    chat = {"messages": [{"role": "user", "content": "one two three four"}], "max_tokens": 3}
    prompts.write_text(
        "one two three\n\n" + json.dumps(chat) + "\n" + json.dumps({"prompt": "x", "max_tokens": 9}) + "\n"
    )
    engine = VLLM()
    with serving(engine) as url:
        done = run(
            "record", "--vllm", url, "--prompts", prompts, "--max-tokens", 5,
            "--model", config(tmp_path / "config.json"), "-o", tmp_path / "trace", "--json",
        )  # fmt: skip
    assert done.code == 0, done.err
    trace = mp.read_trace(tmp_path / "trace")
    lengths = [3 + 5 - 1, 4 + 3 - 1, 1 + 9 - 1]
    assert sorted(np.unique(trace.sequence, return_counts=True)[1].tolist()) == sorted(lengths)
    assert (trace.moe_layers, trace.num_experts, trace.top_k) == ((1, 2, 3), EXPERTS, TOP_K)
    for sequence in set(trace.sequence.tolist()):
        mine = trace.expert_ids[trace.sequence == sequence]
        np.testing.assert_array_equal(mine, routed(len(mine))[:, 1:])
    assert {body["model"] for body in engine.bodies} == {"served"}
    assert done.data["answered"] == 3


def test_sglangs_answers_become_a_trace_through_both_of_its_endpoints(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    prompts.write_text("one two three\n" + json.dumps(chat) + "\n")
    with serving(SGLang(folder, None)) as url:
        common = ("record", "--sglang", url, "--prompts", prompts, "--max-tokens", 5)
        done = run(*common, "--model", config(tmp_path / "config.json"), "-o", tmp_path / "trace")
        assert done.code == 0, done.err
        ended = run(*common, "-o", tmp_path / "unknown")
        assert ended.code == 1
        assert "; give --model" in ended.err
    assert mp.read_trace(tmp_path / "trace").num_tokens == (3 + 5 - 1) + 4


def test_servers_that_do_not_return_routing_are_told_how(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two\n")
    engines = {"--vllm": VLLM(returns=False), "--sglang": SGLang(folder, enable_return_routed_experts=False)}
    for option, engine in engines.items():
        with serving(engine) as url:
            ended = run("record", option, url, "--prompts", prompts, "-o", tmp_path / "x")
        assert ended.code == 1
        assert "start the server with --enable-return-routed-experts" in ended.err


def test_requests_that_are_refused_are_counted_and_the_others_kept(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two\n" + "word " * 50 + "\n" + "three four\n")
    with serving(VLLM(longest=10)) as url:
        done = run("record", "--vllm", url, "--prompts", prompts, "-o", tmp_path / "trace", "--json")
        assert (done.data["answered"], done.data["refused"]) == (2, 1)
        assert "1 of 3 requests were refused, first" in done.err
        assert "maximum context length" in done.err
        prompts.write_text("word " * 50 + "\n")
        ended = run("record", "--vllm", url, "--prompts", prompts, "-o", tmp_path / "x")
        assert ended.code == 1
        assert "maximum context length" in ended.err


def test_requests_go_out_together_and_stop_when_the_time_is_over(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one two\n" * 500)
    engine = VLLM()
    engine.delay = 0.05
    with serving(engine) as url:
        done = run(
            "record", "--vllm", url, "--prompts", prompts, "--seconds", 0.4, "--concurrency", 4,
            "-o", tmp_path / "t", "--json",
        )  # fmt: skip
    assert done.code == 0, done.err
    assert 0 < done.data["answered"] < 400
    assert 2 <= engine.most_at_once <= 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file of requests is empty"),
        ('{"prompt": 1', "line 1, which begins like JSON: not JSON"),
        ('a\n{"text": "x"}', "line 2 must have prompt or messages"),
    ],
)
def test_a_wrong_file_of_requests_is_said(tmp_path: Path, content: str, message: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(content)
    with serving(VLLM()) as url:
        ended = run("record", "--vllm", url, "--prompts", prompts, "-o", tmp_path / "x")
    assert ended.code == 1
    assert message in ended.err


@pytest.mark.slow
def test_options_that_make_no_sense_together_are_a_wrong_call(tmp_path: Path) -> None:
    out = ("-o", tmp_path / "x")
    url = "http://localhost:1"
    for given in (
        (),
        ("--sglang", url, "--vllm", url, "--seconds", 1),
        ("--sglang", url),
        ("--vllm", url, "--seconds", 1),
        ("--sglang", url, "--prompts", "p", "--mode", "tokens"),
    ):
        assert run("record", *given, *out).code == 2
