"""How tokens reach their experts' ranks and results return: the contract, and dispatch by one or two hops.

T tokens of this rank, K experts a token, D hidden size, N token-expert pairs computed here, S rows of expert weights here,
P slots of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..._types import IntArray
from ...placement.errors import InputError
from .all_to_all import Departed, Hop
from .layer_placement import LayerPlacement
from .mesh import ExpertMesh

# Token-expert pairs of a rank, in the order of its rows of expert weights, and back to sums a token. R tokens here, K
# experts a token, N pairs computed here, S rows of expert weights, D hidden size, P slots.


@dataclass(frozen=True, eq=False)
class Pairs:
    """row_ND: inputs, those of one row of expert weights behind another's. count_S: inputs of each.

    token_N, weight_N: the token that each input is of, and its gate weight. tokens: R.
    """

    row_ND: Tensor
    count_S: Tensor
    token_N: Tensor
    weight_N: Tensor
    tokens: int

    @classmethod
    def of(cls, x_RD: Tensor, weight_RK: Tensor, slot_RK: Tensor, row_P: Tensor, rows: int, pairs: int) -> Pairs:
        """row_P: [P + 1] row of expert weights of each slot, `rows` where it stands elsewhere; slot -1 reads the last
        entry. pairs: how many stand here."""
        key_N = row_P[slot_RK.long()].flatten()
        order_N = key_N.argsort(stable=True)[:pairs]
        count_S = torch.zeros(rows + 1, dtype=torch.int64, device=key_N.device)
        count_S.scatter_add_(0, key_N, torch.ones_like(key_N))
        token_N = order_N.div(max(slot_RK.shape[1], 1), rounding_mode="floor")
        return cls(x_RD.index_select(0, token_N), count_S[:-1], token_N, weight_RK.flatten()[order_N], tokens=len(x_RD))

    def weighted_sum(self, y_ND: Tensor) -> Tensor:
        """[R, D] in float32: each token's outputs, weighted."""
        weighted_ND = y_ND.float() * self.weight_N[:, None]
        return weighted_ND.new_zeros(self.tokens, y_ND.shape[1]).index_add(0, self.token_N, weighted_ND)


@dataclass(frozen=True, eq=False)
class Work:
    """What this rank's experts are to compute.

    row_ND: inputs, those of one expert row behind another. count_S: [S] inputs of each. state: the dispatcher's own.
    """

    row_ND: Tensor
    count_S: Tensor
    state: Any = field(repr=False, default=None)


class Sent(Protocol):
    """Tokens under way: other work may be done before `wait`."""

    def wait(self) -> Work: ...


class Dispatcher(Protocol):
    """Carries tokens of all ranks to the rows of expert weights that serve them, and weighted sums back. Every rank
    calls the same methods in the same order; gradients flow through both."""

    def place(self, placement: LayerPlacement, row_of_slot_P: Tensor, rows: int) -> None:
        """A plan comes into force. row_of_slot_P: [P] this rank's row of expert weights, -1 for slots of other ranks.
        rows: S."""

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Sent:
        """Starts sending tokens to the slots that serve them. weight_TK: float32 gate weights."""

    def combine(self, y_ND: Tensor, work: Work) -> Tensor:
        """[T, D] the sum of each token's expert outputs, weighted; y_ND: [N, D] in the order of `work.row_ND`."""


@dataclass(frozen=True, eq=False)
class _Arrived:
    hops: list[Departed]
    pairs: Pairs


class HopDispatcher:
    """One copy a token and rank, summed at the rank before it returns.

    two_stage: first one copy a token and node, to the rank of equal place there, which hands it on inside the node.
    Sums are taken on the way back as well, so that one row a token and node returns (as DeepEP does).
    copies: of the latest dispatch, copies sent to each rank, hop by hop; a rank's own are among them. returned: the same of
    the sums that go back. devices: of the ranks of each hop.
    A slot of -1 is no slot: its row goes nowhere for it.
    """

    def __init__(self, mesh: ExpertMesh, two_stage: bool) -> None:
        if two_stage and (mesh.inter is None or mesh.intra is None):
            raise InputError(
                "dispatch in two stages needs a mesh of two dimensions, nodes and devices a node: "
                "init_device_mesh(kind, (nodes, devices), mesh_dim_names=('node', 'device'))"
            )
        self._mesh, self.two_stage = mesh, two_stage
        self._hops: list[Hop] = []
        self._row_P = torch.empty(0, dtype=torch.int64)
        self._rows = 0
        self.copies: tuple[tuple[int, ...], ...] = ()
        self.returned: tuple[tuple[int, ...], ...] = ()
        self.devices: tuple[IntArray, ...] = ()

    def place(self, placement: LayerPlacement, row_of_slot_P: Tensor, rows: int) -> None:
        mesh = self._mesh
        device_P = torch.from_numpy(placement.device.copy()).to(mesh.device)
        if self.two_stage:
            assert mesh.inter is not None
            assert mesh.intra is not None
            place_NS = np.arange(mesh.size).reshape(-1, mesh.node_size)
            here, place = divmod(mesh.rank, mesh.node_size)
            stages = [
                (mesh.inter, device_P // mesh.node_size, place_NS[:, place]),
                (mesh.intra, device_P % mesh.node_size, place_NS[here]),
            ]
        else:
            stages = [(mesh.group, device_P, np.arange(mesh.size))]
        stages = [stage for stage in stages if stage[0].size() > 1]
        self._hops = [Hop(group, peer_P) for group, peer_P, _ in stages]
        self.devices = tuple(devices for *_, devices in stages)
        self._row_P = torch.cat([row_of_slot_P.to(mesh.device), torch.tensor([rows], device=mesh.device)])
        self._rows = rows

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Sent:
        if not self._hops:
            return _Local(self, x_TD, weight_TK, slot_TK)
        return _UnderWay(self, self._hops[0].depart(x_TD, weight_TK, slot_TK))

    def combine(self, y_ND: Tensor, work: Work) -> Tensor:
        arrived: _Arrived = work.state
        result = arrived.pairs.weighted_sum(y_ND).to(y_ND.dtype)
        for hop, departed in zip(reversed(self._hops), reversed(arrived.hops), strict=True):
            result = hop.back(departed, result)
        return result

    def finish(self, departed: Departed) -> Work:
        """Waits for the first hop, and takes the others."""
        taken = [departed]
        x_RD, weight_RK, slot_RK = departed.transit.arrive()
        for hop in self._hops[1:]:
            taken.append(hop.depart(x_RD, weight_RK, slot_RK))
            x_RD, weight_RK, slot_RK = taken[-1].transit.arrive()
        self.copies = tuple(hop.copies for hop in taken)
        self.returned = tuple(tuple(hop.flight.received) for hop in taken)
        return self.arrange(x_RD, weight_RK, slot_RK, taken, taken[-1].pairs)

    def arrange(self, x_RD: Tensor, weight_RK: Tensor, slot_RK: Tensor, taken: list[Departed], pairs: int) -> Work:
        """Brings the pairs of arrived rows into the order of the rows of expert weights."""
        arranged = Pairs.of(x_RD, weight_RK, slot_RK, self._row_P, self._rows, pairs)
        return Work(arranged.row_ND, arranged.count_S, _Arrived(taken, arranged))


class _UnderWay:
    def __init__(self, dispatcher: HopDispatcher, departed: Departed) -> None:
        self._dispatcher, self._departed = dispatcher, departed

    def wait(self) -> Work:
        return self._dispatcher.finish(self._departed)


class _Local:
    """A mesh of one rank: nothing travels."""

    def __init__(self, dispatcher: HopDispatcher, x_TD: Tensor, weight_TK: Tensor, slot_TK: Tensor) -> None:
        self._dispatcher, self._given = dispatcher, (x_TD, weight_TK, slot_TK)

    def wait(self) -> Work:
        return self._dispatcher.arrange(*self._given, [], int((self._given[2] >= 0).sum()))


def flat(mesh: ExpertMesh) -> HopDispatcher:
    """One all-to-all over all ranks each way: one copy a token and rank."""
    return HopDispatcher(mesh, two_stage=False)


def node_aware(mesh: ExpertMesh) -> HopDispatcher:
    """Two all-to-alls each way: one copy a token and node between nodes, then one a token and rank inside."""
    return HopDispatcher(mesh, two_stage=True)
