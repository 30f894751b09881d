"""Experts copied for one microbatch: which expert each rank's spare slots take, and who computes how many tokens.

Every expert has a home, a rank that keeps its weights. Before a layer's tokens are sent, hot experts are copied into
spare slots of ranks with little to do, and their tokens are divided among home and copies, so that no rank has more
than a target. The plan is made from the microbatch's own counts, which every rank knows, and is the same on all of
them.

Homes in index order waste copies: `Objective(online=...)` places them so that few are needed.

Shapes: L layers, R ranks, E experts, S spare slots a rank, H source ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .._arguments import check_types
from .._types import BoolArray, IntArray
from .errors import InputError
from .jit import kernel
from .objective import SLACK

Int32Array = npt.NDArray[np.int32]

MOST_SLOTS = 65_536
TRIES = 7
"""Targets tried, at most, where the first cannot be kept with the spare slots there are."""


@dataclass(frozen=True, eq=False)
class OnlinePlan:
    """What is copied where for one microbatch, and the division of its tokens.

    experts: [L, R, S] logical expert in each spare slot, -1 unused. quotas: [L, E, R] token-expert pairs of each expert
    that each rank computes; all at home but for what its copies take. homes: [L, E] home rank of each expert.
    """

    experts: Int32Array
    quotas: Int32Array
    homes: IntArray

    @property
    def loads(self) -> IntArray:
        """[L, R] token-expert pairs that each rank computes."""
        return np.asarray(self.quotas.sum(axis=1, dtype=np.int64))

    @property
    def copies(self) -> IntArray:
        """[L] experts copied."""
        return np.asarray((self.experts >= 0).sum(axis=(1, 2)))

    def redundancy_mapping(self, layer: int, table: npt.ArrayLike, ranks: npt.ArrayLike | None = None) -> Int32Array:
        """[ranks of the NVLink domain, S] what DeepEP 2.5's `lb_prefetch_weights` and `lb_reduce_grads` take.

        -1 is unused; an expert's id is its owner's rank in the domain times the experts a rank has, plus its place
        among them. Never an expert of the rank itself.

        Args:
            layer: counting from 0.
            table: [E] the layer's experts in the order of their slots, equal runs of which are ranks' own.
            ranks: those of the domain, in order (default: all).

        Raises:
            InputError: a table that is no such order, or has other homes than this plan; ranks whose copies come from
                outside.
        """
        slot_expert = np.asarray(table)
        experts, all_ranks = self.homes.shape[1], self.quotas.shape[2]
        if slot_expert.shape != (experts,) or not np.array_equal(np.sort(slot_expert), np.arange(experts)):
            raise InputError(
                f"redundancy_mapping: table must hold each of {experts} experts once, given {list(slot_expert.shape)}"
            )
        if experts % all_ranks or not np.array_equal(
            self.homes[layer, slot_expert], np.arange(experts) // (experts // all_ranks)
        ):
            raise InputError("redundancy_mapping: the table's equal runs of slots are not the homes of this plan")
        size = experts // all_ranks
        chosen = np.arange(all_ranks) if ranks is None else np.asarray(ranks)
        rank_in_domain = np.full(all_ranks, -1)
        rank_in_domain[chosen] = np.arange(len(chosen))
        slot = np.empty(experts, dtype=np.int64)
        slot[slot_expert] = np.arange(experts)
        copied = self.experts[layer, chosen]
        owner = rank_in_domain[self.homes[layer, copied]]
        if (owner[copied >= 0] < 0).any():
            raise InputError(f"redundancy_mapping: ranks {chosen.tolist()} copy experts of ranks outside")
        return np.where(copied >= 0, owner * size + slot[copied] % size, -1).astype(np.int32)

    def sends(self, counts: npt.ArrayLike) -> IntArray:
        """[L, H, E, R] pairs of each source rank and expert that each rank computes: a rank's own first, then in order.

        Args:
            counts: [L, H, E] as planned from.
        """
        tokens = np.asarray(counts, dtype=np.int64)
        left, room = np.moveaxis(tokens, 1, 2).copy(), self.quotas.astype(np.int64)
        own = np.minimum(left, room)
        left -= own
        room -= own
        source_end, rank_end = np.cumsum(left, axis=-1), np.cumsum(room, axis=-1)
        end = np.minimum(source_end[..., :, None], rank_end[..., None, :])
        begin = np.maximum((source_end - left)[..., :, None], (rank_end - room)[..., None, :])
        result = np.maximum(end - begin, 0)
        ranks = np.arange(room.shape[-1])
        result[..., ranks, ranks] += own
        return np.asarray(np.moveaxis(result, 2, 1))


@check_types
def plan_online(
    counts: npt.ArrayLike,
    homes: npt.ArrayLike,
    slots: int,
    domains: npt.ArrayLike | None = None,
    slack: float = SLACK,
) -> OnlinePlan:
    """Plans the copies of a microbatch, of one layer or a batch of layers.

    The target is the mean load and `slack` of it, or what can be had near it with the slots there are; as few experts
    are copied as a greedy choice finds, those first that the receiving rank's own tokens ask for.

    Args:
        counts: [L, R, E] tokens of each source rank that chose each expert, or [R, E] of one layer.
        homes: [L, E] or [E] home rank of each expert, several or none on a rank.
        slots: S, experts that each rank can hold beside its own.
        domains: [R] number of each rank's NVLink domain; experts are copied inside one only. Default: one domain.
        slack: how much above the mean a rank may stay, as a part of the mean.

    Raises:
        InputError: arrays that do not fit each other, counts or ranks out of range.
    """
    tokens = np.asarray(counts)
    if tokens.ndim not in (2, 3) or tokens.dtype.kind not in "iu":
        raise InputError(
            f"plan_online: counts {tokens.dtype} {list(tokens.shape)}; expected whole numbers [L, R, E] or [R, E]"
        )
    tokens = tokens.reshape(-1, *tokens.shape[-2:])
    layers, ranks, experts = tokens.shape
    home = np.asarray(homes)
    if home.dtype.kind not in "iu" or home.shape not in ((experts,), (layers, experts)):
        raise InputError(
            f"plan_online: homes {home.dtype} {list(home.shape)}; expected ranks [{experts}] or [{layers}, {experts}]"
        )
    home = np.ascontiguousarray(np.broadcast_to(home, (layers, experts)), dtype=np.int64)
    domain = np.zeros(ranks, dtype=np.int64) if domains is None else np.asarray(domains)
    if domain.shape != (ranks,) or domain.dtype.kind not in "iu":
        raise InputError(
            f"plan_online: domains {domain.dtype} {list(domain.shape)}; expected a number a rank [{ranks}]"
        )
    if not 0 <= slots <= MOST_SLOTS:
        raise InputError(f"plan_online: slots is {slots}; expected 0 to {MOST_SLOTS}")
    if not 0 <= slack < math.inf:
        raise InputError(f"plan_online: slack is {slack}; expected at least 0")
    if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(np.int32).max):
        raise InputError(f"plan_online: counts run from {tokens.min()} to {tokens.max()}; expected 0 to 2^31 - 1")
    if home.size and (home.min() < 0 or home.max() >= ranks):
        raise InputError(f"plan_online: homes run from {home.min()} to {home.max()}; expected 0 to {ranks - 1}")
    copied = np.empty((layers, ranks, int(slots)), dtype=np.int32)
    quotas = np.empty((layers, experts, ranks), dtype=np.int32)
    _plan_layers(
        np.ascontiguousarray(tokens, dtype=np.int64),
        home,
        np.ascontiguousarray(domain, dtype=np.int64),
        float(slack),
        copied,
        quotas,
    )
    return OnlinePlan(copied, quotas, home)


@kernel
def _plan_layers(
    tokens: IntArray, homes: IntArray, domain: IntArray, slack: float, copied: Int32Array, quotas: Int32Array
) -> None:
    layers, ranks, experts = tokens.shape
    slots = copied.shape[2]
    first, member = _members(homes[0] if layers else homes.reshape(-1), ranks)
    most_copies = ranks * slots
    moves = np.empty((2, most_copies, 3), dtype=np.int64)
    for layer in range(layers):
        count, home = tokens[layer], homes[layer]
        total = np.zeros(experts, dtype=np.int64)
        for rank in range(ranks):
            for e in range(experts):
                total[e] += count[rank, e]
        if layer:
            first, member = _members(home, ranks)
        native = np.zeros(ranks, dtype=np.int64)
        for e in range(experts):
            native[home[e]] += total[e]
        least = _least_target(native, domain)
        target = max(least, np.int64(np.floor(native.sum() / ranks * (1.0 + slack))))
        best, number = _spread_excess(native, total, count, home, first, member, domain, slots, target, moves[0])
        # Slots ran out: somewhere between the target and what came of it is the lowest that can be kept.
        low, high = target, best
        for _ in range(TRIES):
            if low >= high:
                break
            middle = (low + high) // 2
            largest, tried = _spread_excess(native, total, count, home, first, member, domain, slots, middle, moves[1])
            if largest < best:
                best, number = largest, tried
                moves[0, :tried] = moves[1, :tried]
            if largest <= middle:
                high = largest
            else:
                low = middle + 1
        copied[layer] = -1
        quotas[layer] = 0
        for e in range(experts):
            quotas[layer, e, home[e]] = total[e]
        load = native.copy()
        taken = np.zeros(ranks, dtype=np.int64)
        for move in range(number):
            e, rank, amount = moves[0, move]
            copied[layer, rank, taken[rank]] = e
            taken[rank] += 1
            quotas[layer, e, rank] += amount
            quotas[layer, e, home[e]] -= amount
            load[rank] += amount
            load[home[e]] -= amount
        # Where there is room still, a copy serves all that its own rank asks of it.
        for move in range(number):
            e, rank, _ = moves[0, move]
            away = quotas[layer, e, home[e]] - count[home[e], e]
            more = min(count[rank, e] - quotas[layer, e, rank], away, best - load[rank])
            if more > 0:
                quotas[layer, e, rank] += more
                quotas[layer, e, home[e]] -= more
                load[rank] += more
                load[home[e]] -= more


@kernel
def _members(home: IntArray, ranks: int) -> tuple[IntArray, IntArray]:
    """([R+1] where each rank's experts begin, [E] experts rank by rank)."""
    first = np.zeros(ranks + 1, dtype=np.int64)
    for e in range(len(home)):
        first[home[e] + 1] += 1
    for rank in range(ranks):
        first[rank + 1] += first[rank]
    at, member = first.copy(), np.empty(len(home), dtype=np.int64)
    for e in range(len(home)):
        member[at[home[e]]] = e
        at[home[e]] += 1
    return first, member


@kernel
def _least_target(native: IntArray, domain: IntArray) -> np.int64:
    """The largest mean of a domain, rounded up: nobody's target can be lower. native: [R] load without copies."""
    largest = np.int64(0)
    for rank in range(len(native)):
        inside, size = np.int64(0), np.int64(0)
        if rank and domain[rank] == domain[rank - 1]:
            continue
        for other in range(len(native)):
            if domain[other] == domain[rank]:
                inside += native[other]
                size += 1
        largest = np.maximum(largest, (inside + size - 1) // size)
    return largest


@kernel
def _spread_excess(
    native: IntArray,
    total: IntArray,
    count: IntArray,
    home: IntArray,
    first: IntArray,
    member: IntArray,
    domain: IntArray,
    slots: int,
    target: np.int64,
    moves: IntArray,
) -> tuple[int, int]:
    """Copies experts off ranks above the target: (largest load then, copies made), in `moves` [R S, 3] as expert, rank
    and tokens.

    The rank with the most above the target gives to the smallest room that takes all of it, else to the largest room.
    What it gives is of an expert with tokens enough, the one that most of the receiver's own tokens ask for.
    """
    load, free, left = native.copy(), np.full(len(native), slots), total.copy()
    number = 0
    while True:
        number = _fill_slots(load, free, left, count, first, member, domain, target, moves, number)
        passed = _pass_on(load, free, left, count, home, first, member, domain, target, moves, number)
        if passed == number:
            return load.max(), number
        number = passed


@kernel
def _fill_slots(
    load: IntArray,
    free: IntArray,
    left: IntArray,
    count: IntArray,
    first: IntArray,
    member: IntArray,
    domain: IntArray,
    target: np.int64,
    moves: IntArray,
    number: int,
) -> int:
    """The copies of `_spread_excess` into the slots that are free; the number of copies then."""
    ranks = len(load)
    stuck = np.zeros(ranks, dtype=np.bool_)
    while True:
        giver = _most_above(load, target, stuck)
        if giver < 0:
            return number
        excess = load[giver] - target
        most = np.int64(0)
        for i in range(first[giver], first[giver + 1]):
            most = max(most, left[member[i]])
        need = min(excess, most)
        taker, room = -1, np.int64(0)
        for rank in range(ranks):
            spare = target - load[rank]
            if spare <= 0 or free[rank] == 0 or domain[rank] != domain[giver]:
                continue
            if taker < 0 or (spare < room if room >= need and spare >= need else spare > room):
                taker, room = rank, spare
        if taker < 0 or need == 0:
            stuck[giver] = True
            continue
        amount = min(need, room)
        expert, asked = -1, np.int64(-1)
        for i in range(first[giver], first[giver + 1]):
            e = member[i]
            if left[e] >= amount and count[taker, e] > asked and not _copied(moves[:number], e, taker):
                expert, asked = e, count[taker, e]
        if expert < 0:
            stuck[giver] = True
            continue
        _send_copy(load, free, left, moves, number, giver, taker, expert, amount)
        number += 1


@kernel
def _most_above(load: IntArray, target: np.int64, stuck: BoolArray) -> int:
    """The rank with most above the target of those that are not stuck, -1 where none is above it."""
    giver = -1
    for rank in range(len(load)):
        if load[rank] > target and not stuck[rank] and (giver < 0 or load[rank] > load[giver]):
            giver = rank
    return giver


@kernel
def _send_copy(
    load: IntArray,
    free: IntArray,
    left: IntArray,
    moves: IntArray,
    number: int,
    giver: int,
    taker: int,
    expert: int,
    amount: np.int64,
) -> None:
    """Notes a copy of an expert into a free slot of another rank, with so many of its tokens."""
    load[giver] -= amount
    load[taker] += amount
    left[expert] -= amount
    free[taker] -= 1
    moves[number, 0], moves[number, 1], moves[number, 2] = expert, taker, amount


@kernel
def _copied(moves: IntArray, expert: int, rank: int) -> bool:
    for move in range(len(moves)):  # noqa: SIM110 (numba compiles no generators here)
        if moves[move, 0] == expert and moves[move, 1] == rank:
            return True
    return False


@kernel
def _pass_on(
    load: IntArray,
    free: IntArray,
    left: IntArray,
    count: IntArray,
    home: IntArray,
    first: IntArray,
    member: IntArray,
    domain: IntArray,
    target: np.int64,
    moves: IntArray,
    number: int,
) -> int:
    """One copy from the rank with most above the target to one without room that has a slot, and gives more of its own
    tokens to the copies that it has elsewhere; the number of copies then.

    So room is reached whose own slots are taken.
    """
    ranks = len(load)
    stuck = np.zeros(ranks, dtype=np.bool_)
    beyond = np.zeros(ranks, dtype=np.int64)
    for move in range(number):
        e, rank, _ = moves[move]
        beyond[home[e]] += min(left[e], max(0, target - load[rank]))
    while True:
        giver = _most_above(load, target, stuck)
        if giver < 0:
            return number
        taker, most = -1, np.int64(0)
        for rank in range(ranks):
            if free[rank] and rank != giver and domain[rank] == domain[giver] and beyond[rank] > most:
                taker, most = rank, beyond[rank]
        amount, expert = np.int64(0), -1
        if taker >= 0:
            for i in range(first[giver], first[giver + 1]):
                e = member[i]
                possible = min(left[e], most, load[giver] - target)
                if (
                    possible > amount or (possible == amount > 0 and count[taker, e] > count[taker, expert])
                ) and not _copied(moves[:number], e, taker):
                    amount, expert = possible, e
        if expert < 0:
            stuck[giver] = True
            continue
        _send_copy(load, free, left, moves, number, giver, taker, expert, amount)
        for move in range(number):
            e, rank, _ = moves[move]
            if home[e] == taker and load[taker] > target:
                more = min(left[e], target - load[rank], load[taker] - target)
                if more > 0:
                    moves[move, 2] += more
                    left[e] -= more
                    load[rank] += more
                    load[taker] -= more
        return number + 1
