"""Parity where a request that is served alone is answered to the bit as a monolithic server answers it.

Put it before a deployment with a monolithic server, in place of ParityChecks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pdkit.checks.parity.answers import Arm
from pdkit.checks.parity.checks import AloneParityChecks, IndexerParityChecks, ParityArms, ParityChecks
from pdkit.checks.parity.plan import Round


class ExactParityArms(ParityArms):
    """Requests one at a time must get equal answers, logprobs to the last bit; those served together, see `Parity`.

    On one machine, with the same kernels and chunks, prefill and decode do the arithmetic of a monolithic server. So
    whatever the KV transfer changes shows, also what changes no token: two pages that were exchanged change logprobs by
    4e-6. Requests that are served together are rounded by who else is in the batch; they have a control arm.
    """

    bitwise = False

    @classmethod
    def reference_alone(cls, round_: Round) -> Arm:
        """The monolithic server's answers to `round_`, asked once, each request alone."""
        return cls.known_references().take_alone(cls.monolithic_url, round_)

    def check_parity(self, rounds: Iterable[Round]) -> None:
        rounds = list(rounds)
        alone = [round_ for round_ in rounds if round_.in_flight == 1 and not round_.batch]
        for round_ in alone:
            reference, candidate = self.reference_alone(round_), self.answers_to(round_)
            self.assert_parity(
                replace(self.compared(round_, reference, candidate), condition=f"{round_.condition}, one at a time")
            )
            if self.caches_prefixes():
                self.assertEqual(self.check_cached(round_, candidate), [])
        together = [round_ for round_ in rounds if round_ not in alone]
        if together:
            super().check_parity(together)


class ExactParityChecks(ExactParityArms, ParityChecks):
    """All of `ParityChecks`, so compared."""


class ExactAloneChecks(ExactParityArms, AloneParityChecks):
    """What is asked one at a time."""

    @classmethod
    def take_references(cls) -> None:
        for round_ in cls.parity_plan().alone:
            cls.reference_alone(round_)


class ExactIndexerChecks(ExactAloneChecks, IndexerParityChecks):
    """The same, and prompts of thousands of tokens."""

    @classmethod
    def take_references(cls) -> None:
        super().take_references()
        for round_ in cls.parity_plan().indexed:
            cls.reference_alone(round_)
