"""Traffic of one layer whose tokens live evenly on all ranks: which devices and nodes they cover.

Target g (a device, or a node) is covered with probability 1 - prod_j (1 - w[e_j, g]) over a token's k experts. For O(1)
updates the product is kept in two parts a token and target: how many factors are zero (experts wholly on g), and the
product of the others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.jit import kernel
from .device_work import compute_seconds, first_work, shift_work
from .moves import Change, Counts, LayerTokens, Placement, Rates, copy, copy_all


class EvenState(NamedTuple):
    """What is known of a placement and, from `old` on, of a change.

    zeros, soft: [T, G] factors of tokens' products on devices, node_zeros, node_soft: [T, N] on nodes. coverage: [S,
    G], node_coverage: [S, N] tokens that cover each. load, hit: [S, G]. cost: [S] seconds. plain: no expert is split.
    """

    zeros: Counts
    soft: FloatArray
    node_zeros: Counts
    node_soft: FloatArray
    coverage: FloatArray
    node_coverage: FloatArray
    load: FloatArray
    hit: FloatArray
    cost: FloatArray
    plain: bool
    old: FloatArray
    node_old: FloatArray
    node_new: FloatArray
    d_coverage: FloatArray
    d_node_coverage: FloatArray
    new_coverage: FloatArray
    new_node_coverage: FloatArray
    new_load: FloatArray
    new_hit: FloatArray
    new_cost: FloatArray


def begin(tokens: LayerTokens, rates: Rates, placement: Placement) -> EvenState:
    """The state of a placement."""
    share = placement.share
    experts, devices = share.shape
    nodes, steps, count = rates.node_size.shape[0], tokens.counts.shape[0], tokens.experts.shape[0]
    node_share = np.zeros((experts, nodes))
    node_rows(share, rates.node_of, node_share)
    zeros, node_zeros = np.zeros((count, devices), np.uint8), np.zeros((count, nodes), np.uint8)
    soft, node_soft = np.ones((count, devices)), np.ones((count, nodes))
    coverage, node_coverage = np.zeros((steps, devices)), np.zeros((steps, nodes))
    fill_coverage(tokens, share, zeros, soft, coverage)
    fill_coverage(tokens, node_share, node_zeros, node_soft, node_coverage)
    load, hit = first_work(tokens, share, placement.slot_at)
    cost = np.empty(steps)
    for s in range(steps):
        cost[s] = step_seconds(coverage[s], node_coverage[s], load[s], hit[s], rates, rates.kind[s])
    plain = placement.slot_expert.shape[0] == experts
    return EvenState(
        zeros,
        soft,
        node_zeros,
        node_soft,
        coverage,
        node_coverage,
        load,
        hit,
        cost,
        plain,
        np.zeros((2, devices)),
        np.zeros((2, nodes)),
        np.zeros((2, nodes)),
        np.zeros((steps, devices)),
        np.zeros((steps, nodes)),
        np.zeros(devices),
        np.zeros(nodes),
        np.zeros((steps, devices)),
        np.zeros((steps, devices)),
        np.zeros(steps),
    )


def delta(
    state: EvenState, tokens: LayerTokens, rates: Rates, placement: Placement, change: Change, new: FloatArray
) -> None:
    """Prices a change into `state.new_cost`. new: [2, G] shares of its experts."""
    a, b = change.a, change.b
    copy(placement.share[a], state.old[0])
    if b >= 0:
        copy(placement.share[b], state.old[1])
    else:
        state.old[1] = 0.0
    state.d_coverage[:] = 0.0
    state.d_node_coverage[:] = 0.0
    _follow(state, tokens, rates, placement, change, new, False)
    copy_all(state.load, state.new_load)
    copy_all(state.hit, state.new_hit)
    shift_work(tokens, a, b, state.old, new, state.new_load, state.new_hit)
    for s in range(state.cost.shape[0]):
        _sum(state.coverage[s], state.d_coverage[s], state.new_coverage)
        _sum(state.node_coverage[s], state.d_node_coverage[s], state.new_node_coverage)
        state.new_cost[s] = step_seconds(
            state.new_coverage, state.new_node_coverage, state.new_load[s], state.new_hit[s], rates, rates.kind[s]
        )


def commit(
    state: EvenState, tokens: LayerTokens, rates: Rates, placement: Placement, change: Change, new: FloatArray
) -> None:
    """Keeps a change that `delta` has priced; the placement is still the old one."""
    _follow(state, tokens, rates, placement, change, new, True)
    # Applying added the same changes a second time.
    _add_half(state.d_coverage, state.coverage)
    _add_half(state.d_node_coverage, state.node_coverage)
    copy_all(state.new_load, state.load)
    copy_all(state.new_hit, state.hit)
    copy(state.new_cost, state.cost)


def rollback(
    state: EvenState, tokens: LayerTokens, rates: Rates, placement: Placement, change: Change, new: FloatArray
) -> None:
    """Drops a change: pricing has left the state alone."""


@kernel
def _follow(
    state: EvenState,
    tokens: LayerTokens,
    rates: Rates,
    placement: Placement,
    change: Change,
    new: FloatArray,
    apply: bool,
) -> None:
    """Adds what a change does to coverage, and with `apply` to the tokens' products."""
    kind, p, q, a, b = change
    g, h = placement.slot_device[p], placement.slot_device[max(q, 0)]
    m, n = rates.node_of[g], rates.node_of[h]
    if kind == 1 and placement.share[a, g] >= 1.0 and placement.share[b, h] >= 1.0:
        exchange(tokens, a, b, g, h, state.zeros, state.soft, state.plain, state.d_coverage, apply)
        if m != n:
            exchange(tokens, a, b, m, n, state.node_zeros, state.node_soft, state.plain, state.d_node_coverage, apply)
    else:
        if not apply:
            node_rows(state.old, rates.node_of, state.node_old)
            node_rows(new, rates.node_of, state.node_new)
        walk(tokens, a, b, state.old, new, state.zeros, state.soft, state.d_coverage, apply)
        walk(
            tokens,
            a,
            b,
            state.node_old,
            state.node_new,
            state.node_zeros,
            state.node_soft,
            state.d_node_coverage,
            apply,
        )


@kernel
def _sum(first: FloatArray, second: FloatArray, total: FloatArray) -> None:
    for g in range(total.shape[0]):
        total[g] = first[g] + second[g]


@kernel
def _add_half(source: FloatArray, target: FloatArray) -> None:
    for s in range(source.shape[0]):
        for g in range(source.shape[1]):
            target[s, g] += 0.5 * source[s, g]


@kernel
def step_seconds(
    covered: FloatArray, node_coverage: FloatArray, load: FloatArray, hit: FloatArray, rates: Rates, kind: int
) -> float:
    """Of one step in one layer, what no plan changes left out: compute and both transfers.

    covered: [G] tokens that need each device; where copies go to every expert of a token, its load takes their place.
    """
    coverage, dedup = load if rates.pairs[kind] else covered, rates.dedup[kind]
    devices, nodes = load.shape[0], node_coverage.shape[0]
    transfer = 0.0
    total_in_node = 0.0
    total_node_coverage = 0.0
    for n in range(nodes):
        total_node_coverage += node_coverage[n]
    for g in range(devices):
        total_in_node += coverage[g]
    first = 0
    for n in range(nodes):
        size = rates.node_size[n]
        last = first + int(size)
        in_node = 0.0
        for g in range(first, last):
            in_node += coverage[g]
        split = size if dedup else float(devices)
        for g in range(first, last):
            crossing = max(coverage[g] * (size - 1.0), in_node - coverage[g]) / split
            transfer = max(transfer, crossing * rates.per_copy[kind, g])
        entering, everywhere = (node_coverage[n], total_node_coverage) if dedup else (in_node, total_in_node)
        share = size / devices
        crossing = max(entering * (1.0 - share), (everywhere - entering) * share)
        transfer = max(transfer, crossing * rates.per_node_copy[kind, n])
        first = last
    return compute_seconds(load, hit, rates) + (1.0 + rates.back[kind]) * transfer


@kernel
def coverage_change(zeros: int, soft: float, old: float, new: float) -> tuple[float, int, float]:
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
def fill_coverage(layer: LayerTokens, share: FloatArray, zeros: Counts, soft: FloatArray, coverage: FloatArray) -> None:
    """Products of a token's factors on every target (device or node), and tokens reaching each target a step."""
    zeros[:] = 0
    soft[:] = 1.0
    coverage[:] = 0.0
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
            coverage[s, g] += 1.0 - (soft[t, g] if zeros[t, g] == 0 else 0.0)


@kernel
def walk(
    layer: LayerTokens,
    a: int,
    b: int,
    old: FloatArray,
    new: FloatArray,
    zeros: Counts,
    soft: FloatArray,
    change: FloatArray,
    apply: bool,
) -> None:
    """Changes of `coverage` [S, targets] when the rows of experts a and b go from old to new ([2, targets] each).

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
                    delta, z, p = coverage_change(z, p, old[turn, g], new[turn, g])
                    total += delta
                if other and old[1, g] != new[1, g]:
                    delta, z, p = coverage_change(z, p, old[1, g], new[1, g])
                    total += delta
                change[s, g] += total
                if apply:
                    zeros[t, g] = z
                    soft[t, g] = p


@kernel
def exchange(
    layer: LayerTokens,
    a: int,
    b: int,
    g: int,
    h: int,
    zeros: Counts,
    soft: FloatArray,
    plain: bool,
    change: FloatArray,
    apply: bool,
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
def node_rows(rows: FloatArray, node_of: IntArray, result: FloatArray) -> None:
    """Sums the shares [R, G] of each node's devices into `result` [R, N]."""
    result[:] = 0.0
    for r in range(rows.shape[0]):
        for g in range(rows.shape[1]):
            result[r, node_of[g]] += rows[r, g]
        for n in range(result.shape[1]):
            # Thirds and sevenths do not add up to one exactly; whole experts must be recognised as whole.
            if result[r, n] > 1.0 - 1e-9:
                result[r, n] = 1.0
