"""Trace shards outside the database: a folder here, or anything fsspec opens (S3 and its like).

Names are made here, of an upload's number and SHA-256. A shard is whole or not there: object stores show what was sent
only when all of it was; elsewhere it is renamed into place. What is read is compared with its SHA-256, wherever it came
from.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import secrets
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from ..db.records import UploadRecord
from ..db.store import Store
from ..placement.errors import InputError, StoreError, UnsupportedError

WHOLE_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "obs", "memory"})
"""Protocols whose objects appear whole, and where renaming would be a copy."""


class Shards:
    """A place for shards, by its address. Threads and processes: any."""

    def __init__(self, url: str) -> None:
        """Raises InputError for an address that cannot be one, UnsupportedError where a library for it is missing."""
        if importlib.util.find_spec("fsspec") is None:
            raise UnsupportedError("traces outside the database need fsspec; pip install 'moeplace[traces]'")
        if urlsplit(url).password is not None:
            raise InputError(
                "traces: a password in the address would be stored with it; use the environment, or fsspec's settings"
            )
        self.url = url.rstrip("/")
        with _told(url):
            system, path = _opened(self.url)
            # A relative path would mean another folder to another process.
            self.url = system.unstrip_protocol(path)

    def check(self) -> None:
        """Writes, reads and removes a trial shard.

        Raises:
            StoreError: it cannot be written or read back.
        """
        content = secrets.token_bytes(32)
        place = self.put(f"trial-{secrets.token_hex(8)}", content)
        if read(place) != content:
            raise StoreError(f"traces at {self.url}: what was written is read back otherwise")
        remove([place])

    def put(self, name: str, content: bytes) -> str:
        """Keeps a shard; the same again changes nothing. Returns its address.

        Raises:
            StoreError: it could not be written; nothing is left of it.
        """
        place = f"{self.url}/{name}.parquet"
        with _told(place):
            system, path = _opened(place)
            system.makedirs(system._parent(path), exist_ok=True)
            if _protocol(system) in WHOLE_OBJECTS:
                system.pipe_file(path, content)
            else:
                scratch = f"{path}.{secrets.token_hex(8)}.part"
                try:
                    system.pipe_file(scratch, content)
                    system.mv(scratch, path)
                except BaseException:
                    with contextlib.suppress(Exception):
                        system.rm_file(scratch)
                    raise
        return place


def content_of(store: Store, upload: UploadRecord) -> bytes:
    """All bytes of a complete upload, wherever they are.

    Raises:
        StoreError: they cannot be read, or are not what was stored.
    """
    place = store.uploads.place(upload.key)
    if place is None:
        return store.uploads.content(upload.key)
    content = read(place)
    if hashlib.sha256(content).hexdigest() != upload.sha256:
        raise StoreError(f"{place}: changed or damaged after it was stored; restore a copy")
    return content


def read(place: str) -> bytes:
    """A shard's bytes, not checked."""
    with _told(place):
        system, path = _opened(place)
        content: bytes = system.cat_file(path)
    return content


def remove(places: Sequence[str]) -> None:
    """Removes shards that are still there.

    Raises:
        StoreError: one cannot be removed; those before it are.
    """
    for place in places:
        with _told(place):
            system, path = _opened(place)
            with contextlib.suppress(FileNotFoundError):
                system.rm_file(path)


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise UnsupportedError(f"traces at {url!r}: {error}") from None
    return system, str(path)


def _protocol(system: Any) -> str:
    protocol = system.protocol
    return str(protocol if isinstance(protocol, str) else protocol[0])


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Every way in which storage fails, said as this project does."""
    try:
        yield
    except (StoreError, InputError, UnsupportedError):
        raise
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(f"traces at {url}: {message[:500]}") from error
