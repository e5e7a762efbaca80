"""Teacher-forced parity: what a pair says of its own long answers, against a monolithic server's prefill of them.

The pair continues a prompt by hundreds of sampled tokens and reports the logprob of each, which decode computed from
the state that the KV transfer brought. A monolithic server is then given prompt and continuation as one prompt: its
prefill alone says how likely each token was. Their difference, token by token, needs no near tie to show a fault: each
token is a measurement. A control arm, the monolithic server's own continuations scored in the same way, says how far
decode and prefill are apart without any transfer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import scipy

from pdkit.checks import http
from pdkit.checks.base import Checks
from pdkit.checks.http import RequestFailed
from pdkit.checks.judgement import Judgement
from pdkit.checks.parity.answers import Answer, AnswerError
from pdkit.core.quantile import quantile

LEVEL = 1e-3  # of all tests together
NOWHERE = 1e3  # nats, in place of what is not a number
MOST_PROMPTS = 20  # of each arm: all signs of so many are tried
BOUND = 0.1  # nats: the share of tokens that are further off is compared

Differences = tuple[tuple[float, ...], ...]  # by prompt, then by token: nats


@dataclass(frozen=True)
class Forced(Judgement):
    """Own logprob less prefill's, of each token of each continuation, by the pair and by the monolithic server.

    Fails where the candidate's are larger than the control's: in the mean (of tokens that are sampled with other
    probabilities than the true ones the mean of this difference is their Kullback-Leibler divergence), in the mean of
    their absolute values, or in the share beyond BOUND. Each is an exact randomization test over prompts (R. A. Fisher,
    The Design of Experiments (1935), section 21; `sign_flips`), one-sided, at a third of LEVEL: a sound pair, whose
    differences may as well be the control's, fails with a probability of at most LEVEL.
    """

    candidate: Differences
    control: Differences

    MEASURES: ClassVar = ("mean", "mean of absolute values", f"share beyond {BOUND:g}")

    def __post_init__(self) -> None:
        if len(self.candidate) > MOST_PROMPTS:
            raise ValueError(f"{len(self.candidate)} continuations, at most {MOST_PROMPTS} can be compared")
        if not self.candidate or len(self.candidate) != len(self.control) or not all((*self.candidate, *self.control)):
            raise ValueError(
                f"{len(self.candidate)} and {len(self.control)} continuations do not pair up, or one is empty"
            )

    @staticmethod
    def _measured(arm: Differences, measure: int) -> np.ndarray:
        rows = [np.nan_to_num(np.array(row), nan=NOWHERE, posinf=NOWHERE, neginf=-NOWHERE) for row in arm]
        of = (np.mean, lambda row: np.mean(np.abs(row)), lambda row: np.mean(np.abs(row) > BOUND))[measure]
        return np.array([of(row) for row in rows])

    @cached_property
    def p_values(self) -> tuple[float, ...]:
        """Of each of MEASURES."""
        found = []
        for measure in range(len(self.MEASURES)):
            differences = self._measured(self.candidate, measure) - self._measured(self.control, measure)
            found.append(sign_flips(differences))
        return tuple(found)

    @property
    def problems(self) -> tuple[str, ...]:
        return tuple(
            f"{name}: {self._measured(self.candidate, measure).mean():.3g}, the control's is "
            f"{self._measured(self.control, measure).mean():.3g}; exact randomization p = {p_value:.2g}"
            for measure, (name, p_value) in enumerate(zip(self.MEASURES, self.p_values, strict=True))
            if p_value <= LEVEL / len(self.MEASURES)
        )

    @property
    def smallest_shift(self) -> float:
        """The shift of the mean that so many tokens show with 90 %, if their differences vary as the control's do.

        (z_(1-alpha) + z_0.9) * sigma * sqrt(2 / tokens), of a comparison of two means.
        """
        tokens = [token for row in self.control for token in row]
        factor = scipy.stats.norm.ppf(1 - LEVEL / len(self.MEASURES)) + scipy.stats.norm.ppf(0.9)
        return float(factor * np.std(tokens) * math.sqrt(2 / len(tokens)))

    def report(self) -> str:
        lines = [
            f"teacher-forced parity: {'FAIL' if self.problems else 'PASS'}, {len(self.candidate)} continuations; a shift "
            f"of {self.smallest_shift:.2g} nats a token would be seen with 90 %"
        ]
        for name, arm in (("candidate", self.candidate), ("control", self.control)):
            sizes = [abs(token) for row in arm for token in row]
            shown = " ".join(f"{self._measured(arm, measure).mean():.3g}" for measure in range(len(self.MEASURES)))
            lines.append(
                f"  {name:<9} {len(sizes)} tokens: {shown} ({', '.join(self.MEASURES)}), p99 {quantile(sizes, 0.99):.3g}"
            )
        return "\n".join((*lines, *(f"  {each}" for each in self.problems)))


def sign_flips(differences: np.ndarray) -> float:
    """P(the sum of differences is at least what it is), where each may as well have the other sign: all signs, counted."""
    sums = np.zeros(1)
    for each in differences:
        sums = np.concatenate([sums + each, sums - each])
    observed = differences.sum()
    return float(np.mean(sums >= observed - 1e-12 * np.abs(differences).sum()))


def continued(url: str, ids: Sequence[int], tokens: int, timeout: float) -> Answer:
    """A sampled continuation of exactly `tokens` tokens with their logprobs. Raises RequestFailed."""
    sampling = {"temperature": 1.0, "max_new_tokens": tokens, "ignore_eos": True}
    return _answer(url, {"input_ids": list(ids), "sampling_params": sampling, "return_logprob": True}, timeout)


def scored(url: str, ids: Sequence[int], continuation: Sequence[int], timeout: float) -> tuple[float, ...]:
    """Prefill's logprob of each token of `continuation` after `ids`. Raises RequestFailed."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    whole = [*ids, *continuation]
    body = {"input_ids": whole, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    logprobs = _answer(url, body, timeout).prompt_logprobs
    if len(logprobs) != len(whole):
        raise RequestFailed(f"{url}: logprobs of {len(logprobs)} prompt tokens, {len(whole)} were sent")
    return tuple(math.nan if each is None else each for each in logprobs[len(ids) :])


def _answer(url: str, body: dict[str, Any], timeout: float) -> Answer:
    try:
        return Answer.of_generate(http.generate(url, body, timeout))
    except AnswerError as error:
        raise RequestFailed(f"{url}: {error}") from None


def differences(url: str, judge_url: str, prompts: Sequence[Sequence[int]], tokens: int, timeout: float) -> Differences:
    """Of each prompt's continuation by the server at `url`, which the one at `judge_url` scores. Raises RequestFailed."""
    found = []
    for ids in prompts:
        answer = continued(url, ids, tokens, timeout)
        prefilled = scored(judge_url, ids, answer.tokens, timeout)
        found.append(tuple(ours - theirs for ours, theirs in zip(answer.logprobs, prefilled, strict=True)))
    return tuple(found)


class ForcedParityChecks(Checks):
    """Put it before the servers.

    forced_prompts  continuations of each arm
    forced_length   tokens of each prompt
    forced_tokens   of each continuation
    """

    needs: tuple[str, ...] = ("lb_url", "monolithic_url", "request_timeout")

    forced_prompts = 16
    forced_length = 48
    forced_tokens = 128
    lb_url: str
    monolithic_url: str
    request_timeout: float

    def forced_ids(self) -> list[list[int]]:
        """The prompts, as token ids that every vocabulary has."""
        return [
            [10 + (index * index + 37 * prompt + index) % 230 for index in range(self.forced_length)]
            for prompt in range(self.forced_prompts)
        ]

    def forced_parity(self) -> Forced:
        prompts, tokens, timeout = self.forced_ids(), self.forced_tokens, self.request_timeout
        candidate = differences(self.lb_url, self.monolithic_url, prompts, tokens, timeout)
        return Forced(candidate, differences(self.monolithic_url, self.monolithic_url, prompts, tokens, timeout))

    def test_parity_teacher_forced(self) -> None:
        self.forced_parity().assert_passed()
