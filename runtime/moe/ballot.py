"""All ranks or none: a decision that every rank that lives reads the same, whoever dies while it is taken."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from ...placement.errors import RankError
from .mesh import ExpertMesh

POLL = timedelta(milliseconds=5)


class Ballot:
    """One decision of a mesh's ranks, kept in the process group's store.

    A rank that is ready says so; the last of all writes "commit". A rank that fails, or has waited too long, writes
    "abort". The store takes the first of these writes and refuses the rest, so there is one outcome, also for ranks
    that were waiting when another died. The store must live: torchrun keeps it outside the ranks.
    """

    def __init__(self, mesh: ExpertMesh, name: str) -> None:
        self._mesh = mesh
        self._store: Store = PrefixStore(f"moeplace/ballot/{name}", _get_default_store())

    def abort(self, reason: str) -> str:
        """This rank cannot go on. Gives the reason that the ranks were first told."""
        try:
            self._decide(f"abort rank {self._mesh.members[self._mesh.rank]}: {reason}")
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
            self._store.set(f"ready/{self._mesh.rank}", "")
            if self._store.add("count", 1) == self._mesh.size:
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
        late = [i for i in range(self._mesh.size) if not self._store.check([f"ready/{i}"])]
        return ", ".join(str(self._mesh.members[i]) for i in late)
