"""Applies a plan: a distributed MoE layer, migration, checkpoints, permuted weights, exports for engines."""

import lazy_loader as _lazy

# These need torch, which exporters do without: see the stub beside this file.
__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
