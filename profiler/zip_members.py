"""What a zip archive says of its members, checked against the file before any of them is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ..placement.errors import FileFormatError


def checked_members(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The members, which together take no more of the file than there is of it.

    zipfile allocates what a member claims to take before it reads.

    Raises:
        FileFormatError: they claim more, or a stored member claims another size than it takes.
    """
    members = archive.infolist()
    size = path.stat().st_size
    if sum(member.compress_size for member in members) > size:
        raise FileFormatError(f"{path}: members claim more than the {size:,} bytes of the file; damaged")
    for member in members:
        if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
            raise FileFormatError(f"{path}: {member.filename[:60]!r} is stored and claims two sizes; damaged")
    return members
