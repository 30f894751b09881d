"""Rows from rank to rank: many messages, peer to peer, with a bound on the bytes under way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import ExpertMesh


@dataclass(frozen=True, eq=False)
class Parcel:
    """One row of one tensor from device to device. content: what to send or where to receive, None on other ranks."""

    source: int
    target: int
    bytes: int
    content: Tensor | None


def transfer(
    parcels: list[Parcel], mesh: ExpertMesh, group: dist.ProcessGroup, chunk_bytes: int, timeout: timedelta
) -> None:
    """Moves all parcels. Every rank calls this with the same list, contents aside.

    chunk_bytes: most bytes a rank has under way, in and out.

    Raises:
        RuntimeError: of the backend, when a peer is gone or `timeout` has passed.
    """
    for window in _windows(parcels, chunk_bytes):
        pending = []
        for parcel, start, stop in window:
            if parcel.content is None:
                continue
            piece = parcel.content.flatten().view(torch.uint8)[start:stop]
            if parcel.source == mesh.rank:
                pending.append(dist.P2POp(dist.isend, piece, mesh.members[parcel.target], group))
            else:
                pending.append(dist.P2POp(dist.irecv, piece, mesh.members[parcel.source], group))
        if pending:
            for work in dist.batch_isend_irecv(pending):
                work.wait(timeout)


def _windows(parcels: list[Parcel], chunk_bytes: int) -> Iterator[list[tuple[Parcel, int, int]]]:
    """Runs of (parcel, first byte, end) in which no rank has more than `chunk_bytes` under way."""
    window: list[tuple[Parcel, int, int]] = []
    busy: dict[int, int] = {}
    for parcel in parcels:
        for start in range(0, parcel.bytes, chunk_bytes):
            stop = min(start + chunk_bytes, parcel.bytes)
            size = stop - start
            if max(busy.get(parcel.source, 0), busy.get(parcel.target, 0)) + size > chunk_bytes:
                yield window
                window, busy = [], {}
            window.append((parcel, start, stop))
            for device in (parcel.source, parcel.target):
                busy[device] = busy.get(device, 0) + size
    if window:
        yield window
