"""Counts the optimizer steps that a module's parameters have taken: what a schedule of its own goes by; and refuses those
of an optimizer that takes every rank's experts for the same.

Forward passes would not do: gradient accumulation makes several a step, activation checkpointing repeats them.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...placement.errors import UnsupportedError

_counts: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()
_hooked = False


class OptimizerSteps:
    """done: steps of optimizers that hold any of the module's own parameters, since this was made."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.done = 0
        _watch()
        _counts.add(self)

    def among(self, held: set[int]) -> bool:
        """Whether any of the module's own parameters is among these, by id."""
        module = self._module()
        return module is not None and any(id(value) in held for value in module.parameters(recurse=False))


def _watch() -> None:
    global _hooked
    if not _hooked:
        register_optimizer_step_pre_hook(_steps)
        register_optimizer_step_post_hook(_stepped)
        _hooked = True


def _steps(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # Torch's class, without importing it: nothing can be one before its module is there.
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None or not isinstance(optimizer, module.ZeroRedundancyOptimizer):
        return
    held = _held(optimizer)
    if any(count.among(held) for count in list(_counts)):
        raise UnsupportedError(
            "ZeroRedundancyOptimizer gives every parameter to one rank, which sends it to the others; but every rank has its "
            "own experts. Give it the other parameters only, and the experts (expert_parameters(model)) to an "
            "optimizer of their own"
        )


def _stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = _held(optimizer)
    for count in list(_counts):
        if count.among(held):
            count.done += 1


def _held(optimizer: Optimizer) -> set[int]:
    return {id(value) for group in optimizer.param_groups for value in group["params"]}
