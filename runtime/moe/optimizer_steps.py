"""Counts the optimizer steps that a module's parameters have taken: what a schedule of its own goes by.

Forward passes would not do: gradient accumulation makes several a step, activation checkpointing repeats them.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_counts: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()
_hooked = False


class OptimizerSteps:
    """done: steps of optimizers that hold any of the module's own parameters, since this was made."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.done = 0
        _watch()
        _counts.add(self)

    def count(self, held: set[int]) -> None:
        """held: ids of the parameters that took a step."""
        module = self._module()
        if module is not None and any(id(value) in held for value in module.parameters(recurse=False)):
            self.done += 1


def _watch() -> None:
    global _hooked
    if not _hooked:
        register_optimizer_step_post_hook(_stepped)
        _hooked = True


def _stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    for count in list(_counts):
        count.count(held)
