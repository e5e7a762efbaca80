"""Acceptance length of speculative decoding: measured, compared with a reference, asserted.

The acceptance length is the number of tokens that one verification step of the target model yields, the bonus token
included: between 1 (no draft token is ever accepted) and `speculative_num_draft_tokens`. Draft state that is lost on
the way to decode leaves every answer right and only lowers this number, and only for the first steps: decode then
computes draft state of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdkit.checks import http
from pdkit.checks.accuracy.gsm8k import few_shot_prompts
from pdkit.checks.base import Checks
from pdkit.checks.judgement import Judgement
from pdkit.checks.order import Ordered, by_number
from pdkit.checks.server_info import read_server_info
from pdkit.core import events
from pdkit.core.stats import Signs, sign_test


class AcceptanceError(RuntimeError):
    """An engine that speculates gave no acceptance length; one line says which, and why."""


@dataclass(frozen=True)
class Acceptance:
    """`length`: tokens per verification step, over all requests of `source` together.

    `steps`: verification steps of each request, 0 where it had none; empty where they are not known.
    """

    algorithm: str
    source: str
    length: float
    steps: tuple[int, ...] = ()


NOT_SPECULATING = (
    "acceptance length not checked: the decode server does not speculate (speculative_algorithm is not set)"
)


def from_meta_info(algorithm: str | None, metas: Sequence[Mapping[str, Any]]) -> Acceptance | None:
    """Tokens per verification step over all requests, from `completion_tokens` and `spec_verify_ct` of their meta_info.

    None without an `algorithm`: nothing speculates. Pooled, so that long answers count for more; a mean of
    `spec_accept_length` would not. Raises AcceptanceError if `algorithm` speculates, but no request shows a verification
    step.
    """
    if algorithm is None:
        return None
    verified = [meta for meta in metas if meta.get("spec_verify_ct")]
    if not verified:
        raise AcceptanceError(
            f"the engine speculates ({algorithm}), but none of {len(metas)} requests reports a verification step"
        )
    tokens = sum(meta["completion_tokens"] for meta in verified)
    steps = tuple(meta.get("spec_verify_ct") or 0 for meta in metas)
    source = f"meta_info of {len(verified)} requests, {sum(steps)} steps"
    return Acceptance(algorithm, source, tokens / sum(steps), steps)


def generate(url: str, prompts: Sequence[str], max_new_tokens: int, timeout: float = 600) -> list[Mapping[str, Any]]:
    """meta_info of greedy answers to `prompts`, sent as one batch. Raises AcceptanceError."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens}
    try:
        answers = http.generate(url, {"text": list(prompts), "sampling_params": sampling}, timeout)
        return [one["meta_info"] for one in answers]
    except (http.RequestFailed, KeyError, TypeError) as error:
        raise AcceptanceError(f"{url} did not answer {len(prompts)} prompts: {error!r}") from None


def measure(url: str, decode_url: str, prompts: Sequence[str], max_new_tokens: int = 256) -> Acceptance | None:
    """Acceptance length of `prompts` sent to `url` (the LB); None if the server at `decode_url` does not speculate.

    Raises AcceptanceError, and ServerInfoError where decode does not say whether it speculates.
    """
    algorithm = read_server_info(decode_url).get("speculative_algorithm")
    return from_meta_info(algorithm, generate(url, prompts, max_new_tokens) if algorithm else ())


@dataclass(frozen=True)
class AcceptanceGate(Judgement):
    """The measured length must reach `minimum_ratio` of `reference`. Raises ValueError where there is no reference."""

    measured: Acceptance
    reference: float | None
    minimum_ratio: float = 0.95

    def __post_init__(self) -> None:
        if self.reference is None:
            raise ValueError(
                f"the engine speculates ({self.measured.algorithm}) with acceptance length {self.measured.length:.4f}, "
                "but there is no reference to compare with; set one"
            )
        if not self.reference >= 1 or not 0 < self.minimum_ratio <= 1:
            raise ValueError(
                f"need a reference of at least 1 and a ratio in (0, 1], got {self.reference} and {self.minimum_ratio}"
            )

    @property
    def minimum(self) -> float:
        return (self.reference or 0) * self.minimum_ratio

    @property
    def passed(self) -> bool:
        return self.measured.length >= self.minimum

    def report(self) -> str:
        measured = self.measured
        return (
            f"acceptance length: {'PASS' if self.passed else 'FAIL'}, {measured.length:.4f} ({measured.source}; "
            f"{measured.algorithm}), needs {self.minimum:.4f} = {self.minimum_ratio:g} x {self.reference:g}; "
            f"ratio {measured.length / (self.reference or math.nan):.4f}"
        )


@dataclass(frozen=True)
class FirstDrafts(Judgement):
    """Verification steps that the same short answers took, through the pair and at a server that hands nothing over.

    Fails where the pair's took more than chance explains, by `stats.sign_test` at a one-sided probability of at
    most `level`, or more of them late in the run than early (`pdkit.checks.order`). Raises ValueError where the answers do not pair up.
    """

    measured: Acceptance
    reference: Acceptance
    level: float = 5e-5

    @property
    def found(self) -> Signs:
        return sign_test(self.measured.steps, self.reference.steps)

    @property
    def passed(self) -> bool:
        return self.found.p_value > self.level and self.order.passed

    @property
    def order(self) -> Ordered:
        """Which answers took more steps, in the order in which they were asked for."""
        more = [ours > theirs for ours, theirs in zip(self.measured.steps, self.reference.steps, strict=True)]
        return by_number("more steps than the reference's", more)

    def report(self) -> str:
        found = self.found
        return (
            f"drafts after the KV transfer: {'PASS' if self.passed else 'FAIL'}, {found.larger} of "
            f"{len(self.measured.steps)} answers took more steps than the reference's, {found.smaller} fewer "
            f"({self.measured.length:.4f} and {self.reference.length:.4f} tokens a step; {self.measured.algorithm}); "
            f"exact sign test p = {found.p_value:.2g}, fails at <= {self.level:g}"
            + "".join(f"\n  {each}" for each in self.order.problems)
        )


Measure = Callable[[str, str], Acceptance | None]


class DraftMeasures(Checks):
    """Measures how many drafts are accepted, on prompts of GSM8K; by itself it has no test.

    monolithic_url                it, up when the reference is taken; None where that was done before it stopped
    acceptance_length_reference   tokens per verification step that a sound engine reaches on this load; where it is
                                  None, the server at `monolithic_url` is measured on the same prompts
    acceptance_length_ratio       share of the reference that is asked for
    acceptance_length_prompts     how many prompts
    acceptance_length_tokens      of each answer
    first_drafts_prompts          how many prompts are asked for the first drafts
    first_drafts_tokens           of each answer. The first one comes with the transfer; with one draft token a step, an
                                  even number of others, so that even a single refused draft costs a step
    """

    needs: tuple[str, ...] = ("lb_url", "decode_url", "monolithic_url", "gsm8k_data_path")

    acceptance_length_reference: float | None = None
    acceptance_length_ratio = 0.95
    acceptance_length_prompts = 64
    acceptance_length_tokens = 256
    first_drafts_prompts = 64
    first_drafts_tokens = 25
    first_drafts_reference: Acceptance | None = None

    @classmethod
    def take_acceptance_reference(cls) -> None:
        """From the monolithic server; to be called while it is up where it stops before the test asks."""
        cls.acceptance_length_reference = cls._baseline(cls.measure_acceptance).length

    @classmethod
    def measure_acceptance(cls, url: str, decode_url: str) -> Acceptance | None:
        prompts = few_shot_prompts(cls.gsm8k_data_path, cls.acceptance_length_prompts)
        return measure(url, decode_url, prompts, cls.acceptance_length_tokens)

    @classmethod
    def take_first_drafts_reference(cls) -> None:
        """From the monolithic server; to be called while it is up where it stops before the test asks."""
        cls.first_drafts_reference = cls._baseline(cls.measure_first_drafts)

    @classmethod
    def measure_first_drafts(cls, url: str, decode_url: str) -> Acceptance | None:
        prompts = few_shot_prompts(cls.gsm8k_data_path, cls.first_drafts_prompts)
        return measure(url, decode_url, prompts, cls.first_drafts_tokens)

    @classmethod
    def _baseline(cls, measured_at: Measure) -> Acceptance:
        baseline = measured_at(cls.monolithic_url, cls.monolithic_url)
        assert baseline, f"{cls.monolithic_url}, the baseline, does not speculate"
        return baseline

    def measured_or_skipped(self, measured_at: Measure) -> Acceptance:
        """What `measured_at` finds of the pair. Raises SkipTest where it does not speculate."""
        measured = measured_at(self.lb_url, self.decode_url)
        if measured is None:
            self.skipTest(NOT_SPECULATING)
        return measured


class AcceptanceLengthChecks(DraftMeasures):
    """Speculative decoding must accept about as much as the reference says, on prompts of GSM8K sent through the LB."""

    def test_acceptance_length(self) -> None:
        measured = self.measured_or_skipped(self.measure_acceptance)
        if self.acceptance_length_reference is None and self.monolithic_url:
            self.take_acceptance_reference()
        gate = AcceptanceGate(measured, self.acceptance_length_reference, self.acceptance_length_ratio)
        events.measurement("acceptance length", measured.length)
        gate.assert_passed()


class FirstDraftsChecks(DraftMeasures):
    """Drafts of the first tokens after the KV transfer must be accepted as often as those of the monolithic server."""

    def test_drafts_after_the_hand_over(self) -> None:
        measured = self.measured_or_skipped(self.measure_first_drafts)
        if self.first_drafts_reference is None:
            self.take_first_drafts_reference()
        assert self.first_drafts_reference is not None
        FirstDrafts(measured, self.first_drafts_reference).assert_passed()


class DraftChecks(AcceptanceLengthChecks, FirstDraftsChecks):
    """Both: drafts in general, and those right after the KV transfer."""
