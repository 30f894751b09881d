"""How a step's tokens are divided among the replicas of their experts, anew for every step (`replica_choice`
"balanced").

The least that the largest device load of a step can be is a maximum over sets of devices: whatever experts have all
their replicas inside a set is computed in it, so that one of its devices carries at least the average, and by max-flow
min-cut (Hall's condition) some set's average, rounded up, is reached. For few devices all sets are gone through
(`SETS_UP_TO`); for more, tokens are filled in expert by expert until nothing changes, and the sets of the most loaded
devices tell how far from the least that is.

Shapes: S steps, E experts, G devices, H devices as the ones that hold tokens, N nodes; all of one layer, whose replicas
are the same in all steps.
"""

from __future__ import annotations

import numpy as np

from .._types import BoolArray, FloatArray, IntArray
from .errors import InputError
from .jit import kernel
from .objective import Division

SETS_UP_TO = 12
"""Devices of which all sets are gone through."""
SWEEPS = 64
"""Over the experts with replicas, at most, where devices are more."""
WINDOW_TOKENS = 1 << 20
"""A window's loads are divided in so many parts."""
LARGEST = np.iinfo(np.int64).max
OWN, OTHERS = 11, 10
"""Waterfill's weights of the token's own device and of others."""


def divide(
    counts: IntArray,
    hosts: BoolArray,
    node_of: IntArray,
    division: Division = "local",
    by_source: IntArray | None = None,
) -> IntArray:
    """[S, E, G] tokens of each expert that each device computes; they sum to `counts`, and are 0 off its replicas.

    Args:
        counts: [S, E] tokens that chose each expert.
        hosts: [E, G] devices with a replica, at least one each.
        node_of: [G] node of each device.
        division: the rule.
        by_source: [S, H, E] the same tokens by the device they live on; None where they are spread evenly.

    Raises:
        InputError: arrays that do not fit, negative counts, or an expert without a replica.
    """
    _check(counts, hosts, node_of, by_source)
    if division == "waterfill":
        return np.asarray(_waterfill(counts, hosts, by_source).sum(axis=1))
    experts, devices = hosts.shape
    if division == "lp":
        living = np.zeros((0, experts, devices), dtype=np.int64)
    elif by_source is None:
        living = np.repeat(counts[:, :, None] // devices, devices, axis=2)
    else:
        living = by_source.transpose(0, 2, 1)
    counts, living = (np.ascontiguousarray(tokens, dtype=np.int64) for tokens in (counts, living))
    hosts, node_of = np.ascontiguousarray(hosts), np.ascontiguousarray(node_of, dtype=np.int64)
    if devices <= SETS_UP_TO:
        return _within_sets(counts, hosts, node_of, living)
    result = _filled(counts, hosts)
    if division == "local":
        _keep_near(result, hosts, node_of, living)
    return result


def source_division(
    divided: IntArray,
    counts: IntArray,
    hosts: BoolArray,
    node_of: IntArray,
    division: Division = "local",
    by_source: IntArray | None = None,
) -> FloatArray:
    """[S, H, E, G] tokens of each source that each device computes, from what `divide` gave for the same arguments.

    Where sources are known and the rule is "local" these are whole numbers: each device serves its own tokens first,
    then those of its node, then others in the order of devices. "lp" and "waterfill" take a replica by chance, and
    these are expected values.
    """
    devices = hosts.shape[1]
    tokens = np.asarray(
        np.broadcast_to(counts[:, None] / devices, (len(counts), devices, counts.shape[1]))
        if by_source is None
        else by_source,
        dtype=np.float64,
    )
    if division == "local":
        return near_first(divided.astype(np.float64), tokens, node_of)
    if division == "waterfill":
        part = _waterfill_weights(counts, hosts)
        total = part.sum(axis=3, keepdims=True)
        return np.asarray(tokens[..., None] * part / np.where(total > 0, total, 1))
    return np.asarray(tokens[..., None] * (divided / np.maximum(counts, 1)[..., None])[:, None])


def window_shares(load: FloatArray, hosts: BoolArray, node_of: IntArray, division: Division = "local") -> FloatArray:
    """[..., L, E, G] part of each expert's load that each device computes where a window is divided like one step.

    Args:
        load: [..., L, E] tokens that chose each expert, or parts of them.
        hosts: [L, E, G] devices with a replica.
        node_of: [G] node of each device.
        division: the rule; tokens' sources are spread evenly.
    """
    total = load.sum(axis=-1, keepdims=True)
    counts = np.rint(load / np.where(total > 0, total, 1.0) * WINDOW_TOKENS).astype(np.int64)
    even = hosts / hosts.sum(axis=-1, keepdims=True)
    result = np.empty((*load.shape, hosts.shape[2]))
    for layer, hosts_of_expert in enumerate(hosts):
        mine = counts[..., layer, :].reshape(-1, load.shape[-1])
        divided = divide(mine, hosts_of_expert, node_of, division)
        part = np.where(mine[..., None] > 0, divided / np.maximum(mine, 1)[..., None], even[layer])
        result[..., layer, :, :] = part.reshape(*load.shape[:-2], *hosts_of_expert.shape)
    return result


def near_first(divided: FloatArray, tokens: FloatArray, node_of: IntArray) -> FloatArray:
    """[S, H, E, G] which source's tokens [S, H, E] fill what devices compute [S, E, G]: own, then the node's, then any.

    Within a node, and then among all, sources and devices are gone through in order.
    """
    steps, sources, experts = tokens.shape
    result = np.zeros((steps, sources, experts, divided.shape[2]))
    _pour_near(tokens.transpose(0, 2, 1).copy(), divided.copy(), node_of.astype(np.int64), result)
    return result


@kernel
def _pour_near(left: FloatArray, room: FloatArray, node_of: IntArray, result: FloatArray) -> None:
    """Adds to result [S, H, E, G] what sources' tokens [S, E, H] take of devices' room [S, E, G]; both are used up."""
    steps, experts, devices = left.shape
    nodes = node_of.max() + 1
    for s in range(steps):
        for e in range(experts):
            for g in range(devices):
                taken = min(left[s, e, g], room[s, e, g])
                result[s, g, e, g] += taken
                left[s, e, g] -= taken
                room[s, e, g] -= taken
            # The last turn is that of all devices.
            for n in range(nodes + 1):
                h, g = 0, 0
                while h < devices and g < devices:
                    if left[s, e, h] <= 0 or (n < nodes and node_of[h] != n):
                        h += 1
                    elif room[s, e, g] <= 0 or (n < nodes and node_of[g] != n):
                        g += 1
                    else:
                        taken = min(left[s, e, h], room[s, e, g])
                        result[s, h, e, g] += taken
                        left[s, e, h] -= taken
                        room[s, e, g] -= taken


def _check(counts: IntArray, hosts: BoolArray, node_of: IntArray, by_source: IntArray | None) -> None:
    if counts.ndim != 2 or hosts.shape[:1] != counts.shape[1:] or hosts.ndim != 2:
        raise InputError(f"divide: counts {list(counts.shape)} and hosts {list(hosts.shape)} must be [S, E] and [E, G]")
    if counts.size and counts.min() < 0:
        raise InputError(f"divide: counts must be at least 0, one is {counts.min()}")
    if not hosts.any(axis=1).all():
        raise InputError(f"divide: expert {int(hosts.any(axis=1).argmin())} has no replica")
    if node_of.shape != hosts.shape[1:]:
        raise InputError(
            f"divide: node_of {list(node_of.shape)} must name the node of each of {hosts.shape[1]} devices"
        )
    if by_source is not None and not np.array_equal(by_source.sum(axis=1), counts):
        raise InputError("divide: by_source [S, H, E] does not sum to counts [S, E] over sources")


# Up to `SETS_UP_TO` devices: all sets.

OWN_TURN, NODE_TURN, EVEN_TURN, REST_TURN = range(4)
TURNS = (OWN_TURN, NODE_TURN, NODE_TURN, EVEN_TURN, REST_TURN)
"""Of experts and their replicas: what lives on the device, twice what lives on its node (what one device has no room
for goes to another), equal parts of the others, and what is left."""


@kernel
def _within_sets(counts: IntArray, hosts: BoolArray, node_of: IntArray, living: IntArray) -> IntArray:
    """[S, E, G] a division whose largest load is the least possible; as many as goes of the tokens that live on each
    device [S, E, G] stay there, then on its node. living: of no steps where it counts for nothing.

    Experts and their replicas take tokens one after the other, never more than leaves every set of devices room for the
    tokens that can go nowhere else; so there is room for all of them in the end (as in a greedy algorithm on a
    polymatroid).
    """
    steps, (experts, devices) = len(counts), hosts.shape
    sets = 1 << devices
    mask, size = np.zeros(experts, np.int64), np.zeros(sets, np.int64)
    for g in range(devices):
        size[1 << g : 2 << g] = size[: 1 << g] + 1
        mask += hosts[:, g] * (1 << g)
    result, slack = np.zeros((steps, experts, devices), np.int64), np.empty(sets, np.int64)
    for s in range(steps):
        left, divided = counts[s].copy(), result[s]
        # Tokens of experts whose replicas all stand in a set.
        slack[:] = 0
        for e in range(experts):
            slack[mask[e]] += left[e]
        for g in range(devices):
            for i in range(sets):
                if i >> g & 1:
                    slack[i] += slack[i ^ (1 << g)]
        least = 0
        for i in range(1, sets):
            least = max(least, -(-slack[i] // size[i]))
        for i in range(sets):
            slack[i] = least * size[i] - slack[i]
        for e in range(experts):
            if size[mask[e]] == 1:
                for g in range(devices):
                    divided[e, g] = left[e] * hosts[e, g]
                left[e] = 0
        for turn in TURNS:
            if turn in (EVEN_TURN, REST_TURN):
                for e in range(experts):
                    even, replicas = -(-left[e] // size[mask[e]]), size[mask[e]]
                    for g in range(devices):
                        if hosts[e, g] and replicas > 1:
                            target = min(even, left[e]) if turn == EVEN_TURN else left[e]
                            taken = _taken(target, g, mask[e], slack)
                            divided[e, g] += taken
                            left[e] -= taken
            elif len(living) and turn == OWN_TURN:
                for e in range(experts):
                    for g in range(devices):
                        if hosts[e, g] and size[mask[e]] > 1:
                            taken = _taken(min(living[s, e, g], left[e]), g, mask[e], slack)
                            divided[e, g] += taken
                            left[e] -= taken
            elif len(living) and node_of.max() > 0:
                for n in range(node_of.max() + 1):
                    for e in range(experts):
                        if size[mask[e]] == 1:
                            continue
                        away, replicas = 0, 0
                        for g in range(devices):
                            if node_of[g] == n:
                                away += living[s, e, g] - divided[e, g]
                                replicas += hosts[e, g]
                        for g in range(devices):
                            if node_of[g] == n and hosts[e, g]:
                                target = min(-(-max(away, 0) // replicas), left[e])
                                taken = _taken(target, g, mask[e], slack)
                                divided[e, g] += taken
                                left[e] -= taken
                                away -= taken
                                replicas -= 1
    return result


@kernel
def _taken(target: int, g: int, mask: int, slack: IntArray) -> int:
    """As much of a target as device g may take of an expert on the devices of `mask`; off the slack [2^G] of sets that
    have the device, but not all of the expert's: they lose room that others' tokens may need."""
    if target <= 0:
        return 0
    for i in range(len(slack)):
        if i >> g & 1 and i & mask != mask:
            target = min(target, slack[i])
    for i in range(len(slack)):
        if i >> g & 1 and i & mask != mask:
            slack[i] -= target
    return target


# More devices.


@kernel
def _filled(counts: IntArray, hosts: BoolArray) -> IntArray:
    """[S, E, G] a division that no expert can level further alone: each in turn fills its devices from the lowest up.

    That lowers the sum of squared loads step by step towards its least, whose largest load is the least possible.
    """
    steps, (experts, devices) = len(counts), hosts.shape
    result = np.zeros((steps, experts, devices), np.int64)
    order = np.empty(devices, np.int64)
    for s in range(steps):
        divided, load = result[s], np.zeros(devices, np.int64)
        for e in range(experts):
            replicas, place = hosts[e].sum(), 0
            for g in range(devices):
                if hosts[e, g]:
                    divided[e, g] = counts[s, e] // replicas + (place < counts[s, e] % replicas)
                    load[g] += divided[e, g]
                    place += 1
        for _ in range(SWEEPS):
            before = load.copy()
            for e in range(experts):
                if hosts[e].sum() > 1:
                    load -= divided[e]
                    _fill(load, hosts[e], counts[s, e], order, divided[e])
                    load += divided[e]
            # Single tokens may go round for ever.
            if np.abs(load - before).max() <= 1 or load.max() <= _proven(counts[s], hosts, load):
                break
    return result


@kernel
def _fill(base: IntArray, hosts: BoolArray, tokens: int, order: IntArray, filled: IntArray) -> None:
    """Fills `filled` [G] with tokens poured onto the loads [G] of hosts, the lowest first, so that they end as level as
    can be."""
    number = 0
    for g in range(len(base)):
        if hosts[g]:
            i = number
            while i > 0 and base[order[i - 1]] > base[g]:
                order[i] = order[i - 1]
                i -= 1
            order[i] = g
            number += 1
    total, level = tokens, LARGEST
    for i in range(number):
        total += base[order[i]]
        level = min(level, total // (i + 1))
    rest = tokens
    for i in range(number):
        filled[order[i]] = max(level - base[order[i]], 0)
        rest -= filled[order[i]]
    for i in range(min(number, rest)):
        if base[order[i]] <= level:
            filled[order[i]] += 1


@kernel
def _proven(counts: IntArray, hosts: BoolArray, load: IntArray) -> int:
    """A lower bound of a step's largest load: of the sets of the most loaded devices under `load` [G], and of all."""
    order = np.argsort(-load, kind="mergesort")
    place = np.empty(len(load), np.int64)
    for i in range(len(load)):
        place[order[i]] = i
    # An expert is inside the first n devices once its last replica is.
    inside = np.zeros(len(load), np.int64)
    for e in range(len(counts)):
        last = 0
        for g in range(len(load)):
            if hosts[e, g]:
                last = max(last, place[g])
        inside[last] += counts[e]
    best, tokens = 0, 0
    for i in range(len(load)):
        tokens += inside[i]
        best = max(best, -(-tokens // (i + 1)))
    return best


@kernel
def _keep_near(result: IntArray, hosts: BoolArray, node_of: IntArray, living: IntArray) -> None:
    """Changes divisions [S, E, G] so that more of the tokens that live on each device [S, E, G] stay there, and then
    more of a node's on the node; no device goes above the largest load."""
    devices = hosts.shape[1]
    here = np.empty(devices, np.int64)
    for s in range(len(result)):
        divided, load = result[s], result[s].sum(axis=0)
        most = load.max()
        for by_node in range(2 if node_of.max() > 0 else 1):
            for e in range(len(hosts)):
                if hosts[e].sum() == 1:
                    continue
                here[:] = 0
                for g in range(devices):
                    here[node_of[g]] += living[s, e, g] - divided[e, g]
                for g in range(devices):
                    for h in range(devices):
                        if not (hosts[e, g] and hosts[e, h]) or g == h:
                            continue
                        spare = divided[e, h] - living[s, e, h]
                        lack = living[s, e, g] - divided[e, g]
                        if by_node:
                            if node_of[g] == node_of[h]:
                                continue
                            lack, spare = here[node_of[g]], min(max(spare, 0), -here[node_of[h]])
                        moved = max(min(lack, spare, most - load[g]), 0)
                        divided[e, g] += moved
                        divided[e, h] -= moved
                        load[g] += moved
                        load[h] -= moved
                        here[node_of[g]] -= moved
                        here[node_of[h]] += moved


# SGLang's Waterfill.


def _waterfill_weights(counts: IntArray, hosts: BoolArray) -> IntArray:
    """[S, H, E, G] what tokens of each source are dealt in proportion to."""
    devices = hosts.shape[1]
    alone = hosts.sum(axis=1) == 1
    fixed = (counts * alone) @ hosts.astype(np.int64)
    lack = np.maximum(-(-counts.sum(axis=1, keepdims=True) // devices) - fixed, 0)
    near = np.where(np.eye(devices, dtype=bool), lack[:, None], lack[:, None] * OTHERS // OWN)
    weights = near[:, :, None] * hosts
    # Without room anywhere the least loaded device takes them, the token's own where it is about as good.
    price = np.where(np.eye(devices, dtype=bool), fixed[:, None] * OTHERS, fixed[:, None] * OWN)
    price = np.where(hosts, price[:, :, None], np.iinfo(np.int64).max)
    cheapest = price.argmin(axis=3)[..., None] == np.arange(devices)
    return np.asarray(np.where(weights.any(axis=3, keepdims=True), weights, cheapest))


def _waterfill(counts: IntArray, hosts: BoolArray, by_source: IntArray | None) -> IntArray:
    """[S, H or 1, E, G] tokens dealt by weights, rounded to the largest remainders."""
    weights = _waterfill_weights(counts, hosts)
    tokens = counts[:, None] if by_source is None else by_source
    if by_source is None:
        weights = weights.sum(axis=1, keepdims=True)
    total = weights.sum(axis=3, keepdims=True)
    result, remainder = np.divmod(tokens[..., None] * weights, total)
    order = np.argsort(np.argsort(-remainder, axis=3, kind="stable"), axis=3, kind="stable")
    missing = tokens - result.sum(axis=3)
    return np.asarray(result + (order < missing[..., None]))
