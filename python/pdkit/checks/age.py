"""Answers stay right over the life of one launch: the same short requests again and again, each compared.

A fault that begins with age is seen by the request that is the first to meet it, and named by its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice

from pdkit.checks.http import RequestFailed
from pdkit.checks.judgement import Judgement
from pdkit.checks.parity.checks import ParityArms
from pdkit.checks.parity.plan import Probe, Round, generate_probe
from pdkit.checks.parity.references import collect
from pdkit.checks.parity.verdict import Parity


@dataclass(frozen=True)
class Life(Judgement):
    """Blocks of requests in the order in which they were sent; `sent` is how many they are, all together.

    What is wrong is what the first block that is not at parity says; later ones are not needed.
    """

    blocks: tuple[Parity, ...]

    @cached_property
    def sent(self) -> int:
        return sum(len(block.names) for block in self.blocks)

    @property
    def equal_until(self) -> int:
        """The number of requests before the first that is wrong."""
        before = 0
        for block in self.blocks:
            if wrong := block.problems:
                return before + next(index for index, name in enumerate(block.names) if wrong[0].startswith(name))
            before += len(block.names)
        return before

    @property
    def problems(self) -> tuple[str, ...]:
        wrong = next((block.problems for block in self.blocks if block.problems), ())
        where = f"until request {self.equal_until}" if self.equal_until else "not even in the first request"
        return (f"answers are equal to the monolithic server's {where} of {self.sent}", *wrong) if wrong else ()

    def report(self) -> str:
        if not self.problems:
            return f"age: PASS, answers are equal to the monolithic server's in all of {self.sent} requests"
        headline, *why = self.problems
        return "\n".join([f"age: FAIL, {headline}", *(f"  {each}" for each in why[:4])])


class AgeChecks(ParityArms):
    """Put it before the servers.

    age_requests  how many are sent, one at a time, without emptying a cache
    age_lengths   of their prompts in tokens, in turn
    age_tokens    new tokens of each
    """

    age_requests = 200
    age_lengths: Sequence[int] = (5, 33, 129, 20, 257, 64, 128, 10)
    age_tokens = 3
    age_block = 20

    @classmethod
    def age_probes(cls) -> tuple[Probe, ...]:
        """Different requests, one of each length; the same each time."""
        return tuple(
            generate_probe(f"length-{length}", [10 + (index * index + 7 * length) % 230 for index in range(length)],
                           cls.age_tokens)
            for length in cls.age_lengths
        )  # fmt: skip

    @classmethod
    def take_references(cls) -> None:
        super().take_references()
        cls.take_age_references()

    @classmethod
    def take_age_references(cls) -> None:
        """Of what `test_answers_stay_equal` sends."""
        cls.geometry()  # for a hint
        cls.reference_alone(Round("age", cls.age_probes()))

    def test_answers_stay_equal(self) -> None:
        probes = list(islice(cycle(self.age_probes()), self.age_requests))
        blocks: list[Parity] = []
        for start in range(0, len(probes), self.age_block):
            numbered = [(f"request {start + index + 1} ({each.name})", each)
                        for index, each in enumerate(probes[start : start + self.age_block])]  # fmt: skip
            round_ = Round(f"requests from {start + 1} on", tuple(probe for _, probe in numbered))
            try:
                answers = collect(self.lb_url, round_, self.request_timeout)
            except RequestFailed as failure:
                self.fail(f"age: FAIL, equal until request {start}, then one failed: {failure}")
            parity = self.compared(round_, self.reference_alone(round_), answers)
            blocks.append(replace(parity, names=tuple(name for name, _ in numbered)))
            if blocks[-1].problems:
                break
        life = Life(tuple(blocks))
        self.assert_parity(life)
