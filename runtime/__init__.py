"""Applies a plan: a distributed MoE layer, migration, checkpoints, permuted weights, exports for engines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration.calibrate import calibrate
    from .calibration.result import Calibration
    from .moe.checkpoint import load_checkpoint, save_checkpoint
    from .moe.compression import CompressionStatistics, LSHCompression
    from .moe.data_parallel import clip_grad_norm_, exclude_from_ddp, expert_parameters, expert_rows
    from .moe.decoder import ContextCoherentDecoder, DispatchCombineDecoder
    from .moe.experts import PlacedExperts
    from .moe.layer import ExpertParallelMoE
    from .moe.migrate import Migration, apply
    from .moe.parallelize import parallelize

__all__ = [
    "Calibration",
    "CompressionStatistics",
    "ContextCoherentDecoder",
    "DispatchCombineDecoder",
    "ExpertParallelMoE",
    "LSHCompression",
    "Migration",
    "PlacedExperts",
    "apply",
    "calibrate",
    "clip_grad_norm_",
    "exclude_from_ddp",
    "expert_parameters",
    "expert_rows",
    "load_checkpoint",
    "parallelize",
    "save_checkpoint",
]

_MODULE_OF = {
    "CompressionStatistics": ".moe.compression",
    "ContextCoherentDecoder": ".moe.decoder",
    "DispatchCombineDecoder": ".moe.decoder",
    "Calibration": ".calibration.result",
    "ExpertParallelMoE": ".moe.layer",
    "LSHCompression": ".moe.compression",
    "Migration": ".moe.migrate",
    "PlacedExperts": ".moe.experts",
    "apply": ".moe.migrate",
    "calibrate": ".calibration.calibrate",
    "clip_grad_norm_": ".moe.data_parallel",
    "exclude_from_ddp": ".moe.data_parallel",
    "expert_parameters": ".moe.data_parallel",
    "expert_rows": ".moe.data_parallel",
    "load_checkpoint": ".moe.checkpoint",
    "parallelize": ".moe.parallelize",
    "save_checkpoint": ".moe.checkpoint",
}


def __getattr__(name: str) -> Any:
    # These need torch, which exporters do without.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value
    return value
