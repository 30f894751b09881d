"""A rank's rows of experts as torch.distributed.checkpoint sees them: parts of one tensor of all experts in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class LogicalRows(Tensor):
    """[E, ...] of which this rank holds some rows. Only good for saving and loading.

    local: [S, ...] the rows, read and written in place. row_expert: [S] the expert of each.
    """

    local: Tensor
    row_expert: npt.NDArray[np.int64]

    @staticmethod
    def __new__(cls, local: Tensor, row_expert: npt.NDArray[np.int64], experts: int) -> LogicalRows:
        size = (experts, *local.shape[1:])
        made: LogicalRows = torch.Tensor._make_wrapper_subclass(cls, size, dtype=local.dtype, device=local.device)
        made.local, made.row_expert = local.detach(), row_expert
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"{func}: rows of experts are spread over ranks; only saving and loading is possible")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LogicalRows({list(self.shape)}, here: {self.row_expert.tolist()})"

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
