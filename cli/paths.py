"""Paths that commands write to, checked when the command line is read: nothing is lost for lack of a place."""

from __future__ import annotations

from pathlib import Path

from ..placement.errors import InputError


def output_file(path: Path | None) -> Path | None:
    """A file that can be written, in a folder that is there; `~` is expanded.

    Raises:
        InputError: it cannot; what to do is said.
    """
    from ..placement.files import check_output_file

    return None if path is None else check_output_file(path)


def output_folder(path: Path | None) -> Path | None:
    """A folder that files can be written into; it is made when there is something to write.

    Raises:
        InputError: it cannot; what to do is said.
    """
    from ..placement.files import check_output_folder

    return None if path is None else check_output_folder(path)


def new_folder(path: Path) -> Path:
    """A folder that is not there yet, and can be made.

    Raises:
        InputError: it is there, or cannot be made.
    """
    folder = output_folder(path)
    assert folder is not None
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} is there already; name a new folder, or remove it")
    return folder


def recording_path(path: Path | None) -> Path | None:
    """Where a recording goes: a folder that holds none yet, for a trace; or a file that ends in .npz, for counts.

    Raises:
        InputError: it cannot go there.
    """
    if path is None or path.suffix == ".npz":
        return output_file(path)
    folder = output_folder(path)
    if folder is not None and any(folder.glob("*.parquet")):
        raise InputError(f"{folder} already holds a recording; give another name, or remove it")
    return folder


def topology_file(path: Path | None) -> Path | None:
    """A file for a cluster, whose ending says its form.

    Raises:
        InputError: another ending, or it cannot be written.
    """
    if path is not None and path.suffix not in (".json", ".yaml", ".yml"):
        raise InputError(f"{path} must end in .json, .yaml or .yml")
    return output_file(path)


CHARTS = (".svg", ".png", ".html")
"""How files of charts may end."""


def plot_file(path: Path | None) -> Path | None:
    """A file for charts, whose ending says its form.

    Raises:
        InputError: another ending, or it cannot be written.
    """
    if path is not None and path.suffix.lower() not in CHARTS:
        raise InputError(f"{path} must end in {', '.join(CHARTS[:-1])} or {CHARTS[-1]}")
    if path is not None and path.suffix.lower() == ".png":
        import resvg_py  # noqa: F401 (missed before the work, not after it)
    return output_file(path)
