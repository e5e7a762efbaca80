"""The seam between prefill and decode: known answers, cut at every position, so that each end of an answer meets it.

Output token 1 is prefill's, token 2 the first of decode's. Whatever may end an answer, a limit, a stop token, a stop
string, is put at each of the first positions, and the answer must be the monolithic server's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pdkit.checks.parity.answers import Answer
from pdkit.checks.parity.checks import ParityArms
from pdkit.checks.parity.plan import Probe, Round, generate_probe


def cut_probes(ids: Sequence[int], answer: Answer, texts: Sequence[str], positions: int) -> list[Probe]:
    """Requests that end the greedy `answer` to the prompt `ids` at each of its first `positions` tokens.

    texts  of each output token; a stop can be put only where its token or text did not come before
    """
    most, probes = len(answer.tokens), []
    for place in range(1, positions + 1):
        token, text = answer.tokens[place - 1], texts[place - 1]
        before = "".join(texts[: place - 1])
        ways: dict[str, dict[str, Any]] = {"max_new_tokens": {"max_new_tokens": place}}
        if token not in answer.tokens[: place - 1]:
            ways["stop_token_ids"] = {"stop_token_ids": [token], "ignore_eos": False}
        if len(text) > 0 and text.isprintable() and (before + text).find(text) == len(before):
            ways["stop"] = {"stop": [text]}
        for way, sampling in ways.items():
            probes.append(generate_probe(f"{way} at token {place}", ids, most, **sampling))
    return probes


class SeamChecks(ParityArms):
    """Put it before the servers.

    seam_positions  how many of the first output tokens an answer is cut at
    seam_prompts    prompt lengths in tokens
    """

    seam_positions = 5
    seam_prompts: Sequence[int] = (20, 129)
    seam_tokens = 12

    def test_ends_at_every_token(self) -> None:
        probes: list[Probe] = []
        for length in self.seam_prompts:
            ids = [11 + (index * 7 + length) % 240 for index in range(length)]
            probe = generate_probe(f"whole-{length}", ids, self.seam_tokens)
            whole = self.reference_alone(Round("the whole answers", (probe,)))[0]
            texts = self._texts(ids, whole)
            probes += cut_probes(ids, whole, texts, self.seam_positions)
        ways = {probe.name.partition(" at ")[0] for probe in probes}
        self.assertGreater(len(ways), 1, "no answer can be cut by a stop: choose other prompts")
        self.check_parity([Round("the seam, answers cut at each of their first tokens", tuple(probes))])

    def _texts(self, ids: Sequence[int], whole: Answer) -> list[str]:
        """The text that each output token adds, from answers of 1, 2, 3 tokens."""
        probes = tuple(
            generate_probe(f"{count} tokens", ids, count) for count in range(1, min(self.seam_positions, len(whole.tokens)) + 1)
        )  # fmt: skip
        answers = self.reference_alone(Round("the texts of tokens", probes))
        texts, said = [], ""
        for answer in answers:
            text = answer.text or ""
            texts.append(text[len(said) :] if text.startswith(said) else "")
            said = text
        return texts
