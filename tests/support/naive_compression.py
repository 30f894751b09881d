"""The compressed layer in one process, pair by pair: what the fast path is compared with, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pair = tuple[int, int]
"""Token and place among its slots."""


def naive_clusters(
    x: Tensor,
    slots: list[list[int]],
    weights: Tensor,
    scope: Callable[[int, int], bool],
    rows: float,
    rotations: Tensor,
    dimension: int,
    lloyd_steps: int,
) -> list[list[Pair]]:
    """Clusters of the pairs in scope: as many hashes as keep them at `rows` or below, and then the worst are parted;
    then each pair goes to the nearest mean of its slot, some times over."""
    pairs = [(t, k) for t, row in enumerate(slots) for k in range(len(row)) if scope(t, k)]
    projected = x.detach().float() @ rotations
    members: dict[int, list[Pair]] = {}
    for t, k in pairs:
        members.setdefault(slots[t][k], []).append((t, k))
    digit: dict[Pair, list[int]] = {}
    point: dict[Pair, Tensor] = {}
    for own in members.values():
        mean = torch.stack([projected[t] for t, _ in own]).mean(dim=0)
        for t, k in own:
            point[t, k] = projected[t] - mean
            digit[t, k] = []
            for part in point[t, k].split(dimension):
                longest = max(range(dimension), key=lambda i, part=part: abs(float(part[i])))
                digit[t, k].append(2 * longest + (float(part[longest]) < 0))
    hashes = rotations.shape[1] // dimension

    def grouped(level: int) -> dict[tuple[int, ...], list[Pair]]:
        groups: dict[tuple[int, ...], list[Pair]] = {}
        for t, k in pairs:
            groups.setdefault((slots[t][k], *digit[t, k][:level]), []).append((t, k))
        return dict(sorted(groups.items()))

    level = max([n for n in range(hashes + 1) if len(grouped(n)) <= rows], default=0)
    groups = grouped(level)
    finer: dict[tuple[int, ...], list[list[Pair]]] = {}
    for key, part in grouped(min(level + 1, hashes)).items():
        finer.setdefault(key[: level + 1], []).append(part)

    def gain(key: tuple[int, ...]) -> float:
        stack = torch.stack([point[pair] for pair in groups[key]])
        return float((stack - stack.mean(dim=0)).square().sum()) / (len(finer[key]) - 1)

    spare = rows - len(groups)
    for key in sorted((key for key in groups if len(finer[key]) > 1), key=gain, reverse=True):
        spare -= len(finer[key]) - 1
        if spare < 0:
            break
        groups[key] = []
        groups.update({(*key, -1 - i): part for i, part in enumerate(finer[key])})
    parts = [part for part in groups.values() if part]
    for _ in range(lloyd_steps):
        means = [naive_mean([point[pair] for pair in part], [weights[pair] for pair in part]) for part in parts]
        slot = [slots[part[0][0]][part[0][1]] for part in parts]
        moved: list[list[Pair]] = [[] for _ in parts]
        for t, k in pairs:
            near = [j for j in range(len(parts)) if slot[j] == slots[t][k]]
            moved[min(near, key=lambda j, at=point[t, k]: float((at - means[j]).square().sum()))].append((t, k))
        parts = [part for part in moved if part]
    return [part for part in parts if len(part) > 1]


def naive_mean(rows: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Weighed by squared gate weights, which get no gradient by it."""
    square = torch.stack([weight.detach() for weight in weights]).square()
    return (square / square.sum()) @ torch.stack(rows)


def naive_forward(
    x: Tensor,
    slots: list[list[int]],
    weights: Tensor,
    clusters: list[list[Pair]],
    residual: str,
    expert: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """[T, D] with autograd; `expert(slot, x [D])` gives one output. Pairs outside all clusters are computed exactly."""
    centre = [naive_mean([x[t] for t, _ in part], [weights[pair] for pair in part]) for part in clusters]
    slot = [slots[part[0][0]][part[0][1]] for part in clusters]
    output = [expert(number, c) for number, c in zip(slot, centre, strict=True)]
    scale = {"none": 0.0, "plain": 1.0}.get(residual)
    if scale is None:
        scale = naive_scale(centre, output, slot, [len(part) for part in clusters])
    cluster_of = {pair: j for j, part in enumerate(clusters) for pair in part}
    rows = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for k, number in enumerate(slots[t]):
            j = cluster_of.get((t, k))
            y = expert(number, x[t]) if j is None else output[j] + scale * (x[t] - centre[j])
            total = total + weights[t, k] * y
        rows.append(total)
    return torch.stack(rows) if rows else x * 0


def naive_scale(centre: list[Tensor], output: list[Tensor], slot: list[int], size: list[int]) -> float:
    """Least squares of output differences on centroid differences inside each slot."""
    above = below = whole = 0.0
    for number in set(slot):
        own = [j for j in range(len(slot)) if slot[j] == number]
        total = sum(size[j] for j in own)
        c = sum(size[j] * centre[j].detach() for j in own) / total
        y = sum(size[j] * output[j].detach() for j in own) / total
        for j in own:
            above += size[j] * float((output[j].detach() - y) @ (centre[j].detach() - c))
            below += size[j] * float((centre[j].detach() - c) @ (centre[j].detach() - c))
            whole += size[j] * float(centre[j].detach() @ centre[j].detach())
    return above / below if below > 1e-10 * whole else 0.0
