"""By order and by load: are the requests of a run as good late as early, and as good together as alone?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pdkit.checks.judgement import Judgement
from pdkit.core.order import Change, latest_change

LEVEL = 1e-4


@dataclass(frozen=True)
class Ordered(Judgement):
    """Whether requests were bad, in the order of what they are looked at by.

    what    one request in words, such as "wrong answers"
    by      what orders them: "request number" or "requests in flight"
    bad     in that order
    places  see `pdkit.core.order.latest_change`
    level   largest P(fail) where order plays no part, all change points together
    """

    what: str
    by: str
    bad: tuple[bool, ...]
    places: tuple[int, ...] | None = None
    level: float = LEVEL

    @cached_property
    def change(self) -> Change | None:
        return latest_change(self.bad, self.places)

    @property
    def problems(self) -> tuple[str, ...]:
        if self.change is None or self.change.p_value > self.level:
            return ()
        return (self._found(self.change),)

    def _found(self, change: Change) -> str:
        return (
            f"{self.what} by {self.by}: {change.late} of {len(self.bad) - change.after} after the first {change.after}, "
            f"{change.early} of {change.after} before; exact p = {change.p_value:.2g}, every change point considered"
        )

    def report(self) -> str:
        if self.change is None:
            return f"{self.what} by {self.by}: PASS, none of {len(self.bad)}"
        verdict = "FAIL" if self.problems else "PASS"
        return f"order: {verdict}, {self._found(self.change)} (fails at <= {self.level:g})"


def by_number(what: str, bad: Sequence[bool], level: float = LEVEL) -> Ordered:
    """Of requests in the order in which they were sent or answered."""
    return Ordered(what, "request number", tuple(map(bool, bad)), level=level)


def by_load(what: str, bad: Sequence[bool], in_flight: Sequence[int], level: float = LEVEL) -> Ordered:
    """By how many requests were in flight when each began; a change may only be between two different counts."""
    pairs = sorted(zip(in_flight, map(bool, bad), strict=True), key=lambda pair: pair[0])
    counts = [count for count, _ in pairs]
    places = tuple(index for index in range(1, len(counts)) if counts[index] != counts[index - 1])
    return Ordered(what, "requests in flight", tuple(flag for _, flag in pairs), places, level)


def in_flight(intervals: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """How many of the (begin, end) are open when each begins, itself included."""
    return tuple(sum(begin <= at < end or begin == at for begin, end in intervals) for at, _ in intervals)


def of_answers(answered: Sequence[tuple[bool, float, float]]) -> tuple[Ordered, ...]:
    """Wrong answers by number and by load, from (right, begin, end) of each request; numbers are by begin."""
    asked = sorted(answered, key=lambda each: each[1])
    wrong = [not right for right, _, _ in asked]
    loads = in_flight([(begin, end) for _, begin, end in asked])
    return by_number("wrong answers", wrong), by_load("wrong answers", wrong, loads)
