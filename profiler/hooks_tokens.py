"""Token mode: steps go to Parquet shards through a thread, so that the model does not wait for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..placement.errors import InputError
from ..placement.model import ModelSpec
from .hooks_batch import SequenceBook, sampled
from .hooks_step import Step
from .trace_files import TraceWriter

if TYPE_CHECKING:
    from torch import Tensor

STEPS_WAITING = 8
"""Steps that may wait for the disk before the model waits too: bounds memory."""


@dataclass(frozen=True, eq=False)
class _Copy:
    """A step on its way to the host; it has arrived when every event of `ready` has passed."""

    step: Step
    expert_ids: Tensor
    gate_weights: Tensor | None
    mask: Tensor | None
    position: Tensor | None
    ready: list[Any]


class TokenSink:
    """Writes the tokens of a fraction `sample` of the sequences. Used by one thread, which must call `close`."""

    def __init__(
        self,
        folder: Path,
        *,
        num_experts: int,
        moe_layers: Sequence[int],
        rank: int,
        sample: float,
        model: ModelSpec | None,
    ) -> None:
        self._folder, self._num_experts, self._moe_layers = folder, num_experts, tuple(moe_layers)
        self._rank, self._sample, self._model = rank, sample, model
        self._book = SequenceBook()
        self._writer: TraceWriter | None = None
        self._queue: queue.Queue[_Copy | None] = queue.Queue(STEPS_WAITING)
        self._error: Exception | None = None
        self._closed = False
        self.tokens = 0
        taken = sorted(folder.glob(f"rank{rank:05d}-*.parquet")) if folder.is_dir() else []
        if taken or (folder.exists() and not folder.is_dir()):
            what = f"already holds a trace ({taken[0].name})" if taken else "is a file"
            raise InputError(f"out: {folder} {what}; give another folder, or remove it")
        self._thread = threading.Thread(target=self._write_steps, name="moeplace-trace", daemon=True)
        self._thread.start()

    def take(self, step: Step) -> None:
        """Starts the step's copy to the host and queues it.

        Raises:
            Exception: whatever ended writing before (a full disk, an id that is no expert).
        """
        self._raise_error()
        parts = (step.expert_ids, step.gate_weights, step.batch.mask, step.batch.position)
        weights, mask, position = map(_to_host, parts[1:])
        self._queue.put(_Copy(step, _host_copy(step.expert_ids), weights, mask, position, _copied(parts)))

    def close(self, failed: bool) -> None:
        """Writes what is waiting and completes the last shard.

        Raises:
            Exception: whatever ended writing. What had been completed before stays.
        """
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()
            if self._writer is not None:
                self._writer.close()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_steps(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keep taking, so that the model's thread is never left waiting
            try:
                self._write(item)
            except Exception as error:  # noqa: BLE001 - handed to the thread that records
                self._error = error

    def _write(self, item: _Copy) -> None:
        for event in item.ready:
            event.synchronize()
        step = item.step
        mask = None if item.mask is None else item.mask.numpy()
        position = None if item.position is None else item.position.numpy()
        placed = self._book.place(step.batch.rows, step.width, mask, position)
        index, sequence, where = placed.index, placed.sequence, placed.position
        if self._sample < 1.0:
            chosen = sampled(sequence, self._sample, self._rank)
            index, sequence, where = index[chosen], sequence[chosen], where[chosen]
        ids = item.expert_ids.numpy()
        weights = None if item.gate_weights is None else item.gate_weights.numpy()
        if self._writer is None:
            self._writer = TraceWriter(
                self._folder,
                num_experts=self._num_experts,
                top_k=ids.shape[2],
                moe_layers=self._moe_layers,
                rank=self._rank,
                gate_weights=weights is not None,
                model=self._model,
            )
        if not len(index):
            return
        self._writer.add(
            _tokens_first(ids, index),
            gate_weights=None if weights is None else _tokens_first(weights, index),
            sequence=sequence,
            position=where,
            step=step.number,
            workload=step.workload,
        )
        self.tokens += len(index)


def _tokens_first(array: npt.NDArray[Any], index: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """[L, T, k] -> the tokens of `index`, [n, L, k]."""
    by_token = array.transpose(1, 0, 2)
    return np.ascontiguousarray(by_token) if len(index) == len(by_token) else by_token[index]


def _to_host(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _host_copy(tensor)


def _host_copy(tensor: Tensor) -> Tensor:
    import torch

    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return host.copy_(tensor, non_blocking=True)


def _copied(parts: Sequence[Tensor | None]) -> list[Any]:
    """One event a CUDA device that copies come from, recorded behind them."""
    import torch

    devices = {part.device for part in parts if part is not None and part.device.type == "cuda"}
    return [torch.cuda.current_stream(device).record_event() for device in devices]
