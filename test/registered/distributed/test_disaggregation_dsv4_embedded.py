"""The same test on any machine: prefill and decode are two embedded engines that serve a nano DeepSeek-V4 on CPU."""

import unittest
from pathlib import Path

import pdkit
import requests
import test_disaggregation_dsv4 as dsv4
from deployment_bridge import PDServers
from pdkit.checks.accuracy.checks import GSM8KChecks
from pdkit.claimed_ports import ClaimedPortsMixin
from sglang.test.ci.ci_register import register_cpu_ci

register_cpu_ci(est_time=90, suite="stage-a-test-cpu")

ASSETS = Path(pdkit.__file__).parent / "assets"


class EmbeddedServers(ClaimedPortsMixin, PDServers):
    rung = "embedded"
    engine = "pdkit.engine"
    server_module = "pdkit.engine"

    model_name = str(ASSETS / "nano-dsv4")
    gsm8k_data_path = str(ASSETS / "gsm8k_nano.jsonl")

    prefill_gpus = decode_gpus = range(0)
    server_env = {}

    @classmethod
    def prefill_args(cls):
        return ["--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", cls.bootstrap_port]

    @classmethod
    def decode_args(cls):
        return ["--disaggregation-mode", "decode", "--disaggregation-bootstrap-port", cls.bootstrap_port]


class TestDisaggregationDSV4Embedded(GSM8KChecks, EmbeddedServers):
    def test_gsm8k(self):
        super().test_gsm8k()
        with dsv4.phase("hand-over counters"):
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


if __name__ == "__main__":
    unittest.main()
