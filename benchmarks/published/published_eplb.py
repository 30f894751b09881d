"""DeepSeek's own EPLB, imported from a copy of its repository (github.com/deepseek-ai/EPLB, eplb.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def rebalance_experts(file: Path) -> Callable[..., Any]:
    """The published function, of torch tensors."""
    spec = importlib.util.spec_from_file_location("published_eplb_module", file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file}: not a Python file; expected eplb.py of github.com/deepseek-ai/EPLB")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Any] = module.rebalance_experts
    return function


def published_eplb(file: Path) -> Callable[[npt.NDArray[np.float64], int, int, int, int], IntArray]:
    """(loads [L, E], slots, groups, nodes, devices) to [L, P] expert of each slot, on one thread."""
    import torch

    torch.set_num_threads(1)
    rebalance = rebalance_experts(file)

    def run(load: npt.NDArray[np.float64], slots: int, groups: int, nodes: int, devices: int) -> IntArray:
        return np.asarray(rebalance(torch.from_numpy(load), slots, groups, nodes, devices)[0].numpy(), dtype=np.int64)

    return run
