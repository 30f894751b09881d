"""Traffic and work of one layer whose tokens' homes are known, kept up to date while experts move.

Which device serves an expert depends on the home that asks (`serve_rows`), so an expert has a row a home. Tokens keep
products of missed chances as in `reach`; what they put on links goes to the ledgers of `traffic`: [3, G] and [2, N] a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..jit import kernel
from .moves import idle_chance
from .traffic import post, post_node

# Which targets (devices, nodes) tokens reach, kept up to date while experts move. Target g is reached with
# probability 1 - prod_j (1 - w[e_j, g]) over a token's k experts. For O(1) updates the product is kept in two parts a
# token and target: how many factors are zero (experts wholly on g), and the product of the others.


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


@kernel
def serve_rows(share: Any, node_of: Any, nearest: bool, rows: Any, node_rows: Any) -> None:
    """Fills rows [H, G] and node_rows [H, N] with who serves each home's tokens of an expert with shares [G]."""
    devices = share.shape[0]
    rows[:] = 0.0
    node_rows[:] = 0.0
    for h in range(devices):
        if nearest and share[h] > 0.0:
            rows[h, h] = 1.0
            node_rows[h, node_of[h]] = 1.0
            continue
        inside = 0.0
        if nearest:
            for g in range(devices):
                if node_of[g] == node_of[h]:
                    inside += share[g]
        for g in range(devices):
            if inside == 0.0:
                rows[h, g] = share[g]
            elif node_of[g] == node_of[h]:
                rows[h, g] = share[g] / inside
            node_rows[h, node_of[g]] += rows[h, g]
        for n in range(node_rows.shape[1]):
            # Thirds do not add up to one exactly; whole experts must be recognised as whole.
            if node_rows[h, n] > 1.0 - 1e-9:
                node_rows[h, n] = 1.0


@kernel
def fill_homes(layer: Any, rows: Any, zeros: Any, soft: Any) -> None:
    """Products of a token's missed chances on every target, from rows [E, H, targets]; see `reach.fill_state`."""
    zeros[:] = 0
    soft[:] = 1.0
    for t in range(layer.experts.shape[0]):
        h = layer.home[t]
        for j in range(layer.experts.shape[1]):
            e = layer.experts[t, j]
            for g in range(rows.shape[2]):
                w = rows[e, h, g]
                if w >= 1.0:
                    zeros[t, g] += 1
                elif w > 0.0:
                    soft[t, g] *= 1.0 - w


@kernel
def first_ledgers(
    layer: Any, zeros: Any, soft: Any, node_zeros: Any, node_soft: Any, ledgers: Any, node_ledgers: Any, rates: Any
) -> None:
    """Ledgers [S, 3, G] and [S, 2, N] of all tokens."""
    ledgers[:] = 0.0
    node_ledgers[:] = 0.0
    for t in range(layer.experts.shape[0]):
        s, h = layer.step_of[t], layer.home[t]
        for g in range(zeros.shape[1]):
            chance = 1.0 - (soft[t, g] if zeros[t, g] == 0 else 0.0)
            if chance != 0.0:
                post(ledgers[s], node_ledgers[s], h, g, chance, rates)
        if rates.dedup:
            for n in range(node_zeros.shape[1]):
                chance = 1.0 - (node_soft[t, n] if node_zeros[t, n] == 0 else 0.0)
                if chance != 0.0:
                    post_node(node_ledgers[s], rates.node_of[h], n, chance)


@kernel
def count_split(rows: Any, split: Any, amount: int) -> None:
    """Adds amount to split [H, targets] wherever the rows [H, targets] of an expert are neither 0 nor 1."""
    for h in range(rows.shape[0]):
        for g in range(rows.shape[1]):
            if 0.0 < rows[h, g] < 1.0:
                split[h, g] += amount


@kernel
def walk_homes(
    layer: Any,
    a: int,
    b: int,
    old: Any,
    new: Any,
    products: Any,
    ledgers: Any,
    node_ledgers: Any,
    rates: Any,
    on_nodes: bool,
    apply: bool,
) -> None:
    """Posts what tokens gain and lose when the rows of a and b (or -1) go from old to new ([2, H, targets] each).

    Targets are devices, or nodes (on_nodes; to be called only where copies are merged by node). products: (zero factors
    [T, targets], product of the others [T, targets], experts of split rows [H, targets]). With `apply` the token
    products are updated instead, and nothing is posted.
    """
    zeros, soft, split = products
    homes, targets = old.shape[1], old.shape[2]
    gained = np.zeros(ledgers.shape[0])
    for h in range(homes):
        first, last = layer.first[a * homes + h], layer.first[a * homes + h + 1]
        longest = last - first
        if b >= 0:
            longest = max(longest, layer.first[b * homes + h + 1] - layer.first[b * homes + h])
        changed = (old[0, h] != new[0, h]).any(), (old[1, h] != new[1, h]).any()
        if not (changed[0] or changed[1]):
            continue
        both = np.empty(longest, np.bool_)
        for turn in range(2):
            e, partner = (a, b) if turn == 0 else (b, a)
            if e < 0 or not changed[turn]:
                continue
            first, last = layer.first[e * homes + h], layer.first[e * homes + h + 1]
            for i in range(first, last):
                t = layer.tokens[i]
                found = False
                for j in range(layer.experts.shape[1]):
                    found |= layer.experts[t, j] == partner
                both[i - first] = found
            # A token of both is taken in a's turn, unless only b changes for this home.
            skip = turn == 1 and changed[0]
            for g in range(targets):
                was, is_ = old[turn, h, g], new[turn, h, g]
                other_was, other_is = old[1 - turn, h, g], new[1 - turn, h, g]
                if was == is_ and other_was == other_is:
                    continue
                whole = split[h, g] == 0 and (is_ == 0.0 or is_ == 1.0) and (other_is == 0.0 or other_is == 1.0)
                if whole:
                    _count_whole(
                        layer,
                        first,
                        last,
                        both,
                        skip,
                        int(is_ - was),
                        int(other_is - other_was),
                        g,
                        zeros,
                        gained,
                        apply,
                    )
                else:
                    for i in range(first, last):
                        if both[i - first] and skip:
                            continue
                        t = layer.tokens[i]
                        total, z, p = 0.0, int(zeros[t, g]), soft[t, g]
                        if was != is_:
                            total, z, p = reach_change(z, p, was, is_)
                        if both[i - first] and other_was != other_is:
                            more, z, p = reach_change(z, p, other_was, other_is)
                            total += more
                        gained[layer.step_of[t]] += total
                        if apply:
                            zeros[t, g] = z
                            soft[t, g] = p
                for s in range(gained.shape[0]):
                    if gained[s] != 0.0 and not apply:
                        if on_nodes:
                            post_node(node_ledgers[s], rates.node_of[h], g, gained[s])
                        else:
                            post(ledgers[s], node_ledgers[s], h, g, gained[s], rates)
                    gained[s] = 0.0


@kernel
def _count_whole(
    layer: Any,
    first: int,
    last: int,
    both: Any,
    skip: bool,
    change: int,
    other_change: int,
    g: int,
    zeros: Any,
    gained: Any,
    apply: bool,
) -> None:
    """Tokens that gain or lose target g where nobody is split, by counting: without branches, which nothing predicts."""
    for i in range(first, last):
        t = layer.tokens[i]
        shared = both[i - first]
        z = int(zeros[t, g])
        after = z
        if not (shared and skip):
            after += change + (other_change if shared else 0)
        gained[layer.step_of[t]] += (1.0 if after > 0 else 0.0) - (1.0 if z > 0 else 0.0)
        if apply:
            zeros[t, g] = after


@kernel
def idle_of(layer: Any, e: int, rows: Any, g: int, s: int) -> float:
    """Chance that no token of step s has expert e served on device g, from the expert's rows [H, G]."""
    idle = 1.0
    for h in range(rows.shape[0]):
        if rows[h, g] > 0.0:
            idle *= idle_chance(rows[h, g], layer.counts[e, h, s])
    return idle


@kernel
def first_home_work(layer: Any, rows: Any, load: Any, hit: Any) -> None:
    """Token-expert pairs and experts read on each device [S, G], from rows [E, H, G]."""
    load[:] = 0.0
    hit[:] = 0.0
    for e in range(rows.shape[0]):
        for g in range(rows.shape[2]):
            for s in range(load.shape[0]):
                for h in range(rows.shape[1]):
                    load[s, g] += layer.counts[e, h, s] * rows[e, h, g]
                hit[s, g] += 1.0 - idle_of(layer, e, rows[e], g, s)


@kernel
def shift_home_work(layer: Any, a: int, b: int, old: Any, new: Any, load: Any, hit: Any) -> None:
    """Changes load and hit [S, G] when the rows of a and b (or -1) go from old to new ([2, H, G] each)."""
    homes, devices = old.shape[1], old.shape[2]
    for turn in range(2):
        e = a if turn == 0 else b
        if e < 0:
            continue
        for g in range(devices):
            changed = False
            for h in range(homes):
                shift = new[turn, h, g] - old[turn, h, g]
                if shift != 0.0:
                    changed = True
                    for s in range(load.shape[0]):
                        load[s, g] += layer.counts[e, h, s] * shift
            if changed:
                for s in range(load.shape[0]):
                    hit[s, g] += idle_of(layer, e, old[turn], g, s) - idle_of(layer, e, new[turn], g, s)
