"""The paired gate: the same examples on a monolithic server and on the pair, until a loss of accuracy is seen or ruled out."""

from dataclasses import dataclass, replace

from pdkit.checks.accuracy.gate import GateOptions, Planned, Verdict
from pdkit.checks.judgement import Judgement
from pdkit.core import paired, stats

FEW_FLIPS, MANY_FLIPS = 0.005, 0.02


@dataclass(frozen=True)
class PairedOptions(Planned):
    """What the paired gate promises.

    loss    share of right answers whose loss fails with a probability of at least 1 - beta
    alpha   largest P(fail) of two equally good engines, whatever their flip rate is up to `flips`
    flips   share of examples that one of two sound engines gets right and the other wrong: FEW_FLIPS where answers
            repeat to the bit or nearly so, MANY_FLIPS where that is not known
    step    examples between looks
    good    accuracy of a sound baseline: one that is worse proves nothing, and fails the gate; at each look one of
            exactly this accuracy does so with a probability of at most `floor`, beside alpha
    """

    loss: float = 0.035
    flips: float = FEW_FLIPS
    alpha: float = 0.01
    beta: float = 0.01
    step: int = 44
    good: float = GateOptions.good
    floor: float = 1e-4

    def plan(self, available: int) -> paired.PairedPlan:
        """Raises ValueError where `available` examples are too few."""
        return paired.paired_plan(
            available, loss=self.loss, flips=self.flips, alpha=self.alpha, beta=self.beta, step=self.step
        )


@dataclass(frozen=True)
class PairedGate(Judgement):
    """Derives a verdict from the pairs so far: whether the baseline, and whether the candidate, got an example right."""

    options: PairedOptions
    available: int
    baseline: tuple[bool, ...] = ()
    candidate: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if len(self.baseline) != len(self.candidate):
            raise ValueError(f"outcomes must pair up: {len(self.baseline)} and {len(self.candidate)}")

    @property
    def plan(self) -> paired.PairedPlan:
        return self.options.plan(self.available)

    @property
    def examples(self) -> int:
        return len(self.baseline)

    @property
    def lost_in_order(self) -> tuple[bool, ...]:
        """Which examples are right with the baseline only."""
        return tuple(theirs and not ours for theirs, ours in zip(self.baseline, self.candidate, strict=True))

    @property
    def lost(self) -> int:
        return sum(self.lost_in_order)

    @property
    def gained(self) -> int:
        """Right with the candidate only."""
        return sum(ours and not theirs for theirs, ours in zip(self.baseline, self.candidate, strict=True))

    @property
    def baseline_is_bad(self) -> bool:
        """Whether the baseline gets so many wrong that a comparison with it proves nothing."""
        wrong = self.examples - sum(self.baseline)
        return self.examples > 0 and stats.at_least(wrong, self.examples, 1 - self.options.good) <= self.options.floor

    @property
    def verdict(self) -> Verdict:
        if not self.examples:
            return Verdict.UNDECIDED
        if self.baseline_is_bad:
            return Verdict.FAIL
        passes = self.plan.decide(self.plan.looks.index(self.examples), self.lost, self.gained)
        return Verdict.UNDECIDED if passes is None else Verdict.PASS if passes else Verdict.FAIL

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASS

    @property
    def next_examples(self) -> int:
        """How many examples to score on both before the next look; 0 when decided."""
        if self.verdict is not Verdict.UNDECIDED:
            return 0
        return next(look for look in self.plan.looks if look > self.examples) - self.examples

    def record(self, baseline: tuple[bool, ...], candidate: tuple[bool, ...]) -> "PairedGate":
        """The gate after one more slice, which must be the one asked for."""
        assert len(baseline) == self.next_examples, f"asked for {self.next_examples} examples, got {len(baseline)}"
        return replace(self, baseline=self.baseline + baseline, candidate=self.candidate + candidate)

    def report(self) -> str:
        options, plan = self.options, self.plan
        if not self.examples:
            return f"paired gate: {Verdict.UNDECIDED.value}, nothing scored of {self.available} examples"
        pairs = stats.sign_test_of(self.lost, self.gained)
        right = " and ".join(str(sum(each)) for each in (self.candidate, self.baseline))
        alarm, miss = paired.error_rates(plan)
        lines = [
            f"paired gate: {self.verdict.value} after {self.examples} examples, {right} right with the candidate and "
            f"the baseline; {self.lost} right with the baseline only, {self.gained} right with the candidate only; "
            f"exact McNemar p = {pairs.p_value:.4g}",
            f"  equally good engines fail with a probability of at most {alarm:.4f} (flips up to {options.flips:g}), a loss "
            f"of {options.loss:g} passes with at most {miss:.4f}; the data set has {self.available}",
        ]
        if self.baseline_is_bad:
            lines.append(
                f"  the baseline itself gets {sum(self.baseline)} of {self.examples} right, which one of accuracy "
                f"{options.good:g} does in at most {options.floor:g} of runs: nothing can be compared with it"
            )
        if plan.more_flips(self.examples, self.gained):
            lines.append(f"  more flips than {options.flips:g}: the rates above do not hold; plan for more of them")
        return "\n".join(lines)
