"""Ranks make sure that they mean the same thing before any of them waits for the others."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from ...placement.errors import InputError
from .lost_ranks import naming_lost_ranks
from .mesh import ExpertMesh


def agree(mesh: ExpertMesh, what: str, content: str, failure: Exception | None = None) -> None:
    """Every rank of the mesh calls this with its own `content`; all return, or all raise.

    failure: why this rank cannot go on; it is raised here, after the others have been told.

    Raises:
        InputError: another rank gave other content, or cannot go on; both are named.
        RankError: a rank did not come.
    """
    mine = torch.zeros(33, dtype=torch.uint8)
    mine[0] = failure is not None
    mine[1:] = torch.frombuffer(bytearray(hashlib.sha256(content.encode()).digest()), dtype=torch.uint8)
    mine = mine.to(mesh.device)
    rows = gather(mesh, mine).cpu()
    if failure is not None:
        raise failure
    refused = [mesh.members[i] for i in range(mesh.size) if rows[i, 0]]
    if refused:
        raise InputError(f"{what}: rank {_names(refused)} refused it; see the error there")
    differ = [mesh.members[i] for i in range(mesh.size) if not torch.equal(rows[i, 1:], rows[mesh.rank, 1:])]
    if differ:
        raise InputError(
            f"{what}: rank {_names(differ)} has another one than rank {mesh.members[mesh.rank]}; give every rank the "
            "same, for instance by reading one file"
        )


def gather(mesh: ExpertMesh, value: Tensor) -> Tensor:
    """[G, ...] the values of all ranks, of one shape."""
    every = [torch.empty_like(value) for _ in range(mesh.size)]
    with naming_lost_ranks(mesh.group):
        dist.all_gather(every, value, group=mesh.group)
    return torch.stack(every)


def _names(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
