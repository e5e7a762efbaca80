"""Whether KV transfers arrive as they were sent: corrupted ones must be rejected, in words, and healthy ones never.

    class TestDisaggregationDSV4Integrity(IntegrityChecks, ParityChecks, MonolithicBeside, PDServers):
        corrupted_lengths = tuple(BIT_FLIPS)

The embedded engine verifies a SHA-256 of each KV transfer. SGLang from 0.5.21 on can verify an Adler-32 of a request's
KV pages, see `kv_checksum_args`; from 0.5.23 on `SGLANG_TEST_DISAGG_KV_CHECKSUM_MISMATCH_PROB` in the environment of
decode makes that share of the comparisons fail: set `corruption_is_random` then.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import requests

from pdkit.checks.accounting.checks import SETTLE_SECONDS, unaccounted
from pdkit.checks.accounting.counters import PairCounters, TransferAccount, read_pair
from pdkit.checks.http import flush_caches, post, status_of
from pdkit.checks.judgement import Judgement
from pdkit.checks.parity.checks import ParityArms
from pdkit.checks.parity.plan import Probe, Round, generate_probe
from pdkit.checks.parity.references import collect

KV_CHECKSUM_FLAG = "--disaggregation-enable-kv-checksum"


@dataclass(frozen=True)
class ServedOrRejected:
    """The answer to one request. `corrupted`: whether its KV transfer was; None where only chance knows."""

    name: str
    status: int
    text: str
    corrupted: bool | None

    @property
    def served(self) -> bool:
        return self.status == 200

    def rejected(self, error: str) -> bool:
        """Is it a server error whose text names `error`?"""
        return self.status >= 500 and error.lower() in self.text.lower()


@dataclass(frozen=True)
class Rejections(Judgement):
    """Derives from the outcomes of one load what was wrongly served or rejected, reports and asserts it.

    error  what the text of a rejection must name
    """

    outcomes: Sequence[ServedOrRejected]
    error: str = "checksum"

    @property
    def rejected(self) -> int:
        return sum(outcome.rejected(self.error) for outcome in self.outcomes)

    @property
    def problems(self) -> tuple[str, ...]:
        found = []
        for outcome in self.outcomes:
            text = " ".join(outcome.text.split())[:200]
            if not outcome.served and not outcome.rejected(self.error):
                found.append(f"{outcome.name}: status {outcome.status}, no error that names {self.error!r}: {text}")
            elif outcome.corrupted is True and outcome.served:
                found.append(f"{outcome.name}: its KV transfer was corrupted, and it was served")
            elif outcome.corrupted is False and not outcome.served:
                found.append(f"{outcome.name}: its KV transfer was healthy, and it was rejected: {text}")
        if not self.rejected:
            found.append("nothing was rejected")
        if not any(outcome.served for outcome in self.outcomes):
            found.append("nothing was served")
        return tuple(found)

    def report(self) -> str:
        served = sum(outcome.served for outcome in self.outcomes)
        corrupted = sum(outcome.corrupted is True for outcome in self.outcomes)
        lines = [
            f"transfer integrity: {'FAIL' if self.problems else 'PASS'}, {len(self.outcomes)} requests, {corrupted} "
            f"KV transfers known to be corrupted; {self.rejected} rejected, {served} served"
        ]
        first = next((outcome for outcome in self.outcomes if outcome.rejected(self.error)), None)
        if first:
            lines.append(
                f"  first rejection: {first.name}: status {first.status}: {' '.join(first.text.split())[:200]}"
            )
        return "\n".join(lines + [f"  {problem}" for problem in self.problems])


def kv_checksum_args() -> list[str]:
    """The flag that makes both servers of the installed SGLang check KV pages, or nothing before 0.5.21.

    Not for DeepSeek-V4 as of 0.5.23: `disaggregation.checksum.state_indices_for_request` knows no index of its pool,
    and the checksum of the first request ends prefill with an AssertionError.
    """
    from sglang.srt.server_args import ServerArgs

    return [KV_CHECKSUM_FLAG] if hasattr(ServerArgs, "disaggregation_enable_kv_checksum") else []


class IntegrityChecks(ParityArms):
    """Corrupted KV transfers are rejected, healthy ones are not, and prefill did the work.

    corrupted_lengths     lengths of prompts whose KV transfer is corrupted by how the servers were launched
    corruption_is_random  some KV transfers are corrupted, and nobody knows which
    integrity_requests    how many requests of healthy KV transfers
    """

    corrupted_lengths: Sequence[int] = ()
    corruption_is_random = False
    integrity_requests = 16
    integrity_tokens = 8

    @unaccounted
    def test_corrupted_handover_is_rejected(self) -> None:
        if not self.corrupted_lengths and not self.corruption_is_random:
            self.skipTest("nothing corrupts KV transfers here; set corrupted_lengths or corruption_is_random")
        healthy, corrupted = self.integrity_probes()
        probes = [probe for turn in zip(healthy, [*corrupted] + [None] * len(healthy)) for probe in turn if probe]
        before = self._pair()
        with ThreadPoolExecutor(len(probes)) as pool:
            rejections = Rejections(list(pool.map(self._ask, probes)))
        rejections.assert_passed()
        self._assert_alive_and_empty()
        if before is not None:
            after = self._since(before)
            again = f"requests that failed were started again in secret: prefill started {after.prefill.requests}"
            self.assertEqual(after.prefill.requests, len(probes), again)
            self.assertEqual(
                (after.prefill.failed, after.decode.failed),
                (rejections.rejected, rejections.rejected),
                "KV transfers that failed, as prefill and decode count them, against rejections that the client saw",
            )
        if not self.corruption_is_random:
            self.check_parity([Round("after corrupted KV transfers", tuple(healthy), len(healthy))])

    def test_prefill_did_the_work(self) -> None:
        before = self._pair()
        if before is None:
            self.skipTest("this engine's /server_info has no counters of requests and KV transfers")
        healthy, _ = self.integrity_probes()
        round_ = Round("each KV transfer is seen on both sides", tuple(healthy), len(healthy))
        flush_caches([self.prefill_url], self.request_timeout)
        self.check_parity([round_])
        cold = self._since(before)
        account = TransferAccount(cold, len(healthy), len(healthy))
        print(account.report(), flush=True)
        self.assertFalse(account.problems, account.report())
        self.assertEqual(cold.prefill.prefill_tokens, sum(probe.prompt_length for probe in healthy))

        collect(self.lb_url, round_, self.request_timeout)
        cached = self._since(before).since(cold)
        self.assertEqual(cold.decode.bytes, cold.prefill.bytes, "bytes that decode received, and that prefill sent")
        self.assertGreater(
            cached.decode.bytes,
            0.99 * cold.decode.bytes,
            "a prompt whose prefix was in prefill's cache must be transferred as a whole, too",
        )

    def integrity_probes(self) -> tuple[list[Probe], list[Probe]]:
        """(healthy, corrupted): the longer healthy ones share no length with a corrupted one."""
        plan = self.parity_plan()
        ids = [tuple(probe.request["input_ids"]) for probe in (*plan.rooms[0].probes, *plan.alone[0].probes)]
        ids = [each for each in ids if len(each) not in self.corrupted_lengths]
        stride = max(1, len(ids) // self.integrity_requests)
        chosen = ids[::stride][: self.integrity_requests]
        long = max(ids, key=len)
        healthy = [generate_probe(f"healthy-{i}", each, self.integrity_tokens) for i, each in enumerate(chosen)]
        corrupted = [
            generate_probe(f"corrupted-{length}", (long * length)[:length], self.integrity_tokens)
            for length in self.corrupted_lengths
        ]
        return healthy, corrupted

    def _ask(self, probe: Probe) -> ServedOrRejected:
        corrupted = None if self.corruption_is_random else probe.prompt_length in self.corrupted_lengths
        try:
            answer = post(self.lb_url, "/generate", probe.request, self.request_timeout)
        except requests.RequestException as error:
            return ServedOrRejected(probe.name, 0, f"{type(error).__name__}: {error}", corrupted)
        return ServedOrRejected(probe.name, answer.status_code, answer.text, corrupted)

    def _pair(self) -> PairCounters | None:
        return read_pair([self.prefill_url], [self.decode_url], SETTLE_SECONDS)

    def _since(self, before: PairCounters) -> PairCounters:
        after = self._pair()
        assert after is not None, "the servers have no counters any more"
        return after.since(before)

    def _assert_alive_and_empty(self) -> None:
        for name, url in (("prefill", self.prefill_url), ("decode", self.decode_url)):
            try:
                status = status_of(f"{url}/health", self.request_timeout)
            except requests.RequestException as error:
                self.fail(f"{name} does not live after a corrupted KV transfer: {error}")
            self.assertEqual(status, 200, f"health of {name} after a corrupted KV transfer")
        pair = self._pair()
        if pair is not None:
            self.assertTrue(pair.is_idle, f"rooms or requests are still held after corrupted KV transfers: {pair}")
