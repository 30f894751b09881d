"""The same for the Transformers Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from ..placement.errors import InputError, UnsupportedError
from ..runtime.moe.data_parallel import clip_grad_norm_
from .rebalancer import Rebalancer


class RebalanceCallback(TrainerCallback):
    """`Trainer(..., callbacks=[RebalanceCallback(folder, every=500)])` on a model given to `parallelize`.

    The Trainer's own clipping takes each rank's experts for all there are, and so does its saving:
    TrainingArguments(max_grad_norm=0, save_strategy="no") is needed, and `moeplace.runtime.save_checkpoint` on every
    rank.

    rebalancer: from the first step on.

    Args:
        folder: as for `Rebalancer`.
        max_norm: gradients are clipped by the norm of the whole model.
        settings: as for `Rebalancer`.

    Raises:
        InputError: when training begins, with the Trainer's own clipping on.
        UnsupportedError: when training begins, with the Trainer's own saving on.
    """

    def __init__(self, folder: str | Path, max_norm: float = 1.0, **settings: Any) -> None:
        self._folder, self._max_norm, self._settings = folder, max_norm, settings
        self.rebalancer: Rebalancer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        if args.max_grad_norm and dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError(
                f"TrainingArguments.max_grad_norm ({args.max_grad_norm}) clips by a norm that differs between ranks; "
                f"set it to 0 and give RebalanceCallback(max_norm={args.max_grad_norm})"
            )
        # Here and not when it saves: only the first rank would be refused then, and the others wait for it.
        if args.save_strategy != "no":
            raise UnsupportedError(
                f"TrainingArguments.save_strategy ({str(args.save_strategy.value)!r}) would write the first rank's "
                "experts as if they were all; set it to 'no' and write checkpoints with "
                "moeplace.runtime.save_checkpoint(path, model, optimizer) on every rank"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        clip_grad_norm_(values["model"], self._max_norm)

    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        if self.rebalancer is None:
            optimizer = getattr(values["optimizer"], "optimizer", values["optimizer"])
            self.rebalancer = Rebalancer(values["model"], optimizer, self._folder, **self._settings)
        self.rebalancer.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        if self.rebalancer is not None:
            self.rebalancer.close()
