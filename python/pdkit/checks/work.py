"""Who did the work: where the transfer is withheld, a right answer is the failure.

Decode that computes prompts itself, when a transfer fails or whenever it likes, answers rightly and hides that the
deployment does not disaggregate. So transfers of one prompt length per class bring nothing but zeros, and decode's
answer must show it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import requests

from pdkit.checks.accounting.checks import unaccounted
from pdkit.checks.http import abort_until_ended, bootstrap, post
from pdkit.checks.judgement import Judgement
from pdkit.checks.parity.answers import Answer, AnswerError
from pdkit.checks.parity.checks import ParityArms
from pdkit.checks.parity.plan import Round, generate_probe
from pdkit.checks.parity.verdict import compare

PATIENCE_S = 10.0


@dataclass(frozen=True)
class Withheld(Judgement):
    """Answers to prompts whose transfer brought nothing, by prompt length; None where the request failed."""

    answers: Mapping[int, tuple[Answer, Answer | None]]

    @property
    def problems(self) -> tuple[str, ...]:
        own = [n for n, (right, got) in self.answers.items() if got is not None and compare(right, got).is_none]
        if not own:
            return ()
        lengths = ", ".join(map(str, own))
        return (f"decode did the work itself: prompts of {lengths} tokens are answered rightly without their transfer",)

    def report(self) -> str:
        tried = ", ".join(map(str, self.answers))
        if self.problems:
            return f"who did the work: FAIL, {self.problems[0]} (tried: {tried})"
        return f"who did the work: PASS, no prompt of {tried} tokens is answered rightly without its transfer"


def work_ids(length: int) -> list[int]:
    """`length` token ids, others for each length."""
    return [12 + (index * index + length) % 230 for index in range(length)]


def read_answer(answer: requests.Response) -> Answer | None:
    """The answer that a response with status 200 holds, None where there is none."""
    if answer.status_code != 200:
        return None
    try:
        return Answer.of_generate(answer.json())
    except (AnswerError, ValueError):
        return None


def is_error(answer: requests.Response) -> bool:
    """Whether a response reports a failure: a server error, or an answer that was aborted."""
    got = read_answer(answer)
    return answer.status_code >= 500 or (got is not None and (got.finish or "").startswith("abort"))


def said(answer: requests.Response) -> str:
    """Status and beginning of a response, on one line."""
    return f"status {answer.status_code}, {' '.join(answer.text.split())[:150]}"


class WorkChecks(ParityArms):
    """Put it before the servers.

    withheld_lengths   prompt lengths whose state arrives as zeros by how the servers were launched
    failing_lengths    prompt lengths whose transfer fails
    failing_delays     seconds after which prefill's half of a request is aborted
    """

    needs: tuple[str, ...] = ("base_host", "bootstrap_port")

    withheld_lengths: Sequence[int] = ()
    failing_lengths: Sequence[int] = ()
    failing_delays: Sequence[float] = (0.0, 0.005, 0.02, 0.1)
    work_tokens = 6

    @unaccounted
    def test_answers_need_their_transfer(self) -> None:
        if not self.withheld_lengths:
            self.skipTest("nothing withholds transfers here; set withheld_lengths")
        probes = tuple(generate_probe(f"withheld-{n}", work_ids(n), self.work_tokens) for n in self.withheld_lengths)
        right = self.reference_alone(Round("withheld transfers", probes))
        answers: dict[int, tuple[Answer, Answer | None]] = {}
        for length, probe, reference in zip(self.withheld_lengths, probes, right):
            answer = post(self.lb_url, "/generate", probe.request, self.request_timeout)
            answers[length] = reference, read_answer(answer)
        Withheld(answers).assert_passed()

    @unaccounted
    def test_decode_answers_no_failed_receive(self) -> None:
        """Decode's own answer, past the load balancer, after transfers that broke: an error, never a 200."""
        wrong, failed = [], 0
        for length in self.failing_lengths:
            answer = self._decode_answer(length, None)
            failed += is_error(answer)
            if not is_error(answer):
                wrong.append(f"a transfer of {length} tokens that arrives broken: {said(answer)}")
        for delay in self.failing_delays:
            right = self.right_whole(150)
            answer = self._decode_answer(150, delay)
            failed += is_error(answer)
            got = read_answer(answer)
            if not is_error(answer) and not (got and compare(right, got).is_none):
                wrong.append(f"prefill's half aborted after {delay:g} s: {said(answer)}")
        print(f"failed receives: {failed} of {len(self.failing_lengths) + len(self.failing_delays)} requests failed, "
              f"{len(wrong)} of the others got another answer than the right one", flush=True)  # fmt: skip
        if wrong:
            self.fail("a failed receive is answered as if it had not failed: " + "; ".join(wrong))
        self.assertGreater(failed, 0, "no receive failed: nothing was tried")

    def right_whole(self, length: int) -> Answer:
        probe = generate_probe(f"whole-{length}", work_ids(length), self.work_tokens)
        return self.reference_alone(Round("whole transfers", (probe,)))[0]

    def _decode_answer(self, length: int, abort_after: float | None) -> requests.Response:
        """Decode's answer to a request that goes to both as a load balancer sends it."""
        probe = generate_probe(f"by-hand-{length}", work_ids(length), self.work_tokens)
        rid = f"by-hand-{time.monotonic_ns()}"
        body = {**probe.request, **bootstrap(self.base_host, self.bootstrap_port)}
        with ThreadPoolExecutor(2) as pool:
            decode = pool.submit(post, self.decode_url, "/generate", {**body, "rid": f"{rid}-d"}, self.request_timeout)
            prefill = pool.submit(post, self.prefill_url, "/generate", {**body, "rid": rid}, self.request_timeout)
            if abort_after is not None:
                time.sleep(abort_after)
                post(self.prefill_url, "/abort_request", {"rid": rid}, self.request_timeout)
            prefill.result()
            wait([decode], PATIENCE_S)
            # it may wait for a room that was closed before it came
            abort_until_ended(decode, [self.decode_url], f"{rid}-d", self.request_timeout)
            return decode.result()
