"""Readers of what engines record: one file an engine."""
