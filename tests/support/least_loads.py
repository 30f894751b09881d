"""The least that the largest device load of a step can be, to hold divisions of tokens against."""

from __future__ import annotations

import numpy as np

from moeplace._types import BoolArray, IntArray
from moeplace.placement import division


def set_tokens(counts: IntArray, hosts: BoolArray) -> IntArray:
    """[S, 2^G] tokens of experts whose replicas all stand on devices of each set; set i has the devices of i's bits.

    counts: [S, E] tokens that chose each expert. hosts: [E, G] devices with a replica.
    """
    bits = 1 << np.arange(hosts.shape[1])
    inside = (hosts @ bits)[:, None] & ~np.arange(1 << hosts.shape[1]) == 0
    return np.asarray(counts @ inside)


def least_largest_load(counts: IntArray, hosts: BoolArray) -> IntArray:
    """[S] a lower bound, however tokens are divided; reached up to `SETS_UP_TO` devices. Arguments of `set_tokens`."""
    devices = hosts.shape[1]
    if devices <= division.SETS_UP_TO:
        size = ((np.arange(1 << devices)[:, None] >> np.arange(devices)) & 1).sum(axis=1)
        return np.asarray((-(-set_tokens(counts, hosts)[:, 1:] // size[1:])).max(axis=1))
    loads = division._filled(counts, hosts).sum(axis=1)
    return np.array([division._proven(row, hosts, load) for row, load in zip(counts, loads, strict=True)])
