"""The least that the largest device load of a step can be, to hold divisions of tokens against."""

from __future__ import annotations

from moeplace._types import BoolArray, IntArray
from moeplace.placement import division


def least_largest_load(counts: IntArray, hosts: BoolArray) -> IntArray:
    """[S] a lower bound, however tokens are divided; reached up to `SETS_UP_TO` devices.

    counts: [S, E] tokens that chose each expert. hosts: [E, G] devices with a replica.
    """
    if hosts.shape[1] <= division.SETS_UP_TO:
        return division._largest_of_sets(division.set_tokens(counts, hosts), hosts.shape[1])
    return division._proven(counts, hosts, division._filled(counts, hosts).sum(axis=1))
