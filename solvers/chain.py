"""Exact placement of models with few placements a layer."""

from __future__ import annotations

from .viterbi import cheapest_path

__all__ = ["cheapest_path"]
