"""Which targets (devices, nodes) tokens reach, kept up to date while experts move.

Target g is reached with probability 1 - prod_j (1 - w[e_j, g]) over a token's k experts. For O(1) updates the product is
kept in two parts a token and target: how many factors are zero (experts wholly on g), and the product of the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel


@kernel
def reach_change(zeros: int, soft: float, old: float, new: float) -> tuple[float, int, float]:
    """(change of the chance of being reached, zero factors, product) when one factor goes from 1-old to 1-new."""
    before = soft if zeros == 0 else 0.0
    if old >= 1.0:
        zeros -= 1
    else:
        soft /= 1.0 - old
    if new >= 1.0:
        zeros += 1
    else:
        soft *= 1.0 - new
    after = soft if zeros == 0 else 0.0
    return before - after, zeros, soft


@kernel
def fill_state(layer: Any, share: Any, zeros: Any, soft: Any, reach: Any) -> None:
    """Products of a token's factors on every target (device or node), and tokens reaching each target a step."""
    zeros[:] = 0
    soft[:] = 1.0
    reach[:] = 0.0
    for t in range(layer.experts.shape[0]):
        s = layer.step_of[t]
        for j in range(layer.experts.shape[1]):
            e = layer.experts[t, j]
            for g in range(share.shape[1]):
                w = share[e, g]
                if w >= 1.0:
                    zeros[t, g] += 1
                elif w > 0.0:
                    soft[t, g] *= 1.0 - w
        for g in range(share.shape[1]):
            reach[s, g] += 1.0 - (soft[t, g] if zeros[t, g] == 0 else 0.0)


@kernel
def walk(layer: Any, a: int, b: int, old: Any, new: Any, zeros: Any, soft: Any, change: Any, apply: bool) -> None:
    """Changes of `reach` [S, targets] when the rows of experts a and b go from old to new ([2, targets] each).

    b may be -1. With `apply` the token products are updated too.
    """
    targets = old.shape[1]
    touched = np.empty(targets, dtype=np.int64)
    for turn in range(2):
        e = a if turn == 0 else b
        if e < 0:
            continue
        count = 0
        for g in range(targets):
            if old[0, g] != new[0, g] or old[1, g] != new[1, g]:
                touched[count] = g
                count += 1
        for i in range(layer.first[e], layer.first[e + 1]):
            t = layer.tokens[i]
            other = False
            for j in range(layer.experts.shape[1]):
                if layer.experts[t, j] == (b if turn == 0 else a):
                    other = True
            if turn == 1 and other:
                continue
            s = layer.step_of[t]
            for c in range(count):
                g = touched[c]
                z, p = int(zeros[t, g]), soft[t, g]
                total = 0.0
                if old[turn, g] != new[turn, g]:
                    delta, z, p = reach_change(z, p, old[turn, g], new[turn, g])
                    total += delta
                if other and old[1, g] != new[1, g]:
                    delta, z, p = reach_change(z, p, old[1, g], new[1, g])
                    total += delta
                change[s, g] += total
                if apply:
                    zeros[t, g] = z
                    soft[t, g] = p


@kernel
def exchange(
    layer: Any, a: int, b: int, g: int, h: int, zeros: Any, soft: Any, plain: bool, change: Any, apply: bool
) -> None:
    """`walk` for the commonest move: whole expert a goes from target g to h, whole expert b from h to g.

    A token that chose both needs the same targets afterwards. plain: no expert is split, so every product is one.
    """
    for turn in range(2):
        e, other, leave, enter = (a, b, g, h) if turn == 0 else (b, a, h, g)
        for i in range(layer.first[e], layer.first[e + 1]):
            t = layer.tokens[i]
            alone = True
            for j in range(layer.experts.shape[1]):
                alone &= layer.experts[t, j] != other
            s = layer.step_of[t]
            if plain:
                # Without branches: which tokens lose or gain a target is not predictable.
                change[s, leave] -= alone & (zeros[t, leave] == 1)
                change[s, enter] += alone & (zeros[t, enter] == 0)
            elif alone:
                if zeros[t, leave] == 1:
                    change[s, leave] -= soft[t, leave]
                if zeros[t, enter] == 0:
                    change[s, enter] += soft[t, enter]
            if apply and alone:
                zeros[t, leave] -= 1
                zeros[t, enter] += 1


@kernel
def node_rows(rows: Any, node_of: Any, result: Any) -> None:
    result[:] = 0.0
    for r in range(rows.shape[0]):
        for g in range(rows.shape[1]):
            result[r, node_of[g]] += rows[r, g]
        for n in range(result.shape[1]):
            # Thirds and sevenths do not add up to one exactly; whole experts must be recognised as whole.
            if result[r, n] > 1.0 - 1e-9:
                result[r, n] = 1.0
