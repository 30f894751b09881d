"""What readers of engines' records share: layers that never counted are dropped, statistics come from what is left; and
what a caller should hear of: ranks summed, tokens left out, experts set apart."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...placement.errors import FileFormatError, InputError
from ...placement.statistics import RoutingStatistics
from ...placement.trace import RoutingTrace

_HEARD: ContextVar[list[str] | None] = ContextVar("heard", default=None)


def remark(message: str) -> None:
    """Says it to whoever listens by `remarks`, or as a warning."""
    heard = _HEARD.get()
    if heard is None:
        warnings.warn(message, UserWarning, stacklevel=3)
    elif message not in heard:
        heard.append(message)


@contextlib.contextmanager
def remarks() -> Iterator[list[str]]:
    """The remarks made inside the block."""
    heard: list[str] = []
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)


LEAST_SHARED_TOKENS = 64
"""In each layer of each window, before an expert that counts all of them is taken for a shared one."""


def statistics_of(
    source: Path, load: Iterable[npt.NDArray[Any]], layers: Sequence[int], top_k: int | None = None
) -> RoutingStatistics:
    """Statistics of windows of [L, E] counts, without the windows and the layers in which nothing was counted.

    layers: absolute indices of the L layers. A dense layer counts nothing, and is how engines number the layers after
    it.
    Memory: the counts once more, in float64; each window is let go once it is copied, where the caller lets it go.

    Raises:
        FileFormatError: negative or non-finite counts, or nothing counted at all.
    """
    used = np.zeros(len(layers), np.bool_)
    windows: list[npt.NDArray[Any]] = []
    for window, counts in enumerate(load):
        # Of NaN, every comparison is false.
        if not (counts.min() >= 0 and counts.max() < np.inf):
            layer, expert = (int(i) for i in np.argwhere(~((counts >= 0) & (counts < np.inf)))[0])
            raise FileFormatError(
                f"{source}: window {window}, layer {layers[layer]}, expert {expert} counts {counts[layer, expert]} "
                "tokens; counts start at 0"
            )
        counted = counts.any(axis=1)
        if counted.any():
            used |= counted
            windows.append(counts)
    if not windows:
        raise FileFormatError(f"{source}: every count is 0; record while the engine serves requests")
    load_WLE = np.empty((len(windows), int(used.sum()), windows[0].shape[1]), np.float64)
    windows.reverse()
    for row in load_WLE:
        counts = windows.pop()
        row[:] = counts if used.all() else counts[used]
    shared, implied_top_k = _shared_in_counts(load_WLE)
    if shared and top_k in (None, implied_top_k):
        experts = load_WLE.shape[2] - shared
        if implied_top_k == 1 and top_k is None:
            remark(
                f"{source}: the last column adds up all others, as a total does, or a shared expert beside a single "
                f"one a token (top-1): set apart, {experts} experts are left"
            )
        else:
            remark(set_apart(source, shared, experts))
            top_k = implied_top_k
        load_WLE = np.ascontiguousarray(load_WLE[:, :, :-shared])
    # Not writable, so that it is taken as it is.
    load_WLE.flags.writeable = False
    names = [layer for layer, counted in zip(layers, used, strict=True) if counted]
    try:
        return RoutingStatistics.from_counts(load_WLE, moe_layers=names, top_k=top_k)
    except InputError as error:
        raise FileFormatError(f"{source}: {error}") from None


RANK_IN_NAME = re.compile(
    r"(?<![a-z0-9])(?:rank|dp|ep|tp|gpu|npu|device|worker|process|proc|node|host)[_-]?(\d{1,6})(?!\d)", re.IGNORECASE
)
ENDS_IN_RANK = re.compile(r"^(expert_distribution_recorder_\d+\.\d+)_(\d{1,6})$")


@dataclass(frozen=True, eq=False)
class RankCounts:
    """Counts [W, L, E] of one file, or of one array called `name` in it. rank: who counted, where the file says so."""

    file: Path
    rank: int | None
    counts: npt.NDArray[Any]
    name: str = ""

    @property
    def called(self) -> str:
        """For people."""
        return f"{self.name} of {self.file.name}" if self.name else self.file.name

    @property
    def group(self) -> tuple[str, int | None]:
        """(name without the rank, rank) as file and array are called; the rank is None where the name has none, and
        one number where it has several (dp1_ep0)."""
        called = f"{self.file.stem}/{self.name}" if self.name else self.file.stem
        ending = ENDS_IN_RANK.fullmatch(called)
        if ending:
            return ending[1], int(ending[2])
        ranks = RANK_IN_NAME.findall(called)
        return RANK_IN_NAME.sub("", called), int("".join(rank.zfill(6) for rank in ranks)) if ranks else None


def sum_ranks(parts: Sequence[RankCounts]) -> list[npt.NDArray[Any]]:
    """Counts [W, L, E] in order of the files, those of ranks that counted the same windows summed.

    Ranks are told by the files' names (alike but for a rank), by ranks that the files name, and by experts that no two
    files count, which parts of one window have and windows do not. What was summed is remarked, and which ranks are not
    there. Files of
    ranks that are equal hold what was summed already, and count once.

    Raises:
        FileFormatError: ranks wrote different numbers of files.
    """
    _tell_missing(parts)
    once: dict[tuple[object, ...], RankCounts] = {}
    for number, part in enumerate(parts):
        named = part.rank is not None or part.group[1] is not None
        once.setdefault((part.counts.shape, part.counts.tobytes()) if named else (number,), part)
    parts = list(once.values())
    groups: dict[tuple[object, ...], list[RankCounts]] = {}
    written = Counter(part.rank for part in parts)
    by_rank = None not in written and len(written) > 1
    if by_rank and len(set(written.values())) > 1:
        raise FileFormatError(
            f"{parts[0].file.parent}: ranks wrote different numbers of files "
            f"({', '.join(f'rank {rank}: {count}' for rank, count in sorted(written.items(), key=str))}), so that it "
            "cannot be told which belong to one window; keep the files of one dump in a folder"
        )
    seen: Counter[int | None] = Counter()
    for number, part in enumerate(parts):
        name, rank = part.group
        key: tuple[object, ...] = ("name", name) if rank is not None else ("file", number)
        groups.setdefault((("dump", seen[part.rank]) if by_rank else key) + part.counts.shape, []).append(part)
        seen[part.rank] += 1
    if len(groups) == len(parts) > 1 and _is_disjoint(parts):
        groups = {("disjoint",): list(parts)}
    result = []
    for members in groups.values():
        if len(members) > 1:
            names = ", ".join(part.called for part in members[:3]) + (", ..." if len(members) > 3 else "")
            what = "arrays" if members[0].name else "files"
            remark(f"{len(members)} {what} hold what ranks counted of the same windows, and were summed: {names}")
        total = members[0].counts
        for part in members[1:]:
            total = total + part.counts
        result.append(total)
    return result


MOST_RANKS = 65_536
"""More than any cluster has; a rank of two numbers (dp1_ep0) is beyond."""


def _tell_missing(parts: Sequence[RankCounts]) -> None:
    """Remarks ranks that no file is of, by their numbers or as another window has them: their tokens are missing."""
    present: dict[str, set[int]] = {}
    for part in parts:
        name, rank = part.group
        if rank is not None:
            present.setdefault(name, set()).add(rank)
    ranks = set().union(*present.values())
    if len(ranks) < 2:
        return
    if max(ranks) < MOST_RANKS:
        ranks |= set(range(max(ranks)))
    for name, some in present.items():
        missing = sorted(ranks - some)
        if missing:
            remark(
                f"{parts[0].file.parent}: no counts of rank{'s' * (len(missing) > 1)} "
                f"{', '.join(map(str, missing[:6]))}{', ...' if len(missing) > 6 else ''} among those of "
                f"{name.strip('_-./') or 'other ranks'}: what was counted there is missing"
            )
            return


def _is_disjoint(parts: Sequence[RankCounts]) -> bool:
    """Whether no expert of a layer is counted in two of the files, each of which counts some."""
    if len({part.counts.shape for part in parts}) > 1:
        return False
    counted = np.stack([part.counts.any(axis=0) for part in parts])
    return bool(counted.any(axis=(1, 2)).all() and (counted.sum(axis=0) <= 1).all())


def trace_of(
    source: str | Path, columns: dict[str, Any], experts: int, layers: Iterable[int], through: str = ""
) -> RoutingTrace:
    """A trace of columns, "ids" [T, L, k] and others as `RoutingTrace.from_arrays` takes them.

    layers: absolute indices of the L layers. through: what else may be wrong than the ids, for the error.

    Raises:
        FileFormatError: they do not fit together.
    """
    ids = columns.pop("ids")
    try:
        return RoutingTrace.from_arrays(
            ids, num_experts=experts, moe_layers=[int(layer) for layer in layers], **columns
        )
    except InputError as error:
        raise FileFormatError(f"{source}: {error}{through}") from None


def left_out(partial: int, total: int) -> str:
    """What is said of tokens that have fewer than k experts somewhere."""
    return f"{partial:,} of {total:,} tokens have fewer than k experts in some layer, and are left out"


def set_apart(source: str | Path, shared: int, experts: int) -> str:
    """What is said of shared experts among routed ones."""
    named = f"{experts}" if shared == 1 else f"{experts} to {experts + shared - 1}"
    return (
        f"{source}: experts {named} are taken by every token: shared experts that the engine fused with the {experts} "
        "routed ones, set apart here"
    )


def without_shared(ids: npt.NDArray[Any], experts: int, shared: int) -> npt.NDArray[Any]:
    """[T, L, K - shared] ids below `experts`, in their order; a row without shared ones gives up its last."""
    last = np.argsort(ids >= experts, axis=2, kind="stable")[:, :, : ids.shape[2] - shared]
    return np.take_along_axis(ids, last, axis=2)


def _shared_in_counts(load: npt.NDArray[np.float64]) -> tuple[int, int]:
    """(shared experts at the end of loads [W, L, E], k), or (0, 0): each counts every token, so that in every layer of
    every window the others together count k times as many, k a whole number far below their number."""
    busy = load.reshape(-1, load.shape[2])
    busy = busy[busy.any(axis=1)]
    tokens = busy[:, -1]
    if len(busy) < 2 or tokens.min() < LEAST_SHARED_TOKENS:
        return 0, 0
    shared = 1
    while shared < 4 and shared + 1 < load.shape[2] and (busy[:, -1 - shared] == tokens).all():
        shared += 1
    ratio = busy[:, :-shared].sum(axis=1) / tokens
    top_k = round(float(ratio[0]))
    routed = load.shape[2] - shared
    if (ratio != top_k).any() or not 1 <= top_k <= routed // 2 or (busy[:, :-shared].max(axis=1) >= tokens).all():
        return 0, 0
    return shared, top_k


def whole_number(source: Path, field: str, value: object, least: int = 0, most: int = (1 << 62)) -> int:
    """The value, when it is a whole number in the range.

    Raises:
        FileFormatError: it is not; file and field are named.
    """
    if type(value) is not int or not least <= value <= most:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        raise FileFormatError(f"{source}: {field} is {shown}, expected a whole number from {least} to {most}")
    return value
