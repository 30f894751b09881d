"""What each rank does in test_calibration.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from ranks import join_group

import moeplace as mp
from moeplace.runtime import calibrate

TINY = mp.ModelSpec(layers=1, experts=8, top_k=2, hidden_size=32, ffn_size=16, expert_dtype="fp32")


def measured(rank: int, world: int, folder: Path) -> dict[str, Any]:
    join_group(rank, world, folder)
    refused, too_few = refusal(node_size=3), refusal(tokens=3)
    unlike = {
        "tokens": refusal(tokens=64 + 64 * rank),
        "one refuses": refusal(tokens=3 if rank == 2 else 64),
        "experts": refusal(experts=0),
        "round_seconds": refusal(round_seconds=0.0),
    }
    heard: list[str] = []
    found = calibrate(TINY, tokens=64, node_size=2, round_seconds=0.005, listen=heard.append)
    dist.destroy_process_group()
    return {
        "unlike": unlike,
        "refused": refused,
        "too_few": too_few,
        "heard": heard,
        "remarks": found.remarks,
        **found.to_dict(),
    }


def refusal(**given: Any) -> str:
    try:
        calibrate(TINY, **given)
    except mp.InputError as error:
        return str(error)
    return ""
