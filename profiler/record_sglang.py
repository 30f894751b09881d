"""SGLang's expert distribution recorder driven over HTTP: start, wait, stop, dump, and find the files.

Source (0.5.23): `/start_expert_distribution_record` and its two sisters in sglang/srt/entrypoints/http_server.py answer 200 once
the scheduler has done it; the dump goes to `SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR` (/tmp) of the server's machine, whole when the
answer comes for the rank that answers, a moment later for the others. No endpoint sends the file. Starting without
`--expert-distribution-recorder-mode` raises in the scheduler, which takes the server down: so the mode is asked first.
"""

from __future__ import annotations

import os
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..placement.errors import EngineError, InputError
from ..placement.statistics import RoutingStatistics
from ..placement.trace import RoutingTrace
from .engine_server import AnswerError, EngineServer
from .sglang_records import read_sglang_files

FOLDER_VARIABLE = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
PATTERN = "expert_distribution_recorder_*.pt"
MODES = {"stat": "counts", "stat_approx": "counts", "per_pass": "counts", "per_token": "tokens"}
"""What each mode of the recorder keeps."""
SETTLED = 1.0
"""Seconds without a new file after which no more are waited for."""


@dataclass(frozen=True)
class SGLangRecording:
    """What a recording gave. mode: the server's. files: what it wrote. notes: what to know of the record."""

    record: RoutingTrace | RoutingStatistics
    mode: str
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def recorder_folder(folder: str | Path | None = None) -> Path:
    """Where the server writes, as far as this machine can know: the folder given, or SGLang's variable, or its default."""
    return Path(folder or os.environ.get(FOLDER_VARIABLE) or "/tmp")


def record_sglang(
    server: EngineServer,
    seconds: float,
    folder: Path,
    *,
    wanted: str | None = None,
    patience: float = 60.0,
    progress: Callable[[float], None] | None = None,
) -> SGLangRecording:
    """Records what a running SGLang serves for so many seconds.

    folder: the server's recorder folder as this machine sees it. wanted: "tokens" or "counts", to refuse a server that
    records the other. patience: seconds to wait for the files. progress: called with the share of time that is over.
    An interrupted recording is stopped on the server.

    Raises:
        InputError: no such folder. EngineError: unreachable, no SGLang, its recorder is off or in another mode, or no file
            came; says what to do. FileFormatError: the files hold no record, as when nothing was served meanwhile.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; the server's {FOLDER_VARIABLE} must be a folder that this machine reads too"
        )
    info = server_info(server)
    mode = _mode(server, info, wanted)
    processes = _processes(info) if mode in ("per_pass", "per_token") else 1
    before = set(folder.glob(PATTERN))
    server.call("POST", "/start_expert_distribution_record")
    try:
        _wait(seconds, progress)
    finally:
        server.call("POST", "/stop_expert_distribution_record")
    server.call("POST", "/dump_expert_distribution_record")
    files = _new_files(folder, before, processes, patience)
    notes = []
    if info.get("enable_eplb"):
        notes.append(
            "the server rebalances experts (--enable-eplb): each rebalance empties the recorder, and ids before it are mapped by "
            "the map after it; record without"
        )
    return SGLangRecording(read_sglang_files(files, folder), mode, tuple(files), tuple(notes))


def server_info(server: EngineServer) -> dict[str, Any]:
    """The server's settings, from `/server_info` or its older name.

    Raises:
        EngineError: unreachable, or not SGLang.
    """
    try:
        return server.json("GET", "/server_info")
    except AnswerError as error:
        if error.status != 404:
            raise
    try:
        return server.json("GET", "/get_server_info")
    except AnswerError as error:
        if error.status != 404:
            raise
        raise EngineError(
            f"{server.url} has neither /server_info nor /get_server_info: it is no SGLang server"
        ) from None


def _mode(server: EngineServer, info: dict[str, Any], wanted: str | None) -> str:
    if "expert_distribution_recorder_mode" not in info:
        raise EngineError(f"{server.url} does not say expert_distribution_recorder_mode: it is no SGLang server")
    mode = info["expert_distribution_recorder_mode"]
    choice = "per_token" if wanted == "tokens" else "stat"
    if mode is None:
        raise EngineError(
            f"{server.url}: SGLang's recorder is off; start the server with --expert-distribution-recorder-mode {choice}"
        )
    if mode not in MODES:
        raise EngineError(f"{server.url}: records in mode {mode!r}, known are {', '.join(MODES)}")
    if wanted is not None and MODES[mode] != wanted:
        raise EngineError(
            f"{server.url}: records {MODES[mode]} (mode {mode}), {wanted} are wanted; start the server with "
            f"--expert-distribution-recorder-mode {choice}"
        )
    return str(mode)


def _processes(info: dict[str, Any]) -> int:
    """Processes that write a file each."""
    sizes = [info.get(name) for name in ("tp_size", "pp_size")]
    if not info.get("enable_dp_attention"):
        sizes.append(info.get("dp_size"))
    count = 1
    for size in sizes:
        count *= size if type(size) is int and size > 0 else 1
    return count


def _wait(seconds: float, progress: Callable[[float], None] | None) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if progress is not None:
            progress(1 - left / seconds)
        time.sleep(min(left, 0.5))


def _new_files(folder: Path, before: set[Path], wanted: int, patience: float) -> list[Path]:
    """The files that came, all of them complete, once there are as many as wanted and no more come."""
    end = time.monotonic() + patience
    seen: list[Path] = []
    since = time.monotonic()
    while True:
        files = sorted(set(folder.glob(PATTERN)) - before)
        if files != seen:
            seen, since = files, time.monotonic()
        # The directory of a zip archive is written last.
        whole = [file for file in files if zipfile.is_zipfile(file)]
        if len(files) >= wanted and len(whole) == len(files) and time.monotonic() - since >= SETTLED:
            return files
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    found = f"{len(whole)} whole files of {wanted}" if files else "no file"
    raise EngineError(
        f"{folder}: {found} came in {patience:g} s after the dump; set the server's {FOLDER_VARIABLE} to a folder that all of its "
        "nodes and this machine share, and name it"
    )
