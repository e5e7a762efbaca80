"""Drift or noise: whether a series of runs changed at some run, by exact tests, at a level for all looks together.

Somebody looks after each run, at several series, for a change at any run. All of this is paid for:

    series   the level is shared out among them evenly
    looks    the look after the n-th run may use 1 / (n (n + 1)) of it: these shares add up to 1, however long one looks
    runs     the smallest of the p-values of the n - 1 places where the change may lie counts n - 1 times (Bonferroni)

The test of counts is Fisher's exact one. A score is of the same questions each time, so that runs differ by less than
the binomial noise which it assumes: it errs on the side of noise. The test of measured values is the exact permutation
test of their rank sum, ties sharing their mean rank: B. Streitberg, J. Roehmel, Statistical Software Newsletter 12
(1986) 10-17; scipy's `mannwhitneyu` is exact only where there are no ties.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import fisher_exact, rankdata

LEVEL = 0.01


@dataclass(frozen=True)
class Change:
    """The most likely change of a series: `before` and `after` run number `at` (from 0), as shares or medians.

    `p_value` is of this change as the best of all runs where one may lie, `level` what it must not exceed at this look.
    """

    at: int
    before: float
    after: float
    p_value: float
    level: float

    @property
    def is_drift(self) -> bool:
        return self.p_value <= self.level


def level_of_look(runs: int, series: int, level: float = LEVEL) -> float:
    """The share of `level` that the look after the `runs`-th run may use for one of `series` series."""
    return level / series / (runs * (runs + 1))


def change_of_counts(
    successes: Sequence[int], trials: Sequence[int], series: int = 1, level: float = LEVEL
) -> Change | None:
    """The change of a share, `successes[i]` of `trials[i]` in run i; None with fewer than two runs."""
    done, tried = np.cumsum(successes), np.cumsum(trials)
    p_values = [
        fisher_exact([[done[i], tried[i] - done[i]], [done[-1] - done[i], tried[-1] - tried[i] - done[-1] + done[i]]])[
            1
        ]
        for i in range(len(done) - 1)
    ]
    if not p_values:
        return None
    at = int(np.argmin(p_values)) + 1
    before, after = done[at - 1] / tried[at - 1], (done[-1] - done[at - 1]) / (tried[-1] - tried[at - 1])
    return _change(at, before, after, p_values, series, level)


def rank_sum_counts(doubled_ranks: Sequence[int]) -> np.ndarray:
    """[size, sum] -> how many subsets of that size have that sum of doubled ranks; float64, exact up to 2**53."""
    counts = np.zeros((len(doubled_ranks) + 1, int(sum(doubled_ranks)) + 1))
    counts[0, 0] = 1
    for rank in map(int, doubled_ranks):
        counts[1:, rank:] += counts[:-1, : counts.shape[1] - rank].copy()
    return counts


def change_of_values(values: Sequence[float], series: int = 1, level: float = LEVEL) -> Change | None:
    """The change of the middle of measured values, one a run; None with fewer than two runs."""
    if len(values) < 2:
        return None
    doubled = np.round(2 * rankdata(values)).astype(int)
    counts, sums = rank_sum_counts(doubled), np.cumsum(doubled)
    p_values = []
    for size in range(1, len(values)):
        share = counts[size] / counts[size].sum()
        observed = sums[size - 1]
        p_values.append(min(1.0, 2 * min(share[: observed + 1].sum(), share[observed:].sum())))
    at = int(np.argmin(p_values)) + 1
    return _change(at, np.median(values[:at]), np.median(values[at:]), p_values, series, level)


def _change(at, before, after, p_values, series, level) -> Change:
    p_value = min(1.0, float(min(p_values)) * len(p_values))
    return Change(at, float(before), float(after), p_value, level_of_look(len(p_values) + 1, series, level))
