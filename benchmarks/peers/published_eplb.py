"""DeepSeek's own EPLB, imported from a copy of its repository (github.com/deepseek-ai/EPLB, eplb.py)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def published_eplb(
    file: Path, load: npt.NDArray[np.float64], slots: int, groups: int, nodes: int, devices: int
) -> IntArray:
    """[L, P] expert of each slot, by its `rebalance_experts`."""
    import torch

    spec = importlib.util.spec_from_file_location("published_eplb_module", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    physical, _, _ = module.rebalance_experts(torch.from_numpy(load), slots, groups, nodes, devices)
    return np.asarray(physical.numpy(), dtype=np.int64)
