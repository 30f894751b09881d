"""Imported before torchtitan: what stands in for a GPU and a newer torch, so that its trainer runs on CPUs.

- torchtitan asks `torchtitan.tools.utils.device_module` for a device's name, memory and present number: `CPU` answers.
- Where triton is not installed, its kernels, which are those of dispatchers not used here, are decorated by nothing.
- Stable torch 2.13 lacks `distributed.set_timeout`, by which torchtitan shortens timeouts after a first step: nothing
  is done.

Beside them, FSDP is told to sum plainly (`torchtitan_ranks.run`): Gloo has no sum that multiplies first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from types import SimpleNamespace

import torch.distributed as dist


class CPU(types.ModuleType):
    """`torch.cuda`, as far as torchtitan asks it."""

    set_device = reset_peak_memory_stats = empty_cache = synchronize = staticmethod(lambda *_: None)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda *_: "cpu")
    get_device_properties = staticmethod(lambda *_: SimpleNamespace(total_memory=1 << 30))
    memory_stats = staticmethod(lambda *_: {})


def undecorated() -> types.ModuleType:
    """A triton that runs nothing."""
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    triton.jit = lambda *a, **k: a[0] if a else (lambda function: function)  # type: ignore[attr-defined]
    triton.language = language  # type: ignore[attr-defined]
    language.constexpr = language.tensor = object  # type: ignore[attr-defined]
    return triton


def install() -> None:
    """Imports torchtitan with what stands in."""
    stubbed = importlib.util.find_spec("triton") is None
    if stubbed:
        sys.modules["triton"] = undecorated()
        sys.modules["triton.language"] = sys.modules["triton"].language
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = lambda *_: None  # type: ignore[attr-defined]
    utils = importlib.import_module("torchtitan.tools.utils")
    utils.device_type, utils.device_module = "cpu", CPU("cpu")
    importlib.import_module("torchtitan.trainer")
    if stubbed:
        del sys.modules["triton"], sys.modules["triton.language"]


install()
