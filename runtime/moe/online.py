"""Experts copied to other ranks for one microbatch: planned from its counts, fetched while tokens are on their way.

Every rank learns what every other's tokens ask for, and makes the same plan (`placement/online.py`). Owners send
weights by one all-to-all that starts before the tokens leave; backward, the gradients of copies travel to the owners
the same way and are added to theirs.

T tokens of this rank, K experts a token, E experts, G devices, S rows of expert weights here, P slots of the layer,
spare ones included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..._types import IntArray
from ...placement.errors import InputError
from ...placement.online import OnlinePlan, plan_online
from .all_to_all import AsyncAllToAll
from .coordination import naming_unresponsive_ranks
from .layer_placement import LayerPlacement
from .mesh import ExpertMesh


@dataclass(eq=False)
class Prefetch:
    """Copies on their way. slot_TK: the slots that serve this rank's tokens. places: [copies here] the spare slots that
    they go to, in order of arrival. plan: which experts are copied to which rank."""

    slot_TK: Tensor
    exchange: AsyncAllToAll
    places: Tensor
    plan: OnlinePlan


class OnlineCopies:
    """The spare slots of one layer.

    placement: the layer's with `slots` more on each device, behind its own. row_of_slot: [P] this rank's row of
    weights, copies behind its own, -1 for slots of others.

    Raises:
        InputError: an expert of the plan has several slots.
    """

    def __init__(
        self, placement: LayerPlacement, mesh: ExpertMesh, slots: int, slack: float, row_of_slot: IntArray
    ) -> None:
        check_homes(placement, slots)
        devices = placement.devices
        added = np.repeat(np.arange(devices), slots)
        self.placement = placement.with_slots(np.zeros_like(added), added, np.zeros(len(added)))
        self._mesh, self._slots, self._slack = mesh, slots, slack
        self._spare = np.stack([self.placement.on_device(g)[-slots:] for g in range(devices)])
        own = np.setdiff1d(np.arange(len(self.placement.device)), self._spare)
        self._home, self._home_slot = np.empty((2, placement.experts), dtype=np.int64)
        self._home[placement.expert], self._home_slot[placement.expert] = placement.device, own
        self._row = np.full(placement.experts, -1, dtype=np.int64)
        self._row[placement.expert] = row_of_slot
        self.row_of_slot = np.full(len(self.placement.device), -1, dtype=np.int64)
        self.row_of_slot[own] = row_of_slot
        self.row_of_slot[self._spare[mesh.rank]] = (row_of_slot >= 0).sum() + np.arange(slots)

    def start(self, expert_TK: Tensor, weights: Mapping[str, Tensor]) -> Prefetch:
        """Plans this batch, and sends the rows that others copy. expert_TK: -1 for none. The host waits for the device
        once, for the counts."""
        counts = self._counts(expert_TK)
        plan = plan_online(counts, self._home, self._slots, self.placement.node_of, self._slack)
        rank, size, copied = self._mesh.rank, self._mesh.size, plan.experts[0]
        # By receiver, in the order of its slots; from each owner they arrive in that order, too.
        sent = [copied[g][(copied[g] >= 0) & (self._home[copied[g]] == rank)] for g in range(size)]
        places = np.flatnonzero(copied[rank] >= 0)
        owner = self._home[copied[rank][places]]
        where = expert_TK.device
        rows = torch.from_numpy(self._row[np.concatenate(sent)]).to(where)
        exchange = AsyncAllToAll(
            self._mesh.group, [len(part) for part in sent], np.bincount(owner, minlength=size).tolist()
        )
        exchange.start(torch.cat([value.index_select(0, rows).flatten(1) for value in weights.values()], dim=1))
        arrives = torch.from_numpy(places[np.argsort(owner, kind="stable")]).to(where)
        slot_TK = self._slots_of(expert_TK, copied, plan.sends(counts[None])[0, rank])
        return Prefetch(slot_TK, exchange, arrives, plan)

    def finish(self, prefetch: Prefetch, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """[S + spare, ...] weights with the copies behind; waits for them."""
        arrived_CN, _, _ = prefetch.exchange.wait()
        parts = torch.split(arrived_CN, [value.shape[1:].numel() for value in weights.values()], dim=1)
        result = {}
        for (name, value), part in zip(weights.items(), parts, strict=True):
            spare = value.new_zeros(self._slots, *value.shape[1:])
            copies = part.reshape(len(part), *value.shape[1:])
            result[name] = torch.cat([value, spare.index_copy(0, prefetch.places, copies)])
        return result

    def _counts(self, expert_TK: Tensor) -> IntArray:
        """[G, E] tokens of every rank that chose each expert."""
        asked = torch.bincount(expert_TK.flatten() + 1, minlength=self.placement.experts + 1)[1:]
        table = asked.new_empty(self._mesh.size * len(asked))
        with naming_unresponsive_ranks(self._mesh.group):
            dist.all_gather_into_tensor(table, asked.contiguous(), group=self._mesh.group)
        return np.asarray(table.cpu().numpy().reshape(self._mesh.size, -1))

    def _slots_of(self, expert_TK: Tensor, copied: IntArray, sends: IntArray) -> Tensor:
        """[T, K] slots, so many of each expert's tokens [E, G] to each device; in order of tokens, then of devices."""
        experts, devices = sends.shape
        slot = np.full((experts, devices), -1, dtype=np.int64)
        slot[np.arange(experts), self._home] = self._home_slot
        receiver, place = np.nonzero(copied >= 0)
        slot[copied[receiver, place], receiver] = self._spare[receiver, place]
        flat = expert_TK.flatten()
        order = flat.argsort(stable=True)
        served = torch.from_numpy(np.repeat(slot.ravel(), sends.ravel())).to(flat.device)
        result = torch.full_like(flat, -1)
        result[order[len(flat) - len(served) :]] = served
        return result.view(expert_TK.shape)


def check_homes(placement: LayerPlacement, slots: int) -> None:
    """Raises InputError if an expert has several slots beside `slots` spare ones a rank."""
    if slots and (placement.replicas > 1).any():
        expert = int(placement.replicas.argmax())
        raise InputError(
            f"online_slots ({slots}) copies experts from the one slot that each has; the plan has "
            f"{int(placement.replicas[expert])} of expert {expert}: solve with slots=experts, "
            "Objective(online=...), or leave online_slots out"
        )
