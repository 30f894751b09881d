"""The routing of one forward call, gathered layer by layer on the device it was computed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..placement.errors import InputError, UnsupportedError
from .hooks_batch import Batch

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from .families import RouterSite


@dataclass(frozen=True, eq=False)
class Step:
    """One whole forward call. expert_ids: [L, T, k] int16 or int32. gate_weights: [L, T, k] or None.

    routed: which layers routed at all.
    """

    number: int
    workload: str
    batch: Batch
    width: int
    expert_ids: Tensor
    gate_weights: Tensor | None
    routed: tuple[bool, ...]


class Sink(Protocol):
    """Where steps go."""

    def take(self, step: Step) -> None: ...


def narrow_dtype(num_experts: int) -> dtype:
    """A narrow type in which an id that is no expert (-1, num_experts) still shows as what it was."""
    import torch

    return torch.int16 if num_experts < 1 << 15 else torch.int32


class StepRouting:
    """Fills up with the routing of one forward call."""

    def __init__(self, sites: Sequence[RouterSite], batch: Batch, *, keep_weights: bool) -> None:
        self.batch = batch
        self._sites, self._keep_weights = sites, keep_weights
        self._ids: Tensor | None = None
        self._weights: Tensor | None = None
        self._filled = [0] * len(sites)
        self._width = 0

    def add(self, slot: int, ids: Tensor, weights: Tensor | None) -> None:
        """Copies what layer `slot` routed: ids and weights [..., k]. A layer may route its tokens in several calls."""
        import torch

        ids = ids.reshape(-1, ids.shape[-1])
        tokens = len(ids)
        if self._ids is None:
            total = self._expected(tokens, slot)
            shape = (len(self._sites), total, ids.shape[-1])
            self._ids = torch.empty(shape, dtype=narrow_dtype(self._sites[0].num_experts), device=ids.device)
            if weights is not None and self._keep_weights:
                self._weights = torch.empty(shape, dtype=torch.float16, device=ids.device)
        start = self._filled[slot]
        if start + tokens > self._ids.shape[1] or ids.shape[-1] != self._ids.shape[-1]:
            raise UnsupportedError(
                f"{self._sites[slot].name} routed {start + tokens} tokens to {ids.shape[-1]} experts each, other layers "
                f"of this forward {self._ids.shape[1]} to {self._ids.shape[-1]}; a trace needs the same of every layer"
            )
        self._ids[slot, start : start + tokens].copy_(ids, non_blocking=True)
        if self._weights is not None:
            if weights is None or weights.numel() != ids.numel():
                given = "no gate weights" if weights is None else f"gate weights of shape {list(weights.shape)}"
                raise InputError(f"{self._sites[slot].name}: {given} beside expert ids of shape {list(ids.shape)}")
            self._weights[slot, start : start + tokens].copy_(weights.detach().reshape(ids.shape), non_blocking=True)
        self._filled[slot] = start + tokens

    def _expected(self, tokens: int, slot: int) -> int:
        width = self.batch.width
        if width is not None and tokens < self.batch.rows.count * width:
            return self.batch.rows.count * width
        return tokens

    def finish(self, number: int, workload: str) -> Step | None:
        """The step, or None when no layer routed.

        Raises:
            UnsupportedError: a layer routed only a part of the batch.
        """
        if self._ids is None:
            return None
        total = self._ids.shape[1]
        for site, filled in zip(self._sites, self._filled, strict=True):
            if filled not in (0, total):
                raise UnsupportedError(
                    f"{site.name} routed {filled} of the {total} tokens of this forward; recording needs every position"
                )
        width = self.batch.width_of(total, self._sites[0].name)
        routed = tuple(filled > 0 for filled in self._filled)
        return Step(number, workload, self.batch, width, self._ids, self._weights, routed)

    @property
    def complete(self) -> bool:
        return self._ids is not None and all(filled == self._ids.shape[1] for filled in self._filled)
