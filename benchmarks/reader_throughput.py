"""Throughput and peak memory of every reader on a file of at least so many megabytes.

    python -m benchmarks reader_throughput --megabytes 500 [--only "sglang stat" ...] [--folder DIR]

Each record is written to a temporary folder as the engine writes it (16 MoE layers of 64 experts, top-8, after a dense
layer; counts of 58 layers of 256 experts), read once to fill the page cache, and read by a process of its own, whose time and
peak resident memory over that of the process before reading are taken. Files are mapped by some readers: pages of a mapped
file count. The folder is deleted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from reader_records import RECORDS, Shape
from runner import Report

SCRIPT = """
import json, re, sys, time
from pathlib import Path
import moeplace as mp
from moeplace.profiler.read import reader_of
options = json.loads(sys.argv[2])
reader = reader_of(sys.argv[1])
if sys.argv[3] == "torch":
    import torch  # its start is not the reader's time
    torch.set_num_threads(1)
def peak():  # kilobytes; unlike ru_maxrss it does not inherit the parent's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
idle = peak()
begin, cpu = time.perf_counter(), time.process_time()
record = reader.read(Path(sys.argv[1]), **options)
seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
most = peak()
if isinstance(record, mp.RoutingTrace):
    tokens, held = record.num_tokens, record.expert_ids.nbytes
else:
    tokens, held = record.load.sum(axis=(0, 2)).max() / 8, record.load.nbytes
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": 1024 * (most - idle), "tokens": tokens, "held": held}))
"""
TOKENS = Shape(1, layers=16, experts=64, top_k=8, slots=72)
COUNTS = Shape(1, layers=58, experts=256, top_k=8, slots=288)
BYTES: dict[str, tuple[float, Shape]] = {
    "sglang stat": (59 * 256 * 4, COUNTS),
    "sglang per_pass": (59 * 288 * 4, COUNTS),
    "sglang per_token": (17 * 8 * 4, TOKENS),
    "sglang responses": (17 * 8 * 4 * 4 / 3, TOKENS),
    "vllm responses": (17 * 8 * 2 * 4 / 3, TOKENS),
    "routed array": (17 * 8 * 2, TOKENS),
    "trtllm": (58 * 2 * (256 * 8 + 60), COUNTS),
    "megatron": (16 * 8 * 3.8 + 32, TOKENS),
    "load history": (58 * 256 * 5.9, COUNTS),
    "exflow": (16 * 8, TOKENS),
}
"""Bytes a row, pass, token, iteration or entry takes, and the shape."""
OPTIONS: dict[str, dict[str, int]] = {"sglang responses": {"layers": 17, "top_k": 8}}


def measured(name: str, megabytes: float, folder: Path | None) -> dict[str, Any]:
    each, shape = BYTES[name]
    size = int(megabytes * 1.04e6 / each) + 1
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rng = np.random.default_rng(0)
        path = RECORDS[name](Path(scratch), rng, Shape(size, shape.layers, shape.experts, shape.top_k, shape.slots))
        files = [path] if path.is_file() else sorted(path.iterdir())
        nbytes = sum(file.stat().st_size for file in files)
        for file in files:
            with file.open("rb") as handle:
                while handle.read(1 << 24):
                    pass
        engine = "torch" if name.startswith("sglang ") and name != "sglang responses" else ""
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path), json.dumps(OPTIONS.get(name, {})), engine],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return {"record": name, "bytes": nbytes, **json.loads(done.stdout)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--only", nargs="*", choices=list(BYTES), default=list(BYTES))
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")


def run(options: argparse.Namespace, report: Report) -> None:
    formats = {
        "record": "",
        "MB": ".0f",
        "s": ".1f",
        "CPU s": ".1f",
        "MB/s": ".0f",
        "MB/CPU s": ".0f",
        "tokens": ",.0f",
        "tokens/s": ",.0f",
        "peak MB": ".0f",
        "peak over file": ".2f",
        "result MB": ".0f",
    }
    table = report.table("throughput", formats, formats)
    for name in options.only:
        row = measured(name, options.megabytes, options.folder)
        size, seconds, cpu, tokens = row["bytes"] / 1e6, row["seconds"], row["cpu"], row["tokens"]
        peak, result = row["peak"] / 1e6, row["held"] / 1e6
        table.row(
            name, size, seconds, cpu, size / seconds, size / cpu, tokens, tokens / seconds, peak, peak / size, result
        )
