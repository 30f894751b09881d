"""The same for the Transformers Trainer: a callback that rebalances, and a Trainer that clips, saves and resumes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from transformers import Trainer, TrainerCallback

from ..placement.errors import InputError, UnsupportedError
from ..placement.files import write_text
from ..runtime.moe.checkpoint import checkpoint_plan, load_checkpoint, save_checkpoint
from ..runtime.moe.data_parallel import clip_grad_norm_, expert_layers, no_sync
from ..runtime.moe.migrate import apply
from ..runtime.moe.weights import export_hf, load_weights
from .rebalancer import Rebalancer

STATE = "moeplace"
"""In a checkpoint of the Trainer: the folder that training resumes from, beside the weights for all others."""


class RebalanceCallback(TrainerCallback):
    """`ExpertTrainer(..., callbacks=[RebalanceCallback(folder, every=500)])` on a model given to `parallelize`.

    With the plain Trainer, whose own clipping takes each rank's experts for all there are, as do its saving and its
    loss scaling, TrainingArguments(max_grad_norm=0, save_strategy="no") without fp16 is needed.

    rebalancer: from the first step on.

    Args:
        folder: as for `Rebalancer`.
        max_norm: with the plain Trainer, gradients are clipped by the norm of the whole model.
        settings: as for `Rebalancer`.

    Raises:
        InputError: when training begins, with the plain Trainer's own clipping on.
        UnsupportedError: when training begins, with the plain Trainer's own saving or loss scaling on.
    """

    def __init__(self, folder: str | Path, max_norm: float = 1.0, **settings: Any) -> None:
        self._folder, self._max_norm, self._settings = folder, max_norm, settings
        self._resumed: Mapping[str, int] | None = None
        self.rebalancer: Rebalancer | None = None
        self.within_expert_trainer = False

    def resume(self, state: Mapping[str, int]) -> None:
        """Goes on from a rebalancer's `state_dict`."""
        self._resumed = state

    def on_train_begin(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        if self.within_expert_trainer:
            return
        if args.max_grad_norm and dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError(
                f"TrainingArguments.max_grad_norm ({args.max_grad_norm}) clips by a norm that differs between ranks; "
                "use moeplace.training.ExpertTrainer, or set it to 0 and give "
                f"RebalanceCallback(max_norm={args.max_grad_norm})"
            )
        # Here and not when it saves: only the first rank would be refused then, and the others wait for it.
        if args.save_strategy != "no":
            raise UnsupportedError(
                f"TrainingArguments.save_strategy ({str(args.save_strategy.value)!r}) would write the first rank's "
                "experts as if they were all; use moeplace.training.ExpertTrainer, or set it to 'no' and write "
                "checkpoints with moeplace.runtime.save_checkpoint(path, model, optimizer) on every rank"
            )
        if args.fp16:
            raise UnsupportedError(
                "TrainingArguments.fp16 scales the loss by a factor that would differ between ranks; use "
                "moeplace.training.ExpertTrainer, or bf16"
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        if not self.within_expert_trainer:
            clip_grad_norm_(values["model"], self._max_norm)

    def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        if self.rebalancer is None:
            optimizer = getattr(values["optimizer"], "optimizer", values["optimizer"])
            self.rebalancer = Rebalancer(values["model"], optimizer, self._folder, **self._settings)
            if self._resumed is not None:
                self.rebalancer.load_state_dict(self._resumed)
        self.rebalancer.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
        if self.rebalancer is not None:
            self.rebalancer.close()


class ExpertTrainer(Trainer):
    """The Transformers Trainer for a model given to `parallelize`, with the same arguments.

    Gradients are clipped by the norm of the whole model, summed once a step, and scaled alike on all ranks in float16.
    A checkpoint holds what `from_pretrained` reads, all experts in order, and a folder `moeplace` to resume from: all
    ranks' optimizer state, the plan in force, and where the rebalancing stood. Resuming puts that plan in force if the
    mesh has as many devices, and goes on under the model's own plan otherwise.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = ShardedGradScaler(self.accelerator.device.type)

    def train(self, *arguments: Any, **named: Any) -> Any:
        for callback in self._rebalancing():
            callback.within_expert_trainer = True
        return super().train(*arguments, **named)

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        last = self.accelerator.sync_gradients
        with contextlib.nullcontext() if last else no_sync(self.model):
            loss: Tensor = super().training_step(*arguments, **named)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        self.accelerator.unscale_gradients(self.optimizer)
        return clip_grad_norm_(self.model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is not None:
            return grad_norm
        self.accelerator.unscale_gradients(self.optimizer)
        return clip_grad_norm_(self.model, float("inf"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in (*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")):
                stale.unlink()
        export_hf(self.model, folder)
        if self.args.should_save:
            processing = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if processing is not None:
                processing.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir) / STATE
        save_checkpoint(folder, self.model, self._inner_optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
            states = [part.rebalancer.state_dict() for part in self._rebalancing() if part.rebalancer is not None]
            write_text(folder / "rebalancer.json", json.dumps(states))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE).is_dir():
            load_weights(self.model, folder)
            return
        plan = checkpoint_plan(folder / STATE)
        layer = expert_layers(self.model)[0][1]
        if plan.topology.num_devices == layer.mesh.size and plan.fingerprint != layer.plan.fingerprint:
            apply(self.model, plan)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / STATE).is_dir():
            return
        folder = Path(checkpoint)
        load_checkpoint(folder / STATE, self.model, self._inner_optimizer)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
        states = json.loads((folder / STATE / "rebalancer.json").read_text())
        for callback, state in zip(self._rebalancing(), states, strict=False):
            callback.resume(state)

    def _load_best_model(self) -> None:
        load_weights(self.model, self.state.best_model_checkpoint)

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer

    def _rebalancing(self) -> list[RebalanceCallback]:
        return [part for part in self.callback_handler.callbacks if isinstance(part, RebalanceCallback)]
