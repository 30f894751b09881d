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

from typing import Literal

import numpy as np

from .._types import BoolArray, FloatArray, IntArray
from .errors import InputError

Division = Literal["local", "lp", "waterfill"]
"""Rules. "local": each device keeps what its own tokens ask of it while it is not above the least possible largest
load, and the rest goes where there is room. "lp": the least possible largest load, wherever tokens come from
(DeepSeek's LPLB; SGLang's `--ep-dispatch-algorithm lp`). "waterfill": in proportion to what devices lack of the mean
beside experts without replicas, a tenth more to the token's own device (the weights by which SGLang's Waterfill deals
the shared expert, of which every device has a replica; `layers/moe/deepep_waterfill.py`)."""

SETS_UP_TO = 12
"""Devices of which all sets are gone through."""
SWEEPS = 64
"""Over the experts with replicas, at most, where devices are more."""
WINDOW_TOKENS = 1 << 20
"""A window's loads are divided in so many parts."""
OWN, OTHERS = 11, 10
"""Waterfill's weights of the token's own device and of others."""


def set_tokens(counts: IntArray, hosts: BoolArray) -> IntArray:
    """[S, 2^G] tokens of experts whose replicas all stand on devices of each set; set i has the devices of i's bits.

    Args:
        counts: [S, E] tokens that chose each expert.
        hosts: [E, G] devices with a replica.
    """
    devices = hosts.shape[1]
    tokens = np.zeros((1 << devices, len(counts)), dtype=np.int64)
    np.add.at(tokens, hosts @ (1 << np.arange(devices)), counts.T)
    for g in range(devices):
        halves = tokens.reshape(-1, 2, 1 << g, len(counts))
        halves[:, 1] += halves[:, 0]
    return np.ascontiguousarray(tokens.T)


def divide(
    counts: IntArray, hosts: BoolArray, division: Division = "local", by_source: IntArray | None = None
) -> IntArray:
    """[S, E, G] tokens of each expert that each device computes; they sum to `counts`, and are 0 off its replicas.

    Args:
        counts: [S, E] tokens that chose each expert.
        hosts: [E, G] devices with a replica, at least one each.
        division: the rule.
        by_source: [S, H, E] the same tokens by the device they live on; None where they are spread evenly.

    Raises:
        InputError: arrays that do not fit, negative counts, or an expert without a replica.
    """
    _check(counts, hosts, by_source)
    if division == "waterfill":
        return np.asarray(_waterfill(counts, hosts, by_source).sum(axis=1))
    own = None
    if division == "local":
        own = (
            counts[:, :, None] // hosts.shape[1] * hosts if by_source is None else by_source.transpose(0, 2, 1) * hosts
        )
    if hosts.shape[1] <= SETS_UP_TO:
        return _within_sets(counts, hosts, own)
    result = _filled(counts, hosts)
    return result if own is None else _keep_own(result, own, hosts)


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


def window_shares(load: FloatArray, hosts: BoolArray, division: Division = "local") -> FloatArray:
    """[..., L, E, G] part of each expert's load that each device computes where a window is divided like one step.

    Args:
        load: [..., L, E] tokens that chose each expert, or parts of them.
        hosts: [L, E, G] devices with a replica.
        division: the rule; tokens' sources are spread evenly.
    """
    total = load.sum(axis=-1, keepdims=True)
    counts = np.rint(load / np.where(total > 0, total, 1.0) * WINDOW_TOKENS).astype(np.int64)
    even = hosts / hosts.sum(axis=-1, keepdims=True)
    result = np.empty((*load.shape, hosts.shape[2]))
    for layer, hosts_of_expert in enumerate(hosts):
        mine = counts[..., layer, :].reshape(-1, load.shape[-1])
        divided = divide(mine, hosts_of_expert, division)
        part = np.where(mine[..., None] > 0, divided / np.maximum(mine, 1)[..., None], even[layer])
        result[..., layer, :, :] = part.reshape(*load.shape[:-2], *hosts_of_expert.shape)
    return result


def near_first(divided: FloatArray, tokens: FloatArray, node_of: IntArray) -> FloatArray:
    """[S, H, E, G] which source's tokens [S, H, E] fill what devices compute [S, E, G]: own, then the node's, then any.

    Within a node, and then among all, sources and devices are gone through in order.
    """
    left, room = tokens.transpose(0, 2, 1).copy(), divided.copy()
    own = np.minimum(left, room)
    left -= own
    room -= own
    result = own[..., None] * np.eye(len(node_of))
    for members in [np.flatnonzero(node_of == n) for n in range(int(node_of.max()) + 1)] + [np.arange(len(node_of))]:
        moved = _in_order(left[..., members], room[..., members])
        result[..., members[:, None], members] += moved
        left[..., members] -= moved.sum(axis=3)
        room[..., members] -= moved.sum(axis=2)
    return np.asarray(result.transpose(0, 2, 1, 3))


def _in_order(left: FloatArray, room: FloatArray) -> FloatArray:
    """[..., H, G] sources [..., H] poured into devices [..., G] one after the other, until either is used up."""
    source_end, device_end = np.cumsum(left, axis=-1), np.cumsum(room, axis=-1)
    end = np.minimum(source_end[..., :, None], device_end[..., None, :])
    begin = np.maximum((source_end - left)[..., :, None], (device_end - room)[..., None, :])
    return np.asarray(np.maximum(end - begin, 0))


def _check(counts: IntArray, hosts: BoolArray, by_source: IntArray | None) -> None:
    if counts.ndim != 2 or hosts.shape[:1] != counts.shape[1:] or hosts.ndim != 2:
        raise InputError(f"divide: counts {list(counts.shape)} and hosts {list(hosts.shape)} must be [S, E] and [E, G]")
    if counts.size and counts.min() < 0:
        raise InputError(f"divide: counts must be at least 0, one is {counts.min()}")
    if not hosts.any(axis=1).all():
        raise InputError(f"divide: expert {int(hosts.any(axis=1).argmin())} has no replica")
    if by_source is not None and not np.array_equal(by_source.sum(axis=1), counts):
        raise InputError("divide: by_source [S, H, E] does not sum to counts [S, E] over sources")


# Up to `SETS_UP_TO` devices: all sets.


def _largest_of_sets(tokens: IntArray, devices: int) -> IntArray:
    """[S] the largest average of a set, rounded up, from `set_tokens`."""
    return np.asarray((-(-tokens[:, 1:] // _sizes(devices)[1:])).max(axis=1))


def _sizes(devices: int) -> IntArray:
    """[2^G] devices of each set."""
    sets = np.arange(1 << devices)
    return np.asarray(sum((sets >> g) & 1 for g in range(devices)), dtype=np.int64)


def _within_sets(counts: IntArray, hosts: BoolArray, own: IntArray | None) -> IntArray:
    """[S, E, G] a division whose largest load is the least possible, as much of `own` [S, E, G] kept as goes.

    Experts and their replicas take tokens one after the other, never more than leaves every set of devices room for the
    tokens that can go nowhere else; so there is room for all of them in the end (as in a greedy algorithm on a
    polymatroid).
    """
    steps, devices = len(counts), hosts.shape[1]
    tokens = set_tokens(counts, hosts)
    slack = (_largest_of_sets(tokens, devices)[:, None] * _sizes(devices) - tokens).T.copy()
    result = np.zeros((steps, *hosts.shape), dtype=np.int64)
    alone = hosts.sum(axis=1) == 1
    result[:, alone, hosts[alone].argmax(axis=1)] = counts[:, alone]
    left = np.where(alone, 0, counts)
    sets = np.arange(1 << devices)
    split = [(e, np.flatnonzero(hosts[e])) for e in np.flatnonzero(~alone)]
    # A set that has the device, but not all of the expert's, loses room that others' tokens may need.
    narrow = {
        (e, g): np.flatnonzero(((sets >> g) & 1 == 1) & (sets & (mask := int((1 << of).sum())) != mask))
        for e, of in split
        for g in of.tolist()
    }
    for turn in ("own", "even", "rest"):
        if turn == "own" and own is None:
            continue
        for e, of in split:
            even = -(-left[:, e] // len(of))
            for g in of.tolist():
                target = even if turn == "even" else left[:, e]
                if turn == "own" and own is not None:
                    target = own[:, e, g]
                taken = np.minimum(np.minimum(target, left[:, e]), slack[narrow[e, g]].min(axis=0))
                slack[narrow[e, g]] -= taken
                result[:, e, g] += taken
                left[:, e] -= taken
    return result


# More devices.


def _filled(counts: IntArray, hosts: BoolArray) -> IntArray:
    """[S, E, G] a division that no expert can level further alone: each in turn fills its devices from the lowest up.

    That lowers the sum of squared loads step by step towards its least, whose largest load is the least possible.
    """
    number = hosts.sum(axis=1)
    result: IntArray = (counts // number)[..., None] * hosts
    spread = np.cumsum(hosts, axis=1) * hosts
    result += (spread > 0) & (spread <= (counts % number)[..., None])
    load = result.sum(axis=1)
    split = [(e, np.flatnonzero(hosts[e])) for e in np.flatnonzero(number > 1)]
    for _ in range(SWEEPS):
        before = load.copy()
        for e, of in split:
            base = load[:, of] - result[:, e, of]
            filled = _fill(base, counts[:, e])
            result[:, e, of] = filled
            load[:, of] = base + filled
        # Single tokens may go round for ever.
        if np.abs(load - before).max(initial=0) <= 1 or (load.max(axis=1) <= _proven(counts, hosts, load)).all():
            break
    return result


def _fill(base: IntArray, tokens: IntArray) -> IntArray:
    """[S, n] tokens [S] poured onto loads [S, n], the lowest first, so that they end as level as can be."""
    order = np.argsort(base, axis=1, kind="stable")
    rising = np.take_along_axis(base, order, axis=1)
    level = ((tokens[:, None] + np.cumsum(rising, axis=1)) // np.arange(1, base.shape[1] + 1)).min(
        axis=1, keepdims=True
    )
    filled = np.maximum(level - rising, 0)
    rest = tokens - filled.sum(axis=1)
    reached = rising <= level
    filled += reached & (np.cumsum(reached, axis=1) <= rest[:, None])
    result: IntArray = np.empty_like(filled)
    np.put_along_axis(result, order, filled, axis=1)
    return result


def _proven(counts: IntArray, hosts: BoolArray, load: IntArray) -> IntArray:
    """[S] a lower bound of the largest load: of the sets of the most loaded devices under `load` [S, G], and of all."""
    best = np.zeros(len(counts), dtype=np.int64)
    order = np.argsort(-load, axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(load.shape[1]), order.shape), axis=1)
    # An expert is inside the first n devices once its last replica is.
    last = np.where(hosts, place[:, None, :], -1).max(axis=2)
    for s in range(len(counts)):
        inside = np.cumsum(np.bincount(last[s], weights=counts[s], minlength=load.shape[1])).astype(np.int64)
        best[s] = (-(-inside // np.arange(1, load.shape[1] + 1))).max()
    return best


def _keep_own(divided: IntArray, own: IntArray, hosts: BoolArray) -> IntArray:
    """The division with more of `own` [S, E, G] kept, no device above the largest load."""
    load = divided.sum(axis=1)
    most = load.max(axis=1)
    for e in np.flatnonzero(hosts.sum(axis=1) > 1):
        of = np.flatnonzero(hosts[e])
        for g in of.tolist():
            for h in of.tolist():
                lack, spare = own[:, e, g] - divided[:, e, g], divided[:, e, h] - own[:, e, h]
                moved = np.maximum(np.minimum(np.minimum(lack, spare), most - load[:, g]), 0)
                divided[:, e, g] += moved
                divided[:, e, h] -= moved
                load[:, g] += moved
                load[:, h] -= moved
    return divided


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
