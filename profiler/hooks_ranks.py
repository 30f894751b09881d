"""Which rank of how many this process is."""

from __future__ import annotations

import os
import sys
from typing import Any

from ..placement.errors import InputError


def process_group() -> Any:
    """`torch.distributed` where a process group of several ranks is up, else None."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def rank_and_world() -> tuple[int, int]:
    """(rank, ranks): of the process group if one is up, else as torchrun says in RANK and WORLD_SIZE, else (0, 1).

    Raises:
        InputError: RANK or WORLD_SIZE is no number, or the rank is not below the number of ranks.
    """
    group = process_group()
    if group is not None:
        return int(group.get_rank()), int(group.get_world_size())
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    try:
        rank = int(given["RANK"] or 0)
        world = int(given["WORLD_SIZE"] or rank + 1)
    except ValueError:
        raise InputError(
            f"environment: RANK={given['RANK']!r} and WORLD_SIZE={given['WORLD_SIZE']!r} must be numbers"
        ) from None
    if not 0 <= rank < world:
        raise InputError(f"environment: RANK={rank} must be from 0 to WORLD_SIZE - 1 ({world - 1})")
    return rank, world
