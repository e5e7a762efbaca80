"""Exact maths of a sequential test of two engines on the same examples: how many right answers does one of them lose?

An example that both get right, or both wrong, says only that it was looked at. Two kinds of discordant pairs remain:
lost (right with the baseline only) and gained (right with the candidate only). Of two sound engines each kind is as
likely as the other: together they are the *flip rate*, which batching and rounding cause. A candidate that loses
`loss` of its answers has so many more lost pairs. Every probability is computed, none simulated.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy
from scipy.special import logsumexp

from pdkit.core.stats import UnattainableError, at_least, look_sizes, sign_test_of, wald_thresholds

NODES = 24  # of the weight function
UNEXPECTED = 1e-3  # gained pairs less likely than this are more flips than were planned for
MOST_LOST, MOST_GAINED = 120, 60  # of the table of states
_TINY = 1e-15
_FACTORS = np.arange(50, 201, 5) / 100

Table = np.ndarray  # by lost and gained pairs


@dataclass(frozen=True)
class PairedPlan:
    """When to look at the pairs, and what decides there.

    looks      examples that both have answered at each look, rising
    loss       share of right answers whose loss must be found
    flips      largest flip rate of two sound engines for which the error rates hold
    pass_at    log likelihood ratio (loss : none) up to which a look passes
    fail_at    from which it fails, unless more pairs are gained than `flips` explains
    level      at the last look the exact McNemar test decides, at this one-sided probability

    A sequential probability ratio test (A. Wald, Ann. Math. Statist. 16 (1945) 117-186) of a trinomial distribution, with
    weight functions for the flip rate.
    """

    looks: tuple[int, ...]
    loss: float
    flips: float
    pass_at: float
    fail_at: float
    level: float

    def decide(self, look: int, lost: int, gained: int) -> bool | None:
        """Whether look `look` (0, 1, ...) passes; None where it does not decide."""
        examples = self.looks[look]
        if look == len(self.looks) - 1:
            return sign_test_of(lost, gained).p_value > self.level
        ratio = float(log_ratio(examples, lost, gained, self.loss, self.flips))
        if ratio <= self.pass_at:
            return True
        return False if ratio >= self.fail_at and not self.more_flips(examples, gained) else None

    def more_flips(self, examples: int, gained: int) -> bool:
        """Whether so many gained pairs are more than chance makes of `flips`: the early looks then do not fail."""
        return at_least(gained, examples, self.flips / 2) <= UNEXPECTED


@dataclass(frozen=True)
class PairedPoint:
    """What a plan does to two engines whose pairs are lost and gained at some rates, independently per example.

    beyond    probability of what was too unlikely to be carried on; part of neither other probability
    """

    pass_probability: float
    fail_probability: float
    expected_examples: float
    beyond: float


def log_ratio(examples: int, lost: np.ndarray | int, gained: np.ndarray | int, loss: float, flips: float) -> np.ndarray:
    """Log of the weighted likelihood of a loss, over that of none; `lost` and `gained` broadcast.

    With a flip rate f an example is lost with f/2 (and `loss` more, if there is a loss), gained with f/2. f is not
    known; either likelihood is its mean over f, uniform from 0 to `flips` (midpoints of NODES equal parts).
    Weight functions: A. Wald, Sequential Analysis (1947), section 4.1.3; mixtures: H. Robbins, Ann. Math. Statist. 41
    (1970) 1397-1409.
    """
    rate = (np.arange(NODES) + 0.5) / NODES * flips
    lost, gained = np.asarray(lost)[..., None], np.asarray(gained)[..., None]
    same = examples - lost - gained
    none = (lost + gained) * np.log(rate / 2) + same * np.log1p(-rate)
    some = lost * np.log(rate / 2 + loss) + gained * np.log(rate / 2) + same * np.log1p(-rate - loss)
    return logsumexp(some, axis=-1) - logsumexp(none, axis=-1)


@lru_cache(maxsize=512)
def _statistic(examples: int, loss: float, flips: float) -> tuple[Table, Table]:
    """(log ratio, whether there are more flips than planned) of each state after so many examples."""
    lost, gained = np.arange(MOST_LOST + 1)[:, None], np.arange(MOST_GAINED + 1)[None, :]
    ratio = log_ratio(examples, lost, gained, loss, flips)
    more = scipy.stats.binom.sf(np.arange(MOST_GAINED + 1) - 1, examples, flips / 2) <= UNEXPECTED
    return ratio, np.broadcast_to(more, ratio.shape)


@lru_cache(maxsize=32)
def _mcnemar_passes(level: float) -> Table:
    lost, gained = np.arange(MOST_LOST + 1)[:, None], np.arange(MOST_GAINED + 1)[None, :]
    return scipy.stats.binom.sf(lost - 1, lost + gained, 0.5) > level


@lru_cache(maxsize=64)
def _increments(examples: int, lost_rate: float, gained_rate: float) -> Table:
    """P(so many lost and gained among `examples`), of a trinomial distribution, as far as that is not below _TINY."""
    lost = np.arange(min(examples, MOST_LOST) + 1)[:, None]
    gained = np.arange(min(examples, MOST_GAINED) + 1)[None, :]
    rest = np.maximum(examples - lost, 0)
    found = scipy.stats.binom.pmf(lost, examples, lost_rate) * scipy.stats.binom.pmf(
        gained, rest, gained_rate / (1 - lost_rate)
    )
    kept = found >= _TINY
    rows, columns = (int(np.flatnonzero(np.any(kept, axis=axis))[-1]) + 1 for axis in (1, 0))
    return np.where(kept, found, 0.0)[:rows, :columns]


def _convolved(alive: Table, increments: Table) -> Table:
    """Cut at MOST_LOST and MOST_GAINED by the caller."""
    rows, columns = alive.shape
    found = np.zeros((rows + increments.shape[0] - 1, columns + increments.shape[1] - 1))
    for lost, gained in zip(*increments.nonzero(), strict=True):
        found[lost : lost + rows, gained : gained + columns] += increments[lost, gained] * alive
    return found


def paired_point(plan: PairedPlan, lost_rate: float, gained_rate: float) -> PairedPoint:
    """Exact P(pass), P(fail) and expected examples: the distribution of the pairs is carried from look to look.

    The recursion of P. Armitage, C. K. McPherson, B. C. Rowe (J. R. Statist. Soc. A 132 (1969) 235-244), with two
    counts in place of one.
    """
    alive, fewest = np.ones((1, 1)), 0  # by lost, from `fewest` on, and gained
    passed = failed = expected = 0.0
    done = 0
    for index, examples in enumerate(plan.looks):
        alive = _convolved(alive, _increments(examples - done, lost_rate, gained_rate))
        alive, done = alive[: MOST_LOST + 1 - fewest, : MOST_GAINED + 1], examples
        here = slice(fewest, fewest + alive.shape[0]), slice(0, alive.shape[1])
        if index == len(plan.looks) - 1:
            passes = _mcnemar_passes(plan.level)[here]
            fails = ~passes
        else:
            ratio, more = _statistic(examples, plan.loss, plan.flips)
            passes, fails = ratio[here] <= plan.pass_at, (ratio[here] >= plan.fail_at) & ~more[here]
        now_passed, now_failed = float(alive[passes].sum()), float(alive[fails].sum())
        passed, failed, expected = passed + now_passed, failed + now_failed, expected + (now_passed + now_failed) * done
        alive = np.where(passes | fails | (alive < _TINY), 0.0, alive)
        rows = np.flatnonzero(np.any(alive, axis=1))
        if not len(rows):
            break
        columns = np.flatnonzero(np.any(alive, axis=0))
        alive, fewest = alive[int(rows[0]) : int(rows[-1]) + 1, : int(columns[-1]) + 1], fewest + int(rows[0])
    beyond = max(1.0 - passed - failed, 0.0)
    return PairedPoint(passed, failed, expected + beyond * plan.looks[-1], beyond)


def error_rates(plan: PairedPlan, shares: int = 2) -> tuple[float, float]:
    """(largest P(fail) without a loss, largest P(pass) with one) for flip rates of 0 to `flips` in `shares` equal steps.

    With a loss and no flips no pair is gained; with flips of up to `flips` besides, up to half of them are.
    """
    rates = [plan.flips * share / shares for share in range(shares + 1)]
    none = [paired_point(plan, rate / 2, rate / 2) for rate in rates]
    some = [paired_point(plan, rate / 2 + plan.loss, rate / 2) for rate in rates]
    alarm = max(point.fail_probability + point.beyond for point in none)
    return alarm, max(point.pass_probability + point.beyond for point in some)


@lru_cache(maxsize=32)
def paired_plan(examples: int, *, loss: float, flips: float, alpha: float, beta: float, step: int) -> PairedPlan:
    """The plan with the lowest bounds whose exact error rates keep to alpha and beta for all flip rates up to `flips`.

    examples    of the data set; the last look is there at the latest
    loss        share of right answers; alpha is the largest P(fail) of engines that are equally good, beta the largest
                P(pass) of a candidate that loses so much
    step        examples between looks

    Wald's thresholds are multiplied by the smallest of some factors that keeps both rates: looks at slice ends make
    them cautious, the unknown flip rate and the last look lax. Raises ValueError for what makes no sense,
    UnattainableError where the examples are too few.
    """
    if not (0 < alpha < 0.5 and 0 < beta < 0.5):
        raise ValueError(f"need error rates between 0 and 0.5, got alpha={alpha}, beta={beta}")
    if not (0 < loss < 0.5 and 0 < flips < 0.5) or step < 1:
        raise ValueError(f"need loss and flips between 0 and 0.5 and a positive step, got {loss}, {flips}, {step}")
    pass_at, fail_at = wald_thresholds(alpha, beta)
    looks = look_sizes(examples, step, step)

    def made(factor: float) -> PairedPlan:
        return PairedPlan(looks, loss, flips, float(factor * pass_at), float(factor * fail_at), alpha)

    def suffices(factor: float) -> bool:
        """Where the rates are largest: with all flips, and with none beside the loss."""
        plan = made(factor)
        return (
            paired_point(plan, flips / 2, flips / 2).fail_probability <= alpha
            and paired_point(plan, loss, 0.0).pass_probability <= beta
        )

    for factor in _FACTORS[bisect_left(_FACTORS, True, key=suffices) :]:
        alarm, miss = error_rates(made(factor))
        if alarm <= alpha and miss <= beta:
            return made(factor)
    task = f"find a loss of {loss} beside flips of {flips} with false alarm <= {alpha:.2%} and miss <= {beta:.2%}"
    raise UnattainableError(f"{examples} pairs cannot {task}")
