"""Count windows: what deployments' engines counted, each kept once however often it is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby

import numpy as np
import numpy.typing as npt
from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session, undefer

from ..placement.errors import InputError, NotFoundError, StoreError
from . import audit
from .database import Sessions, changed_rows
from .records import Actor, CountWindow, LoadArray, WindowRecord
from .references import deployment_row, storable
from .schema import DeploymentRow, JoinedRow, ModelRow, WindowRow

TEXT_LENGTH = 100
WIDTHS = (1, 2, 4, 8)
"""Bytes that a stored count may take."""
LARGEST = 1 << 53
"""Of one count: JSON readers keep whole numbers up to here exactly."""
MOST_PAIRS = 1 << 48
"""Of one window, over all layers and experts: those of as many windows as are kept by default have a sum in 64 bits."""
HALF = 1 << 32
EARLIEST, LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
"""Of a window's end: clocks that were never set are let in, moments that other time zones cannot express are not."""


def check_ended(ended: datetime) -> datetime:
    """The end of a window's span, where it can be one.

    Raises:
        InputError: before 1970 or after 2199.
    """
    if not EARLIEST <= ended < LATEST:
        raise InputError(f"{ended.isoformat()} is no time a window can have ended at; expected 1970 to 2199, in UTC")
    return ended


class Windows:
    """Threads and processes: as `Store`. Every method raises NotFoundError for a deployment that does not exist."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._shapes: dict[str, tuple[int, tuple[int, int]]] = {}

    def add(self, batches: Mapping[str, Sequence[CountWindow]]) -> dict[str, int]:
        """Keeps windows of several deployments in one transaction; returns how many of each were new.

        Raises:
            InputError: loads of another shape than the deployment's model, negative, or too large; nothing is stored.
        """
        return dict(zip(batches, self.add_each(tuple(batches.items())), strict=True))

    def add_each(self, batches: Sequence[tuple[str, Sequence[CountWindow]]]) -> list[int]:
        """The same for batches of which several may be one deployment's."""
        before = {name: self._shapes.get(name) for name, _ in batches}
        try:
            return self._add_each(batches)
        except (InputError, NotFoundError):
            # Another process may have removed a deployment, and made one of another model under its name.
            if len(batches) != 1 or any(self._asked(name) == known for name, known in before.items()):
                raise
            return self._add_each(batches)

    def _add_each(self, batches: Sequence[tuple[str, Sequence[CountWindow]]]) -> list[int]:
        by_identity: dict[tuple[int, str], dict[str, object]] = {}
        first: list[list[tuple[int, str]]] = []
        keyed: list[tuple[str, int]] = []
        for name, windows in batches:
            key, shape = self._known(name)
            keyed.append((name, key))
            entries = {(key, str(entry["digest"])): entry for entry in (_values(name, key, w, shape) for w in windows)}
            first.append([identity for identity in entries if identity not in by_identity])
            by_identity.update((identity, entries[identity]) for identity in first[-1])
        if not by_identity:
            return [0] * len(batches)
        # Packed before the writers' lock is taken, and told apart in one question for all.
        keys, digests = {key for key, _ in by_identity}, {digest for _, digest in by_identity}
        known = select(WindowRow.deployment_key, WindowRow.digest).where(
            WindowRow.deployment_key.in_(keys), WindowRow.digest.in_(digests)
        )
        joined = select(JoinedRow.deployment_key, JoinedRow.digest).where(
            JoinedRow.deployment_key.in_(keys), JoinedRow.digest.in_({bytes.fromhex(digest) for digest in digests})
        )
        with self._sessions.writing() as session:
            here = set(session.scalars(select(DeploymentRow.key).where(DeploymentRow.key.in_(keys))))
            for name, key in keyed:
                if key not in here:
                    raise NotFoundError(f"no deployment {name!r}: it was removed")
            stored = {(key, digest) for key, digest in session.execute(known)}
            stored |= {(key, digest.hex()) for key, digest in session.execute(joined)}
            fresh = [entry for identity, entry in by_identity.items() if identity not in stored]
            if fresh:
                session.execute(insert(WindowRow), fresh)
        return [sum(identity not in stored for identity in identities) for identities in first]

    def page(self, deployment: str, *, limit: int, after: int = 0, before: int | None = None) -> list[WindowRecord]:
        """Windows by key: the first `limit` behind `after`, or the last ones below `before`, oldest first."""
        with self._sessions.reading() as session:
            row = deployment_row(session, deployment)
            query = select(WindowRow).options(undefer(WindowRow.load)).where(WindowRow.deployment_key == row.key)
            if before is not None:
                query = query.where(WindowRow.key < before)
            if after:
                rows = session.scalars(query.where(WindowRow.key > after).order_by(WindowRow.key).limit(limit)).all()
            else:
                rows = session.scalars(query.order_by(WindowRow.key.desc()).limit(limit)).all()[::-1]
            shape = _shape(session, row)
            return [_record(window, shape) for window in rows]

    def shape(self, deployment: str) -> tuple[int, int]:
        """[layers, experts] of the deployment's windows."""
        return self._known(deployment)[1]

    def known_shape(self, deployment: str) -> tuple[int, int] | None:
        """The same without asking the database; None where that must be asked."""
        known = self._shapes.get(deployment)
        return None if known is None else known[1]

    def _known(self, deployment: str) -> tuple[int, tuple[int, int]]:
        """(key, shape) of a deployment: neither ever changes."""
        # Another thread may have it forgotten meanwhile.
        known = self._shapes.get(deployment)
        return self._asked(deployment) if known is None else known

    def _asked(self, deployment: str) -> tuple[int, tuple[int, int]]:
        with self._sessions.reading() as session:
            row = deployment_row(session, deployment)
            known = row.key, _shape(session, row)
        self._shapes[deployment] = known
        return known

    def totals(self, deployment: str) -> tuple[int, int]:
        """(windows received, token-expert pairs in them)."""
        with self._sessions.reading() as session:
            row = deployment_row(session, deployment)
            # In two halves: SQLite refuses sums of more than 63 bits.
            high, low = WindowRow.pairs // HALF, WindowRow.pairs % HALF
            query = select(func.sum(WindowRow.merged), func.sum(high), func.sum(low))
            merged, *halves = session.execute(query.where(WindowRow.deployment_key == row.key)).one()
            upper, lower = (int(half or 0) for half in halves)
            return int(merged or 0), upper * HALF + lower

    def remove(self, deployment: str, by: Actor, *, ended_before: datetime | None = None) -> int:
        """Removes windows, those that ended before a moment or all; returns how many rows. What is removed is not known
        any more: sent again, it counts again."""
        with self._sessions.writing() as session:
            row = deployment_row(session, deployment)
            old = WindowRow.deployment_key == row.key
            if ended_before is not None:
                # No window is outside of these, and databases cannot express every moment of every time zone.
                old &= WindowRow.ended < min(max(ended_before, EARLIEST), LATEST)
            count = changed_rows(session, delete(WindowRow).where(old))
            moment = None if ended_before is None else ended_before.isoformat()
            audit.note(session, by, "windows.remove", deployment, {"ended_before": moment, "windows": count})
        return count

    def forget(self, deployment: str) -> None:
        """Asks the database anew for a deployment's shape, as after it was removed."""
        self._shapes.pop(deployment, None)

    def renewed(self, deployment: str, shape: tuple[int, int]) -> bool:
        """Asks the database anew for a deployment's shape; whether it is another than this one. Raises NotFoundError
        where the deployment is gone."""
        self.forget(deployment)
        return self.shape(deployment) != shape

    def unchecked(self) -> dict[str, tuple[int, int]]:
        """For deployments with windows that no drift check has seen: how many, and the last window that one has."""
        query = (
            select(DeploymentRow.name, func.count(), DeploymentRow.checked_key)
            .join(WindowRow, WindowRow.deployment_key == DeploymentRow.key)
            .where(WindowRow.key > DeploymentRow.checked_key)
            .group_by(DeploymentRow.name, DeploymentRow.checked_key)
        )
        with self._sessions.reading() as session:
            return {name: (int(count), int(checked)) for name, count, checked in session.execute(query)}

    def compact(
        self, deployment: str, *, older_than: datetime, group: int, keep: int, spare: int = 0
    ) -> tuple[int, int]:
        """Joins runs of `group` old windows of one workload into one each, and drops all but the newest `keep`.

        The newest `spare` are never joined, whatever the clock says. What was joined stays known: sent again, it is not
        counted again; what was dropped does not. Returns how many rows were joined away and how many windows dropped.
        """
        joined = dropped = 0
        with self._sessions.writing() as session:
            row = deployment_row(session, deployment)
            keys = select(WindowRow.key).where(WindowRow.deployment_key == row.key).order_by(WindowRow.key.desc())
            limit = session.scalar(keys.offset(keep).limit(1))
            if limit is not None:
                old = (WindowRow.deployment_key == row.key) & (WindowRow.key <= limit)
                dropped = int(session.scalar(select(func.sum(WindowRow.merged)).where(old)) or 0)
                session.execute(delete(WindowRow).where(old))
            last = session.scalar(keys.offset(spare).limit(1))
            query = (
                select(WindowRow)
                .options(undefer(WindowRow.load))
                .where(WindowRow.deployment_key == row.key, WindowRow.key <= (last or 0))
                .where(WindowRow.received < older_than, WindowRow.merged == 1)
                .order_by(WindowRow.key)
                .limit(2048)
            )
            shape = _shape(session, row)
            for _, run in groupby(session.scalars(query).all(), key=lambda window: window.workload):
                windows = list(run)
                for start in range(0, len(windows) - group + 1, group):
                    joined += _join(session, windows[start : start + group], shape)
        return joined, dropped


def check_shape(deployment: str, load: LoadArray, shape: tuple[int, int]) -> None:
    """Raises InputError for a load of another shape than the deployment's windows have."""
    if load.shape != shape:
        known = f"deployment {deployment!r} has [layers, experts] = {list(shape)}"
        raise InputError(f"load: shape {list(load.shape)}, {known}")


def _values(name: str, key: int, window: CountWindow, shape: tuple[int, int]) -> dict[str, object]:
    load = np.ascontiguousarray(window.load, dtype=np.int64)
    check_shape(name, load, shape)
    if load.min() < 0 or load.max() > LARGEST:
        raise InputError(f"load: counts run from {load.min()} to {load.max()}, expected 0 to {LARGEST}")
    workload = storable("workload", window.workload, TEXT_LENGTH)
    # A sum of int64 wraps around silently.
    if (pairs := load.sum(dtype=np.float64)) > MOST_PAIRS:
        raise InputError(
            f"load: {pairs:.3g} token-expert pairs in one window, at most 2**48 are taken; send shorter ones"
        )
    ended = check_ended(window.ended).astimezone(UTC)
    identity = repr((storable("source", window.source, TEXT_LENGTH), workload, ended.isoformat()))
    # The same counts have the same narrow form, however wide they were sent.
    counts = narrow(load)
    digest = hashlib.sha256(identity.encode() + counts.tobytes()).hexdigest()
    return {
        "deployment_key": key,
        "digest": digest,
        "received": datetime.now(UTC),
        "ended": ended,
        "workload": workload,
        "pairs": int(load.sum()),
        "merged": 1,
        "load": pack(counts),
    }


def _join(session: Session, windows: Sequence[WindowRow], shape: tuple[int, int]) -> int:
    last = windows[-1]
    last.load = pack(narrow(sum((unpack(window.load, shape) for window in windows), np.zeros(shape, np.int64))))
    last.merged = sum(window.merged for window in windows)
    last.pairs = sum(window.pairs for window in windows)
    last.ended = max(window.ended for window in windows)
    away = windows[:-1]
    known = [
        {"deployment_key": last.deployment_key, "digest": bytes.fromhex(window.digest), "window_key": last.key}
        for window in away
    ]
    session.execute(insert(JoinedRow), known)
    for window in away:
        session.delete(window)
    return len(windows) - 1


def _record(row: WindowRow, shape: tuple[int, int]) -> WindowRecord:
    load = unpack(row.load, shape)
    return WindowRecord(row.key, row.ended, row.received, row.workload, row.pairs, row.merged, load)


def _shape(session: Session, row: DeploymentRow) -> tuple[int, int]:
    layers, experts = session.execute(
        select(ModelRow.layers, ModelRow.experts).where(ModelRow.key == row.model_key)
    ).one()
    return layers, experts


# Loads in few bytes: the narrowest integers that hold them, byte by byte of their places, compressed. High bytes of
# counts are nearly all alike: standing together they cost next to nothing.


def narrow(load: LoadArray) -> npt.NDArray[np.unsignedinteger]:
    """The same counts, none of them negative, as unsigned integers of 1, 2, 4 or 8 bytes, whichever is enough."""
    return load.astype(f"<u{_width(int(load.max(initial=0)))}")


def pack(counts: npt.NDArray[np.unsignedinteger]) -> bytes:
    """What `unpack` reads: the width of `narrow` counts as a digit, then their bytes."""
    import pyarrow as pa

    width = counts.dtype.itemsize
    places = np.ascontiguousarray(np.ascontiguousarray(counts).reshape(-1).view(np.uint8).reshape(-1, width).T)
    packed: bytes = pa.Codec("zstd", compression_level=1).compress(places).to_pybytes()
    return b"%d" % width + packed


def unpack(content: bytes, shape: tuple[int, int]) -> LoadArray:
    """Raises StoreError for what is damaged."""
    import pyarrow as pa

    try:
        width = WIDTHS[WIDTHS.index(int(content[:1]))]
        raw = pa.decompress(content[1:], decompressed_size=shape[0] * shape[1] * width, codec="zstd")
        places = np.frombuffer(raw, np.uint8).reshape(width, -1).T
        counts = np.ascontiguousarray(places).view(f"<u{width}").reshape(shape)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise StoreError(f"a count window was damaged after it was stored ({error}); restore a copy") from None
    return counts.astype(np.int64)


def _width(largest: int) -> int:
    return next(width for width in WIDTHS if largest < 1 << 8 * width)
