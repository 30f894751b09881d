"""Published policies of expert placement, imported from copies of their files: one function of tables or windows each.

Every policy gives [L, P] expert of each slot, slots in equal runs, a device each.
"""

from __future__ import annotations

import ast
import atexit
import ctypes
import dataclasses
import importlib.util
import json
import logging
import math
import shutil
import subprocess
import tempfile
import types
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
        # Compiled code kept on disk names a module that another process has not. Bounds are checked: on some windows it
        # writes past the end of its arrays, which ends the process later.
        "njit": lambda *functions, cache=False, **options: njit(*functions, boundscheck=True, **options),
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


def vllm(file: Path) -> Callable[..., IntArray]:
    """vLLM's default policy (vllm/distributed/eplb/policy/default.py, Apache-2.0).

    Also takes groups and nodes, after (loads [L, E], slots, devices).
    """
    import torch

    space = _definitions(file, {**vars(typing), "np": np, "torch": torch, "AbstractEplbPolicy": object})
    if "DefaultEplbPolicy" not in space:
        raise SystemExit(f"{file}: has no DefaultEplbPolicy; expected vllm/distributed/eplb/policy/default.py")

    def run(load: Array, slots: int, devices: int, groups: int = 1, nodes: int = 1) -> IntArray:
        made = space["DefaultEplbPolicy"].rebalance_experts(torch.from_numpy(load), slots, groups, nodes, devices)
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


def swift(file: Path) -> TablePolicy:
    """vLLM-Ascend's SwiftBalancer (vllm_ascend/eplb/core/policy/policy_swift_balancer.py, Apache-2.0), from experts in
    the order of their numbers; all ranks are one node's."""
    from collections import defaultdict

    import torch

    ranks = 0
    npu = types.SimpleNamespace(npu=types.SimpleNamespace(device_count=lambda: ranks), Tensor=torch.Tensor)
    names = {**vars(typing), "np": np, "torch": npu, "EplbPolicy": object, "defaultdict": defaultdict}
    space = _definitions(file, names)
    if "SwiftBalanceEplb" not in space:
        raise SystemExit(f"{file}: has no SwiftBalanceEplb; expected policy_swift_balancer.py of vllm-ascend")

    def run(load: Array, slots: int, devices: int) -> IntArray:
        nonlocal ranks
        ranks = devices
        layers, experts = load.shape
        current = np.tile(np.arange(slots) % experts, (layers, 1))
        each = (load / np.bincount(current[0], minlength=experts))[:, current[0]]
        shape = (layers, devices, slots // devices)
        tensors = (torch.from_numpy(array.reshape(shape)) for array in (current, each))
        return np.asarray(space["SwiftBalanceEplb"]().rebalance_experts(*tensors)[2], dtype=np.int64).reshape(
            layers, -1
        )

    return run


def levi(file: Path) -> TablePolicy:
    """The best program that LEVI evolved for ADRS's EPLB task, experts on all devices (ttanv/levi,
    examples/ADRS/eplb/result_snapshot.json, MIT)."""
    import torch

    try:
        program = max(json.loads(file.read_text(encoding="utf-8"))["elites"], key=lambda each: each["primary_score"])
        names: dict[str, Any] = {"__name__": file.stem}
        exec(compile(program["code"], str(file), "exec"), names)  # noqa: S102 (a file that the caller names)
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{file}: {error!r}; expected result_snapshot.json of LEVI's eplb example") from None

    def run(load: Array, slots: int, devices: int) -> IntArray:
        made = names["rebalance_experts"](torch.from_numpy(load), slots, 1, 1, devices)
        return np.asarray(made[0].numpy(), dtype=np.int64)

    return run


def tensorrt(file: Path) -> TablePolicy:
    """TensorRT-LLM's replication and placement, compiled alone by g++
    (cpp/tensorrt_llm/runtime/moeLoadBalancer/moeLoadBalancer.cpp, Apache-2.0)."""
    text = file.read_text(encoding="utf-8")
    parts = [_braces(file, text, head) for head in ("struct ReplicaInfo", "void doReplication(", "void doPlacement(")]
    source = AROUND.replace("@parts", "\n".join(part + ";" * part.startswith("struct") for part in parts))
    folder = Path(tempfile.mkdtemp(prefix="tensorrt_balancer"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "balancer.cpp").write_text(source, encoding="utf-8")
    command = ["g++", "-std=c++17", "-O3", "-DNDEBUG", "-shared", "-fPIC", "-o", "balancer.so", "balancer.cpp"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(f"{file}: g++ cannot compile its balancer alone:\n{made.stderr}")
    function = ctypes.CDLL(str(folder / "balancer.so")).rebalance

    def run(load: Array, slots: int, devices: int) -> IntArray:
        single = np.ascontiguousarray(load, dtype=np.float32)
        table = np.empty((len(load), slots), dtype=np.int32)
        sizes = (*load.shape, devices, slots // devices)
        function(ctypes.c_void_p(single.ctypes.data), *sizes, ctypes.c_void_p(table.ctypes.data))
        return table.astype(np.int64)

    return run


AROUND = """
#include <algorithm>
#include <cassert>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>
#define TLLM_CHECK_WITH_INFO(...)
namespace tensorrt_llm::kernels { struct MoeLoadBalanceMetaInfo { int expertCount, epSize, slotCountPerRank; }; }
struct MoePlacementCpuInfo { std::vector<int> expertReplicaCount; std::vector<std::vector<int>> rankExpertIds; };
@parts
extern "C" void rebalance(float* load, int layers, int experts, int ranks, int width, int* table)
{
    tensorrt_llm::kernels::MoeLoadBalanceMetaInfo sizes{experts, ranks, width};
    MoePlacementCpuInfo info;
    info.rankExpertIds.assign(ranks, std::vector<int>(width));
    for (int layer = 0; layer < layers; ++layer, load += experts)
    {
        doReplication(sizes, load, &info);
        doPlacement(sizes, load, &info);
        for (auto const& rank : info.rankExpertIds)
            table = std::copy(rank.begin(), rank.end(), table);
    }
}
"""
"""What stands around the parts of the balancer that are compiled alone: the fields that they use, and an entry."""


def _braces(file: Path, text: str, head: str) -> str:
    """A definition of C++ from its head to the brace that closes it."""
    begin = text.find(head)
    if begin < 0:
        raise SystemExit(f"{file}: has no {head!r}; expected moeLoadBalancer.cpp of TensorRT-LLM")
    depth = 0
    for place in range(text.index("{", begin), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[begin : place + 1]
    raise SystemExit(f"{file}: {head!r} is not closed; expected moeLoadBalancer.cpp of TensorRT-LLM")


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
