"""Everything that belongs to an expert row by row: its parameters and what an optimizer keeps for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...placement.errors import InputError, UnsupportedError
from .experts import PlacedExperts
from .layer_placement import LayerPlacement

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowTensor:
    """One tensor [S, ...] with a row for each of a rank's experts. replace: puts a tensor of more or fewer rows there."""

    name: str
    value: Tensor
    replace: Callable[[Tensor], None]

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.value.shape[1:], dtype=np.int64)) * self.value.element_size()

    def __str__(self) -> str:
        return f"{self.name} {self.value.dtype} {list(self.value.shape[1:])}"


def row_tensors(module: PlacedExperts, optimizer: torch.optim.Optimizer | None) -> list[RowTensor]:
    """The layer's parameters, each followed by its optimizer state.

    Raises:
        InputError: a gradient waits to be used; it would be lost.
        UnsupportedError: optimizer state that has no row for each expert.
    """
    result = []
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.grad is not None and bool(parameter.grad.any()):
            raise InputError(
                f"layer {module.layer}: {name} has a gradient; change the plan between optimizer.zero_grad() and the next "
                "backward"
            )
        result.append(RowTensor(name, parameter.detach(), _replace_data(parameter)))
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for key in sorted(state, key=str):
            value = state[key]
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if len(value) != len(parameter):
                raise UnsupportedError(
                    f"layer {module.layer}: {type(optimizer).__name__} keeps {key!r} of shape {list(value.shape)} for {name} "
                    f"{list(parameter.shape)}, which has no row for each expert; use an optimizer that works element by "
                    "element, as Adam does"
                )
            result.append(RowTensor(f"{name}.{key}", value, _replace_entry(state, key)))
    return result


def _replace_data(parameter: nn.Parameter) -> Callable[[Tensor], None]:
    def replace(value: Tensor) -> None:
        parameter.grad = None
        # A loss of an earlier step that is still alive keeps the parameter's gradient accumulator, with the old shape; torch
        # makes a new one when the type changes, on the way.
        other = torch.float32 if value.dtype == torch.float64 else torch.float64
        parameter.data = value.new_empty(0, dtype=other)
        parameter.data = value

    return replace


def _replace_entry(state: dict[str, Tensor], key: str) -> Callable[[Tensor], None]:
    def replace(value: Tensor) -> None:
        state[key] = value

    return replace


def assign_rows(placement: LayerPlacement, rank: int, row_expert: IntArray) -> tuple[IntArray, dict[int, int]]:
    """Which expert each row holds once `placement` is in force, and where the changed rows' content comes from.

    Experts that stay keep their rows (in their order, where the number of rows changes). Gives ([S'] expert of each row,
    {row: the old row it takes its content from, or -1 where it has to come from another rank}) for the rows that change.
    """
    wanted = placement.expert[placement.on_device(rank)].tolist()
    kept: list[int] = []
    for row, expert in enumerate(row_expert.tolist()):
        if expert in wanted:
            wanted.remove(expert)
            kept.append(row)
    size = len(kept) + len(wanted)
    places = {row: row for row in kept} if size == len(row_expert) else dict(zip(kept, range(size), strict=False))
    result = np.full(size, -1, dtype=np.int64)
    source = {}
    for row, place in places.items():
        result[place] = row_expert[row]
        if size != len(row_expert):
            source[place] = row
    for place, expert in zip(np.flatnonzero(result < 0).tolist(), sorted(wanted), strict=True):
        result[place] = expert
        held = [row for row in kept if row_expert[row] == expert]
        source[place] = held[0] if held else -1
    return result, source
