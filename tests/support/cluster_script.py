"""Run by test_cluster under torchrun on emulated hosts: MoE layers against the layer in one process, and the links."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from calibration_ranks import TINY
from expert_ranks import compare_plans
from torch.distributed.device_mesh import init_device_mesh

from moeplace.runtime import calibrate

MEGABYTE = 1_000_000


def seconds_for_a_megabyte(group: dist.ProcessGroup) -> float:
    """Of an all-to-all in which every rank sends that much to each of the others."""
    sent = torch.zeros(MEGABYTE * dist.get_world_size(group), dtype=torch.uint8)
    dist.barrier()
    began = time.perf_counter()
    dist.all_to_all_single(torch.empty_like(sent), sent, group=group)
    return time.perf_counter() - began


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])))
    found: dict[str, Any] = compare_plans(rank, world, plans=2)
    found["seconds"] = {
        "between": seconds_for_a_megabyte(mesh.get_group(0)),
        "inside": seconds_for_a_megabyte(mesh.get_group(1)),
    }
    found["interfaces"] = sorted(name for _, name in socket.if_nameindex())
    found["topology"] = calibrate(TINY, tokens=8192, round_seconds=0.01).topology.model_dump(mode="json")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
