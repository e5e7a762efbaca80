"""The accuracy gate: from scored examples to a verdict whose report is the failure message."""

import enum
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

from pdkit.checks.judgement import Judgement
from pdkit.core import stats
from pdkit.core.suggest import unknown


class Verdict(enum.Enum):
    PASS = "PASS"
    FAIL = "FAIL"
    UNDECIDED = "UNDECIDED"


class Policy(str, enum.Enum):
    """Which looks decide.

    FIRST_LOOK   one look after `first_look` examples, at the threshold that the test names
    SEQUENTIAL   a truncated sequential test that looks after every slice
    AUTO         the same test, looking at `first_look` examples first: where that look is beyond the test's own
                 boundary it decides, otherwise slices follow. The first look is a look of the test, not one before
                 it, so the stated error rates are those of the whole procedure.
    """

    FIRST_LOOK = "first-look"
    SEQUENTIAL = "sequential"
    AUTO = "auto"


class Planned:
    """Options from which a plan follows, if there are examples enough."""

    def plan(self, available: int) -> Any:
        """Raises ValueError where `available` scored examples are too few."""
        raise NotImplementedError

    def suffices(self, available: int) -> bool:
        """Whether a data set of `available` scored examples is large enough for `plan`."""
        try:
            self.plan(available)
        except ValueError:
            return False
        return True


@dataclass(frozen=True)
class GateOptions(Planned):
    """What the gate promises.

    good, bad        accuracies to pass and to fail; between them either verdict is right
    alpha, beta      largest P(fail | good) and P(pass | bad) of the sequential test, exact, truncation included
    first_look       examples of the first look
    threshold        score that the first look must exceed, by itself
    slice_examples   examples between looks; the default nearly fills the client's 128 threads
    """

    policy: Policy = Policy.AUTO
    good: float = 0.965
    bad: float = 0.93
    alpha: float = 0.01
    beta: float = 0.01
    first_look: int = 200
    threshold: float = 0.95
    slice_examples: int = 100

    def __post_init__(self) -> None:
        known = [policy.value for policy in Policy]
        if self.policy not in known:
            raise ValueError(unknown("gate policy", self.policy, known))
        if self.first_look < 1 or self.slice_examples < 1:
            raise ValueError(f"a look needs at least one example, got {self.first_look} and {self.slice_examples}")
        object.__setattr__(self, "policy", Policy(self.policy))

    def plan(self, available: int) -> stats.Plan:
        """The looks and thresholds for a data set of `available` scored examples; ValueError if they are too few."""
        if available < self.first_look:
            raise ValueError(f"the data set has {available} scored examples, the first look needs {self.first_look}")
        if self.policy is Policy.FIRST_LOOK:
            return stats.fixed_plan(self.first_look, self.threshold)
        try:
            return stats.sequential_plan(
                available,
                good=self.good,
                bad=self.bad,
                alpha=self.alpha,
                beta=self.beta,
                first=self.slice_examples if self.policy is Policy.SEQUENTIAL else self.first_look,
                step=self.slice_examples,
            )
        except stats.UnattainableError as error:
            way_out = f"score a larger data set, or choose policy {Policy.FIRST_LOOK.value!r}"
            raise ValueError(f"{error}; {way_out}") from None


@dataclass(frozen=True)
class ScoredSlice:
    """`correct` of `examples` right; `outcomes` says which, in the order of the data set, where that is known."""

    examples: int
    correct: int
    outcomes: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.correct <= self.examples, self
        assert self.outcomes is None or (len(self.outcomes), sum(self.outcomes)) == (self.examples, self.correct), self


@dataclass(frozen=True)
class AccuracyGate(Judgement):
    """Derives a verdict from the slices scored so far, reports how, and asserts it."""

    options: GateOptions
    available: int
    slices: tuple[ScoredSlice, ...] = ()

    @property
    def plan(self) -> stats.Plan:
        return self.options.plan(self.available)

    @property
    def examples(self) -> int:
        return sum(s.examples for s in self.slices)

    @property
    def correct(self) -> int:
        return sum(s.correct for s in self.slices)

    @property
    def outcomes(self) -> tuple[bool, ...] | None:
        """Which examples were right, or None where a slice does not say."""
        known = [s.outcomes for s in self.slices if s.outcomes is not None]
        return tuple(chain.from_iterable(known)) if len(known) == len(self.slices) else None

    @property
    def path(self) -> tuple[tuple[int, int], ...]:
        """(examples, correct) at each look taken."""
        examples = accumulate(s.examples for s in self.slices)
        correct = accumulate(s.correct for s in self.slices)
        return tuple(zip(examples, correct, strict=True))

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        found = []
        for look, (examples, correct) in enumerate(self.path):
            if examples - correct <= self.plan.pass_at_most[look]:
                found.append(Verdict.PASS)
            elif examples - correct >= self.plan.fail_at_least[look]:
                found.append(Verdict.FAIL)
            else:
                found.append(Verdict.UNDECIDED)
        return tuple(found)

    @property
    def verdict(self) -> Verdict:
        return self.verdicts[-1] if self.slices else Verdict.UNDECIDED

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASS

    @property
    def next_examples(self) -> int:
        """How many examples to score before the next look; 0 when decided."""
        if self.verdict is not Verdict.UNDECIDED:
            return 0
        return self.plan.looks[len(self.slices)] - self.examples

    def record(self, scored: ScoredSlice) -> "AccuracyGate":
        """The gate after one more slice, which must be the one asked for."""
        assert scored.examples == self.next_examples, f"asked for {self.next_examples} examples, got {scored.examples}"
        return replace(self, slices=(*self.slices, scored))

    def report(self) -> str:
        if not self.slices:
            return f"accuracy gate: {Verdict.UNDECIDED.value}, nothing scored of {self.available} examples"
        low, high = stats.exact_interval(self.correct, self.examples)
        stopping = ", as if the count had been fixed beforehand" if len(self.plan.looks) > 1 else ""
        lines = [
            f"accuracy gate: {self.verdict.value} at look {len(self.slices)} of {len(self.plan.looks)}, "
            f"{self.correct} of {self.examples} correct = {self.correct / self.examples:.4f}, "
            f"exact 95 % interval {low:.4f} to {high:.4f}{stopping}; the data set has {self.available}",
            self._promise(),
            "  look  examples  correct   score  wrong  passes   fails  decides",
        ]
        lines += [self._look(look) for look in range(len(self.slices))]
        return "\n".join((*lines, self.first_look_alone()))

    def _look(self, look: int) -> str:
        examples, correct = self.path[look]
        at_most, at_least = self.plan.pass_at_most[look], self.plan.fail_at_least[look]
        passes = f"<= {at_most}" if at_most >= 0 else "never"
        fails = f">= {at_least}" if at_least <= examples else "never"
        last = look == len(self.plan.looks) - 1 and self.options.policy is not Policy.FIRST_LOOK
        return (
            f"{look + 1:>6} {examples:>9} {correct:>8} {correct / examples:>7.4f} {examples - correct:>6}  {passes:>6} "
            f"{fails:>7}  {self.verdicts[look].value}{' (by the cut at the end of the data set)' if last else ''}"
        )

    def _promise(self) -> str:
        options = self.options
        good, bad = (stats.operating_point(self.plan, accuracy) for accuracy in (options.good, options.bad))
        return (
            f"policy {options.policy.value}: accuracy {options.good} fails with probability "
            f"{1 - good.pass_probability:.4f}, {options.bad} passes with {bad.pass_probability:.4f}; "
            f"expected examples {good.expected_examples:.0f} and {bad.expected_examples:.0f}"
        )

    @property
    def first_look_score(self) -> float | None:
        """Share of right answers at the first look, or None if it was not taken."""
        correct = dict(self.path).get(self.options.first_look)
        return None if correct is None else correct / self.options.first_look

    @property
    def first_look_passed(self) -> bool | None:
        """What the first look alone would decide, or None if it was not taken."""
        return None if self.first_look_score is None else self.first_look_score > self.options.threshold

    def first_look_alone(self) -> str:
        """The same in one line."""
        look = f"the first look alone ({self.options.first_look} examples, score > {self.options.threshold})"
        if self.first_look_score is None:
            return f"{look} was not taken"
        decided = Verdict.PASS if self.first_look_passed else Verdict.FAIL
        return f"{look}: {self.first_look_score:.4f}, {decided.value}"
