"""Parity up to the context limit: what is cut off behind some length shows in longer prompts only."""

from __future__ import annotations

import numpy as np

from pdkit.checks.parity.checks import ParityArms
from pdkit.checks.parity.plan import Geometry, Round, generate_probe
from pdkit.checks.server_info import read_server_info


def lengths_up_to(context: int, new_tokens: int, shortest: int, count: int) -> list[int]:
    """`count` prompt lengths from `shortest` to the longest that leaves room for `new_tokens`, by a constant factor."""
    longest = context - new_tokens - 1  # SGLang gives one token less than the context has
    if longest <= shortest:
        return [longest]
    return sorted({*np.geomspace(shortest, longest, count).astype(int).tolist(), longest})


class LengthChecks(ParityArms):
    """Put it before the servers.

    length_count   how many prompts; length_shortest: tokens of the shortest of them
    """

    length_count = 4
    length_shortest = 1200
    length_tokens = 3

    def test_parity_up_to_the_context_limit(self) -> None:
        info = read_server_info(self.monolithic_url or self.prefill_url)
        context = Geometry.of(self.model_config(), info).context
        lengths = lengths_up_to(context, self.length_tokens, self.length_shortest, self.length_count)
        probes = tuple(
            generate_probe(f"length-{n}", [10 + (i * i + 3 * n) % 230 for i in range(n)], self.length_tokens)
            for n in lengths
        )
        share = f"{lengths[-1]} of {context} tokens, {lengths[-1] / context:.1%}"
        print(f"the longest compared prompt: {share} of the context", flush=True)
        self.check_parity([Round(f"length: prompts up to {share} of the context", probes)])
