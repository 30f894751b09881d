"""Applies a plan: a distributed MoE layer, migration, checkpoints, permuted weights, exports for engines."""

from .._lazy import attach_stub as _attach_stub

# These need torch, which exporters do without: see the stub beside this file.
__getattr__, __dir__, __all__ = _attach_stub(__name__, __file__)
