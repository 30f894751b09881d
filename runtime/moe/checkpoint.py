"""Distributed checkpoints in logical expert order: written under one plan, read under any, by any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..._types import IntArray
from ...placement.errors import InputError
from .data_parallel import expert_layers
from .experts import PlacedExperts

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def save_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Writes the model, and the optimizer's state, with torch.distributed.checkpoint. Every rank calls it.

    Experts are rows of [E, ...] tensors under the names that the model has in one process, each written by one of the
    ranks that hold it; so the same folder is read by `load_checkpoint` under another plan, and by
    `torch.distributed.checkpoint` into the model in one process.

    Args:
        path: of the folder.
        model: with layers of placed experts, wrapped or not.
        optimizer: whose state goes along.
    """
    state, _ = _state(model, optimizer)
    save(state, checkpoint_id=str(path))


def load_checkpoint(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Reads what `save_checkpoint` wrote into a model of the same shapes, whatever its plan. Every rank calls it.

    The format is torch's and may hold pickled values: read only checkpoints you trust.

    Args:
        path: of the folder.
        model: to read into.
        optimizer: whose state to read.

    Raises:
        InputError: no checkpoint there, or it lacks tensors of this model, or has them in other shapes.
    """
    if not (Path(path) / ".metadata").is_file():
        raise InputError(f"{path}: no checkpoint of torch.distributed.checkpoint there (no file .metadata)")
    state, rows = _state(model, optimizer)
    try:
        load(state, checkpoint_id=str(path))
    except (CheckpointException, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a checkpoint of this model and optimizer: {_last_line(error)}") from error
    for holder, key, value in rows:
        value.copy_to_twins()
        holder[key] = value.local
    optimizers = [] if optimizer is None else [optimizer]
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state.get("optimizer", {}))


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], str, LogicalTensor]]]:
    """(the state to save or to load into, where in it rows of experts stand)."""
    optimized: Any
    weights, optimized = get_state_dict(model, [] if optimizer is None else [optimizer])
    state: dict[str, Any] = {"model": dict(weights)}
    moments: dict[str, Any] = {}
    if optimizer is not None:
        # Copies of the dictionaries, which are the optimizer's own; not of the tensors in them.
        moments = {name: dict(entries) for name, entries in optimized["state"].items()}
        state["optimizer"] = {**optimized, "state": moments}
    rows: list[tuple[dict[str, Any], str, LogicalTensor]] = []
    for path, module in expert_layers(model):
        prefix = ".".join(part for part in path.split(".") if part and part not in WRAPPERS)
        for name, _ in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            rows.append(_logical(state["model"], full, module))
            entries = moments.get(full, {})
            rows += [_logical(entries, key, module) for key, value in entries.items() if value.ndim]
    return state, rows


def _logical(holder: dict[str, Any], key: str, module: PlacedExperts) -> tuple[dict[str, Any], str, LogicalTensor]:
    value = LogicalTensor(holder[key], module.row_expert, module.num_experts)
    holder[key] = value
    return holder, key, value


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


class LogicalTensor(Tensor):
    """[E, ...] of all experts in order, of which this rank holds some rows, as the planners of
    torch.distributed.checkpoint see it. Only good for saving and loading.

    local: [S, ...] the rows, read and written in place. row_expert: [S] the expert of each.
    """

    local: Tensor
    row_expert: IntArray

    @staticmethod
    def __new__(cls, local: Tensor, row_expert: IntArray, experts: int) -> LogicalTensor:
        size = (experts, *local.shape[1:])
        tensor: LogicalTensor = torch.Tensor._make_wrapper_subclass(cls, size, dtype=local.dtype, device=local.device)
        tensor.local, tensor.row_expert = local.detach(), row_expert
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"{func}: rows of experts are spread over ranks; only saving and loading is possible")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LogicalTensor({list(self.shape)}, here: {self.row_expert.tolist()})"

    def first_rows(self) -> dict[int, int]:
        """{expert: the row that is saved and loaded}; twins on this rank follow it."""
        experts, rows = np.unique(self.row_expert, return_index=True)
        return dict(zip(experts.tolist(), rows.tolist(), strict=True))

    def copy_to_twins(self) -> None:
        """Brings rows of the same expert into line, after loading."""
        first = self.first_rows()
        for row, expert in enumerate(self.row_expert.tolist()):
            if row != first[expert]:
                self.local[row].copy_(self.local[first[expert]])

    def _chunk(self, expert: int) -> ChunkStorageMetadata:
        rest = self.shape[1:]
        return ChunkStorageMetadata(offsets=torch.Size([expert, *[0] * len(rest)]), sizes=torch.Size([1, *rest]))

    # What torch.distributed.checkpoint asks of a tensor of its own kind (torch/distributed/_checkpointable.py).

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk(expert) for expert in self.first_rows()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        row = self.first_rows()[int(index.offset[0])]
        return self.local[row : row + 1]
