"""Rows of all ranks on every rank, different numbers from each, while other work goes on.

W columns of a row, G devices.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .decode_statistics import DecodeStatistics, IntArray
from .mesh import ExpertMesh
from .wire import Flight


class RowGather:
    """One gathering. On a mesh of two dimensions a row crosses to each other node once, and is handed on inside.

    Every rank calls `hand_on` and `finish` at the same points of its work.
    """

    def __init__(self, mesh: ExpertMesh, statistics: DecodeStatistics, part: str, row_RW: Tensor, count_G: IntArray):
        """row_RW: this rank's rows. count_G: [G] rows of every rank."""
        self._mesh, self._statistics, self._part = mesh, statistics, part
        self._parts: list[Tensor] = []
        self._flight: Flight | None = None
        if not mesh.nested:
            self._stages = [(mesh.group, count_G, np.arange(mesh.size))]
        else:
            assert mesh.inter is not None
            assert mesh.intra is not None
            here, place = divmod(mesh.rank, mesh.node_size)
            count_NS = count_G.reshape(-1, mesh.node_size)
            peers = np.arange(mesh.size).reshape(-1, mesh.node_size)
            self._stages = [
                (mesh.inter, count_NS[:, place], peers[:, place]),
                (mesh.intra, count_NS.sum(axis=0), peers[here]),
            ]
        self._row_RW = row_RW
        self._launch()

    def _launch(self) -> None:
        group, count, devices = self._stages.pop(0)
        others = devices != self._mesh.rank
        row_RW = torch.cat([self._row_RW, *self._parts])
        sent = np.where(others, len(row_RW), 0)
        message = row_RW.repeat(int(others.sum()), 1)
        self._flight = Flight(group, sent.tolist(), np.where(others, count, 0).tolist())
        self._flight.launch(message, (self._flight.sent, self._flight.received))
        rows_G = np.zeros(self._mesh.size, dtype=np.int64)
        rows_G[devices] = sent
        self._statistics.sent(self._part, rows_G, row_RW.shape[1] * row_RW.element_size())

    def hand_on(self) -> None:
        """Begins the second stage, if there is one that has not begun; waits for the first."""
        if self._stages:
            self._land()
            self._launch()

    def finish(self) -> Tensor:
        """[sum of the others' rows, W], in no promised order."""
        self.hand_on()
        self._land()
        return torch.cat(self._parts)

    def _land(self) -> None:
        assert self._flight is not None
        with self._statistics.timing(self._part):
            self._parts.append(self._flight.land())
