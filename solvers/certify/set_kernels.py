"""Compiled loop over sets of experts: the tokens each set reaches, counted as bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel

M1 = np.uint64(0x5555555555555555)
M2 = np.uint64(0x3333333333333333)
M4 = np.uint64(0x0F0F0F0F0F0F0F0F)
H01 = np.uint64(0x0101010101010101)
ONE, TWO, FOUR, TOP = np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(56)


@kernel
def count_reached(chose: Any, led: Any, segment: Any, sets: Any, result: Any) -> None:
    """result[a, q]: tokens of segment q that chose an expert of sets[a] and are led by none of it.

    chose, led: [E, W] a bit a token, by expert. segment: [W] of each word. sets: [A, c], neighbours alike in their first
    experts, whose unions are kept. result: [A, Q] zeros.
    """
    count, size = sets.shape
    words = chose.shape[1]
    any_of = np.zeros((size, words), dtype=np.uint64)
    led_by = np.zeros((size, words), dtype=np.uint64)
    for a in range(count):
        first = 0
        if a > 0:
            while first < size - 1 and sets[a, first] == sets[a - 1, first]:
                first += 1
        for place in range(first, size):
            e = sets[a, place]
            for w in range(words):
                before, led_before = np.uint64(0), np.uint64(0)
                if place > 0:
                    before, led_before = any_of[place - 1, w], led_by[place - 1, w]
                any_of[place, w] = before | chose[e, w]
                led_by[place, w] = led_before | led[e, w]
        for w in range(words):
            x = any_of[size - 1, w] & ~led_by[size - 1, w]
            x -= (x >> ONE) & M1
            x = (x & M2) + ((x >> TWO) & M2)
            x = (x + (x >> FOUR)) & M4
            result[a, segment[w]] += np.int64((x * H01) >> TOP)
