"""A mixin that asks whether hand-overs arrive as they were sent, and what happens when one does not.

    class TestDisaggregationDSV4Integrity(TransferIntegrityMixin, ParityMixin, ...):
        corrupted_lengths = tuple(BIT_FLIPS)

The embedded engine verifies a SHA-256 of each hand-over. SGLang from 0.5.21 on can verify an Adler-32 of a request's
KV pages, see `kv_checksum_args`; from 0.5.23 on `SGLANG_TEST_DISAGG_KV_CHECKSUM_MISMATCH_PROB` in the environment of
decode makes that share of the comparisons fail: set `corruption_is_random` then.
"""

from concurrent.futures import ThreadPoolExecutor

import requests

from pdkit.accounting import HandoverAccount, PairCounters, read_pair
from pdkit.accounting_kit import SETTLE_SECONDS, unaccounted
from pdkit.integrity import Outcome, Rejections
from pdkit.parity_kit import collect, flush
from pdkit.parity_plan import Round, generate_probe

KV_CHECKSUM_FLAG = "--disaggregation-enable-kv-checksum"


def kv_checksum_args() -> list[str]:
    """The flag that makes both servers of the installed SGLang check KV pages, or nothing before 0.5.21.

    Not for DeepSeek-V4 as of 0.5.23: `disaggregation.checksum.state_indices_for_request` knows no index of its pool,
    and the checksum of the first request ends prefill with an AssertionError.
    """
    from sglang.srt.server_args import ServerArgs

    return [KV_CHECKSUM_FLAG] if hasattr(ServerArgs, "disaggregation_enable_kv_checksum") else []


class TransferIntegrityMixin:
    """Corrupted hand-overs are rejected, healthy ones are not, and prefill did the work.

    Put it before ParityMixin, whose monolithic answers tell that healthy requests got the right ones.

    corrupted_lengths     lengths of prompts whose hand-over is corrupted by how the servers were launched
    corruption_is_random  some hand-overs are corrupted, and nobody knows which
    integrity_requests    how many requests of healthy hand-overs
    """

    corrupted_lengths = ()
    corruption_is_random = False
    integrity_requests = 16
    integrity_tokens = 8

    @unaccounted
    def test_corrupted_handover_is_rejected(self):
        if not self.corrupted_lengths and not self.corruption_is_random:
            self.skipTest("nothing corrupts hand-overs here; set corrupted_lengths or corruption_is_random")
        healthy, corrupted = self.integrity_probes()
        probes = [probe for turn in zip(healthy, [*corrupted] + [None] * len(healthy)) for probe in turn if probe]
        before = self._pair()
        with ThreadPoolExecutor(len(probes)) as pool:
            rejections = Rejections(list(pool.map(self._ask, probes)))
        print(rejections.report(), flush=True)
        rejections.assert_passed()
        self._assert_alive_and_empty()
        if before is not None:
            after = self._pair().since(before)
            self.assertEqual(
                (after.prefill.failed, after.decode.failed),
                (rejections.rejected, rejections.rejected),
                "hand-overs that failed, as prefill and decode count them, against rejections that the client saw",
            )
        if not self.corruption_is_random:
            self.check_parity([Round("after corrupted hand-overs", tuple(healthy), len(healthy))])

    def test_prefill_did_the_work(self):
        before = self._pair()
        if before is None:
            self.skipTest("this engine's /server_info has no counters of requests and hand-overs")
        healthy, _ = self.integrity_probes()
        round_ = Round("each hand-over is seen on both sides", tuple(healthy), len(healthy))
        flush([self.prefill_url], self.request_timeout)
        self.check_parity([round_])
        cold = self._pair().since(before)
        account = HandoverAccount(cold, len(healthy), len(healthy))
        print(account.report(), flush=True)
        self.assertFalse(account.problems, account.report())
        self.assertEqual(cold.prefill.prefill_tokens, sum(probe.prompt_length for probe in healthy))

        collect(self.lb_url, round_, self.request_timeout)
        cached = self._pair().since(before).since(cold)
        self.assertEqual(cold.decode.bytes, cold.prefill.bytes, "bytes that decode received, and that prefill sent")
        self.assertGreater(
            cached.decode.bytes,
            0.99 * cold.decode.bytes,
            "a prompt whose prefix was in prefill's cache must be handed over as a whole, too",
        )

    def integrity_probes(self):
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

    def _ask(self, probe):
        corrupted = None if self.corruption_is_random else probe.prompt_length in self.corrupted_lengths
        try:
            answer = requests.post(f"{self.lb_url}/generate", json=probe.request, timeout=self.request_timeout)
        except requests.RequestException as error:
            return Outcome(probe.name, 0, f"{type(error).__name__}: {error}", corrupted)
        return Outcome(probe.name, answer.status_code, answer.text, corrupted)

    def _pair(self) -> PairCounters | None:
        return read_pair([self.prefill_url], [self.decode_url], SETTLE_SECONDS)

    def _assert_alive_and_empty(self):
        for name, url in (("prefill", self.prefill_url), ("decode", self.decode_url)):
            try:
                status = requests.get(f"{url}/health", timeout=self.request_timeout).status_code
            except requests.RequestException as error:
                self.fail(f"{name} does not live after a corrupted hand-over: {error}")
            self.assertEqual(status, 200, f"health of {name} after a corrupted hand-over")
        pair = self._pair()
        if pair is not None:
            self.assertTrue(pair.is_idle, f"rooms or requests are still held after corrupted hand-overs: {pair}")
