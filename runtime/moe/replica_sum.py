"""Gradients of replicas summed over their ranks, the same bits on each, so that replicas stay equal for ever.

m rows of weights here whose expert has replicas, n parameters of one expert.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from .layer_placement import LayerPlacement
from .lost_ranks import naming_lost_ranks
from .mesh import ExpertMesh


class ReplicaSum:
    """Who holds what, for one layer under one placement.

    Each replicated expert's gradient is cut into as many pieces as devices hold it; a holder gathers one piece from all,
    adds them in the order of devices, and hands the sum back. That moves 2 (h - 1) / h gradients a holder, the least
    possible, and every piece is added up by one rank only.
    """

    def __init__(self, placement: LayerPlacement, mesh: ExpertMesh, row_of_slot: np.ndarray[Any, Any]) -> None:
        self._mesh = mesh
        holders = [np.unique(placement.device[placement.expert == e]) for e in range(placement.experts)]
        self.any = bool((placement.replicas > 1).any())
        mine = [e for e in np.flatnonzero(placement.replicas > 1) if mesh.rank in holders[e]]
        self._holders = [holders[e].tolist() for e in mine]
        rows = [row_of_slot[(placement.expert == e) & (placement.device == mesh.rank)].tolist() for e in mine]
        self._first = [row[0] for row in rows]
        """The row that stands for an expert; twins on this device are added to it first."""
        self._twins = [(row[0], other) for row in rows for other in row[1:]]

    def reduce(self, grads: list[Tensor]) -> list[Tensor]:
        """Gradients [S, ...] with the rows of replicated experts summed over all their replicas."""
        grads = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        for first, other in self._twins:
            for grad in grads:
                grad[first] += grad[other]
        flat_mn = torch.cat([grad[self._first].flatten(1) for grad in grads], dim=1)
        total_mn = self._exchange(flat_mn)
        start = 0
        for grad in grads:
            size = grad[0].numel() if len(grad) else 0
            if self._first:
                grad[self._first] = total_mn[:, start : start + size].reshape(-1, *grad.shape[1:])
            for first, other in self._twins:
                grad[other] = grad[first]
            start += size
        return grads

    def _exchange(self, flat_mn: Tensor) -> Tensor:
        size, rank = self._mesh.size, self._mesh.rank
        cuts = [_cuts(flat_mn.shape[1], holders) for holders in self._holders]
        shared = [[i for i, holders in enumerate(self._holders) if peer in holders] for peer in range(size)]
        # To each peer its pieces of what both hold, from each peer this rank's pieces; back again the sums.
        theirs = [[flat_mn[i, slice(*cuts[i][peer])] for i in shared[peer]] for peer in range(size)]
        lengths = [[_length(cuts[i][rank]) for i in shared[peer]] for peer in range(size)]
        arrived = self._all_to_all(flat_mn, theirs, lengths)
        sums: list[Tensor | None] = [None] * len(self._holders)
        for peer in range(size):
            for i, piece in zip(shared[peer], arrived[peer], strict=True):
                total = sums[i]
                sums[i] = piece if total is None else total + piece
        done = [[part for i in shared[peer] if (part := sums[i]) is not None] for peer in range(size)]
        back = self._all_to_all(flat_mn, done, [[len(piece) for piece in pieces] for pieces in theirs])
        result = torch.empty_like(flat_mn)
        for peer in range(size):
            for i, piece in zip(shared[peer], back[peer], strict=True):
                result[i, slice(*cuts[i][peer])] = piece
        return result

    def _all_to_all(self, like: Tensor, pieces: list[list[Tensor]], lengths: list[list[int]]) -> list[list[Tensor]]:
        sent = [sum(len(piece) for piece in part) for part in pieces]
        received = [sum(part) for part in lengths]
        every = [piece for part in pieces for piece in part]
        message = torch.cat(every) if every else like.new_empty(0)
        buffer = like.new_empty(sum(received))
        with naming_lost_ranks(self._mesh.group):
            dist.all_to_all_single(buffer, message, received, sent, group=self._mesh.group)
        return [
            list(torch.split(part, sizes)) if sizes else []
            for part, sizes in zip(torch.split(buffer, received), lengths, strict=True)
        ]


class SharedGradients(Function):
    """Identity on an expert layer's parameters; backward sums what replicas got, and scales."""

    @staticmethod
    def forward(ctx: Any, replicas: ReplicaSum, scale: float, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.replicas, ctx.scale = replicas, scale
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        summed = ctx.replicas.reduce(list(grads)) if ctx.replicas.any else list(grads)
        return None, None, *(grad if ctx.scale == 1.0 else grad * ctx.scale for grad in summed)


def _cuts(length: int, holders: list[int]) -> dict[int, tuple[int, int]]:
    """The piece of `length` numbers that each holder adds up."""
    edges = [length * i // len(holders) for i in range(len(holders) + 1)]
    return {holder: (edges[i], edges[i + 1]) for i, holder in enumerate(holders)}


def _length(piece: tuple[int, int]) -> int:
    return piece[1] - piece[0]
