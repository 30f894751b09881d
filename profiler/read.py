"""Opening a record of any known format, found by content."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

from .._arguments import check_types
from .._display import span
from .._plugins import Registry
from .._tensor_files import load_plain
from ..placement.errors import FileFormatError, InputError, UnsupportedError
from ..placement.model import ModelSpec
from ..placement.statistics import RoutingStatistics
from ..placement.trace import RoutingTrace, apart
from .aggregate import aggregate_shards
from .readers.arrays import Kind, kind_of
from .readers.ascend import (
    is_mindie,
    is_omni_placement,
    is_vllm_ascend_log,
    read_mindie,
    read_omni_placement,
    read_vllm_ascend_log,
)
from .readers.engine_counts import remarks
from .readers.exflow import is_exflow, read_exflow
from .readers.megatron import is_megatron, is_token_imbalance, read_megatron, read_token_imbalance
from .readers.routed_experts import is_routed_experts, read_routed_experts
from .readers.sglang import is_sglang, read_sglang
from .readers.tables import check_loads, is_load_history, is_loads, read_load_history, read_loads
from .readers.trtllm import is_trtllm, read_trtllm
from .readers.vllm_loads import is_vllm_loads, read_vllm_loads
from .statistics_file import is_statistics, read_statistics
from .trace_files import TraceShard, is_trace, read_trace, trace_of_shards, trace_shards


@dataclass(frozen=True)
class Reader:
    """One format: what it is called, whether a path holds it (told by content, cheaply), and how to read it."""

    name: str
    recognise: Callable[[Path], bool]
    read: Callable[..., RoutingTrace | RoutingStatistics]

    @property
    def options(self) -> frozenset[str]:
        """What can be said to `read` beside the path, by keyword."""
        return frozenset(signature(self.read).parameters) - {"path"}


READERS: Registry[Reader] = Registry(
    "reader",
    "moeplace.readers",
    ("name", "recognise", "read", "options"),
    Reader("moeplace trace: a folder of Parquet shards, or one", is_trace, read_trace),
    Reader("moeplace statistics: .npz", is_statistics, read_statistics),
    Reader("SGLang expert distribution record: .pt, or a folder of the ranks' files", is_sglang, read_sglang),
    Reader("TensorRT-LLM expert statistics: a folder of meta_info.json and safetensors", is_trtllm, read_trtllm),
    Reader("Megatron-LM router trace: .jsonl, or a folder of the ranks' files", is_megatron, read_megatron),
    Reader(
        "Megatron-LM token-imbalance trace: a folder of manifest.json and tensors, or a folder of such",
        is_token_imbalance,
        read_token_imbalance,
    ),
    Reader("ADRS load history: .json", is_load_history, read_load_history),
    Reader("vLLM expert-load statistics: .jsonl", is_vllm_loads, read_vllm_loads),
    Reader("MindIE expert hotspots: a folder of decode_<rank>.csv and prefill_<rank>.csv", is_mindie, read_mindie),
    Reader(
        "Omni-Placement counts: a folder of activation_counts_recordstep_<n>_rank_<r>.txt",
        is_omni_placement,
        read_omni_placement,
    ),
    Reader("vLLM-Ascend log with [EPLB experts] windows", is_vllm_ascend_log, read_vllm_ascend_log),
    Reader(
        "routed experts of vLLM or SGLang: .npy or .npz [tokens, layers, k], JSON",
        is_routed_experts,
        read_routed_experts,
    ),
    Reader("ExFlow trace: .npy [tokens, layers]", is_exflow, read_exflow),
    Reader(
        "plain loads [layers, experts] or [windows, layers, experts]: .npy, .npz, .pt tensor, JSON, CSV, or a folder "
        "of such files",
        is_loads,
        read_loads,
    ),
)


def reader_of(path: str | Path) -> Reader:
    """The first reader that recognises `path`.

    Raises:
        InputError: no such path. FileFormatError: a file of no known format; the known ones are listed.
    """
    source = Path(path)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    for reader in READERS:
        if reader.recognise(source):
            return reader
    raise FileFormatError(
        f"{source}: {_description(source)}; no known format of routing record. Known: "
        f"{'; '.join(r.name for r in READERS)}"
    )


PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
}
"""How compressed files begin."""
LOOKED_AT = 1 << 20


def _description(path: Path) -> str:
    """What a file or folder that no reader knows is, and what to make of it."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        return f"a folder of {_some(names)}" if names else "an empty folder"
    with path.open("rb") as handle:
        start = handle.read(LOOKED_AT)
    packed = next((name for magic, name in PACKED.items() if start.startswith(magic)), None)
    if not start.strip():
        return "an empty file"
    if packed is not None:
        return f"compressed by {packed} (unpack it first)"
    if start.startswith(b"PK"):
        return _archive(path)
    if start.startswith(b"\x80"):
        return "a pickle, which may run code and is not opened (np.save the array, or torch.save the tensor)"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16 (save it as UTF-8)"
    text = start.decode("utf-8-sig", "replace").lstrip()
    if text[:1] in ("{", "["):
        return _json_text(text)
    line = (text.splitlines() or [""])[0][:60]
    if line and line.replace("\t", " ").isprintable():
        return f"text that begins {line!r} (tables are read from .csv, with commas)"
    return f"bytes that begin {start[:8].hex(' ')}"


def _archive(path: Path) -> str:
    """What a zip archive holds: of torch.save, or members."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a damaged zip archive"
    if not any(name.endswith("/data.pkl") for name in names):
        return f"a zip archive of {_some(names) or 'nothing'}"
    advice = 'of loads, torch.save the tensor alone, or {"logical_count": tensor}'
    try:
        content = load_plain(path)
    except (FileFormatError, UnsupportedError) as error:
        return f"a torch.save file that is not read: {str(error).removeprefix(f'{path}: ')} ({advice})"
    inside = f" with {_some(list(map(str, content)))}" if isinstance(content, dict) else ""
    return f"a torch.save file of a {type(content).__name__}{inside} ({advice})"


def _json_text(text: str) -> str:
    """What JSON holds, as far as it was read."""
    advice = 'of loads, [layers][experts], or {"logical_count": [layers][experts]}'
    try:
        content = json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return f"JSON that begins {text[:40]!r} ({advice})"
    if isinstance(content, dict):
        return f"a JSON object with {_some(list(content))} ({advice})"
    return f"a JSON list of {type(content[0]).__name__ if content else 'nothing'} ({advice})"


def _some(names: Sequence[str]) -> str:
    return ", ".join(name[:40] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass(frozen=True)
class RecordingHeader:
    """Shape of what was recorded. top_k: None where counts do not say it. moe_layers: absolute indices."""

    num_experts: int
    moe_layers: tuple[int, ...]
    top_k: int | None

    @property
    def model_fields(self) -> dict[str, Any]:
        """The shape in the terms of `ModelSpec`; no `top_k` where it is not known."""
        fields = {"layers": len(self.moe_layers), "experts": self.num_experts, "moe_layers": self.moe_layers}
        return fields if self.top_k is None else fields | {"top_k": self.top_k}


@dataclass(frozen=True, eq=False)
class Recording:
    """Recorded routing, opened once: its header and model at once, its tokens or counts when they are asked for.

    model: the recorded model, where the record names it. shards: of a Parquet trace, whose tokens stay on disk until
    then. record: what any other format held. notes: what its reader summed, left out or set apart.
    """

    path: Path
    header: RecordingHeader
    model: ModelSpec | None = None
    shards: tuple[TraceShard, ...] = ()
    record: RoutingTrace | RoutingStatistics | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: RoutingTrace | RoutingStatistics, path: str | Path) -> Recording:
        """A recording of a record in memory. path: what errors say it is."""
        experts = record.num_experts if isinstance(record, RoutingTrace) else record.experts
        header = RecordingHeader(experts, record.moe_layers, record.top_k)
        return cls(Path(path), header, record.model, record=record)

    @property
    def is_trace(self) -> bool:
        """Whether single tokens were recorded, and not only counts."""
        return not isinstance(self.record, RoutingStatistics)

    @cached_property
    def trace(self) -> RoutingTrace:
        """Every token, in memory: of statistics, the sample they keep.

        Raises:
            InputError: the record holds counts only. FileFormatError: damaged shards.
        """
        if isinstance(self.record, RoutingTrace):
            return self.record
        if self.record is None:
            return trace_of_shards(self.shards)
        if self.record.sample is not None and self.record.sample.num_tokens:
            return self.record.sample
        raise InputError(
            f"{self.path} holds counts only, and plans are judged on the experts single tokens chose; "
            "record in token mode (`moeplace profile --mode tokens`)"
        )

    def statistics(
        self, *, sample_tokens: int = 200_000, progress: Callable[[int, int], None] | None = None
    ) -> RoutingStatistics:
        """Statistics of the whole record; a Parquet trace of any size is counted in bounded memory.

        Args:
            sample_tokens: tokens kept for building steps, where the record holds tokens.
            progress: called with (tokens done, tokens in all) while shards are counted.

        Raises:
            InputError: no tokens. FileFormatError: damaged shards.
        """
        if isinstance(self.record, RoutingStatistics):
            return self.record
        if isinstance(self.record, RoutingTrace):
            return RoutingStatistics.from_trace(self.record, sample_tokens)
        return aggregate_shards(self.shards, sample_tokens=sample_tokens, progress=progress)

    def of_model(self, model: ModelSpec | None, moe_layers: Sequence[int] | None = None) -> Recording:
        """The recording with the model, its layers numbered as given, or else as the model's.

        Args:
            model: the model it is of; None leaves it unsaid.
            moe_layers: absolute indices of the recorded layers.

        Raises:
            InputError: the record is of another model, or has another number of layers than are given.
        """
        if model is None and moe_layers is None:
            return self
        layers = len(self.header.moe_layers)
        numbers = tuple(sorted(set(moe_layers))) if moe_layers is not None else model.moe_layers if model else ()
        if moe_layers is not None and (len(numbers) != layers or len(moe_layers) != layers):
            raise InputError(
                f"--moe-layers names {len(numbers)} layers, {self.path} has {layers} in which experts were chosen"
            )
        if model is not None:
            model = model if moe_layers is None else model.replace(layers=layers, moe_layers=numbers)
            in_order = self.header.moe_layers in (model.moe_layers, tuple(range(layers)))
            if layers != model.layers or (moe_layers is None and not in_order):
                raise InputError(layers_that_differ(self.path, self.header.moe_layers, model))
            for field, recorded in self.header.model_fields.items():
                if field != "moe_layers" and recorded != getattr(model, field):
                    raise InputError(
                        f"{self.path} is of another model: {field} is {recorded}, the model's is "
                        f"{getattr(model, field)}"
                    )
        header = replace(self.header, moe_layers=numbers)
        record = self.trace if self.record is None else self.record
        if isinstance(record, RoutingStatistics) and model is not None:
            record = record.of_model(model)
            header = replace(header, top_k=record.top_k)
        return replace(self, header=header, model=model, shards=(), record=replace(record, moe_layers=numbers))

    def keep_layers(self, layers: Sequence[int]) -> Recording:
        """The recording of some layers only, by the absolute indices it has them under.

        Raises:
            InputError: a layer that was not recorded, or none.
        """
        record = (self.trace if self.record is None else self.record).keep_layers(layers)
        return replace(Recording.of(record, self.path), notes=self.notes)

    @classmethod
    def join(cls, recordings: Mapping[str, Recording]) -> Recording:
        """Several recordings of one model as one, each a workload: of tokens where all hold tokens, else of counts.

        Raises:
            InputError: none given, or of different models.
        """
        first = next(iter(recordings.values()))
        record: RoutingTrace | RoutingStatistics
        if all(recording.is_trace for recording in recordings.values()):
            record = RoutingTrace.concatenate(
                apart([recording.trace.tagged(name) for name, recording in recordings.items()])
            )
        else:
            record = RoutingStatistics.join({name: part.statistics() for name, part in recordings.items()})
        notes = tuple(dict.fromkeys(note for recording in recordings.values() for note in recording.notes))
        return replace(cls.of(record, first.path), notes=notes)


def model_layers(recorded: Sequence[int], model: ModelSpec) -> dict[int, int]:
    """The model's number of each recorded layer that is one of its own, as far as numbers tell.

    A record numbers layers as the model does, or counts MoE layers alone, from 0: as one does that begins with 0 where
    the model's layer 0 has no experts, since layers without count nothing. What follows the model's last is of
    multi-token prediction.
    """
    counted = tuple(recorded) == tuple(range(len(recorded)))
    if counted and (len(recorded) == model.layers or model.moe_layers[0] > 0):
        return dict(zip(recorded, model.moe_layers, strict=False))
    return {layer: layer for layer in recorded if layer in model.moe_layers}


def layers_that_differ(path: Path, recorded: Sequence[int], model: ModelSpec) -> str:
    """Which layers a recording and a model do not share, what they may be, and what to do."""
    numbers = model_layers(recorded, model)
    extra = [layer for layer in recorded if layer not in numbers]
    missing = [layer for layer in model.moe_layers if layer not in numbers.values()]
    said = [
        f"{path} is of another model: it has {len(recorded)} layers ({span(tuple(recorded))}), the model has "
        f"{model.layers} with experts ({span(model.moe_layers)})"
    ]
    if len(recorded) == model.layers:
        said.append(
            f"where they are the same layers, counted otherwise, --moe-layers {span(model.moe_layers)} of `moeplace "
            "import` says so"
        )
    if extra:
        said.append(
            f"recorded only: {span(tuple(extra))}, which may be layers of multi-token prediction (after the last), or "
            f"layers without routed experts; --drop-layers {span(tuple(extra))} of `moeplace import` leaves them out"
        )
    if missing:
        said.append(
            f"in the model only: {span(tuple(missing))}, which may be hash-routed layers that were not recorded, or "
            "the other half of a pipeline (record each stage); `moeplace import --moe-layers` says which of the "
            "model's layers were recorded"
        )
    said.append(
        "--keep-layers of `moeplace import` takes those that are given, with --model as a part of it, and a plan is "
        "for them alone"
    )
    return ". ".join(f"{part[0].upper()}{part[1:]}" if number else part for number, part in enumerate(said))


def open_routing(
    path: str | Path,
    *,
    kind: Kind | None = None,
    defaults: Mapping[str, Any] | None = None,
    **options: Any,
) -> Recording:
    """Opens a routing record, whatever known format it has; the path is looked at once.

    Args:
        path: a file, or a folder of ranks' files or shards.
        kind: whether bare whole numbers are expert ids ("tokens") or "loads", where the numbers leave that open (see
            `readers.arrays.kind_of`); other formats say themselves what they hold.
        defaults: more options, used where the format takes them.
        options: what the format does not say and its reader takes: num_experts, layers, top_k, assignments, ...

    Returns:
        The recording; the tokens of a Parquet trace are not read yet.

    Raises:
        InputError: no such path, or an option that the format's reader does not take. FileFormatError: no known format,
            a damaged file, or whole numbers that may be expert ids or loads.
    """
    if kind not in (None, "tokens", "loads"):
        raise InputError(
            f'kind {kind!r} is unknown; "tokens" and "loads" are known, and None leaves it to what the file holds'
        )
    source = Path(path)
    reader = reader_of(source)
    experts = options.get("num_experts", (defaults or {}).get("num_experts"))
    if reader.read in (read_exflow, read_routed_experts) and is_loads(source):
        kind = kind or kind_of(source, experts)
        if kind == "loads":
            reader = _reader_named(read_loads)
    elif reader.read is read_loads:
        if kind == "tokens":
            raise FileFormatError(
                f"{source}: numbers that are no expert ids by type, shape or container; ids come as whole numbers in "
                ".npy or .npz, [tokens, layers] or [tokens, layers, top_k]"
            )
        if kind is None:
            check_loads(source, experts)
    for name in options:
        if name not in reader.options:
            known = ", ".join(sorted(reader.options - {"limit"})) or "none"
            raise InputError(
                f"{path} is a {reader.name}: {name} says nothing about it; options of this format: {known}"
            )
    options = {name: value for name, value in {**(defaults or {}), **options}.items() if name in reader.options}
    if reader.read is read_trace:
        shards = trace_shards(source)
        header = shards[0].header
        shape = RecordingHeader(header.num_experts, header.moe_layers, header.top_k)
        return Recording(source, shape, header.model, shards)
    with remarks() as notes:
        record = reader.read(source, **options)
    if kind is not None and isinstance(record, RoutingTrace) != (kind == "tokens"):
        raise InputError(f"{path} is a {reader.name}, which says itself what it holds: leave out kind (--as)")
    return replace(Recording.of(record, source), notes=tuple(notes))


def _reader_named(read: Callable[..., Any]) -> Reader:
    return next(reader for reader in READERS if reader.read is read)


@check_types
def read_any(path: str | Path, *, kind: Kind | None = None, **options: Any) -> RoutingTrace | RoutingStatistics:
    """Reads a routing record, whatever known format it has. A trace comes whole into memory: for one of many shards,
    `aggregate` gives the statistics in bounded memory, as `open_routing` does.

    Args:
        path, kind, options: as `open_routing` takes them.

    Returns:
        The trace, or the statistics where only counts were recorded.

    Raises:
        InputError, FileFormatError: as `open_routing`.
    """
    recording = open_routing(path, kind=kind, **options)
    for note in recording.notes:
        warnings.warn(note, UserWarning, stacklevel=2)
    return recording.trace if recording.record is None else recording.record
