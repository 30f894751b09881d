"""Steps and tokens sampled from loads or transitions, to replay plans on where no token was recorded."""

from __future__ import annotations

import numpy as np

from .._arguments import check_types
from .._types import FloatArray, IntArray
from .errors import InputError
from .statistics import RoutingStatistics
from .steps import Steps
from .trace import RoutingTrace, id_dtype
from .validation import generator

BLOCK_VALUES = 1 << 21
"""Floats a working array may hold."""
MOST_VALUES = 1 << 32
"""Tokens times layers times experts: more takes minutes to sample."""
PASSES = 4
"""Times a layer is sampled from transitions, with weights corrected by what the last gave too much or too little of."""
SHRINK = 5.0
"""Transitions by which a pair is taken to be nearer to chance: few counts say little, and k of them are multiplied."""

# From loads. What counts cannot tell is assumed as in `window_seconds`: experts of a token are chosen independently of
# each other, of those of other layers, and of other tokens. Unlike there, no expert twice for one token, and steps vary
# as draws do.


@check_types
def sample_steps(
    load: FloatArray,
    top_k: int,
    moe_layers: tuple[int, ...],
    *,
    step_tokens: int,
    steps: int,
    seed: int = 0,
    groups: tuple[int, int] = (1, 1),
) -> Steps:
    """Steps whose experts follow recorded loads; step s those of window s * S // steps.

    In every step and layer the expected load of an expert is its recorded share, up to the most an expert can have, one
    choice of every token (systematic sampling with unequal chances, Madow 1949, in an order drawn for each token).

    Args:
        load: [S, L, E] tokens that chose each expert in each of S windows.
        top_k: experts a token.
        moe_layers: the model's absolute indices of the L layers.
        step_tokens: tokens of each step.
        steps: how many to sample.
        seed: of the draws.
        groups: (H, M) experts stand in H groups, and those of a token are of M of them, as group-limited routing has
            it. Groups are drawn first, by their loads, then experts inside; an expert that groups leave too few choices
            gets as many as they do.

    Raises:
        InputError: a size below 1, fewer experts than `top_k`, groups that do not hold them, or more to sample than
            fits.
    """
    windows, layers, experts = load.shape
    if step_tokens < 1 or steps < 1 or not 1 <= top_k <= experts:
        raise InputError(f"cannot sample {steps} steps of {step_tokens} tokens with {top_k} of {experts} experts each")
    if not 1 <= groups[1] <= groups[0] or experts % groups[0] or top_k > groups[1] * experts // groups[0]:
        raise InputError(f"{top_k} of {experts} experts cannot be of {groups[1]} of {groups[0]} groups")
    if steps * step_tokens * layers * experts > MOST_VALUES:
        raise InputError(
            f"{steps} steps of {step_tokens} tokens are too much to sample here; ask for fewer, or smaller ones"
        )
    rng = generator(seed)
    ids = np.empty((steps, step_tokens, layers, top_k), dtype=id_dtype(experts))
    block = max(1, BLOCK_VALUES // experts)
    for step in range(steps):
        for layer in range(layers):
            chance = _inclusion(load[step * windows // steps, layer], top_k)
            for first in range(0, step_tokens, block):
                count = min(block, step_tokens - first)
                each = np.broadcast_to(chance, (count, experts))
                if groups[1] < groups[0]:
                    each = _in_groups(chance, top_k, count, groups, rng)
                ids[step, first : first + count, layer] = _systematic(each, top_k, rng)
    return Steps(
        expert_ids=ids.reshape(-1, layers, top_k),
        offsets=np.arange(steps + 1, dtype=np.int64) * step_tokens,
        num_experts=experts,
        moe_layers=moe_layers,
    )


def _inclusion(load: FloatArray, top_k: int) -> FloatArray:
    """[E] chances that a token chooses each expert, adding up to k, none above 1."""
    total = load.sum()
    chance = np.asarray(load / total if total else np.full(len(load), 1.0 / len(load))) * top_k
    for _ in range(len(load)):
        full = chance >= 1.0
        rest = chance[~full].sum()
        left = top_k - int(full.sum())
        chance = np.where(full, 1.0, chance)
        if left <= 0 or abs(rest - left) < 1e-9:
            break
        # What is above one choice a token, others get, each in its proportion; where there is none, all alike.
        spread = chance * (left / rest) if rest > 0 else np.full(len(load), left / max(1, int((~full).sum())))
        chance = np.where(full, 1.0, spread)
    return np.asarray(np.minimum(chance, 1.0))


def _in_groups(
    chance: FloatArray, top_k: int, tokens: int, groups: tuple[int, int], rng: np.random.Generator
) -> FloatArray:
    """[T, E] chances of each expert for a token, adding up to k, in M of H groups drawn for each token, from the
    chances [E] over all tokens."""
    of_group = chance.reshape(groups[0], -1).sum(axis=1)
    taken = _inclusion(of_group, groups[1])
    drawn = np.zeros((tokens, groups[0]))
    np.put_along_axis(drawn, _systematic(np.broadcast_to(taken, drawn.shape), groups[1], rng), 1.0, axis=1)
    inside = np.repeat(drawn / np.where(taken > 0, taken, 1.0), len(chance) // groups[0], axis=1)
    # What is above one choice a token goes to others of its groups, which have room for it.
    result = np.minimum(inside * chance, 1.0)
    room = np.where(inside > 0, 1.0 - result, 0.0)
    missing = top_k - result.sum(axis=1, keepdims=True)
    return np.asarray(result + room * missing / np.maximum(room.sum(axis=1, keepdims=True), 1e-300))


def _systematic(chance: FloatArray, top_k: int, rng: np.random.Generator) -> IntArray:
    """[T, k] experts, none twice in a token, each with its chance [T, E]; those of a token add up to k."""
    tokens = len(chance)
    order = np.argsort(rng.random(chance.shape), axis=1)
    ends = np.cumsum(np.take_along_axis(chance, order, axis=1), axis=1)
    ends[:, -1] = top_k
    # Expert i of the order is chosen when one of start, start + 1, ... lies in its part of the line.
    passed = np.clip(np.ceil(ends - rng.random((tokens, 1))), 0, top_k)
    chosen = np.diff(passed, axis=1, prepend=0.0) > 0.5
    return np.asarray(order[chosen].reshape(tokens, top_k))


# From transitions, which a context-coherent step is priced on.


@check_types
def sample_tokens(statistics: RoutingStatistics, top_k: int, tokens: int, seed: int = 0) -> RoutingTrace:
    """About `tokens` tokens, each a sequence of its own, dealt to workloads by their recorded loads.

    An expert's chance is its load times, for each expert of the token in the layer before, what the recorded
    transitions of the workload show above or below chance between the two; k are drawn without repetition, and loads
    brought to the recorded ones. With one expert a token that is the recorded Markov chain. With more, the transitions
    of what is drawn come near the recorded ones, while which experts a layer chooses together beyond that, transitions
    do not tell.

    Args:
        statistics: with transitions.
        top_k: experts a token.
        tokens: how many, at least one of every workload that has load.
        seed: of the draws.

    Raises:
        UnsupportedError: the statistics hold no transitions.
        InputError: fewer experts than `top_k`.
    """
    _ = statistics.total_transitions
    if not 1 <= top_k <= statistics.experts:
        raise InputError(f"top_k ({top_k}) must be from 1 to the number of experts ({statistics.experts})")
    assert statistics.transitions is not None
    rng = generator(seed)
    recorded = statistics.workload_load.sum(axis=(1, 2))
    present = np.flatnonzero(recorded)
    parts, codes = [], []
    for code in present:
        count = max(1, round(tokens * recorded[code] / recorded.sum()))
        parts.append(_walk(statistics.workload_load[code], statistics.transitions[code], top_k, count, rng))
        codes.append(np.full(count, code))
    ids = np.concatenate(parts)
    workload = np.concatenate(codes)
    return RoutingTrace(
        expert_ids=ids.astype(id_dtype(statistics.experts)),
        num_experts=statistics.experts,
        moe_layers=statistics.moe_layers,
        sequence=np.arange(len(ids)),
        position=np.zeros(len(ids), np.int64),
        workload=workload,
        workloads=statistics.workloads,
    )


def _walk(load: FloatArray, transitions: FloatArray, top_k: int, tokens: int, rng: np.random.Generator) -> IntArray:
    """[T, L, k] experts of one workload; load [L, E], transitions [L-1, E, E]."""
    layers, experts = load.shape
    ids = np.empty((tokens, layers, top_k), dtype=np.int64)
    for layer in range(layers):
        total = load[layer].sum()
        target = load[layer] / total if total else np.full(experts, 1.0 / experts)
        lift = np.zeros((experts, experts)) if layer == 0 else _log_lift(transitions[layer - 1])
        before = ids[:, layer - 1] if layer else np.tile(np.arange(top_k), (tokens, 1))
        weight = target.copy()
        for _ in range(PASSES):
            drawn = _distinct(weight, lift, before, rng)
            share = np.bincount(drawn.ravel(), minlength=experts) / drawn.size
            weight = weight * np.where(share > 0, target / np.where(share > 0, share, 1.0), 1.0)
        ids[:, layer] = drawn
    return ids


def _log_lift(transitions: FloatArray) -> FloatArray:
    """[E, E] logarithm of transitions over what they were if the two layers had nothing to do with each other."""
    total = max(float(transitions.sum()), 1e-300)
    chance = transitions.sum(axis=1, keepdims=True) * transitions.sum(axis=0) / total
    return np.asarray(np.log((transitions + SHRINK) / (chance + SHRINK)))


def _distinct(weight: FloatArray, lift: FloatArray, before: IntArray, rng: np.random.Generator) -> IntArray:
    """[T, k] experts by weight [E] and the lifts [E, E] of before [T, k], none twice in a token, the likeliest first.

    The k largest of log chance plus Gumbel noise are draws without replacement (Gumbel 1954; Yellott 1977).
    """
    tokens, top_k = before.shape
    experts = len(weight)
    with np.errstate(divide="ignore"):
        # An expert of no chance is taken only where all of some chance are.
        base = np.maximum(np.log(weight), -1e3)
    result = np.empty((tokens, top_k), dtype=np.int64)
    block = max(1, BLOCK_VALUES // experts)
    for first in range(0, tokens, block):
        some = before[first : first + block]
        chosen = np.zeros((len(some), experts))
        np.put_along_axis(chosen, some, 1.0, axis=1)
        score = base + chosen @ lift
        largest = np.argpartition(score + rng.gumbel(size=score.shape), experts - top_k, axis=1)[:, experts - top_k :]
        order = np.argsort(-np.take_along_axis(score, largest, axis=1), axis=1, kind="stable")
        result[first : first + block] = np.take_along_axis(largest, order, axis=1)
    return result
