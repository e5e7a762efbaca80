"""An exact permutation test of two groups of repeated measurements, stratum by stratum: has a deployment moved?

Nothing is assumed of the noise but that, within a stratum, measurements of an unmoved deployment are exchangeable.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
import scipy


@lru_cache(maxsize=16)
def _contrasts(before: int, after: int) -> np.ndarray:
    """A row for each split: what the mean of the rows that it calls `after`, less that of the others, weighs each."""
    rows = np.full((comb(before + after, after), before + after), -1 / before)
    for split, chosen in enumerate(combinations(range(before + after), after)):
        rows[split, list(chosen)] = 1 / after
    return rows


def split_ranks(before: np.ndarray, after: np.ndarray) -> tuple[int, np.ndarray]:
    """(twice the midrank of the split that was observed, twice the midranks of all splits) of one stratum.

    before, after  measurements, a row for each; a split calls as many rows `after` as there are, and its size is the
                   Euclidean distance of the two means. Of an unmoved deployment all splits are equally likely.
    """
    rows = np.concatenate([before, after])
    sizes = np.linalg.norm(_contrasts(len(before), len(after)) @ (rows - rows[0]), axis=1)
    scale = sizes.max()
    if scale > 0:
        sizes = np.round(sizes / scale, 9)  # equal ones may be summed otherwise
    _, place, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    ranks = (2 * counts.cumsum() - counts + 1)[place]  # scipy.stats.rankdata takes three times as long
    return int(ranks[-1]), ranks  # combinations end with the last rows: those of `after`


def split_test(strata: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """P(the sum of the observed splits' ranks is at least what it is), if nothing moved: exact, by convolution.

    strata  (before, after) of each; a stratum whose measurements are all equal says nothing

    Permutation tests with strata: E. J. G. Pitman, Suppl. J. R. Statist. Soc. 4 (1937) 119-130; sums of ranks over
    strata: P. van Elteren, Bull. Inst. Int. Statist. 37 (1960) 351-361.
    """
    observed = 0
    distribution: np.ndarray = np.ones(1)
    for before, after in strata:
        rank, ranks = split_ranks(before, after)
        one = np.bincount(ranks) / len(ranks)
        observed, distribution = observed + rank, np.convolve(distribution, one)
    return min(float(distribution[observed:].sum()), 1.0)


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Order statistics that hold the median with at least this probability (W. R. Thompson, Ann. Math. Statist. 7 (1936))."""
    ordered, count = sorted(values), len(values)
    below = max(int(scipy.stats.binom.ppf((1 - confidence) / 2, count, 0.5)) - 1, 0)
    return ordered[below], ordered[count - 1 - below]
