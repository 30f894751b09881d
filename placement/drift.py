"""Has routing moved? A permutation test on count windows, with a false-alarm rate that is stated and kept.

Windows are gathered into blocks of neighbours. Under the null hypothesis that the blocks before and the blocks since are
exchangeable, every way of dealing them into two groups of these sizes is equally likely, and the p-value
(1 + permutations at least as far apart) / (1 + permutations) is at most alpha with probability at most alpha, whatever
the distribution (Phipson and Smyth 2010; the statistic is the squared distance of means in a feature space, as in Gretton
et al. 2012, A Kernel Two-Sample Test).

Traffic remembers: what follows soon after is alike, and means of dependent blocks lie further apart than permuted ones. The
permuted distances are therefore multiplied by the factor by which dependence enlarges the variance of a mean, estimated
from the correlations of the blocks before (1 plus twice their sum; Geyer 1992 cuts the sum where they cease to be
positive). With it the stated rate holds, measured, up to a correlation of 0.9 between neighbours; without it a correlation
of 0.5 already makes eight times as many false alarms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InputError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Drift:
    """p: of the test. divergence: mean over layers of the Hellinger distance (0 to 1) between the mean loads before and
    since. layer: where it is largest, counted among MoE layers; layer_divergence: there.
    dependence: factor by which permuted distances were enlarged, 1 for independent blocks.
    """

    p: float
    divergence: float
    layer: int
    layer_divergence: float
    dependence: float


def drift(
    before: FloatArray,
    since: FloatArray,
    *,
    block: int = 4,
    permutations: int | None = None,
    alpha: float = 0.001,
    seed: int = 0,
) -> Drift:
    """Compares windows [S, L, E] in time order. block: neighbouring windows taken as one observation.

    permutations: default as many as make p-values well below `alpha` possible. An alarm is p <= alpha.

    Raises:
        InputError: shapes that disagree, or so few blocks that no p-value could reach alpha; the message says how many
            windows are needed.
    """
    if before.ndim != 3 or since.ndim != 3 or before.shape[1:] != since.shape[1:]:
        raise InputError(
            f"windows {before.shape} and {since.shape} must both be [windows, layers, experts] of one model"
        )
    if block < 1 or not 0 < alpha < 1:
        raise InputError(f"block ({block}) must be at least 1 and alpha ({alpha}) between 0 and 1")
    needed = least_windows(len(since), block, alpha)
    if len(since) < block or len(before) < needed:
        raise InputError(
            f"{len(before)} windows before and {len(since)} since cannot tell at {alpha} in blocks of {block}: "
            f"at least {needed} before are needed, and {block} since"
        )
    first, second = _blocks(before, block), _blocks(since, block)
    features = np.concatenate([first, second])
    count = math.ceil(20 / alpha) if permutations is None else permutations
    dependence = _dependence(first.reshape(len(first), -1))
    p = _permuted(features.reshape(len(features), -1), len(first), count, dependence, np.random.default_rng(seed))
    distances = _hellinger(before.sum(axis=0), since.sum(axis=0))
    layer = int(distances.argmax())
    return Drift(p, float(distances.mean()), layer, float(distances[layer]), dependence)


def least_windows(since: int, block: int, alpha: float) -> int:
    """Windows before that make p-values of half of alpha possible, for so many windows since."""
    after = max(1, since // block)
    before = 1
    while math.comb(before + after, after) < 2 / alpha:
        before += 1
    return before * block


def _dependence(features: FloatArray) -> float:
    """By what factor the variance of the mean of these rows [B, F] exceeds that of as many independent ones, at least 1.

    The larger of two estimates, the sum of correlations while they are positive and that of a geometric decay, enlarged by
    what either misses in a short series.
    """
    count = len(features)
    centred = features - features.mean(axis=0)
    spread = float((centred**2).sum())
    if count < 6 or spread == 0.0:
        return 1.0
    # Corrected by 1 / B: the mean was taken from the same rows.
    lags = [float((centred[lag:] * centred[:-lag]).sum()) / spread + 1.0 / count for lag in range(1, count // 3 + 1)]
    positive = next((i for i, value in enumerate(lags) if value <= 0.02), len(lags))
    by_sum = 1.0 + 2.0 * sum(lags[:positive])
    decay = min(max(lags[1] / lags[0], 0.0), 0.95) if lags[0] > 1.0 / math.sqrt(count) else 0.0
    by_decay = 1.0 + 2.0 * lags[0] / (1.0 - decay) if decay else 1.0
    factor = max(1.0, by_sum, by_decay)
    return factor if factor < 1.2 else factor * (1.0 + 2.5 / math.sqrt(count))


def _blocks(load: FloatArray, block: int) -> FloatArray:
    """[B, L, E] square roots of the shares of each layer's load, of whole blocks; the oldest windows may be left over.

    On square roots the squared distance is Hellinger's, where rare and frequent experts vary alike by chance.
    """
    count = len(load) // block
    summed = load[len(load) - count * block :].reshape(count, block, *load.shape[1:]).sum(axis=1)
    total = summed.sum(axis=2, keepdims=True)
    return np.asarray(np.sqrt(summed / np.where(total > 0, total, 1.0)))


def _permuted(
    features: FloatArray, first: int, permutations: int, dependence: float, rng: np.random.Generator
) -> float:
    """The p-value of the distance of means of the first rows and the rest. features: [B, F]."""
    blocks = len(features)
    centred = features - features.mean(axis=0)
    gram = centred @ centred.T
    groups = np.full(blocks, -1.0 / (blocks - first))
    groups[:first] = 1.0 / first
    seen = float(groups @ gram @ groups)
    # Ties count as "at least as far", rounding included: a p-value may be too large, never too small.
    least = seen * (1.0 - 1e-9) / dependence
    as_far, done = 0, 0
    while done < permutations:
        batch = min(4096, permutations - done)
        dealt = rng.permuted(np.broadcast_to(groups, (batch, blocks)), axis=1)
        as_far += int((np.einsum("ij,ij->i", dealt @ gram, dealt) >= least).sum())
        done += batch
    return (1 + as_far) / (1 + permutations)


def _hellinger(before: FloatArray, since: FloatArray) -> FloatArray:
    """[L] Hellinger distances of the shares of two loads [L, E]."""
    roots = [np.sqrt(load / np.maximum(load.sum(axis=1, keepdims=True), 1e-300)) for load in (before, since)]
    return np.asarray(np.sqrt(np.maximum(0.0, 0.5 * ((roots[0] - roots[1]) ** 2).sum(axis=1))))
