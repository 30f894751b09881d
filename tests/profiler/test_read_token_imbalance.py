"""Megatron-LM's token-imbalance traces, laid out as its benchmark does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp
from moeplace.profiler.read import read_any

torch = pytest.importorskip("torch")
TOKENS, EXPERTS, TOP_K = 40, 8, 2


def written(folder: Path, seed: int = 0, **fields: Any) -> tuple[Path, Any]:
    """A trace as the benchmark writes it, and its ids."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.random((TOKENS, EXPERTS)).argsort(axis=1)[:, :TOP_K].copy())
    gates = torch.full((TOKENS, TOP_K), 1.0 / TOP_K)
    ranks = torch.arange(TOKENS, dtype=torch.int32) // (TOKENS // 4)
    (folder / "tensors").mkdir(parents=True)
    tensors = {}
    for name, tensor in (("token_ids", ids), ("gates", gates), ("source_rank", ranks), ("expert_ids", ids)):
        file = folder / "tensors" / f"{name}.pt"
        torch.save(tensor, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        tensors[name] = {"file": f"tensors/{name}.pt", "sha256": digest, "shape": list(tensor.shape), "dtype": "int64"}
    manifest = {
        "schema_version": 1,
        "producer_commit": "abc",
        "seed": seed,
        "logical_layer_id": 0,
        "step_id": 0,
        "microbatch_id": 0,
        "logical_num_tokens": TOKENS,
        "num_experts": EXPERTS,
        "topk": TOP_K,
        "hidden_size": 64,
        "world_size": 4,
        "original_partition": "rank-major, contiguous per source rank",
        "workload_id": "W1_hot_expert_set",
        "workload_checksum": "0" * 16,
        "tensors": tensors,
        "extra": {},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest | fields, indent=2))
    return folder, ids.numpy()


def test_a_trace_is_read_with_its_workload_and_source_ranks(tmp_path: Path) -> None:
    folder, ids = written(tmp_path / "w1")
    trace = read_any(folder)
    assert isinstance(trace, mp.RoutingTrace)
    np.testing.assert_array_equal(trace.expert_ids[:, 0], ids)
    assert trace.workloads == ("W1_hot_expert_set",)
    assert trace.source is not None
    assert np.bincount(trace.source).tolist() == [10, 10, 10, 10]


def test_layers_and_steps_of_several_folders_are_put_together(tmp_path: Path) -> None:
    ids = {}
    for step in range(2):
        for layer in (3, 5):
            folder = tmp_path / f"s{step}l{layer}"
            ids[step, layer] = written(folder, 10 * step + layer, step_id=step, logical_layer_id=layer)[1]
    trace = read_any(tmp_path)
    assert isinstance(trace, mp.RoutingTrace)
    assert trace.moe_layers == (3, 5)
    np.testing.assert_array_equal(trace.expert_ids[TOKENS:, 1], ids[1, 5])
    written(tmp_path / "more", 1, step_id=2, logical_layer_id=3)
    with pytest.raises(mp.FileFormatError, match="step 2, micro-batch 0 lacks layer 5"):
        read_any(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema_version": 2}, "schema_version 1"),
        ({"topk": 3}, "top-3"),
        ({"num_experts": 4}, "different ones of 4 experts"),
        ({"world_size": 2}, "beyond world_size"),
        ({"logical_num_tokens": -1}, "logical_num_tokens is -1"),
        ({"tensors": {"expert_ids": {"file": "../../etc/passwd"}}}, "is not the file tensors/expert_ids.pt"),
    ],
)
def test_what_does_not_agree_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(mp.FileFormatError, match=message):
        read_any(written(tmp_path / "t", **fields)[0])


def test_a_tensor_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    folder, _ = written(tmp_path / "t")
    torch.save(torch.zeros(TOKENS, TOP_K, dtype=torch.int64), folder / "tensors" / "expert_ids.pt")
    with pytest.raises(mp.FileFormatError, match="damaged or exchanged"):
        read_any(folder)


def test_routed_experts_of_a_rollout_lie_in_its_samples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.random((2, 6, 3, 8)).argsort(axis=3)[..., :2]
    samples = [{"index": i, "rollout_routed_experts": one.tolist()} for i, one in enumerate(ids)]
    nested = [{"rollout": {"extra_info": {"routed_experts": one.tolist()}}} for one in ids]
    for name, content in (("slime", {"rollout_id": 3, "samples": samples}), ("nested", nested)):
        (tmp_path / name).write_text(json.dumps(content))
        trace = read_any(tmp_path / name)
        assert isinstance(trace, mp.RoutingTrace)
        np.testing.assert_array_equal(trace.expert_ids, ids.reshape(12, 3, 2))
        assert np.unique(trace.sequence).tolist() == [0, 1]
