"""Routed experts returned with requests, encoded as vLLM and SGLang encode them."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.profiler.read import open_routing, read_any, reader_of
from moeplace.profiler.readers.routed_experts import is_routed_experts, read_routed_experts

LAYERS, EXPERTS, TOP_K = 4, 16, 3
Array = np.ndarray[Any, Any]


def drawn(tokens: int, seed: int = 0) -> Array:
    """[tokens, 3 MoE layers, k]."""
    rng = np.random.default_rng(seed)
    return rng.random((tokens, LAYERS - 1, EXPERTS)).argsort(axis=2)[:, :, :TOP_K]


def with_dense(ids: Array, kind: str = "i4") -> Array:
    """As the engines' buffers of num_hidden_layers have it: layer 0 is dense and stays 0."""
    return np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1).astype(kind)


def npy64(ids: Array) -> str:
    buffer = io.BytesIO()
    np.save(buffer, ids, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def raw64(ids: Array) -> str:
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def sglang(ids: Array, prompt: int = 5) -> dict[str, Any]:
    meta = {
        "id": "x",
        "prompt_tokens": prompt,
        "completion_tokens": len(ids) + 1 - prompt,
        "routed_experts": raw64(ids),
    }
    return {"text": "...", "meta_info": meta}


def read(path: Path, **more: Any) -> mp.RoutingTrace:
    trace = read_routed_experts(path, **more) if more else read_any(path, kind="tokens")
    assert isinstance(trace, mp.RoutingTrace)
    return trace


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# Arrays


@pytest.mark.parametrize("kind", ["i2", "i4", "u1", "u2"])
def test_a_saved_array_reads_without_its_dense_layer(tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "a.npy", with_dense(drawn(9), kind))
    trace = read(tmp_path / "a.npy")
    np.testing.assert_array_equal(trace.expert_ids, drawn(9))
    assert trace.moe_layers == (1, 2, 3)
    assert "vLLM" in reader_of(tmp_path / "a.npy").name


def test_a_cached_prefix_is_dropped_and_positions_stay(tmp_path: Path) -> None:
    ids = drawn(9).astype(np.int16)
    ids[:4] = -1
    np.save(tmp_path / "a.npy", ids)
    trace = read(tmp_path / "a.npy", num_experts=64)
    np.testing.assert_array_equal(trace.expert_ids, drawn(9)[4:])
    assert trace.position.tolist() == [4, 5, 6, 7, 8]
    assert trace.num_experts == 64


def test_tokens_that_were_never_captured_are_dropped(tmp_path: Path) -> None:
    ids = drawn(5)
    ids[3] = 0
    np.save(tmp_path / "a.npy", ids)
    assert read(tmp_path / "a.npy").position.tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_prompt_and_answer_are_one_sequence(tmp_path: Path, save: Any) -> None:
    parts = {"b_routed_experts": drawn(3, 1), "b_prompt_routed_experts": drawn(4, 2), "other": drawn(2, 3)}
    save(tmp_path / "a.npz", **parts)
    trace = read(tmp_path / "a.npz")
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([drawn(4, 2), drawn(3, 1), drawn(2, 3)]))
    assert trace.sequence.tolist() == [0] * 7 + [1] * 2
    assert trace.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_a_prompt_alone_is_a_sequence(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", prompt_routed_experts=drawn(4))
    assert read(tmp_path / "a.npz").num_tokens == 4


def test_a_table_of_two_dimensions_stays_with_exflow(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", drawn(9)[:, :, 0])
    assert reader_of(tmp_path / "a.npy").name.startswith("ExFlow")
    np.savez(tmp_path / "b.npz", expert_ids=drawn(9), gate=drawn(9) * 0.5)
    assert not is_routed_experts(tmp_path / "b.npz")
    assert not is_routed_experts(write(tmp_path / "config.json", {"n_routed_experts": 256}))


# Responses


def test_vllm_responses_read_one_a_line(tmp_path: Path) -> None:
    lines = [
        {"id": i, "choices": [{"index": 0, "routed_experts": npy64(with_dense(drawn(4, i), "u1"))}]} for i in (0, 1)
    ]
    trace = read(write(tmp_path / "a.jsonl", "\n".join(json.dumps(line) for line in lines)))
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([drawn(4, 0), drawn(4, 1)]))
    assert trace.sequence.tolist() == [0] * 4 + [1] * 4
    assert trace.moe_layers == (1, 2, 3)


def test_older_vllm_responses_put_the_prompt_first(tmp_path: Path) -> None:
    choices = [{"routed_experts": drawn(2, seed).tolist()} for seed in (1, 2)]
    trace = read(write(tmp_path / "a", [{"prompt_routed_experts": drawn(3).tolist(), "choices": choices}]))
    assert trace.sequence.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert trace.position.tolist() == [0, 1, 2, 3, 4, 3, 4]
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([drawn(3), drawn(2, 1), drawn(2, 2)]))


def test_sglang_values_take_their_shape_from_whom_they_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [sglang(with_dense(drawn(9, seed))) for seed in (0, 1)])
    trace = read(path, layers=LAYERS, top_k=TOP_K)
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([drawn(9, 0), drawn(9, 1)]))
    assert trace.moe_layers == (1, 2, 3)
    with pytest.raises(mp.FileFormatError, match="pass layers"):
        read_any(path)
    with pytest.raises(mp.FileFormatError, match="108 ids, not a multiple of 5 layers x 3"):
        read(path, layers=5, top_k=3)


def test_sglang_values_of_other_tokens_than_their_response_are_told(tmp_path: Path) -> None:
    right, other = sglang(with_dense(drawn(9))), sglang(with_dense(drawn(9)))
    other["meta_info"]["completion_tokens"] += 1
    for responses, told in (([right], 0), ([right, other], 1)):
        recording = open_routing(write(tmp_path / "a", responses), layers=LAYERS, top_k=TOP_K)
        assert len(recording.notes) == told
    assert "has 9 tokens, its meta_info speaks of 10 (1 of 2 are such): are 4 layers x 3 experts" in recording.notes[0]


def test_sglang_values_take_their_shape_from_many_tokens(tmp_path: Path) -> None:
    trace = read(write(tmp_path / "a", [sglang(with_dense(drawn(500, seed))) for seed in (0, 1)]))
    assert (trace.num_layers, trace.top_k, trace.moe_layers) == (3, TOP_K, (1, 2, 3))
    np.testing.assert_array_equal(trace.expert_ids[:500], drawn(500))


def test_openai_responses_of_sglang_read(tmp_path: Path) -> None:
    response = {"choices": [{"sglext": {"routed_experts": raw64(drawn(3))}}]}
    np.testing.assert_array_equal(read(write(tmp_path / "a", response), layers=3, top_k=TOP_K).expert_ids, drawn(3))


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def npy_header(shape: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, drawn(2))
    return buffer.getvalue().replace(b"(2, 3, 3)", shape.encode().ljust(9))


BAD: dict[str, tuple[Any, str]] = {
    "no base64": ({"routed_experts": "%%"}, r"response 0.routed_experts is not base64"),
    "no array": ({"routed_experts": b64(b"abc")}, "3 bytes, expected .npy bytes or int32"),
    "a shape that claims more": ({"routed_experts": b64(npy_header("(9,99,9)"))}, "damaged"),
    "two dimensions": ({"routed_experts": npy64(drawn(2)[0])}, r"int64 \(3, 3\), expected whole numbers"),
    "fractions": ({"routed_experts": npy64(drawn(2) * 0.5)}, "float64"),
    "a ragged list": ({"routed_experts": [[[1, 2]], [[1]]]}, "not a list"),
    "text in a list": ({"routed_experts": [[["1", 2]]]}, "not a list"),
    "a number": ({"choices": [{"routed_experts": 5}]}, r"response 0.choices\[0\].routed_experts is neither"),
    "two models": ([{"routed_experts": [[[1, 2]]]}, {"routed_experts": [[[1]]]}], r"\[\(1, 1\), \(1, 2\)\]"),
    "two engines": ([{"routed_experts": [[[1, 2]]]}, {"routed_experts": raw64(drawn(1))}], "of two engines"),
    "none": ({"routed_experts": None}, "no routed experts in it"),
    "all cached": ({"routed_experts": [[[-1, -1]]]}, "all were cached"),
    "an id too low": ({"routed_experts": npy64(drawn(2) - 9)}, "expected -1 or 0 to"),
    "one expert twice": ({"routed_experts": [[[3, 3]]]}, "same expert twice"),
    "a list of numbers": ('[1, {"routed_experts": 1}]', "response 0 is a JSON int"),
    "cut off": ('[{"routed_experts": [[[1, 2]]]}', "cut off"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_a_response_is_said(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(write(tmp_path / "a", content))


def test_damaged_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(npy_header("(2, 3, 3)")[:-1])
    with pytest.raises(mp.FileFormatError, match="damaged"):
        read_any(tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy_header("(2, 3, 3)") + bytes(1 << 27))
    with pytest.raises(mp.FileFormatError, match="over 50 times the file"):
        read_any(tmp_path / "a.npz")
