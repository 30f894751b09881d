"""Imported before megatron-core: what stands in for a GPU, so that its layers, optimizers and checkpoints run on CPUs.

- Tensors asked for on "cuda" are made on the CPU, and say that their type is `torch.cuda.FloatTensor`: megatron-core
  names that device and that type in its norms, its clipping and its distributed optimizer.
- `torch.cuda`'s streams and events, on which counts are copied to the host, do nothing; its present device is the CPU.
- Counts that would be copied to the host become numpy arrays there, as those from a GPU do.
- `te_general_gemm`, which megatron-core 0.16.1 asks after even where Transformer Engine is not installed, is None.
- torch's Adam counts steps beside each parameter's state, Transformer Engine's in its groups: what the distributed
  optimizer reads from a checkpoint for a parameter is given a count of its own, where one is shared by all.
- The tracker of CUDA's random states forks nothing: there is no dropout here, and weights are drawn on the CPU.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CUDAIsCPU(TorchFunctionMode):
    """Device "cuda" is the CPU, and types of tensors are named as they are there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.")
        return result


class Stream:
    """A stream on which everything has happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, *_: Any) -> Stream:
        return self

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...


class Tracker:
    """Of CUDA's random states: there are none."""

    def fork(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def is_initialized(self) -> bool:
        return True


def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What `maybe_move_tensor_to_cpu` gives of a tensor on a GPU."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def install() -> None:
    """Puts them in place, for this process and those that are forked from it."""
    warnings.filterwarnings("ignore", module="megatron")
    CUDAIsCPU().__enter__()
    now = Stream()
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = lambda *_: now
    cuda.stream = lambda *_: nullcontext()
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.max_memory_allocated = cuda.memory_allocated = lambda *_: 0

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = on_host

    put = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_count(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        state["step"] = state["step"].clone()
        put(self, parameter, {"step": state["step"], **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_count
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    random._CUDA_RNG_STATE_TRACKER = Tracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


install()
