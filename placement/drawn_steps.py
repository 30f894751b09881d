"""Steps drawn from expert loads alone, when no token was recorded: what a plan can be replayed on then.

What counts cannot tell is assumed as in `window_cost`: experts of a token are chosen independently of each other, of those of
other layers, and of other tokens. Unlike there, no expert twice for one token, and steps vary as draws do.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .steps import Steps
from .trace import id_dtype

FloatArray = npt.NDArray[np.float64]
BLOCK_VALUES = 1 << 21
MOST_VALUES = 1 << 32
"""Tokens times layers times experts: more takes minutes to draw."""


def draw_steps(
    load: FloatArray, top_k: int, moe_layers: tuple[int, ...], *, step_tokens: int, steps: int, seed: int = 0
) -> Steps:
    """`steps` steps of `step_tokens` tokens; step s follows the loads of window s * S // steps of load [S, L, E].

    In every step and layer the expected load of an expert is its recorded share, up to the most an expert can have, one
    choice of every token (systematic sampling with unequal chances, Madow 1949, in an order drawn for each token).

    Raises:
        InputError: a size below 1, fewer experts than `top_k`, or more to draw than fits.
    """
    windows, layers, experts = load.shape
    if step_tokens < 1 or steps < 1 or not 1 <= top_k <= experts:
        raise InputError(f"cannot draw {steps} steps of {step_tokens} tokens with {top_k} of {experts} experts each")
    if steps * step_tokens * layers * experts > MOST_VALUES:
        raise InputError(
            f"{steps} steps of {step_tokens} tokens are too much to draw here; ask for fewer, or smaller ones"
        )
    rng = np.random.default_rng(seed)
    ids = np.empty((steps, step_tokens, layers, top_k), dtype=id_dtype(experts))
    block = max(1, BLOCK_VALUES // experts)
    for step in range(steps):
        for layer in range(layers):
            chance = _inclusion(load[step * windows // steps, layer], top_k)
            for first in range(0, step_tokens, block):
                count = min(block, step_tokens - first)
                ids[step, first : first + count, layer] = _systematic(chance, top_k, count, rng)
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
        wanted = top_k - int(full.sum())
        chance = np.where(full, 1.0, chance)
        if wanted <= 0 or abs(rest - wanted) < 1e-9:
            break
        # What is above one choice a token, others get, each in its proportion; where there is none, all alike.
        spread = chance * (wanted / rest) if rest > 0 else np.full(len(load), wanted / max(1, int((~full).sum())))
        chance = np.where(full, 1.0, spread)
    return np.asarray(np.minimum(chance, 1.0))


def _systematic(chance: FloatArray, top_k: int, tokens: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """[T, k] experts, none twice in a token, each with its chance [E]."""
    order = np.argsort(rng.random((tokens, len(chance))), axis=1)
    ends = np.cumsum(chance[order], axis=1)
    ends[:, -1] = top_k
    # Expert i of the order is chosen when one of start, start + 1, ... lies in its part of the line.
    passed = np.clip(np.ceil(ends - rng.random((tokens, 1))), 0, top_k)
    chosen = np.diff(passed, axis=1, prepend=0.0) > 0.5
    return np.asarray(order[chosen].reshape(tokens, top_k))
