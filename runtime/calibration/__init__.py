"""Measures the cluster that ranks run on."""
