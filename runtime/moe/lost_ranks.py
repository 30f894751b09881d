"""When a collective fails: which rank is gone."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ...placement.errors import RankError

ANSWER = timedelta(seconds=5)
"""How long the survivors of a failed collective wait for one another's sign of life."""

_failures: Counter[str] = Counter()


@contextlib.contextmanager
def naming_lost_ranks(group: dist.ProcessGroup) -> Iterator[None]:
    """Turns a failure of the backend inside the block into a RankError that names the ranks that do not answer.

    A backend says which socket broke, not which rank; and ranks that only waited for a survivor break as well. So each
    survivor signs in the store, and those who do not sign are the ones that are gone.

    Raises:
        RankError: a collective in the block failed or ran past the group's timeout.
    """
    try:
        yield
    except RankError:
        raise
    except (dist.DistError, RuntimeError) as error:
        raise RankError(describe(group, error)) from error


def describe(group: dist.ProcessGroup, error: BaseException) -> str:
    """One sentence: who of `group` gave no sign of life within five seconds of the failure."""
    said = " ".join(str(error).split())[:200]
    silent = silent_ranks(group)
    if silent is None:
        return f"a collective failed and the store of the process group is gone with rank 0 or its launcher ({said})"
    if not silent:
        return f"a collective failed though every rank still answers ({said})"
    names = ", ".join(str(rank) for rank in silent)
    return f"rank {names} did not answer within {ANSWER.seconds} s of a failed collective: it died or hangs ({said})"


def silent_ranks(group: dist.ProcessGroup) -> list[int] | None:
    """Global ranks of `group` that do not sign in; None when the store itself is gone."""
    name = group.group_name
    _failures[name] += 1
    members = dist.get_process_group_ranks(group)
    try:
        store = PrefixStore(f"moeplace/lost/{name}/{_failures[name]}", _get_default_store())
        store.set(str(dist.get_rank()), "here")
    except (dist.DistError, RuntimeError):
        return None
    silent = []
    patience = ANSWER
    for rank in members:
        try:
            store.wait([str(rank)], patience)
        except (dist.DistError, RuntimeError):
            silent.append(rank)
            patience = timedelta(milliseconds=100)  # all had the same time to sign
    return silent
