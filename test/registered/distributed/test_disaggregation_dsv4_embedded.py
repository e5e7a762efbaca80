"""The same test on any machine: prefill and decode are two embedded engines that serve a nano DeepSeek-V4 on CPU."""

import unittest

import requests
from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.checks.age import AgeChecks
from pdkit.core import events
from pdkit.deployment.embedded import EmbeddedServers
from pdkit.deployment.monolithic import MonolithicBeside
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=30, suite="stage-a-test-cpu")


class TestDisaggregationDSV4Embedded(AgeChecks, GSM8KChecks, MonolithicBeside, EmbeddedServers):
    """Parity comes first: 200 short requests, equal to the bit to what one monolithic server answers."""

    @classmethod
    def take_references(cls):
        cls.take_age_references()

    def test_gsm8k(self):
        super().test_gsm8k()
        with events.phase("KV transfer counters"):
            self.check_counters()

    def check_counters(self):
        prefill = requests.get(f"{self.prefill_url}/server_info", timeout=10).json()
        decode = requests.get(f"{self.decode_url}/server_info", timeout=10).json()

        requests_served = prefill["engine"]["requests"]
        self.assertGreaterEqual(requests_served, 200)
        self.assertEqual(decode["engine"]["requests"], requests_served)
        self.assertEqual(prefill["transfer"]["sent"], requests_served)
        self.assertEqual(decode["transfer"]["received"], requests_served)
        self.assertEqual((prefill["transfer"]["failed"], decode["transfer"]["failed"]), (0, 0))
        self.assertEqual(decode["engine"]["prefill_tokens"], 0)
        self.assertGreater(decode["engine"]["decode_tokens"], requests_served)
        events.finding(f"each of {requests_served} requests was prefilled, transferred and decoded once")


if __name__ == "__main__":
    unittest.main()
