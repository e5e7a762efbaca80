"""Memory: identical rounds of requests, failed ones among them, leave no more behind than the rounds before.

It works where servers expose no counters: what is read is the resident memory of a server's processes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import requests
import scipy

from pdkit.checks.accounting.checks import unaccounted
from pdkit.checks.accounting.counters import still_held
from pdkit.checks.base import Checks
from pdkit.checks.http import abort_until_ended, bootstrap, greedy, post
from pdkit.checks.judgement import Judgement

LEVEL = 1e-3
LEAST_BYTES = 8 << 10  # of a request; what grows more slowly is not told from an allocator's habits


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and all that runs below it."""
    total = 0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += each.memory_info().rss
    return total


@dataclass(frozen=True)
class Growth(Judgement):
    """Resident memory of one server after each of several identical rounds.

    Fails where memory rises with the rounds by Kendall's exact test, at a one-sided probability of at most LEVEL for a
    server whose rounds could as well have come in any other order, and by at least LEAST_BYTES for each request.

    M. G. Kendall, Biometrika 30 (1938) 81-93; slope: H. Theil, Proc. KNAW 53 (1950) 386-392.
    """

    name: str
    resident: tuple[int, ...]
    requests: int

    @property
    def slope(self) -> float:
        """Bytes that each request leaves behind: the median of the slopes between any two rounds."""
        return float(scipy.stats.theilslopes(self.resident, range(len(self.resident))).slope) / self.requests

    @property
    def p_value(self) -> float:
        """Probability of such an order of the rounds, or a clearer one, where memory does not rise."""
        if len(set(self.resident)) == 1:
            return 1.0
        found = scipy.stats.kendalltau(range(len(self.resident)), self.resident, alternative="greater")
        return float(found.pvalue)

    @property
    def problems(self) -> tuple[str, ...]:
        if self.p_value > LEVEL or self.slope < LEAST_BYTES:
            return ()
        return (f"memory of {self.name} grows by {self.slope / 1024:.0f} KiB a request (p = {self.p_value:.1g})",)

    def report(self) -> str:
        verdict = self.problems[0] if self.problems else (
            f"{self.name} {self.slope / 1024:+.1f} KiB a request, no rise (p = {self.p_value:.2g}; fails at <= {LEVEL:g} "
            f"and {LEAST_BYTES >> 10} KiB)"
        )  # fmt: skip
        series = ", ".join(f"{each / (1 << 20):.1f}" for each in self.resident)
        return f"memory: {'FAIL' if self.problems else 'PASS'}, {verdict}; MiB after each round: {series}"


class MemoryChecks(Checks):
    """Put it before the servers.

    A server's memory rises while its pools and caches fill, and then stops; what is kept for each request goes on. So
    the newest `memory_rounds` are judged after each round, and the first time that they do not rise is a pass of that
    server. What a server has free in its heap, from earlier and larger load, hides growth until it is filled: ask it
    of servers that have done little.

    memory_rounds     identical rounds that are judged together, after as many as `memory_warm_up`
    memory_patience   rounds after which memory that still rises is a failure
    memory_requests   answered ones of a round
    memory_aborted    seconds after which clients of others leave
    memory_abandoned  those that prefill alone hears of, and that are aborted when it has computed them
    memory_decoding   those that are aborted by their id while decode answers them
    """

    needs: tuple[str, ...] = (
        "lb_url",
        "prefill_url",
        "decode_url",
        "process_prefill",
        "process_decode",
        "base_host",
        "bootstrap_port",
    )

    memory_rounds = 10
    memory_patience = 30
    memory_warm_up = 2
    memory_requests = 16
    memory_aborted: Sequence[float] = (0.001, 0.01, 0.03, 0.1)
    memory_abandoned = 8
    memory_abandoned_length = 900
    memory_decoding = 4
    memory_decoding_tokens = 400
    memory_timeout = 120.0
    memory_settling = 20.0

    @unaccounted
    def test_memory_does_not_grow(self) -> None:
        resident: dict[str, list[int]] = {name: [] for name in self._processes()}
        for _ in range(self.memory_warm_up):
            self._round()
        grown: dict[str, Growth] = {}
        sent = self.memory_requests + len(self.memory_aborted) + self.memory_decoding + self.memory_abandoned + 1
        for number in range(1, self.memory_patience + 1):
            self._round()
            for name, process in self._processes().items():
                resident[name].append(resident_bytes(process.pid))
            if number >= self.memory_rounds:
                for name, series in resident.items():
                    if name not in grown or grown[name].problems:
                        grown[name] = Growth(name, tuple(series[-self.memory_rounds :]), sent)
                if not any(each.problems for each in grown.values()):
                    break
        print(f"memory: {number} rounds", *(each.report() for each in grown.values()), sep="\n", flush=True)
        wrong = [problem for each in grown.values() for problem in each.problems]
        if wrong:
            self.fail(f"memory: FAIL, {'; '.join(wrong)}")

    def _processes(self) -> Mapping[str, Any]:
        return {"prefill": self.process_prefill, "decode": self.process_decode}

    def _round(self) -> None:
        bodies = [
            {"input_ids": [10 + (index * 5 + number) % 230 for index in range(40 + number)],
             "sampling_params": greedy(3)}
            for number in range(self.memory_requests)
        ]  # fmt: skip
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda body: post(self.lb_url, "/generate", body, self.memory_timeout), bodies))
            list(pool.map(self._hang_up, self.memory_aborted))
            list(pool.map(self._abort_while_decoding, range(self.memory_decoding)))
        self._abandon_some()
        bad = [answer for answer in answers if answer.status_code != 200]
        if bad:
            self.fail(f"{len(bad)} of {len(answers)} answers failed, the first: {bad[0].text[:300]}")
        self._wait_idle()

    def _hang_up(self, seconds: float) -> None:
        """A client that hangs up so long after it asked."""
        body = {"input_ids": [10 + index % 200 for index in range(150)], "sampling_params": greedy(12), "stream": True}
        with contextlib.suppress(requests.RequestException):
            with post(self.lb_url, "/generate", body, (self.memory_timeout, seconds), stream=True):
                pass

    def _abort_while_decoding(self, number: int) -> None:
        """A request that is aborted by its id after its second token, which is decode's own."""
        rid = f"decoding-{time.monotonic_ns()}-{number}"
        ids = [10 + (index + 29 * number) % 200 for index in range(300)]
        body = {"input_ids": ids, "sampling_params": greedy(self.memory_decoding_tokens), "stream": True, "rid": rid}
        with contextlib.suppress(requests.RequestException):
            with post(self.lb_url, "/generate", body, self.memory_timeout, stream=True) as answer:
                lines = filter(None, answer.iter_lines())
                next(lines, None)
                next(lines, None)
                for url in (self.prefill_url, self.decode_url):
                    post(url, "/abort_request", {"rid": rid}, self.memory_timeout)
                list(lines)

    def _abandon_some(self) -> None:
        """Rooms whose state nobody fetches, until well after prefill can have computed them on this machine."""
        began = time.monotonic()
        post(self.lb_url, "/generate", self._abandoned_body(0), self.memory_timeout)
        computed_s = 1.5 * self.memory_abandoned * (time.monotonic() - began)
        with ThreadPoolExecutor(self.memory_abandoned) as pool:
            list(pool.map(partial(self._abandon, computed_s), range(1, self.memory_abandoned + 1)))

    def _abandoned_body(self, number: int) -> dict[str, Any]:
        ids = [10 + (index + 13 * number) % 200 for index in range(self.memory_abandoned_length)]
        return {"input_ids": ids, "sampling_params": greedy(2)}

    def _abandon(self, computed_s: float, number: int) -> None:
        rid = f"abandoned-{time.monotonic_ns()}-{number}"
        body = {**self._abandoned_body(number), "rid": rid, **bootstrap(self.base_host, self.bootstrap_port)}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(post, self.prefill_url, "/generate", body, self.memory_timeout)
            wait([asked], computed_s)
            abort_until_ended(asked, [self.prefill_url], rid, self.memory_timeout)
            asked.result()

    def _wait_idle(self) -> None:
        """Until no server holds a request, where that is counted."""
        if held := still_held((self.prefill_url, self.decode_url), self.memory_settling):
            self.fail(f"memory: (rooms, requests) are still held {self.memory_settling:g} s after a round: {held}")
