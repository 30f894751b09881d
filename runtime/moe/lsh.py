"""Dispatch of clusters in place of tokens (LSH-MoE, 2024), on top of plain dispatch, which carries all that stays
alone.

A cluster is of pairs of a token and a slot, so that one expert's output serves all its members and each member keeps
its own gate weight w, applied here, at the sender. With s the residual's scale and a = w^2 over the cluster's sum of
them,

    c = sum of a x        y = E(c) + s (x - c)        out = sum over the token's pairs of w y

since what a pair's error does to its token goes with w. Autograd goes through just that, but takes a as given: with g
a pair's gradient of y and G their sum over a cluster, dx = s g + a (J^T G - s G), and of a weight <d out, y>. One row
a cluster travels, there and back, forward and backward.

T tokens, K slots a token, N = T K pairs, P slots, D hidden size, M most clusters of two or more, H hashes of d
dimensions each, X = H d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...placement.errors import InputError
from .compression import CompressionStatistics, LSHCompression
from .dispatcher import AllToAllDispatcher, DispatchMetadata
from .layer_placement import LayerPlacement
from .mesh import ExpertMesh

# Cross-polytope hashing: the nearest of the 2 d unit vectors along the axes of a randomly rotated space of d
# dimensions. Andoni et al., Practical and Optimal LSH for Angular Distance, 2015; as in LSH-MoE, 2024. Here each hash
# projects to its own small space: at full width nearly every token would have a code of its own.


def rotations(hidden_size: int, hashes: int, dimension: int, seed: int) -> Tensor:
    """[D, H * d] of float32: for each hash d orthonormal directions, drawn from `seed`; the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(hashes, hidden_size, dimension, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis.movedim(0, 1).reshape(hidden_size, hashes * dimension).float()


def digits(projected: Tensor, dimension: int) -> Tensor:
    """[N, H] hash values below 2 d of rows projected to [N, H * d]: twice the longest coordinate's index, one more if
    it is negative."""
    p_NHd = projected.view(len(projected), -1, dimension)
    longest = p_NHd.abs().argmax(dim=-1, keepdim=True)
    return (2 * longest + (p_NHd.gather(-1, longest) < 0)).squeeze(-1)


# Pairs to clusters, by sorting their hash codes; as many clusters as a target allows. Every choice rests on integers
# and on sums in a fixed order, so that the same batch gives the same clusters again, as activation checkpointing needs.
# The host never waits for the device: what depends on data has a fixed, sufficient size.


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of two pairs or more, in order of their slots; the rest of the M places are empty.

    row_TK: [T, K] the cluster of each pair, M for pairs alone. pair_N, offset_M: pairs of one cluster behind another's,
    and where each begins; offset_M has one more, the end. slot_M: [M] -1 for empty places. size_M: [M]. levels: whole
    hashes that counted.
    """

    row_TK: Tensor
    pair_N: Tensor
    offset_M: Tensor
    slot_M: Tensor
    size_M: Tensor
    levels: Tensor


def cluster(
    projected_TX: Tensor,
    slot_TK: Tensor,
    scope_TK: Tensor,
    weight_TK: Tensor,
    target: Tensor,
    slots: int,
    dimension: int,
    largest_target: int,
    lloyd_steps: int,
) -> Clusters:
    """Clusters of the pairs in scope such that they and the pairs alone are at most `target`, or one a slot.

    As many whole hashes count as the target allows; of the next one, where it parts clusters of the largest squared
    error a new cluster, until the target is reached. Then Lloyd's steps. Hashes see tokens relative to the mean of
    their slot, since what a slot's tokens have in common says nothing about who is alike.

    Args:
        projected_TX: [T, H * d] tokens in the hashes' spaces.
        slot_TK: [T, K] slots.
        scope_TK: [T, K] which pairs may be clustered.
        weight_TK: [T, K] what a pair counts in its cluster's mean; above zero.
        target: a number, on the device.
        slots: P.
        dimension: d.
        largest_target: that `target` cannot pass, known to the host.
        lloyd_steps: how often pairs go to the nearest mean of their slot.
    """
    tokens, top_k = slot_TK.shape
    pairs = tokens * top_k
    slot_N = torch.where(scope_TK, slot_TK, slots).flatten()
    token_N = torch.arange(tokens, device=slot_N.device).repeat_interleave(top_k)
    p_NX = _centred(projected_TX, slot_N, token_N, slots)
    digit_NH = digits(p_NX, dimension)
    hashes = digit_NH.shape[1]

    key_N = slot_N
    for h in range(hashes):
        key_N = key_N * (2 * dimension) + digit_NH[:, h]
    key_N, order_N = key_N.sort(stable=True)
    inside_N = slot_N[order_N] < slots

    begins = [_changes(key_N.div((2 * dimension) ** (hashes - h), rounding_mode="floor")) for h in range(hashes + 1)]
    begin_HN = torch.stack([*begins, begins[-1]])
    count_H = (begin_HN & inside_N).sum(dim=1)
    level = ((count_H[:-1] <= target).sum() - 1).clamp(min=0).view(1)
    begin_N = begin_HN.index_select(0, level)[0]
    finer_N = begin_HN.index_select(0, level + 1)[0]
    spare = target - count_H.index_select(0, level)[0]
    p_NX = p_NX[order_N]
    begin_N = begin_N | (finer_N & _worth_parting(begin_N, finer_N, inside_N, p_NX, spare))
    id_N, rows = begin_N.cumsum(0) - 1, max(largest_target, slots)
    for _ in range(lloyd_steps):
        id_N = _nearest_means(id_N, rows, p_NX, slot_N[order_N], weight_TK.flatten()[order_N], slots)
    if lloyd_steps:
        by_id_N = id_N.argsort(stable=True)
        order_N, inside_N, begin_N = order_N[by_id_N], inside_N[by_id_N], _changes(id_N[by_id_N])
    return _arranged(begin_N, inside_N, order_N, slot_N, min(pairs // 2, rows), top_k, level[0])


def _centred(projected_TX: Tensor, slot_N: Tensor, token_N: Tensor, slots: int) -> Tensor:
    """[N, X] each pair's projection less its slot's mean; zero out of scope, where values may be NaN."""
    by_slot = slot_N.argsort(stable=True)
    count_P = torch.zeros(slots + 1, dtype=torch.int64, device=slot_N.device)
    count_P.scatter_add_(0, slot_N, torch.ones_like(slot_N))
    mean_PX = F.embedding_bag(token_N[by_slot], projected_TX, count_P.cumsum(0) - count_P, mode="mean")
    difference = projected_TX[token_N] - mean_PX[slot_N]
    return torch.where((slot_N < slots)[:, None], difference, 0.0)


def _changes(key_N: Tensor) -> Tensor:
    """Where a value differs from the one before it."""
    first = torch.ones_like(key_N, dtype=torch.bool)
    first[1:] = key_N[1:] != key_N[:-1]
    return first


MOST_DISTANCES = 1 << 26
"""At once: 256 MiB of them."""


def _nearest_means(id_N: Tensor, rows: int, p_NX: Tensor, slot_N: Tensor, weight_N: Tensor, slots: int) -> Tensor:
    """[N] the cluster with the nearest mean among those of a pair's slot. Pairs in order of their slots; those in scope
    are in clusters below `rows`."""
    by_id_N = id_N.argsort(stable=True)
    begin_R = torch.searchsorted(id_N[by_id_N], torch.arange(rows + 1, device=id_N.device))
    mean_RX = F.embedding_bag(by_id_N, p_NX, begin_R, mode="sum", per_sample_weights=weight_N[by_id_N])[:rows]
    weight_R = F.embedding_bag(by_id_N, weight_N[:, None], begin_R, mode="sum")[:rows]
    mean_RX = mean_RX / weight_R.clamp(min=torch.finfo(weight_R.dtype).tiny)
    # Places without pairs are of no slot, nor are pairs out of scope: they stay where they are.
    slot_R = torch.where(begin_R[1:] > begin_R[:-1], slot_N[by_id_N[begin_R[:-1].clamp(max=len(id_N) - 1)]], -1)
    if p_NX.device.type == "cpu":
        return nearest_in_slots(id_N, p_NX, slot_N, mean_RX, slot_R, slots)
    return nearest_of_all(id_N, p_NX, slot_N, mean_RX, slot_R, slots)


def nearest_in_slots(id_N: Tensor, p_NX: Tensor, slot_N: Tensor, mean_RX: Tensor, slot_R: Tensor, slots: int) -> Tensor:
    """[N] the nearest mean of each pair's slot, slot by slot: the fewest products, but the host has to know how many
    pairs each slot has, which only a CPU tells without a wait."""
    square_R = torch.where(slot_R < 0, torch.inf, mean_RX.square().sum(dim=1))
    ids, begin = id_N.clone(), 0
    for count in torch.bincount(slot_N, minlength=slots + 1)[:slots].tolist():
        if count:
            place = slice(begin, begin + count)
            low, high = (int(edge) for edge in id_N[place].aminmax())
            own = slice(low, high + 1)
            distance_nR = torch.addmm(square_R[own], p_NX[place], mean_RX[own].T, alpha=-2.0)
            ids[place] = distance_nR.argmin(dim=1) + low
        begin += count
    return ids


def nearest_of_all(id_N: Tensor, p_NX: Tensor, slot_N: Tensor, mean_RX: Tensor, slot_R: Tensor, slots: int) -> Tensor:
    """[N] the same as `nearest_in_slots`, by products with all means, those of other slots left out after: nothing that
    the host would have to wait for."""
    square_R = mean_RX.square().sum(dim=1)
    nearest, part = [], max(1, MOST_DISTANCES // len(mean_RX))
    for p_nX, slot_n in zip(torch.split(p_NX, part), torch.split(slot_N, part), strict=True):
        distance_nR = torch.addmm(square_R, p_nX, mean_RX.T, alpha=-2.0)
        nearest.append(distance_nR.masked_fill_(slot_n[:, None] != slot_R, torch.inf).argmin(dim=1))
    return torch.where(slot_N < slots, torch.cat(nearest), id_N)


def _worth_parting(begin_N: Tensor, finer_N: Tensor, inside_N: Tensor, p_NX: Tensor, spare: Tensor) -> Tensor:
    """[N] whether a pair's cluster is parted by the next hash: largest squared error a new cluster first."""
    pairs = len(begin_N)
    id_N = begin_N.cumsum(0) - 1
    place_N = torch.arange(pairs, device=begin_N.device)
    offset_C = torch.full((pairs + 1,), pairs, dtype=torch.int64, device=begin_N.device)
    offset_C.scatter_reduce_(0, id_N, place_N, "amin")
    new_C = torch.zeros(pairs, dtype=torch.int64, device=begin_N.device)
    new_C.scatter_add_(0, id_N, (finer_N & ~begin_N & inside_N).long())
    size_C = torch.zeros_like(new_C).scatter_add_(0, id_N, torch.ones_like(id_N))
    sum_CX = F.embedding_bag(place_N, p_NX, offset_C[:-1], mode="sum")
    square_C = F.embedding_bag(place_N, p_NX.square().sum(dim=1, keepdim=True), offset_C[:-1], mode="sum")[:, 0]
    error_C = square_C - sum_CX.square().sum(dim=1) / size_C.clamp(min=1)
    gain_C = torch.where(new_C > 0, error_C / new_C.clamp(min=1), -1.0)
    order_C = gain_C.argsort(descending=True, stable=True)
    chosen_C = torch.empty_like(new_C, dtype=torch.bool)
    chosen_C[order_C] = new_C[order_C].cumsum(0) <= spare
    return chosen_C[id_N]


def _arranged(
    begin_N: Tensor,
    inside_N: Tensor,
    order_N: Tensor,
    slot_N: Tensor,
    most: int,
    top_k: int,
    levels: Tensor,
) -> Clusters:
    """Numbers clusters of two or more, and brings their members to the front."""
    pairs = len(begin_N)
    id_N = begin_N.cumsum(0) - 1
    size_C = torch.zeros(pairs, dtype=torch.int64, device=begin_N.device).scatter_add_(0, id_N, torch.ones_like(id_N))
    several_N = (size_C[id_N] > 1) & inside_N
    row_N = torch.where(several_N, (begin_N & several_N).cumsum(0) - 1, most)
    members_first = torch.where(several_N, several_N.cumsum(0) - 1, several_N.sum() + (~several_N).cumsum(0) - 1)
    pair_N = torch.empty_like(order_N).scatter_(0, members_first, order_N)
    size_M = torch.zeros(most + 1, dtype=torch.int64, device=begin_N.device)
    size_M.scatter_add_(0, row_N, torch.ones_like(row_N))
    slot_M = torch.full((most + 1,), -1, dtype=torch.int64, device=begin_N.device)
    slot_M.scatter_(0, row_N, slot_N[order_N])
    row_in_order = torch.empty_like(row_N).scatter_(0, order_N, row_N)
    size_M = size_M[:most]
    end_M = size_M.cumsum(0)
    offset_M = torch.cat([end_M.new_zeros(1), end_M])
    return Clusters(row_in_order.view(-1, top_k), pair_N, offset_M, slot_M[:most], size_M, levels)


@dataclass(frozen=True, eq=False)
class CompressedMetadata:
    """One compressed batch between dispatch and combine. plain: of the rows that travel, tokens and then centroids.
    row_TK: [T, K] a pair's cluster, M if it is alone. weight_TK: gate weights of the pairs in clusters."""

    plain: DispatchMetadata
    x_TD: Tensor
    centroid_MD: Tensor
    slot_M: Tensor
    size_M: Tensor
    row_TK: Tensor
    weight_TK: Tensor


MEAN_WEIGHTS = 1e-12, 1e12
"""Of squared gate weights: pairs without any still have a mean."""


class Members:
    """Weighted means over the members of clusters. weight_TK: above zero."""

    def __init__(self, clusters: Clusters, weight_TK: Tensor) -> None:
        self._offset_M, self._most = clusters.offset_M, len(clusters.slot_M)
        self._token_N = clusters.pair_N.div(weight_TK.shape[1], rounding_mode="floor")
        weight_N = weight_TK.flatten()[clusters.pair_N]
        total_M = F.embedding_bag(clusters.pair_N, weight_TK.view(-1, 1), self._offset_M, mode="sum")[:, 0]
        place_N = torch.arange(len(weight_N), device=weight_N.device)
        # The last bag is of the pairs alone, whose mean nobody asks for.
        bag_N = torch.searchsorted(self._offset_M[1:], place_N, right=True)
        self._share_N = weight_N / total_M[bag_N]

    def mean(self, value_TD: Tensor) -> Tensor:
        """[M, D] of rows [T, D]; gradients flow to them, and none to the weights."""
        sums = F.embedding_bag(self._token_N, value_TD, self._offset_M, mode="sum", per_sample_weights=self._share_N)
        return sums[: self._most]


RATE_STEP = 0.95, 1.05
"""The most that a rate which follows its error changes in an optimizer step: a batch's error is but a sample."""


class CompressedDispatcher:
    """plain: carries rows with several slots each, -1 for none. layer: gives each layer its own rotations.
    steps: optimizer steps done, None where nothing is to be compressed.

    The clusters of a batch depend on it, the settings and the number of steps alone: an activation checkpoint's second
    forward pass makes the same. Each rank clusters its own tokens; ranks need not agree on settings.

    counts: [E] of the latest forward pass, rows sent from this rank for each expert, a cluster as one.
    """

    def __init__(
        self,
        plain: AllToAllDispatcher,
        mesh: ExpertMesh,
        settings: LSHCompression,
        layer: int,
        hidden_size: int,
        steps: Callable[[], int | None],
    ) -> None:
        settings.check_hidden_size(hidden_size)
        self._plain, self._mesh, self.settings, self._layer, self._steps = plain, mesh, settings, layer, steps
        self._rotation: tuple[int, Tensor] | None = None
        self._latest: tuple[Tensor, Tensor, int, int] | None = None
        """Counts, errors, and bytes of a row there and back, plain and as sent. Errors: |x - c|^2 and |x|^2 of pairs in
        clusters, the residual's scale, |x|^2 of all pairs in scope."""
        self._following: tuple[int, Tensor] | None = None
        """With error_target: the rate in force, and since how many optimizer steps."""
        self.counts = torch.empty(0, dtype=torch.int64)

    @property
    def copies(self) -> tuple[tuple[int, ...], ...]:
        """Of the latest dispatch, rows sent to each rank, stage by stage."""
        return self._plain.copies

    @property
    def statistics(self) -> CompressionStatistics | None:
        """Of the latest forward pass; None before the first that compressed. The host waits for the device."""
        if self._latest is None:
            return None
        count, error, plain_bytes, sent_bytes = self._latest
        plain, sent, pairs, clusters, clustered, refused, digits = count.tolist()
        square, whole, scale, _ = error.tolist()
        return CompressionStatistics(
            plain,
            sent,
            plain * plain_bytes,
            sent * sent_bytes,
            pairs,
            clusters,
            clustered,
            refused,
            (square / whole) ** 0.5 if whole > 0 else 0.0,
            digits,
            scale,
        )

    def place(self, placement: LayerPlacement, row_of_slot_P: Tensor, rows: int) -> None:
        self._plain.place(placement, row_of_slot_P, rows)
        where = self._mesh.device
        device_P = torch.from_numpy(placement.device.copy()).to(where)
        node_of = torch.from_numpy(placement.node_of.copy()).to(where)
        node_P, own_node = node_of[device_P], int(placement.node_of[self._mesh.rank])
        own_P = device_P == self._mesh.rank
        self._unit_P = device_P
        if self._plain.two_stage:
            # One copy serves all slots of another node, or of one device of this node.
            self._unit_P = torch.where(node_P == own_node, len(node_of) + device_P, node_P)
        self._units = int(torch.unique(self._unit_P).numel())
        self._own_unit = len(node_of) + self._mesh.rank if self._plain.two_stage else self._mesh.rank
        self._scope_P = {
            "all": torch.ones_like(own_P),
            "off_device": ~own_P,
            "off_node": node_P != own_node,
        }[self.settings.scope]
        self._expert_P = torch.from_numpy(placement.expert.copy()).to(where)
        self._experts = placement.experts
        codes = (2 * self.settings.dimension) ** self.settings.hashes
        if (len(device_P) + 1) * codes >= 1 << 62:
            raise InputError(f"{codes} codes of {len(device_P)} slots do not fit 64 bits; take fewer hashes")

    def dispatch(self, x_TD: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> DispatchMetadata | CompressedMetadata:
        """See `Dispatcher.dispatch`; plain where nothing is to be compressed."""
        steps = self._steps()
        settings = self.settings
        rate = None if steps is None or steps < settings.warm_up else self._rate_at(steps, x_TD.device)
        if steps is None or rate is None or settings.rate == 1.0 or slot_TK.numel() < 2:
            self._latest = None
            self.counts = self._counted(slot_TK)
            return self._plain.dispatch(x_TD, slot_TK, weight_TK)
        x_TD_float = x_TD.float()
        # Distances are small beside what they are differences of.
        with torch.no_grad(), torch.autocast(x_TD.device.type, enabled=False):
            square_T = x_TD_float.square().sum(dim=1)
            # What is not finite would spoil its cluster.
            scope_TK = self._scope_P[slot_TK] & square_T.isfinite()[:, None] & weight_TK.isfinite()
            mean_weight_TK = weight_TK.detach().square().nan_to_num(1.0).clamp(*MEAN_WEIGHTS)
            unit_TK = self._unit_P[slot_TK]
            target = (rate * _distinct(unit_TK, scope_TK).double()).long()
            projected_TX = x_TD_float @ self._rotations(x_TD.shape[1], steps, x_TD.device)
            largest_rate = settings.rate if settings.error_target is None else 1.0
            largest = int(largest_rate * len(x_TD) * min(slot_TK.shape[1], self._units))
            clusters = cluster(
                projected_TX,
                slot_TK,
                scope_TK,
                mean_weight_TK,
                target,
                len(self._unit_P),
                settings.dimension,
                largest,
                settings.lloyd_steps,
            )
            members, most = Members(clusters, mean_weight_TK), len(clusters.slot_M)
        mean_MD = members.mean(x_TD_float)
        with torch.no_grad():
            slot_M, square_M, error_M = self._within_bound(clusters, mean_MD, members.mean(square_T[:, None])[:, 0])
            row_TK = F.pad(torch.where(slot_M < 0, most, _range(slot_M)), (0, 1), value=most)[clusters.row_TK]
            in_scope = torch.where(scope_TK, square_T[:, None], 0.0).sum()
            self._note(x_TD, slot_TK, unit_TK, scope_TK, clusters, slot_M, row_TK, square_M, error_M, in_scope)
        centroid_MD = mean_MD.to(x_TD.dtype)
        alone_TK = row_TK == most
        top_k = slot_TK.shape[1]
        plain = self._plain.dispatch(
            torch.cat([x_TD, centroid_MD]),
            torch.cat([torch.where(alone_TK, slot_TK, -1), F.pad(slot_M[:, None], (0, top_k - 1), value=-1)]),
            torch.cat([torch.where(alone_TK, weight_TK, 0.0), weight_TK.new_ones(most, 1).expand(-1, top_k)]),
        )
        weight_TK = torch.where(alone_TK, 0.0, weight_TK)
        return CompressedMetadata(plain, x_TD_float, centroid_MD.float(), slot_M, clusters.size_M, row_TK, weight_TK)

    def receive(self, metadata: DispatchMetadata | CompressedMetadata) -> tuple[Tensor, Tensor]:
        """See `Dispatcher.receive`; a cluster is one row."""
        return self._plain.receive(metadata.plain if isinstance(metadata, CompressedMetadata) else metadata)

    def combine(self, y_ND: Tensor, metadata: DispatchMetadata | CompressedMetadata) -> Tensor:
        """See `Dispatcher.combine`; members of clusters get their own output back, as far as the residual tells."""
        if not isinstance(metadata, CompressedMetadata):
            return self._plain.combine(y_ND, metadata)
        result = self._plain.combine(y_ND, metadata.plain)
        alone_TD, y_MD = result[: len(metadata.x_TD)], result[len(metadata.x_TD) :]
        offset_MD, scale = self._restoring(y_MD.float(), metadata)
        table = torch.cat([offset_MD, offset_MD.new_zeros(1, offset_MD.shape[1])])
        together_TD = F.embedding_bag(metadata.row_TK, table, per_sample_weights=metadata.weight_TK, mode="sum")
        if scale is not None:
            together_TD = together_TD + metadata.x_TD * (scale * metadata.weight_TK.sum(dim=1, keepdim=True))
        whole_TD: Tensor = alone_TD.float() + together_TD
        return whole_TD.to(result.dtype)

    def _restoring(self, y_MD: Tensor, metadata: CompressedMetadata) -> tuple[Tensor, Tensor | None]:
        """(E(c) - s c of each cluster, s or None for no residual)."""
        if self.settings.residual == "none":
            return y_MD, None
        scale = y_MD.new_ones(())
        if self.settings.residual == "scaled":
            with torch.no_grad():
                scale = _slope(metadata.centroid_MD, y_MD, metadata.size_M, metadata.slot_M, len(self._unit_P))
        if self._latest is not None:
            self._latest[1][2] = scale
        return y_MD - scale * metadata.centroid_MD, scale

    def _rate_at(self, steps: int, where: torch.device) -> float | Tensor:
        """What rows may be of those of plain dispatch; with error_target a number on the device, which the host does
        not wait for. It changes with optimizer steps alone, so that a second forward pass of a step keeps it."""
        least, goal = self.settings.rate, self.settings.error_target
        if goal is None:
            return least
        if self._following is None:
            self._following = steps, torch.full((), least, dtype=torch.float64, device=where)
        since, rate = self._following
        if since != steps:
            if self._latest is not None:
                square, _, _, whole = self._latest[1].double().unbind()
                # An empty batch, or one without clusters, has error 0.
                error = (square / whole.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
                rate = (rate * (error / goal).clamp(*RATE_STEP)).clamp(least, 1.0)
            self._following = steps, rate
        return self._following[1]

    def _rotations(self, hidden_size: int, steps: int, where: torch.device) -> Tensor:
        settings = self.settings
        age = 0 if settings.rotation_steps is None else steps // settings.rotation_steps
        if self._rotation is None or self._rotation[0] != age:
            seed = ((settings.seed * 1_000_003 + self._layer) * 1_000_003 + age) % (1 << 63)
            self._rotation = age, rotations(hidden_size, settings.hashes, settings.dimension, seed).to(where)
        return self._rotation[1]

    def _within_bound(self, clusters: Clusters, mean_MD: Tensor, square_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([M] slots, -1 for empty places and for clusters past the bound; [M] sums of |x|^2 and of |x - c|^2, from
        the weighted means of |x|^2, as if all members weighed alike)."""
        error_M = (square_M - mean_MD.square().sum(dim=1)).clamp(min=0.0) * clusters.size_M
        square_M = square_M * clusters.size_M
        if self.settings.error_bound is None:
            return clusters.slot_M, square_M, error_M
        past_M = error_M > self.settings.error_bound**2 * square_M
        return torch.where(past_M, -1, clusters.slot_M), square_M, error_M

    def _note(
        self,
        x_TD: Tensor,
        slot_TK: Tensor,
        unit_TK: Tensor,
        scope_TK: Tensor,
        clusters: Clusters,
        slot_M: Tensor,
        row_TK: Tensor,
        square_M: Tensor,
        error_M: Tensor,
        in_scope: Tensor,
    ) -> None:
        used_M = slot_M >= 0
        alone_TK = row_TK == len(slot_M)
        away_TK = unit_TK != self._own_unit
        away_M = used_M & (self._unit_P[slot_M] != self._own_unit)
        count = torch.stack(
            [
                _distinct(unit_TK, away_TK),
                _distinct(unit_TK, away_TK & alone_TK) + away_M.sum(),
                scope_TK.sum(),
                used_M.sum(),
                (clusters.size_M * used_M).sum(),
                (clusters.size_M * (~used_M & (clusters.slot_M >= 0))).sum(),
                clusters.levels,
            ]
        )
        error = torch.stack([(error_M * used_M).sum(), (square_M * used_M).sum(), error_M.new_zeros(()), in_scope])
        width, side = x_TD.shape[1], 8 * slot_TK.shape[1]
        whole, quantized = width * x_TD.element_size(), self.settings.rows
        formats = (None, None) if quantized is None else (quantized.dispatch, quantized.combine)
        sent = sum(whole if rows is None else rows.row_bytes(width) for rows in formats)
        self._latest = count, error, 2 * whole + side, sent + side
        self.counts = self._counted(torch.where(alone_TK, slot_TK, -1), slot_M)

    def _counted(self, *slots: Tensor) -> Tensor:
        slot_N = torch.cat([part.flatten() for part in slots])
        expert_N = torch.where(slot_N < 0, self._experts, self._expert_P[slot_N])
        count_E = torch.zeros(self._experts + 1, dtype=torch.int64, device=slot_N.device)
        return count_E.scatter_add_(0, expert_N, torch.ones_like(expert_N))[:-1]


def _range(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)


def _distinct(unit_TK: Tensor, valid_TK: Tensor) -> Tensor:
    """How many different units the valid entries of each row name, in all."""
    sorted_TK = torch.where(valid_TK, unit_TK, -1).sort(dim=1).values
    first_TK = sorted_TK >= 0
    first_TK[:, 1:] &= sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return first_TK.sum()


SMALLEST_SPREAD = 1e-10
"""Of centroids, over their squares, from which a slope is taken."""


def _slope(centroid_MD: Tensor, y_MD: Tensor, size_M: Tensor, slot_M: Tensor, slots: int) -> Tensor:
    """The s that best predicts differences between outputs from differences between centroids of one slot, by least
    squares, clusters weighing as their members: the best multiple of the identity in the place of the experts'
    Jacobians."""
    weight_M = torch.where(slot_M < 0, 0, size_M).float()[:, None]
    slot_M = torch.where(slot_M < 0, slots, slot_M)
    total_P = weight_M.new_zeros(slots + 1, 1).index_add_(0, slot_M, weight_M).clamp_(min=1.0)

    def centred(value_MD: Tensor) -> Tensor:
        sum_PD = value_MD.new_zeros(slots + 1, value_MD.shape[1]).index_add_(0, slot_M, weight_M * value_MD)
        return value_MD - (sum_PD / total_P)[slot_M]

    from_MD, to_MD = centred(centroid_MD), centred(y_MD)
    spread = (weight_M * from_MD.square()).sum()
    # With one cluster a slot there are no differences but those of rounding.
    enough = spread > SMALLEST_SPREAD * (weight_M * centroid_MD.square()).sum()
    return torch.where(enough, (weight_M * from_MD * to_MD).sum() / spread, 0.0)
