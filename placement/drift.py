"""Has routing moved, and since when? A test on count windows, with a false-alarm rate that is stated and measured.

Windows are gathered into blocks of neighbours. Every moment among the blocks since is taken as a possible change: the
squared distance of the mean shares before and after it, times n m / (n + m) for n and m blocks, is large where there
was one (shares over roots of their means, as in chi-square; Gretton et al. 2012 call it a kernel two-sample statistic,
Harchaoui, Moulines and Bach 2009 scan it over the moment). The largest over all moments is the statistic, so that
trying many costs no false alarms.

Under the null hypothesis that all blocks are exchangeable every order of them is equally likely, and the p-value (1 +
orders at least as large) / (1 + orders) is at most alpha with probability at most alpha, whatever the distribution
(Phipson and Smyth 2010). Drawing stops early where many are as large (Besag and Clifford 1991).

Nights are no change: blocks of little traffic scatter more. How much more is fitted to what is left (a part that is the
same for all and one over the tokens of a block), and blocks are weighted by one over it.

Traffic remembers: what follows soon after is alike, and means of dependent blocks lie further apart than those of
random orders. By what factor follows from the correlations of what is left of the blocks around the means before and
after the likeliest change (cut where they cease to be positive, Geyer 1992), enlarged by what a short series hides of
them. So much more than one is asked of the statistic, in multiples of what orders of what is left reach: those hold no
change, so that a true one does not raise its own bar. Measured, the stated rate holds without dependence and up to a
correlation of 0.5 between neighbouring blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .._types import FloatArray, IntArray
from .errors import InputError
from .statistics import with_tokens
from .validation import generator

LEAST_SINCE = 2
"""Blocks before a change, and after it, that can show one."""
ENOUGH_AS_LARGE = 20
"""Orders as large as seen after which no more are drawn: the p-value is far above any alpha then."""
CHANCE_ORDERS = 512
"""Orders whose largest statistic stands for what chance reaches."""
FITTED_TO = 6.0
"""Rows' worth of correlation that a mean and a moment, both fitted, take off each side, in multiples of the
correlation; Kendall (1954) has 3 for the mean alone."""
CORRELATED = 0.02
"""Of correlations: less is taken for none."""
HIDDEN = 2.5
"""How far estimates in a short series are below what they may be, in multiples of one over the root of its length."""


@dataclass(frozen=True)
class Drift:
    """p: of the test. since: windows after the likeliest change. divergence: mean over layers of the Hellinger distance
    (0 to 1) between the mean loads before and after it. layer: where it is largest, counted among MoE layers;
    layer_divergence: there. dependence: factor by which dependence of blocks enlarges the statistic, 1 without.
    """

    p: float
    since: int
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
    """Looks for a change among the windows `since`, against all that came before it. An alarm is p <= alpha.

    Args:
        before: [S, L, E] tokens that chose each expert in each window before, in time order.
        since: [S', L, E] the windows after those. Windows without tokens are left out of both.
        block: neighbouring windows taken as one observation.
        permutations: orders drawn; default as many as make p-values well below `alpha` possible.
        alpha: chance of a false alarm.
        seed: of the orders.

    Raises:
        InputError: shapes that disagree, or so few blocks that no p-value could reach alpha (`can_tell`).
    """
    if before.ndim != 3 or since.ndim != 3 or before.shape[1:] != since.shape[1:]:
        raise InputError(
            f"windows {before.shape} and {since.shape} must both be [windows, layers, experts] of one model"
        )
    if block < 1 or not 0 < alpha < 1:
        raise InputError(f"block ({block}) must be at least 1 and alpha ({alpha}) between 0 and 1")
    load, known = np.concatenate([before, since]), with_tokens(np.concatenate([before, since]))
    # A window without tokens tells nothing of where they go.
    before, since = before[known[: len(before)]], since[known[len(before) :]]
    if not can_tell(len(before), len(since), block, alpha):
        raise InputError(
            f"{len(before)} windows before and {len(since)} since cannot tell at {alpha} in blocks of {block}, windows "
            "without tokens left out; wait for more, or take shorter blocks"
        )
    earlier, later = _blocks(before, block), _blocks(since, block)
    features, tokens = _features(np.concatenate([earlier, later]))
    sizes = np.arange(LEAST_SINCE, len(later) + 1)
    weights = np.ones(len(features))
    for _ in range(2):
        scan = _Scan(weights, sizes)
        after = int(sizes[scan.statistic(features * np.sqrt(weights)[:, None]).argmax()])
        left = _left(features, weights, len(features) - after)
        weights = _weights(left, tokens)
    scan, roots = _Scan(weights, sizes), np.sqrt(weights)[:, None]
    statistic = scan.statistic(features * roots)
    best = int(statistic.argmax())
    after = int(sizes[best])
    left = _left(features, weights, len(features) - after) * roots
    dependence = float(_dependence(_correlations(left, len(features) - after), sizes, len(features))[best])
    rng = generator(seed)
    least = float(statistic[best])
    if dependence > 1.0:
        least -= (dependence - 1.0) * float(_Orders(left, scan).draw(CHANCE_ORDERS, rng).max())
    count = math.ceil(20 / alpha) if permutations is None else permutations
    p = _by_chance(_Orders(features * roots, scan), least, count, rng)
    moment = int(np.flatnonzero(known)[-after * block])
    distances = _hellinger(load[:moment].sum(axis=0), load[moment:].sum(axis=0))
    layer = int(distances.argmax())
    return Drift(p, len(load) - moment, float(distances.mean()), layer, float(distances[layer]), dependence)


def can_tell(before: int, since: int, block: int, alpha: float) -> bool:
    """Whether so many windows can make a p-value of half of alpha: if all since differ from all before."""
    first, second = before // block, since // block
    return first >= LEAST_SINCE and second >= LEAST_SINCE and math.comb(first + second, second) >= 2 / alpha


class _Scan:
    """The statistic for changes that leave so many rows after them. weights: [B] of rows, with mean 1."""

    def __init__(self, weights: FloatArray, sizes: IntArray) -> None:
        self._roots, self._sizes = np.sqrt(weights), sizes
        behind = np.cumsum(weights[::-1])[sizes - 1]
        self._share = behind / weights.sum()
        self._scale = 1.0 / (behind * (1.0 - self._share))

    def statistic(self, rows: FloatArray) -> FloatArray:
        """[..., sizes] for rows [..., B, F], each times the root of its weight."""
        sums = np.cumsum((rows * self._roots[:, None])[..., ::-1, :], axis=-2)
        apart = sums[..., self._sizes - 1, :] - self._share[:, None] * sums[..., -1:, :]
        return np.asarray((apart**2).sum(axis=-1) * self._scale)


def _left(features: FloatArray, weights: FloatArray, cut: int) -> FloatArray:
    """Rows less their mean before `cut`, or from there on."""
    parts = [
        part - np.average(part, axis=0, weights=weight)
        for part, weight in ((features[:cut], weights[:cut]), (features[cut:], weights[cut:]))
    ]
    return np.concatenate(parts)


def _weights(left: FloatArray, tokens: FloatArray) -> FloatArray:
    """[B] one over the scatter of rows, mean 1: a + b / tokens, neither negative, by least squares."""
    scatter, few = (left**2).sum(axis=1), tokens.mean() / np.maximum(tokens, 1.0)
    spread = few - few.mean()
    if (spread**2).sum() < 1e-6 or scatter.sum() == 0.0:
        return np.ones(len(left))
    slope = max(0.0, float((spread * scatter).sum() / (spread**2).sum()))
    same = float(scatter.mean() - slope * few.mean())
    if same < 0.0:
        same, slope = 0.0, 1.0
    weights = 1.0 / (same + slope * few)
    return np.asarray(weights / weights.mean())


class _Orders:
    """The largest statistic of random orders of rows [B, F]."""

    def __init__(self, rows: FloatArray, scan: _Scan) -> None:
        # Distances depend on the Gram matrix alone: as many columns as rows tell it.
        values, vectors = np.linalg.eigh(rows @ rows.T)
        positive = values > max(0.0, float(values[-1])) * 1e-12
        self._factors, self._scan = vectors[:, positive] * np.sqrt(values[positive]), scan

    def draw(self, count: int, rng: np.random.Generator) -> FloatArray:
        blocks = len(self._factors)
        order = rng.permuted(np.broadcast_to(np.arange(blocks), (count, blocks)), axis=1)
        return np.asarray(self._scan.statistic(self._factors[order]).max(axis=1))


def _by_chance(orders: _Orders, least: float, permutations: int, rng: np.random.Generator) -> float:
    """The chance that an order makes the statistic as large as `least`."""
    # Ties count as "as large", rounding included: a p-value may be too large, never too small.
    least -= 1e-9 * abs(least)
    as_large, done, batch = 0, 0, 64
    while done < permutations:
        batch = min(batch, permutations - done)
        reached = np.flatnonzero(orders.draw(batch, rng) >= least)
        if as_large + len(reached) >= ENOUGH_AS_LARGE:
            return ENOUGH_AS_LARGE / (done + int(reached[ENOUGH_AS_LARGE - as_large - 1]) + 1)
        as_large, done, batch = as_large + len(reached), done + batch, 512
    return (1 + as_large) / (1 + permutations)


def _dependence(correlations: FloatArray, sizes: IntArray, count: int) -> FloatArray:
    """[sizes] by what factor these correlations of rows 1, 2, ... apart enlarge the statistic."""
    lags = np.arange(1, len(correlations) + 1)

    def of_mean(rows: IntArray) -> FloatArray:
        overlap = np.maximum(0.0, 1.0 - lags / rows[:, None])
        return np.asarray((1.0 + 2.0 * (overlap * correlations).sum(axis=1)) / rows)

    return np.asarray((of_mean(sizes) + of_mean(count - sizes)) / (1.0 / sizes + 1.0 / (count - sizes)))


def _correlations(left: FloatArray, cut: int) -> FloatArray:
    """Of rows [B, F] 1, 2, ... apart that lie on the same side of `cut`, where each side's mean is 0.

    The larger of what is estimated at each distance, and a geometric decay from the first two: far apart, estimates in
    a short series are too small.
    """
    count = len(left)
    parts = (left[:cut], left[cut:])
    spread = float((left**2).sum()) / max(1, count - len(parts))
    if count < 6 or spread == 0.0:
        return np.zeros(0)
    estimates: list[float] = []
    for lag in range(1, count // 3 + 1):
        long = [part for part in parts if len(part) > lag]
        pairs = sum(len(part) - lag for part in long)
        along = sum(float((part[lag:] * part[:-lag]).sum()) for part in long)
        # Means were taken from the same rows: independent ones are correlated by minus one over their number.
        bias = sum((len(part) - lag) / len(part) for part in long)
        estimates.append((along / spread + bias) / pairs)
    first = estimates[0]
    if first <= CORRELATED:
        return np.zeros(0)
    first = min(0.95, first / max(0.5, 1.0 - FITTED_TO * sum(1 for part in parts if len(part) > 2) / count))
    decay = min(0.95, max(first, estimates[1] / estimates[0]))
    lags = np.arange(count - 1)
    positive = next((i for i, value in enumerate(estimates) if value <= CORRELATED), len(estimates))
    estimated = np.zeros(count - 1)
    estimated[:positive] = estimates[:positive]
    return np.asarray(np.maximum(estimated, first * decay**lags) * (1.0 + HIDDEN / math.sqrt(count)))


def _blocks(load: FloatArray, block: int) -> FloatArray:
    """[B, L, E] sums of whole blocks; the oldest windows may be left over."""
    count = len(load) // block
    return np.asarray(load[len(load) - count * block :].reshape(count, block, *load.shape[1:]).sum(axis=1))


def _features(blocks: FloatArray) -> tuple[FloatArray, FloatArray]:
    """[B, L * E] shares of each layer's load over the roots of their means, less their means; and [B] tokens, about.

    Over their roots rare and frequent experts vary alike by chance. Shares, not their roots: the mean of those depends
    on how many tokens there are.
    """
    total = blocks.sum(axis=2, keepdims=True)
    shares = blocks / np.where(total > 0, total, 1.0)
    mean = shares.sum(axis=0) / np.maximum((total > 0).sum(axis=0), 1)
    # A layer empty in a block is taken for its mean there.
    left = np.where(total > 0, shares - mean, 0.0)
    features = (left / np.sqrt(np.maximum(mean, 1e-12))).reshape(len(blocks), -1)
    return np.asarray(features), np.asarray(blocks.sum(axis=(1, 2)))


def _hellinger(before: FloatArray, since: FloatArray) -> FloatArray:
    """[L] Hellinger distances of the shares of two loads [L, E]."""
    roots = [np.sqrt(load / np.maximum(load.sum(axis=1, keepdims=True), 1e-300)) for load in (before, since)]
    return np.asarray(np.sqrt(np.maximum(0.0, 0.5 * ((roots[0] - roots[1]) ** 2).sum(axis=1))))
