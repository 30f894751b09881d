"""Lower bounds that hold for every placement, replicas and shares of a problem: of load, and of predicted step times.

Of a step's time term by term, each by an argument that no placement escapes: the slowest device does at least its part
of the work, some device carries what packing experts into slots forces on it, every expert that is hit is read
somewhere, and k experts stand on at least as many devices (nodes) as it takes to hold k slots, so that copies must
travel; and few experts can stand in the node of every token's source rank. L layers, E experts, G devices, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .._arguments import check_types
from .._types import FloatArray, IntArray
from .cost import ExpertCost, TransferCost, Transfers, chance_reached, slot_shares
from .errors import InputError
from .layer_slots import alike_layers
from .objective import Objective
from .packing import replicate
from .plan import Certificate, Plan, equal_shares, replica_counts
from .problem import Problem
from .statistics import window_weights
from .steps import Steps
from .validation import check_range, check_shape, generator

NOISE_WINDOWS, NOISE_LAYERS = 64, 1024
"""Windows drawn to tell what chance alone costs, at most; and layers of windows that tell it as well."""
LOAD_OBJECTIVE = "device load max/mean on average loads, mean over layers"


# How evenly a placement spreads average load, and how evenly any placement could.


@check_types
def device_loads(
    load: FloatArray, table: IntArray, shares: FloatArray, slot_device: IntArray, devices: int
) -> FloatArray:
    """[L, G] load of each device.

    Args:
        load: [L, E] of each expert.
        table: [L, P] expert of each slot, -1 in an empty one.
        shares: [L, P] fraction of its expert's load that each slot takes, 0 in empty slots.
        slot_device: [P] device of each slot.
        devices: how many there are.

    Raises:
        InputError: shapes that do not go together, or an expert or device out of range.
    """
    load = check_shape("load", load, ("L", "E"))
    table = check_shape("table", table, (len(load), "P"))
    shares = check_shape("shares", shares, table.shape)
    slot_device = check_shape("slot_device", slot_device, table.shape[1:])
    check_range("devices", devices, 1, 1 << 20)
    check_range("the largest expert of table", table.max(initial=0), 0, load.shape[1] - 1)
    check_range("the least expert of table", table.min(initial=0), -1)
    check_range("the largest device of slot_device", slot_device.max(initial=0), 0, devices - 1)
    check_range("the least device of slot_device", slot_device.min(initial=0), 0)
    slot_load = np.take_along_axis(load, table, axis=1) * shares
    cell = np.arange(len(load))[:, None] * devices + slot_device
    sums = np.bincount(cell.ravel(), weights=slot_load.ravel(), minlength=len(load) * devices)
    return np.asarray(sums.reshape(len(load), devices))


def window_balance(plan: Plan, load: FloatArray, objective: Objective) -> float:
    """Device load over the mean, the largest of each layer and window, for loads [S, L, E]; windows count by tokens."""
    weight = window_weights(load)
    owner = np.eye(plan.topology.num_devices)[plan.slot_device]
    result = 0.0
    for window, counted in zip(load, weight, strict=True):
        shares = slot_shares(plan, window, objective)
        on_device = (np.take_along_axis(window, plan.physical_to_logical.clip(0), axis=1) * shares) @ owner
        mean = on_device.mean(axis=1)
        busy = mean > 0
        result += float(counted @ np.where(busy, on_device.max(axis=1) / np.where(busy, mean, 1.0), 1.0))
    return max(1.0, result)


def sampling_noise(plan: Plan, load: FloatArray, objective: Objective, seed: int = 0) -> float | None:
    """How much of `window_balance` chance alone makes: what it is above the plan's balance on the mean load, if each
    window drew as many experts as it counts from the mean of all windows.

    No plan that is chosen before its tokens come can be without it. Experts are drawn one by one; a token's k differ,
    and tokens of one sequence are alike, so that it is an estimate.

    Args:
        plan: the placement. load: [S, L, E] tokens of each expert in each window. objective: tells how replicas share
            them. seed: of the draws.

    Returns:
        The difference; None where loads are no whole numbers of tokens, whose chance cannot be told.
    """
    windows = chance_windows(load, seed)
    if windows is None:
        return None
    mean = load.sum(axis=0)[None]
    return max(0.0, window_balance(plan, windows[0], objective) - window_balance(plan, mean, objective))


def chance_windows(load: FloatArray, seed: int) -> tuple[FloatArray, FloatArray] | None:
    """Windows that differ by chance alone, and what each is a draw of: as many experts as it counts in a layer, from
    the mean of all windows.

    Args:
        load: [S, L, E] tokens of each expert in each window; where they are many some are taken. seed: of the draws.

    Returns:
        Both [S, L, E]; None where loads are no whole numbers of tokens, whose chance cannot be told.
    """
    if (load != np.round(load)).any():
        return None
    rng = generator(seed)
    most = min(NOISE_WINDOWS, -(-NOISE_LAYERS // load.shape[1]))
    windows = load if len(load) <= most else load[rng.choice(len(load), most, replace=False)]
    total = load.sum(axis=(0, 2))
    chance = load.sum(axis=0) / np.where(total > 0, total, 1.0)[:, None]
    counts = windows.sum(axis=2)
    drawn = np.zeros_like(windows)
    for layer in np.flatnonzero(total > 0):
        drawn[:, layer] = rng.multinomial(counts[:, layer].astype(np.int64), chance[layer])
    return drawn, counts[:, :, None] * chance


def load_imbalance_bound(problem: Problem) -> FloatArray:
    """[L] a lower bound of the largest device load over the mean device load, for every placement and shares."""
    load = problem.statistics.total_load
    mean = load.sum(axis=1) / problem.num_devices
    least = least_layer_load(load, problem.layer_slots)
    return np.maximum(1.0, np.where(mean > 0, least / np.where(mean > 0, mean, 1.0), 1.0))


def least_layer_load(load: FloatArray, layer_slots: IntArray) -> FloatArray:
    """[..., L] `least_device_load` of loads [..., L, E] in each layer's slots [L, G]."""
    result = np.empty(load.shape[:-1])
    for slots, layers in alike_layers(layer_slots):
        mine = load[..., layers, :]
        result[..., layers] = least_device_load(mine.reshape(-1, load.shape[-1]), slots).reshape(mine.shape[:-1])
    return result


@check_types
def least_device_load(load: FloatArray, slots: IntArray) -> FloatArray:
    """[L] a lower bound of the largest device load, for loads [L, E] in slots [G], however placed and shared.

    Raises:
        InputError: another shape, or fewer slots than experts.
    """
    load, slots = check_shape("load", load, ("L", "E")), check_shape("slots", slots, ("G",))
    check_range("the sum of slots", slots.sum(), load.shape[1])
    heaviest_first = -np.sort(-load, axis=1)
    arguments = (_fill_by_capacity, _split_heavy, _crowd_heavy)
    return np.asarray(np.maximum.reduce([argument(heaviest_first, slots) for argument in arguments]))


def _fill_by_capacity(load: FloatArray, slots: IntArray) -> FloatArray:
    """[L] The level at which devices together hold the whole load, each at most that of as many experts as it has
    slots.

    The mean where slots are many; more where a device with few slots cannot reach it. load: [L, E], heaviest first.
    """
    sums = np.concatenate([np.zeros((len(load), 1)), np.cumsum(load, axis=1)], axis=1)
    most = np.sort(sums[:, np.minimum(slots, load.shape[1])], axis=1)
    devices = len(slots)
    below = np.cumsum(most, axis=1) - most
    # With the g least capable devices full, the others share what is left; the level is the largest such share, since
    # filling a device that needs not be full, or sparing one that must be, only lowers it.
    return np.asarray(((sums[:, -1:] - below) / (devices - np.arange(devices))).max(axis=1))


def _split_heavy(load: FloatArray, slots: IntArray) -> FloatArray:
    """[L] An expert's load over its replicas, spare slots going where they lower the largest such figure.

    Giving each to the expert with the largest load a replica is optimal. load: [L, E], heaviest first.
    """
    # Beyond a replica a device another one lowers nothing, so that many spare slots never matter.
    experts, devices = load.shape[1], int((slots > 0).sum())
    spare = min(int(slots.sum()) - experts, experts * (devices - 1))
    replicas = replica_counts(replicate(load, experts + max(spare, 0)), experts)
    return np.asarray((load / np.minimum(replicas, devices)).max(axis=1))


def _crowd_heavy(load: FloatArray, slots: IntArray) -> FloatArray:
    """[L] By pigeonholes: of enough heavy experts without a replica, some device holds more than j.

    At least that many, less the spare slots, have none; the device carries the lightest j + 1 of them, and, where no
    slot is spare, the lightest experts of all in its other slots. load: [L, E], heaviest first.
    """
    experts, spare = load.shape[1], int(slots.sum()) - load.shape[1]
    sums = np.concatenate([np.zeros((len(load), 1)), np.cumsum(load, axis=1)], axis=1)
    best = np.zeros(len(load))
    for j in range(int(slots.max())):
        heavy = int(np.minimum(slots, j).sum()) + 1 + spare
        if heavy > experts:
            break
        carried = sums[:, heavy] - sums[:, heavy - 1 - j]
        if spare == 0:
            others = int(slots[slots > j].min()) - 1 - j
            carried = carried + sums[:, experts] - sums[:, experts - others]
        best = np.maximum(best, carried)
    return best


@check_types
def device_load_certificate(problem: Problem, table: IntArray, shares: FloatArray | None = None) -> Certificate:
    """The placement's average-load imbalance, mean over layers, with a bound that holds for every placement.

    Args:
        problem: whose statistics are placed. table: [L, P] expert of each slot, -1 in an empty one. shares: [L, P] of
            each slot in its expert's load; default equal.

    Raises:
        InputError: another shape, or an expert out of range.
    """
    layers, experts = problem.model.layers, problem.model.experts
    table = check_shape("table", table, (layers, len(problem.slot_device)))
    check_range("the largest expert of table", table.max(), 0, experts - 1)
    check_range("the least expert of table", table.min(), -1)
    if shares is not None:
        shares = check_shape("shares", shares, table.shape)
    load, used = problem.statistics.total_load, equal_shares(table, problem.model.experts) if shares is None else shares
    if problem.objective.replica_choice == "balanced":
        plan = Plan(problem.model, problem.topology, table, problem.slot_device, used)
        used = slot_shares(plan, load, problem.objective)
    loads = device_loads(load, table, used, problem.slot_device, problem.num_devices)
    mean = load.sum(axis=1) / problem.num_devices
    imbalance = np.where(mean > 0, loads.max(axis=1) / np.where(mean > 0, mean, 1.0), 1.0)
    # A layer without any load is no balanced one: it counts only where all are so.
    counted = mean > 0 if mean.any() else mean == 0
    value = max(1.0, float(imbalance[counted].mean()))
    # A balanced placement meets the bound but for rounding, and no bound may lie above its value.
    return Certificate(LOAD_OBJECTIVE, value, min(value, float(load_imbalance_bound(problem)[counted].mean())))


# The least seconds of steps.


def with_room(problem: Problem, plans: Sequence[Plan]) -> Problem | None:
    """The problem with the slots of all these plans, that bounds hold for them too; None where no device could hold
    these."""
    slots = np.maximum.reduce([problem.layer_slots, *(plan.slots_per_device for plan in plans)])
    if (slots == problem.layer_slots).all():
        return problem
    try:
        # What the engine asks for beside its objective holds for plans, not for what bounds them.
        return replace(problem, slots=None, device_slots=slots.tolist(), engine=None)
    except InputError:
        return None


def step_seconds_bound(steps: Steps, problem: Problem) -> FloatArray:
    """[S] seconds below which no plan for `problem` can bring each step.

    Args:
        steps: of the problem's model, with source ranks or without.
        problem: gives topology, objective and slots.
    """
    return np.asarray(layer_seconds_bound(steps, problem).sum(axis=1))


def layer_seconds_bound(steps: Steps, problem: Problem) -> FloatArray:
    """[S, L] the part of `step_seconds_bound` of each layer."""
    transfers = np.empty((steps.num_steps, problem.model.layers))
    for slots, layers in alike_layers(problem.layer_slots):
        holds = slots + problem.objective.online
        bound = _transfer_bound(steps, holds, problem, sources_known=steps.source is not None)
        transfers[:, layers] = bound[:, None]
    compute = compute_bound(steps.loads().astype(np.float64), problem)
    return np.asarray(compute + np.maximum(transfers, _leaving_bound(steps, problem)))


def window_seconds_bound(load: FloatArray, problem: Problem, step_tokens: int, grouped: bool = False) -> FloatArray:
    """[S] seconds below which no plan for `problem` can bring `window_times` of the loads [S, L, E] of windows."""
    model, topology, busy = problem.model, problem.topology, load.any(axis=2)
    total = load.sum(axis=2, keepdims=True)
    chance = load / np.where(total > 0, total, 1.0)
    draws = step_tokens * model.top_k
    # Of an expert's replicas that share its choices at least as many are hit as of one alone.
    compute = compute_bound(chance * draws, problem, chance_reached(np.minimum(chance, 1.0 - 1e-12), draws))
    transfer = Transfers.of(model, topology, problem.objective).of_size(step_tokens)
    seconds = compute + sum(transfer.waits(np.array(float(step_tokens))))
    heaviest_first, sizes = -np.sort(-chance, axis=2), topology.node_size
    for slots, layers in alike_layers(problem.layer_slots):
        most = int(slots.max()), int(np.add.reduceat(slots, topology.node_start).max())
        reached, nodes = (
            model.top_k * np.ones(chance[:, layers, 0].shape)
            if transfer.pairs
            else _least_reached(heaviest_first[:, layers], count, model.top_k)
            if not (grouped and model.limits_groups)
            # Groups are taken each by itself: some token may take none of them.
            else -np.expm1(-model.top_groups) * np.ones(chance[:, layers, 0].shape)
            for count in most
        )
        crossing = (nodes if transfer.dedup else reached) * (1.0 - sizes.max() / topology.num_devices)
        inside = reached * ((sizes - 1) / (sizes if transfer.dedup else topology.num_devices)).min()
        on_devices, on_nodes = transfer.all_links
        links = step_tokens * np.maximum(crossing * on_nodes, inside * on_devices)
        seconds[:, layers] += links * (1.0 + transfer.back)
    known = np.where(busy, seconds, 0.0).sum(axis=1)
    return np.asarray(known * model.layers / np.maximum(busy.sum(axis=1), 1))


def _least_reached(heaviest_first: FloatArray, slots: int, top_k: int) -> FloatArray:
    """[...] least number of devices that a token's independent choices reach, none of which has more than so many
    slots.

    heaviest_first: [..., E] chances of experts, falling. The chance that a device is reached is concave in the chance p
    of a choice to fall on it: at least p times what it is, for its p, on a device with the heaviest experts.
    """
    fullest = heaviest_first[..., :slots].sum(axis=-1)
    return np.asarray(chance_reached(fullest, top_k) / np.where(fullest > 0, fullest, 1.0))


def compute_bound(loads: FloatArray, problem: Problem, chance_hit: FloatArray | None = None) -> FloatArray:
    """[S, L] seconds of the slowest device's expert work, from expert loads [S, L, E].

    chance_hit: [S, L, E] of each expert, where loads are what steps have on average.
    """
    cost = ExpertCost.of(problem.model, problem.topology)
    together, fastest = cost.pooled(np.zeros(1, np.int64)), cost.fastest()
    experts_hit = (loads > 0).astype(np.float64) if chance_hit is None else chance_hit
    pairs, hit = loads.sum(axis=2), experts_hit.sum(axis=2)
    # Whole experts: some device reads at least the average, rounded up.
    holders = int((problem.slots_per_device > 0).sum())
    whole = np.zeros(hit.shape) if problem.has_replicas or chance_hit is not None else np.ceil(hit / holders)
    least = together.lines(pairs[..., None], hit[..., None]).max(axis=(0, -1))
    # An expert hit costs as much as so many pairs more. Replicas split these as they split its tokens: one with a share
    # of them is hit at least as often.
    beside = float((cost.read[0] / cost.pair[0]).min())
    least = np.maximum(least, whole * fastest.read[1, 0])
    if not problem.objective.online:
        # Copies for the step split any expert.
        packed = least_layer_load(loads + beside * experts_hit, problem.layer_slots)
        least = np.maximum(least, packed * fastest.pair[0, 0])
    return np.asarray(fastest.base(pairs)[..., 0] + least)


def _transfer_bound(steps: Steps, slots: IntArray, problem: Problem, sources_known: bool) -> FloatArray:
    """[S] seconds of all the all-to-alls of one layer with slots [G].

    A token whose source rank is known may live where one of its experts stands, and one that takes replicas by where it
    lives where all of them do; else one spread evenly is mostly elsewhere.
    """
    topology, objective, model = problem.topology, problem.objective, problem.model
    transfers = Transfers.of(model, topology, objective)
    sizes, devices = topology.node_size, topology.num_devices
    node_slots = np.add.reduceat(slots, topology.node_start)
    reached = fewest_holders(slots, model.top_k)
    nodes_reached = fewest_holders(node_slots, model.top_k)
    may_meet = sources_known or (objective.replica_choice != "share" and problem.has_replicas) or objective.online > 0
    ways = 2 if objective.execution == "dispatch_combine" or model.top_k > 1 else 1
    wait_out, wait_back = transfers.waits(steps)
    result = wait_out + (wait_back if ways == 2 else 0.0)
    for transfer, of_kind in transfers.of_steps(steps):
        if objective.execution == "dispatch_combine" and not may_meet:
            away, copies = 1.0 - sizes / devices, model.top_k if transfer.pairs else reached
            entering = (nodes_reached if transfer.dedup else copies) * away.min()
            split = sizes if transfer.dedup else np.full(len(sizes), devices)
            inside = copies * ((sizes - 1) / split).min()
        else:
            entering = float(nodes_reached - 1)
            inside = float(reached - 1) if topology.num_nodes == 1 else 0.0
        on_devices, on_nodes = transfer.all_links
        seconds = (
            steps.tokens * max(entering * on_nodes, inside * on_devices) * (1.0 + (transfer.back if ways == 2 else 0.0))
        )
        result = np.where(of_kind, result + seconds, result)
    return np.asarray(result)


def _leaving_bound(steps: Steps, problem: Problem) -> FloatArray:
    """[S, 1 or L] seconds of all the all-to-alls of a layer, from the copies that leave their source."""
    topology, objective, model = problem.topology, problem.objective, problem.model
    if objective.execution == "context_coherent":
        return np.zeros((steps.num_steps, 1))
    transfers = Transfers.of(model, topology, objective)
    wait_out, wait_back = transfers.waits(steps)
    result = np.repeat((wait_out + wait_back)[:, None], model.layers, axis=1)
    for transfer, of_kind in transfers.of_steps(steps):
        copy = transfer.all_links[int(topology.num_nodes > 1)] * (1.0 + transfer.back)
        result += np.where(of_kind[:, None], least_leaving(steps, problem, transfer) * copy, 0.0)
    return result


def fewest_holders(slots: IntArray, experts: int) -> int:
    """The least number of holders (devices or nodes) whose slots can take that many experts."""
    most = np.cumsum(np.sort(slots)[::-1])
    return int(np.searchsorted(most, experts) + 1)


# The least copies that leave their node, whichever replica serves a token. A token leaves its node for every expert
# that has no replica there. Slots are few: of all (expert, node) pairs at most as many as there are slots can be served
# in the node, and every expert takes at least one. The best choice keeps each expert where most of its tokens live, and
# spends what is left on the largest of the remaining pairs.


def least_leaving(steps: Steps, problem: Problem, transfer: TransferCost) -> FloatArray:
    """[S, L] copies that leave their node in one dispatch, summed over nodes; on one node, their device.

    Holds for dispatch_combine, whichever replica is chosen, for source ranks known or spread evenly.
    """
    topology = problem.topology
    node_of = topology.node_of if topology.num_nodes > 1 else np.arange(topology.num_devices)
    choices = _choices_by_node(steps, node_of, topology.num_devices)
    away = choices.sum(axis=3) - choices.max(axis=3)
    copies = problem.objective.online * problem.num_devices
    spare = problem.layer_slots.sum(axis=1) - problem.model.experts + copies
    rest = np.sort(np.sort(choices, axis=3)[..., :-1].reshape(*away.shape[:2], -1), axis=2)
    stay = np.empty(away.shape[:2])
    for layer, count in enumerate(np.minimum(spare, rest.shape[2]).tolist()):
        stay[:, layer] = rest[:, layer, rest.shape[2] - count :].sum(axis=1)
    # One copy carries a token's experts of one target together: no more than it has slots.
    most = _most_slots(problem, transfer.dedup) + copies
    carried = 1 if transfer.pairs else min(problem.model.top_k, most)
    return np.asarray(np.maximum(away.sum(axis=2) - stay, 0.0) / carried)


def _choices_by_node(steps: Steps, node_of: IntArray, devices: int) -> FloatArray:
    """[S, L, E, N] tokens that live on each node and choose each expert."""
    nodes = int(node_of.max()) + 1
    if steps.source is None:
        return np.asarray(steps.loads()[..., None] * (np.bincount(node_of, minlength=nodes) / devices))
    result = np.empty((steps.num_steps, steps.num_layers, steps.num_experts, nodes))
    source_node = node_of[steps.source]
    base = np.arange(steps.num_layers)[None, :, None] * steps.num_experts
    for s, (start, end) in enumerate(zip(steps.offsets[:-1], steps.offsets[1:], strict=True)):
        cells = (steps.expert_ids[start:end] + base) * nodes + source_node[start:end, None, None]
        counts = np.bincount(cells.ravel(), minlength=result[0].size)
        result[s] = counts.reshape(result.shape[1:])
    return result


def _most_slots(problem: Problem, dedup: bool) -> int:
    """Experts that one copy may be for: slots of the largest node, or device where copies are not merged by node."""
    topology, slots = problem.topology, problem.slots_per_device
    merged = dedup and topology.num_nodes > 1
    return int((np.add.reduceat(slots, topology.node_start) if merged else slots).max())
