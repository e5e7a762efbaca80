"""Do things go wrong late? An exact scan of right and wrong in order, every change point considered."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy


@dataclass(frozen=True)
class Change:
    """The change point at which late is worst beside early.

    after     how many come before it
    early     of those, how many are bad
    late      of the others
    p_value   one-sided: how likely some change point is as remarkable as this one, if every order of the same things is
              as likely as any other
    """

    after: int
    early: int
    late: int
    p_value: float


def latest_change(bad: Sequence[bool], places: Sequence[int] | None = None) -> Change | None:
    """The change point of `bad` (in order) where Fisher's exact p of "later ones are bad more often" is smallest.

    places  where a change may be: so many come before it; all by default. Things that have no order among them, such as
            requests of equal concurrency, have none between them

    The p-value is exact for the smallest of them all: with the number of bad ones given, the count of bad ones along the
    order is a Markov chain, from which all paths are taken out that some change point finds as remarkable or more.
    None where nothing is bad, or there is no place for a change.
    R. A. Fisher, J. R. Statist. Soc. 98 (1935) 39-82; the smallest p of many tests with its exact distribution: L. H. C.
    Tippett, The Methods of Statistics (1931); change points: A. N. Pettitt, Biometrika 67 (1980) 79-84.
    """
    count, total = len(bad), sum(map(bool, bad))
    allowed = sorted({place for place in (range(1, count) if places is None else places) if 0 < place < count})
    if not total or not allowed:
        return None
    seen = np.concatenate([[0], np.cumsum(np.asarray(bad, dtype=bool))])
    tails = {
        place: scipy.stats.hypergeom.sf(np.arange(total + 1) - 1, count, total, count - place) for place in allowed
    }
    smallest, after = min((float(tails[place][total - seen[place]]), place) for place in allowed)
    alive, hit = np.zeros(total + 1), 0.0  # by bad ones so far
    alive[0] = 1.0
    for place in range(1, count):
        left = count - place + 1
        becomes_bad = alive * (total - np.arange(total + 1)) / left
        alive = alive - becomes_bad
        alive[1:] += becomes_bad[:-1]
        if place in tails:
            remarkable = tails[place][::-1] <= smallest * (1 + 1e-9)  # by bad ones so far: the others come later
            hit += float(alive[remarkable].sum())
            alive[remarkable] = 0.0
    early = int(seen[after])
    return Change(after, early, total - early, min(hit, 1.0))
