"""What serving on Ascend writes of its experts' loads: MindIE's hotspot files, Omni-Placement's counts, and the windows
that vLLM-Ascend logs.

MindIE (MINDIE_ENABLE_EXPERT_HOTPOT_GATHER; atb_llm/utils/eplb_expert_data_collect.py, and msit's `elb`, which reads
them): a folder, or one for each of prefill and decode, of `decode_<rank>.csv` and `prefill_<rank>.csv`. A rank's file
has a column for each expert it holds, and every interval appends a row for each MoE layer. `model_gen_config.json`
beside them says how many layers these are.

Omni-Placement (omni_planner; ClusterActivation::dumpActivationCounts): `activation_counts_recordstep_<n>_rank_<r>.txt`,
a row for each MoE layer, tabs between positions; of all ranks in rank 0's file, or of each rank in its own.

vLLM-Ascend (pull request 16800, which logs and writes no file): lines of `[EPLB experts]`, one for each window, layer
and rank, with what each expert of the rank has counted until then.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..._types import IntArray
from ...placement.errors import FileFormatError, InputError
from ...placement.files import parse_json, read_text
from ...placement.statistics import RoutingStatistics
from .arrays import MOST_EXPERTS
from .engine_counts import remark, statistics_of, whole_number

TEXT_LIMIT = 1 << 30
MOST_COUNTS = 1 << 28
"""Of windows x layers x experts: 2 GiB in memory."""


# Rows of whole numbers.


def _rows(source: Path, separator: str) -> IntArray:
    """[rows, columns] of a text table.

    Raises:
        FileFormatError: no numbers, or rows of different length; the line is named.
    """
    rows: list[list[int]] = []
    for number, line in enumerate(read_text(source, limit_bytes=TEXT_LIMIT).splitlines(), 1):
        entries = [entry.strip() for entry in line.strip().rstrip(separator).split(separator)]
        if entries == [""]:
            continue
        # Frames of float columns write 12.0.
        whole = [entry.removesuffix(".0") for entry in entries]
        if not all(entry.isascii() and entry.isdecimal() and len(entry) < 18 for entry in whole):
            raise FileFormatError(f"{source}: line {number} holds {line.strip()[:60]!r}, expected counts")
        if rows and len(whole) != len(rows[0]):
            raise FileFormatError(f"{source}: line {number} has {len(whole)} counts, the first {len(rows[0])}")
        rows.append([int(entry) for entry in whole])
    if not rows:
        raise FileFormatError(f"{source}: nothing in it; record while the engine serves requests")
    return np.array(rows, dtype=np.int64)


def _ranks_in_order(files: Mapping[int, Path], source: Path) -> list[Path]:
    missing = sorted(set(range(max(files))) - set(files))
    if missing:
        raise FileFormatError(
            f"{source}: no file of rank {missing[0]} ({len(missing)} missing of {max(files) + 1}); bring the files of "
            "all machines together"
        )
    return [files[rank] for rank in sorted(files)]


def _checked(source: Path, columns: int, num_experts: int | None) -> None:
    """Raises FileFormatError where columns are slots and not experts."""
    if num_experts is not None and columns != num_experts:
        raise FileFormatError(
            f"{source}: {columns} columns over all ranks, of {num_experts} experts: with redundant or shared experts "
            "columns are slots, and the files do not say which expert a slot held; record without them"
        )
    if columns > MOST_EXPERTS:
        raise FileFormatError(f"{source}: {columns} columns, beyond any model's experts")


# MindIE.


MINDIE_CONFIG = "model_gen_config.json"
_HOTSPOTS = re.compile(r"(decode|prefill)_(\d{1,5})\.csv")
PHASES = ("prefill", "decode")


def is_mindie(path: Path) -> bool:
    """Whether `path` is a folder of MindIE's hotspot files, or holds such folders."""
    return path.is_dir() and any(_hotspots(folder) for folder in _hotspot_folders(path))


def read_mindie(path: str | Path, *, num_experts: int | None = None) -> RoutingStatistics:
    """Reads the intervals as windows, prefill and decode each a workload; ranks' columns follow one another.

    num_experts: of the model, where `model_gen_config.json` does not say it: columns must be as many.

    Raises:
        InputError: no such folder. FileFormatError: damaged, a rank's file missing, or redundant experts in it.
    """
    source = Path(path)
    if not is_mindie(source):
        raise InputError(f"{source}: no folder with decode_<rank>.csv or prefill_<rank>.csv")
    windows: dict[str, list[IntArray]] = {phase: [] for phase in PHASES}
    top_ks: set[int] = set()
    for folder in _hotspot_folders(source):
        layers, experts, top_k = _mindie_config(folder, num_experts)
        top_ks |= set() if top_k is None else {top_k}
        for phase, files in _hotspots(folder).items():
            tables = [_rows(file, ",") for file in _ranks_in_order(files, folder)]
            rows = min(len(table) for table in tables)
            rows -= rows % (layers or rows)
            if not rows:
                raise FileFormatError(f"{folder}: {phase}: fewer rows than the {layers} MoE layers; it was cut off")
            if any(len(table) != rows for table in tables):
                remark(f"{folder}: {phase}: intervals that not every rank wrote in full were left out")
            load = np.concatenate([table[:rows] for table in tables], axis=1)
            _checked(folder, load.shape[1], experts)
            if layers is None:
                remark(f"{folder}: no {MINDIE_CONFIG}: each of its {rows} rows was taken for a layer")
            windows[phase] += [window for window in load.reshape(-1, layers or rows, load.shape[1]) if window.any()]
    return _by_phase(source, windows, top_ks.pop() if len(top_ks) == 1 else None)


def _hotspot_folders(path: Path) -> list[Path]:
    """The folder and those in it, as MindIE keeps prefill and decode, and people the machines, apart."""
    return [path, *sorted(entry for entry in path.iterdir() if entry.is_dir())]


def _hotspots(folder: Path) -> dict[str, dict[int, Path]]:
    files: dict[str, dict[int, Path]] = defaultdict(dict)
    for file in folder.iterdir():
        if (match := _HOTSPOTS.fullmatch(file.name)) and file.is_file():
            files[match[1]][int(match[2])] = file
    return {phase: files[phase] for phase in PHASES if phase in files}


def _mindie_config(folder: Path, num_experts: int | None) -> tuple[int | None, int | None, int | None]:
    """(MoE layers, experts, experts a token), None what is not said."""
    path = folder / MINDIE_CONFIG
    if not path.is_file():
        return None, num_experts, None
    content = parse_json(read_text(path, limit_bytes=1 << 20), str(path))
    if not isinstance(content, dict):
        raise FileFormatError(f"{path}: expected a JSON object")
    layers = whole_number(path, "num_moe_layers", content.get("num_moe_layers"), 1, 4096)
    experts = whole_number(path, "num_of_experts", content.get("num_of_experts"), 1, MOST_EXPERTS)
    chosen = content.get("num_of_selected_experts")
    first = chosen[0] if isinstance(chosen, list) and chosen else chosen
    return layers, experts, None if first is None else whole_number(path, "num_of_selected_experts", first, 1, experts)


def _by_phase(source: Path, windows: Mapping[str, Sequence[IntArray]], top_k: int | None) -> RoutingStatistics:
    """Statistics with a workload for each phase that counted something."""
    phases = [phase for phase, own in windows.items() if own]
    shapes = {window.shape for phase in phases for window in windows[phase]}
    if not phases:
        raise FileFormatError(f"{source}: every count is 0; record while the engine serves requests")
    if len(shapes) > 1:
        raise FileFormatError(
            f"{source}: windows of {sorted(shapes)} layers and experts, expected one shape of a model"
        )
    layers = shapes.pop()[0]
    statistics = statistics_of(source, (window for phase in phases for window in windows[phase]), range(layers), top_k)
    workload = np.repeat(np.arange(len(phases)), [len(windows[phase]) for phase in phases])
    return replace(statistics, window_workload=workload, workloads=tuple(phases) if len(phases) > 1 else ("",))


# Omni-Placement.


_OMNI = re.compile(r"activation_counts_recordstep_(\d{1,12})_rank_(\d{1,5})\.txt")


def is_omni_placement(path: Path) -> bool:
    """Whether `path` is a folder of Omni-Placement's counts."""
    return path.is_dir() and any(_OMNI.fullmatch(file.name) for file in path.iterdir())


def read_omni_placement(path: str | Path, *, num_experts: int | None = None) -> RoutingStatistics:
    """Reads each step of recording as a window; ranks' columns follow one another, where each wrote its own.

    num_experts: of the model: columns must be as many, for with redundant experts they are slots.

    Raises:
        InputError: no such folder. FileFormatError: damaged, a rank's file missing, or redundant experts in it.
    """
    source = Path(path)
    if not source.is_dir() or not is_omni_placement(source):
        raise InputError(f"{source}: no folder with activation_counts_recordstep_<n>_rank_<r>.txt")
    steps: dict[int, dict[int, Path]] = defaultdict(dict)
    for file in source.iterdir():
        if match := _OMNI.fullmatch(file.name):
            steps[int(match[1])][int(match[2])] = file
    windows: list[IntArray] = []
    for step in sorted(steps):
        tables = [_rows(file, "\t") for file in _ranks_in_order(steps[step], source)]
        if len({len(table) for table in tables}) > 1:
            raise FileFormatError(f"{source}: step {step}: ranks have different numbers of layers")
        windows.append(np.concatenate(tables, axis=1))
        _checked(source, windows[-1].shape[1], num_experts)
        if sum(window.size for window in windows) > MOST_COUNTS:
            raise FileFormatError(f"{source}: more than {MOST_COUNTS:,} counts; read a part of the steps")
    return _by_phase(source, {"": [window for window in windows if window.any()]}, None)


# vLLM-Ascend.


LINE = b"[EPLB experts]"
START = 1 << 20
MOST_GAPS = 1 << 12
"""Windows that layers may lack before a log is taken for damaged: of layers without evidence nothing is logged."""
_EXPERTS_LINE = re.compile(
    r"\[EPLB experts\] stage=(?P<stage>\d{1,4}) layer=(?P<layer>\S{1,300}) rank=(?P<rank>\d{1,5}) "
    r"window=(?P<window>\d{1,9}) .*?\bexpert_work=\[(?P<work>[^\]]*)\]"
)
_LAYER_NUMBER = re.compile(r"layers?\.(\d{1,5})(?:\.|$)")
_WORK = re.compile(r"'(\d{1,5}):(\d{1,18})'")


def is_vllm_ascend_log(path: Path) -> bool:
    """Whether `path` is a log with vLLM-Ascend's windows in its first mebibyte."""
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return LINE in handle.read(START)


def read_vllm_ascend_log(path: str | Path) -> RoutingStatistics:
    """Reads the windows that vLLM-Ascend's workload diagnostics log: what each counted since the layer's last.

    Raises:
        InputError: no such file. FileFormatError: no such line, one that is not understood, counts that fall, as of two
            runs in one log, or a rank's lines missing; the line is named.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    counts: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    last: dict[tuple[int, int], int] = {}
    for number, layer, window, work in _logged(source):
        for expert, total in work:
            grown = total - last.get((layer, expert), 0)
            if grown < 0:
                raise FileFormatError(
                    f"{source}: line {number}: expert {expert} of layer {layer} has counted {total}, less than before; "
                    "are there two runs in one log? Part it"
                )
            last[layer, expert] = total
            counts[window, layer][expert] = counts[window, layer].get(expert, 0) + grown
    layers = sorted({layer for _, layer in counts})
    windows = sorted({window for window, _ in counts})
    experts = 1 + max(expert for _, expert in last)
    for layer in layers:
        missing = experts - sum(owner == layer for owner, _ in last)
        if missing:
            raise FileFormatError(
                f"{source}: layer {layer}: {missing} of {experts} experts are in no line; each rank's are logged, cold "
                "ones too, so that a line is missing"
            )
    if len(windows) * len(layers) > MOST_GAPS + 4 * len(counts):
        raise FileFormatError(f"{source}: most of its {len(layers)} layers lack most of its {len(windows)} windows")
    load = np.zeros((len(windows), len(layers), experts), dtype=np.int64)
    for (window, layer), row in counts.items():
        load[windows.index(window), layers.index(layer), list(row)] = list(row.values())
    return statistics_of(source, iter(load), layers)


def _logged(source: Path) -> Iterator[tuple[int, int, int, list[tuple[int, int]]]]:
    """(line, layer, window, what each expert has counted) of each line; layers without a number are counted."""
    named: dict[tuple[str, str], int] = {}
    any_rows = False
    with source.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            if LINE not in raw:
                continue
            match = _EXPERTS_LINE.search(raw.decode("utf-8", "replace"))
            if match is None:
                raise FileFormatError(
                    f"{source}: line {number} is no [EPLB experts] of stage, layer, rank, window and expert_work as a "
                    "list; of another revision, or cut off"
                )
            work = [(int(expert), int(total)) for expert, total in _WORK.findall(match["work"])]
            if not work or len(work) != match["work"].count(":"):
                raise FileFormatError(f"{source}: line {number}: expert_work is {match['work'][:60]!r}")
            said = _LAYER_NUMBER.search(match["layer"])
            layer = int(said[1]) if said else named.setdefault((match["stage"], match["layer"]), len(named))
            any_rows = True
            yield number, layer, int(match["window"]), work
    if not any_rows:
        raise FileFormatError(f"{source}: no [EPLB experts] line in it")
