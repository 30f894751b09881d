"""Counting routing block by block in bounded memory."""

from __future__ import annotations
