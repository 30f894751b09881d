"""Every export format. A new one is a file and a line here."""

from __future__ import annotations

from ...placement.errors import InputError, nearest
from .base import Exporter
from .moeplace_json import MoeplaceJson
from .sglang import SGLang
from .trtllm import TensorRTLLM
from .vllm import VLLM
from .vllm_ascend import VLLMAscend

EXPORTERS: tuple[Exporter, ...] = (MoeplaceJson(), SGLang(), VLLM(), VLLMAscend(), TensorRTLLM())


def engine_names() -> tuple[str, ...]:
    """Names accepted by `export_plan`."""
    return tuple(exporter.name for exporter in EXPORTERS)


def exporter_named(engine: str) -> Exporter:
    """The exporter of that engine.

    Raises:
        InputError: unknown engine; the nearest is named.
    """
    for exporter in EXPORTERS:
        if exporter.name == engine:
            return exporter
    raise InputError(f"engine {engine!r} is unknown; {nearest(engine, engine_names())}")
