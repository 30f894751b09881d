"""What every shard of a Parquet trace says of itself, and its columns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..placement.errors import FileFormatError, InputError
from ..placement.model import ModelSpec
from ..placement.trace import id_dtype

HEADER_KEY = b"moeplace.trace"
VERSION = 1

INTEGER_COLUMNS = ("step", "source", "sequence", "position")
REQUIRED_COLUMNS = ("sequence", "position", "workload", "expert_ids")


@dataclass(frozen=True)
class TraceHeader:
    """Shape of a trace, kept as JSON in the Parquet schema metadata under `moeplace.trace`.

    model: the recorded model where the recorder knew it.
    """

    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    model: ModelSpec | None = None

    def __post_init__(self) -> None:
        layers = self.moe_layers
        if not 1 <= self.num_experts <= 65536:
            raise InputError(f"num_experts ({self.num_experts}) must be between 1 and 65536")
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(f"top_k ({self.top_k}) must be between 1 and num_experts ({self.num_experts})")
        if not layers or len(layers) > 65536 or layers[0] < 0:
            raise InputError(f"moe_layers ({layers}) must name at least one layer, and none below 0")
        if any(b <= a for a, b in itertools.pairwise(layers)):
            raise InputError(f"moe_layers ({layers}) must be increasing")

    @property
    def ids_per_token(self) -> int:
        """L * k."""
        return len(self.moe_layers) * self.top_k

    def encode(self) -> bytes:
        fields = {
            "version": VERSION,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "moe_layers": list(self.moe_layers),
            "model": None if self.model is None else self.model.model_dump(mode="json"),
        }
        return json.dumps(fields).encode()

    @classmethod
    def decode(cls, metadata: Mapping[bytes, bytes] | None, origin: str | Path) -> TraceHeader:
        """Reads the header out of a Parquet file's key-value metadata.

        Raises:
            FileFormatError: no header, a header of a newer release, or one that is malformed.
        """
        if not metadata or HEADER_KEY not in metadata:
            raise FileFormatError(
                f"{origin}: Parquet, but not a routing trace: the metadata key {HEADER_KEY.decode()!r} is absent; tools "
                "that rewrite Parquet drop it, so pass the recorded shards, or build a trace with "
                "RoutingTrace.from_arrays and write it with write_trace"
            )
        try:
            fields = json.loads(metadata[HEADER_KEY])
            version = fields["version"]
            if version != VERSION:
                raise FileFormatError(
                    f"{origin}: routing trace of format version {version}, this release reads version {VERSION}; "
                    "upgrade moeplace"
                )
            model = fields.get("model")
            return cls(
                num_experts=_whole(fields["num_experts"]),
                top_k=_whole(fields["top_k"]),
                moe_layers=tuple(_whole(layer) for layer in fields["moe_layers"]),
                model=None if model is None else ModelSpec(**model),
            )
        except FileFormatError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FileFormatError(
                f"{origin}: the {HEADER_KEY.decode()!r} metadata is malformed ({error}); record the trace again"
            ) from None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number, found {value!r}")
    return value


def trace_schema(header: TraceHeader, *, gate_weights: bool, step: bool = True, source: bool = True) -> Any:
    """The Arrow schema of a shard; optional columns are absent when not recorded."""
    import pyarrow as pa

    width = header.ids_per_token
    fields = [
        *([pa.field("step", pa.int64(), nullable=False)] if step else []),
        *([pa.field("source", pa.int32(), nullable=False)] if source else []),
        pa.field("sequence", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("workload", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("expert_ids", _list_of(pa.from_numpy_dtype(id_dtype(header.num_experts)), width), nullable=False),
        *([pa.field("gate_weights", _list_of(pa.float32(), width), nullable=False)] if gate_weights else []),
    ]
    return pa.schema(fields, metadata={HEADER_KEY: header.encode()})


def _list_of(value_type: Any, width: int) -> Any:
    import pyarrow as pa

    return pa.list_(pa.field("element", value_type, nullable=False), width)
