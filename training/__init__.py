"""Training by a plan: records, solves in the background, applies what is decided, while steps go on."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .rebalancer import Rebalancer
    from .trainer import RebalanceCallback

__all__ = ["RebalanceCallback", "Rebalancer"]

_MODULE_OF = {"RebalanceCallback": ".trainer", "Rebalancer": ".rebalancer"}


def __getattr__(name: str) -> Any:
    # The Trainer's callback needs transformers, which plain loops do without.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value
    return value
