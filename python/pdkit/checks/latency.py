"""Latency: a second mode, as a hidden retry makes, in requests through the load balancer and not in those past it.

Where the servers count, the number of requests that they started says so exactly. Elsewhere time must: identical
requests go both ways in a random order; a share that takes much longer than its own way's median is compared by an
exact test, so that a slow machine slows both. On a busy one, where a third takes twice the median anyway, only the
counts see a rare retry.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import scipy

from pdkit.checks.accounting.checks import SETTLE_SECONDS, unaccounted
from pdkit.checks.accounting.counters import read_pair
from pdkit.checks.base import Checks
from pdkit.checks.http import bootstrap, greedy, post_or_fail
from pdkit.checks.judgement import Judgement

LEVEL = 1e-4
SLOW = 1.6  # times the median


@dataclass(frozen=True)
class SecondMode(Judgement):
    """Seconds of identical requests through the load balancer, and of those past it.

    If the load balancer only adds a constant share, a slow one is as likely either way: Fisher's exact test, one-sided,
    fails at a probability of at most LEVEL. R. A. Fisher, J. R. Stat. Soc. 85 (1922) 87-94.
    """

    through: Sequence[float]
    past: Sequence[float]

    @staticmethod
    def slow(seconds: Sequence[float]) -> int:
        bound = SLOW * statistics.median(seconds)
        return sum(each > bound for each in seconds)

    @property
    def p_value(self) -> float:
        """Probability of so many slow ones through the load balancer, or more, given how many there are in all."""
        rows = [[self.slow(each), len(each) - self.slow(each)] for each in (self.through, self.past)]
        return float(scipy.stats.fisher_exact(rows, alternative="greater").pvalue)

    @property
    def problems(self) -> tuple[str, ...]:
        if self.p_value > LEVEL:
            return ()
        return (
            f"latency has a second mode: {self.slow(self.through)} of {len(self.through)} requests through the load "
            f"balancer take more than {SLOW:g} times the median, {self.slow(self.past)} of {len(self.past)} past it",
        )

    def report(self) -> str:
        medians = " and ".join(f"{statistics.median(each) * 1e3:.1f} ms" for each in (self.through, self.past))
        said = (
            self.problems[0]
            if self.problems
            else f"no second mode: {self.slow(self.through)} and {self.slow(self.past)} slow"
        )
        return (
            f"latency: {'FAIL' if self.problems else 'PASS'}, {said}; medians {medians}; "
            f"exact p = {self.p_value:.2g}, fails at <= {LEVEL:g}"
        )


class LatencyChecks(Checks):
    """Put it before the servers; for the night.

    latency_requests  how many each way; latency_in_flight: at a time
    """

    needs: tuple[str, ...] = ("lb_url", "prefill_url", "decode_url", "base_host", "bootstrap_port")

    latency_requests = 500
    latency_in_flight = 4
    latency_length = 100
    latency_tokens = 8
    latency_timeout = 120.0

    @unaccounted
    def test_no_second_mode_of_latency(self) -> None:
        ways = ["through"] * self.latency_requests + ["past"] * self.latency_requests
        random.Random(0).shuffle(ways)
        before = read_pair([self.prefill_url], [self.decode_url], SETTLE_SECONDS)
        with ThreadPoolExecutor(self.latency_in_flight) as pool:
            seconds = list(pool.map(self._seconds, ways))
        found = SecondMode(*([s for way, s in zip(ways, seconds) if way == each] for each in ("through", "past")))
        after = read_pair([self.prefill_url], [self.decode_url], SETTLE_SECONDS)
        if before is not None and after is not None:
            did = after.since(before)
            for side, started in (("prefill", did.prefill.requests), ("decode", did.decode.requests)):
                message = f"requests are served more than once in secret: {side} started {started} for {len(ways)} sent"
                self.assertEqual(started, len(ways), message)
        found.assert_passed()

    def _seconds(self, way: str) -> float:
        ids = [10 + index % 200 for index in range(self.latency_length)]
        body: dict[str, Any] = {"input_ids": ids, "sampling_params": greedy(self.latency_tokens)}
        began = time.perf_counter()
        if way == "through":
            post_or_fail(self.lb_url, "/generate", body, self.latency_timeout)
            return time.perf_counter() - began
        body |= bootstrap(self.base_host, self.bootstrap_port)
        with ThreadPoolExecutor(2) as pool:
            halves = [
                pool.submit(post_or_fail, url, "/generate", body, self.latency_timeout)
                for url in (self.prefill_url, self.decode_url)
            ]
            for half in halves:
                half.result()
        return time.perf_counter() - began
