"""Exact binomial maths of the accuracy gate: intervals, truncated sequential tests, paired comparison.

Counts are of wrong answers, because the thresholds are few wrong answers among many right ones. Every probability is
computed, none simulated. `scipy.stats` supplies the distributions and exact tests (it is imported where it is first
used: that takes half a second); the recursion over looks is ours, because neither scipy nor statsmodels has a
sequential test of a proportion.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy

_FACTORS = np.arange(50, 401) / 100


class UnattainableError(ValueError):
    """The data set is too small for the error rates asked for; the message names the size that is needed."""


@dataclass(frozen=True)
class Plan:
    """When to look at the score, and what decides there.

    looks           examples scored at each look, rising
    pass_at_most    wrong answers up to which a look passes; negative where no count can pass yet
    fail_at_least   wrong answers from which a look fails; beyond `looks` where no count can fail yet

    The last look leaves nothing undecided.
    """

    looks: tuple[int, ...]
    pass_at_most: tuple[int, ...]
    fail_at_least: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.looks) == len(self.pass_at_most) == len(self.fail_at_least) > 0, self
        for values in (self.looks, self.pass_at_most, self.fail_at_least):
            assert list(values) == sorted(values), f"thresholds must not fall from look to look: {self}"
        assert len(set(self.looks)) == len(self.looks) and self.looks[0] > 0, self
        assert all(p < f for p, f in zip(self.pass_at_most, self.fail_at_least, strict=True)), self
        assert self.fail_at_least[-1] == self.pass_at_most[-1] + 1, f"the last look must decide: {self}"


@dataclass(frozen=True)
class OperatingPoint:
    """What a rule does to an engine that answers correctly with probability `accuracy`, independently per example."""

    accuracy: float
    pass_probability: float
    expected_examples: float


def exact_interval(correct: int, examples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a proportion, as (low, high).

    C. J. Clopper, E. S. Pearson, Biometrika 26 (1934) 404-413.
    """
    interval = scipy.stats.binomtest(correct, examples).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def at_least(count: int, examples: int, share: float) -> float:
    """P(at least `count` of `examples`), where each is one with probability `share`, independently."""
    return float(scipy.stats.binom.sf(count - 1, examples, share))


def fixed_plan(examples: int, above: float) -> Plan:
    """Look once, after `examples`; pass when correct / examples > above, strictly and in floating point."""
    passing = [wrong for wrong in range(examples + 1) if (examples - wrong) / examples > above]
    most = max(passing, default=-1)
    return Plan((examples,), (most,), (most + 1,))


def look_sizes(examples: int, first: int, step: int) -> tuple[int, ...]:
    """`first`, then every `step`, the last at `examples` exactly; its slice has half a step to one and a half."""
    return (*range(first, examples - step // 2, step), examples)


def wald_thresholds(alpha: float, beta: float) -> tuple[float, float]:
    """Log likelihood ratios (bad : good) at which to pass and to fail: -ln((1-alpha)/beta), ln((1-beta)/alpha).

    alpha is P(fail | good), beta P(pass | bad). A. Wald, Ann. Math. Statist. 16 (1945) 117-186, section 3.
    """
    return -math.log((1 - alpha) / beta), math.log((1 - beta) / alpha)


def sprt_bounds(
    looks: Sequence[int], good: float, bad: float, pass_ratio: float, fail_ratio: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Wrong answers at which the log likelihood ratio (bad : good) reaches `pass_ratio` or `fail_ratio` at each look.

    A wrong answer adds ln((1-bad)/(1-good)) > 0 to the ratio, a correct one ln(bad/good) < 0.
    Returns (pass_at_most, fail_at_least).
    """
    up, down = math.log((1 - bad) / (1 - good)), math.log(bad / good)
    wrong_at = [[(ratio - n * down) / (up - down) for n in looks] for ratio in (pass_ratio, fail_ratio)]
    return tuple(map(math.floor, wrong_at[0])), tuple(map(math.ceil, wrong_at[1]))


@lru_cache(maxsize=256)
def _pmf(examples: int, accuracy: float) -> np.ndarray:
    return scipy.stats.binom.pmf(np.arange(examples + 1), examples, 1 - accuracy)


def stopping(
    looks: Sequence[int], pass_at_most: Sequence[int], fail_at_least: Sequence[int], accuracy: float
) -> tuple[np.ndarray, np.ndarray, tuple[int, np.ndarray]]:
    """Where a walk ends: P(passes at look i), P(fails at look i), and what is left undecided after the last look.

    The third value is (fewest wrong, probabilities of fewest, fewest + 1, ... wrong). Exact: the distribution of the
    count of wrong answers is carried from look to look by convolution, and what a look decides is taken out of it.
    P. Armitage, C. K. McPherson, B. C. Rowe, J. R. Statist. Soc. A 132 (1969) 235-244.
    """
    passed, failed = [], []
    fewest, alive, scored = 0, np.ones(1), 0
    for n, low, high in zip(looks, pass_at_most, fail_at_least, strict=True):
        alive = np.convolve(alive, _pmf(n - scored, accuracy))
        scored = n
        start = min(max(low + 1 - fewest, 0), len(alive))
        stop = max(min(high - fewest, len(alive)), start)
        passed.append(alive[:start].sum())
        failed.append(alive[stop:].sum())
        fewest, alive = fewest + start, alive[start:stop]
    return np.array(passed), np.array(failed), (fewest, alive)


def operating_point(plan: Plan, accuracy: float) -> OperatingPoint:
    """Exact P(pass) and expected number of scored examples of `plan`."""
    passed, failed, (_, undecided) = stopping(plan.looks, plan.pass_at_most, plan.fail_at_least, accuracy)
    assert abs(passed.sum() + failed.sum() - 1) < 1e-9 and not len(undecided), plan
    return OperatingPoint(accuracy, float(passed.sum()), float((passed + failed) @ plan.looks))


def with_retries(point: OperatingPoint, retries: int) -> OperatingPoint:
    """The same rule run again, on fresh answers, until it passes or `retries` are used up."""
    miss = 1 - point.pass_probability
    runs = sum(miss**i for i in range(retries + 1))
    return OperatingPoint(point.accuracy, 1 - miss ** (retries + 1), runs * point.expected_examples)


def _final_cut(
    looks: Sequence[int], low: Sequence[int], high: Sequence[int], good: float, bad: float, alpha: float, beta: float
) -> int | None:
    """The wrong answers up to which the last look should pass so that both error rates hold, most balanced; or None."""
    good_passed, _, (fewest, good_left) = stopping(looks, low, high, good)
    bad_passed, _, (_, bad_left) = stopping(looks, low, high, bad)
    false_alarms = 1 - good_passed.sum() - np.cumsum([0, *good_left])
    misses = bad_passed.sum() + np.cumsum([0, *bad_left])
    worst = np.maximum(false_alarms / alpha, misses / beta)
    return fewest - 1 + int(worst.argmin()) if worst.min() <= 1 else None


def _one_look_suffices(examples: np.ndarray, good: float, bad: float, alpha: float, beta: float) -> np.ndarray:
    """Whether a cut on the count of exactly so many examples keeps both error rates (the best test: Neyman-Pearson)."""
    cut = scipy.stats.binom.ppf(1 - alpha, examples, 1 - good)
    return scipy.stats.binom.cdf(cut, examples, 1 - bad) <= beta


def examples_needed(good: float, bad: float, alpha: float, beta: float, at_least: int = 1) -> int | None:
    """The fewest examples, from `at_least` on, with which a test keeps both error rates; None beyond 100000.

    Not monotone: the count is whole, so that a few more examples may need a cut that no longer suits both.
    """
    start, stop = at_least, at_least + 1000
    while start < 10**5:
        sizes = np.arange(start, stop)
        suffices = _one_look_suffices(sizes, good, bad, alpha, beta)
        if suffices.any():
            return int(sizes[suffices.argmax()])
        start, stop = stop, 2 * stop
    return None


def _truncated(looks: Sequence[int], low: Sequence[int], high: Sequence[int], cut: int) -> Plan:
    """The plan that cuts at the last look; earlier looks also decide what the remaining examples cannot change."""
    passing = [max(at_most, cut - (looks[-1] - n)) for n, at_most in zip(looks, low, strict=True)]
    failing = [min(at_least, cut + 1) for at_least in high]
    return Plan(tuple(looks), (*passing[:-1], cut), (*failing[:-1], cut + 1))


@lru_cache(maxsize=32)
def sequential_plan(
    examples: int, *, good: float, bad: float, alpha: float, beta: float, first: int, step: int
) -> Plan:
    """Truncated sequential probability ratio test of `good` against `bad`, looking at slice ends only.

    examples    scored examples at hand; the test is truncated there by a cut on the count
    good, bad   accuracies that must pass and fail; alpha is the largest P(fail | good), beta P(pass | bad)
    first, step examples before the first look, and between looks

    Wald's thresholds hold for looks at every example and no truncation. Looking at slice ends makes them cautious,
    truncation makes them lax, so both are multiplied by the smallest factor (in steps of 0.01) at which the exact
    error rates keep alpha and beta for some cut at the truncation; of several cuts the most balanced is taken.
    Truncation by a cut: A. Wald, Sequential Analysis (1947), section 3.8.

    Raises ValueError for accuracies or rates out of order, UnattainableError if `examples` are too few for any test.
    """
    if not 0 < bad < good < 1:
        raise ValueError(f"need 0 < bad < good < 1, got good={good}, bad={bad}")
    if not (0 < alpha < 0.5 and 0 < beta < 0.5):
        raise ValueError(f"need error rates between 0 and 0.5, got alpha={alpha}, beta={beta}")
    assert first > 0 and step > 0, (first, step)
    task = f"tell accuracy {good} from {bad} with false alarm <= {alpha:.2%} and miss <= {beta:.2%}"
    needed = examples_needed(good, bad, alpha, beta, at_least=examples)
    if needed != examples:
        raise UnattainableError(f"{examples} scored examples cannot {task}; {needed or 'more than 100000'} can")
    looks = look_sizes(examples, first, step)
    pass_ratio, fail_ratio = wald_thresholds(alpha, beta)
    for factor in _FACTORS:
        low, high = sprt_bounds(looks, good, bad, factor * pass_ratio, factor * fail_ratio)
        cut = _final_cut(looks, low, high, good, bad, alpha, beta)
        if cut is not None:
            return _truncated(looks, low, high, cut)
    raise UnattainableError(f"no test of {examples} examples with looks {first}, then every {step}, can {task}")


def hypothesis_threshold(reference: float, examples: int, *, alpha: float = 0.05, sigma: float = 0.5) -> float:
    """Accuracy that TensorRT-LLM's accuracy tests ask for: reference - z_(1-alpha) * sqrt(2 sigma^2 / examples).

    A one-sided two-sample z test of equal sizes, both with standard deviation `sigma` (0.5 is the largest that a right
    or wrong answer can have, and what its GSM8K task uses). Its beta (0.2) only says which loss the test would notice,
    see `detectable_loss`. Source of both: tests/integration/defs/accuracy/accuracy_core.py of TensorRT-LLM.
    """
    return float(reference - scipy.stats.norm.ppf(1 - alpha) * math.sqrt(2 * sigma**2 / examples))


def detectable_loss(examples: int, *, alpha: float = 0.05, beta: float = 0.2, sigma: float = 0.5) -> float:
    """Loss of accuracy that `hypothesis_threshold` notices with probability 1 - beta."""
    return float(
        (scipy.stats.norm.ppf(1 - alpha) + scipy.stats.norm.ppf(1 - beta)) * math.sqrt(2 * sigma**2 / examples)
    )


@dataclass(frozen=True)
class Signs:
    """In how many pairs the first value is larger, and in how many smaller; equal ones say nothing.

    `p_value` is one-sided: how likely at least so many larger ones are, if either is as likely.
    """

    larger: int
    smaller: int
    p_value: float


def sign_test(ours: Sequence[float], theirs: Sequence[float]) -> Signs:
    """Exact sign test of paired values (W. J. Dixon, A. M. Mood, J. Am. Stat. Assoc. 41 (1946) 557-566).

    Of outcomes, True or False, it is the exact McNemar test (Q. McNemar, Psychometrika 12 (1947) 153-157, with the
    binomial distribution in place of chi squared). Raises ValueError when the two do not pair up.
    """
    pairs = list(zip(ours, theirs, strict=True))
    return sign_test_of(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))


def sign_test_of(larger: int, smaller: int) -> Signs:
    """The same of counts."""
    differing = larger + smaller
    p_value = scipy.stats.binomtest(larger, differing, 0.5, alternative="greater").pvalue if differing else 1.0
    return Signs(larger, smaller, float(p_value))
