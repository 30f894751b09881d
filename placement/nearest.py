"""Replicas taken where the token lives: on its home device, else in its home node, else anywhere.

The rule of SGLang's expert dispatch (`_find_nearest_expert` and `compute_logical_to_rank_dispatch_physical_map` in
python/sglang/srt/eplb/expert_location.py, read in 0.5.23): a rank uses the replica on its own GPU; else one in its own
node, where only some of the replicas are; else ranks are dealt fairly over all replicas. Of several in the home node
SGLang takes the first, here they are taken by their shares, so the two agree where a node holds at most one replica off
the home device. Shapes as in `token_counts`; H indexes homes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .plan import Plan
from .token_counts import Bounds, IdArray, chosen_share, expert_counts, reach_chance, sum_steps, transitions_kept
from .topology import Topology

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NearestCounts:
    """Expected counts of steps. tokens, experts_hit: [S, L, G] token-expert pairs computed and experts read.

    pairs, node_pairs: [S, L, H, G] and [S, L, H, N] tokens of each home that need each device and node. local,
    node_local: [S, L-1] transitions that stay on their device or node, in tokens.
    """

    tokens: FloatArray
    experts_hit: FloatArray
    pairs: FloatArray
    node_pairs: FloatArray
    local: FloatArray
    node_local: FloatArray


def nearest_share(device_share: FloatArray, topology: Topology, home: int) -> FloatArray:
    """[L, E, G] fraction of each expert's tokens from one home device that each device serves.

    device_share: [L, E, G] fractions as the plan states them; a replica with share 0 serves nobody.
    """
    in_node = np.where(topology.node_of == topology.node_of[home], device_share, 0.0)
    inside = in_node.sum(axis=2, keepdims=True)
    share = np.where(inside > 0.0, in_node / np.where(inside > 0.0, inside, 1.0), device_share)
    at_home = device_share[:, :, home] > 0.0
    share[at_home] = np.eye(topology.num_devices)[home]
    return np.asarray(share)


def nearest_counts(
    plan: Plan, ids: IdArray, bounds: Bounds, source: npt.NDArray[np.int64] | None, topology: Topology
) -> NearestCounts:
    """Counts of tokens [L, T, k] whose homes are `source` [T], or, when None, spread evenly over all devices."""
    steps, layers, devices = len(bounds) - 1, ids.shape[0], topology.num_devices
    nodes = np.eye(topology.num_nodes)[topology.node_of]
    pairs = np.zeros((steps, layers, devices, devices))
    node_pairs = np.zeros((steps, layers, devices, topology.num_nodes))
    local, node_local = np.zeros((steps, layers - 1)), np.zeros((steps, layers - 1))
    work = _Work(plan, steps)
    weight = 1.0 / devices if source is None else 1.0
    for home in range(devices):
        mine = np.arange(ids.shape[1]) if source is None else np.flatnonzero(source == home)
        ids_h, bounds_h = ids[:, mine], np.searchsorted(mine, bounds)
        share = nearest_share(plan.device_share, topology, home)
        # Thirds do not add up to one exactly, and what is whole must be recognised as whole.
        node_share = np.where((summed := share @ nodes) > 1.0 - 1e-9, 1.0, summed)
        chosen, node_chosen = chosen_share(ids_h, share), chosen_share(ids_h, node_share)
        pairs[:, :, home] = weight * sum_steps(reach_chance(ids_h, share, chosen), bounds_h)
        node_pairs[:, :, home] = weight * sum_steps(reach_chance(ids_h, node_share, node_chosen), bounds_h)
        local += weight * transitions_kept(chosen, ids_h.shape[2], bounds_h)
        node_local += weight * transitions_kept(node_chosen, ids_h.shape[2], bounds_h)
        work.add(share, weight, None if source is None else expert_counts(ids_h, bounds_h, plan.model.experts))
    if source is None:
        work.spread(expert_counts(ids, bounds, plan.model.experts))
    return NearestCounts(*work.on_devices(devices), pairs, node_pairs, local, node_local)


class _Work:
    """Token-expert pairs and the chance of staying idle of every slot, summed over homes."""

    def __init__(self, plan: Plan, steps: int) -> None:
        self._plan = plan
        self._layers = np.arange(len(plan.physical_to_logical))[:, None]
        at_slot = self._at_slots(plan.device_share)
        # Two slots of one device may hold the same expert; they split what the device serves.
        self._part = plan.shares / np.where(at_slot > 0.0, at_slot, 1.0)
        self._mean = np.zeros(plan.shares.shape)
        self._tokens = np.zeros((steps, *plan.shares.shape))
        self._idle = np.ones((steps, *plan.shares.shape))

    def _at_slots(self, share: FloatArray) -> FloatArray:
        """[L, P] from [L, E, G]; what stands here of empty slots is never served, their share being 0."""
        return np.asarray(share[self._layers, self._plan.physical_to_logical, self._plan.slot_device])

    def add(self, share: FloatArray, weight: float, counts: FloatArray | None) -> None:
        """Takes in what one home asks for: counts [S, L, E], or None where homes are not told apart."""
        served = self._at_slots(share) * self._part
        self._mean += weight * served
        if counts is not None:
            self._serve(served, counts)

    def spread(self, counts: FloatArray) -> None:
        """Takes in counts [S, L, E] of tokens of which each may have come from any home."""
        self._serve(self._mean, counts)

    def _serve(self, served: FloatArray, counts: FloatArray) -> None:
        at_slot = np.take_along_axis(counts, self._plan.physical_to_logical[None], axis=2)
        self._tokens += at_slot * served
        self._idle *= np.power(1.0 - np.minimum(served, 1.0), at_slot)

    def on_devices(self, devices: int) -> tuple[FloatArray, FloatArray]:
        """[S, L, G] pairs computed and experts read."""
        owner = np.eye(devices)[self._plan.slot_device]
        return self._tokens @ owner, (1.0 - self._idle) @ owner
