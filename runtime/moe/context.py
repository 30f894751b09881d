"""Keys and values of all sequences' context on this rank, and what attention may see of it.

B sequences, H heads, S positions, d head width, R tokens that stand here, one of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Context:
    """Takes the place of a Transformers cache in attention: one new token of some of the sequences at a time.

    sequences, capacity: B and S. first: number of the first sequence held here.
    """

    def __init__(self, sequences: int, capacity: int, first: int = 0) -> None:
        self.sequences, self.capacity, self.first = sequences, capacity, first
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._standing_R = self._position_R = torch.empty(0, dtype=torch.int64)
        self._limit = 0

    def allocate(self, layer: int, shape: Sequence[int], like: Tensor) -> None:
        """Room for a layer. shape: heads and width of keys, heads and width of values."""
        if layer not in self._keys:
            heads, width, value_heads, value_width = shape
            self._keys[layer] = like.new_zeros(self.sequences, heads, self.capacity, width)
            self._values[layer] = like.new_zeros(self.sequences, value_heads, self.capacity, value_width)

    def write(self, layer: int, sequence_R: Tensor, position_R: Tensor, key_RHd: Tensor, value_RHd: Tensor) -> None:
        self._keys[layer][sequence_R - self.first, :, position_R] = key_RHd
        self._values[layer][sequence_R - self.first, :, position_R] = value_RHd

    def packed(self, layer: int, sequence_R: Tensor, position_R: Tensor) -> Tensor:
        """[R, W] keys, values, sequence and position of single tokens, for other ranks."""
        key, value = self._keys[layer], self._values[layer]
        row_R = sequence_R - self.first
        place_R2 = torch.stack([sequence_R, position_R], dim=1).int().view(key.dtype)
        return torch.cat(
            [key[row_R, :, position_R].flatten(1), value[row_R, :, position_R].flatten(1), place_R2], dim=1
        )

    def unpack(self, layer: int, row_RW: Tensor) -> None:
        """Takes in what other ranks have packed."""
        key, value = self._keys[layer], self._values[layer]
        width, end = key.shape[1] * key.shape[3], row_RW.shape[1] - 8 // key.element_size()
        sequence_R, position_R = row_RW[:, end:].contiguous().view(torch.int32).long().unbind(dim=1)
        self.write(
            layer,
            sequence_R,
            position_R,
            row_RW[:, :width].view(len(row_RW), key.shape[1], key.shape[3]),
            row_RW[:, width:end].view(len(row_RW), value.shape[1], value.shape[3]),
        )

    def stand(self, sequence_R: Tensor, position_R: Tensor, limit: int) -> None:
        """The tokens of the next attention. limit: positions that any of them may see."""
        self._standing_R, self._position_R, self._limit = sequence_R, position_R, limit

    def update(self, key_states: Tensor, value_states: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        """What attention calls: [R, H, 1, d] of the new tokens in, [R, H, limit, d] of their sequences out."""
        self.write(layer, self._standing_R, self._position_R, key_states[:, :, 0], value_states[:, :, 0])
        row_R = self._standing_R - self.first
        return self._keys[layer][row_R, :, : self._limit], self._values[layer][row_R, :, : self._limit]


def visible(position_B: Tensor, limit: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, limit] to add to attention scores: zero for what a token at that position sees.

    window: how many positions back it sees, its own among them; None for all.
    """
    key_S = torch.arange(limit, device=position_B.device)
    seen_BS = key_S <= position_B[:, None]
    if window is not None:
        seen_BS &= key_S > position_B[:, None] - window
    hidden = torch.zeros(seen_BS.shape, dtype=dtype, device=position_B.device)
    return hidden.masked_fill(~seen_BS, torch.finfo(dtype).min)[:, None, None, :]
