"""What each rank does in test_layer_costs.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import join_group

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def costs(rank: int, world: int, folder: Path) -> Any:
    from layer_costs import measured

    join_group(rank, world, folder)
    found = measured(rank, world, torch.bfloat16)
    dist.destroy_process_group()
    return found


def waits_of(function: Callable[[], Any]) -> list[str]:
    """What would make the host wait for a GPU, by name."""
    from host_waits import host_waits

    names: list[str] = []
    with host_waits(names.append):
        function()
    return names
