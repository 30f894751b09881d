"""Where recorded steps go: tokens into Parquet shards, or counts, summed over ranks, into statistics."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._arguments import check_types
from .._types import IntArray
from ..placement.errors import FileFormatError, InputError, UnsupportedError
from ..placement.files import replacing
from ..placement.model import ModelSpec
from ..placement.statistics import RoutingStatistics
from .hooks import SequenceBook, Step, sampled
from .statistics_file import write_statistics
from .trace_files import TraceWriter

if TYPE_CHECKING:
    from torch import Tensor

STEPS_WAITING = 8
"""Steps that may wait for the disk before the model waits too: bounds memory."""
PARTIAL_LIMIT_BYTES = 1 << 32

Window = tuple[int, str]
"""(number of the window since the start, workload)"""

logger = logging.getLogger(__name__)


def process_group() -> Any:
    """`torch.distributed` where a process group of several ranks is up, else None."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def rank_and_world() -> tuple[int, int]:
    """(rank, ranks): of the process group if one is up, else as torchrun says in RANK and WORLD_SIZE, else (0, 1).

    Raises:
        InputError: RANK or WORLD_SIZE is no number, or the rank is not below the number of ranks.
    """
    group = process_group()
    if group is not None:
        return int(group.get_rank()), int(group.get_world_size())
    variables = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    try:
        rank = int(variables["RANK"] or 0)
        world = int(variables["WORLD_SIZE"] or rank + 1)
    except ValueError:
        raise InputError(
            f"environment: RANK={variables['RANK']!r} and WORLD_SIZE={variables['WORLD_SIZE']!r} must be numbers"
        ) from None
    if not 0 <= rank < world:
        raise InputError(f"environment: RANK={rank} must be from 0 to WORLD_SIZE - 1 ({world - 1})")
    return rank, world


# Token mode: steps go to Parquet shards through a thread, so that the model does not wait for the disk.


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
        spare_ids: int = 0,
    ) -> None:
        self._spare_ids = spare_ids
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
        if self._spare_ids and (spare := ids[:, index] >= self._num_experts).any():
            layer = self._moe_layers[int(np.flatnonzero(spare.any(axis=(1, 2)))[0])]
            raise UnsupportedError(
                f"model layer {layer} gave a token no expert, as where its expert had as many as it takes; a trace "
                "has experts for every token: record counts, mode='counts' (--mode counts)"
            )
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


def _tokens_first(array: npt.NDArray[Any], index: IntArray) -> npt.NDArray[Any]:
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


# Count mode: tokens of each expert by window of steps, counted on the device and summed over ranks.


@dataclass
class WindowCounts:
    """Tokens each expert got in each window: {(window, workload): [L, E]}."""

    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int = 0
    windows: dict[Window, IntArray] = field(default_factory=dict)

    def add(self, other: WindowCounts) -> None:
        """Sums another rank's counts in.

        Raises:
            InputError: they are of another model.
        """
        for name in ("moe_layers", "num_experts"):
            if getattr(self, name) != getattr(other, name):
                raise InputError(
                    f"ranks recorded different models: {name} {getattr(self, name)}, {getattr(other, name)}"
                )
        self.top_k = max(self.top_k, other.top_k)
        for key, counts in other.windows.items():
            self.windows[key] = self.windows[key] + counts if key in self.windows else counts

    def statistics(self) -> RoutingStatistics:
        """The counts as statistics, windows in order within each workload.

        Raises:
            InputError: nothing was counted.
        """
        if not self.windows:
            raise InputError("no token was counted; run forward calls of the model inside the block")
        workloads: dict[str, list[IntArray]] = {}
        for (_, workload), counts in sorted(self.windows.items(), key=lambda item: item[0][0]):
            workloads.setdefault(workload, []).append(counts)
        named = {workload: np.stack(windows) for workload, windows in workloads.items()}
        return RoutingStatistics.from_counts(named, moe_layers=self.moe_layers, top_k=self.top_k or None)

    def save(self, path: Path) -> None:
        """Writes the counts of one rank, to be summed by `merge_counts`."""
        keys = sorted(self.windows)
        shape = (len(keys), len(self.moe_layers), self.num_experts)
        with replacing(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(
                file,
                load=np.stack([self.windows[key] for key in keys]) if keys else np.zeros(shape, np.int64),
                window=np.array([key[0] for key in keys], dtype=np.int64),
                workload=np.array([key[1] for key in keys], dtype=np.str_),
                moe_layers=np.array(self.moe_layers, dtype=np.int64),
                top_k=np.int64(self.top_k),
            )

    @classmethod
    def load(cls, path: Path) -> WindowCounts:
        """Reads what `save` wrote.

        Raises:
            FileFormatError: the file is damaged or something else.
        """
        try:
            if sum(entry.file_size for entry in zipfile.ZipFile(path).infolist()) > PARTIAL_LIMIT_BYTES:
                raise FileFormatError(f"{path}: declares more than {PARTIAL_LIMIT_BYTES:,} bytes of counts")
            with np.load(path, allow_pickle=False) as arrays:
                load, window, workload = arrays["load"], arrays["window"], arrays["workload"]
                layers, top_k = arrays["moe_layers"], int(arrays["top_k"])
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise FileFormatError(f"{path}: not the counts of a rank, or damaged ({error}); record again") from None
        if load.ndim != 3 or load.shape[:2] != (len(window), len(layers)) or len(workload) != len(window):
            raise FileFormatError(
                f"{path}: counts of shape {load.shape} for {len(window)} windows of {len(layers)} layers; record again"
            )
        keys = [(int(number), str(tag)) for number, tag in zip(window, workload, strict=True)]
        windows = dict(zip(keys, load, strict=True))
        return cls(tuple(int(layer) for layer in layers), int(load.shape[2]), top_k, windows)


def partial_path(path: Path, rank: int) -> Path:
    """Where rank `rank` leaves its own counts when ranks cannot be summed over the network."""
    return path.with_name(f"{path.stem}-rank{rank:05d}.npz")


@check_types
def merge_counts(path: str | Path) -> RoutingStatistics:
    """Sums the counts that ranks left beside `path` (a statistics .npz) one by one, writes them to `path`, and removes
    the parts.

    Raises:
        InputError: there are none. FileFormatError: one is damaged.
    """
    target = Path(path)
    parts = sorted(target.parent.glob(f"{target.stem}-rank*.npz"))
    if not parts:
        raise InputError(f"{target.parent} holds no counts of ranks ({target.stem}-rank00000.npz, ...)")
    total = WindowCounts.load(parts[0])
    for part in parts[1:]:
        total.add(WindowCounts.load(part))
    statistics = total.statistics()
    write_statistics(statistics, target)
    for part in parts:
        part.unlink()
    return statistics


class CountSink:
    """Counts steps on the device they ran on.

    At `close` the ranks of a process group sum their counts with all_reduce and rank 0 writes them; every rank must
    then close. `reduce=False`, or a block that ended in an error, leaves each rank's counts for `merge_counts`.
    """

    def __init__(
        self,
        path: Path,
        *,
        num_experts: int,
        moe_layers: Sequence[int],
        rank: int,
        world: int,
        sample: float,
        window_steps: int,
        reduce: bool,
        spare_ids: int = 0,
    ) -> None:
        self._spare_ids = spare_ids
        self._path, self._rank, self._world, self._sample = path, rank, world, sample
        self._window_steps, self._reduce = window_steps, reduce
        self._counts = WindowCounts(tuple(moe_layers), num_experts)
        self._book = SequenceBook()
        self._window: Window | None = None
        self._running: Tensor | None = None
        self._closed = False
        self.statistics: RoutingStatistics | None = None
        taken = next((file for file in (path, partial_path(path, rank)) if file.exists()), None)
        if taken is not None:
            raise InputError(f"out: {taken} exists already; give another name, or remove it")

    @property
    def tokens(self) -> int:
        """Tokens counted on this rank so far (all ranks' once closed)."""
        if self.statistics is not None:
            return self.statistics.tokens
        counted = [*self._counts.windows.values()]
        if self._running is not None:
            counted.append(self._read(self._running))
        total = sum((counts.sum(axis=1) for counts in counted), np.zeros(len(self._counts.moe_layers), np.int64))
        return int(total.max()) // max(self._counts.top_k, 1)

    def take(self, step: Step) -> None:
        """Counts a step."""
        import torch

        window = (step.number // self._window_steps, step.workload)
        if window != self._window:
            self._end_window()
            self._window = window
        ids, width = step.expert_ids, self._counts.num_experts + self._spare_ids + 2
        self._counts.top_k = ids.shape[2]
        if self._running is None:
            self._running = torch.zeros(len(ids), width, dtype=torch.int64, device=ids.device)
        # Ids that are no expert (masked, out of range) fall into the columns at either end, refused when they are read.
        place = ids.to(torch.int64).clamp_(-1, width - 2)
        place += torch.arange(len(ids), device=ids.device)[:, None, None] * width + 1
        keep = self._counted(step)
        ones = torch.ones(1, dtype=torch.int64, device=ids.device) if keep is None else keep.to(torch.int64)[:, None]
        weights = ones.expand(ids.shape[1:])
        if all(step.routed):
            self._running.view(-1).scatter_add_(0, place.view(-1), weights.expand(ids.shape).reshape(-1))
            return
        for layer, routed in enumerate(step.routed):
            if routed:
                self._running.view(-1).scatter_add_(0, place[layer].reshape(-1), weights.reshape(-1))

    def _counted(self, step: Step) -> Tensor | None:
        """[T] which tokens count: not padding, and of a sampled row. None: all."""
        import torch

        rows, device = step.batch.rows, step.expert_ids.device
        keep = None
        if step.batch.mask is not None:
            keep = step.batch.mask.to(device, non_blocking=True).expand(rows.count, step.width)
        if self._sample < 1.0:
            chosen = torch.from_numpy(sampled(self._book.number_rows(rows), self._sample, self._rank))
            chosen = chosen.to(device, non_blocking=True)[:, None].expand(rows.count, step.width)
            keep = chosen if keep is None else keep & chosen
        return None if keep is None else keep.reshape(-1)

    def close(self, failed: bool) -> None:
        """Sums over ranks and writes the statistics.

        Raises:
            UnsupportedError: the model handed on ids that are no expert.
        """
        if self._closed:
            return
        self._closed = True
        self._end_window()
        group = process_group()
        if not self._counts.windows and (group is None or failed or not self._reduce):
            return
        if self._world == 1 and self._reduce:
            self._write(self._counts)
        elif group is None or failed or not self._reduce:
            part = partial_path(self._path, self._rank)
            self._counts.save(part)
            if self._reduce:
                logger.warning("%s holds the counts of rank %d alone; sum them with merge_counts", part, self._rank)
        else:
            self._write(_all_reduced(self._counts, group))

    def _write(self, counts: WindowCounts) -> None:
        self.statistics = counts.statistics()
        if self._rank == 0:
            write_statistics(self.statistics, self._path)

    def _end_window(self) -> None:
        if self._running is None or self._window is None:
            return
        counts = self._read(self._running)
        previous = self._counts.windows.get(self._window)
        self._counts.windows[self._window] = counts if previous is None else previous + counts
        self._running = None

    def _read(self, running: Tensor) -> IntArray:
        table: IntArray = running.cpu().numpy()
        stray = table[:, 0] + table[:, -1]
        if stray.any():
            layer = int(np.flatnonzero(stray)[0])
            raise UnsupportedError(
                f"model layer {self._counts.moe_layers[layer]} handed on {stray[layer]} ids that are not from 0 to "
                f"{self._counts.num_experts - 1}, as masked or rank-local ids of expert parallelism are; record the "
                "routers instead with routers="
            )
        return table[:, 1 : 1 + self._counts.num_experts].copy()


def _all_reduced(counts: WindowCounts, group: Any) -> WindowCounts:
    """The sum over ranks, the same on each. Ranks may have counted different windows."""
    import torch

    mine = {
        "windows": sorted(counts.windows),
        "top_k": counts.top_k,
        "layers": counts.moe_layers,
        "e": counts.num_experts,
    }
    said: list[Any] = [None] * group.get_world_size()
    group.all_gather_object(said, mine)
    if len({(other["layers"], other["e"]) for other in said}) > 1:
        raise InputError(f"ranks recorded different models: {[(other['layers'], other['e']) for other in said]}")
    windows = sorted({window for other in said for window in other["windows"]})
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in group.get_backend() else torch.device("cpu")
    table = torch.zeros(len(windows), len(counts.moe_layers), counts.num_experts, dtype=torch.int64)
    for i, window in enumerate(windows):
        if window in counts.windows:
            table[i] = torch.from_numpy(counts.windows[window])
    table = table.to(device)
    if len(windows):
        group.all_reduce(table)
    total = table.cpu().numpy()
    return WindowCounts(
        counts.moe_layers,
        counts.num_experts,
        max(other["top_k"] for other in said),
        dict(zip(windows, total, strict=True)),
    )
