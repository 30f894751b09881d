"""Reading a record of any known format, found by content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..placement.errors import FileFormatError, InputError
from ..placement.statistics import RoutingStatistics
from ..placement.trace import RoutingTrace
from .exflow_npy import is_exflow, read_exflow
from .load_history import is_load_history, read_load_history
from .megatron_trace import is_megatron, read_megatron
from .routed_experts import is_routed_experts, read_routed_experts
from .sglang_records import is_sglang, read_sglang
from .statistics_file import is_statistics, read_statistics
from .trace_files import read_trace
from .trace_shards import is_trace
from .trtllm_statistics import is_trtllm, read_trtllm


@dataclass(frozen=True)
class Reader:
    """One format: what it is called, whether a path holds it (told by content, cheaply), and how to read it."""

    name: str
    recognise: Callable[[Path], bool]
    read: Callable[[Path], RoutingTrace | RoutingStatistics]


READERS = (
    Reader("moeplace trace: a folder of Parquet shards, or one", is_trace, read_trace),
    Reader("moeplace statistics: .npz", is_statistics, read_statistics),
    Reader("SGLang expert distribution record: .pt, or a folder of the ranks' files", is_sglang, read_sglang),
    Reader("TensorRT-LLM expert statistics: a folder of meta_info.json and safetensors", is_trtllm, read_trtllm),
    Reader("Megatron-LM router trace: .jsonl, or a folder of the ranks' files", is_megatron, read_megatron),
    Reader("ADRS load history: .json", is_load_history, read_load_history),
    Reader(
        "routed experts of vLLM or SGLang: .npy or .npz [tokens, layers, k], JSON",
        is_routed_experts,
        read_routed_experts,
    ),
    Reader("ExFlow trace: .npy [tokens, layers]", is_exflow, read_exflow),
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
    raise FileFormatError(f"{source}: no known format of routing record; known: {'; '.join(r.name for r in READERS)}")


def read_any(path: str | Path) -> RoutingTrace | RoutingStatistics:
    """Reads a routing record, whatever known format it has. A trace comes whole into memory: for one of many shards,
    `aggregate` gives the statistics in bounded memory.

    Raises:
        InputError: no such path. FileFormatError: no known format, or a damaged file.
    """
    return reader_of(path).read(Path(path))
