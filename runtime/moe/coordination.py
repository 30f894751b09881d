"""What ranks settle together: that they mean the same, that all of them go on or none, and which of them is gone."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.utils._python_dispatch import _disable_current_modes

from ...placement.errors import InputError, RankError
from .mesh import ExpertMesh

POLL = timedelta(milliseconds=5)
"""Between two looks at a decision that other ranks have yet to take."""

RESPONSE = timedelta(seconds=5)
"""How long the survivors of a failed collective wait for one another's sign of life."""


def check_consistent(mesh: ExpertMesh, what: str, content: str, failure: Exception | None = None) -> None:
    """Makes sure that all ranks mean the same before any of them waits for the others: all return, or all raise.

    Args:
        mesh: every rank of it, copies included, calls this.
        what: the content's name, for the error.
        content: this rank's own.
        failure: why this rank cannot go on; it is raised here, after the others have been told.

    Raises:
        InputError: another rank gave other content, or cannot go on; both are named.
        RankError: a rank did not come.
    """
    mine = torch.zeros(33, dtype=torch.uint8)
    mine[0] = failure is not None
    mine[1:] = torch.frombuffer(bytearray(hashlib.sha256(content.encode()).digest()), dtype=torch.uint8)
    mine = mine.to(mesh.device)
    row_of = dict(zip(mesh.grid.flatten().tolist(), _gather_everywhere(mesh, mine).cpu(), strict=True))
    if failure is not None:
        raise failure
    rows = {rank: (bool(row[0]), bytes(row[1:].tolist())) for rank, row in row_of.items()}
    _raise_different(what, mesh.members[mesh.rank], rows)


def check_consistent_over(
    groups: Sequence[dist.ProcessGroup], what: str, content: str, failure: Exception | None = None
) -> None:
    """As `check_consistent`, of ranks that are no mesh of experts.

    Args:
        groups: of this rank, one after another, the same on all ranks: one that has all of them, or one for each
            dimension in which they stand.
        what, content, failure: see there.

    Raises:
        InputError: another rank gave other content, or cannot go on; both are named.
        RankError: a rank did not come.
    """
    me = dist.get_rank()
    rows = {me: (failure is not None, hashlib.sha256(content.encode()).hexdigest())}
    for group in groups:
        every: list[dict[int, tuple[bool, str]]] = [{}] * dist.get_world_size(group)
        with naming_unresponsive_ranks(group):
            dist.all_gather_object(every, rows, group=group)
        for part in every:
            rows |= part
    if failure is not None:
        raise failure
    _raise_different(what, me, rows)


def _raise_different(what: str, me: int, rows: Mapping[int, tuple[bool, Any]]) -> None:
    """rows: of each rank, whether it refused, and a digest of what it has."""
    refused = sorted(rank for rank, (cannot, _) in rows.items() if cannot)
    if refused:
        raise InputError(f"{what}: rank {_names(refused)} refused it; see the error there")
    differ = sorted(rank for rank, (_, digest) in rows.items() if digest != rows[me][1])
    if differ:
        raise InputError(
            f"{what}: rank {_names(differ)} has another one than rank {me}; give every rank the same, for instance by "
            "reading one file"
        )


def gather(group: dist.ProcessGroup, value: Tensor) -> Tensor:
    """[ranks, ...] the values of all ranks of a group, of one shape."""
    every = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    with naming_unresponsive_ranks(group):
        dist.all_gather(every, value, group=group)
    return torch.stack(every)


def _gather_everywhere(mesh: ExpertMesh, value: Tensor) -> Tensor:
    """[copies * devices, ...] in the order of the mesh's grid."""
    rows = gather(mesh.group, value)
    return rows if mesh.data is None else gather(mesh.data, rows).flatten(0, 1)


def sum_everywhere(mesh: ExpertMesh, value: Tensor) -> Tensor:
    """`value`, in place, summed over all ranks of the mesh, copies included."""
    for group in (mesh.group, mesh.data):
        if group is not None:
            with naming_unresponsive_ranks(group):
                dist.all_reduce(value, group=group)
    return value


def wait_everywhere(mesh: ExpertMesh) -> None:
    """Returns once all ranks of the mesh, copies included, have called it."""
    sum_everywhere(mesh, torch.zeros(1, device=mesh.device))


def _names(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")


class TwoPhaseCommit:
    """All ranks of a mesh, copies included, go on or none does, whoever dies meanwhile: one decision, in the process
    group's store.

    A rank that is ready says so; the last of all writes "commit". A rank that fails, or has waited too long, writes
    "abort". The store takes the first of these writes and refuses the rest, so there is one outcome, also for ranks
    that were waiting when another died. The store must live: torchrun keeps it outside the ranks.

    name: one for every decision, the same on all ranks.
    """

    def __init__(self, mesh: ExpertMesh, name: str) -> None:
        self._rank, self._ranks = mesh.members[mesh.rank], sorted(mesh.grid.flatten().tolist())
        self._store: Store = PrefixStore(f"moeplace/commit/{name}", _get_default_store())

    def abort(self, reason: str) -> str:
        """This rank cannot go on. Gives the reason that the ranks were first told."""
        try:
            self._decide(f"abort rank {self._rank}: {reason}")
            return self._store.get("decision").decode().removeprefix("abort ")
        except (dist.DistError, RuntimeError):
            return f"{reason}; the store of the process group is gone, with rank 0 or its launcher"

    @property
    def decided(self) -> bool:
        return bool(self._store.check(["decision"]))

    def ready(self, timeout: timedelta) -> None:
        """This rank has everything; returns when all ranks have.

        Raises:
            RankError: a rank failed or did not come within `timeout`; then no rank returns from its `ready`.
        """
        try:
            self._store.set(f"ready/{self._rank}", "")
            if self._store.add("count", 1) == len(self._ranks):
                self._decide("commit")
            end = time.monotonic() + timeout.total_seconds()
            while not self.decided:
                if time.monotonic() > end:
                    self._decide(f"abort rank {self._missing()} did not come within {timeout.total_seconds():g} s")
                time.sleep(POLL.total_seconds())
            outcome = self._store.get("decision").decode()
        except (dist.DistError, RuntimeError) as error:
            raise RankError(f"the store of the process group is gone, with rank 0 or its launcher ({error})") from error
        if outcome != "commit":
            raise RankError(outcome.removeprefix("abort "))

    def _decide(self, outcome: str) -> None:
        self._store.compare_set("decision", "", outcome[:2000])

    def _missing(self) -> str:
        return ", ".join(str(rank) for rank in self._ranks if not self._store.check([f"ready/{rank}"]))


_failures: Counter[str] = Counter()


@contextlib.contextmanager
def naming_unresponsive_ranks(group: dist.ProcessGroup) -> Iterator[None]:
    """Turns a failure of the backend inside the block into a RankError that names the ranks that do not answer.

    A backend says which socket broke, not which rank; and ranks that only waited for a survivor break as well. So each
    survivor signs in the store, and those who do not sign are the ones that are gone.

    What watches torch's operations (selective checkpointing) does not see the block: a collective that it repeats from
    what it keeps would leave a new buffer as it is.

    Raises:
        RankError: a collective in the block failed or ran past the group's timeout.
    """
    try:
        with _disable_current_modes():
            yield
    except RankError:
        raise
    except (dist.DistError, RuntimeError) as error:
        raise RankError(describe(group, error)) from error


def describe(group: dist.ProcessGroup, error: BaseException) -> str:
    """One sentence: who of `group` gave no sign of life within five seconds of the failure."""
    said = " ".join(str(error).split())[:200]
    silent = unresponsive_ranks(dist.get_process_group_ranks(group), "collective")
    if silent is None:
        return f"a collective failed and the store of the process group is gone with rank 0 or its launcher ({said})"
    if not silent:
        return f"a collective failed though every rank still answers ({said})"
    names = ", ".join(str(rank) for rank in silent)
    return f"rank {names} did not answer within {RESPONSE.seconds} s of a failed collective: it died or hangs ({said})"


def unresponsive_ranks(ranks: Sequence[int], occasion: str) -> list[int] | None:
    """Those of `ranks` that do not sign in; None when the store itself is gone.

    A rank is in several groups, and a failure goes from one to the next: who failed in any of them has signed for all.
    """
    _failures[occasion] += 1
    try:
        store = PrefixStore(f"moeplace/lost/{occasion}/{_failures[occasion]}", _get_default_store())
        store.set(str(dist.get_rank()), "here")
    except (dist.DistError, RuntimeError):
        return None
    silent = []
    patience = RESPONSE
    for rank in ranks:
        try:
            store.wait([str(rank)], patience)
        except (dist.DistError, RuntimeError):
            silent.append(rank)
            patience = timedelta(milliseconds=100)  # all had the same time to sign
    return silent
