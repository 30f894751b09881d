"""Records of every engine as its own code writes them, of any size: what the readers' benchmarks read.

Formats: sglang/srt/eplb/expert_distribution.py (0.5.23), vllm/utils/serial_utils.py (0.33.0), sglang's
routed_experts.py, tensorrt_llm/_torch/expert_statistic.py, megatron/core/transformer/moe/router_trace.py, the ADRS
benchmark, ExFlow.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Rng = np.random.Generator


@dataclass(frozen=True)
class Shape:
    """layers: MoE layers, after one dense layer. size: rows, passes, tokens, iterations or entries of the record."""

    size: int
    layers: int = 2
    experts: int = 8
    top_k: int = 2
    slots: int = 10


def choices(rng: Rng, tokens: int, layers: int, shape: Shape) -> npt.NDArray[np.int32]:
    """[tokens, layers, k] different experts a token: equally spaced from a random one. experts: a power of two."""
    first = rng.integers(0, shape.experts, (tokens, layers, 1), np.int32)
    stride = 2 * rng.integers(0, shape.experts // 2, (tokens, layers, 1), np.int32) + 1
    return (first + stride * np.arange(shape.top_k, dtype=np.int32)) % shape.experts


def sglang_stat(folder: Path, rng: Rng, shape: Shape) -> Path:
    import torch

    path = folder / "expert_distribution_recorder_1.5.pt"
    count = rng.integers(0, 1000, (shape.size, shape.layers + 1, shape.experts), np.int32)
    count[:, 0] = 0
    torch.save(
        {"rank": 0, "logical_count": torch.from_numpy(count), "average_utilization_rate_over_window": None}, path
    )
    return path


def _mapping(shape: Shape) -> Any:
    import torch

    return (torch.arange(shape.slots) % shape.experts).expand(shape.layers + 1, -1).contiguous()


def sglang_per_pass(folder: Path, rng: Rng, shape: Shape) -> Path:
    import torch

    records = []
    for step in range(shape.size):
        count = torch.from_numpy(rng.integers(0, 100, (shape.layers + 1, shape.slots), np.int32))
        count[0] = 0
        records.append({"forward_pass_id": step, "rank": 0, "gatherer_key": "primary", "global_physical_count": count})
    path = folder / "expert_distribution_recorder_1.5_0.pt"
    torch.save({"records": records, "last_physical_to_logical_map": _mapping(shape)}, path)
    return path


def sglang_per_token(folder: Path, rng: Rng, shape: Shape, batch: int = 512) -> Path:
    import torch

    records = []
    for step, start in enumerate(range(0, shape.size, batch)):
        tokens = min(batch, shape.size - start)
        ids = np.full((shape.layers + 1, tokens, 8), -1, np.int32)
        ids[1:, :, : shape.top_k] = choices(rng, tokens, shape.layers, shape).transpose(1, 0, 2)
        records.append(
            {
                "forward_pass_id": step,
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": rng.integers(0, 1000, tokens).tolist(),
                "positions": list(range(tokens)),
                "extend_seq_lens": [tokens],
                "forward_mode": 1,
                "topk_ids_of_layer": torch.from_numpy(ids),
                "misc_objects": [],
            }
        )
    path = folder / "expert_distribution_recorder_1.5_0.pt"
    torch.save({"records": records, "last_physical_to_logical_map": _mapping(shape)}, path)
    return path


def _routed(rng: Rng, tokens: int, shape: Shape) -> npt.NDArray[np.int32]:
    ids = np.zeros((tokens, shape.layers + 1, shape.top_k), np.int32)
    ids[:, 1:] = choices(rng, tokens, shape.layers, shape)
    return ids


def vllm_responses(folder: Path, rng: Rng, shape: Shape, length: int = 256) -> Path:
    path = folder / "responses.jsonl"
    with path.open("w") as out:
        for start in range(0, shape.size, length):
            buffer = io.BytesIO()
            np.save(buffer, _routed(rng, min(length, shape.size - start), shape).astype(np.uint16), allow_pickle=False)
            text = base64.b64encode(buffer.getbuffer()).decode("ascii")
            out.write(json.dumps({"choices": [{"index": 0, "routed_experts": text}]}) + "\n")
    return path


def sglang_responses(folder: Path, rng: Rng, shape: Shape, length: int = 256) -> Path:
    path = folder / "responses.jsonl"
    with path.open("w") as out:
        for start in range(0, shape.size, length):
            tokens = min(length, shape.size - start)
            text = base64.b64encode(_routed(rng, tokens, shape).tobytes()).decode("ascii")
            meta = {"prompt_tokens": 1, "completion_tokens": tokens, "routed_experts": text}
            out.write(json.dumps({"text": "", "meta_info": meta}) + "\n")
    return path


def routed_array(folder: Path, rng: Rng, shape: Shape) -> Path:
    path = folder / "routed.npy"
    out = np.lib.format.open_memmap(path, "w+", np.uint16, (shape.size, shape.layers + 1, shape.top_k))
    for start in range(0, shape.size, 1 << 14):
        out[start : start + (1 << 14)] = _routed(rng, min(1 << 14, shape.size - start), shape)
    out.flush()
    return path


def trtllm(folder: Path, rng: Rng, shape: Shape) -> Path:
    """Two ranks, as safetensors are laid out."""
    target = folder / "expert_statistics"
    target.mkdir()
    meta = {"num_experts": shape.experts, "num_experts_per_token": shape.top_k}
    (target / "meta_info.json").write_text(json.dumps(meta))
    for rank in range(2):
        width = 8 * shape.experts
        keys = [f"{i}_{layer}" for i in range(100, 100 + shape.size) for layer in range(1, shape.layers + 1)]
        header = {
            key: {"dtype": "I64", "shape": [shape.experts], "data_offsets": [width * n, width * (n + 1)]}
            for n, key in enumerate(keys)
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (target / f"rank{rank}.safetensors").open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for _ in keys:
                out.write(rng.integers(0, 1000, shape.experts, np.int64).tobytes())
    return target


def megatron(folder: Path, rng: Rng, shape: Shape, batch: int = 256) -> Path:
    path = folder / "router_trace_rank0.jsonl"
    with path.open("w") as out:
        for step, start in enumerate(range(0, shape.size, batch)):
            tokens = min(batch, shape.size - start)
            ids = np.sort(choices(rng, tokens, shape.layers, shape), axis=2)
            for layer in range(shape.layers):
                record = {
                    "step": step,
                    "stage": "pre_dispatch",
                    "block": "decoder",
                    "layer": layer + 1,
                    "rank": 0,
                    "num_tokens": tokens,
                    "topk": shape.top_k,
                    "top_indices": ids[:, layer].tolist(),
                }
                out.write(json.dumps(record) + "\n")
    return path


def load_history(folder: Path, rng: Rng, shape: Shape) -> Path:
    path = folder / "expert-load.json"
    with path.open("w") as out:
        out.write('{"load_history": [')
        for entry in range(shape.size):
            load = rng.integers(0, 5000, (shape.layers, shape.experts)).tolist()
            out.write((", " if entry else "") + json.dumps({"logical_expert_load": load}))
        out.write("]}")
    return path


def vllm_loads(folder: Path, rng: Rng, shape: Shape) -> Path:
    path = folder / "stats.jsonl"
    slots = np.arange(shape.slots) % shape.experts
    with path.open("w") as out:
        out.write(json.dumps({"record_type": "eplb_load_meta", "version": 1, "num_layers": shape.layers}) + "\n")
        for step in range(shape.size):
            load = rng.integers(0, 5000, (shape.layers, shape.slots)).tolist()
            rows = [rng.permutation(slots).tolist() for _ in range(shape.layers)]
            record = {"record_type": "eplb_load_stats", "version": 1, "step": step}
            out.write(json.dumps(record | {"expert_load": load, "p2l_map": rows}) + "\n")
    return path


def mindie(folder: Path, rng: Rng, shape: Shape) -> Path:
    target = folder / "hotspots"
    for phase in ("decode", "prefill"):
        (target / phase).mkdir(parents=True)
        config = {"num_moe_layers": shape.layers, "num_of_experts": shape.experts, "num_of_selected_experts": [2]}
        (target / phase / "model_gen_config.json").write_text(json.dumps(config))
        for rank in range(2):
            counts = rng.integers(0, 5000, (shape.size * shape.layers, shape.experts // 2)).tolist()
            text = "".join(",".join(map(str, row)) + "\n" for row in counts)
            (target / phase / f"{phase}_{rank}.csv").write_text(text)
    return target


def omni_placement(folder: Path, rng: Rng, shape: Shape) -> Path:
    target = folder / "dump"
    target.mkdir()
    for step in range(shape.size):
        counts = rng.integers(0, 5000, (shape.layers, shape.experts)).tolist()
        text = "".join("".join(f"{count}\t" for count in row) + "\n" for row in counts)
        (target / f"activation_counts_recordstep_{step}_rank_0.txt").write_text(text)
    return target


def vllm_ascend_log(folder: Path, rng: Rng, shape: Shape) -> Path:
    path = folder / "serve.log"
    total = np.zeros((shape.layers, shape.experts), np.int64)
    with path.open("w") as out:
        for window in range(1, shape.size + 1):
            total += rng.integers(0, 5000, total.shape)
            for layer in range(shape.layers):
                work = [f"{expert}:{count}" for expert, count in enumerate(total[layer].tolist())]
                out.write(
                    f"INFO [EPLB experts] stage=0 layer=model.layers.{layer}.mlp.experts rank=0 window={window} "
                    f"window_work=0 cumulative_work={total[layer].sum()} expert_work={work}\n"
                )
    return path


def exflow(folder: Path, rng: Rng, shape: Shape) -> Path:
    path = folder / "trace.npy"
    out = np.lib.format.open_memmap(path, "w+", np.int64, (shape.size, shape.layers))
    for start in range(0, shape.size, 1 << 18):
        part = out[start : start + (1 << 18)]
        part[:] = rng.integers(0, shape.experts, part.shape) + np.arange(shape.layers) * shape.experts
    out.flush()
    return path


def parquet(folder: Path, rng: Rng, shape: Shape) -> Path:
    from moeplace import RoutingTrace
    from moeplace.profiler.trace_files import write_trace

    path = folder / "trace"
    ids = choices(rng, shape.size, shape.layers, shape)
    write_trace(RoutingTrace.from_arrays(ids, num_experts=shape.experts, step=np.arange(shape.size) // 8), path)
    return path


def statistics(folder: Path, rng: Rng, shape: Shape) -> Path:
    from moeplace import RoutingStatistics, RoutingTrace, write_statistics

    path = folder / "statistics.npz"
    ids = choices(rng, shape.size, shape.layers, shape)
    write_statistics(RoutingStatistics.from_trace(RoutingTrace.from_arrays(ids, num_experts=shape.experts)), path)
    return path


def _loads(rng: Rng, shape: Shape) -> npt.NDArray[np.float64]:
    return rng.random((shape.size, shape.layers, shape.experts))


def loads_npy(folder: Path, rng: Rng, shape: Shape) -> Path:
    np.save(folder / "loads.npy", _loads(rng, shape))
    return folder / "loads.npy"


def loads_npz(folder: Path, rng: Rng, shape: Shape) -> Path:
    np.savez(folder / "loads.npz", counts=_loads(rng, shape))
    return folder / "loads.npz"


def loads_pt(folder: Path, rng: Rng, shape: Shape) -> Path:
    import torch

    torch.save(torch.from_numpy(_loads(rng, shape)), folder / "loads.pt")
    return folder / "loads.pt"


def loads_json(folder: Path, rng: Rng, shape: Shape) -> Path:
    path = folder / "loads.json"
    path.write_text(json.dumps({"logical_count": _loads(rng, shape).round(3).tolist()}))
    return path


def loads_csv(folder: Path, rng: Rng, shape: Shape) -> Path:
    path = folder / "loads.csv"
    lines = ["window,layer," + ",".join(map(str, range(shape.experts)))]
    for window, loads in enumerate(_loads(rng, shape).round(3).tolist()):
        lines += [",".join(map(str, [window, layer, *row])) for layer, row in enumerate(loads)]
    path.write_text("\n".join(lines))
    return path


def rollout(folder: Path, rng: Rng, shape: Shape) -> Path:
    path = folder / "rollout.json"
    samples = [{"index": i, "rollout_routed_experts": _routed(rng, 4, shape).tolist()} for i in range(shape.size)]
    path.write_text(json.dumps({"rollout_id": 0, "samples": samples}))
    return path


def token_imbalance(folder: Path, rng: Rng, shape: Shape) -> Path:
    import torch

    target = folder / "w1"
    (target / "tensors").mkdir(parents=True)
    ids = torch.from_numpy(choices(rng, shape.size, 1, shape)[:, 0].astype(np.int64))
    values = {
        "token_ids": ids,
        "gates": torch.full(ids.shape, 1.0 / shape.top_k),
        "source_rank": torch.zeros(len(ids), dtype=torch.int32),
        "expert_ids": ids,
    }
    tensors = {}
    for name, value in values.items():
        file = target / "tensors" / f"{name}.pt"
        torch.save(value, file)
        tensors[name] = {"file": f"tensors/{name}.pt", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest = {
        "schema_version": 1,
        "seed": 0,
        "logical_layer_id": 0,
        "step_id": 0,
        "microbatch_id": 0,
        "logical_num_tokens": shape.size,
        "num_experts": shape.experts,
        "topk": shape.top_k,
        "world_size": 1,
        "workload_id": "W1_hot_expert_set",
        "workload_checksum": "0",
        "tensors": tensors,
    }
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


RECORDS: dict[str, Callable[[Path, Rng, Shape], Path]] = {
    "sglang stat": sglang_stat,
    "sglang per_pass": sglang_per_pass,
    "sglang per_token": sglang_per_token,
    "sglang responses": sglang_responses,
    "vllm responses": vllm_responses,
    "routed array": routed_array,
    "trtllm": trtllm,
    "megatron": megatron,
    "load history": load_history,
    "exflow": exflow,
    "moeplace trace": parquet,
    "moeplace statistics": statistics,
    "loads npy": loads_npy,
    "loads npz": loads_npz,
    "loads pt": loads_pt,
    "loads json": loads_json,
    "loads csv": loads_csv,
    "rollout": rollout,
    "token imbalance": token_imbalance,
    "vllm loads": vllm_loads,
    "mindie": mindie,
    "omni placement": omni_placement,
    "vllm-ascend log": vllm_ascend_log,
}
