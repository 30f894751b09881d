"""Reading a record of any known format, found by content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from .._plugins import Registry
from ..placement.errors import FileFormatError, InputError
from ..placement.statistics import RoutingStatistics
from ..placement.trace import RoutingTrace
from .readers.exflow import is_exflow, read_exflow
from .readers.load_history import is_load_history, read_load_history
from .readers.megatron import is_megatron, read_megatron
from .readers.routed_experts import is_routed_experts, read_routed_experts
from .readers.sglang import is_sglang, read_sglang
from .readers.trtllm import is_trtllm, read_trtllm
from .statistics_file import is_statistics, read_statistics
from .tokens_or_loads import check_tokens
from .trace_files import is_trace, read_trace


@dataclass(frozen=True)
class Reader:
    """One format: what it is called, whether a path holds it (told by content, cheaply), and how to read it."""

    name: str
    recognise: Callable[[Path], bool]
    read: Callable[..., RoutingTrace | RoutingStatistics]

    @property
    def options(self) -> frozenset[str]:
        """What can be told to `read` beside the path, by keyword."""
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


def read_any(
    path: str | Path, *, kind: Literal["tokens"] | None = None, **options: Any
) -> RoutingTrace | RoutingStatistics:
    """Reads a routing record, whatever known format it has. A trace comes whole into memory: for one of many shards,
    `aggregate` gives the statistics in bounded memory.

    kind: "tokens" says that an array of whole numbers holds expert ids, where its numbers leave that open
    (see `tokens_or_loads.check_tokens`); other formats say themselves what they hold.
    options: what the format does not say and its reader takes: num_experts, layers, top_k, assignments, ...

    Raises:
        InputError: no such path, or an option that the format's reader does not take. FileFormatError: no known format,
            a damaged file, or whole numbers that may be expert ids or loads.
    """
    if kind not in (None, "tokens"):
        raise InputError(f'kind {kind!r} is unknown; "tokens" is known, and None leaves it to what the file holds')
    reader = reader_of(path)
    for name in options:
        if name not in reader.options:
            known = ", ".join(sorted(reader.options)) or "none"
            raise InputError(
                f"{path} is a {reader.name}: {name} says nothing about it; options of this format: {known}"
            )
    if kind is None and reader.read in (read_exflow, read_routed_experts):
        check_tokens(Path(path), options.get("num_experts"))
    return reader.read(Path(path), **options)
