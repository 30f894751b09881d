"""Statistics on disk: one .npz of plain arrays with a JSON header, no pickle."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .._arguments import check_types
from .._tensor_files import checked_members
from ..placement.errors import FileFormatError, InputError
from ..placement.model import ModelSpec
from ..placement.statistics import RoutingStatistics
from ..placement.steps import Batch, as_batches
from ..placement.trace import RoutingTrace, id_dtype
from .files import Source, name_of, npy_shape, path_or_file, reading, size_of, writing

FORMAT = "moeplace.statistics"
VERSION = 1
HEADER = "moeplace.json"
HEADER_LIMIT = 1 << 24
ZIP_NAME_AT = 30
SIZE_LIMIT = 1 << 34
"""Bytes that the arrays of one file may unpack to: more than the largest statistics `aggregate` makes."""

TYPES = {
    "load": "<f8",
    "window_workload": "<i8",
    "coactivation": "<f8",
    "transitions": "<f8",
    "sample_expert_ids": "<u2",
    "sample_sequence": "<i8",
    "sample_position": "<i8",
    "sample_workload": "<i8",
    "sample_gate_weights": "<f2",
    "sample_step": "<i8",
    "sample_source": "<i8",
}


@check_types
def write_statistics(statistics: RoutingStatistics, path: Source) -> None:
    """Writes statistics, the sample included: to a path whole or not at all, or into a binary file object.

    Args:
        statistics: what to write.
        path: a file's path, or a file object open for writing.
    """
    arrays: dict[str, npt.NDArray[Any] | None] = {
        "load": statistics.load,
        "window_workload": statistics.window_workload,
        "coactivation": statistics.coactivation,
        "transitions": statistics.transitions,
    }
    workloads: list[str] = []
    if statistics.sample is not None:
        workloads = list(statistics.sample.workloads)
        arrays |= {
            name: getattr(statistics.sample, name.removeprefix("sample_"))
            for name in TYPES
            if name.startswith("sample_")
        }
    stored = {
        name: np.ascontiguousarray(array, dtype=_type_of(name, statistics.experts))
        for name, array in arrays.items()
        if array is not None
    }
    header = {
        "format": FORMAT,
        "version": VERSION,
        "experts": statistics.experts,
        "moe_layers": list(statistics.moe_layers),
        "workloads": list(statistics.workloads),
        "top_k": statistics.top_k,
        "tokens": statistics.tokens,
        "fingerprint": statistics.fingerprint,
        "model": None if statistics.model is None else statistics.model.model_dump(mode="json"),
        "sample_workloads": workloads,
        "batches": [asdict(batch) for batch in statistics.batches],
        "shapes": {name: list(array.shape) for name, array in stored.items()},
    }
    with (
        writing(path_or_file(path)) as target,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        archive.writestr(HEADER, json.dumps(header))
        for name, array in stored.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


@check_types
def read_statistics(path: Source, *, limit: int = SIZE_LIMIT) -> RoutingStatistics:
    """Reads what `write_statistics` wrote.

    Args:
        path: the file's path, or a binary file object that can seek.
        limit: bytes that the arrays may unpack to.

    Returns:
        The statistics, with the token sample where one was written.

    Raises:
        InputError: no such file.
        FileFormatError: not such a file, damaged, of a newer version, or larger than its header or the limit allows.
    """
    source = name_of(path_or_file(path))
    with reading(path_or_file(path)) as handle:
        return _read(handle, source, limit)


def _read(handle: BinaryIO, source: str, limit: int) -> RoutingStatistics:
    try:
        with zipfile.ZipFile(handle) as archive:
            checked_members(source, archive, size_of(handle))
            header = _header(archive, source, limit)
            arrays = {name: _array(archive, source, name, shape, header) for name, shape in header["shapes"].items()}
        return _statistics(header, arrays)
    except FileFormatError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise FileFormatError(f"{source}: damaged or truncated statistics file ({error}); write it again") from None
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{source}: statistics that do not agree with themselves: {error}") from None


def is_statistics(path: Path) -> bool:
    """Whether `path` is a file of `write_statistics`: a zip whose first member is the header."""
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        start = handle.read(ZIP_NAME_AT + len(HEADER))
    return start.startswith(b"PK") and start[ZIP_NAME_AT:] == HEADER.encode()


def _type_of(name: str, experts: int) -> str:
    return "|u1" if name == "sample_expert_ids" and id_dtype(experts) is np.uint8 else TYPES[name]


def _header(archive: zipfile.ZipFile, source: str, limit: int) -> dict[str, Any]:
    if HEADER not in archive.namelist():
        raise FileFormatError(
            f"{source}: a zip file without {HEADER!r}, so not moeplace statistics; counts of your own go through "
            "RoutingStatistics.from_counts"
        )
    if archive.getinfo(HEADER).file_size > HEADER_LIMIT:
        raise FileFormatError(f"{source}: a header of more than {HEADER_LIMIT:,} bytes; the file is damaged")
    header = json.loads(archive.read(HEADER))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise FileFormatError(f"{source}: the header is not one of moeplace statistics")
    if header.get("version") != VERSION:
        raise FileFormatError(
            f"{source}: statistics of format version {header.get('version')}, this release reads version {VERSION}; "
            "upgrade moeplace"
        )
    if not isinstance(header["shapes"], dict):
        raise FileFormatError(f"{source}: the header lists no shapes; the file is damaged")
    total = 0
    for name, shape in header["shapes"].items():
        if name not in TYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise FileFormatError(f"{source}: the header declares an array {name!r} of shape {shape}")
        total += math.prod(shape) * np.dtype(_type_of(name, header["experts"])).itemsize
    if total > limit:
        raise FileFormatError(f"{source}: arrays of {total:,} bytes are declared, more than the limit of {limit:,}")
    return header


def _array(
    archive: zipfile.ZipFile, source: str, name: str, shape: list[int], header: dict[str, Any]
) -> npt.NDArray[Any]:
    """One member, whose own size, shape and type must be those the header declared before anything is unpacked."""
    kind = np.dtype(_type_of(name, header["experts"]))
    expected = math.prod(shape) * kind.itemsize
    try:
        declared = archive.getinfo(f"{name}.npy").file_size
    except KeyError:
        raise FileFormatError(f"{source}: the array {name!r} is missing; the file is incomplete") from None
    if not expected < declared <= expected + 4096:
        raise FileFormatError(
            f"{source}: array {name!r} unpacks to {declared:,} bytes, its shape {shape} takes {expected:,}; refused"
        )
    with archive.open(f"{name}.npy") as member:
        start = member.read(declared - expected)
        actual, fortran, dtype, begin = npy_shape(source, f"array {name!r}", start)
        if actual != tuple(shape) or fortran or dtype != kind or begin != len(start):
            raise FileFormatError(
                f"{source}: array {name!r} is {dtype} {actual}, the header says {kind} {tuple(shape)}; refused"
            )
        content = member.read(expected)
        if len(content) != expected or member.read(1):
            raise FileFormatError(f"{source}: array {name!r} holds {len(content):,} bytes, expected {expected:,}")
    return np.frombuffer(content, kind).reshape(shape)


def _statistics(header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> RoutingStatistics:
    layers = tuple(int(layer) for layer in header["moe_layers"])
    sample = None
    if "sample_expert_ids" in arrays:
        columns: dict[str, Any] = {
            name.removeprefix("sample_"): array for name, array in arrays.items() if name.startswith("sample_")
        }
        codes, names = columns.pop("workload"), tuple(str(name) for name in header["sample_workloads"])
        if codes.size and not (codes.min() >= 0 and codes.max() < len(names)):
            raise InputError(f"sample_workload runs from {codes.min()} to {codes.max()}, {len(names)} names are given")
        sample = RoutingTrace.from_arrays(**columns, num_experts=header["experts"], moe_layers=layers)
        if codes.shape != (sample.num_tokens,):
            raise InputError(f"sample_workload has shape {codes.shape}, the sample {sample.num_tokens} tokens")
        sample = replace(sample, workload=codes, workloads=names)
    return RoutingStatistics(
        experts=header["experts"],
        moe_layers=layers,
        load=arrays["load"],
        window_workload=arrays["window_workload"],
        workloads=tuple(str(name) for name in header["workloads"]),
        top_k=header["top_k"],
        coactivation=arrays.get("coactivation"),
        transitions=arrays.get("transitions"),
        sample=sample,
        tokens=int(header["tokens"]),
        fingerprint=str(header["fingerprint"]),
        model=None if header.get("model") is None else ModelSpec(**header["model"]),
        batches=as_batches([Batch(**batch) for batch in header.get("batches", ())]),
    )
