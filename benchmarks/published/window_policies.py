"""Published policies of expert placement, imported from copies of their files: one function of tables or windows each.

Every policy gives [L, P] expert of each slot, slots in equal runs, a device each.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import logging
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
TablePolicy = Callable[[Array, int, int], IntArray]
"""(loads [L, E], slots, devices) to a table."""
WindowPolicy = Callable[[Array, int, int], IntArray]
"""(loads [S, L, E], slots, devices) to a table."""


def deepinfer(file: Path) -> WindowPolicy:
    """DeepInfer's (deepinfer/model_executor/eplb/policy.py, Apache-2.0)."""
    import torch

    module = _module(file, "deepinfer_policy")

    def run(load: Array, slots: int, devices: int) -> IntArray:
        made = module.rebalance_experts_global(torch.from_numpy(load), slots, slots // devices)
        return np.asarray(made[0].numpy(), dtype=np.int64)

    return run


def flashlb(file: Path) -> WindowPolicy:
    """vLLM-Ascend's FlashLB (vllm_ascend/eplb/core/policy/policy_flashlb.py, Apache-2.0), its search tree alone."""
    import torch
    from numba import njit
    from scipy import stats
    from scipy.optimize import linear_sum_assignment

    names: dict[str, Any] = {
        **vars(typing),
        "np": np,
        "math": math,
        # Compiled code kept on disk names a module that another process has not.
        "njit": lambda *functions, cache=False, **options: njit(*functions, **options),
        "stats": stats,
        "torch": torch,
        "linear_sum_assignment": linear_sum_assignment,
        "logging": logging,
        "logger": logging.getLogger("flashlb"),
        "dataclass": dataclasses.dataclass,
    }
    space = _definitions(file, names)
    if "FlashTree" not in space:
        raise SystemExit(f"{file}: has no FlashTree; expected policy_flashlb.py of vllm-ascend")

    def run(load: Array, slots: int, devices: int) -> IntArray:
        rows = []
        for layer in range(load.shape[1]):
            tree = space["FlashTree"](load[:, layer].astype(np.float32), slots, devices)
            deployment = tree.optimize_balanceness()[0]
            rows.append(np.asarray(deployment, dtype=np.int64).reshape(-1))
        return np.stack(rows)

    return run


def vllm(file: Path) -> TablePolicy:
    """vLLM's default policy (vllm/distributed/eplb/policy/default.py, Apache-2.0)."""
    import torch

    space = _definitions(file, {**vars(typing), "np": np, "torch": torch, "AbstractEplbPolicy": object})
    if "DefaultEplbPolicy" not in space:
        raise SystemExit(f"{file}: has no DefaultEplbPolicy; expected vllm/distributed/eplb/policy/default.py")

    def run(load: Array, slots: int, devices: int) -> IntArray:
        made = space["DefaultEplbPolicy"].rebalance_experts(torch.from_numpy(load), slots, 1, 1, devices)
        return np.asarray((made[0] if isinstance(made, tuple) else made).numpy(), dtype=np.int64)

    return run


def sglang(file: Path) -> WindowPolicy:
    """SGLang's (sglang/srt/eplb/eplb_algorithms/deepseek.py or deepseek_vec.py, Apache-2.0), experts on all devices."""
    import torch

    module = _module(file, f"sglang_{file.stem}")

    def run(load: Array, slots: int, devices: int) -> IntArray:
        steps = torch.from_numpy(load)
        if file.stem.endswith("vec"):
            made = module.rebalance_experts(steps, slots, slots // devices, None, 1, False)
        else:
            made = module.rebalance_experts(steps.sum(dim=0), slots, 1, 1, devices, False)
        return np.asarray(made[0].numpy(), dtype=np.int64)

    return run


def _module(file: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _definitions(file: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Functions and classes of a file whose package is not there: its imports are left out, `names` stand for them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    bases = {*names, "object"}
    kept: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            if any(not isinstance(base, ast.Name) or base.id not in bases for base in node.bases):
                continue
            bases.add(node.name)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Assign)):
            kept.append(node)
    future = ast.parse("from __future__ import annotations").body
    names = {**names, "__name__": file.stem}
    exec(compile(ast.Module([*future, *kept], []), str(file), "exec"), names)  # noqa: S102 (a file that the caller names)
    return names
