"""Time and peak memory of permuting a synthetic sharded checkpoint, much larger than a shard and than the memory used.

    python -m benchmarks permute_checkpoint --gigabytes 8 --shard-gigabytes 0.5 [--fused] [--folder DIR]

Writes a DeepSeek-V3-named checkpoint (58 MoE layers of 256 experts in FP8 with block scales; gpt-oss-named and fused with
--fused) of random bytes to a temporary folder, permutes it in a process of its own, restores it, and compares.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from runner import Report

SCRIPT = """
import json, re, sys, time
from pathlib import Path
import numpy as np
import moeplace as mp
from moeplace.runtime.permute.checkpoint import permute_checkpoint
def peak():  # kilobytes; unlike ru_maxrss it does not inherit the parent's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
source, out, invert = sys.argv[1], sys.argv[2], sys.argv[3] == "invert"
spec = mp.ModelSpec.from_config(sys.argv[4])
rows = []
for layer in range(spec.layers):
    rng = np.random.default_rng(layer)
    groups = rng.permutation(np.arange(spec.experts).reshape(spec.groups, -1))
    rows.append(rng.permuted(groups, axis=1).ravel())
devices = 8
topology = mp.Topology.preset("h200-hgx", devices_per_node=devices)
plan = mp.Plan(spec, topology, np.stack(rows), np.repeat(np.arange(devices), spec.experts // devices))
idle = peak()
start = time.perf_counter()
done = permute_checkpoint(source, plan, out, invert=invert)
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": done.bytes_written, "idle": idle, "peak": peak()}))
"""
CONFIGS = {
    False: {"model_type": "deepseek_v3", "num_hidden_layers": 61, "n_routed_experts": 256, "num_experts_per_tok": 8,
            "first_k_dense_replace": 3, "n_group": 8, "hidden_size": 7168, "moe_intermediate_size": 2048},
    True: {"model_type": "gpt_oss", "num_hidden_layers": 36, "num_local_experts": 128, "num_experts_per_tok": 4,
           "hidden_size": 2880, "intermediate_size": 2880},
}  # fmt: skip


def tensors(fused: bool, size: int) -> Iterator[tuple[str, str, list[int]]]:
    """Names, dtypes and shapes of MoE layers whose experts take about `size` bytes in all."""
    if fused:
        width = max(32, int((size / (36 * 128 * 3)) ** 0.5) // 32 * 32)
        for layer in range(36):
            stem = f"model.layers.{layer}.mlp."
            yield stem + "router.weight", "BF16", [128, width]
            yield stem + "router.bias", "BF16", [128]
            yield stem + "experts.gate_up_proj_blocks", "U8", [128, 2 * width, width]
            yield stem + "experts.gate_up_proj_scales", "U8", [128, 2 * width, width // 32]
            yield stem + "experts.gate_up_proj_bias", "BF16", [128, 2 * width]
            yield stem + "experts.down_proj_blocks", "U8", [128, width, width]
        return
    width = max(16, int((size / (58 * 256 * 3)) ** 0.5))
    for layer in range(3, 61):
        stem = f"model.layers.{layer}.mlp."
        yield stem + "gate.weight", "BF16", [256, width]
        yield stem + "gate.e_score_correction_bias", "F32", [256]
        for expert in range(256):
            for part in ("gate_proj", "up_proj", "down_proj"):
                yield f"{stem}experts.{expert}.{part}.weight", "F8_E4M3", [width, width]
                yield f"{stem}experts.{expert}.{part}.weight_scale_inv", "F32", [1, 1]


def write_checkpoint(folder: Path, fused: bool, size: int, shard: int) -> int:
    """Writes shards of random bytes and the index; returns the number of shards."""
    width = {"U8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}
    shards: list[dict[str, dict[str, object]]] = [{}]
    end = 0
    for name, dtype, shape in tensors(fused, size):
        nbytes = width[dtype]
        for n in shape:
            nbytes *= n
        if end and end + nbytes > shard:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    noise = os.urandom(1 << 24)
    index = {}
    for number, entries in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(entries, file)
        header = json.dumps(entries).encode()
        left = max(entry["data_offsets"][1] for entry in entries.values())  # type: ignore[index]
        with (folder / file).open("wb") as handle:
            handle.write(struct.pack("<Q", len(header)) + header)
            while left:
                start = int.from_bytes(os.urandom(2), "little")
                left -= handle.write(noise[start : start + min(left, 1 << 23)])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIGS[fused]))
    return len(shards)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shard-gigabytes", type=float, default=0.25)
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")


def run(options: argparse.Namespace, report: Report) -> None:
    formats = {"": "", "GB": ".2f", "s": ".1f", "MB/s": ".0f", "peak memory, MiB": ".0f", "before, MiB": ".0f"}
    table = report.table("permuting", formats, formats)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source, permuted, restored = (Path(scratch) / name for name in ("source", "permuted", "restored"))
        source.mkdir()
        size = int(options.gigabytes * 1e9)
        shards = write_checkpoint(source, options.fused, size, int(options.shard_gigabytes * 1e9))
        count = sum(1 for _ in tensors(options.fused, size))
        report.note("checkpoint", f"{shards} shards, {count:,} tensors")
        for name, arguments in (
            ("permute", (source, permuted, "permute", source)),
            ("restore", (permuted, restored, "invert", source)),
        ):
            done = subprocess.run(
                [sys.executable, "-c", SCRIPT, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
            )
            figures = json.loads(done.stdout)
            nbytes, seconds = figures["bytes"], figures["seconds"]
            speed, memory = nbytes / seconds / 1e6, (figures["peak"] / 1024, figures["idle"] / 1024)
            table.row(f"{name}, fused" if options.fused else name, nbytes / 1e9, seconds, speed, *memory)
        names = [path.name for path in source.iterdir()]
        _, different, missing = filecmp.cmpfiles(source, restored, names, shallow=False)
        moved = filecmp.cmpfiles(source, permuted, names, shallow=False)[1]
        report.note("checkpoint", f"restored files that differ: {len(different) + len(missing)}")
        report.note("checkpoint", f"permuted files that differ from the source: {len(moved)} of {len(names)}")
