"""What two neighbouring layers cost at least, by the sets of experts that one device holds in both (context-coherent).

A device holds a set A of a layer and a set B of the layer before. The tokens that come to it are those that chose an
expert of A, less those whose expert of B led them: a sum over B once A is known. So the cheapest B of every A is its
few cheapest experts, and pairs of sets, of which there are far too many to go through, are priced by going through A
alone. With x the chance of each pair, of which there are as many as devices, every expert of both layers is in one, and
the all-to-alls take at least

- what the device of any expert receives, by the pairs that have the expert;
- what the device of a leader sends for that leader's tokens: one copy to each device that they reach, but its own.

Both ways of a link count, and every leader stands in one place only. The linear program is solved as that of single
sets is (`device_sets`); its prices are drawn towards the best ones known, without which they swing (Wentges, Int.
Trans. Oper. Res. 4, 1997), and rows are added as they are violated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csc_array, csr_array, hstack, vstack

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.jit import kernel
from ..base import working_seconds
from ..mip.highs import QuietHighs, hand_over
from ..mip.program import Program
from .sdp import ROUNDING

CLOSE = 1e-2
"""Rounds end when the bound is this near, relatively, to the value of the program's own pairs."""
ROUNDS = 40
KEPT, CHEAPEST = 900, 2_000
"""Pairs kept when there are more than twice as many, and the cheapest ones of a round that new ones are among."""
EVERY = 10
"""New pairs a round that each expert is in, at least."""
VIOLATED = 1e-3
"""Rows are added that are missed by this much of a figure's average."""
CENTRE = 0.6
"""How much of the best prices known is in those tried."""
TRUSTED = 1e-4
"""Relative tolerance of an interior point: prices need not be better than that, as the bound holds for any."""
WORK, RECEIVED, SENT, OUT, BACK = range(5)
"""Kinds of rows, each of a group of steps and an expert: work of its device; what that receives of the dispatch; what
is sent for a leader of the layer before; what its device sends of the combine, and receives for tokens it leads."""
FIGURE = np.array([0, 1, 1, 2, 2])
"""Of each kind: work, dispatch or combine."""


@dataclass(frozen=True)
class PairCosts:
    """Costs of a layer's sets and of what they exchange with leaders.

    members: [A, c] experts of each set. work: [R, A] seconds of R groups of steps that work takes at least where a
    device holds the set. led: [R, A, E] tokens by their leader in the layer before that chose an expert of the set.
    owned: [R, A, E] tokens by their leader in the layer itself that chose another expert, one of the set. out, back:
    [R] seconds of a copy of each. floors: [2, R] seconds that dispatch and combine take whatever the placement.
    """

    members: IntArray
    work: FloatArray
    led: npt.NDArray[np.unsignedinteger[Any]]
    owned: npt.NDArray[np.unsignedinteger[Any]]
    out: FloatArray
    back: FloatArray
    floors: FloatArray

    @property
    def experts(self) -> int:
        return int(self.led.shape[2])


def least_over_pairs(costs: PairCosts, devices: int, seconds: float) -> float:
    """A lower bound, over all partitions of both layers' experts into sets and all ways to put them on `devices`
    devices, of the sum of the layer's work, the dispatch into it and its combine.

    Ends when little is left to gain or the seconds are spent; -inf when they were too few.
    """
    end = working_seconds() + seconds
    program = _PairProgram(costs, devices)
    for _ in range(ROUNDS):
        left = end - working_seconds()
        if left <= 0.0 or not program.round(left):
            break
        if program.bound >= program.value * (1.0 - CLOSE):
            break
    return program.bound


class _PairProgram:
    """The program of some pairs and some rows. value: of the last solution. bound: the best so far, over all pairs."""

    def __init__(self, costs: PairCosts, devices: int) -> None:
        self._costs, self._devices = costs, devices
        self._scale = 1.0 / max(float(costs.work.mean(axis=1).sum() + costs.floors.sum()), 1e-300)
        self._inside = np.zeros((len(costs.members), costs.experts), dtype=bool)
        np.put_along_axis(self._inside, costs.members, True, axis=1)
        self._row = self._first_rows()
        self._first, self._before = self._first_pairs()
        self._centre: list[FloatArray] | None = None
        self._pull = CENTRE
        self.value, self.bound = np.inf, -np.inf

    def _first_rows(self) -> BoolArray:
        """[5, R, E] which rows there are: those of the experts most used and of the leaders of most tokens."""
        costs = self._costs
        row = np.zeros((5, len(costs.work), costs.experts), dtype=bool)
        size = costs.members.shape[1]
        # Of all sets an expert is in, what they cost on average; of what is sent, all sets alike.
        used = costs.work @ self._inside
        chosen = costs.led.sum(axis=2, dtype=np.float64) @ self._inside
        leads, owns = (of[:, ::size].sum(axis=1, dtype=np.float64) for of in (costs.led, costs.owned))
        answers = costs.owned.sum(axis=2, dtype=np.float64) @ self._inside
        for kind, (figure, most) in enumerate(((used, 3), (chosen, 2), (leads, 2), (answers, 2), (owns, 2))):
            most = min(most, costs.experts)
            np.put_along_axis(row[kind], np.argsort(-figure, axis=1)[:, :most], True, axis=1)
        return row

    def _first_pairs(self) -> tuple[IntArray, IntArray]:
        """Sets and the sets before them of some partitions, so that there is a solution."""
        members, experts = self._costs.members, self._costs.experts
        size = members.shape[1]
        rng = np.random.default_rng(0)
        weights = experts ** np.arange(size - 1, -1, -1)
        drawn, before = (
            np.concatenate([np.sort(rng.permutation(experts).reshape(-1, size), axis=1) for _ in range(60)])
            for _ in range(2)
        )
        # In lexicographic order the sets' keys rise.
        return np.searchsorted(members @ weights, drawn @ weights), before

    def round(self, seconds: float) -> bool:
        """Takes new prices, and pairs and rows that they ask for; False when there are none in the time."""
        costs = self._costs
        inside, before = self._inside[self._first], np.zeros((len(self._first), costs.experts), dtype=bool)
        np.put_along_axis(before, self._before, True, axis=1)
        led = np.where(before, 0.0, costs.led[:, self._first]) * costs.out[:, None, None]
        owned = np.where(inside, 0.0, costs.owned[:, self._first]) * costs.back[:, None, None]
        work = costs.work[:, self._first]
        received, sent = led.sum(axis=2), owned.sum(axis=2)
        kind, group, expert = np.nonzero(self._row)
        mine = inside[:, expert].T
        rows = np.select(
            [kind[:, None] == each for each in range(4)],
            [work[group] * mine, received[group] * mine, led[group, :, expert], sent[group] * mine],
            owned[group, :, expert],
        )
        cover = np.concatenate([inside.T, before.T]).astype(np.float64)
        solution = self._solve(rows, FIGURE[kind] * len(work) + group, cover, seconds)
        if solution is None:
            return False
        duals, chance, times = solution
        self.value = float(times.sum())
        self._try(kind, group, expert, duals)
        figures = times.reshape(3, -1)
        for each, carried in (
            (WORK, (work * chance) @ inside),
            (RECEIVED, (received * chance) @ inside),
            (SENT, np.einsum("rne,n->re", led, chance)),
            (OUT, (sent * chance) @ inside),
            (BACK, np.einsum("rne,n->re", owned, chance)),
        ):
            over = carried - figures[FIGURE[each]][:, None]
            worst = np.argsort(-over, axis=1)[:, :2]
            missed = np.take_along_axis(over, worst, axis=1) > VIOLATED * self.value / len(work)
            known = np.take_along_axis(self._row[each], worst, axis=1)
            np.put_along_axis(self._row[each], worst, known | missed, axis=1)
        if len(chance) > 2 * KEPT:
            reduced = -(duals[: len(rows)] @ -rows + duals[len(rows) :] @ cover / self._scale)
            keep = (chance > 1e-5) | (reduced < np.partition(reduced, KEPT)[KEPT])
            self._first, self._before = self._first[keep], self._before[keep]
        self._add()
        return True

    def _solve(
        self, rows: FloatArray, figure: IntArray, cover: FloatArray, seconds: float
    ) -> tuple[FloatArray, FloatArray, FloatArray] | None:
        """(prices of rows and of experts, chances of pairs, figures in seconds)."""
        count, pairs, figures = len(rows), rows.shape[1], 3 * len(self._costs.work)
        choice = csc_array((np.ones(count), (np.arange(count), figure)), shape=(count, figures))
        top = hstack([choice, csc_array(-self._scale * rows)])
        matrix = csr_array(vstack([top, hstack([csc_array((len(cover), figures)), csc_array(cover)])]))
        least = np.concatenate([np.zeros(len(self._costs.work)), self._scale * self._costs.floors.ravel()])
        whole = np.zeros(figures + pairs, dtype=bool)
        program = Program(
            name="pairs of sets",
            cost=np.concatenate([np.ones(figures), np.zeros(pairs)]),
            constant=0.0,
            lower=np.concatenate([least, np.zeros(pairs)]),
            upper=np.full(figures + pairs, np.inf),
            integral=whole,
            implied=whole,
            row_start=matrix.indptr.astype(np.int64),
            column=matrix.indices.astype(np.int64),
            coefficient=matrix.data,
            row_lower=np.concatenate([np.zeros(count), np.ones(len(cover))]),
            row_upper=np.concatenate([np.full(count, np.inf), np.ones(len(cover))]),
        )
        solver = QuietHighs()
        options: dict[str, bool | float | str] = {
            "output_flag": False,
            "solver": "ipm",
            "run_crossover": "off",
            "ipm_optimality_tolerance": TRUSTED,
            "time_limit": seconds,
        }
        for name, value in options.items():
            solver.setOptionValue(name, value)
        hand_over(solver, program)
        solver.run()
        solution = solver.getSolution()
        duals, values = np.asarray(solution.row_dual), np.asarray(solution.col_value)
        if len(duals) != count + len(cover) or not (np.isfinite(duals).all() and np.isfinite(values).all()):
            return None
        duals[:count] = np.maximum(duals[:count], 0.0)
        return duals, np.maximum(values[figures:], 0.0), values[:figures] / self._scale

    def _try(self, kind: IntArray, group: IntArray, expert: IntArray, duals: FloatArray) -> None:
        """Prices all pairs by what the program asks, drawn towards the best prices known, and takes the bound."""
        costs, count = self._costs, len(kind)
        price = np.zeros(self._row.shape)
        price[kind, group, expert] = duals[:count]
        # Any weights bound a figure, if they are not negative and sum to one at most; the rest goes to its floor.
        for figure in range(3):
            mine = np.flatnonzero(figure == FIGURE)
            total = price[mine].sum(axis=(0, 2))
            price[mine] /= np.where(total > 0, total if figure == 0 else np.maximum(total, 1.0), 1.0)[:, None]
        paid = duals[count:] / self._scale
        tried = [price, paid[: costs.experts], paid[costs.experts :]]
        if self._centre is not None:
            pairs = zip(self._centre, tried, strict=True)
            tried = [self._pull * best + (1.0 - self._pull) * new for best, new in pairs]
        price, here, before = tried
        cheapest = np.empty(len(costs.members))
        self._best = np.empty(costs.members.shape, np.int64)
        size = price_pairs(
            costs.members,
            self._inside,
            costs.work,
            costs.led,
            costs.owned,
            price * np.stack([np.ones(len(costs.out)), costs.out, costs.out, costs.back, costs.back])[:, :, None],
            here,
            before,
            cheapest,
            self._best,
        )
        self._cheapest = cheapest
        rest = 1.0 - np.stack([price[[RECEIVED, SENT]].sum(axis=(0, 2)), price[[OUT, BACK]].sum(axis=(0, 2))])
        constant = float(here.sum() + before.sum() + (np.maximum(rest, 0.0) * costs.floors).sum())
        margin = ROUNDING * (self._devices * size + float(np.abs(here).sum() + np.abs(before).sum()))
        bound = constant + self._devices * float(cheapest.min()) - margin
        if bound > self.bound:
            self.bound, self._centre = bound, tried
        else:
            # Prices that gain nothing: nearer to what the program asks.
            self._pull = max(0.0, self._pull - 0.05)

    def _add(self) -> None:
        """Adds the cheapest pairs, and of the cheapest ones some that each expert is in."""
        cheapest, members = self._cheapest, self._costs.members
        some = min(CHEAPEST, len(cheapest))
        order = np.argpartition(cheapest, some - 1)[:some]
        order = order[np.argsort(cheapest[order])]
        taken, counts = order[:100].tolist(), np.zeros(self._costs.experts, np.int64)
        for a in order[100:].tolist():
            if (counts[members[a]] < EVERY).any():
                taken.append(a)
                counts[members[a]] += 1
        first = np.concatenate([self._first, np.array(taken, np.int64)])
        before = np.concatenate([self._before, np.sort(self._best[taken], axis=1)])
        both = np.unique(np.column_stack([first, before]), axis=0)
        self._first, self._before = both[:, 0], both[:, 1:]


@kernel
def price_pairs(
    members: Any,
    inside: Any,
    work: Any,
    led: Any,
    owned: Any,
    price: Any,
    here: Any,
    before: Any,
    cheapest: Any,
    best: Any,
) -> float:
    """Fills cheapest [A] with what a device costs at least that holds each set, and best [A, c] with the set of the
    layer before of which it does. Returns the largest sum of magnitudes that went into one.

    price: [5, R, E] of rows, times a copy's seconds. here, before: [E] what each expert pays. Others: see `PairCosts`.
    """
    sets, size = members.shape
    groups, experts = len(work), inside.shape[1]
    gain = np.empty(experts)
    largest = 0.0
    for a in range(sets):
        total, magnitude = 0.0, 0.0
        for i in range(size):
            total -= here[members[a, i]]
            magnitude += abs(here[members[a, i]])
        for b in range(experts):
            gain[b] = -before[b]
        for r in range(groups):
            of_work, of_received, of_sent = 0.0, 0.0, 0.0
            for i in range(size):
                e = members[a, i]
                of_work += price[0, r, e]
                of_received += price[1, r, e]
                of_sent += price[3, r, e]
            total += of_work * work[r, a]
            for b in range(experts):
                copies = (of_received + price[2, r, b]) * led[r, a, b]
                total += copies
                gain[b] -= copies
                if not inside[a, b]:
                    total += (of_sent + price[4, r, b]) * owned[r, a, b]
        for b in range(experts):
            magnitude += abs(gain[b])
        magnitude += abs(total)
        for i in range(size):
            least = 0
            for b in range(1, experts):
                if gain[b] < gain[least]:
                    least = b
            total += gain[least]
            best[a, i] = least
            gain[least] = np.inf
        cheapest[a] = total
        largest = max(largest, magnitude)
    return largest
