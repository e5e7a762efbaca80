"""Races: requests that share a prefix while both are in flight, and aborts whose pages the next request gets.

Which of two requests is first is a matter of milliseconds, so the offset between them is swept.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import requests

from pdkit.checks.accounting.checks import unaccounted
from pdkit.checks.http import RequestFailed, abort_until_ended, generate, greedy, post
from pdkit.checks.parity.answers import Answer, AnswerError
from pdkit.checks.parity.checks import ParityArms
from pdkit.checks.parity.plan import Probe, Round, generate_probe
from pdkit.checks.parity.references import ask


def race_ids(length: int, seed: int) -> list[int]:
    """`length` token ids, others for each seed."""
    return [10 + (index * (7 + seed % 11) + seed * 17 + index * index) % 230 for index in range(length)]


class RaceChecks(ParityArms):
    """Put it before the servers.

    race_offsets   seconds between two requests that share a prefix
    race_prefix    tokens that they share; race_tail: tokens of their own
    abort_storm    requests that their clients leave at once
    abort_delays   seconds after which they do
    parallel_samples  n > 1 works; sample_requests: how many such requests are in flight at once
    """

    race_offsets: Sequence[float] = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05)
    race_prefix = 200
    race_tail = 40
    race_tokens = 6
    abort_storm = 32
    abort_delays: Sequence[float] = (0.0, 0.005, 0.02, 0.05)
    parallel_samples = False
    sample_requests = 12
    samples = 3

    def test_shared_prefix_in_flight(self) -> None:
        """Two of one length, different in their tails only, with empty caches each time."""
        probes, arms = [], []
        for turn, offset in enumerate(self.race_offsets):
            prefix = race_ids(self.race_prefix, turn)
            pair = [
                generate_probe(
                    f"{half} of two, {offset * 1000:g} ms apart",
                    [*prefix, *race_ids(self.race_tail, 100 * turn + number)],
                    self.race_tokens,
                )
                for number, half in enumerate(("first", "second"), 1)
            ]
            self.empty_prefix_caches()
            arms += self._apart(pair, offset)
            probes += pair
        self._assert_race("races: shared prefixes in flight", probes, arms)

    def _apart(self, pair: Sequence[Probe], offset: float) -> list[Answer]:
        with requests.Session() as session, ThreadPoolExecutor(len(pair)) as pool:
            asked = []
            for probe in pair:
                asked.append(pool.submit(ask, session, self.lb_url, probe, self.request_timeout))
                time.sleep(offset)
            return [each.result() for each in asked]

    def test_parallel_samples_in_flight(self) -> None:
        """Each sample of requests with n > 1 that are all in flight at once equals the answer of one by itself."""
        if not self.parallel_samples:
            self.skipTest("n > 1 does not work with these servers")
        probes = [
            generate_probe(f"request {number}", race_ids(90 + 7 * number, 5000 + number), self.race_tokens)
            for number in range(self.sample_requests)
        ]
        with ThreadPoolExecutor(len(probes)) as pool:
            answers = [answer for each in pool.map(self._samples, probes) for answer in each]
        named = [
            replace(probe, name=f"{probe.name}, sample {sample}") for probe in probes for sample in range(self.samples)
        ]
        self._assert_race("races: parallel samples in flight", named, answers)

    def _samples(self, probe: Probe) -> list[Answer]:
        """Those of `probe` with n > 1; fails where one is missing or was not answered."""
        body = {**probe.request, "sampling_params": {**probe.request["sampling_params"], "n": self.samples}}
        try:
            told = generate(self.lb_url, body, self.request_timeout)
            answers = [Answer.of_generate(each) for each in told]
        except (RequestFailed, AnswerError) as failure:
            self.fail(f"races: parallel samples in flight: {probe.name} with n = {self.samples}: {failure}")
        self.assertEqual(len(answers), self.samples, f"races: parallel samples in flight: {probe.name}")
        return answers

    @unaccounted
    def test_pages_of_aborted_requests(self) -> None:
        """Clients leave while transfers are in flight; the next requests, of the same lengths, get their pages."""
        for turn, delay in enumerate(self.abort_delays):
            with ThreadPoolExecutor(self.abort_storm) as pool:
                list(pool.map(partial(self._abort_by_id, delay), range(self.abort_storm)))
            probes = [
                generate_probe(f"after {self.abort_storm} aborts at {delay * 1000:g} ms, {number}",
                               race_ids(160, 1000 * turn + number), self.race_tokens)
                for number in range(6)
            ]  # fmt: skip
            with requests.Session() as session, ThreadPoolExecutor(len(probes)) as pool:
                answers = list(pool.map(lambda each: ask(session, self.lb_url, each, self.request_timeout), probes))
            self._assert_race("races: pages of aborted requests", probes, answers)

    def _abort_by_id(self, delay: float, number: int) -> None:
        rid = f"storm-{time.monotonic_ns()}-{number}"
        body = {"input_ids": race_ids(160, number), "sampling_params": greedy(24), "rid": rid}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(post, self.lb_url, "/generate", body, self.request_timeout)
            time.sleep(delay)
            abort_until_ended(asked, (self.prefill_url, self.decode_url), rid, self.request_timeout)
            with contextlib.suppress(requests.RequestException):
                asked.result()

    def _assert_race(self, condition: str, probes: Sequence[Probe], answers: Sequence[Answer]) -> None:
        round_ = Round(condition, tuple(probes), in_flight=2)
        reference, control = self.references_of(round_)
        rounding = self.known_references().rounding
        self.assert_parity(self.compared(round_, reference, answers, control, rounding))
