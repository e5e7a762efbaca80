"""Parity: answers of a disaggregated pair against those of a monolithic server to the same requests.

An *arm* is the answers of one server to a list of requests. The reference arm is monolithic, the candidate
disaggregated. Where an engine computes the same bits under every load, both must be equal. Real engines do not; there
a control arm, monolithic again and under the same load, says by how much answers differ without any KV transfer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import eq

from pdkit.checks.hints import ComparedRequest, Evidence
from pdkit.checks.judgement import Judgement
from pdkit.checks.order import Ordered, by_load, by_number
from pdkit.checks.parity.answers import Answer, Arm
from pdkit.checks.parity.plan import Probe, Round
from pdkit.core.quantile import quantile
from pdkit.core.stats import sign_test, sign_test_of

# What another order of summation does to a float32 logprob of a nano model: about 1e-6; a KV transfer without its last
# token does 1e-2. Used only on a machine where batching was seen to change bits without any KV transfer.
FLOAT_ROUNDING = 1e-4

# The control-arm rule, see Parity.
LEVEL = 1e-4
RESOLUTION = 0.05  # what SGLang's own PDLogprobParityMixin allows a pair
GROSS_FACTOR = 10.0
GROSS_FLOOR = 1.0


@dataclass(frozen=True)
class Difference:
    """How far an answer is from the reference's.

    diverged  index of the first output token that differs, or that only one of them has; None if there is none
    deltas    at each position that both reached with the same tokens before it, the largest |difference of logprob|
              over the tokens that both tell of, in nats; where one names a token that the other's alternatives do not
              hold, at least its distance to the last of them
    other     names of what else differs: "text", "finish", ...
    """

    diverged: int | None
    deltas: tuple[float, ...]
    other: tuple[str, ...]

    @property
    def largest(self) -> float:
        return max(self.deltas, default=0.0)

    @property
    def is_none(self) -> bool:
        return self.diverged is None and self.largest == 0 and not self.other


def _table(answer: Answer, position: int) -> dict[int, float]:
    known = {token: logprob for logprob, token in answer.alternatives[position]} if answer.alternatives else {}
    return {**known, answer.tokens[position]: answer.logprobs[position]}


def _delta(reference: Answer, candidate: Answer, position: int) -> float:
    """Largest difference of logprob at one position; NaN counts as infinitely far."""
    ours, theirs = _table(reference, position), _table(candidate, position)
    distances = [0.0]
    for token in ours.keys() | theirs.keys():
        if token in ours and token in theirs:
            distances.append(abs(ours[token] - theirs[token]) if ours[token] != theirs[token] else 0.0)
        else:
            named, other = (ours, theirs) if token in ours else (theirs, ours)
            distances.append(named[token] - min(other.values()))
    return max(math.inf if math.isnan(distance) else distance for distance in distances)


def compare(reference: Answer, candidate: Answer) -> Difference:
    """What differs between two answers to one request."""
    pairs = list(zip(reference.tokens, candidate.tokens))
    diverged = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if diverged is None and len(reference.tokens) != len(candidate.tokens):
        diverged = len(pairs)
    comparable = len(pairs) if diverged is None else min(diverged + 1, len(pairs))
    other = [
        name
        for name in ("text", "finish", "prompt_tokens", "prompt_logprobs")
        if getattr(reference, name) != getattr(candidate, name)
    ]
    rows = [(len(answer.logprobs), [len(row) for row in answer.alternatives]) for answer in (reference, candidate)]
    if diverged is None and rows[0] != rows[1]:
        other.append("number of logprobs")
    told = min(len(reference.logprobs), len(candidate.logprobs), comparable)
    if len(reference.alternatives) != len(candidate.alternatives):
        told = min(told, len(reference.alternatives), len(candidate.alternatives))
    return Difference(diverged, tuple(_delta(reference, candidate, i) for i in range(told)), tuple(other))


def agree(reference: Answer, candidate: Answer) -> bool:
    """Whether one answer begins with all that the other says: its tokens or, where both tell none, its characters."""
    if reference.tokens or candidate.tokens:
        return all(map(eq, reference.tokens, candidate.tokens))
    return all(map(eq, reference.text or "", candidate.text or ""))


def other_end(reference: Answer, candidate: Answer) -> set[str]:
    """Which of "finish" and "prompt_tokens" differ, where nothing that was said does."""
    if not agree(reference, candidate):
        return set()
    return {name for name in ("finish", "prompt_tokens") if getattr(reference, name) != getattr(candidate, name)}


@dataclass(frozen=True)
class Differences:
    """The differences of one arm from the reference arm."""

    differences: tuple[Difference, ...]

    @classmethod
    def of(cls, reference: Arm, arm: Arm) -> "Differences":
        return cls(tuple(compare(ours, theirs) for ours, theirs in zip(reference, arm, strict=True)))

    @property
    def equal(self) -> int:
        return sum(difference.is_none for difference in self.differences)

    @property
    def same_tokens(self) -> tuple[bool, ...]:
        return tuple(difference.diverged is None for difference in self.differences)

    @property
    def largest(self) -> tuple[float, ...]:
        return tuple(difference.largest for difference in self.differences)

    @property
    def deltas(self) -> tuple[float, ...]:
        return tuple(delta for difference in self.differences for delta in difference.deltas)

    def report(self) -> str:
        """Exact matches, where tokens first differ, and how far logprobs are apart, in one line."""
        count, same = len(self.differences), sum(self.same_tokens)
        line = f"{self.equal} of {count} equal to the bit, {same} of {count} with the same tokens"
        if same < count:
            first = [difference.diverged for difference in self.differences if difference.diverged is not None]
            line += f" (others differ first at token {min(first)}, median {quantile(first, 0.5)})"
        shares = ", ".join(f"{name} {quantile(self.deltas, share):.2g}" for name, share in QUANTILES)
        return f"{line}; |d logprob| over {len(self.deltas)} positions: {shares}"


QUANTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))


@dataclass(frozen=True)
class Parity(Judgement):
    """Derives whether a candidate arm is at parity with the reference arm, reports how, and asserts it.

    condition  what was sent and how, for the report
    names      one for each request
    rounding   largest |difference of logprob| that is no difference; used without a control arm only
    loads      requests in flight beside each, itself included, where that is known

    Without a control arm each answer must be equal: tokens, text, finish reason, prompt logprobs, and logprobs within
    `rounding` (0: to the bit).

    With one, the candidate must not be further from the reference, which is each request alone, than the control is,
    which a monolithic server says under the same load. If the transfer changes nothing, candidate and control are two
    draws of the same thing, and it is as likely that the one is further away as that the other is. Hence exact
    one-sided tests, each at LEVEL / 2, so that a sound engine whose requests err independently of each other fails with
    a probability of at most 2 LEVEL:

      tokens    exact McNemar test of requests whose tokens only the control, or only the candidate, keeps
      logprobs  exact sign test of which of the two has the larger |difference of logprob| on each request; what is
                below RESOLUTION is equal: a pair may run other kernels than a server that repeats itself to the bit

      order     where the two differ visibly, whether the candidate is the further one more often late in the run, or
                the more requests are in flight (`loads`): two exact scans of change points (`pdkit.checks.order`)

    Tests of all requests together are blind to a fault of a few. Besides, therefore, a single answer fails that is off
    by more than GROSS_FLOOR nats and GROSS_FACTOR times the control's largest difference, which is a rule of thumb, or
    that says the same as far as it goes, and whose finish reason or prompt length is another.
    """

    condition: str
    names: tuple[str, ...]
    reference: Arm
    candidate: Arm
    control: Arm | None = None
    rounding: float = 0.0
    loads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        arms = [self.reference, self.candidate] + ([self.control] if self.control is not None else [])
        if not self.names or any(len(arm) != len(self.names) for arm in arms):
            counts = ", ".join(str(len(arm)) for arm in arms)
            raise ValueError(f"parity of {self.condition}: {len(self.names)} requests, {counts} answers")

    @classmethod
    def of(
        cls, round_: Round, reference: Arm, candidate: Arm, control: Arm | None = None, rounding: float = 0.0
    ) -> "Parity":
        """Of the answers to one round; nothing is said of loads."""
        return cls(
            round_.condition, tuple(probe.name for probe in round_.probes), reference, candidate, control, rounding
        )

    @classmethod
    def pool(cls, condition: str, parities: Sequence["Parity"]) -> "Parity":
        """Several rounds with control arms as one, since few requests prove little."""
        return cls(
            condition,
            tuple(f"{each.condition}: {name}" for each in parities for name in each.names),
            tuple(answer for each in parities for answer in each.reference),
            tuple(answer for each in parities for answer in each.candidate),
            tuple(answer for each in parities for answer in each.control or ()),
            loads=tuple(load for each in parities for load in each.loads),
        )

    @cached_property
    def candidate_distribution(self) -> Differences:
        return Differences.of(self.reference, self.candidate)

    @cached_property
    def control_distribution(self) -> Differences | None:
        return None if self.control is None else Differences.of(self.reference, self.control)

    @property
    def problems(self) -> tuple[str, ...]:
        if self.control is None or self.control_distribution is None:
            return self._unequal()
        return self._beyond_control(self.control, self.control_distribution)

    def evidence(self, round_: Round, boundaries: Mapping[str, int]) -> Evidence:
        """How each answer to `round_` differs, for hints: beyond `rounding`, or visibly more than the control's."""
        limit = self.rounding
        if self.control_distribution is not None:
            limit = max(RESOLUTION, GROSS_FACTOR * max(self.control_distribution.largest, default=0.0))
        requests = tuple(self._compared(index, probe, round_, limit) for index, probe in enumerate(round_.probes))
        return Evidence(round_.condition, requests, boundaries)

    def _compared(self, index: int, probe: Probe, round_: Round, limit: float) -> ComparedRequest:
        difference, got = self.candidate_distribution.differences[index], self.candidate[index]
        token, other = difference.diverged, difference.other
        if self.control_distribution is not None:
            same = self.control_distribution.differences[index]
            token = token if same.diverged is None else None
            other = tuple(name for name in other if name not in same.other)
        logprob = next((at for at, delta in enumerate(difference.deltas) if delta > limit), None)
        theirs = (got.tokens, got.text)
        whose = None
        if token is not None and len(got.tokens) > 2:
            right = zip(round_.probes, self.reference, strict=True)
            whose = next((each.name for each, answer in right if (answer.tokens, answer.text) == theirs), None)
        return ComparedRequest(
            probe.name,
            probe.prompt_length,
            len(round_.probes) if round_.batch else round_.in_flight,
            len(self.reference[index].tokens),
            got.cached_tokens,
            token,
            logprob,
            round(difference.largest, 7) if logprob is not None else 0.0,
            other if token is None else (),
            whose,
        )

    def _unequal(self) -> tuple[str, ...]:
        found = []
        for index, difference in enumerate(self.candidate_distribution.differences):
            if difference.diverged is None and difference.largest <= self.rounding and not difference.other:
                continue
            found.append(f"{self.names[index]}: {self._describe(index, difference)}")
        return tuple(found)

    def _describe(self, index: int, difference: Difference) -> str:
        reference, candidate = self.reference[index], self.candidate[index]
        parts = []
        if difference.diverged is not None:
            at = difference.diverged
            ours, theirs = ((*answer.tokens, "end")[at] for answer in (reference, candidate))
            parts.append(f"token {at} is {theirs}, expected {ours}")
        beyond = [at for at, delta in enumerate(difference.deltas) if delta > self.rounding]
        if beyond:
            parts.append(f"logprobs differ first at token {beyond[0]}, by up to {difference.largest:.3g}")
        parts += [
            f"{name} is {str(getattr(candidate, name, ''))[:60]!r}, expected {str(getattr(reference, name, ''))[:60]!r}"
            if hasattr(candidate, name)
            else f"another {name}"
            for name in difference.other
            if name != "text" or difference.diverged is None
        ]
        return "; ".join(parts)

    def _beyond_control(self, answers: Arm, control: Differences) -> tuple[str, ...]:
        candidate = self.candidate_distribution
        found = []
        tokens = sign_test(control.same_tokens, candidate.same_tokens)
        if tokens.p_value <= LEVEL / 2:
            found.append(
                f"tokens: {tokens.larger} requests keep their tokens with the control only, {tokens.smaller} with the "
                f"candidate only; exact McNemar p = {tokens.p_value:.2g} <= {LEVEL / 2:g}"
            )
        further = sign_test_of(self.further.count(1), self.further.count(-1))
        if further.p_value <= LEVEL / 2:
            found.append(
                f"logprobs: the candidate is further away in {further.larger} of {further.larger + further.smaller} "
                f"requests; exact sign test p = {further.p_value:.2g} <= {LEVEL / 2:g}"
            )
        for judged in self._orders():
            found += judged.problems
        for name, reference, ours, theirs in zip(self.names, self.reference, self.candidate, answers):
            if other := sorted(other_end(reference, ours) - other_end(reference, theirs)):
                found.append(f"{name}: another {' and '.join(other)}")
        limit = max(GROSS_FLOOR, GROSS_FACTOR * max(control.largest))
        for name, largest in zip(self.names, candidate.largest):
            if largest > limit:
                found.append(f"{name}: a logprob is off by {largest:.3g}, more than {limit:.3g}")
        return tuple(found)

    @property
    def sentence(self) -> str:
        found, count = self.candidate_distribution, len(self.names)
        right = found.equal if self.control is None else sum(found.same_tokens)
        if self.control is None and self.rounding:
            right = count - len(self.problems)
        how = (
            "have the monolithic server's tokens, and logprobs no further off than its own"
            if self.control is not None
            else f"equal the monolithic server's, logprobs within {self.rounding:g}"
            if self.rounding
            else "equal the monolithic server's to the bit"
        )
        return f"{self.condition}: {right} of {count} answers {how}"

    @cached_property
    def further(self) -> tuple[int, ...]:
        """Of each request: 1 where the candidate is visibly further off than the control, -1 where it is nearer, else 0."""
        if self.control_distribution is None:
            return ()
        arms = (self.candidate_distribution, self.control_distribution)
        visible = ([max(each, RESOLUTION) for each in arm.largest] for arm in arms)
        return tuple((ours > theirs) - (ours < theirs) for ours, theirs in zip(*visible, strict=True))

    def _orders(self) -> tuple[Ordered, ...]:
        """Of the requests that candidate and control are not equally far off: which of the two is, by number and load."""
        differing = [index for index, sign in enumerate(self.further) if sign]
        further = [self.further[index] > 0 for index in differing]
        orders: tuple[Ordered, ...] = (by_number("candidate further off", further, LEVEL / 2),)
        if len(self.loads) == len(self.names):
            orders += (by_load("candidate further off", further, [self.loads[i] for i in differing], LEVEL / 2),)
        return orders

    def report(self, most: int = 4) -> str:
        """Both distributions and what is wrong, the first `most` of it; with 0 the distributions alone."""
        problems = self.problems
        rule = (
            "not further from the reference than the control arm"
            if self.control is not None
            else f"logprobs within {self.rounding:g}"
            if self.rounding
            else "equal to the bit"
        )
        lines = [
            f"parity, {self.condition}: {'FAIL' if problems else 'PASS'}, {len(self.names)} requests, rule: {rule}",
            f"  candidate  {self.candidate_distribution.report()}",
        ]
        if self.control_distribution is not None:
            lines.append(f"  control    {self.control_distribution.report()}")
        lines += [f"  {problem}" for problem in problems[:most]]
        if 0 < most < len(problems):
            lines.append(f"  and {len(problems) - most} more")
        return "\n".join(lines)
