"""One layer of a plan, as its ranks run it: the experts of each slot, and which slot serves a rank's tokens, be it the
same for every batch, or divided among replicas anew (`replica_choice="balanced"`, `placement/division.py` at run time).

Then ranks exchange how many of their tokens chose each expert, once a layer, and every rank computes the same division
of all of them from it without further talk: whole numbers only, so that no rounding tells ranks apart. Devices keep
their own tokens, and nodes theirs, while devices stay at or under the least possible largest load. On CPUs it is that
of `placement/division.py`; on GPUs torch's operations, which the host never waits for.

P slots, E experts, G devices (ranks), R most replicas of an expert, T tokens of this rank, K experts a token, N = T * K
pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.division import EVEN_TURN, NODE_TURN, OWN_TURN, SETS_UP_TO, TURNS, divide, source_division
from ...placement.errors import InputError
from ...placement.plan import Plan


@dataclass(frozen=True, eq=False)
class LayerPlacement:
    """expert, device, share: [P], one entry a slot that holds an expert, devices not decreasing. node_of: [G]. experts:
    E."""

    expert: IntArray
    device: IntArray
    share: FloatArray
    node_of: IntArray
    experts: int

    @classmethod
    def of(cls, plan: Plan, layer: int) -> LayerPlacement:
        """The plan's filled slots at the model's absolute layer index `layer`.

        Raises:
            InputError: the plan has no such layer.
        """
        if layer not in plan.moe_layers:
            raise InputError(
                f"the plan places the layers {list(plan.moe_layers)}, not layer {layer}; solve again with a model that "
                "names all MoE layers"
            )
        row = plan.moe_layers.index(layer)
        filled = plan.filled[row]
        return cls(
            plan.physical_to_logical[row, filled],
            plan.slot_device[filled],
            plan.shares[row, filled],
            plan.topology.node_of,
            plan.model.experts,
        )

    @property
    def devices(self) -> int:
        return len(self.node_of)

    @cached_property
    def replicas(self) -> IntArray:
        """[E] slots of each expert."""
        return np.bincount(self.expert, minlength=self.experts)

    @cached_property
    def slots_of(self) -> IntArray:
        """[E, R] slots of each expert in increasing order, padded with -1."""
        result = np.full((self.experts, int(self.replicas.max())), -1, dtype=np.int64)
        filled = np.zeros(self.experts, dtype=np.int64)
        for slot, expert in enumerate(self.expert):
            result[expert, filled[expert]] = slot
            filled[expert] += 1
        return result

    def on_device(self, device: int) -> IntArray:
        """The slots of a device, in increasing order."""
        return np.flatnonzero(self.device == device)

    def with_slots(self, expert: IntArray, device: IntArray, share: FloatArray) -> LayerPlacement:
        """The same layer with more slots, appended behind the others of their devices."""
        devices = np.concatenate([self.device, device])
        order = np.argsort(devices, kind="stable")
        return LayerPlacement(
            np.concatenate([self.expert, expert])[order],
            devices[order],
            np.concatenate([self.share, share])[order],
            self.node_of,
            self.experts,
        )

    def quota(self, device: int) -> FloatArray:
        """[E, R] of `device`'s tokens for an expert, the part that each of its slots serves; rows sum to 1.

        Every device is taken to have as many tokens for the expert. Slots on the device itself are filled first, then
        those in its node, then the rest, each in proportion to what is left; so every slot gets its share in total, and
        no token travels further than the shares ask for.
        """
        result = np.zeros(self.slots_of.shape)
        single = self.replicas == 1
        result[single, 0] = 1.0
        for expert in np.flatnonzero(~single):
            slots = self.slots_of[expert, : self.replicas[expert]]
            result[expert, : len(slots)] = self._flow(slots)[device]
        return result

    def _flow(self, slots: IntArray) -> FloatArray:
        """[G, slots] part of each device's tokens that goes to each slot."""
        left = np.ones(self.devices)
        capacity = self.share[slots] * self.devices
        flow = np.zeros((self.devices, len(slots)))
        near = self.node_of[:, None] == self.node_of[self.device[slots]][None, :]
        own = np.arange(self.devices)[:, None] == self.device[slots][None, :]
        for allowed, regions in ((own, np.arange(self.devices)), (near, self.node_of), (np.ones_like(near), None)):
            labels = np.zeros(self.devices, dtype=np.int64) if regions is None else regions
            for label in np.unique(labels):
                rows = np.flatnonzero(labels == label)
                columns = np.flatnonzero(allowed[rows[0]])
                supply, demand = left[rows].sum(), capacity[columns].sum()
                if supply <= 1e-12 or demand <= 1e-12:
                    continue
                moved = min(supply, demand) * np.outer(left[rows] / supply, capacity[columns] / demand)
                flow[np.ix_(rows, columns)] += moved
                left[rows] -= moved.sum(axis=1)
                capacity[columns] -= moved.sum(axis=0)
        return np.asarray(flow / flow.sum(axis=1, keepdims=True))


DEVICE_SWEEPS = 8
"""Over the experts with replicas, where GPUs are more than `SETS_UP_TO`: the host cannot look whether fewer do."""


class BalancedReplicas:
    """Which replica serves a token under one placement, by what all ranks' tokens of this batch ask for.

    exchange: gives the counts [G, E] of all ranks for this rank's [E].
    """

    def __init__(
        self, placement: LayerPlacement, rank: int, device: torch.device, exchange: Callable[[Tensor], Tensor]
    ) -> None:
        self._rank, self._exchange, self._node_of = rank, exchange, placement.node_of
        self._slots_ER = torch.from_numpy(placement.slots_of).to(device)
        self._replicated = bool((placement.replicas > 1).any())
        self._hosts = np.zeros((placement.experts, placement.devices), dtype=np.bool_)
        self._hosts[placement.expert, placement.device] = True
        # Two slots of one device may hold the same expert; they split what the device serves.
        device_ER = np.where(placement.slots_of < 0, -1, placement.device[placement.slots_of])
        same_ERR = (device_ER[:, :, None] == device_ER[:, None, :]) & (device_ER >= 0)[:, :, None]
        twins, twin = same_ERR.sum(axis=2), np.tril(same_ERR, -1).sum(axis=2)
        self._device_ER, self._twins_ER, self._twin_ER = (
            torch.from_numpy(of).to(device) for of in (device_ER.clip(0), np.maximum(twins, 1), twin)
        )
        self._here_ER = torch.from_numpy(device_ER >= 0).to(device)
        self._on_device = None if device.type == "cpu" else DeviceDivision(self._hosts, self._node_of, device)
        if self._replicated:
            # Compiled here, not in a step.
            self._served_here(torch.zeros(self._hosts.T.shape, dtype=torch.int64, device=device))

    def slots(self, expert_TK: Tensor) -> Tensor:
        """[T, K] slot of each chosen expert; every rank calls it, with any number of tokens."""
        if not self._replicated:
            return self._slots_ER[expert_TK, 0]
        expert_N = expert_TK.flatten()
        order_N, sorted_N, place_N, count_E = in_queues(expert_N, len(self._slots_ER))
        served_EG = self._served_here(self._exchange(count_E))
        quota_ER = served_EG.gather(1, self._device_ER) * self._here_ER
        part_ER = quota_ER.div(self._twins_ER, rounding_mode="floor") + (self._twin_ER < quota_ER % self._twins_ER)
        replica_N = (part_ER.cumsum(1)[sorted_N] <= place_N[:, None]).sum(dim=1)
        slot_N = torch.empty_like(expert_N)
        slot_N[order_N] = self._slots_ER[sorted_N, replica_N]
        return slot_N.view_as(expert_TK)

    def _served_here(self, count_GE: Tensor) -> Tensor:
        """[E, G] tokens of this rank that each device serves."""
        if self._on_device is not None:
            return self._on_device(count_GE)[self._rank]
        by_source = count_GE.numpy()[None]
        counts = by_source.sum(axis=1)
        divided = divide(counts, self._hosts, self._node_of, "local", by_source)
        parts = source_division(divided, counts, self._hosts, self._node_of, "local", by_source)
        return torch.from_numpy(parts[0, self._rank].astype(np.int64))


def in_queues(expert_N: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token-expert pairs in queues by expert: ([N] the order, [N] the experts in it, [N] places in their queues, [E]
    their lengths)."""
    order_N = expert_N.argsort(stable=True)
    count_E = torch.zeros(experts, dtype=torch.int64, device=expert_N.device)
    count_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))
    begin_E = count_E.cumsum(0) - count_E
    sorted_N = expert_N[order_N]
    place_N = torch.arange(len(expert_N), device=expert_N.device) - begin_E[sorted_N]
    return order_N, sorted_N, place_N, count_E


class DeviceDivision:
    """The division as torch operations on one device, in whole numbers and without looking at any of them.

    Up to `SETS_UP_TO` ranks it is that of `placement.division.divide` bit for bit; with more, the same way with a fixed
    number of sweeps.
    """

    def __init__(self, hosts: BoolArray, node_of: IntArray, device: torch.device) -> None:
        devices = hosts.shape[1]
        self._hosts_EG = torch.from_numpy(hosts).to(device)
        self._split = [
            (int(e), torch.from_numpy(np.flatnonzero(hosts[e])).to(device), np.flatnonzero(hosts[e]).tolist())
            for e in np.flatnonzero(hosts.sum(axis=1) > 1)
        ]
        self._alone_E = torch.from_numpy(hosts.sum(axis=1) == 1).to(device)
        regions = [np.flatnonzero(node_of == n) for n in range(int(node_of.max()) + 1)] + [np.arange(devices)]
        self._regions = [torch.from_numpy(members).to(device) for members in regions]
        self._nodes = [members.tolist() for members in regions[:-1]] if node_of.max() > 0 else []
        self._node = {g: members for members in self._nodes for g in members}
        self._few = devices <= SETS_UP_TO
        if self._few:
            sets = np.arange(1 << devices)
            size = sum((sets >> g) & 1 for g in range(devices))
            mask = hosts @ (1 << np.arange(devices))
            self._mask_E, self._size = (torch.from_numpy(np.asarray(of)).to(device) for of in (mask, size))
            self._narrow = {
                (e, g): torch.from_numpy(np.flatnonzero(((sets >> g) & 1 == 1) & (sets & mask[e] != mask[e]))).to(
                    device
                )
                for e, _, of in self._split
                for g in of
            }

    def __call__(self, count_GE: Tensor) -> Tensor:
        """[G, E, G] tokens of each rank that each rank serves, from [G, E] tokens of each that chose each expert."""
        count_E, living_EG = count_GE.sum(0), count_GE.t()
        divided_EG = self._within_sets(count_E, living_EG) if self._few else self._filled(count_E, living_EG)
        return self._near_first(divided_EG, count_GE)

    def _within_sets(self, count_E: Tensor, living_EG: Tensor) -> Tensor:
        devices = living_EG.shape[1]
        tokens = count_E.new_zeros(1 << devices).index_add_(0, self._mask_E, count_E)
        for g in range(devices):
            halves = tokens.view(-1, 2, 1 << g)
            halves[:, 1] += halves[:, 0]
        size = self._size
        least = (tokens[1:] + size[1:] - 1).div(size[1:], rounding_mode="floor").max()
        slack = least * size - tokens
        divided_EG = count_E[:, None] * (self._hosts_EG & self._alone_E[:, None])
        left_E = count_E * ~self._alone_E

        def take(target: Tensor, e: int, g: int) -> Tensor:
            narrow = self._narrow[e, g]
            taken = torch.minimum(torch.minimum(target, left_E[e]), slack[narrow].min())
            slack[narrow] -= taken
            divided_EG[e, g] += taken
            left_E[e] -= taken
            return taken

        for turn in TURNS:
            if turn == NODE_TURN:
                for members in self._nodes:
                    for e, _, of in self._split:
                        inside = [g for g in of if g in members]
                        away = (living_EG[e, members] - divided_EG[e, members]).sum()
                        for number, g in enumerate(inside):
                            replicas = len(inside) - number
                            target = (away.clamp_min(0) + replicas - 1).div(replicas, rounding_mode="floor")
                            away = away - take(target, e, g)
                continue
            for e, _, of in self._split:
                even = (left_E[e] + len(of) - 1).div(len(of), rounding_mode="floor")
                for g in of:
                    take(living_EG[e, g] if turn == OWN_TURN else even if turn == EVEN_TURN else left_E[e], e, g)
        return divided_EG

    def _filled(self, count_E: Tensor, living_EG: Tensor) -> Tensor:
        hosts = self._hosts_EG.long()
        number, place = hosts.sum(1, keepdim=True), hosts.cumsum(1) * hosts
        divided_EG = count_E[:, None].div(number, rounding_mode="floor") * hosts
        divided_EG += (place > 0) & (place <= count_E[:, None] % number)
        load_G = divided_EG.sum(0)
        for _ in range(DEVICE_SWEEPS):
            for e, of_devices, _ in self._split:
                base = load_G[of_devices] - divided_EG[e, of_devices]
                filled = _poured(base, count_E[e])
                divided_EG[e, of_devices] = filled
                load_G[of_devices] = base + filled
        most = load_G.max()
        for by_node in (False, True)[: 1 + bool(self._nodes)]:
            for e, _, of in self._split:
                for g in of:
                    for h in of:
                        lack, spare = living_EG[e, g] - divided_EG[e, g], divided_EG[e, h] - living_EG[e, h]
                        if by_node:
                            near, far = self._node[g], self._node[h]
                            if near is far:
                                continue
                            lack = (living_EG[e, near] - divided_EG[e, near]).sum()
                            spare = torch.minimum(spare.clamp_min(0), (divided_EG[e, far] - living_EG[e, far]).sum())
                        moved = torch.minimum(torch.minimum(lack, spare), most - load_G[g]).clamp_min(0)
                        divided_EG[e, g] += moved
                        divided_EG[e, h] -= moved
                        load_G[g] += moved
                        load_G[h] -= moved
        return divided_EG

    def _near_first(self, divided_EG: Tensor, count_GE: Tensor) -> Tensor:
        left_EG, room_EG = count_GE.t().clone(), divided_EG.clone()
        own_EG = torch.minimum(left_EG, room_EG)
        left_EG -= own_EG
        room_EG -= own_EG
        result_EHG = torch.diag_embed(own_EG)
        for members in self._regions:
            left, room = left_EG[:, members], room_EG[:, members]
            left_end, room_end = left.cumsum(1), room.cumsum(1)
            end = torch.minimum(left_end[:, :, None], room_end[:, None, :])
            begin = torch.maximum((left_end - left)[:, :, None], (room_end - room)[:, None, :])
            moved = (end - begin).clamp_min(0)
            result_EHG[:, members[:, None], members] += moved
            left_EG[:, members] -= moved.sum(2)
            room_EG[:, members] -= moved.sum(1)
        return result_EHG.transpose(0, 1)


def _poured(base: Tensor, tokens: Tensor) -> Tensor:
    """[n] tokens poured onto loads [n], the lowest first, so that they end as level as can be."""
    rising, order = base.sort(stable=True)
    levels = (tokens + rising.cumsum(0)).div(torch.arange(1, len(base) + 1, device=base.device), rounding_mode="floor")
    level = levels.min()
    filled = (level - rising).clamp_min(0)
    reached = rising <= level
    filled += reached & (reached.cumsum(0) <= tokens - filled.sum())
    return torch.empty_like(filled).scatter_(0, order, filled)
