"""Traffic and work of one layer whose tokens' source ranks are known: replicas near the token pay here.

Which device serves an expert depends on the source that asks (`serve_rows`), so an expert has a row a source. Tokens
keep products of missed chances as in `even_traffic`; what they put on links goes to ledgers of sums a link, [3, G] and
[2, N] a step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.jit import kernel
from .device_work import (
    DivisionState,
    begin_division,
    compute_seconds,
    divide_steps,
    idle_chance,
    keep_division,
    post,
    post_node,
    transfer_seconds,
)
from .even_traffic import coverage_change
from .moves import Change, Counts, Placement, Rates, SourceTokens, copy, copy_all


class SourceState(NamedTuple):
    """What is known of a placement and, from `old_rows` on, of a change. H sources, as many as devices.

    rows: [E, H, G], node_rows: [E, H, N] who serves each expert. zeros, soft: [T, G] factors of tokens' products on
    devices, node_zeros, node_soft: [T, N] on nodes. split: [H, G], node_split: [H, N] experts whose rows are neither 0
    nor 1 there. ledgers: [S, 3, G]. node_ledgers: [S, 2, N]. load, hit: [S, G]. cost: [S] seconds.
    division: where steps are divided, what makes `load`; asked: [S, G] what devices would compute by `rows` then,
    movable: [S, G] of it, that of experts with replicas on other devices of the node, and living: [S, G] tokens that
    live on each, of no steps where nothing is spilled; part: of the tokens, those walked over. spilled, node_spilled:
    [3, G], [2, N] a step's ledgers with what is spilled.
    """

    rows: FloatArray
    node_rows: FloatArray
    zeros: Counts
    soft: FloatArray
    node_zeros: Counts
    node_soft: FloatArray
    split: IntArray
    node_split: IntArray
    ledgers: FloatArray
    node_ledgers: FloatArray
    load: FloatArray
    hit: FloatArray
    cost: FloatArray
    division: DivisionState
    asked: FloatArray
    movable: FloatArray
    living: FloatArray
    part: float
    spilled: FloatArray
    node_spilled: FloatArray
    old_rows: FloatArray
    new_rows: FloatArray
    old_node_rows: FloatArray
    new_node_rows: FloatArray
    new_ledgers: FloatArray
    new_node_ledgers: FloatArray
    new_load: FloatArray
    new_asked: FloatArray
    new_movable: FloatArray
    new_hit: FloatArray
    new_cost: FloatArray


def begin(tokens: SourceTokens, rates: Rates, placement: Placement) -> SourceState:
    """The state of a placement."""
    share = placement.share
    experts, devices = share.shape
    nodes, steps, count = rates.node_size.shape[0], tokens.counts.shape[2], tokens.experts.shape[0]
    rows, node_rows = np.zeros((experts, devices, devices)), np.zeros((experts, devices, nodes))
    for e in range(experts):
        serve_rows(share[e], rates.node_of, tokens.nearest, rows[e], node_rows[e])
    zeros, node_zeros = np.zeros((count, devices), np.uint8), np.zeros((count, nodes), np.uint8)
    soft, node_soft = np.ones((count, devices)), np.ones((count, nodes))
    split, node_split = np.zeros((devices, devices), np.int64), np.zeros((devices, nodes), np.int64)
    for e in range(experts):
        count_split(rows[e], split, 1)
        count_split(node_rows[e], node_split, 1)
    fill_sources(tokens, rows, zeros, soft)
    fill_sources(tokens, node_rows, node_zeros, node_soft)
    ledgers, node_ledgers = np.zeros((steps, 3, devices)), np.zeros((steps, 2, nodes))
    first_ledgers(tokens, zeros, soft, node_zeros, node_soft, ledgers, node_ledgers, rates)
    for e in range(experts):
        post_pairs(tokens, e, rows[e], 1.0, ledgers, node_ledgers, rates)
    load, hit = np.zeros((steps, devices)), np.zeros((steps, devices))
    first_source_work(tokens, rows, load, hit)
    counts = np.zeros((experts, steps if tokens.divided else 0))
    for e in range(experts):
        for h in range(devices):
            for s in range(counts.shape[1]):
                counts[e, s] += tokens.counts[e, h, s]
    division = begin_division(counts, placement)
    # Who takes a replica by chance sends no copies more by how a step is divided.
    spilling = steps if tokens.divided and tokens.nearest else 0
    asked, living = np.zeros((spilling, devices)), np.zeros((spilling, devices))
    copy_all(load[:spilling], asked)
    movable = np.zeros((spilling, devices))
    for e in range(experts):
        shift_movable(tokens, e, rows[e], 1.0, rates, movable)
    for s in range(spilling):
        for h in range(devices):
            for e in range(experts):
                living[s, h] += tokens.counts[e, h, s] / tokens.experts.shape[1]
    if tokens.divided:
        divide_steps(division, placement, Change(0, 0, 0, 0, 0), load)
        keep_division(division, Change(0, 0, 0, 0, 0))
    cost = np.empty(steps)
    state = SourceState(
        rows,
        node_rows,
        zeros,
        soft,
        node_zeros,
        node_soft,
        split,
        node_split,
        ledgers,
        node_ledgers,
        load,
        hit,
        cost,
        division,
        asked,
        movable,
        living,
        tokens.part,
        np.zeros((3, devices)),
        np.zeros((2, nodes)),
        np.zeros((2, devices, devices)),
        np.zeros((2, devices, devices)),
        np.zeros((2, devices, nodes)),
        np.zeros((2, devices, nodes)),
        np.zeros((steps, 3, devices)),
        np.zeros((steps, 2, nodes)),
        np.zeros((steps, devices)),
        asked.copy(),
        movable.copy(),
        np.zeros((steps, devices)),
        np.zeros(steps),
    )
    for s in range(steps):
        cost[s] = step_seconds(state, s, load[s], hit[s], ledgers[s], node_ledgers[s], asked, movable, rates)
    return state


def delta(
    state: SourceState, tokens: SourceTokens, rates: Rates, placement: Placement, change: Change, new: FloatArray
) -> None:
    """Prices a change into `state.new_cost`. new: [2, G] shares of its experts."""
    for turn in range(2):
        e = change.a if turn == 0 else change.b
        if e < 0:
            state.old_rows[turn] = 0.0
            state.old_node_rows[turn] = 0.0
            state.new_rows[turn] = 0.0
            state.new_node_rows[turn] = 0.0
        else:
            copy_all(state.rows[e], state.old_rows[turn])
            copy_all(state.node_rows[e], state.old_node_rows[turn])
            serve_rows(new[turn], rates.node_of, tokens.nearest, state.new_rows[turn], state.new_node_rows[turn])
    copy_all(state.ledgers, state.new_ledgers)
    copy_all(state.node_ledgers, state.new_node_ledgers)
    copy_all(state.load, state.new_load)
    copy_all(state.hit, state.new_hit)
    _follow(state, tokens, rates, change, False)
    for turn in range(2):
        e = change.a if turn == 0 else change.b
        if e >= 0:
            post_pairs(tokens, e, state.old_rows[turn], -1.0, state.new_ledgers, state.new_node_ledgers, rates)
            post_pairs(tokens, e, state.new_rows[turn], 1.0, state.new_ledgers, state.new_node_ledgers, rates)
    copy_all(state.asked, state.new_asked)
    copy_all(state.movable, state.new_movable)
    for turn in range(2):
        e = change.a if turn == 0 else change.b
        if e >= 0:
            shift_movable(tokens, e, state.old_rows[turn], -1.0, rates, state.new_movable)
            shift_movable(tokens, e, state.new_rows[turn], 1.0, rates, state.new_movable)
    by_rows = state.new_asked if state.asked.shape[0] > 0 else state.new_load
    shift_source_work(tokens, change.a, change.b, state.old_rows, state.new_rows, by_rows, state.new_hit)
    if tokens.divided:
        divide_steps(state.division, placement, change, state.new_load)
    for s in range(state.cost.shape[0]):
        ledger, node_ledger = state.new_ledgers[s], state.new_node_ledgers[s]
        state.new_cost[s] = step_seconds(
            state,
            s,
            state.new_load[s],
            state.new_hit[s],
            ledger,
            node_ledger,
            state.new_asked,
            state.new_movable,
            rates,
        )


def commit(
    state: SourceState, tokens: SourceTokens, rates: Rates, placement: Placement, change: Change, new: FloatArray
) -> None:
    """Keeps a change that `delta` has priced; the placement is still the old one."""
    _follow(state, tokens, rates, change, True)
    if tokens.divided:
        keep_division(state.division, change)
    for turn in range(2):
        e = change.a if turn == 0 else change.b
        if e >= 0:
            count_split(state.old_rows[turn], state.split, -1)
            count_split(state.new_rows[turn], state.split, 1)
            count_split(state.old_node_rows[turn], state.node_split, -1)
            count_split(state.new_node_rows[turn], state.node_split, 1)
            copy_all(state.new_rows[turn], state.rows[e])
            copy_all(state.new_node_rows[turn], state.node_rows[e])
    copy_all(state.new_ledgers, state.ledgers)
    copy_all(state.new_node_ledgers, state.node_ledgers)
    copy_all(state.new_load, state.load)
    copy_all(state.new_asked, state.asked)
    copy_all(state.new_movable, state.movable)
    copy_all(state.new_hit, state.hit)
    copy(state.new_cost, state.cost)


def rollback(
    state: SourceState, tokens: SourceTokens, rates: Rates, placement: Placement, change: Change, new: FloatArray
) -> None:
    """Drops a change: pricing has left the state alone."""


@kernel
def _follow(state: SourceState, tokens: SourceTokens, rates: Rates, change: Change, apply: bool) -> None:
    """Posts what a change does to traffic, or with `apply` updates the tokens' products."""
    merged = False
    for kind in range(rates.dedup.shape[0]):
        merged |= rates.dedup[kind]
    # In a loop, not in two calls: those would be compiled for each constant.
    for on_nodes in (False, True):
        if on_nodes and not merged:
            continue
        products = (state.zeros, state.soft, state.split)
        rows, new_rows = state.old_rows, state.new_rows
        if on_nodes:
            products = (state.node_zeros, state.node_soft, state.node_split)
            rows, new_rows = state.old_node_rows, state.new_node_rows
        ledgers, node_ledgers = state.new_ledgers, state.new_node_ledgers
        walk_sources(
            tokens, change.a, change.b, rows, new_rows, products, ledgers, node_ledgers, rates, on_nodes, apply
        )


@kernel
def step_seconds(
    state: SourceState,
    s: int,
    load: FloatArray,
    hit: FloatArray,
    ledger: FloatArray,
    node_ledger: FloatArray,
    asked: FloatArray,
    movable: FloatArray,
    rates: Rates,
) -> float:
    """Of step s in one layer, what no plan changes left out. asked, movable: [S, G], of no steps where nothing is
    spilled."""
    kind = rates.kind[s]
    if asked.shape[0] > 0:
        copy_all(ledger, state.spilled)
        copy_all(node_ledger, state.node_spilled)
        part = 1.0 if rates.pairs[kind] else state.part
        spill(asked[s], movable[s], load, state.living[s], part, state.spilled, state.node_spilled, rates, kind)
        ledger, node_ledger = state.spilled, state.node_spilled
    transfer = transfer_seconds(ledger, node_ledger, rates, kind)
    return compute_seconds(load, hit, rates) + (1.0 + rates.back[kind]) * transfer


@kernel
def shift_movable(
    layer: SourceTokens, e: int, rows: FloatArray, times: float, rates: Rates, movable: FloatArray
) -> None:
    """Adds so many times the pairs [S, G] that devices are asked for of an expert with rows [H, G], where other devices
    of the node have replicas of it."""
    if movable.shape[0] == 0:
        return
    for g in range(rows.shape[1]):
        # A device that has a replica serves its own tokens.
        beside = False
        for h in range(rows.shape[0]):
            beside |= h != g and rows[h, h] > 0.0 and rates.node_of[h] == rates.node_of[g]
        if beside and rows[g, g] > 0.0:
            for h in range(rows.shape[0]):
                if rows[h, g] != 0.0:
                    for s in range(movable.shape[0]):
                        movable[s, g] += times * layer.counts[e, h, s] * rows[h, g]


@kernel
def spill(
    asked: FloatArray,
    movable: FloatArray,
    load: FloatArray,
    living: FloatArray,
    part: float,
    ledger: FloatArray,
    node_ledger: FloatArray,
    rates: Rates,
    kind: int,
) -> None:
    """Adds to a step's ledgers what devices are asked for ([G] token-expert pairs) beyond the largest load [G] of its
    division: what the node's devices have replicas of goes to these as far as they have room, and all else to where
    room is left, by way of other nodes.

    Where a token's copies are merged, it may have one there already, as often as tokens of its node have. part: of the
    tokens asked for, those that the ledgers count.
    """
    devices, nodes = asked.shape[0], rates.node_size.shape[0]
    top = 0.0
    for g in range(devices):
        top = max(top, load[g])
    away, room, inside = np.zeros(nodes), np.zeros(nodes), np.zeros(nodes)
    away_all, room_all, first = 0.0, 0.0, 0
    for n in range(nodes):
        last = first + int(rates.node_size[n])
        tokens, sent, over, near = 0.0, 0.0, 0.0, 0.0
        for g in range(first, last):
            over += max(asked[g] - top, 0.0)
            near += min(max(asked[g] - top, 0.0), movable[g])
            room[n] += max(top - asked[g], 0.0)
            tokens += part * living[g]
            sent += ledger[0, g]
        if nodes == 1:
            near = over
        inside[n] = min(near, room[n])
        if inside[n] > 0.0:
            new = part * inside[n]
            if not rates.pairs[kind] and tokens > 0.0:
                new *= 1.0 - min(sent / (tokens * (last - first - 1)), 1.0)
            for g in range(first, last):
                ledger[0, g] += new * max(asked[g] - top, 0.0) / over
                ledger[1, g] += new * max(top - asked[g], 0.0) / room[n]
        if nodes == 1:
            return
        away[n] = part * (over - inside[n])
        if away[n] > 0.0 and rates.dedup[kind] and tokens > 0.0:
            away[n] *= 1.0 - min(node_ledger[0, n] / (tokens * (nodes - 1)), 1.0)
        away_all += away[n]
        room_all += room[n] - inside[n]
        first = last
    if away_all == 0.0 or room_all == 0.0:
        return
    # What ends on its own node has pushed as much off another.
    back_all = 0.0
    for n in range(nodes):
        back_all += away[n] * (room[n] - inside[n]) / room_all
    for n in range(nodes):
        through = (back_all - away[n] * (room[n] - inside[n]) / room_all) / (nodes - 1)
        node_ledger[0, n] += away[n] + through
        node_ledger[1, n] += away_all * (room[n] - inside[n]) / room_all + through
    for g in range(devices):
        n = rates.node_of[g]
        if rates.dedup[kind] and room[n] > 0.0:
            ledger[2, g] += away_all * (room[n] - inside[n]) / room_all * max(top - asked[g], 0.0) / room[n]


@kernel
def serve_rows(share: FloatArray, node_of: IntArray, nearest: bool, rows: FloatArray, node_rows: FloatArray) -> None:
    """Fills rows [H, G] and node_rows [H, N] with who serves each source's tokens of an expert with shares [G]."""
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
def fill_sources(layer: SourceTokens, rows: FloatArray, zeros: Counts, soft: FloatArray) -> None:
    """Products of a token's missed chances on every target, from rows [E, H, targets]; see
    `even_traffic.fill_coverage`."""
    zeros[:] = 0
    soft[:] = 1.0
    for t in range(layer.experts.shape[0]):
        h = layer.source[t]
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
    layer: SourceTokens,
    zeros: Counts,
    soft: FloatArray,
    node_zeros: Counts,
    node_soft: FloatArray,
    ledgers: FloatArray,
    node_ledgers: FloatArray,
    rates: Rates,
) -> None:
    """Ledgers [S, 3, G] and [S, 2, N] of all tokens, of steps whose copies go to devices."""
    ledgers[:] = 0.0
    node_ledgers[:] = 0.0
    for t in range(layer.experts.shape[0]):
        s, h = layer.step_of[t], layer.source[t]
        kind = rates.kind[s]
        if rates.pairs[kind]:
            continue
        for g in range(zeros.shape[1]):
            chance = 1.0 - (soft[t, g] if zeros[t, g] == 0 else 0.0)
            if chance != 0.0:
                post(ledgers[s], node_ledgers[s], h, g, chance, rates, rates.dedup[kind])
        if rates.dedup[kind]:
            for n in range(node_zeros.shape[1]):
                chance = 1.0 - (node_soft[t, n] if node_zeros[t, n] == 0 else 0.0)
                if chance != 0.0:
                    post_node(node_ledgers[s], rates.node_of[h], n, chance)


@kernel
def post_pairs(
    layer: SourceTokens,
    e: int,
    rows: FloatArray,
    times: float,
    ledgers: FloatArray,
    node_ledgers: FloatArray,
    rates: Rates,
) -> None:
    """Posts so many times the pairs of an expert by who serves them, rows [H, G], in steps whose copies go to
    experts."""
    for s in range(ledgers.shape[0]):
        kind = rates.kind[s]
        if not rates.pairs[kind]:
            continue
        for h in range(rows.shape[0]):
            count = times * layer.counts[e, h, s]
            if count == 0.0:
                continue
            for g in range(rows.shape[1]):
                if rows[h, g] != 0.0:
                    post(ledgers[s], node_ledgers[s], h, g, count * rows[h, g], rates, False)


@kernel
def count_split(rows: FloatArray, split: IntArray, amount: int) -> None:
    """Adds amount to split [H, targets] wherever the rows [H, targets] of an expert are neither 0 nor 1."""
    for h in range(rows.shape[0]):
        for g in range(rows.shape[1]):
            if 0.0 < rows[h, g] < 1.0:
                split[h, g] += amount


@kernel
def walk_sources(
    layer: SourceTokens,
    a: int,
    b: int,
    old: FloatArray,
    new: FloatArray,
    products: tuple[Counts, FloatArray, IntArray],
    ledgers: FloatArray,
    node_ledgers: FloatArray,
    rates: Rates,
    on_nodes: bool,
    apply: bool,
) -> None:
    """Posts what tokens gain and lose when the rows of a and b (or -1) go from old to new ([2, H, targets] each).

    Targets are devices, or nodes (on_nodes; to be called only where copies are merged by node). products: (zero factors
    [T, targets], product of the others [T, targets], experts of split rows [H, targets]). With `apply` the token
    products are updated instead, and nothing is posted.
    """
    zeros, soft, split = products
    sources, targets = old.shape[1], old.shape[2]
    gained = np.zeros(ledgers.shape[0])
    for h in range(sources):
        first, last = layer.first[a * sources + h], layer.first[a * sources + h + 1]
        longest = last - first
        if b >= 0:
            longest = max(longest, layer.first[b * sources + h + 1] - layer.first[b * sources + h])
        changed = _differ(old[0, h], new[0, h]), _differ(old[1, h], new[1, h])
        if not (changed[0] or changed[1]):
            continue
        both = np.empty(longest, np.bool_)
        for turn in range(2):
            e, partner = (a, b) if turn == 0 else (b, a)
            if e < 0 or not changed[turn]:
                continue
            first, last = layer.first[e * sources + h], layer.first[e * sources + h + 1]
            for i in range(first, last):
                t = layer.tokens[i]
                chose_both = False
                for j in range(layer.experts.shape[1]):
                    chose_both |= layer.experts[t, j] == partner
                both[i - first] = chose_both
            # A token of both is taken in a's turn, unless only b changes for this source.
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
                            total, z, p = coverage_change(z, p, was, is_)
                        if both[i - first] and other_was != other_is:
                            more, z, p = coverage_change(z, p, other_was, other_is)
                            total += more
                        gained[layer.step_of[t]] += total
                        if apply:
                            zeros[t, g] = z
                            soft[t, g] = p
                for s in range(gained.shape[0]):
                    kind = rates.kind[s]
                    if gained[s] != 0.0 and not apply and not rates.pairs[kind]:
                        if not on_nodes:
                            post(ledgers[s], node_ledgers[s], h, g, gained[s], rates, rates.dedup[kind])
                        elif rates.dedup[kind]:
                            post_node(node_ledgers[s], rates.node_of[h], g, gained[s])
                    gained[s] = 0.0


@kernel
def _differ(row: FloatArray, other: FloatArray) -> bool:
    differ = False
    for g in range(row.shape[0]):
        differ |= row[g] != other[g]
    return differ


@kernel
def _count_whole(
    layer: SourceTokens,
    first: int,
    last: int,
    both: BoolArray,
    skip: bool,
    change: int,
    other_change: int,
    g: int,
    zeros: Counts,
    gained: FloatArray,
    apply: bool,
) -> None:
    """Tokens that gain or lose target g where nobody is split, by counting: without branches, which nothing
    predicts."""
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
def idle_of(layer: SourceTokens, e: int, rows: FloatArray, g: int, s: int) -> float:
    """Chance that no token of step s has expert e served on device g, from the expert's rows [H, G]."""
    idle = 1.0
    for h in range(rows.shape[0]):
        if rows[h, g] > 0.0:
            idle *= idle_chance(rows[h, g], layer.counts[e, h, s])
    return idle


@kernel
def first_source_work(layer: SourceTokens, rows: FloatArray, load: FloatArray, hit: FloatArray) -> None:
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
def shift_source_work(
    layer: SourceTokens, a: int, b: int, old: FloatArray, new: FloatArray, load: FloatArray, hit: FloatArray
) -> None:
    """Changes load and hit [S, G] when the rows of a and b (or -1) go from old to new ([2, H, G] each)."""
    sources, devices = old.shape[1], old.shape[2]
    for turn in range(2):
        e = a if turn == 0 else b
        if e < 0:
            continue
        for g in range(devices):
            changed = False
            for h in range(sources):
                shift = new[turn, h, g] - old[turn, h, g]
                if shift != 0.0:
                    changed = True
                    for s in range(load.shape[0]):
                        load[s, g] += layer.counts[e, h, s] * shift
            if changed:
                for s in range(load.shape[0]):
                    hit[s, g] += idle_of(layer, e, old[turn], g, s) - idle_of(layer, e, new[turn], g, s)
