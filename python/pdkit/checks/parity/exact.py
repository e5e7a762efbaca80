"""Parity where a request that is served alone is answered to the bit as a monolithic server answers it.

Put it before a deployment with a monolithic server, in place of ParityChecks.
"""

from __future__ import annotations

from pdkit.checks.parity.checks import AloneParityChecks, IndexerParityChecks, ParityArms, ParityChecks


class ExactParityArms(ParityArms):
    """Requests one at a time must get equal answers, logprobs to the last bit; those served together, see `Parity`.

    On one machine, with the same kernels and chunks, prefill and decode do the arithmetic of a monolithic server. So
    whatever the KV transfer changes shows, also what changes no token: two pages that were exchanged change logprobs by
    4e-6. Requests that are served together are rounded by who else is in the batch; they have a control arm.
    """

    bitwise, alone_is_exact = False, True


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
