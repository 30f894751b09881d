"""Files on their way in: taken in pieces, resumed where they stopped, one a content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from ..placement.errors import ConflictError, InputError
from . import audit
from .database import Sessions
from .records import Actor, UploadRecord
from .references import numbered_row, sha256_digits, storable
from .schema import UploadPartRow, UploadRow

UPLOAD_LIMIT = 1 << 28
PIECE_LIMIT = 8 << 20
"""Bytes taken at once: other writers wait while they are written."""


class Uploads:
    """Threads and processes: as `Store`.

    Every method that is given a key raises NotFoundError where there is no such upload.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def begin(self, kind: str, owner: str, sha256: str, total_bytes: int) -> UploadRecord:
        """The upload of this content: a new one, or the one that was begun or finished before.

        kind: what it is. owner: whose (a deployment), empty for nobody's.

        Raises:
            InputError: not a SHA-256, or not 1 byte to 256 MiB.
        """
        if not sha256 or not sha256_digits("sha256", sha256):
            raise InputError("sha256 is empty; give the SHA-256 of the file, 64 hexadecimal digits")
        if not 0 < total_bytes <= UPLOAD_LIMIT:
            raise InputError(f"total_bytes ({total_bytes:,}) must be 1 to {UPLOAD_LIMIT:,}; send several files")
        with self._sessions.writing() as session:
            same = (
                UploadRow.kind == kind,
                UploadRow.owner == storable("owner", owner, 100),
                UploadRow.sha256 == sha256,
            )
            row = session.scalar(select(UploadRow).where(*same))
            if row is not None and row.state == "refused":
                session.delete(row)
                session.flush()
                row = None
            if row is None:
                row = UploadRow(
                    kind=kind,
                    owner=owner,
                    sha256=sha256,
                    total_bytes=total_bytes,
                    received_bytes=0,
                    state="open",
                    created=datetime.now(UTC),
                )
                session.add(row)
                session.flush()
            elif row.total_bytes != total_bytes:
                raise InputError(f"total_bytes is {total_bytes:,}, this content was announced with {row.total_bytes:,}")
            return UploadRecord.model_validate(row)

    def get(self, key: int) -> UploadRecord:
        with self._sessions.reading() as session:
            return UploadRecord.model_validate(numbered_row(session, UploadRow, "upload", key))

    def append(self, key: int, start: int, piece: bytes) -> UploadRecord:
        """Adds the next piece. start: how many bytes came before it.

        Raises:
            ConflictError: not the next piece; the message says where to go on. InputError: too large a piece.
        """
        if not 0 < len(piece) <= PIECE_LIMIT:
            raise InputError(f"a piece of {len(piece):,} bytes; send 1 to {PIECE_LIMIT:,} at once")
        with self._sessions.writing() as session:
            row = numbered_row(session, UploadRow, "upload", key)
            if row.state != "open" or start != row.received_bytes:
                raise ConflictError(f"upload {key} is {row.state} with {row.received_bytes} bytes; go on from there")
            if start + len(piece) > row.total_bytes:
                raise InputError(f"a piece of {len(piece):,} bytes exceeds the {row.total_bytes:,} announced")
            session.execute(insert(UploadPartRow), {"upload_key": key, "start": start, "content": piece})
            row.received_bytes = start + len(piece)
            return UploadRecord.model_validate(row)

    def finish(
        self,
        key: int,
        inspect: Callable[[bytes], Mapping[str, Any]],
        move: Callable[[str, bytes], str] | None = None,
        by: Actor | None = None,
    ) -> UploadRecord:
        """Checks the whole content, once all is here. inspect: says what it is, or raises InputError. move: keeps the
        content elsewhere under a name, and says where; otherwise it stays here. by: for the audit log.

        Raises:
            ConflictError: bytes are missing. InputError: another SHA-256 than announced, or what `inspect` raises; the
                upload is refused then and its bytes are dropped.
        """
        with self._sessions.reading() as session:
            row = numbered_row(session, UploadRow, "upload", key)
            if row.state == "complete":
                return UploadRecord.model_validate(row)
            if row.state != "open" or row.received_bytes != row.total_bytes:
                raise ConflictError(
                    f"upload {key} is {row.state} with {row.received_bytes:,} of {row.total_bytes:,} bytes"
                )
            content = _content(session, key)
        # Outside of any transaction: reading a large file takes a while.
        try:
            if hashlib.sha256(content).hexdigest() != row.sha256:
                raise InputError(f"upload {key}: the bytes received have another SHA-256 than announced; begin again")
            about = dict(inspect(content))
        except InputError:
            self._close(key, "refused", None)
            raise
        # When this process dies before the next line, the same is moved to the same place again.
        place = None if move is None else move(f"{key:08}-{row.sha256}", content)
        return self._close(key, "complete", about, place, by)

    def content(self, key: int) -> bytes:
        """All bytes of a complete upload that is kept here.

        Raises:
            ConflictError: it is not complete, or kept elsewhere.
        """
        with self._sessions.reading() as session:
            row = numbered_row(session, UploadRow, "upload", key)
            if row.state != "complete":
                raise ConflictError(f"upload {key} is {row.state}, not complete")
            if row.place is not None:
                raise ConflictError(f"upload {key} is kept outside the database")
            return _content(session, key)

    def place(self, key: int) -> str | None:
        """Where a complete upload is kept, None when here."""
        with self._sessions.reading() as session:
            return numbered_row(session, UploadRow, "upload", key).place

    def complete(self, kind: str, owner: str, *, limit: int) -> list[UploadRecord]:
        """The newest complete ones, newest first."""
        query = (
            select(UploadRow)
            .where(UploadRow.kind == kind, UploadRow.owner == owner, UploadRow.state == "complete")
            .order_by(UploadRow.key.desc())
            .limit(limit)
        )
        with self._sessions.reading() as session:
            return [UploadRecord.model_validate(row) for row in session.scalars(query)]

    def drop(self, *, kind: str, owner: str, keep: int, begun_before: datetime) -> tuple[int, list[str]]:
        """Removes all but the newest `keep` complete ones, and those begun long ago and never finished.

        Returns how many, and the places of those that were kept elsewhere, for the caller to empty.
        """
        with self._sessions.writing() as session:
            mine = (UploadRow.kind == kind, UploadRow.owner == owner)
            complete = select(UploadRow.key).where(*mine, UploadRow.state == "complete").order_by(UploadRow.key.desc())
            old = list(session.scalars(complete.offset(keep)))
            stale = select(UploadRow.key).where(*mine, UploadRow.state != "complete", UploadRow.created < begun_before)
            gone = [*old, *session.scalars(stale)]
            places = session.scalars(
                select(UploadRow.place).where(UploadRow.key.in_(gone), UploadRow.place.is_not(None))
            )
            emptied = [place for place in places if place is not None]
            session.execute(delete(UploadPartRow).where(UploadPartRow.upload_key.in_(gone)))
            session.execute(delete(UploadRow).where(UploadRow.key.in_(gone)))
            return len(gone), emptied

    def _close(
        self,
        key: int,
        state: str,
        about: Mapping[str, Any] | None,
        place: str | None = None,
        by: Actor | None = None,
    ) -> UploadRecord:
        with self._sessions.writing() as session:
            row = numbered_row(session, UploadRow, "upload", key)
            if row.state == "open":
                row.state, row.about, row.place = state, about, place
                if by is not None:
                    detail = {"upload": key, "kind": row.kind, "bytes": row.total_bytes, "sha256": row.sha256}
                    audit.note(session, by, "upload.finish", row.owner or row.kind, detail)
                if state == "refused" or place is not None:
                    session.execute(delete(UploadPartRow).where(UploadPartRow.upload_key == key))
            return UploadRecord.model_validate(row)


def _content(session: Session, key: int) -> bytes:
    parts = select(UploadPartRow.content).where(UploadPartRow.upload_key == key).order_by(UploadPartRow.start)
    return b"".join(session.scalars(parts.execution_options(yield_per=1)))
