"""Pairs of a token and a slot to clusters, by sorting their hash codes; as many clusters as a target allows.

Every choice rests on integers and on sums in a fixed order, so that the same batch gives the same clusters again, as
activation checkpointing needs. The host never waits for the device: what depends on data has a fixed, sufficient size.

T tokens, K slots a token, N = T K pairs, P slots, H hashes, d dimensions of one, M most clusters of two or more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cross_polytope import digits


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of two pairs or more, in order of their slots; the rest of the M places are empty.

    row_TK: [T, K] the cluster of each pair, M for pairs alone. token_N, offset_M: tokens of one cluster behind another's, and
    where each begins; offset_M has one more, the end. slot_M: [M] -1 for empty places. size_M: [M].
    levels: whole hashes that counted.
    """

    row_TK: Tensor
    token_N: Tensor
    offset_M: Tensor
    slot_M: Tensor
    size_M: Tensor
    levels: Tensor


def cluster(
    projected_TX: Tensor,
    slot_TK: Tensor,
    scope_TK: Tensor,
    target: Tensor,
    slots: int,
    dimension: int,
    largest_target: int,
) -> Clusters:
    """Clusters of the pairs in scope such that they and the pairs alone are at most `target`, or one a slot.

    projected_TX: [T, H * d]. target: a number, on the device. largest_target: that it cannot pass, known to the host. As many whole hashes count as the target allows; of the next
    one, where it parts clusters of the largest squared error a new cluster, until the target is reached. Hashes see
    tokens relative to the mean of their slot, since what a slot's tokens have in common says nothing about who is alike.
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
    begin_N = begin_N | (finer_N & _worth_parting(begin_N, finer_N, inside_N, p_NX[order_N], spare))
    most = min(pairs // 2, max(largest_target, slots))
    return _arranged(begin_N, inside_N, order_N, token_N, slot_N, most, top_k, level[0])


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
    token_N: Tensor,
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
    sorted_token_N = token_N[order_N]
    member_token_N = torch.empty_like(sorted_token_N).scatter_(0, members_first, sorted_token_N)
    size_M = torch.zeros(most + 1, dtype=torch.int64, device=begin_N.device)
    size_M.scatter_add_(0, row_N, torch.ones_like(row_N))
    slot_M = torch.full((most + 1,), -1, dtype=torch.int64, device=begin_N.device)
    slot_M.scatter_(0, row_N, slot_N[order_N])
    row_in_order = torch.empty_like(row_N).scatter_(0, order_N, row_N)
    size_M = size_M[:most]
    end_M = size_M.cumsum(0)
    offset_M = torch.cat([end_M.new_zeros(1), end_M])
    return Clusters(row_in_order.view(-1, top_k), member_token_N, offset_M, slot_M[:most], size_M, levels)
