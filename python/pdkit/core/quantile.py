"""The one quantile of this project; it needs no numpy, so that a report can be read without it."""

from collections.abc import Sequence
from fractions import Fraction


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed; 0 of none.

    Definition 1 of R. J. Hyndman, Y. Fan, Am. Stat. 50 (1996) 361-365: always one of the values. `share` is taken as
    it is written in decimals: a tenth of ten values is one of them.
    """
    ordered = sorted(values)
    rank = -(-Fraction(str(share)) * len(ordered) // 1)  # rounded up
    return ordered[max(0, int(rank) - 1)] if ordered else 0.0
