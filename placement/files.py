"""Files, written whole or not at all; JSON and YAML that nobody vouches for: no name twice in a mapping, and bounds for
depth and what aliases stand for.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import FileFormatError, InputError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or a user's part of it, that has no space left."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it over `path` when the block ends without an error.

    A reader never sees a half-written file: a crash, a full disk or a kill leaves the old file, or none. Missing
    folders are made, and taken away again when the block fails.

    Raises:
        InputError: `path` is a folder, or something else that is no file. OSError: it cannot be written; of a full
            disk it says what to do.
    """
    target = Path(path)
    _check_replaceable(target)
    scratch = _scratch(target)
    with full_disk_told(target), folder_made(target.parent):
        try:
            yield scratch
            with scratch.open("rb") as handle:
                os.fsync(handle.fileno())
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_told(target: Path) -> Iterator[None]:
    """Says of a disk that is full what was to be written there, and what to do.

    Raises:
        OSError: the block's.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        message = "the disk is full; free some space, or name a place on another. Nothing was written there"
        raise OSError(error.errno, message, str(target)) from error


@contextlib.contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """A folder, made with those above it where they are not there; what was made goes again, as far as it is empty,
    when the block fails."""
    missing = missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        remove_empty(missing)
        raise


def missing_folders(folder: Path) -> list[Path]:
    """The folder and those above it that are not there, the deepest first."""
    return list(itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents)))


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, the deepest first, until one is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def check_output_file(path: str | Path) -> Path:
    """Whether `replacing` could write a file there, its folder being there; nothing stays behind. `~` is expanded.

    For whoever works long before there is anything to write.

    Raises:
        InputError: it could not; what to do is said.
    """
    target = expanded(path)
    _check_replaceable(target)
    folder = target.parent
    if not folder.exists():
        raise InputError(f"{target}: there is no folder {folder}; make it first (mkdir -p {folder})")
    if not folder.is_dir():
        raise InputError(f"{target}: {folder} is a file, not a folder")
    _try_writing(_scratch(target))
    return target


def check_output_folder(path: str | Path) -> Path:
    """Whether files could be written into a folder, made with those above it where it is not there. `~` is expanded.

    Raises:
        InputError: they could not; what to do is said.
    """
    target = expanded(path)
    above = next(folder for folder in (target, *target.absolute().parents) if _exists(folder))
    if not above.is_dir():
        raise InputError(f"{target}: {above} is a file, not a folder")
    _try_writing(_scratch(above / "plan.json"))
    return target


def expanded(path: str | Path) -> Path:
    """The path with `~` as a shell expands it.

    Raises:
        InputError: an empty path, one with a NUL, or a user who is not known.
    """
    if not str(path):
        raise InputError("a path is empty; name a file or a folder")
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} is no path: it holds a NUL character")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: the home folder is not known; write the path in full") from None


def _check_replaceable(target: Path) -> None:
    if not target.name or (_exists(target) and target.is_dir()):
        raise InputError(f"{target} is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise InputError(f"{target} is no file: what is written takes the place of a file")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise InputError(f"{path} cannot be written to: {error.strerror}") from None


def _scratch(target: Path) -> Path:
    # Names have at most 255 bytes.
    name = os.fsdecode(os.fsencode(target.name)[:200])
    return target.with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _try_writing(scratch: Path) -> None:
    try:
        scratch.touch(exist_ok=False)
        scratch.unlink()
    except OSError as error:
        raise InputError(f"{scratch.parent} cannot be written to: {error.strerror}") from None


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path` whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` whole or not at all."""
    write_bytes(path, text.encode())


def no_file(path: str | Path) -> InputError:
    """What is there where a file to read is wanted: nothing, or a folder."""
    return InputError(f"{path} is a folder; name a file" if Path(path).is_dir() else f"{path}: no such file")


def read_text(path: str | Path, limit_bytes: int = 1 << 30) -> str:
    """Reads a text file after checking that it exists and is not larger than `limit_bytes`.

    Raises:
        InputError: no such file.
        FileFormatError: larger than the limit, or not UTF-8.
    """
    source = Path(path)
    if not source.is_file():
        raise no_file(source)
    size = source.stat().st_size
    if size > limit_bytes:
        raise FileFormatError(f"{source}: {size:,} bytes, more than the {limit_bytes:,} this kind of file may have")
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from None


# Documents. Parsers keep the last of two entries of one name, so that what a file says of a layer twice would be lost
# in silence.

MOST_ALIASED = 1 << 20
"""Values that all aliases of a file may stand for: 400 layers of 2,500 slots."""


def parse_json(text: str | bytes, origin: str) -> Any:
    """The value of a JSON text.

    Args:
        text: to parse. origin: of the text, for errors.

    Raises:
        FileFormatError: not JSON, truncated, nested too deep, a whole number of thousands of digits, or a name twice in
            an object.
    """

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise FileFormatError(f"{origin}: {twice[:60]!r} stands twice in an object; keep the entry that holds")
        return entries

    try:
        return json.loads(text, object_pairs_hook=members)
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{origin}: not JSON, or truncated ({str(error)[:200]})") from None


def parse_yaml(text: str, origin: str, deepest: int) -> Any:
    """The value of a YAML text (of JSON, too), anchors and aliases included.

    Args:
        text: to parse. origin: of the text, for errors. deepest: collections inside one another that its format
            needs; what aliases stand for counts where they stand.

    Raises:
        FileFormatError: not YAML, truncated, a tag, a second document, nested deeper, a name twice in a mapping, or
            aliases that are circular or stand for more than a million values.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(yaml.parse(text, Loader=loader), origin, deepest)
        return yaml.load(text, Loader=loader)
    except FileFormatError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{origin}: neither JSON nor YAML, or truncated ({' '.join(str(error).split())[:200]})"
        ) from None


class _Open:
    """A collection that has begun: how many values it unfolds to so far and how deep they go; a mapping's names."""

    def __init__(self, anchor: str | None, names: set[str] | None) -> None:
        self.anchor, self.names = anchor, names
        self.children, self.values, self.depth = 0, 1, 1


def _check_events(events: Iterable[Any], origin: str, deepest: int) -> None:
    """Refuses what a loader chokes on or passes over, before anything is loaded."""
    import yaml

    anchored: dict[str, tuple[int, int]] = {}
    collections: list[_Open] = []
    aliased = documents = 0
    for event in events:
        where = f"{origin}: line {event.start_mark.line + 1}"
        values, depth, anchor = 1, 0, getattr(event, "anchor", None)
        if getattr(event, "tag", None):
            raise FileFormatError(f"{where}: the tag {event.tag[:40]!r} is not accepted; plain values are")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise FileFormatError(f"{where}: a second document; expected one")
            continue
        if isinstance(event, yaml.CollectionStartEvent):
            collections.append(_Open(anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
            if len(collections) > deepest:
                raise FileFormatError(f"{where}: nested deeper than this format goes")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            ended = collections.pop()
            values, depth, anchor = ended.values, ended.depth, ended.anchor
        elif isinstance(event, yaml.AliasEvent):
            known = anchored.get(str(anchor))
            if known is None:
                raise FileFormatError(f"{where}: *{str(anchor)[:40]} stands for nothing before it, or for itself")
            (values, depth), anchor = known, None
            aliased += values
            if aliased > MOST_ALIASED or len(collections) + depth > deepest:
                raise FileFormatError(
                    f"{where}: aliases stand for more than {MOST_ALIASED:,} values, or deeper than this format goes"
                )
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if anchor:
            anchored[anchor] = (values, depth)
        if not collections:
            continue
        holder = collections[-1]
        if holder.names is not None and holder.children % 2 == 0:
            name = event.value if isinstance(event, yaml.ScalarEvent) else None
            if name is None or name in holder.names:
                said = "a name that is no plain value" if name is None else f"{name[:60]!r} stands twice in a mapping"
                raise FileFormatError(f"{where}: {said}; keep the entry that holds")
            holder.names.add(name)
        holder.children += 1
        holder.values += values
        holder.depth = max(holder.depth, depth + 1)
