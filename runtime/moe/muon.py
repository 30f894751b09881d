"""Muon for matrices of experts: each expert's update is made orthogonal for itself, whatever rank it is on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...placement.errors import InputError, UnsupportedError
from .managers import allow_optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""


class Muon(Optimizer):
    """torch.optim.Muon for parameters [..., rows, columns], the last two dimensions a matrix each: experts [S, ...] as
    well as plain matrices. Its state has a row for each expert, so that it moves with them.

    For biases and other vectors use AdamW beside it.

    Args:
        params: of two dimensions or more.
        lr, weight_decay, momentum, nesterov, eps, ns_steps: as torch.optim.Muon.
        match_rms_adamw: scales updates to the root mean square of AdamW's (Moonlight), so that its learning rate
            serves; else by sqrt(max(1, rows / columns)).

    Raises:
        InputError: a parameter of fewer dimensions.
        UnsupportedError: experts that are cut over ranks (`shard_experts`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        eps: float = 1e-7,
        ns_steps: int = 5,
        match_rms_adamw: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "eps": eps,
                "ns_steps": ns_steps, "match_rms_adamw": match_rms_adamw,
            },
        )  # fmt: skip
        for group in self.param_groups:
            for value in group["params"]:
                if value.ndim < 2:
                    raise InputError(
                        f"Muon: a parameter has shape {list(value.shape)}; it wants matrices, or [experts, rows, "
                        "columns]: give vectors and biases to AdamW"
                    )
                if getattr(value, "cut", False):
                    raise UnsupportedError(
                        "Muon makes whole matrices orthogonal, and a rank has a part of each expert's (shard_experts); "
                        "give the experts to AdamW, or leave out shard_experts"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; closure as torch's optimizers take it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(value)
                # A rank without experts has a state too, of no rows, as the others have: it moves with them.
                if not value.numel():
                    continue
                moment = state["momentum_buffer"]
                moment.lerp_(value.grad, 1 - group["momentum"])
                update = value.grad.lerp(moment, group["momentum"]) if group["nesterov"] else moment
                update = orthogonal(update, group["ns_steps"], group["eps"])
                rows, columns = value.shape[-2:]
                if group["match_rms_adamw"]:
                    factor = 0.2 * math.sqrt(max(rows, columns))
                else:
                    factor = math.sqrt(max(1.0, rows / columns))
                value.mul_(1 - group["lr"] * group["weight_decay"])
                value.add_(update.to(value.dtype), alpha=-group["lr"] * factor)
        return loss


def orthogonal(update: Tensor, steps: int, eps: float) -> Tensor:
    """[..., rows, columns] in bfloat16: the nearest matrices with singular values near 1, by Newton-Schulz."""
    a, b, c = COEFFICIENTS
    x = update.bfloat16().reshape(-1, *update.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if tall else x).reshape(update.shape)


allow_optimizer(Muon)
